"""(I + L)^-1 of a strictly lower triangular L inside a TPU kernel.

Blocks of `ELIMINATED` rows on the diagonal are solved row by row, all blocks of L side by side along the lanes:

    X[r] = e_r - sum_{j<r} L[r, j] X[j]

and then joined pair by pair, ((A, 0), (C, B))^-1 = ((A^-1, 0), (-B^-1 C A^-1, B^-1)), with matrix products.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear.walk import dot, iota

ELIMINATED = 32
SUBLANES = 8


def unit_lower_inverse(lower: jax.Array, dtype: Any) -> jax.Array:
    """(I + lower)^-1 in float32; products of blocks take operands in `dtype`."""
    size = min(ELIMINATED, lower.shape[0])
    inverse = _solved_blocks(lower, size)
    row, column = iota(lower.shape, 0), iota(lower.shape, 1)
    while size < lower.shape[0]:
        joins = (row // (2 * size) == column // (2 * size)) & (row // size != column // size)
        known = inverse.astype(dtype)
        between = dot(jnp.where(joins, lower, 0).astype(dtype), known)
        inverse -= dot(known, between.astype(dtype))
        size *= 2
    return inverse


def _solved_blocks(lower: jax.Array, size: int) -> jax.Array:
    """The inverse of the blocks of `size` rows on the diagonal, zeros beside them."""
    chunk = lower.shape[0]
    block, place = iota((size, chunk), 1) // size, iota((size, chunk), 1) % size
    packed = lower[:size]
    for i in range(1, chunk // size):
        packed = jnp.where(block == i, lower[i * size : (i + 1) * size], packed)
    identity = jnp.where(iota((size, chunk), 0) == place, 1.0, 0.0)
    starts = range(0, size, SUBLANES)
    solved = [identity[start : start + SUBLANES] for start in starts]
    lanes = block * size
    for j in range(size - 1):
        known = solved[j // SUBLANES][j % SUBLANES : j % SUBLANES + 1]
        for i in range((j + 1) // SUBLANES, len(solved)):
            rows = slice(i * SUBLANES, (i + 1) * SUBLANES)
            weight = jnp.take_along_axis(packed[rows], (lanes + j)[rows], axis=1, mode="promise_in_bounds")
            solved[i] -= weight * known
    strip = jnp.concatenate(solved, axis=0)
    return jnp.concatenate([jnp.where(block == i, strip, 0) for i in range(chunk // size)], axis=0)
