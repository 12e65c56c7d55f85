"""Calls whose schedules `python -m pallas_kernels.lab report --family linear` reads."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.derivatives import noted
from pallas_kernels.lab import Case
from pallas_kernels.lab.chips import CHIPS
from pallas_kernels.linear import (
    Call,
    additive,
    channel_delta_gpu,
    channel_gpu,
    delta,
    delta_gpu,
    normalized,
    programs,
)
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
    for name, of in {"delta": "scalar", "channel-delta": "channel"}.items():
        found |= _pair(target, name, delta, gates[of])
    for name, entry in {"channel": additive, "channel-delta": delta}.items():
        found |= _pair(target, f"{name}-packed", entry, gates["channel"], packed=True)
    return found | _normalized(target)


def _normalized(target: str) -> dict[str, Case]:
    """Without decay, as Hedgehog and other feature maps use it."""
    blocks = choose(BATCH, LENGTH, HEADS, 1, WIDTH, WIDTH, jnp.bfloat16, cores=CHIPS[target].cores)
    call, eps, f32 = Call(1.0, jnp.bfloat16, "tpu", blocks), (1e-6, 0.0), jnp.float32
    token = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH), jnp.bfloat16)
    gates = jax.ShapeDtypeStruct((HEADS,), f32)
    state, z = (jax.ShapeDtypeStruct((BATCH, HEADS, *sizes), f32) for sizes in ((WIDTH, WIDTH), (WIDTH,)))
    divisors = jax.ShapeDtypeStruct((BATCH, HEADS // blocks.heads, blocks.heads, LENGTH), f32)
    steps = (BATCH, LENGTH // blocks.tokens)
    starts = jax.ShapeDtypeStruct((*steps, HEADS, WIDTH, WIDTH), f32)
    z_starts = jax.ShapeDtypeStruct((*steps, HEADS // blocks.heads, blocks.heads, WIDTH), f32)
    residuals = (token, token, token, gates, token, divisors, (starts, z_starts))
    once = token.size * token.dtype.itemsize

    def backward(residuals: Any, cotangents: Any) -> Any:
        return normalized.attend_backward(call, eps, (*residuals, noted(False)), cotangents)

    forward = functools.partial(normalized.attend, call, eps)
    return {
        "normalized-forward": Case(forward, (token, token, token, gates, state, z), 4 * once),
        "normalized-backward": Case(backward, (residuals, (token, state, z)), 7 * once),
    }


def _pair(target: str, name: str, entry: Any, gates: tuple[int, ...], *, packed: bool = False) -> dict[str, Case]:
    cut: Any = {"of_channels": len(gates) == 4, "cores": CHIPS[target].cores}
    blocks = choose(BATCH, LENGTH, HEADS, 1, WIDTH, WIDTH, jnp.bfloat16, **cut)
    call = Call(1.0, jnp.bfloat16, "tpu", blocks)
    token = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((BATCH, HEADS, WIDTH, WIDTH), jnp.float32)
    starts = jax.ShapeDtypeStruct((BATCH, LENGTH // blocks.tokens, *state.shape[1:]), jnp.float32)
    operands = [token, token, token]
    if entry is delta:
        operands.append(jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS), jnp.float32))
    operands.append(jax.ShapeDtypeStruct(gates, jnp.float32))
    borders = [jax.ShapeDtypeStruct((BATCH, LENGTH // blocks.chunk, 1, blocks.chunk), jnp.float32)] * packed

    def backward(cotangents: Any, *residuals: Any) -> Any:
        # The slopes of a Lightning layer are not trained, gates of tokens are.
        return entry.attend_backward(call, (*residuals, noted(len(gates) > 1)), cotangents)

    once = token.size * token.dtype.itemsize
    return {
        f"{name}-forward": Case(functools.partial(entry.attend, call), (*operands, state, *borders), 4 * once),
        f"{name}-backward": Case(backward, ((token, state), *operands, starts, *borders), 7 * once),
    }


def _gpu() -> dict[str, Case]:
    """A size with which flash-linear-attention is measured, and one with masks on every side, in float32."""
    found: dict[str, Case] = {}
    sizes = {
        "scalar": (GPU_BATCH, LENGTH, GPU_HEADS, GPU_HEADS, WIDTH, WIDTH, jnp.bfloat16),
        "ragged": (2, 1000, 4, 2, 80, 48, jnp.float32),
    }
    for name in ("channel", "delta", "channel-delta"):
        sizes |= {name: sizes["scalar"], f"{name}-ragged": sizes["ragged"]}
    cuts: dict[tuple[bool, bool], Any] = {
        (False, False): programs,
        (True, False): channel_gpu,
        (False, True): delta_gpu,
        (True, True): channel_delta_gpu,
    }
    for name, (batch, length, heads, kv_heads, width, value_width, dtype) in sizes.items():
        of_channels, is_delta = "channel" in name, "delta" in name
        entry: Any = delta if is_delta else additive
        call = Call(1.0, dtype, "gpu", cuts[of_channels, is_delta].choose(dtype))
        query = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
        out = jax.ShapeDtypeStruct((batch, length, heads, value_width), dtype)
        key = jax.ShapeDtypeStruct((batch, length, kv_heads, width), dtype)
        value = jax.ShapeDtypeStruct((batch, length, kv_heads, value_width), dtype)
        gates = jax.ShapeDtypeStruct((batch, length, kv_heads, *[width] * of_channels), jnp.float32)
        betas = [jax.ShapeDtypeStruct((batch, length, kv_heads), jnp.float32)] * is_delta
        state = jax.ShapeDtypeStruct((batch, kv_heads, width, value_width), jnp.float32)

        def backward(cotangents: Any, *residuals: Any, call: Call = call, entry: Any = entry) -> Any:
            return entry.attend_backward(call, (*residuals, noted(True)), cotangents)

        once, twice = (x.size * x.dtype.itemsize for x in (key, query))
        values, outs = (x.size * x.dtype.itemsize for x in (value, out))
        operands = (query, key, value, *betas, gates, state)
        found[f"{name}-forward"] = Case(functools.partial(entry.attend, call), operands, once + twice + values + outs)
        found[f"{name}-backward"] = Case(backward, ((out, state), *operands), 2 * (once + twice + values) + outs)
    return found
