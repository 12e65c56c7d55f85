"""(I + L)^-1 of a strictly lower triangular L inside a TPU kernel; what stands elsewhere in L is not read.

Blocks on the diagonal lie side by side along the lanes. Those of `ELIMINATED` rows are solved row by row:

    X[r] = e_r - sum_{j<r} L[r, j] X[j]

and then joined pair by pair, ((A, 0), (C, B))^-1 = ((A^-1, 0), (-B^-1 C A^-1, B^-1)). A product of all pairs has on its
left the blocks side by side, which are few rows, and on its right the others apart, each in rows of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear.walk import dot, iota

ELIMINATED = 8
SUBLANES = 8


def unit_lower_inverse(lower: jax.Array, dtype: Any) -> Generator[None, None, jax.Array]:
    """(I + lower)^-1 in float32; products of blocks take operands in `dtype`. A `yield` stands where it would wait."""
    chunk = lower.shape[0]
    size = min(ELIMINATED, chunk)
    inverses = yield from _solved_blocks(lower, size)
    while size < chunk:
        # C and A of a pair have the same lanes. What stands in those of B is not read.
        links = _side_by_side(lower, size, every=2)
        between = dot(_every_second(links, size, 0).astype(dtype), _apart(inverses, size, dtype))
        yield
        change = dot(_every_second(inverses, size, 1).astype(dtype), _apart(between, size, dtype))
        yield
        of_a = iota((size, chunk), 1) // size % 2 == 0
        inverses = jnp.concatenate([jnp.where(of_a, inverses, 0), jnp.where(of_a, -change, inverses)], axis=0)
        size *= 2
    return inverses


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


def _apart(strip: jax.Array, size: int, dtype: Any) -> jax.Array:
    """Every second block of `size` lanes, from the first on, in rows of its own."""
    if size >= 2 * SUBLANES:  # whole tiles in any dtype
        strip = strip.astype(dtype)
    block = iota(strip.shape, 1) // size
    strips = [jnp.where(block == i, strip, 0) for i in range(0, strip.shape[1] // size, 2)]
    return jnp.concatenate(strips, axis=0).astype(dtype)


def _solved_blocks(lower: jax.Array, size: int) -> Generator[None, None, jax.Array]:
    """The inverses of the blocks of `size` rows on the diagonal, side by side."""
    chunk = lower.shape[0]
    block, place = iota((size, chunk), 1) // size, iota((size, chunk), 1) % size
    identity = jnp.where(iota((size, chunk), 0) == place, 1.0, 0.0)
    strip = jnp.where(iota((size, chunk), 0) > place, _side_by_side(lower, size), 0)
    tiles = [identity[start : start + SUBLANES] for start in range(0, size, SUBLANES)]
    lanes = block * size
    for j in range(size - 1):
        known = tiles[j // SUBLANES][j % SUBLANES : j % SUBLANES + 1]
        for i in range((j + 1) // SUBLANES, len(tiles)):
            rows = slice(i * SUBLANES, (i + 1) * SUBLANES)
            weight = jnp.take_along_axis(strip[rows], (lanes + j)[rows], axis=1, mode="promise_in_bounds")
            tiles[i] -= weight * known
        yield
    return jnp.concatenate(tiles, axis=0)
