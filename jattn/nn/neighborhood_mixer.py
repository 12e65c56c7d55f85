"""Causal neighborhood attention as a mixer: of the past, the nearest W tokens that are a multiple of d away.

    query t sees the keys t, t - d, ..., t - (W - 1) d, as far as they are there

which is `neighborhood_attention` of one causal axis. Layers of dilations 1, d, d^2, ... see far with few keys (DiNA).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.masks import Causal, Fn, Mask, SlidingWindow
from jattn.neighborhood.neighborhood import neighborhood_attention
from jattn.nn.layout import attend
from jattn.nn.mixer import last_segment
from jattn.nn.softmax import KVCache, RotaryBlock, attend_old_and_new, empty_cache, write_cache
from jattn.sparse.block_sparse import block_sparse_attention


class NeighborhoodMixer(RotaryBlock):
    """Causal attention over a dilated window.

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim, use_bias, qk_norm, rope_theta, layer_index, num_layers: as
        in `SoftmaxMixer`.
      kernel_size: W, how many keys a query sees.
      dilation: d, how far apart they are.

    State: a `KVCache` used as a ring of `min(W d, capacity)` slots, whatever the length of the text.
    """

    def __init__(
        self,
        width: int,
        *,
        kernel_size: int = 64,
        dilation: int = 1,
        layer_index: Any = 0,
        num_layers: int = 1,
        **options: Any,
    ):
        del layer_index, num_layers
        super().__init__(width, **options)
        self.kernel_size = checks.check_count("kernel_size", kernel_size)
        self.dilation = checks.check_count("dilation", dilation)

    @property
    def reach(self) -> int:
        """Tokens from the first key of a window to the query, both included, and up to d - 1 before them."""
        return self.kernel_size * self.dilation

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
            return self.projections.merge(self._parallel(query, key, value, segment_ids)), None
        first = state.written[:, None]
        order = first + jnp.arange(x.shape[1], dtype=jnp.int32)
        new = write_cache(state, key, value, last_segment(segment_ids, positions))
        old = self._sees(order, state.position) & (state.position >= 0)[:, None]
        own = self._sees(order, order)
        out = attend_old_and_new(query, key, value, state, old, own, segment_ids)
        return self.projections.merge(out), new

    def _parallel(self, query: Array, key: Array, value: Array, segment_ids: Array | None) -> Array:
        length = query.shape[1]
        if segment_ids is not None:  # documents begin anywhere, so groups of a dilation do not line up between them
            arrays = {"segment_ids": segment_ids}
            return attend(block_sparse_attention, query, key, value, arrays=arrays, block_mask=self._mask())
        # A text shorter than the window is a part of one that is not: what comes after a token it does not see.
        beyond = [(0, 0), (0, max(0, self.reach - length)), (0, 0), (0, 0)]
        query, key, value = (jnp.pad(x, beyond) for x in (query, key, value))
        options: Any = {"kernel_size": self.kernel_size, "dilation": self.dilation, "is_causal": True}
        return attend(neighborhood_attention, query, key, value, arrays={}, **options)[:, :length]

    def _mask(self) -> Mask:
        window = Causal() & SlidingWindow(self.reach - 1)
        return window if self.dilation == 1 else window & _apart(self.dilation)

    def _sees(self, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
        distance = query[:, :, None] - key[:, None, :]
        return (distance >= 0) & (distance < self.reach) & (distance % self.dilation == 0)

    def init_state(self, batch: int, capacity: int, dtype: Any) -> KVCache:
        return empty_cache(self.projections, batch, min(self.reach, capacity), dtype)

    def flops(self, batch: int, length: int) -> float:
        p = self.projections
        seen = min(self.kernel_size, -(-length // self.dilation))
        return p.flops(batch * length) + 2.0 * batch * length * seen * p.num_heads * (p.head_dim + p.value_dim)


def _apart(dilation: int) -> Mask:
    return Fn(lambda q, k, h: (q - k) % dilation == 0, f"a multiple of {dilation} apart")
