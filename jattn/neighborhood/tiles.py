"""Which tiles of keys a tile of queries needs in neighborhood attention: the tables that kernels walk.

In the order of `jattn.neighborhood.permute`, along an axis of group g with L tokens, tile t of T_q queries has the
coordinates i0 = t T_q .. i1 = min(i0 + T_q, L) - 1. Since the bounds of windows never decrease, it needs the tiles of
T_k keys

    start(i0) div T_k .. ceil(end(i1) / T_k) - 1,   of which   ceil(start(i1) / T_k) .. end(i0) div T_k - 1

are full: seen whole by every query of it. On a grid these are products of ranges, row-major. The queries that a tile of
keys j0 .. j1 needs follow likewise from the inverse bounds qstart and qend. A tile of padding alone needs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jattn.masks import EMPTY, FULL, PARTIAL
from jattn.neighborhood.window import (
    Axis,
    Neighborhood,
    group_lengths,
    inverse_window_bounds,
    per_axis,
    window_bounds,
)
from jattn.sparse.block_lists import Lists, compact, kinds_of, make_lists
from jattn.sparse.block_mask import Steps


class Ranges(NamedTuple):
    """Along one axis, for every group and tile: the tiles first .. last that it needs, and the full ones of them.

    A range without a tile has last = first - 1.
    """

    first: Int32[np.ndarray, "d n"]
    last: Int32[np.ndarray, "d n"]
    full_first: Int32[np.ndarray, "d n"]
    full_last: Int32[np.ndarray, "d n"]


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """What is static about the tiles of a problem; hashable, with tables of NumPy that are made when first asked for.

    Attributes:
      grid: the extents X of the axes.
      neighborhood: who sees whom, with a number for every axis.
      q_tile, kv_tile: tokens of a tile along every axis, in the coordinates of a group.
    """

    grid: tuple[int, ...]
    neighborhood: Neighborhood
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]

    @property
    def dilation(self) -> tuple[int, ...]:
        """Groups along every axis."""
        return tuple(axis.dilation for axis in self.axes)

    @property
    def groups(self) -> int:
        """G; row b G + g of a permuted array is group g of batch row b."""
        return math.prod(self.dilation)

    @property
    def q_grid(self) -> tuple[int, ...]:
        """Tiles of queries along every axis, in each group."""
        return self._tiles(self.q_tile)

    @property
    def kv_grid(self) -> tuple[int, ...]:
        """Tiles of keys along every axis, in each group."""
        return self._tiles(self.kv_tile)

    @property
    def q_tiles(self) -> int:
        """R_q."""
        return math.prod(self.q_grid)

    @property
    def kv_tiles(self) -> int:
        """R_k."""
        return math.prod(self.kv_grid)

    @property
    def q_places(self) -> int:
        """P_q, the tokens of a tile of queries."""
        return math.prod(self.q_tile)

    @property
    def kv_places(self) -> int:
        """P_k, the tokens of a tile of keys."""
        return math.prod(self.kv_tile)

    @functools.cached_property
    def axes(self) -> tuple[Axis, ...]:
        return self.neighborhood.axes(self.grid)

    @functools.cached_property
    def lo(self) -> Int32[np.ndarray, "G nd RqPq"]:
        """The first key in the window of every query, by axis; a query of padding has that of the last real one."""
        return self._bounds(0)

    @functools.cached_property
    def hi(self) -> Int32[np.ndarray, "G nd RqPq"]:
        """The key after the window of every query, likewise. Key j is seen if lo <= j < hi along every axis."""
        return self._bounds(1)

    @functools.cached_property
    def query_coordinates(self) -> Int32[np.ndarray, "nd RqPq"]:
        """The coordinates i of every query, alike in all groups."""
        return _coordinates(self.q_grid, self.q_tile)

    @functools.cached_property
    def key_coordinates(self) -> Int32[np.ndarray, "nd RkPk"]:
        """The coordinates j of every key, alike in all groups; those of padding are beyond every window."""
        return _coordinates(self.kv_grid, self.kv_tile)

    @functools.cached_property
    def kv_ranges(self) -> tuple[Ranges, ...]:
        """For every axis: the tiles of keys that the tiles of queries need."""
        sizes = zip(self.axes, self.q_tile, self.q_grid, self.kv_tile, strict=True)
        return tuple(_kv_ranges(axis, own, tiles, other) for axis, own, tiles, other in sizes)

    @functools.cached_property
    def q_ranges(self) -> tuple[Ranges, ...]:
        """For every axis: the tiles of queries that the tiles of keys need."""
        sizes = zip(self.axes, self.kv_tile, self.kv_grid, self.q_tile, strict=True)
        return tuple(_q_ranges(axis, own, tiles, other) for axis, own, tiles, other in sizes)

    def lists(self, transposed: bool = False) -> Lists:
        """The tiles of keys of each tile of queries, as `BlockMask` lists blocks: partial, full, the last one again.

        `idx [G, R_q, W]`, `n_partial` and `n_total [G, R_q]`; transposed, the tiles of queries `[G, R_k, Wt]` of each
        tile of keys. A full tile has no padding among its keys.
        """
        return self._kv_lists if not transposed else self._q_lists

    def steps(self, transposed: bool = False) -> Steps:
        """The pairs of tiles `[G, 1, A]` in the order of their rows (or columns), each of which has one step at least.

        The kind is 1 for a partial and 2 for a full pair, partial ones before full ones. A step of kind 0 makes sure
        that a tile without pairs is written, or repeats the last one of a group that has fewer steps than another.
        """
        lists = self.lists(transposed)
        owner = np.broadcast_to(np.arange(lists.idx.shape[1], dtype=np.int32)[:, None], lists.idx.shape)
        kept = np.arange(lists.idx.shape[2]) < np.maximum(lists.n_total, 1)[..., None]
        kind = kinds_of(lists.idx, lists.n_partial, lists.n_total)
        count, (owner, idx, kind) = compact(*(x.reshape(self.groups, 1, -1) for x in (kept, owner, lists.idx, kind)))
        kind = np.where(np.arange(kind.shape[-1]) < count[..., None], kind, EMPTY).astype(np.int32)
        row, col = (idx, owner) if transposed else (owner, idx)
        return Steps(row, col, kind, None)

    @functools.cached_property
    def _kv_lists(self) -> Lists:
        return _product(self.kv_ranges, self.kv_grid)

    @functools.cached_property
    def _q_lists(self) -> Lists:
        return _product(self.q_ranges, self.q_grid)

    def _tiles(self, tile: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(math.ceil(x / (d * t)) for x, d, t in zip(self.grid, self.dilation, tile, strict=True))

    def _bounds(self, which: int) -> np.ndarray:
        """`start` or `end` of every query in permuted order."""
        sizes = zip(self.axes, self.q_grid, self.q_tile, strict=True)
        tables = (by_group(axis, window_bounds(*axis)[which], n * t) for axis, n, t in sizes)
        return _frozen(_planes(tables, self.q_tile))


def tile_plan(
    grid: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    *,
    q_tile: int | tuple[int, ...],
    kv_tile: int | tuple[int, ...],
) -> TilePlan:
    """The tiles of a problem; equal arguments give the same plan, with the tables that it has already.

    Raises:
      ValueError, TypeError: no static integers, tuples of another length than the grid's, a window that does not fit.
    """
    neighborhood = Neighborhood(kernel_size, stride, dilation, is_causal)
    grid = per_axis("grid", grid, len(grid))
    tiles = (per_axis(name, tile, len(grid)) for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)))
    return _plan(grid, neighborhood.on(grid), *tiles)


@functools.lru_cache(maxsize=256)
def _plan(grid: Any, neighborhood: Neighborhood, q_tile: Any, kv_tile: Any) -> TilePlan:
    return TilePlan(grid, neighborhood, q_tile, kv_tile)


class TileStats(NamedTuple):
    """What tiles of a size make of a neighborhood, for one batch row and head.

    Attributes:
      visited: pairs of tiles that are worked on.
      dense: pairs of tiles of full attention.
      max_per_q: tiles of keys that a tile of queries needs at most.
      tile_speedup: dense / visited.
      flop_bound: pairs of tokens over those that see each other; no tiles are faster.
      efficiency: of the work on visited tiles, the part on pairs that see each other.
    """

    visited: int
    dense: int
    max_per_q: int
    tile_speedup: float
    flop_bound: float
    efficiency: float


def tile_stats(
    grid: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    *,
    q_tile: int | tuple[int, ...],
    kv_tile: int | tuple[int, ...],
) -> TileStats:
    """Pairs of tiles and of tokens, counted from the ranges along each axis; in the manner of NATTEN's simulator.

    Raises:
      ValueError, TypeError: as `tile_plan`.
    """
    plan = tile_plan(grid, kernel_size, stride, dilation, is_causal, q_tile=q_tile, kv_tile=kv_tile)
    counts = [ranges.last - ranges.first + 1 for ranges in plan.kv_ranges]
    visited, longest = (math.prod(int(f(n)) for n in counts) for f in (np.sum, np.max))
    dense = math.prod(
        math.ceil(x / t) for tile in (plan.q_tile, plan.kv_tile) for x, t in zip(plan.grid, tile, strict=True)
    )
    seen = 1
    for axis in plan.axes:
        start, end = window_bounds(*axis)
        seen *= int((end - start).sum(dtype=np.int64))
    return TileStats(
        visited=visited,
        dense=dense,
        max_per_q=longest,
        tile_speedup=dense / visited,
        flop_bound=math.prod(plan.grid) ** 2 / seen,
        efficiency=seen / (visited * plan.q_places * plan.kv_places),
    )


def by_group(axis: Axis, of_tokens: np.ndarray, length: int) -> Int32[np.ndarray, "d n"]:
    """A table over the tokens of an axis as one over groups and coordinates, each group followed by its last again."""
    groups = (of_tokens[g :: axis.dilation] for g in range(axis.dilation))
    return np.stack([np.pad(own, (0, length - len(own)), mode="edge") for own in groups])


def _kv_ranges(axis: Axis, own: int, tiles: int, other: int) -> Ranges:
    """What `tiles` tiles of `own` queries need of tiles of `other` keys."""
    start, end = (by_group(axis, each, tiles * own) for each in window_bounds(*axis))
    # Since tokens beyond a group repeat its last one, the last of a tile is its last real one.
    full_first, full_stop = -(-start[:, own - 1 :: own] // other), end[:, ::own] // other
    return _ranges(axis, own, start[:, ::own] // other, -(-end[:, own - 1 :: own] // other), full_first, full_stop)


def _q_ranges(axis: Axis, own: int, tiles: int, other: int) -> Ranges:
    """What `tiles` tiles of `own` keys need of tiles of `other` queries."""
    start, end = (by_group(axis, each, tiles * own) for each in inverse_window_bounds(*axis))
    length = group_lengths(axis)[:, None]
    # A tile of queries may be full that reaches beyond its group, a tile of keys may not.
    whole = (np.arange(tiles) + 1) * own <= length
    full_first, full_stop = -(-start[:, own - 1 :: own] // other), end[:, ::own] // other
    full_stop = np.where(end[:, ::own] == length, -(-length // other), full_stop)
    full_stop = np.where(whole, full_stop, full_first)
    return _ranges(axis, own, start[:, ::own] // other, -(-end[:, own - 1 :: own] // other), full_first, full_stop)


def _ranges(
    axis: Axis, own: int, first: np.ndarray, stop: np.ndarray, full_first: np.ndarray, full_stop: np.ndarray
) -> Ranges:
    """Half-open ranges as closed ones, with nothing for the tiles of padding alone."""
    exists = np.arange(first.shape[1]) * own < group_lengths(axis)[:, None]
    full_stop = np.maximum(full_stop, full_first)
    pairs = ((first, 0), (stop - 1, -1), (full_first, 0), (full_stop - 1, -1))
    return Ranges(*(_frozen(np.where(exists, x, without).astype(np.int32)) for x, without in pairs))


def _product(ranges: tuple[Ranges, ...], grid: tuple[int, ...]) -> Lists:
    """The lists of tiles on a grid from those along its axes."""
    idx, kind = np.zeros((), np.int32), np.full((), FULL, np.int8)
    for a, (along, tiles) in enumerate(zip(ranges, grid, strict=True)):
        steps = np.arange((along.last - along.first + 1).max(), dtype=np.int32)
        tile = along.first[..., None] + steps
        full = (along.full_first[..., None] <= tile) & (tile <= along.full_last[..., None])
        own = np.where(tile > along.last[..., None], EMPTY, np.where(full, FULL, PARTIAL)).astype(np.int8)
        idx = idx * tiles + _along(tile, a, len(grid))
        # Empty along an axis is empty, full along every axis is full: the kinds are ordered so.
        kind = np.minimum(kind, _along(own, a, len(grid)))
    rank = len(grid)
    shape = tuple(math.prod(kind.shape[part * rank : (part + 1) * rank]) for part in range(3))
    lists = make_lists(kind.reshape(shape), np.broadcast_to(idx, kind.shape).reshape(shape), None, shape[-1])
    return lists._replace(**{name: _frozen(getattr(lists, name)) for name in ("idx", "n_partial", "n_total")})


def _coordinates(tiles: tuple[int, ...], tile: tuple[int, ...]) -> Int32[np.ndarray, "nd RP"]:
    """Of the tokens of a group in permuted order."""
    tables = (np.arange(n * t, dtype=np.int32)[None] for n, t in zip(tiles, tile, strict=True))
    return _frozen(_planes(tables, tile)[0])


def _planes(tables: Iterable[np.ndarray], tile: tuple[int, ...]) -> Int32[np.ndarray, "G nd RP"]:
    """Tables `[d, n]` over the coordinates of each axis as planes over the tokens in permuted order."""
    rank = len(tile)
    each = [_along(x.reshape(x.shape[0], -1, t), a, rank) for a, (x, t) in enumerate(zip(tables, tile, strict=True))]
    planes = np.broadcast_arrays(*each)
    groups = math.prod(planes[0].shape[:rank])
    return np.stack([plane.reshape(groups, -1) for plane in planes], axis=1)


def _along(table: Int32[np.ndarray, "d n m"], a: int, rank: int) -> np.ndarray:
    """A table of axis a, to be broadcast against those of the others: of all axes the groups, the tiles, the places."""
    shape = [1] * (3 * rank)
    shape[a], shape[rank + a], shape[2 * rank + a] = table.shape
    return table.reshape(shape)


def _frozen(table: Any) -> np.ndarray:
    table.flags.writeable = False
    return table
