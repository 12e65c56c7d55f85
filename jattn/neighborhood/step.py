"""Neighborhood attention of one token: of the next one of a sequence, or of an image that is written token by token.

    (o, lse) of the query at `position` alone, over the keys of its window       as `neighborhood_attention` has them

in O(prod w) time whatever the grid. Where every axis is causal a window holds no key after its query along any axis, so
in row-major order all of it has been written by then.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jattn.checks import (
    bind_shapes,
    check_array,
    check_flags,
    check_floating,
    check_grouped_heads,
    check_integer,
    check_values,
)
from jattn.dot_product import dot_product_attention
from jattn.neighborhood.arguments import GRID, check_grid
from jattn.neighborhood.window import Neighborhood, window_bounds


def neighborhood_attention_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B ... K H"],
    value: Float[Array, "B ... K V"],
    position: Int[Array, " axes"],
    *,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = True,
    scale: float | None = None,
    clamp_window: bool = False,
    return_lse: bool = False,
) -> Any:
    """The row of `neighborhood_attention` at one place of the grid.

    Args:
      query: `[B, N, H]`.
      key, value: `[B, *grid, K, H]` and `[B, *grid, K, V]`, of which only the window is read; the token's own key and
        value are in it.
      position: where the query is, one integer for each axis of the grid, static or traced; it must be on the
        grid, which is checked while it is not traced.
      kernel_size, stride, dilation, is_causal, scale, clamp_window, return_lse: as in `neighborhood_attention`, but
        that windows are causal by default.

    Returns:
      `out [B, N, V]`, and with `return_lse` `lse [B, N]`.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a window that reaches beyond the grid.
    """
    grid_letters = GRID[check_grid("key", key)]
    check_array("query", query)
    check_array("value", value)
    sizes = bind_shapes(
        ("query", query, "B N H"), ("key", key, f"B {grid_letters} K H"), ("value", value, f"B {grid_letters} K V")
    )
    check_floating(query=query)
    check_grouped_heads(sizes["N"], sizes["K"])
    check_flags(clamp_window=clamp_window, return_lse=return_lse)
    grid = tuple(key.shape[1:-2])
    position = jnp.asarray(position)
    check_integer(position=position)
    if position.shape != (len(grid),):
        raise ValueError(
            f"position: expected {len(grid)} integers, one for each axis of the grid, got shape {position.shape}"
        )
    outside = f"expected a place on the grid of {grid}, got {position}"
    check_values("position", position, lambda x: (x < 0) | (x >= np.array(grid)), outside)
    seen = jnp.ones((), bool)
    for a, axis in enumerate(Neighborhood(kernel_size, stride, dilation, is_causal).on(grid, clamp_window).axes(grid)):
        start, end = (jnp.asarray(bound)[position[a]] for bound in window_bounds(*axis))
        coordinate = start + np.arange(axis.window)
        token = coordinate * axis.dilation + position[a] % axis.dilation
        key, value = (jnp.take(x, token, axis=1 + a, mode="clip") for x in (key, value))
        seen = seen[..., None] & (coordinate < end)
    key, value = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (key, value))
    options: Any = {"mask": seen.reshape(1, 1, 1, -1), "scale": scale}
    out, lse = dot_product_attention(query[:, None], key, value, **options, return_lse=True)
    return (out[:, 0], lse[:, 0]) if return_lse else out[:, 0]
