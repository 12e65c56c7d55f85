"""The order of tokens in which a tile of a grid is a run of rows.

Along an axis, padded to a multiple of d t, token x = (r t + p) d + g is of dilation group g, tile r and place p. For
tiles t_0 x t_1 x ... of a grid, with row-major indices

    G = prod d_a groups      R = prod ceil(X_a / (d_a t_a)) tiles      P = prod t_a places

token x of batch row b stands in row b G + g at r P + p: what attends to each other shares a row, and what is near is
side by side. Places beyond the grid hold zeros. For one axis without dilation this is the order that tokens have.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jattn.checks import check_array
from jattn.neighborhood.window import per_axis


def token_permute(
    x: Shaped[Array, "B ..."], tile: tuple[int, ...], dilation: int | tuple[int, ...] = 1
) -> Shaped[Array, "BG RP ..."]:
    """`[B, *grid, ...]`, with as many grid axes as `tile` has, as `[B G, R P, ...]`; differentiable.

    Args:
      x: any dtype, with any axes after the grid: queries `[B, *grid, N, H]`, a log-sum-exp, a mask of keys.
      tile: the places of a tile along each axis.
      dilation: as in `neighborhood_attention`.

    Raises:
      ValueError, TypeError: too few axes; a tile or a dilation that is no positive integer.
    """
    rank = len(tile)
    check_array("x", x)
    if x.ndim < 1 + rank:
        raise ValueError(f"x: expected [B, *grid, ...] with a grid of {rank} axes as tile has, got shape {x.shape}")
    tile, dilation = per_axis("tile", tile, rank), per_axis("dilation", dilation, rank)
    grid, rest = x.shape[1 : 1 + rank], x.shape[1 + rank :]
    tiles = _tiles(grid, tile, dilation)
    beyond = [(0, r * t * d - extent) for r, t, d, extent in zip(tiles, tile, dilation, grid, strict=True)]
    if any(after for _, after in beyond):
        x = jnp.pad(x, [(0, 0), *beyond, *[(0, 0)] * len(rest)])
    cut = [size for axis in zip(tiles, tile, dilation, strict=True) for size in axis]
    x = x.reshape(x.shape[0], *cut, *rest)
    x = x.transpose(_by_group(rank, len(rest)))
    return x.reshape(x.shape[0] * math.prod(dilation), math.prod(tiles) * math.prod(tile), *rest)


def token_unpermute(
    y: Shaped[Array, "BG RP ..."],
    grid: tuple[int, ...],
    tile: tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
) -> Shaped[Array, "B ..."]:
    """The tokens of `token_permute(x, tile, dilation)` in the order of their grid, without those beyond it.

    Raises:
      ValueError, TypeError: `y` is not of the shape that such a grid gives; a tile or a dilation that is no positive
        integer.
    """
    rank = len(grid)
    grid, tile = per_axis("grid", grid, rank), per_axis("tile", tile, rank)
    dilation = per_axis("dilation", dilation, rank)
    tiles, groups = _tiles(grid, tile, dilation), math.prod(dilation)
    check_array("y", y)
    places = math.prod(tiles) * math.prod(tile)
    if y.ndim < 2 or y.shape[1] != places or y.shape[0] % groups:
        raise ValueError(
            f"y: expected [B * {groups}, {places}, ...] for a grid of {grid} in tiles of {tile} with dilation "
            f"{dilation}, got {tuple(y.shape)}"
        )
    rest = y.shape[2:]
    y = y.reshape(y.shape[0] // groups, *dilation, *tiles, *tile, *rest)
    order = _by_group(rank, len(rest))
    y = y.transpose(sorted(range(len(order)), key=order.__getitem__))
    y = y.reshape(y.shape[0], *(r * t * d for r, t, d in zip(tiles, tile, dilation, strict=True)), *rest)
    return y[(slice(None), *(slice(extent) for extent in grid))]


def _tiles(grid: tuple[int, ...], tile: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """How many tiles each axis is cut into, the same number in every group."""
    return tuple(math.ceil(extent / (t * d)) for extent, t, d in zip(grid, tile, dilation, strict=True))


def _by_group(rank: int, rest: int) -> tuple[int, ...]:
    """Axes (tiles, places, groups) of each grid axis in turn, as groups of all, tiles of all, places of all."""
    axes = [1 + 3 * a + part for part in (2, 0, 1) for a in range(rank)]
    return (0, *axes, *range(1 + 3 * rank, 1 + 3 * rank + rest))
