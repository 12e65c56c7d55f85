"""Decays of key channels inside a TPU kernel: which rows of a chunk meet in products of matrices, and with what decay.

A[r, j] = sum_h q[r, h] k[j, h] exp(b[r, h] - b[j, h]) is no product of two matrices, for exp(-b) overflows. But where r
lies in the second half of a block of 2 s rows and j in its first, with m the row where the second half begins,

    A[r, j] = (q * exp(b - b_m))[r] . (k * exp(b_m - b))[j]            both exponents at most 0

is one, and s = C / 2, C / 4, .., 1 are all pairs but the diagonal, where there is no decay.

Where decay is moderate, so that over neither half of the chunk any channel loses more than exp(-`gates.MODERATE`), one
such product with m the middle of the chunk gives all pairs at once: no factor is too large or too small for a number,
and what comes of pairs with j > r, be it infinite, is masked. What the state has to do with it then needs no factors
of its own: with read = exp(b - b_m) and write = exp(b_m - b)

    S~ = enter S        o = A v + (q * read) S~        S' = leave (keep S~ + (k * write)^T v)

for enter = exp(b_m), leave = exp(b_C - b_m) and keep = 1; else enter = leave = 1, read = exp b, write = exp(b_C - b),
keep = exp b_C. Where decay is not that moderate, but is over half a quarter of the chunk, two halvings leave pairs
within quarters, which are one product more, each quarter with a middle of its own. All ways are the same mathematics.

Where one of several packed sequences begins nothing passes. A gate that forgets all would say so, but make decay strong
in every step with such a token, at twice the time: so kernels are told where sequences begin, and mask.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear import gates, walk
from pallas_kernels.linear.tiling import Tiling
from pallas_kernels.linear.walk import Problem, dot, every_second, with_gaps

SUBLANES = 8
SPLITS = 2
"""Halvings where decay is strong over half a chunk, but moderate over half of a quarter of it."""


class Level(NamedTuple):
    """Late rows that meet early rows: their decays since m and until m, and which `pairs` of them meet.

    Halves that are whole tiles of rows are taken out, worked on, and put back; at `size` 0 all rows are both.
    """

    size: int
    late_decay: jax.Array
    early_decay: jax.Array
    pairs: jax.Array

    def late(self, x: jax.Array) -> jax.Array:
        return every_second(x, self.size) if self.size >= SUBLANES else x

    def early(self, x: jax.Array) -> jax.Array:
        return every_second(x, self.size, first=0) if self.size >= SUBLANES else x

    def back(self, x: jax.Array, *, late: bool) -> jax.Array:
        return with_gaps(x, self.size, first=int(late)) if self.size >= SUBLANES else x

    def decayed_late(self, x: jax.Array) -> jax.Array:
        return (self.late(x) * self.late_decay).astype(x.dtype)

    def decayed_early(self, x: jax.Array) -> jax.Array:
        """With zeros between the halves."""
        return self.back((self.early(x) * self.early_decay).astype(x.dtype), late=False)


class Packing(NamedTuple):
    """How many sequences have begun in a chunk up to each of its tokens, as a wide column and as a row."""

    column: jax.Array
    row: jax.Array

    def together(self) -> jax.Array:
        """[C, C]: which rows are of one sequence."""
        return self.column[:, : self.row.shape[1]] == self.row

    def read(self, x: jax.Array) -> jax.Array:
        """Rows of the sequence that the state before the chunk is of, 0 for others."""
        return _where(self.column[:, : x.shape[1]] == 0, x)

    def written(self, x: jax.Array) -> jax.Array:
        """Rows of the sequence that the state after the chunk is of, 0 for others."""
        return _where(self.column[:, : x.shape[1]] == self.column[-1:, : x.shape[1]], x)

    def kept(self, row: jax.Array) -> jax.Array:
        """The row, 0 unless one sequence has the whole chunk."""
        return _where(self.column[-1:, : row.shape[1]] == 0, row)


def _where(rows: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(rows, x.astype(jnp.float32), 0).astype(x.dtype)


class Decays(NamedTuple):
    """What the gates of a chunk do for one head; `enter`, `keep` and `leave` are rows, or None for 1.

    `is_one`: all pairs are one level, that of read and write; else those of a row with itself are in none.
    """

    levels: Callable[[], Iterator[Level]]
    read: jax.Array
    write: jax.Array
    enter: jax.Array | None
    keep: jax.Array | None
    leave: jax.Array | None
    is_one: bool


def times(row: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if row is None else row * x


def turned(states: jax.Array) -> jax.Array:
    """States as the kernels hold them, or back: with key channels, and so their decays, along the lanes."""
    return jnp.swapaxes(states, -1, -2)


def column(row: jax.Array, width: int) -> jax.Array:
    """A row as a column that is as wide as wanted."""
    return jnp.broadcast_to(jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1], (row.shape[1], width))


def plus(x: Any, y: jax.Array) -> jax.Array:
    return y if x is None else x + y


class Sums(NamedTuple):
    """The parts of b - b_m, a row for every token, and of b_m; see `gates`. Row m is the last of the first half."""

    since: list[jax.Array]
    middle: list[jax.Array]


class Way:
    """How a grid step is worked: after so many `halvings` one product has all the pairs that are left."""

    def __init__(self, p: Problem, halvings: int, borders_ref: Any, packings: Mapping[int, Packing] = {}) -> None:
        self.halvings = halvings
        self._p, self._borders = p, borders_ref
        self._packings = {c: (c, packing) for c, packing in packings.items()}

    @property
    def together(self) -> int | None:
        """How many chunks are worked side by side; all, unless that would be too much code."""
        return None if self.halvings <= SPLITS else 2

    def decays(self, c: Any, sums: Sums) -> Decays:
        """Of chunk `c`, from the sums of its gates."""
        p, packing, (since, middle) = self._p, self._packing(c), sums
        last = [x[-1:] for x in since]
        at_end = [x + m for x, m in zip(last, middle, strict=True)]
        levels, enter, leave = functools.partial(_halvings, p, since, self.halvings), None, None
        is_one = self.halvings == 0
        if is_one:
            exponent, exp = functools.reduce(jnp.add, since), gates.exponential(p.dtype)
            read, write, keep = exp(exponent), exp(-exponent), None
            enter, leave = _exp(p, middle), _exp(p, last)
            levels = functools.partial(_whole, p, read, write)
        else:
            read = _exp(p, [x + m for x, m in zip(since, middle, strict=True)])
            write = _exp(p, [z - x for x, z in zip(since, last, strict=True)])
            keep = _exp(p, at_end)
        if packing is not None:
            levels = functools.partial(_within, packing, levels)
            keep = packing.kept(jnp.ones((1, p.width), jnp.float32) if keep is None else keep)
        return Decays(levels, read, write, enter, keep, leave, is_one)

    def _packing(self, c: Any) -> Packing | None:
        """Of chunk `c`, for all heads."""
        if self._borders is None:
            return None
        # By identity in a loop, where the number of a chunk is traced.
        key = c if isinstance(c, int) else id(c)
        if key not in self._packings:
            self._packings[key] = c, _packing_of(self._p, self._borders, c)
        return self._packings[key][1]

    def reads(self, c: Any, x: jax.Array) -> jax.Array:
        """Rows of chunk `c`, with 0 for those that do not read the state before it."""
        return x if (packing := self._packing(c)) is None else packing.read(x)

    def writes(self, c: Any, x: jax.Array) -> jax.Array:
        """Rows of chunk `c`, with 0 for those that do not write the state after it."""
        return x if (packing := self._packing(c)) is None else packing.written(x)


def by_strength(
    p: Problem, gate_ref: Any, borders_ref: Any, step: Any, work: Callable[[Way], None], *, sums_ref: Any = None
) -> None:
    """Does `work` in the way of the strongest decay in the grid step: see `Way`.

    Args:
      sums_ref: where all of `gate_sums` is put first. Without it gates are added up for this alone, which is right
        where the sums would fill slots that are idle: where products wait for each other.
    """
    chunk, least = p.tiling.chunk, _least_of_gates(p, gate_ref, step)
    packings = dict[int, Packing]()
    if sums_ref is not None:
        if borders_ref is not None:  # while sums wait for nothing
            packings = {c: _packing_of(p, borders_ref, c) for c in range(p.tiling.chunks)}
        keep_all_sums(p, gate_ref, sums_ref, step)
        least = _least_of_sums(p, sums_ref)

    def unless(rows: int, work: Callable[[], None], otherwise: Callable[[], None]) -> None:
        moderate = least(rows) >= -gates.MODERATE
        pl.when(moderate)(work)
        pl.when(jnp.logical_not(moderate))(otherwise)

    def strong() -> None:
        splits, all_pairs = (Way(p, n, borders_ref, packings) for n in (SPLITS, chunk.bit_length() - 1))
        unless(chunk >> (SPLITS + 1), lambda: work(splits), lambda: work(all_pairs))

    unless(chunk // 2, lambda: work(Way(p, 0, borders_ref, packings)), strong)


def _packing_of(p: Problem, borders_ref: Any, c: Any) -> Packing:
    row = borders_ref[0, c]
    return Packing(column(row, max(p.tiling.chunk, p.width, p.value_width)), row)


def _least_of_gates(p: Problem, gate_ref: Any, step: Any) -> Callable[[int], jax.Array]:
    """Of the sums over so many rows, in any channel."""

    def least(rows: int) -> jax.Array:
        sums = []
        for c, h in itertools.product(range(p.tiling.chunks), range(p.tiling.heads)):
            gate = walk.part(p, gate_ref, c, h, p.width, step=step)
            sums += [jnp.sum(gate[i : i + rows], axis=0, keepdims=True) for i in range(0, p.tiling.chunk, rows)]
        return jnp.min(functools.reduce(jnp.minimum, sums))

    return least


def _least_of_sums(p: Problem, sums_ref: Any) -> Callable[[int], jax.Array]:
    """The same, from what `keep_all_sums` has put there."""
    size, parts = p.tiling.chunk, range(gates.parts(p.dtype))

    def least(rows: int) -> jax.Array:
        sums = []
        for c in range(p.tiling.chunks):
            begin = [-sums_ref[c, i, size : size + 1] for i in parts]
            ends = [[sums_ref[c, i, r - 1 : r] for i in parts] for r in range(rows, size + 1, rows)]
            # Part by part, which is exact.
            sums += [_total(map(operator.sub, *pair)) for pair in zip(ends, [begin, *ends[:-1]], strict=True)]
        return jnp.min(functools.reduce(jnp.minimum, sums)) * gates.unit(p.dtype)

    return least


def gate_refs(p: Problem, refs: Sequence[Any]) -> tuple[Any, Any, Sequence[Any]]:
    """References to gates and, if any, to `gates.borders`; and those behind them."""
    gate, *rest = refs
    return (gate, rest[0], rest[1:]) if p.packed else (gate, None, rest)


def own_scores(p: Problem, q: jax.Array, k: jax.Array) -> jax.Array:
    """Of rows with themselves, on the diagonal."""
    return jnp.where(_diagonal(p), jnp.sum(q.astype(jnp.float32) * k, axis=1, keepdims=True), 0)


def own_weights(p: Problem, pairs: jax.Array) -> jax.Array:
    """The diagonal, as a column."""
    return jnp.sum(jnp.where(_diagonal(p), pairs, 0), axis=1, keepdims=True)


def gate_sums(p: Problem, gate: jax.Array) -> Sums:
    """Summed over the rows, from the middle on in both directions."""
    parts, half = gates.split(jnp.maximum(gate, gates.FORGET), p.dtype), gate.shape[0] // 2
    if len(parts) == 1:
        # Half of a gate's bits and then the other half, so that products of bfloat16 sum them.
        high = parts[0].astype(p.dtype)
        halves = high, (parts[0] - high.astype(jnp.float32)).astype(p.dtype)
        row, column = walk.iota((half, 2 * half), 0), walk.iota((half, 2 * half), 1) % half
        early, late = jnp.where(row < column, -1, 0), jnp.where(row >= column, 1, 0)
        by_half = [
            dot(which.astype(p.dtype), jnp.concatenate([x[rows] for x in halves], axis=0))
            for which, rows in ((early, slice(half)), (late, slice(half, None)))
        ]
        since = [jnp.concatenate(by_half, axis=0)]
    else:
        since = [x - x[half - 1 : half] for x in map(_running_sum, parts)]
    return Sums(since, [x[:1] - s[:1] for x, s in zip(parts, since, strict=True)])


def scratch_of_sums(p: Problem, t: Tiling) -> Any:
    """Where `keep_sums` puts those of a step."""
    return pltpu.VMEM((t.chunks, gates.parts(p.dtype), t.chunk + SUBLANES, t.heads * p.width), jnp.float32)


def keep_sums(p: Problem, ref: Any, c: Any, first: int, sums: Sums) -> None:
    """Those of chunk `c`, of as many heads from the `first` on as there are."""
    size, start = p.tiling.chunk, first * p.width
    lanes = slice(start, start + sums.middle[0].shape[1])
    for i, (since, middle) in enumerate(zip(*sums, strict=True)):
        ref[c, i, :size, lanes] = since
        ref[c, i, size : size + 1, lanes] = middle


def keep_all_sums(p: Problem, gate_ref: Any, sums_ref: Any, step: Any) -> None:
    """Those of a step: of all heads of a chunk in one product, for it has one left side."""
    for c in range(p.tiling.chunks):
        gate = walk.part(p, gate_ref, c, 0, p.tiling.heads * p.width, step=step)
        keep_sums(p, sums_ref, c, 0, gate_sums(p, gate))


def kept_sums(p: Problem, ref: Any, c: Any, h: int) -> Sums:
    size, parts, lanes = p.tiling.chunk, range(gates.parts(p.dtype)), slice(h * p.width, (h + 1) * p.width)
    return Sums([ref[c, i, :size, lanes] for i in parts], [ref[c, i, size : size + 1, lanes] for i in parts])


def _running_sum(x: jax.Array) -> jax.Array:
    """Over the rows, in their dtype: products would round."""
    shift = 1
    while shift < x.shape[0]:
        x += jnp.concatenate([jnp.zeros((shift, x.shape[1]), x.dtype), x[:-shift]], axis=0)
        shift *= 2
    return x


def _middle(x: jax.Array, size: int, *, before: int = 0) -> jax.Array:
    """For every row, the row where the second half of its block of 2 `size` rows begins, or so many before that."""
    if 2 * size > SUBLANES:
        starts = range(size, x.shape[0], 2 * size)
        return jnp.concatenate(
            [jnp.broadcast_to(x[i - before : i - before + 1], (2 * size, x.shape[1])) for i in starts], axis=0
        )
    row = walk.iota((SUBLANES, x.shape[1]), 0)
    place = row // (2 * size) * (2 * size) + size - before
    tiles = [x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES)]
    return jnp.concatenate(
        [jnp.take_along_axis(tile, place, axis=0, mode="promise_in_bounds") for tile in tiles], axis=0
    )


def _within(packing: Packing, levels: Callable[[], Iterator[Level]]) -> Iterator[Level]:
    """Levels whose pairs are of one sequence."""
    for level in levels():
        yield level._replace(pairs=level.pairs & packing.together())


def _whole(p: Problem, read: jax.Array, write: jax.Array) -> Iterator[Level]:
    chunk = p.tiling.chunk
    yield Level(0, read, write, walk.iota((chunk, chunk), 0) >= walk.iota((chunk, chunk), 1))


def _halvings(p: Problem, sums: Sequence[jax.Array], count: int) -> Iterator[Level]:
    """So many, and what is left in one."""
    chunk, exp = p.tiling.chunk, gates.exponential(p.dtype)
    row, column = walk.iota((chunk, chunk), 0), walk.iota((chunk, chunk), 1)
    size = chunk // 2
    for _ in range(count):
        since = functools.reduce(jnp.add, [x - _middle(x, size) for x in sums])
        decay = exp(-jnp.abs(since))
        level = Level(size, decay, decay, (row // size == column // size + 1) & (row // size % 2 == 1))
        yield level._replace(late_decay=level.late(decay), early_decay=level.early(decay))
        size //= 2
    if size:
        since = functools.reduce(jnp.add, [x - _middle(x, size, before=1) for x in sums])
        yield Level(0, exp(since), exp(-since), (row // (2 * size) == column // (2 * size)) & (row > column))


def _diagonal(p: Problem) -> jax.Array:
    shape = (p.tiling.chunk, p.tiling.chunk)
    return walk.iota(shape, 0) == walk.iota(shape, 1)


def _total(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _exp(p: Problem, parts: Iterable[jax.Array]) -> jax.Array:
    return gates.exponential(p.dtype)(_total(parts))
