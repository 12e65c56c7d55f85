"""(I + L)^-1 of a strictly lower triangular L inside a TPU kernel.

Blocks of `ELIMINATED` rows on the diagonal are solved row by row, all blocks of L side by side along the lanes:

    X[r] = e_r - sum_{j<r} L[r, j] X[j]

and then joined pair by pair, ((A, 0), (C, B))^-1 = ((A^-1, 0), (-B^-1 C A^-1, B^-1)), with matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear.walk import dot, every_second, iota, with_gaps

ELIMINATED = 16
SUBLANES = 8


def unit_lower_inverses(lowers: Sequence[jax.Array], dtype: Any) -> list[jax.Array]:
    """(I + lower)^-1 of each, in float32; products of blocks take operands in `dtype`.

    All go on together: one alone would wait for itself most of the time.
    """
    chunk = lowers[0].shape[0]
    size = min(ELIMINATED, chunk)
    inverses = _solved_blocks(lowers, size)
    while size < chunk:
        # Only rows of B change: every other strip of `size` rows.
        row, column = (every_second(iota((chunk, chunk), axis), size) // size for axis in (0, 1))
        joins = row == column + 1
        known = [inverse.astype(dtype) for inverse in inverses]
        links = [jnp.where(joins, every_second(lower, size), 0).astype(dtype) for lower in lowers]
        between = [dot(link, inverse).astype(dtype) for link, inverse in zip(links, known, strict=True)]
        changes = [dot(every_second(k, size), with_gaps(b, size)) for k, b in zip(known, between, strict=True)]
        inverses = [x - with_gaps(change, size) for x, change in zip(inverses, changes, strict=True)]
        size *= 2
    return inverses


def _solved_blocks(lowers: Sequence[jax.Array], size: int) -> list[jax.Array]:
    """The inverses of the blocks of `size` rows on the diagonals, zeros beside them."""
    chunk = lowers[0].shape[0]
    block, place = iota((size, chunk), 1) // size, iota((size, chunk), 1) % size
    identity = jnp.where(iota((size, chunk), 0) == place, 1.0, 0.0)
    starts = range(0, size, SUBLANES)
    packed, solved = [], []
    for lower in lowers:
        strip = lower[:size]
        for i in range(1, chunk // size):
            strip = jnp.where(block == i, lower[i * size : (i + 1) * size], strip)
        packed.append(strip)
        solved.append([identity[start : start + SUBLANES] for start in starts])
    lanes = block * size
    for j in range(size - 1):
        for strip, tiles in zip(packed, solved, strict=True):
            known = tiles[j // SUBLANES][j % SUBLANES : j % SUBLANES + 1]
            for i in range((j + 1) // SUBLANES, len(tiles)):
                rows = slice(i * SUBLANES, (i + 1) * SUBLANES)
                weight = jnp.take_along_axis(strip[rows], (lanes + j)[rows], axis=1, mode="promise_in_bounds")
                tiles[i] -= weight * known
    strips = [jnp.concatenate(tiles, axis=0) for tiles in solved]
    return [
        jnp.concatenate([jnp.where(block == i, strip, 0) for i in range(chunk // size)], axis=0) for strip in strips
    ]
