"""A mixer that attends to pairs of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.nn.mixer import Projections, last_segment, rms_normalise
from jattn.nn.softmax import KVCache, write_cache
from jattn.sparse.kronecker import kronecker_attention


class KroneckerMixer(nnx.Module):
    """Causal Kronecker attention over pairs of tokens (Alman and Song 2023, definition 1.2; they define no layer).

    Every query reads products of two values, weighted by one softmax over all pairs of earlier tokens: T^3 H
    multiplications, or T w1 w2 H with windows. It knows no positions but the order that causality gives.

    Args:
      width, num_heads, num_kv_heads, head_dim, use_bias, layer_index, num_layers: as in `SoftmaxMixer`.
      qk_norm: normalise the query and both keys to unit root mean square, which bounds logits by sqrt(H) or so.
      windows: for each of the two, how many of the most recent tokens are read; `None` is all.
      scale: of the logits; `None` is `H ** -0.5` here, since the three have entries of about 1.

    State: a `KVCache` whose keys are both keys side by side, and so for values; it holds `capacity` tokens, or what the
    wider window needs.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        use_bias: bool = False,
        qk_norm: bool = True,
        windows: Sequence[int | None] = (None, None),
        scale: float | None = None,
        layer_index: Any = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del layer_index, num_layers
        if len(windows) != 2:
            raise ValueError(f"windows: expected two, an integer or None each, got {windows!r}")
        self.windows = tuple(None if w is None else checks.check_count("windows", w) for w in windows)
        self.qk_norm, self.scale = qk_norm, scale
        options: dict[str, Any] = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "use_bias": use_bias}
        options |= {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.projections = Projections(width, head_dim=head_dim, **options)
        p = self.projections
        linear = {name: options[name] for name in ("use_bias", "dtype", "param_dtype", "rngs")}
        self.second_key = nnx.Linear(width, p.num_kv_heads * p.head_dim, **linear)
        self.second_value = nnx.Linear(width, p.num_kv_heads * p.value_dim, **linear)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        query, keys, values = self._heads(x)
        if state is None:
            options: dict[str, Any] = {"is_causal": True, "windows": self.windows, "scale": self._scale()}
            out = kronecker_attention(query, keys, values, segment_ids=segment_ids, **options)
            return self.projections.merge(out), None
        if segment_ids is None:
            segment_ids = jnp.zeros(positions.shape, jnp.int32)
        live = last_segment(segment_ids, positions)

        def token(carry: Any, at: Any) -> tuple[Any, Array]:
            cache, before = carry
            query, key, value, own, live = (a[:, None] for a in at)
            # What was read before belongs to the first token's segment, and is over when another begins.
            ended = (own != before) & jnp.ones_like(cache.position, bool)
            cache = cache._replace(position=jnp.where(ended, -1, cache.position))
            cache = write_cache(cache, key, value, jnp.ones_like(live))
            return (cache, own), self._read(query, cache)[:, 0]

        steps = [jnp.moveaxis(a, 1, 0) for a in (query, *map(_beside, (keys, values)), segment_ids, live)]
        (cache, _), out = jax.lax.scan(token, (state, segment_ids[:, :1]), steps)
        return self.projections.merge(jnp.moveaxis(out, 0, 1)), cache

    def _heads(self, x: Array) -> tuple[Array, tuple[Array, Array], tuple[Array, Array]]:
        query, key, value = self.projections.split(x)
        keys = key, self.second_key(x).reshape(key.shape)
        if self.qk_norm:
            query, keys = rms_normalise(query), (rms_normalise(keys[0]), rms_normalise(keys[1]))
        return query, keys, (value, self.second_value(x).reshape(value.shape))

    def _scale(self) -> float:
        return self.projections.head_dim**-0.5 if self.scale is None else self.scale

    def _read(self, query: Array, cache: KVCache) -> Array:
        """One token's attention over the pairs that `cache` holds, itself among them."""
        latest = cache.written[:, None] - 1
        masks = [
            (cache.position >= 0) & (cache.position > latest - (cache.position.shape[1] if w is None else w))
            for w in self.windows
        ]
        keys, values = (tuple(jnp.split(a.astype(query.dtype), 2, axis=-1)) for a in (cache.key, cache.value))
        return kronecker_attention(query, keys, values, key_masks=masks, scale=self._scale())

    def init_state(self, batch: int, capacity: int, dtype: Any) -> KVCache:
        p = self.projections
        checks.check_count("batch", batch)
        checks.check_count("capacity", capacity)
        reach = max(capacity if w is None else min(w, capacity) for w in self.windows)
        slots = (batch, reach, p.num_kv_heads)
        return KVCache(
            key=jnp.zeros((*slots, 2 * p.head_dim), dtype),
            value=jnp.zeros((*slots, 2 * p.value_dim), dtype),
            position=jnp.full(slots[:2], -1, jnp.int32),
            written=jnp.zeros((batch,), jnp.int32),
        )

    def flops(self, batch: int, length: int) -> float:
        p = self.projections
        first, second = (length if w is None else min(w, length) for w in self.windows)
        more = 2.0 * batch * length * self.second_key.in_features * p.num_kv_heads * (p.head_dim + p.value_dim)
        pairs = 2.0 * batch * length * first * second * p.num_heads * (p.head_dim + p.value_dim)
        return p.flops(batch * length) + more + pairs


def _beside(factors: tuple[Array, Array]) -> Array:
    return jnp.concatenate(factors, axis=-1)
