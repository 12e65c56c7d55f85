"""The pairs of blocks that a kernel visits: on TPU one list of steps in scalar memory, on GPU a list of each row.

A step (row, col, kind) is one number, row 2^17 + col 2^2 + kind. The lists of all batch rows and heads stand one after
another, for scalar memory pads the minor axes of anything but a flat array.
"""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

PARTIAL, FULL, EDGE = 1, 2, 3
"""A full block that reaches beyond a length is at the edge: its range is tested, its element rule is not asked."""
BUDGET = 512 * 2**10
"""Bytes of scalar memory for a list: it has 1 MiB, and the pipeline wants some of it."""
MOST_BLOCKS = 2**14


class WorkList(NamedTuple):
    """Steps over pairs of blocks, by row (query blocks ascending) or by col (key blocks ascending).

    Every row (or col) owns at least one step, of kind 0 if it has none, so that it is written.

    Attributes:
      row, col: the blocks of queries and of keys.
      kind: 0: nothing is computed; 1: the rule is evaluated for every pair; 2: every pair is allowed.
    """

    row: Int[Array | np.ndarray, "Bm Nm A"]
    col: Int[Array | np.ndarray, "Bm Nm A"]
    kind: Int[Array | np.ndarray, "Bm Nm A"]


class BlockLists(NamedTuple):
    """The same pairs as a list of each row: of key blocks for a query block, or of query blocks for a key block.

    Attributes:
      idx: the blocks, each below the number that there are: partial ones, then full ones, then anything.
      n_partial, n_total: how many entries are partial, and how many are listed.
    """

    idx: Int[Array | np.ndarray, "Bm Nm rows W"]
    n_partial: Int[Array | np.ndarray, "Bm Nm rows"]
    n_total: Int[Array | np.ndarray, "Bm Nm rows"]


def row_of(code: Any) -> Any:
    return code >> 17


def col_of(code: Any) -> Any:
    return code >> 2 & (MOST_BLOCKS - 1)


def kind_of(code: Any) -> Any:
    return code & 3


def check(
    name: str,
    steps: Any,
    *,
    rows_of_lists: Set[int],
    heads: int,
    kv_heads: int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
) -> None:
    """Raises `ValueError` for a list that does not belong to the sizes, or does not fit scalar memory."""
    shapes = {tuple(x.shape) for x in (steps.row, steps.col, steps.kind)}
    shape = shapes.pop()
    if (
        shapes
        or len(shape) != 3
        or shape[0] not in rows_of_lists
        or shape[1] not in (1, kv_heads, heads)
        or not shape[2]
    ):
        raise ValueError(
            f"{name}: expected row, col and kind [Bm, Nm, A] with Bm in {_set(rows_of_lists)} and Nm in "
            f"{_set({1, kv_heads, heads})}, got {[tuple(x.shape) for x in (steps.row, steps.col, steps.kind)]}"
        )
    if not all(np.issubdtype(x.dtype, np.integer) for x in (steps.row, steps.col, steps.kind)):
        raise ValueError(f"{name}: expected integers, got {[str(x.dtype) for x in (steps.row, steps.col, steps.kind)]}")
    size = 4 * math.prod(shape)
    many = max(-(-length // block) for length, block in zip(lengths, blocks, strict=True))
    times = max(math.sqrt(size / BUDGET), many / MOST_BLOCKS)
    if times > 1:
        larger = 2 ** math.ceil(math.log2(times))
        raise ValueError(
            f"{name}: {shape[2]} steps for {shape[0]} x {shape[1]} batch rows and heads take {size >> 10} KiB of "
            f"scalar memory, and a list may take {BUDGET >> 10} KiB and name {MOST_BLOCKS} blocks; use larger blocks: "
            f"block_q={larger * blocks[0]}, block_kv={larger * blocks[1]}"
        )


def check_blocks(name: str, lists: Any, *, rows_of_lists: Set[int], heads: int, kv_heads: int, blocks: int) -> None:
    """Raises `ValueError` for `BlockLists` that do not belong to the sizes."""
    idx, counts = lists.idx.shape, (lists.n_partial.shape, lists.n_total.shape)
    matches = len(idx) == 4 and counts == (idx[:3], idx[:3]) and idx[2] == blocks and idx[3] > 0
    if not matches or idx[0] not in rows_of_lists or idx[1] not in (1, kv_heads, heads):
        raise ValueError(
            f"{name}: expected idx [Bm, Nm, {blocks}, W] with Bm in {_set(rows_of_lists)} and Nm in "
            f"{_set({1, kv_heads, heads})}, and n_partial, n_total [Bm, Nm, {blocks}], got "
            f"{[tuple(x.shape) for x in lists]}"
        )
    if not all(np.issubdtype(x.dtype, np.integer) for x in lists):
        raise ValueError(f"{name}: expected integers, got {[str(x.dtype) for x in lists]}")


def _set(numbers: Set[int]) -> str:
    return "{" + ", ".join(map(str, sorted(numbers))) + "}"


def whole(lists: Any) -> BlockLists:
    """Lists of 32-bit integers as arrays of JAX."""
    return BlockLists(*(jnp.asarray(x, np.int32) for x in lists))


def pack(steps: Any, *, lengths: tuple[int, int], blocks: tuple[int, int]) -> Int32[Array, " all"]:
    """The numbers, one array of NumPy or of JAX as the lists are; full blocks beyond a length become `EDGE`."""
    xp: Any = np if all(isinstance(x, np.ndarray) for x in (steps.row, steps.col, steps.kind)) else jnp
    row, col, kind = (xp.asarray(x).astype(xp.int32) for x in (steps.row, steps.col, steps.kind))
    beyond = ((row + 1) * blocks[0] > lengths[0]) | ((col + 1) * blocks[1] > lengths[1])
    kind = xp.where(beyond & (kind == FULL), EDGE, kind).astype(xp.int32)
    return (row << 17 | col << 2 | kind).reshape(-1)
