"""Calls whose schedules `python -m pallas_kernels.lab report --family linear` reads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import linear
from pallas_kernels.lab import Case
from pallas_kernels.lab.chips import CHIPS
from pallas_kernels.linear.tiling import choose

BATCH, LENGTH, HEADS, WIDTH = 1, 8192, 8, 128


def cases(target: str) -> dict[str, Case]:
    """Forward and backward, for gates of each head and of each token; the roofline reads and writes each array once."""
    if target == "h100":
        return {}
    blocks = choose(BATCH, LENGTH, HEADS, 1, WIDTH, WIDTH, jnp.bfloat16, cores=CHIPS[target].cores)
    call = linear.Call(1.0, jnp.bfloat16, "tpu", blocks)
    token = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((BATCH, HEADS, WIDTH, WIDTH), jnp.float32)
    starts = jax.ShapeDtypeStruct((BATCH, LENGTH // blocks.tokens, *state.shape[1:]), jnp.float32)
    once = token.size * token.dtype.itemsize
    found = {}
    for name, shape in (("constant", (HEADS,)), ("scalar", (BATCH, LENGTH, HEADS))):
        gate = jax.ShapeDtypeStruct(shape, jnp.float32)
        # The slopes of a Lightning layer are not trained, gates of tokens are.
        trained = () if name == "scalar" else None

        def forward(*operands: Any) -> Any:
            return linear.additive.attend(call, *operands)

        def backward(q: Any, k: Any, v: Any, g: Any, starts: Any, *cotangents: Any, trained: Any = trained) -> Any:
            return linear.additive.attend_backward(call, (q, k, v, g, starts, trained), cotangents)

        found[f"{name}-forward"] = Case(forward, (token, token, token, gate, state), 4 * once)
        found[f"{name}-backward"] = Case(backward, (token, token, token, gate, starts, token, state), 7 * once)
    return found
