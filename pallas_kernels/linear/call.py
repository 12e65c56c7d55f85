"""What the entries of the linear kernels share: the fixed part of a call, and the arrays that kernels read."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.entry import Platform
from pallas_kernels.linear import gates
from pallas_kernels.linear.tiling import Tiling
from pallas_kernels.linear.walk import Problem


class Call(NamedTuple):
    """What is fixed while tracing."""

    scale: float
    out_dtype: Any
    platform: Platform
    tiling: Any  # a `Tiling`, or on GPU its `Blocks`


def given_gates(
    log_decay: Array,
    segment_ids: Int[Array, "B T"] | None,
    *,
    per_token: tuple[int, int, int] | None = None,
    step: int = 1,
) -> Array:
    """Gates with segments put into them: one for each head, or one for each token and head.

    Args:
      per_token: the shape of the latter.
      step: tokens of a grid step. Tables of constant gates know nothing of where the tokens end.
    """
    if segment_ids is not None:
        return gates.separate(log_decay, segment_ids)
    if per_token is not None and log_decay.ndim == 1 and per_token[1] % step:
        return jnp.broadcast_to(log_decay, per_token)
    return log_decay


def channel_gates(
    log_decay: Array, segment_ids: Int[Array, "B T"] | None, tiling: Tiling
) -> tuple[Array, tuple[Array, ...]]:
    """Gates, and `gates.borders` if there are segments: where one begins decay can then still be moderate."""
    if segment_ids is None:
        return log_decay, ()
    tokens, length = tiling.forward.tokens, log_decay.shape[1]
    borders = gates.borders(segment_ids, tiling.chunk, -(-length // tokens) * tokens)
    return jnp.where(gates.starts(segment_ids)[..., None, None], 0, log_decay), (borders,)


def gate_arrays(p: Problem, log_decay: Array) -> tuple[Array, ...]:
    """The weights of constant gates, or the sums of others."""
    if p.constant:
        return gates.tables(log_decay, p.tiling.chunk, max(p.width, p.value_width))
    return (gates.sums(log_decay, p.tiling.chunk, p.padded, p.tiling.heads, p.dtype),)


def flat(x: Array) -> Array:
    """Heads side by side along the lanes."""
    return x.reshape(*x.shape[:2], -1)
