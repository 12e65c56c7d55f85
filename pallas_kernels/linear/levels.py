"""What the kernels for GPU with a decay for every key channel share: decayed products of a chunk's rows.

    A[r, j] = sum_h q[r, h] k[j, h] exp(b[r, h] - b[j, h])

is made by halves of halves of a chunk, as in `channel_decays`: where r lies in the second half of a block of 2 s rows
and j in its first, with m the row where the second begins,

    A[r, j] = (q * d)[r] . (k * d)[j]                    d = exp(-|b - b_m|)

and s = 1, 2, .., C / 2 are all pairs but the diagonal, where nothing decays. Where decay is moderate, as in
`channel_decays`, one such product with q * exp(b - b_m) and k * exp(b_m - b), m the middle of the chunk, has all of
them. A program tells that of its chunk and channels, so that a border between packed sequences slows one chunk down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.linear import gates, programs
from pallas_kernels.linear.programs import Problem


def tile(p: Problem) -> int:
    """Key channels that a program works on at a time: as many bytes of them for either dtype."""
    return min(p.blocks.tile * 2 // p.dtype.itemsize, p.wide)


def narrow(p: Problem) -> int:
    """The same for gradients, which with twice as many would need every register that there is."""
    return max(16, tile(p) // 2)


def up_to(width: int, size: int) -> int:
    """Channels in whole tiles."""
    return -(-width // size) * size


def summed(p: Problem, gate_ref: Any, sums_ref: Any, chunk: Any, first: Any, size: int) -> list[jax.Array]:
    """The parts of b of a chunk, `size` channels from `first` on, from the gates; writes them to `sums_ref`."""
    gate = jnp.maximum(programs.rows(p, gate_ref, chunk, first, size, p.width), gates.FORGET)
    mask = None
    if p.width % size:
        mask = jnp.broadcast_to((first + jnp.arange(size) < p.width)[None], gate.shape)
    found = [jnp.cumsum(part, axis=0) for part in gates.split(gate, p.dtype)]
    for i, x in enumerate(found):
        where = jnp.int32(i), pl.ds(chunk * p.blocks.chunk, p.blocks.chunk), jnp.int32(0), pl.ds(first, size)
        plgpu.store(sums_ref.at[where], x, mask=mask)
    return found


def sums_of(p: Problem, ref: Any, chunk: Any, first: Any, size: int, rows: Any = None) -> list[jax.Array]:
    """The parts of b of a chunk, `size` channels from `first` on, for every row or for those of its `rows`."""
    start, square, mask = chunk * p.blocks.chunk, (p.blocks.chunk, size), None
    columns = jnp.broadcast_to((first + jnp.arange(size))[None], square)
    if p.width % size:
        mask = columns < p.width
    place: Any = pl.ds(start, p.blocks.chunk)
    channel: Any = pl.ds(first, size)
    if rows is not None:
        place, channel = jnp.broadcast_to((start + rows)[:, None], square), columns
    at = [ref.at[jnp.int32(i), place, jnp.int32(0), channel] for i in range(gates.parts(p.dtype))]
    return [plgpu.load(x, mask=mask, other=None if mask is None else 0) for x in at]


def last_of(p: Problem, ref: Any, chunk: Any, first: Any, size: int) -> list[jax.Array]:
    return row_of(p, ref, chunk, first, size, p.blocks.chunk - 1)


def row_of(p: Problem, ref: Any, chunk: Any, first: Any, size: int, row: int) -> list[jax.Array]:
    """The parts of b after one row of a chunk."""
    mask = first + jnp.arange(size) < p.width if p.width % size else None
    place = chunk * p.blocks.chunk + row
    at = [ref.at[jnp.int32(i), place, jnp.int32(0), pl.ds(first, size)] for i in range(gates.parts(p.dtype))]
    return [plgpu.load(x, mask=mask, other=None if mask is None else 0) for x in at]


def exp_of(p: Problem, parts: Sequence[jax.Array]) -> jax.Array:
    return gates.exponential(p.dtype)(programs.total(parts))


def until_end(p: Problem, sums: Sequence[jax.Array], last: Sequence[jax.Array]) -> jax.Array:
    """exp(b_C - b)."""
    return exp_of(p, [z[None] - x for x, z in zip(sums, last, strict=True)])


def count(p: Problem) -> int:
    """Of levels where decay is strong; the costs that kernels state are those of moderate decay."""
    return p.blocks.chunk.bit_length() - 1


class Level(NamedTuple):
    """Decays of late rows since m and of early rows until m, and which rows meet which columns."""

    late: jax.Array
    early: jax.Array
    pairs: jax.Array


def over[Found](
    p: Problem,
    ref: Any,
    chunk: Any,
    first: Any,
    sums: Sequence[jax.Array],
    turn: Callable[[Level, Found], Found],
    found: Found,
) -> Found:
    """`turn` upon `turn` for every level of some channels: one if their decay is moderate, or log2 C."""
    size, exp = p.blocks.chunk, gates.exponential(p.dtype)
    width, half, limit = sums[0].shape[1], size // 2, -gates.MODERATE / gates.unit(p.dtype)
    until_middle = row_of(p, ref, chunk, first, width, half - 1)
    since_middle = [x - y for x, y in zip(last_of(p, ref, chunk, first, width), until_middle, strict=True)]
    least = jnp.minimum(programs.total(until_middle), programs.total(since_middle))

    def whole(found: Found) -> Found:
        since = programs.total(x - m[None] for x, m in zip(sums, until_middle, strict=True))
        place = jnp.arange(size)
        return turn(Level(exp(since), exp(-since), place[:, None] > place[None, :]), found)

    def halving(i: Any, found: Found) -> Found:
        """For s = 2^i."""
        block = jnp.arange(size) >> i
        middle = sums_of(p, ref, chunk, first, width, rows=(block | 1) << i)
        decay = exp(-jnp.abs(programs.total(x - m for x, m in zip(sums, middle, strict=True))))
        # Comparing one number of a row with one of a column leaves no square of integers in registers.
        pairs = jnp.where(block & 1 == 1, block, -1)[:, None] == (block + 1)[None, :]
        return turn(Level(decay, decay, pairs), found)

    def halvings(found: Found) -> Found:
        return jax.lax.fori_loop(0, count(p), halving, found)

    return jax.lax.cond(jnp.min(least) >= limit, whole, halvings, found)


def diagonal(p: Problem) -> jax.Array:
    place = jnp.arange(p.blocks.chunk)
    return place[:, None] == place[None, :]


def scores(p: Problem, q_ref: Any, k_ref: Any, sums_ref: Any, chunk: Any, *, of_keys: bool = False) -> list[jax.Array]:
    """A of a chunk; before it, with `of_keys`, the same of keys in the place of queries below the diagonal."""
    t, found = tile(p), [jnp.zeros((p.blocks.chunk, p.blocks.chunk), jnp.float32)] * (1 + of_keys)

    def channels(i: Any, found: list[jax.Array]) -> list[jax.Array]:
        q = programs.rows(p, q_ref, chunk, i * t, t, p.width)
        k = programs.rows(p, k_ref, chunk, i * t, t, p.width)
        own = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1)
        *alike, seen = found
        sums = sums_of(p, sums_ref, chunk, i * t, t)

        def turn(level: Level, found: list[jax.Array]) -> list[jax.Array]:
            early = (k * level.early).astype(k.dtype)
            late = [(x * level.late).astype(x.dtype) for x in (k, q)[-len(found) :]]
            met = [jnp.where(level.pairs, programs.dot(p, x, early, (1, 1)), 0) for x in late]
            return [x + y for x, y in zip(found, met, strict=True)]

        found = [*alike, seen + jnp.where(diagonal(p), own[:, None], 0)]
        return over(p, sums_ref, chunk, i * t, sums, turn, found)

    return jax.lax.fori_loop(0, -(-p.width // t), channels, found)


def first_of_group(p: Problem) -> jax.Array:
    """1 in the program of the first of the query heads that read one state, on axis 1 of the grid, and 0 elsewhere."""
    return (pl.program_id(1) % p.group == 0).astype(jnp.float32)


def state_tile(p: Problem, ref: Any, row: Any, rows: int, column: Any, columns: int) -> jax.Array:
    where, mask = (pl.ds(row, rows), pl.ds(column, columns)), None
    if p.width % rows or p.value_width % columns:
        mask = (row + jnp.arange(rows) < p.width)[:, None] & (column + jnp.arange(columns) < p.value_width)[None]
    return plgpu.load(ref.at[where], mask=mask, other=None if mask is None else 0)


def sum_to_end(p: Problem, x: jax.Array) -> jax.Array:
    """Of every row and those after it, by products: of bfloat16 for the upper and the lower half of the bits."""
    place = jnp.arange(p.blocks.chunk)
    after = (place[:, None] <= place[None, :]).astype(p.dtype)
    high = x.astype(p.dtype)
    out = programs.dot(p, after, high)
    if p.dtype != jnp.float32:
        out += programs.dot(p, after, (x - high.astype(jnp.float32)).astype(p.dtype))
    return out


def sums_spec(p: Problem, wide: int, *, grouped: int = 1, axis: int) -> pl.BlockSpec:
    """Of the state of a program, as `programs.sums_spec`."""

    def index(*at: Any) -> Any:
        head = at[axis] // grouped
        return head // p.heads, 0, 0, head % p.heads, 0

    return pl.BlockSpec((None, gates.parts(p.dtype), p.padded, 1, wide), index)


def sums_shape(p: Problem) -> tuple[int, ...]:
    return p.batch, gates.parts(p.dtype), p.padded, p.heads, p.width


def scores_spec(p: Problem) -> pl.BlockSpec:
    """Of arrays `[B, N, padded, C]`, for a grid (chunk, batch and query head, ...)."""
    queries, size = p.heads * p.group, p.blocks.chunk
    return pl.BlockSpec((None, None, size, size), lambda i, j, *_: (j // queries, j % queries, i, 0))
