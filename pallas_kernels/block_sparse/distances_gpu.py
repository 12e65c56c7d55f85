"""The gradient of numbers for distances on GPU: a walk over pairs of blocks that are equally far apart.

Where the first tokens of two pairs of blocks are equally far apart, so are all of their tokens, pair by pair. So the dy
of `backward_gpu` of such pairs of blocks add up tile by tile, in registers, and their sum along its diagonals,

    D_n[c, t, s] = sum of dy over the pairs of blocks of run c    dg_n[d] = sum of D_n[c, t, s] with apart_c + s - t = d

Lists of all heads or of some, known or traced, are sorted by how far their pairs are apart, and cut into runs of which
a program has one. No sum is in an order that may change.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse import gpu, relative_gpu
from pallas_kernels.block_sparse.gpu import Problem
from pallas_kernels.block_sparse.lists import BlockLists
from pallas_kernels.block_sparse.relative_gpu import PROGRAMS, divided
from pallas_kernels.block_sparse.tiling import Program
from pallas_kernels.block_sparse.walk import Refs

BUDGET = 2 * 2**30
"""Bytes that a sum of tiles for every distance between blocks may take."""


class Runs(NamedTuple):
    """The listed pairs of blocks, sorted, as runs of pairs that are equally far apart.

    Attributes:
      list_row, row, col: the rows of the lists, the blocks of queries and those of keys.
      begin, full, end: where a run begins, where its full pairs do, which come after the partial ones, and its end.
    """

    list_row: Int[Array, "Nm pairs"]
    row: Int[Array, "Nm pairs"]
    col: Int[Array, "Nm pairs"]
    begin: Int[Array, "Nm runs"]
    full: Int[Array, "Nm runs"]
    end: Int[Array, "Nm runs"]


def _kinds(counts: tuple[int, int], blocks: tuple[int, int]) -> int:
    """How many distances the first tokens of pairs of blocks may have, all multiples of what divides both blocks."""
    return sum((count - 1) * block for count, block in zip(counts, blocks, strict=True)) // math.gcd(*blocks) + 1


def check_size(heads: int, lengths: tuple[int, int], blocks: tuple[int, int]) -> None:
    """Raises `NotImplementedError` where the sums of the gradient take too much memory."""
    q_count, kv_count = (-(-length // block) for length, block in zip(lengths, blocks, strict=True))
    taken = 4 * heads * _kinds((q_count, kv_count), blocks) * math.prod(blocks)
    if taken > BUDGET:
        raise NotImplementedError(
            f"score_mod: the gradient of numbers for {sum(lengths) - 1} distances takes {taken / 2**30:.1f} GiB for "
            f"{heads} heads in blocks of {blocks[0]} x {blocks[1]}, and the kernel has {BUDGET >> 30} GiB for it; use "
            f"smaller blocks, of one size"
        )


def _kind(p: Problem, lists: Any, xp: Any) -> Any:
    """How far apart every pair in the lists is, counted from 0; places after their ends have the number of kinds."""
    block_q, block_kv = blocks = p.blocks.block_q, p.blocks.block_kv
    first = (p.rows - 1 - xp.arange(p.rows))[:, None] * block_q
    listed = xp.arange(lists.idx.shape[3]) < lists.n_total[..., None]
    kind = (lists.idx * block_kv + first) // math.gcd(*blocks)
    return xp.where(listed, kind, _kinds((p.rows, p.columns), blocks))


def _longest(p: Problem, lists: Any) -> int:
    """How many pairs a run may have, for about twice as many programs as fill a GPU."""
    t = p.blocks.queries
    tiles = (p.blocks.block_q // t.q) * (p.blocks.block_kv // t.kv)
    return max(1, -(-_room(lists) * tiles * p.heads // (2 * PROGRAMS)))


def _room(lists: Any) -> int:
    """Pairs that the lists of a head may have."""
    return lists.idx.shape[0] * math.prod(lists.idx.shape[2:])


def count(p: Problem, lists: Any) -> int:
    """How many runs the lists of a head have at most; of known lists the very number."""
    longest, kinds = _longest(p, lists), _kinds((p.rows, p.columns), (p.blocks.block_q, p.blocks.block_kv))
    if not all(isinstance(x, np.ndarray) for x in lists):
        return min(kinds, _room(lists)) + _room(lists) // longest
    of_heads = np.moveaxis(_kind(p, lists, np), 1, 0)
    pairs = [np.bincount(kind.reshape(-1), minlength=kinds + 1)[:kinds] for kind in of_heads]
    return max(1, *(int(np.sum(-(-each // longest))) for each in pairs))


def _runs(p: Problem, lists: BlockLists) -> tuple[Runs, Int[Array, "Nm runs"]]:
    """And the kind of each run."""
    list_rows, list_heads, rows, width = shape = lists.idx.shape
    kinds, longest = _kinds((p.rows, p.columns), (p.blocks.block_q, p.blocks.block_kv)), _longest(p, lists)

    def flat(x: Any) -> jax.Array:
        return jnp.moveaxis(jnp.broadcast_to(x, shape), 1, 0).reshape(list_heads, -1)

    is_full = jnp.arange(width) >= lists.n_partial[..., None]
    list_row, row = jnp.arange(list_rows)[:, None, None, None], jnp.arange(rows)[:, None]
    sorts, *places = jax.lax.sort(
        [flat(x) for x in (2 * _kind(p, lists, jnp) + is_full, list_row, row, lists.idx)], num_keys=1, is_stable=True
    )
    kind, partial = sorts // 2, 1 - sorts % 2
    place = jnp.arange(kind.shape[1])
    is_new = jnp.pad(kind[:, 1:] != kind[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(is_new, place, 0), axis=1)
    listed = kind < kinds
    every = jnp.sum(listed, axis=1, keepdims=True)
    begins = jnp.sort(jnp.where(listed & ((place - first) % longest == 0), place, every), axis=1)
    begins = jnp.concatenate([begins, jnp.broadcast_to(every, (list_heads, p.runs + 1))], axis=1)
    begin, end = begins[:, : p.runs], begins[:, 1 : p.runs + 1]
    before = jnp.pad(jnp.cumsum(partial, axis=1), ((0, 0), (1, 0)))
    full = begin + jnp.take_along_axis(before, end, axis=1) - jnp.take_along_axis(before, begin, axis=1)
    kind = jnp.take_along_axis(jnp.pad(kind, ((0, 0), (0, 1)), constant_values=kinds), begin, axis=1)
    return Runs(*(x.astype(jnp.int32) for x in (*places, begin, full, end))), kind


def _kernel(p: Problem, t: Program, r: Refs) -> None:
    """What a run of pairs of blocks gives to the numbers of a head, for one tile of such pairs."""
    across = p.blocks.block_kv // t.kv
    run, part = divided(pl.program_id(0), p.blocks.block_q // t.q * across)
    down, right = divided(part, across)
    n = pl.program_id(1)
    head, turns = jax.lax.div(n, jnp.int32(p.heads // r.begin.shape[0])), p.batch // p.list_rows

    def visit(masked: bool, begin: Any, pairs: Any, i: Any, sums: jax.Array) -> jax.Array:
        turn, pair = (0, i) if turns == 1 else divided(i, pairs)
        at = head, begin + pair
        rows = gpu.queries(p, r.row[at] * p.blocks.block_q + down * t.q, t.q)
        columns = gpu.keys(p, r.col[at] * p.blocks.block_kv + right * t.kv, t.kv)
        b = turn * p.list_rows + r.list_row[at]
        return sums + relative_gpu.gradient(p, r, b, n, rows, columns, masked=masked)

    def walk(masked: bool, begin: Any, end: Any, sums: jax.Array) -> jax.Array:
        visits = functools.partial(visit, masked, begin, end - begin)
        return jax.lax.fori_loop(0, turns * (end - begin), visits, sums)

    begin, full, end = (x[head, run] for x in (r.begin, r.full, r.end))
    sums = jnp.zeros((t.q, t.kv), jnp.float32)
    if gpu.has_rules(p, r):
        sums = walk(True, begin, full, sums)
    else:
        full = begin
    at = n, run, pl.ds(down * t.q, t.q), pl.ds(right * t.kv, t.kv)
    plgpu.store(r.sums.at[at], walk(False, full, end, sums))


def _along_diagonals(x: Float[Array, "*n R C"]) -> Float[Array, "*n R+C-1"]:
    """Sums of x[r, c] with the same r + c: rows that begin one place further to the right each."""
    *some, rows, columns = x.shape
    width = rows + columns
    flat = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows)]).reshape(*some, -1)
    return jnp.sum(flat[..., : rows * (width - 1)].reshape(*some, rows, width - 1), axis=-2)


def backward(p: Problem, by_row: BlockLists, operands: Mapping[str, jax.Array | None]) -> Float[Array, "N distances"]:
    """The gradient of the numbers for the distances 1 - T to S - 1."""
    t, (runs, kind) = relative_gpu.program(p), _runs(p, by_row)
    block_q, block_kv = blocks = p.blocks.block_q, p.blocks.block_kv
    shape = p.heads, p.runs, *blocks
    found = gpu.call(
        p,
        functools.partial(_kernel, p, t),
        "block_sparse_attention_backward_table",
        t,
        (p.runs * (block_q // t.q) * (block_kv // t.kv), p.heads),
        runs,
        operands,
        {"sums": (shape, jnp.float32)},
        relative_gpu.specs(p, operands) | {"sums": pl.BlockSpec(shape, lambda *_: (0,) * 4)},
        listed=p.listed(by_row),
        products=p.width + p.value_width,
    )
    of_runs = _along_diagonals(found["sums"][:, :, ::-1])
    kinds, step = _kinds((p.rows, p.columns), blocks), math.gcd(*blocks)
    chosen = (kind[:, None] == jnp.arange(kinds)[:, None]).astype(jnp.float32)
    by_list = of_runs.reshape(kind.shape[0], -1, *of_runs.shape[1:])
    of_kinds = jnp.einsum("hkr,hgrx->hgkx", chosen, by_list, precision=jax.lax.Precision.HIGHEST)
    # A kind begins a step after the one before it: in pieces as long as a step, piece j of kind k adds to k + j.
    size = -(-of_runs.shape[2] // step) * step
    pieces = jnp.pad(of_kinds, ((0, 0), (0, 0), (0, 0), (0, size - of_runs.shape[2])))
    pieces = pieces.reshape(p.heads, kinds, size // step, step).transpose(0, 3, 2, 1)
    of_distances = jnp.swapaxes(_along_diagonals(pieces), 1, 2).reshape(p.heads, -1)
    start = p.rows * block_q - p.q_len
    return of_distances[:, start : start + p.q_len + p.kv_len - 1]
