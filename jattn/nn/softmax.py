"""Softmax mixers: full causal attention with a key-value cache, and sliding-window attention with a ring buffer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.dot_product import dot_product_attention
from jattn.nn.layout import attend
from jattn.nn.mixer import Projections, last_segment, rms_normalise
from jattn.positions import apply_rotary
from jattn.sparse.sliding_window import sliding_window_attention


class KVCache(NamedTuple):
    """Keys and values of the past. A slot whose position is -1 holds nothing that may be attended.

    `written` is the number of tokens that were written to each row; the token of position p sits in slot
    p mod capacity, so that a window's cache is a ring and a full cache is filled from the front.
    """

    key: Float[Array, "B C K H"]
    value: Float[Array, "B C K V"]
    position: Int[Array, "B C"]
    written: Int[Array, " B"]


def empty_cache(projections: Projections, batch: int, capacity: int, dtype: Any) -> KVCache:
    """A cache of `capacity` slots that holds nothing."""
    checks.check_count("capacity", capacity)
    slots = (batch, capacity, projections.num_kv_heads)
    return KVCache(
        key=jnp.zeros((*slots, projections.head_dim), dtype),
        value=jnp.zeros((*slots, projections.value_dim), dtype),
        position=jnp.full((batch, capacity), -1, jnp.int32),
        written=jnp.zeros((batch,), jnp.int32),
    )


def write_cache(
    cache: KVCache, key: Float[Array, "B T K H"], value: Float[Array, "B T K V"], live: Bool[Array, "B T"]
) -> KVCache:
    """The cache after T more tokens; only the newest that fit are kept, and `live` says which may be attended later.

    Raises:
      ValueError: a cache of another number of rows or other heads than those of the tokens.
    """
    checks.bind_shapes(
        ("key", key, "B T K H"), ("value", value, "B T K V"), ("state.key", cache.key, "B C K H"),
        ("state.value", cache.value, "B C K V"), ("state.position", cache.position, "B C"),
        ("state.written", cache.written, "B"),
    )  # fmt: skip
    capacity = cache.position.shape[1]
    length = key.shape[1]
    kept = min(length, capacity)
    order = cache.written[:, None] + jnp.arange(length - kept, length, dtype=jnp.int32)
    slots = order % capacity
    rows = jnp.arange(key.shape[0])[:, None]
    # A segment that ended is forgotten: nothing before the last segment's first token may be seen again.
    ended = ~jnp.all(live, axis=1, keepdims=True)
    position = jnp.where(ended, -1, cache.position)
    return KVCache(
        key=cache.key.at[rows, slots].set(key[:, length - kept :].astype(cache.key.dtype), unique_indices=True),
        value=cache.value.at[rows, slots].set(value[:, length - kept :].astype(cache.value.dtype), unique_indices=True),
        position=position.at[rows, slots].set(jnp.where(live[:, length - kept :], order, -1), unique_indices=True),
        written=cache.written + length,
    )


def attend_cache(query: Float[Array, "B 1 N H"], cache: KVCache) -> Float[Array, "B 1 N V"]:
    """One token's attention over everything that `cache` holds."""
    key, value = cache.key.astype(query.dtype), cache.value.astype(query.dtype)
    return dot_product_attention(query, key, value, mask=(cache.position >= 0)[:, None, None, :])


def attend_old_and_new(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    state: KVCache,
    old: Bool[Array, "B T C"],
    own: Bool[Array, "B T T"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T N V"]:
    """Several tokens' attention over a cache and one another.

    Args:
      old, own: which slots of the cache, and which of the tokens, a token may see by their positions. Segments come on
        top: an old slot belongs to the segment of the first token.
    """
    if segment_ids is not None:
        old &= (segment_ids == segment_ids[:, :1])[:, :, None]
        own &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return dot_product_attention(
        query,
        jnp.concatenate([state.key.astype(key.dtype), key], axis=1),
        jnp.concatenate([state.value.astype(value.dtype), value], axis=1),
        mask=jnp.concatenate([old, own], axis=-1)[:, None],
    )


class RotaryBlock(nnx.Module):
    """What mixers of queries and keys with positions share: projections, normalised queries and keys, rotary positions.

    Args:
      width: D.
      num_heads, num_kv_heads, head_dim, value_dim: N, K, H and V; K defaults to N, H to D / N, V to H.
      use_bias: of the projections.
      qk_norm: normalise queries and keys to unit root mean square before the rotation.
      rope_theta: base of the rotary wavelengths, `None` for no positions.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        use_bias: bool = False,
        qk_norm: bool = True,
        rope_theta: float | None = 10_000.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.qk_norm = qk_norm
        self.rope_theta = rope_theta
        self.projections = Projections(
            width,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def heads(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> tuple[Array, Array, Array]:
        query, key, value = self.projections.split(x)
        if self.qk_norm:
            query, key = rms_normalise(query), rms_normalise(key)
        if self.rope_theta is not None:
            query = apply_rotary(query, positions, theta=self.rope_theta)
            key = apply_rotary(key, positions, theta=self.rope_theta)
        return query, key, value


class SoftmaxMixer(RotaryBlock):
    """Causal softmax attention over everything that came before.

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim, use_bias, qk_norm, rope_theta: as in `RotaryBlock`.
      layer_index, num_layers: accepted as every mixer does; not used.

    State: a `KVCache` of `capacity` slots. Tokens beyond the capacity overwrite the oldest: `generate` refuses to go
    there.
    """

    def __init__(self, width: int, *, layer_index: Any = 0, num_layers: int = 1, **options: Any):
        del layer_index, num_layers
        super().__init__(width, **options)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        query, key, value = self.heads(x, positions)
        if state is None:
            arrays = {"segment_ids": segment_ids}
            out = attend(dot_product_attention, query, key, value, arrays=arrays, is_causal=True)
            return self.projections.merge(out), None
        first = state.written[:, None]
        order = first + jnp.arange(x.shape[1], dtype=jnp.int32)
        new = write_cache(state, key, value, last_segment(segment_ids, positions))
        if x.shape[1] == 1:
            return self.projections.merge(attend_cache(query, new)), new
        old = jnp.broadcast_to((state.position >= 0)[:, None, :], (*order.shape, state.position.shape[1]))
        own = order[:, :, None] >= order[:, None, :]
        out = attend_old_and_new(query, key, value, state, old, own, segment_ids)
        return self.projections.merge(out), new

    def init_state(self, batch: int, capacity: int, dtype: Any) -> KVCache:
        return empty_cache(self.projections, batch, capacity, dtype)

    def flops(self, batch: int, length: int) -> float:
        p = self.projections
        return p.flops(batch * length) + batch * length**2 * p.num_heads * (p.head_dim + p.value_dim)


def with_projections_of[Kind: RotaryBlock](
    mixer: SoftmaxMixer, kind: type[Kind], *, rngs: nnx.Rngs, **options: Any
) -> Kind:
    """A mixer of `kind` with a copy of the projections of `mixer`, its norms and its rotary positions.

    Args:
      mixer: stays as it is.
      rngs: of what `kind` has besides.
      options: of `kind`.
    """
    if not isinstance(mixer, SoftmaxMixer):
        raise TypeError(f"mixer: expected a SoftmaxMixer, got {type(mixer).__name__}")
    p = mixer.projections
    converted = kind(
        p.query.in_features,
        num_heads=p.num_heads,
        num_kv_heads=p.num_kv_heads,
        head_dim=p.head_dim,
        value_dim=p.value_dim,
        qk_norm=mixer.qk_norm,
        rope_theta=mixer.rope_theta,
        dtype=p.query.dtype,
        param_dtype=p.query.param_dtype,
        rngs=rngs,
        **options,
    )
    converted.projections = nnx.clone(p)
    return converted


class SlidingWindowMixer(RotaryBlock):
    """Causal softmax attention over the `window` most recent tokens, the token itself included.

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim, use_bias, qk_norm, rope_theta, layer_index, num_layers: as
        in `SoftmaxMixer`.
      window: W, how many keys a query sees.

    State: a `KVCache` used as a ring of `min(window, capacity)` slots, whatever the length of the text.
    """

    def __init__(self, width: int, *, window: int = 128, layer_index: Any = 0, num_layers: int = 1, **options: Any):
        del layer_index, num_layers
        super().__init__(width, **options)
        self.window = checks.check_count("window", window)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        query, key, value = self.heads(x, positions)
        if state is None:
            arrays = {"segment_ids": segment_ids}
            out = attend(sliding_window_attention, query, key, value, arrays=arrays, window=self.window)
            return self.projections.merge(out), None
        capacity = state.position.shape[1]
        new = write_cache(state, key, value, last_segment(segment_ids, positions))
        if x.shape[1] == 1:
            # The ring holds no more than a window, so all that it holds is within reach.
            return self.projections.merge(attend_cache(query, new)), new
        # The ring in order of age stands before the new tokens, so that the window is a band again.
        slots = (state.written[:, None] + jnp.arange(capacity)) % capacity
        rows = jnp.arange(x.shape[0])[:, None]
        live = state.position[rows, slots] >= 0
        own = jnp.ones(positions.shape, jnp.int32) if segment_ids is None else segment_ids
        nothing = jnp.min(own, axis=1, keepdims=True) - 1
        out = sliding_window_attention(
            query,
            jnp.concatenate([state.key[rows, slots].astype(key.dtype), key], axis=1),
            jnp.concatenate([state.value[rows, slots].astype(value.dtype), value], axis=1),
            window=self.window,
            offset=capacity,
            segment_ids=(own, jnp.concatenate([jnp.where(live, own[:, :1], nothing), own], axis=1)),
        )
        return self.projections.merge(out), new

    def init_state(self, batch: int, capacity: int, dtype: Any) -> KVCache:
        return empty_cache(self.projections, batch, min(self.window, capacity), dtype)

    def flops(self, batch: int, length: int) -> float:
        p = self.projections
        window = min(self.window, length)
        return p.flops(batch * length) + 2.0 * batch * length * window * p.num_heads * (p.head_dim + p.value_dim)
