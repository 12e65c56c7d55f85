"""A number for every distance on a grid, added to logits as pieces of a strip in the on-chip memory of a TPU.

    z_ts = y_ts + g[c(s) - c(t)]         c: coordinates, along an outer axis and inner ones

Blocks of tokens are boxes of the grid, Q_o x Q_i queries and K_o x K_i keys, row-major: lane j of a block of keys is
the key (j div K_i, j mod K_i). A query one further along the outer axis has the same numbers K_i lanes later. So the
rows of a strip are all queries of an inner box, G times, each K_i lanes behind the last, where G K_i are whole tiles of
lanes; and the logits of the rows (G a + h, i) of a block are a piece of it that begins at a tile of lanes:

    strip[(h, i), e K_i + j] = g[e - h, A + j - i]
    z[(G a + h, i), (o, j)] = y + strip[(h, i), (A_o + o - G a) K_i + j]

with A the distance of the first tokens. For each A along the inner axes there is such a strip. They stand one behind
the other, and where a pair of blocks begins is a difference of two codes of blocks. Blocks of one axis are all outer.

A strip is made from lines, in which a distance is a number of lanes: row (h, i) is a line moved by h K_i + i, i read as
a key. Where j < i along an axis that borrows from the next one, as in a subtraction; so there is a line for every
pattern of borrows, and a row takes each of its lanes from one of them. The gradients of logits add up in a strip alike,
and its rows, moved back, in lines.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse.tiling import LANES

CHUNK = 2048
"""The most lanes of a strip that are made at a time: so many that their moves need not wait for each other."""
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Strip:
    """Where the numbers are.

    Attributes:
      queries, keys: extents of their blocks along the axes, outer one first; where there are more, powers of two.
      least, most: of the distance from the first query of a block to the first key of one, over all pairs of them.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    least: tuple[int, ...]
    most: tuple[int, ...]

    @property
    def inner(self) -> tuple[int, int]:
        """Queries and keys at one place along the outer axis."""
        return math.prod(self.queries[1:]), math.prod(self.keys[1:])

    @property
    def together(self) -> int:
        """G."""
        return max(1, LANES // self.inner[1])

    @property
    def rows(self) -> int:
        return self.together * self.inner[0]

    @property
    def later(self) -> int:
        """Lanes by which as many more queries begin earlier."""
        return self.together * self.inner[1]

    @property
    def borrows(self) -> tuple[int, ...]:
        """The most that each inner axis may borrow from the one before it."""
        found: list[int] = []
        for queries, keys in zip(reversed(self.queries[1:]), reversed(self.keys[1:]), strict=True):
            found.insert(0, -(-(queries - 1 + (found[0] if found else 0)) // keys))
        return tuple(found)

    @property
    def patterns(self) -> int:
        return math.prod(most + 1 for most in self.borrows)

    @property
    def reach(self) -> int:
        """The most lanes by which a row is moved, in whole tiles of them: so many come before all that is read."""
        return self._margin * self.inner[1]

    @property
    def _margin(self) -> int:
        most = self.together - 1 + (self.borrows[0] if self.borrows else 0)
        return -(-most // self.together) * self.together

    @property
    def _first(self) -> int:
        """Where the distance 0 of the outer axis is."""
        return self._margin + self.queries[0] - self.together - self.least[0]

    @property
    def _length(self) -> int:
        """Places along the outer axis."""
        return self._first + self.most[0] + self.keys[0]

    @property
    def units(self) -> tuple[int, ...]:
        """Of distances between first tokens along the inner axes."""
        return tuple(map(math.gcd, self.queries[1:], self.keys[1:]))

    @property
    def kinds(self) -> tuple[int, ...]:
        """How many such distances there are along each."""
        sizes = zip(self.least[1:], self.most[1:], self.units, strict=True)
        return tuple((most - least) // unit + 1 for least, most, unit in sizes)

    @property
    def _filled(self) -> int:
        """Lanes, in units of `later`."""
        return -(-math.prod(self.kinds) * self._length * self.inner[1] // self.later)

    @property
    def _chunks(self) -> int:
        return -(-self._filled * self.later // CHUNK)

    @property
    def chunk(self) -> int:
        """Lanes that are made at a time."""
        return -(-self._filled // self._chunks) * self.later

    @property
    def lanes(self) -> int:
        return self._chunks * self.chunk

    @property
    def size(self) -> int:
        """Bytes."""
        return 4 * self.rows * self.lanes

    @property
    def moves(self) -> tuple[int, ...]:
        """Lanes by which a row is moved, for each bit of its number from the lowest on."""
        found, lanes = [], 1
        for queries, keys in zip(reversed(self.queries[1:]), reversed(self.keys[1:]), strict=True):
            found += [lanes << bit for bit in range(queries.bit_length() - 1)]
            lanes *= keys
        return (*found, *(lanes << bit for bit in range(self.together.bit_length() - 1)))

    def codes(self, q_first: Int[np.ndarray, "axes rows"], kv_first: Int[np.ndarray, "axes columns"]) -> list[Any]:
        """Of blocks with these first tokens: the lane at which a pair begins is that of its keys less its queries'."""
        lanes = [self.inner[1]]
        for axis, unit in enumerate(self.units, 1):
            lanes.append(self._length * self.inner[1] * math.prod(self.kinds[axis:]) // unit)
        begin = self._first * self.inner[1] - sum(x * n for x, n in zip(self.least[1:], lanes[1:], strict=True))
        q_code, kv_code = (np.array(lanes) @ first for first in (q_first, kv_first))
        return [q_code.astype(np.int32), (kv_code + begin).astype(np.int32)]

    def check(self, room: int) -> None:
        """Raises `NotImplementedError` with the reason where there is no such strip in so many bytes."""
        extents = self.queries[1:], self.keys[1:]
        if any(extent & (extent - 1) for axes in extents for extent in axes) or self.rows % SUBLANES:
            raise NotImplementedError(
                f"blocks are boxes of powers of two with {SUBLANES} queries at least beyond the first axis, not "
                f"{self.queries} queries and {self.keys} keys"
            )
        if self.queries[0] % self.together:
            raise NotImplementedError(
                f"{self.queries} queries and {self.keys} keys: as long along the first axis as the queries, the keys "
                f"must be a multiple of {LANES}"
            )
        if self.size > room:
            raise NotImplementedError(
                f"its numbers take {self.size / 2**20:.1f} MiB on the chip for blocks of {self.queries} queries and "
                f"{self.keys} keys, and the kernel has {room / 2**20:.1f} MiB for them"
            )


def places(strip: Strip) -> Int[np.ndarray, " lanes"]:
    """The distances of lines along a single axis."""
    return np.arange(strip.reach + strip.lanes) - strip.reach - strip._first


def lines(strip: Strip, table: Float[Array, "N ..."]) -> Float[Array, "N patterns lanes"]:
    """The lines of a table with the distance 0 in the middle of each axis; beyond it are zeros."""
    table = table.astype(jnp.float32)
    sizes, axes = table.shape[1:], len(strip.queries)
    found = []
    for borrowed in itertools.product(*(range(most + 1) for most in strip.borrows)):
        given = (*borrowed, 0)
        x, at = table, [np.arange(strip._length) - strip._first + given[0]]
        for axis in range(1, axes):
            first = strip.least[axis] + strip.units[axis - 1] * np.arange(strip.kinds[axis - 1])[:, None]
            size = strip.keys[axis]
            at.append(first + np.arange(size) + given[axis] - size * given[axis - 1])
        for distance, size in zip(at, sizes, strict=True):
            # Products with ones and zeros are exact where operands are not rounded.
            ones = (distance[..., None] + size // 2 == np.arange(size)).astype(np.float32)
            x = jnp.tensordot(x, ones, axes=(1, ones.ndim - 1), precision=jax.lax.Precision.HIGHEST)
        # [N, places, kinds, keys, kinds, keys, ...]
        x = x.transpose(0, *range(2, 2 * axes, 2), 1, *range(3, 2 * axes, 2)).reshape(x.shape[0], -1)
        found.append(jnp.pad(x, [(0, 0), (strip.reach, strip.lanes - x.shape[1])]))
    return jnp.stack(found, axis=1)


def sources(strip: Strip) -> Int[np.ndarray, "rows later"]:
    """From which line each number comes, where all but the lowest three bits of its row have not moved it yet."""
    rows = np.arange(strip.rows)
    lane = np.arange(strip.later) + np.array([_moved(strip, row) for row in range(strip.rows)])[:, None]
    row, found, borrowed, weight = rows[:, None], 0 * lane, 0 * lane, 1
    axes = zip(reversed(strip.queries[1:]), reversed(strip.keys[1:]), reversed(strip.borrows), strict=True)
    for queries, keys, most in axes:
        borrowed = -((lane % keys - row % queries - borrowed) // keys)
        found = found + borrowed * weight
        row, lane, weight = row // queries, lane // keys, weight * (most + 1)
    return found.astype(np.int32)


def _from(strip: Strip, sources: Any, first: int, which: int) -> jax.Array:
    """Where the numbers of some rows come from a line, for a chunk and what comes before it."""
    found = sources[first : first + SUBLANES] == which
    return jnp.concatenate([found] * ((strip.chunk + strip.reach) // strip.later), axis=1)


def make(strip: Strip, lines: Any, sources: Any, strips: Any) -> None:
    """A strip from lines; `sources` is not read where there is one line."""
    width = strip.chunk + strip.reach
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)

    def chunk(i: Any, _: Any) -> None:
        begun = []
        for which in range(strip.patterns):
            x = jnp.broadcast_to(lines[which : which + 1, _at(i * strip.chunk, width)], row.shape)
            for bit, move in enumerate(strip.moves[:3]):
                x = jnp.where((row >> bit) & 1 == 1, pltpu.roll(x, move, 1), x)
            begun.append(x)
        for first in range(0, strip.rows, SUBLANES):
            found = begun[0]
            for which, x in enumerate(begun[1:], 1):
                found = jnp.where(_from(strip, sources, first, which), x, found)
            # What comes in at the left end is left off.
            found = pltpu.roll(found, _moved(strip, first), 1)[:, strip.reach :]
            strips[first : first + SUBLANES, _at(i * strip.chunk, strip.chunk)] = found

    jax.lax.fori_loop(0, strip.lanes // strip.chunk, chunk, None)


def clear(strip: Strip, sums: Any) -> None:
    """Empties a strip of gradients."""

    def chunk(i: Any, _: Any) -> None:
        sums[:, _at(i * strip.chunk, strip.chunk)] = jnp.zeros((strip.rows, strip.chunk), jnp.float32)

    jax.lax.fori_loop(0, strip.lanes // strip.chunk, chunk, None)
    sums[:, strip.lanes :] = jnp.zeros((strip.rows, strip.reach), jnp.float32)


def total(strip: Strip, sums: Any, sources: Any, out: Any) -> None:
    """The gradients of lines, without the first `reach` of their lanes, from a strip of gradients."""
    width = strip.chunk + strip.reach

    def chunk(i: Any, _: Any) -> None:
        found = [jnp.zeros((SUBLANES, width), jnp.float32)] * strip.patterns
        for first in range(0, strip.rows, SUBLANES):
            x = _back(sums[first : first + SUBLANES, _at(i * strip.chunk, width)], _moved(strip, first))
            for which in range(strip.patterns):
                found[which] += x if strip.patterns == 1 else jnp.where(_from(strip, sources, first, which), x, 0)
        for which, x in enumerate(found):
            for bit in (2, 1, 0):
                x = x[: 1 << bit] + _back(x[1 << bit :], strip.moves[bit])
            out[which : which + 1, _at(i * strip.chunk, strip.chunk)] = x[:, : strip.chunk]

    jax.lax.fori_loop(0, strip.lanes // strip.chunk, chunk, None)


def _back(x: jax.Array, move: int) -> jax.Array:
    """Moved to the left; what comes in at the right end is beyond a chunk."""
    return pltpu.roll(x, x.shape[1] - move, 1) if move else x


def _moved(strip: Strip, row: int) -> int:
    """By how many lanes a row is moved, less what its three lowest bits do."""
    return sum(move for bit, move in enumerate(strip.moves) if bit > 2 and row >> bit & 1)


def _at(start: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(start, LANES), size)


def _pieces(strip: Strip, origin: Any, rows: slice, columns: slice) -> list[tuple[slice, slice, Any]]:
    """Of a tile of logits: rows of it, and the rows and lanes of a strip where they are."""
    size, found = math.gcd(strip.rows, rows.stop - rows.start), []
    for row in range(rows.start, rows.stop, size):
        before, first = divmod(row, strip.rows)
        lanes = _at(origin + (columns.start - before * strip.later), columns.stop - columns.start)
        found.append((slice(row - rows.start, row - rows.start + size), slice(first, first + size), lanes))
    return found


def tile(strip: Strip, strips: Any, origin: Any, rows: slice, columns: slice) -> jax.Array:
    """What the logits of a tile get; `origin`: the lane at which their pair of blocks begins."""
    pieces = [strips[own, lanes] for _, own, lanes in _pieces(strip, origin, rows, columns)]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)


def add(strip: Strip, sums: Any, origin: Any, rows: slice, columns: slice, dy: jax.Array) -> None:
    """Adds the gradients of a tile."""
    for of_tile, own, lanes in _pieces(strip, origin, rows, columns):
        sums[own, lanes] += dy[of_tile]
