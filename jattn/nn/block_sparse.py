"""A softmax mixer under a mask and a score function of the user's own, with weights for the score function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import catalog
from jattn.masks import Causal, Full, Mask
from jattn.nn.layout import attend
from jattn.nn.mixer import last_segment
from jattn.nn.softmax import KVCache, RotaryBlock, empty_cache, write_cache
from jattn.sparse.block_mask import BlockMask
from jattn.sparse.block_sparse import ScoreMod, block_sparse_attention


class BlockSparseMixer(RotaryBlock):
    """Causal softmax attention under any mask, with any function of the scores (FlexAttention's layer).

        Causal() & (SlidingWindow(256) | Sink(4))                                         as mask
        def alibi(score, b, h, q_pos, kv_pos, slopes):                                    as score_mod
            return score + slopes[h] * (kv_pos - q_pos)
        def slopes(num_heads): return 0.5 ** jnp.arange(1.0, num_heads + 1)               as score_parameters

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim, use_bias, qk_norm, rope_theta, layer_index, num_layers: as in
        `SoftmaxMixer`. A score function that knows positions may want `rope_theta=None`.
      mask: a `jattn.masks.Mask` over positions in the row, joined with `Causal()`.
      score_mod: as in `block_sparse_attention`, or `None`.
      score_parameters: `f(num_heads) -> array or tuple of arrays`, the first values of trained weights that `score_mod`
        takes after `kv_pos`; or `None`.

    The last three may be given by name, "module:name" or "path/to/file.py:name", as a configuration of a run has them.

    State: a `KVCache` of `capacity` slots. Tokens beyond the capacity overwrite the oldest: `generate` refuses to go
    there.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        mask: Mask | str | None = None,
        score_mod: ScoreMod | str | None = None,
        score_parameters: Callable[[int], Any] | str | None = None,
        layer_index: Any = 0,
        num_layers: int = 1,
        param_dtype: Any = jnp.float32,
        **options: Any,
    ):
        del layer_index, num_layers
        super().__init__(width, num_heads=num_heads, param_dtype=param_dtype, **options)
        mask = catalog.load(mask) if isinstance(mask, str) else mask
        if not isinstance(mask, Mask | None):
            raise TypeError(
                f"mask: expected a jattn.masks.Mask, got {type(mask).__name__}; jattn.masks.Fn makes one of a predicate"
            )
        self.mask = Causal() if mask is None else Causal() & mask
        self.score_mod = catalog.load(score_mod) if isinstance(score_mod, str) else score_mod
        if self.score_mod is None and score_parameters is not None:
            raise ValueError("score_parameters: there is no score_mod to read them")
        first = catalog.load(score_parameters) if isinstance(score_parameters, str) else score_parameters
        values = () if first is None else first(num_heads)
        values = values if isinstance(values, tuple) else (values,)
        self.score_parameters = nnx.List([nnx.Param(jnp.asarray(value, param_dtype)) for value in values])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        query, key, value = self.heads(x, positions)
        captured = tuple(parameter[...] for parameter in self.score_parameters)
        if state is None:
            arrays = {"segment_ids": segment_ids, "captured": captured or None}
            options = {"block_mask": self.mask, "score_mod": self.score_mod}
            return self.projections.merge(
                attend(block_sparse_attention, query, key, value, arrays=arrays, **options)
            ), None
        order = state.written[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
        new = write_cache(state, key, value, last_segment(segment_ids, positions))
        # Several tokens look at the old cache and at one another, so that none misses what another overwrote.
        seen, slots, ids = new, new.position, None
        if x.shape[1] > 1:
            seen = KVCache(
                jnp.concatenate([state.key.astype(key.dtype), key], axis=1),
                jnp.concatenate([state.value.astype(value.dtype), value], axis=1),
                jnp.concatenate([state.position, order], axis=1),
                state.written,
            )
            slots = seen.position
            if segment_ids is not None:  # what is cached belongs to the first token's segment
                old = jnp.broadcast_to(segment_ids[:, :1], state.position.shape)
                ids = segment_ids, jnp.concatenate([old, segment_ids], axis=1)
        out = block_sparse_attention(
            query,
            seen.key.astype(query.dtype),
            seen.value.astype(query.dtype),
            Full(),
            score_mod=_in_slots(self.mask, self.score_mod),
            captured=(order, slots, *captured),
            segment_ids=ids,
        )
        return self.projections.merge(out), new

    def init_state(self, batch: int, capacity: int, dtype: Any) -> KVCache:
        return empty_cache(self.projections, batch, capacity, dtype)

    def flops(self, batch: int, length: int) -> float:
        p = self.projections
        pairs = length**2 * BlockMask.from_expr(self.mask, length, length).density
        return p.flops(batch * length) + 2.0 * batch * pairs * p.num_heads * (p.head_dim + p.value_dim)


@functools.lru_cache(maxsize=64)
def _in_slots(mask: Mask, score_mod: ScoreMod | None) -> ScoreMod:
    """The mask and the function of queries at positions `order` and keys at `slots`, of which -1 holds nothing."""

    def score(x: Array, b: Array, h: Array, q: Array, s: Array, order: Array, slots: Array, *captured: Array) -> Array:
        q_pos, kv_pos = order[b, q], slots[b, s]
        if score_mod is not None:
            x = score_mod(x, b, h, q_pos, kv_pos, *captured)
        return jnp.where((kv_pos >= 0) & mask.elem(q_pos, kv_pos, h), x, -jnp.inf)

    return score
