"""Biases of relative positions: a table for each head with a number for every distance on the axes of `windows`.

    y_ts += table_n[c(s) - b(t) + m]        c(s), b(t): the places of key s and query t; m: the middle of the table

Blocks are boxes of a grid: tokens have the same offsets in all of them. On TPU the table is a strip of `strips`.

On GPU entries are read from the table. Flat, it has strides, and so the entry of a pair is a difference of two codes of
tokens. Pairs of blocks with first tokens equally far apart are alike, pair of tokens by pair of tokens, and the
gradient of the table is a sum over such kinds of pairs of blocks,

    dtable_n[d] = sum over kinds, and t and s in a block with distance d, of the sum of dy_ts over the kind's pairs

Given where a query block begins in the boxes of keys, its layer, a query of it has just one key at each distance. So
each sum over a kind has a place of its own at [layer, t, d], and no two programs write to the same.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse import tiling
from pallas_kernels.block_sparse.lists import BlockLists
from pallas_kernels.block_sparse.strips import Strip
from pallas_kernels.block_sparse.tiling import LEAST, Blocks, Program

BUDGET = 2 * 2**30
"""Bytes that the sums of a table's gradient may take on GPU."""


class Relative(NamedTuple):
    """A bias by distance.

    Attributes:
      table: for every query head, with the distance 0 in the middle of each axis. It has a gradient.
      place: the coordinates of queries, of NumPy, on the axes of those of keys in `windows`. Of pairs that are not in
        windows, distances may lie outside of the table.
    """

    table: Float[Array, "N ..."]
    place: Int[Array | np.ndarray, "axes T"]


class Codes(NamedTuple):
    """On GPU, of tokens: the entry of a pair in a flat table is their difference."""

    q_code: Int[Array, " T"]
    kv_code: Int[Array, " S"]


class Alike(NamedTuple):
    """On GPU, pairs of blocks by kind.

    Attributes:
      list_row, row, col: the rows of the lists, the blocks of queries and those of keys.
      pairs: how many of them a kind has.
      layer: of each kind.
      q_place: the coordinates of queries.
    """

    list_row: Int[Array, "kinds W"]
    row: Int[Array, "kinds W"]
    col: Int[Array, "kinds W"]
    pairs: Int[Array, " kinds"]
    layer: Int[Array, " kinds"]
    q_place: Int[Array, "axes T"]


def check_relative(relative: Relative, windows: Any, *, heads: int, q_len: int) -> None:
    """Raises `ValueError` for a bias that does not belong to the call."""
    if windows is None:
        raise ValueError("relative: expected windows too, for they have the places of keys")
    axes = len(windows.place)
    table, place = relative.table.shape, np.shape(relative.place)
    if len(table) != 1 + axes or table[0] != heads or place != (axes, q_len):
        raise ValueError(
            f"relative: expected a table [{heads}, a size for each of {axes} axes] and place [{axes}, {q_len}], got "
            f"{list(table)} and {list(place)}"
        )
    if not all(isinstance(x, np.ndarray) for x in (relative.place, windows.place)):
        raise ValueError("relative: expected places of queries and keys as arrays of NumPy")


def codes(relative: Relative, kv_place: Any) -> Codes:
    sizes = np.array(relative.table.shape[1:])
    strides = np.array([math.prod(sizes[a + 1 :]) for a in range(len(sizes))])
    q_code, kv_code = strides @ relative.place, strides @ (kv_place + sizes[:, None] // 2)
    return Codes(*(jnp.asarray(x, np.int32) for x in (q_code, kv_code)))


def strip(
    relative: Relative, kv_place: Any, by_row: Any, *, blocks: tuple[int, int]
) -> tuple[Strip, list[Int[np.ndarray, "axes n"]]]:
    """On TPU, where the table is for the listed pairs of blocks, and the first tokens of those of queries and of keys.

    Raises:
      ValueError: lists that are traced, blocks that are no boxes.
      NotImplementedError: there is no such strip.
    """
    if not all(isinstance(x, np.ndarray) for x in by_row):
        raise ValueError("by_row: with a relative bias, expected lists as arrays of NumPy")
    sides = ("relative", relative.place, blocks[0]), ("windows", kv_place, blocks[1])
    (first, box), (kv_first, kv_box) = (_checked_boxes(*side) for side in sides)
    listed = by_row.kind > 0
    apart = kv_first[:, by_row.col[listed]] - first[:, by_row.row[listed]]
    least, most = (f(apart, axis=1, initial=0) for f in (np.min, np.max))
    found = Strip(*(tuple(x.tolist()) for x in (box, kv_box, least, most)))
    found.check(tiling.room())
    return found, [first, kv_first]


def alike(relative: Relative, kv_place: Any, by_row: BlockLists, *, blocks: tuple[int, int]) -> tuple[Alike, int]:
    """The pairs of the lists by kind, and how many layers there are.

    Raises:
      ValueError: lists that are traced or of heads, blocks that are no boxes.
    """
    if not all(isinstance(x, np.ndarray) for x in by_row) or by_row.idx.shape[1] != 1:
        raise ValueError("by_row: with a relative bias, expected lists of all heads as arrays of NumPy")
    first, _ = _boxes("relative", relative.place, blocks[0])
    kv_first, box = _checked_boxes("windows", kv_place, blocks[1])
    listed = np.arange(by_row.idx.shape[3]) < by_row.n_total[..., None]
    list_row, _, row, _ = np.nonzero(listed)
    col = by_row.idx[listed]
    apart, kind = np.unique(kv_first[:, col] - first[:, row], axis=1, return_inverse=True)
    layers, layer = np.unique(apart % box[:, None], axis=1, return_inverse=True)
    # Some releases of NumPy give the inverse another axis.
    order, count = np.argsort(kind.reshape(-1), kind="stable"), np.bincount(kind.reshape(-1))
    at = np.repeat(np.arange(len(count)), count), np.concatenate([np.arange(n) for n in count])
    tables = []
    for x in (list_row, row, col):
        table = np.zeros((len(count), count.max()), np.int32)
        table[at] = x[order]
        tables.append(table)
    found = (*tables, count, layer.reshape(-1), relative.place)
    return Alike(*(jnp.asarray(x, np.int32) for x in found)), layers.shape[1]


def check_size(table: tuple[int, ...], tiles: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Raises `NotImplementedError` where the sums of the gradient of a table `[N, sizes]` take too much memory.

    Args:
      tiles: extents of blocks of queries and of keys along the axes.
    """
    layers = math.prod(kv // math.gcd(q, kv) for q, kv in zip(*tiles, strict=True))
    taken = 4 * math.prod(table) * layers * math.prod(tiles[0])
    if taken > BUDGET:
        raise NotImplementedError(
            f"the gradient of a table {list(table)} takes {taken / 2**30:.1f} GiB, a number for each query of a tile, "
            f"and the kernel has {BUDGET >> 30} GiB for it; pass a smaller q_tile, not {tiles[0]}"
        )


def fitted(cut: Blocks, width: int, dtype: Any) -> Blocks:
    """Programs with room for entries in their registers: half as much of what they walk over, where heads are wide."""
    size = width * jnp.dtype(dtype).itemsize
    if size <= 128:
        return cut

    def half(program: Program, side: str) -> Program:
        smaller: Any = {side: max(LEAST, getattr(program, side) // 2)}
        return dataclasses.replace(program, **smaller)

    cut = dataclasses.replace(cut, keys=half(cut.keys, "q"))
    if size <= 256:
        return cut
    return dataclasses.replace(cut, forward=half(cut.forward, "kv"), queries=half(cut.queries, "kv"))


def _checked_boxes(name: str, place: Any, block: int) -> tuple[np.ndarray, np.ndarray]:
    first, box = _boxes(name, place, block)
    if (first % box[:, None]).any() or math.prod(box.tolist()) != block:
        raise ValueError(f"{name}: with a relative bias, expected blocks of {block} tokens that are boxes of a grid")
    return first, box


def _boxes(name: str, place: Any, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of first tokens `[axes, blocks]`, and the extents of a block `[axes]`."""
    if place.shape[1] % block:
        raise ValueError(f"{name}: with a relative bias, expected whole blocks of {block}, got {place.shape[1]} tokens")
    of_blocks = place.reshape(len(place), -1, block)
    offsets = of_blocks - of_blocks[..., :1]
    if (offsets != offsets[:, :1]).any() or offsets.min() < 0:
        raise ValueError(f"{name}: with a relative bias, expected the same offsets of tokens in all blocks of {block}")
    return of_blocks[..., 0], offsets[:, 0].max(axis=1) + 1
