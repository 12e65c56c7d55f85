"""What the gates of a chunk do to its queries, keys, scores and state, for the three shapes a gate can have.

With g_1..g_C <= 0 the gates of a chunk, everything is built from exponentials of sums of consecutive gates:

    read_r     = exp(g_1 + ... + g_r)             weight of the state that enters the chunk, seen by row r
    write_j    = exp(g_{j+1} + ... + g_C)         weight of row j in the state that leaves it
    total      = exp(g_1 + ... + g_C)             weight of the state that enters in the state that leaves
    pair_{r,j} = exp(g_{j+1} + ... + g_r)         weight of row j seen by row r, for j <= r

A constant gate gives tables that depend on the head only, a gate per token a [C, C] matrix. A gate per channel
would give [C, C, H]; there the chunk is halved again and again. A pair (r, j) whose rows lie in the second and the
first half of the same block is the product of a prefix of the second half, which weighs q_r, and a suffix of the
first, which weighs k_j, so each level is one matrix product. Sums are built by doubling, the same way: none is the
difference of two others, so a gate of -10000 beside one of -0.001 loses nothing, and no exponent is ever positive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SUB_CHUNK = 16  # products of rows nearer than this keep the accumulator dtype; farther ones take the operands' dtype


class Factors(NamedTuple):
    """The gates of [B, K] heads and n chunks of C rows; X is 1, or H for a gate per channel. Sizes may be 1."""

    read: Float[Array, "B K n C X"]
    write: Float[Array, "B K n C X"]
    total: Float[Array, "B K n 1 X"]
    scores: Callable[[Float[Array, "B K n G C H"], Float[Array, "B K n C H"]], Float[Array, "B K n G C C"]]
    """Scores of rows against rows of the same chunk, weighted by `pair`; 0 above the diagonal."""


def constant(log_decay: Float[Array, " K"], chunk: int) -> Callable[[Int[Array, " n"]], Factors]:
    """Tables of gates that are the same for all tokens; call the result with the real tokens per chunk."""
    gate = log_decay[:, None, None, None]
    row = np.arange(chunk)
    distance = row[:, None] - row
    pairs = jnp.where(distance >= 0, jnp.exp(gate * np.maximum(distance, 0)), 0)
    read = jnp.exp(gate * (row[:, None] + 1))

    def factors(real: Int[Array, " n"]) -> Factors:
        real = jnp.asarray(real)[:, None, None]
        write = jnp.exp(gate * jnp.maximum(real - 1 - row[:, None], 0))
        return Factors(read[None], write[None], jnp.exp(gate * real)[None], _weighted(pairs[None, :, :, None]))

    return factors


def per_token(gates: Float[Array, "B K n C X"]) -> Factors:
    """Factors of gates that differ from token to token, for all channels alike (X = 1) or for each (X = H)."""
    levels, prefix, suffix = _partial_sums(gates)
    if gates.shape[-1] == 1:
        exponent = jnp.zeros_like(gates)[..., None]
        for second, first in levels:
            exponent = join(exponent, second + jnp.swapaxes(first, -1, -2), -jnp.inf)
        scores = _weighted(jnp.exp(exponent[:, :, :, 0])[:, :, :, None])
    else:
        scores = _halved([(jnp.exp(second), jnp.exp(first)) for second, first in levels])
    return Factors(jnp.exp(prefix), jnp.exp(suffix), jnp.exp(prefix[..., -1:, :]), scores)


def _partial_sums(gates: Array) -> tuple[list[tuple[Array, Array]], Array, Array]:
    """Sums of consecutive gates, by doubling.

    Returns a pair for every level, blocks of 2, 4, .. C rows: inclusive prefixes of the second halves and exclusive
    suffixes of the first, both [..., blocks, half, X]; then both for the whole chunk, [..., C, X].
    """
    prefix = gates[..., None, :]
    suffix = jnp.zeros_like(prefix)
    levels = []
    while prefix.shape[-3] > 1:
        (first, second), (first_suffix, second_suffix) = halves(prefix), halves(suffix)
        levels.append((second, first_suffix))
        prefix = jnp.concatenate([first, second + first[..., -1:, :]], axis=-2)
        suffix = jnp.concatenate([first_suffix + second[..., -1:, :], second_suffix], axis=-2)
    return levels, prefix[..., 0, :, :], suffix[..., 0, :, :]


def halves(x: Array) -> tuple[Array, Array]:
    """[..., 2 m, s, X] -> the even and the odd blocks, each [..., m, s, X]."""
    x = x.reshape(*x.shape[:-3], x.shape[-3] // 2, 2, *x.shape[-2:])
    return x[..., 0, :, :], x[..., 1, :, :]


def join(diagonal: Array, below: Array, above: float) -> Array:
    """Blocks [..., 2 m, s, s] on the diagonal and [..., m, s, s] below it -> blocks [..., m, 2 s, 2 s]."""
    first, second = halves(diagonal)
    top = jnp.concatenate([first, jnp.full_like(first, above)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


def _weighted(pairs: Array) -> Callable[[Array, Array], Array]:
    """Scores times a table of weights [..., C, C]."""

    def scores(query: Array, key: Array) -> Array:
        return jnp.einsum("bkngch,bkndh->bkngcd", query, key, preferred_element_type=pairs.dtype) * pairs

    return scores


def _halved(levels: list[tuple[Array, Array]]) -> Callable[[Array, Array], Array]:
    """Scores whose weight differs by channel, one matrix product for each level of halving."""

    def scores(query: Array, key: Array) -> Array:
        accumulator = levels[0][0].dtype if levels else query.dtype
        width = key.shape[-1]
        out = jnp.einsum("bkngch,bknch->bkngc", query, key, preferred_element_type=accumulator)[..., None, None]
        for second, first in levels:
            half = second.shape[-2]
            dtype = query.dtype if half >= SUB_CHUNK else accumulator
            late = query.reshape(*query.shape[:-2], -1, 2, half, width)[..., 1, :, :] * second[:, :, :, None]
            early = key.reshape(*key.shape[:-2], -1, 2, half, width)[..., 0, :, :] * first
            below = jnp.einsum(
                "bkngmrh,bknmjh->bkngmrj",
                late.astype(dtype),
                early.astype(dtype),
                preferred_element_type=accumulator,
            )
            out = join(out, below, 0.0)
        return out[..., 0, :, :]

    return scores
