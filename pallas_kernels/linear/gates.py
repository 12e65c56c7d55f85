"""Gates of a chunk as the kernels read them.

With b_r = g_1 + ... + g_r inside a chunk of C rows, a kernel needs exp(b_r - b_j) for j <= r, exp(b_r) and exp(b_C -
b_j). Sums in float32 lose what a small gate adds behind large ones: after 64 gates of -20 the spacing of numbers is
1e-4, which is nothing beside bfloat16 operands and too much beside float32. There every gate is cut into a multiple of
1/64, whose sums are exact, and a rest below 1/128, whose sums are small; differences are taken part by part.

Gates below `FORGET` count as `FORGET`: exp(-128) is 0 in float32, so nothing changes, and a chunk of 256 of them still
sums exactly. The same number, put where a packed sequence starts, keeps sequences apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FORGET = -128.0
MODERATE = 64.0
"""What a channel may lose in half a chunk: exp(-64) is 1.6e-28, which leaves ten decades on both sides for numbers."""
STEP = 1 / 64


def separate(
    log_decay: Float[Array, " K"] | Float[Array, "B T K"] | Float[Array, "B T K H"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T K"] | Float[Array, "B T K H"]:
    """Gates that forget everything at the first token of every segment but the first one."""
    first = starts(segment_ids)
    per_token = log_decay if log_decay.ndim > 1 else log_decay[None, None]
    return jnp.where(first.reshape(*first.shape, *(1,) * (per_token.ndim - 2)), FORGET, per_token)


def starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where a segment begins, but the sequence's first."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def borders(segment_ids: Int[Array, "B T"], chunk: int, padded: int) -> Float[Array, "B chunks 1 C"]:
    """For every token, how many segments but the sequence's first begin in its chunk, up to this token."""
    batch, length = segment_ids.shape
    first = jnp.pad(starts(segment_ids), ((0, 0), (0, padded - length)))
    return jnp.cumsum(first.reshape(batch, -1, 1, chunk), axis=-1, dtype=jnp.float32)


def parts(dtype: Any) -> int:
    """How many sums stand for b, for operands of `dtype`: one of binary logarithms, or two of natural ones."""
    return 2 if dtype == jnp.float32 else 1


def split(gate: Array, dtype: Any) -> list[Array]:
    """What is summed for each of the parts of b."""
    if parts(dtype) == 1:
        return [gate * math.log2(math.e)]
    coarse = jnp.floor(gate * (1 / STEP) + 0.5) * STEP  # Pallas has no `round` on GPU
    return [coarse, gate - coarse]


def unit(dtype: Any) -> float:
    """What 1 in the logarithms of b is in natural ones."""
    return math.log(2) if parts(dtype) == 1 else 1.0


def exponential(dtype: Any) -> Callable[[Array], Array]:
    """exp of differences of `sums`. Chips have powers of 2, but the factor between logarithms spoils exact sums."""
    return jnp.exp if parts(dtype) == 2 else jnp.exp2


def sums(
    log_decay: Float[Array, "B T K"], chunk: int, padded: int, together: int, dtype: Any
) -> Float[Array, "B groups rows padded"]:
    """The parts of b, `together` heads in a group, tokens along the lanes; gates after the last token are 0."""
    batch, length, heads = log_decay.shape
    gate = jnp.pad(jnp.maximum(log_decay, FORGET), ((0, 0), (0, padded - length), (0, 0)))
    gate = jnp.moveaxis(gate, 1, 2).reshape(batch, heads, padded // chunk, chunk)
    return jnp.stack([jnp.cumsum(part, axis=-1) for part in split(gate, dtype)], axis=2).reshape(
        batch, heads // together, -1, padded
    )


def of_sums(
    gradient: Float[Array, "B K padded"], log_decay: Float[Array, " K"] | Float[Array, "B T K"], length: int, chunk: int
) -> Float[Array, " K"] | Float[Array, "B T K"]:
    """The gradient of the gates from that of their sums b_r."""
    batch, heads, padded = gradient.shape
    by_chunk = gradient.reshape(batch, heads, padded // chunk, chunk)
    summed = jax.lax.cumsum(by_chunk, axis=3, reverse=True).reshape(batch, heads, padded)
    per_token = jnp.where(log_decay > FORGET, jnp.moveaxis(summed[..., :length], 1, 2), 0)
    return per_token if log_decay.ndim > 1 else jnp.sum(per_token, axis=(0, 1))


def of_channel_sums(
    gradient: Float[Array, "B T K H"], log_decay: Float[Array, "B T K H"], chunk: int
) -> Float[Array, "B T K H"]:
    """The gradient of the gates of channels from that of their sums b_r."""
    batch, length = gradient.shape[:2]
    padded = jnp.pad(gradient, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
    by_chunk = padded.reshape(batch, -1, chunk, *gradient.shape[2:])
    summed = jax.lax.cumsum(by_chunk, axis=2, reverse=True).reshape(padded.shape)[:, :length]
    return jnp.where(log_decay > FORGET, summed, 0)


def tables(
    log_decay: Float[Array, " K"], chunk: int, width: int
) -> tuple[Float[Array, "K C C"], Float[Array, "K C width"], Float[Array, "K C width"]]:
    """exp((r - j) g) at and below the diagonal, exp(r g) and exp((C - r) g): for gates alike for all tokens."""
    gate = jnp.maximum(log_decay, FORGET)[:, None, None]
    row = jnp.arange(1, chunk + 1, dtype=jnp.float32)[:, None]
    distance = row - row.T
    pair = jnp.where(distance >= 0, jnp.exp(gate * jnp.maximum(distance, 0)), 0)
    wide = (log_decay.shape[0], chunk, width)
    return pair, jnp.broadcast_to(jnp.exp(gate * row), wide), jnp.broadcast_to(jnp.exp(gate * (chunk - row)), wide)
