"""Tokens of the neighbours along a mesh axis, for ops whose queries see no further than a window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array


def neighbours(count: int, axis: str, *arrays: Array) -> list[Array]:
    """The last `count` tokens before this device's piece, or the first `-count` after it; zeros beyond the ends.

    Called inside of a `shard_map` over `axis`, which splits dimension 1 of the arrays into pieces of one length.
    """
    devices = jax.lax.axis_size(axis)
    length = arrays[0].shape[1]
    step = 1 if count >= 0 else -1
    pieces: list[list[Array]] = [[] for _ in arrays]
    for hop in range(1, -(-abs(count) // length) + 1):
        pairs = [(i, i + step * hop) for i in range(devices) if 0 <= i + step * hop < devices]
        needed = min(length, abs(count) - (hop - 1) * length)
        for piece, x in zip(pieces, arrays, strict=True):
            part = x[:, length - needed :] if step > 0 else x[:, :needed]
            piece.append(jax.lax.ppermute(part, axis, pairs))
    return [
        jnp.concatenate(piece[::-step], axis=1) if piece else x[:, :0] for piece, x in zip(pieces, arrays, strict=True)
    ]
