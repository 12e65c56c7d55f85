"""(I + L)^-1 of a strictly lower triangular L inside a TPU kernel.

Blocks of `ELIMINATED` rows on the diagonal are solved row by row, all blocks of L side by side along the lanes:

    X[r] = e_r - sum_{j<r} L[r, j] X[j]

and then joined pair by pair, ((A, 0), (C, B))^-1 = ((A^-1, 0), (-B^-1 C A^-1, B^-1)), with matrix products.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear.walk import dot, every_second, iota, with_gaps

ELIMINATED = 8
SUBLANES = 8


def unit_lower_inverse(lower: jax.Array, dtype: Any) -> Generator[None, None, jax.Array]:
    """(I + lower)^-1 in float32; products of blocks take operands in `dtype`. A `yield` stands where it would wait."""
    chunk = lower.shape[0]
    size = min(ELIMINATED, chunk)
    inverse = yield from _solved_blocks(lower, size)
    while size < chunk:
        # Only rows of B change: every other strip of `size` rows.
        row, column = (every_second(iota((chunk, chunk), axis), size) // size for axis in (0, 1))
        link = _gathered(jnp.where(row == column + 1, every_second(lower, size), 0), size, first=0).astype(dtype)
        between = dot(link, every_second(inverse, size, first=0).astype(dtype)).astype(dtype)
        yield
        inverse -= with_gaps(dot(_gathered(every_second(inverse, size), size, first=1).astype(dtype), between), size)
        yield
        size *= 2
    return inverse


def _gathered(x: jax.Array, size: int, *, first: int) -> jax.Array:
    """Strips of `size` rows that are 0 but for every second strip of columns, without the columns between."""
    half = x.shape[0]
    strips = [x[i * size : (i + 1) * size] for i in range(half // size)]
    moved = [
        jnp.roll(strip, -shift, axis=1) if (shift := (i + first) * size) else strip for i, strip in enumerate(strips)
    ]
    return jnp.concatenate(moved, axis=0)[:, :half]


def _solved_blocks(lower: jax.Array, size: int) -> Generator[None, None, jax.Array]:
    """The inverses of the blocks of `size` rows on the diagonal, zeros beside them."""
    chunk = lower.shape[0]
    block, place = iota((size, chunk), 1) // size, iota((size, chunk), 1) % size
    identity = jnp.where(iota((size, chunk), 0) == place, 1.0, 0.0)
    strip = lower[:size]
    for i in range(1, chunk // size):
        strip = jnp.where(block == i, lower[i * size : (i + 1) * size], strip)
    tiles = [identity[start : start + SUBLANES] for start in range(0, size, SUBLANES)]
    lanes = block * size
    for j in range(size - 1):
        known = tiles[j // SUBLANES][j % SUBLANES : j % SUBLANES + 1]
        for i in range((j + 1) // SUBLANES, len(tiles)):
            rows = slice(i * SUBLANES, (i + 1) * SUBLANES)
            weight = jnp.take_along_axis(strip[rows], (lanes + j)[rows], axis=1, mode="promise_in_bounds")
            tiles[i] -= weight * known
        yield
    strip = jnp.concatenate(tiles, axis=0)
    return jnp.concatenate([jnp.where(block == i, strip, 0) for i in range(chunk // size)], axis=0)
