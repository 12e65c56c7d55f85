"""Neighborhood attention on a grid whose first axis is split over a mesh axis, by a halo exchange.

Device i holds the rows i L .. (i + 1) L - 1 of X. In the middle its queries see `back` rows before these and `ahead`
rows after; at the ends of the grid windows are moved inward. So every device attends on a slab of L + back + ahead
rows, the first and the last ones of the grid where it would reach beyond it: the slab's borders are then those of the
grid, or so far off that no query of the device feels them, and windows on the slab are windows on the grid.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jattn.halo import neighbours
from jattn.neighborhood.neighborhood import neighborhood_attention
from jattn.neighborhood.window import Axis, Neighborhood, window_bounds


def halo_attention(
    query: Array, key: Array, value: Array, *, axis: str, key_mask: Array | None = None,
    kernel_size: Any, stride: Any = 1, dilation: Any = 1, is_causal: Any = False, clamp_window: bool = False,
    **options: Any,
) -> Array:  # fmt: skip
    """The attention of this device's queries; called inside of a `shard_map` over `axis`.

    Raises:
      NotImplementedError: pieces in which the groups of dilations, or the queries that share a window, do not end.
    """
    devices, rows = jax.lax.axis_size(axis), query.shape[1]
    grid = devices * rows, *query.shape[2:-2]
    fitted = Neighborhood(kernel_size, stride, dilation, is_causal).on(grid, clamp_window)
    first = fitted.axes(grid)[0]
    unit = first.stride * first.dilation
    if rows % unit:
        raise NotImplementedError(
            f"context: pieces of {rows} rows do not divide by stride x dilation = {unit}; split fewer or other rows"
        )
    back, ahead = _reach(first)
    slab = min(rows + back + ahead, grid[0])
    index = jax.lax.axis_index(axis)
    begin = jnp.clip(index * rows - back, 0, grid[0] - slab)
    others = min(back + ahead, grid[0] - rows)

    def around(x: Array) -> Array:
        """The rows of the slab."""
        (before,), (after,) = neighbours(others, axis, x), neighbours(-others, axis, x)
        held = jnp.concatenate([before, x, after], axis=1)
        return jax.lax.dynamic_slice_in_dim(held, begin - (index * rows - others), slab, axis=1)

    # Queries of other devices are no one's concern: their rows are zeros, and what becomes of them is cut off.
    own = index * rows - begin
    room = [(0, 0), (slab - rows, slab - rows), *[(0, 0)] * (query.ndim - 2)]
    queries = jax.lax.dynamic_slice_in_dim(jnp.pad(query, room), slab - rows - own, slab, axis=1)
    out = neighborhood_attention(
        queries,
        around(key),
        around(value),
        key_mask=None if key_mask is None else around(key_mask),
        kernel_size=fitted.kernel_size,
        stride=fitted.stride,
        dilation=fitted.dilation,
        is_causal=fitted.is_causal,
        **options,
    )
    return jax.lax.dynamic_slice_in_dim(out, own, rows, axis=1)


def _reach(axis: Axis) -> tuple[int, int]:
    """Rows that queries far from the borders see beyond their unit of stride x dilation rows, in whole units."""
    unit = axis.stride * axis.dilation
    first = math.ceil(axis.window / axis.stride) * unit
    start, end = window_bounds(*axis._replace(extent=2 * first + unit))
    rows = np.arange(first, first + unit)
    place = rows % axis.dilation
    back = first - int(np.min(start[rows] * axis.dilation + place))
    ahead = int(np.max((end[rows] - 1) * axis.dilation + place)) - (first + unit - 1)
    return math.ceil(back / unit) * unit, math.ceil(ahead / unit) * unit
