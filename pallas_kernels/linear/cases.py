"""Calls whose schedules `python -m pallas_kernels.lab report --family linear` reads."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lab import Case
from pallas_kernels.lab.chips import CHIPS
from pallas_kernels.linear import Call, additive, delta, programs
from pallas_kernels.linear.tiling import choose

BATCH, LENGTH, HEADS, WIDTH = 1, 8192, 8, 128
GPU_BATCH, GPU_HEADS = 2, 16


def cases(target: str) -> dict[str, Case]:
    """Forward and backward, for all gates; the roofline reads q, k, v and writes o once, whatever the gates."""
    if target == "h100":
        return _gpu()
    gates = {"constant": (HEADS,), "scalar": (BATCH, LENGTH, HEADS), "channel": (BATCH, LENGTH, HEADS, WIDTH)}
    found: dict[str, Case] = {}
    for name, shape in gates.items():
        found |= _pair(target, name, additive, shape)
    return found | _pair(target, "delta", delta, gates["scalar"])


def _pair(target: str, name: str, entry: Any, gates: tuple[int, ...]) -> dict[str, Case]:
    cores, is_delta = CHIPS[target].cores, entry is delta
    large = is_delta or len(gates) == 4
    blocks = choose(BATCH, LENGTH, HEADS, 1, WIDTH, WIDTH, jnp.bfloat16, large=large, cores=cores)
    call = Call(1.0, jnp.bfloat16, "tpu", blocks)
    token = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((BATCH, HEADS, WIDTH, WIDTH), jnp.float32)
    starts = jax.ShapeDtypeStruct((BATCH, LENGTH // blocks.tokens, *state.shape[1:]), jnp.float32)
    operands = [token, token, token]
    if is_delta:
        operands.append(jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS), jnp.float32))
    operands.append(jax.ShapeDtypeStruct(gates, jnp.float32))
    # The slopes of a Lightning layer are not trained, gates of tokens are.
    trained = () if len(gates) > 1 else None

    def backward(cotangents: Any, *residuals: Any) -> Any:
        return entry.attend_backward(call, (*residuals, trained), cotangents)

    once = token.size * token.dtype.itemsize
    return {
        f"{name}-forward": Case(functools.partial(entry.attend, call), (*operands, state), 4 * once),
        f"{name}-backward": Case(backward, ((token, state), *operands, starts), 7 * once),
    }


def _gpu() -> dict[str, Case]:
    """A size with which flash-linear-attention is measured, and one with masks on every side, in float32."""
    found: dict[str, Case] = {}
    sizes = {
        "scalar": (GPU_BATCH, LENGTH, GPU_HEADS, GPU_HEADS, WIDTH, WIDTH, jnp.bfloat16),
        "ragged": (2, 1000, 4, 2, 80, 48, jnp.float32),
    }
    for name, (batch, length, heads, kv_heads, width, value_width, dtype) in sizes.items():
        call = Call(1.0, dtype, "gpu", programs.choose(dtype))
        query = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
        out = jax.ShapeDtypeStruct((batch, length, heads, value_width), dtype)
        key = jax.ShapeDtypeStruct((batch, length, kv_heads, width), dtype)
        value = jax.ShapeDtypeStruct((batch, length, kv_heads, value_width), dtype)
        gates = jax.ShapeDtypeStruct((batch, length, kv_heads), jnp.float32)
        state = jax.ShapeDtypeStruct((batch, kv_heads, width, value_width), jnp.float32)

        def backward(cotangents: Any, *residuals: Any, call: Call = call) -> Any:
            return additive.attend_backward(call, (*residuals, ()), cotangents)

        once, twice = (x.size * x.dtype.itemsize for x in (key, query))
        values, outs = (x.size * x.dtype.itemsize for x in (value, out))
        operands = (query, key, value, gates, state)
        found[f"{name}-forward"] = Case(
            functools.partial(additive.attend, call), operands, once + twice + values + outs
        )
        found[f"{name}-backward"] = Case(backward, ((out, state), *operands), 2 * (once + twice + values) + outs)
    return found
