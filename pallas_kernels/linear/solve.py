"""(I + L)^-1 of strictly lower triangular L inside a TPU kernel; what stands elsewhere in L is not read.

Blocks on the diagonal lie side by side along the lanes. Those of `SOLVED` rows are solved row by row:

    X[r] = e_r - sum_{j<r} L[r, j] X[j]

and then joined pair by pair, ((A, 0), (C, B))^-1 = ((A^-1, 0), (-B^-1 C A^-1, B^-1)). A product of all pairs has on its
left the blocks side by side, which are few rows, and on its right the others apart, each in rows of its own.

Of one matrix such a product has blocks in half of its lanes, so two are solved at once, the second mirrored: its blocks
of `SOLVED` rows, and of as many columns, stand in reverse order. At every size its first blocks then have the lanes of
the other's second ones. That is half as many products, and a few selections more in a row before each: it gains where
products are many (decays of tokens), and loses where they wait for each other (decays of channels).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear.walk import dot, iota

SOLVED = 8
"""Rows of a register of 32-bit numbers, so that rows of blocks are registers."""


class Inverse(NamedTuple):
    """(I + L)^-1, or if `mirrored` that with blocks of `SOLVED` rows and columns in reverse order."""

    matrix: jax.Array
    mirrored: bool

    def times(self, x: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
        """The product, or with `over=(0, 0)` that of the transpose, with `x` in float32."""
        if not self.mirrored:
            return dot(self.matrix, x.astype(self.matrix.dtype), over)
        return _mirrored(dot(self.matrix, _mirrored(x).astype(self.matrix.dtype), over))


def couples(heads: int) -> list[range]:
    """Heads whose matrices are solved together; those with odd numbers are mirrored."""
    return [range(h, min(h + 2, heads)) for h in range(0, heads, 2)]


def unit_lower_inverse(lower: jax.Array, dtype: Any) -> Generator[None, None, jax.Array]:
    """(I + lower)^-1 in float32; products of blocks take operands in `dtype`. A `yield` stands where it would wait."""
    chunk, size = lower.shape[0], SOLVED
    (inverses,) = yield from _solved_blocks(_side_by_side(lower, size))
    while size < chunk:
        # C and A of a pair have the same lanes. What stands in those of B is not read.
        links = _side_by_side(lower, size, every=2)
        firsts = range(0, chunk // size, 2)
        between = dot(_every_second(links, size, 0).astype(dtype), _apart(inverses, size, firsts, dtype))
        yield
        change = dot(_every_second(inverses, size, 1).astype(dtype), _apart(between, size, firsts, dtype))
        yield
        even = iota((size, chunk), 1) // size % 2 == 0
        inverses = jnp.concatenate([jnp.where(even, inverses, 0), jnp.where(even, -change, inverses)], axis=0)
        size *= 2
    return inverses


def unit_lower_inverses(lowers: Sequence[jax.Array], dtype: Any) -> Generator[None, None, list[Inverse]]:
    """`unit_lower_inverse` of one, or of two at once in as many turns, in `dtype`."""
    if len(lowers) == 1:
        inverse = yield from unit_lower_inverse(lowers[0], dtype)
        return [Inverse(inverse.astype(dtype), mirrored=False)]
    (one, other), chunk, size = lowers, lowers[0].shape[0], SOLVED
    solved = _solved_blocks(_side_by_side(one, size), _mirrored_strip(_side_by_side(other, size)))
    first, second = yield from solved
    while size < chunk:
        even = iota((size, chunk), 1) // size % 2 == 0
        blocks = range(chunk // size)
        # C and A of a pair have the same lanes: even blocks of the one, odd blocks of the other.
        links = _side_by_side(one, size, every=2), _mirrored_strip(_side_by_side(other, size, every=2))
        # B^-1 C before A^-1: what is known last is on the left, where nothing is done to it.
        link = _apart(jnp.where(even, *links), size, [i ^ 1 for i in blocks], dtype)
        between = dot(jnp.where(even, second, first).astype(dtype), link)
        yield
        change = -dot(between.astype(dtype), _apart(jnp.where(even, first, second), size, blocks, dtype))
        yield
        first, second = (
            jnp.concatenate([jnp.where(even, first, 0), jnp.where(even, change, first)], axis=0),
            jnp.concatenate([jnp.where(even, second, change), jnp.where(even, 0, second)], axis=0),
        )
        size *= 2
    return [Inverse(first.astype(dtype), mirrored=False), Inverse(second.astype(dtype), mirrored=True)]


def _mirrored(x: jax.Array) -> jax.Array:
    """Blocks of `SOLVED` rows in reverse order: whole registers, which only change their names."""
    return jnp.concatenate([x[i : i + SOLVED] for i in reversed(range(0, x.shape[0], SOLVED))], axis=0)


def _mirrored_strip(strip: jax.Array) -> jax.Array:
    """Blocks of `SOLVED` rows in reverse order, and so those of as many lanes."""
    source = iota(strip.shape, 1) ^ (strip.shape[1] - SOLVED)
    return _mirrored(jnp.take_along_axis(strip, source, axis=1, mode="promise_in_bounds"))


def _side_by_side(x: jax.Array, size: int, *, every: int = 1) -> jax.Array:
    """Blocks of `size` rows: those on the diagonal, or if `every` is 2 the lower left one of every pair of them."""
    width = every * size
    group = iota((size, x.shape[1]), 1) // width
    strip = x[width - size : width]
    for i in range(1, x.shape[0] // width):
        strip = jnp.where(group == i, x[(i + 1) * width - size : (i + 1) * width], strip)
    return strip


def _every_second(strip: jax.Array, size: int, first: int) -> jax.Array:
    """Of blocks of `size` lanes every second one, from number `first` on."""
    half, lane = strip.shape[1] // 2, iota(strip.shape, 1)
    if size == half and not first:
        return strip[:, :half]
    source = jnp.minimum((lane // size * 2 + first) * size + lane % size, 2 * half - 1)
    return jnp.take_along_axis(strip, source, axis=1, mode="promise_in_bounds")[:, :half]


def _apart(strip: jax.Array, size: int, blocks: Sequence[int], dtype: Any) -> jax.Array:
    """Those `blocks` of `size` lanes in their lanes, each in rows of its own."""
    if size >= 2 * SOLVED:  # whole tiles in any dtype
        strip = strip.astype(dtype)
    block = iota(strip.shape, 1) // size
    return jnp.concatenate([jnp.where(block == i, strip, 0) for i in blocks], axis=0).astype(dtype)


def _solved_blocks(*strips: jax.Array) -> Generator[None, None, list[jax.Array]]:
    """The inverses of the blocks of `SOLVED` rows on the diagonal, side by side."""
    row, lane = (iota(strips[0].shape, axis) for axis in (0, 1))
    strips = tuple(jnp.where(row > lane % SOLVED, x, 0) for x in strips)
    found = [jnp.where(row == lane % SOLVED, 1.0, 0.0)] * len(strips)
    for j in range(SOLVED - 1):
        column = lane // SOLVED * SOLVED + j
        weights = [jnp.take_along_axis(x, column, axis=1, mode="promise_in_bounds") for x in strips]
        found = [x - weight * x[j : j + 1] for x, weight in zip(found, weights, strict=True)]
        yield
    return found
