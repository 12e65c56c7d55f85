"""Causal linear attention with decay as fused kernels, differentiable in every argument.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T          o_t = scale S_t^T q_t

    out, state = linear_attention(query, key, value, log_decay, segment_ids, state, scale=1.0, platform="tpu")

What is kept for the backward pass is the arguments and one state for every few hundred tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.derivatives import noted, once, was_noted, zeros_for_symbols
from pallas_kernels.entry import GPU, Platform, alike
from pallas_kernels.linear import additive_gpu, additive_tpu, channel_gpu, channel_tpu, gates, programs, tiling
from pallas_kernels.linear.call import Call, channel_gates, flat, gate_arrays, given_gates
from pallas_kernels.linear.programs import Blocks
from pallas_kernels.linear.tiling import Tiling
from pallas_kernels.linear.walk import Problem


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    log_decay: Float[Array, " K"] | Float[Array, "B T K"] | Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    state: Float[Array, "B K H V"],
    *,
    scale: float,
    platform: Platform,
    out_dtype: Any = None,
    blocks: Tiling | Blocks | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B K H V"]]:
    """Outputs and the state after the last token.

    Args:
      query, key, value: bfloat16 or float32; query head n reads key head `n // (N // K)`.
      log_decay: float32, at most 0; one for each head, for each token and head, or for each channel of those.
      segment_ids: sequences packed one after another; the state before the first token belongs to the first of them.
      state: float32.
      platform: "tpu" or "gpu"; "interpret" and "interpret_gpu" run their kernels step by step anywhere.
      out_dtype: of the outputs; the query's by default.
      blocks: how the work is cut up; `None` chooses.

    Raises:
      NotImplementedError: what the kernel does not do, with the reason.
    """
    check(query, key, value, log_decay, platform=platform, blocks=blocks)
    batch, length, _, width = query.shape
    heads, value_width = key.shape[2], value.shape[-1]
    per_token = (batch, length, heads)
    cut: Any = blocks
    borders: tuple[Array, ...] = ()
    if platform in GPU:
        if log_decay.ndim == 4:
            cut = blocks or channel_gpu.choose(query.dtype)
        else:
            cut = blocks or programs.choose(query.dtype)
            log_decay = jnp.broadcast_to(log_decay, per_token)
        log_decay = given_gates(log_decay, segment_ids)
    else:
        sizes = (batch, length, heads, query.shape[2] // heads, width, value_width, query.dtype)
        cut = blocks or tiling.choose(*sizes, of_channels=log_decay.ndim == 4)
        if log_decay.ndim == 4:
            log_decay, borders = channel_gates(log_decay, segment_ids, cut)
        else:
            log_decay = given_gates(log_decay, segment_ids, per_token=per_token, step=cut.forward.tokens)
    call = Call(scale, out_dtype or query.dtype, platform, cut)
    return attend(call, *alike(query, key, value, log_decay, state, *borders))


def check(query: Any, key: Any, value: Any, log_decay: Any, *, platform: Platform = "tpu", blocks: Any = None) -> None:
    """Raises `NotImplementedError` with the reason where the kernel does not do a call."""
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the kernel multiplies bfloat16 and float32, not {query.dtype}")
    if platform in GPU:
        programs.check(query.shape[-1], value.shape[-1], query.dtype)
    else:
        tiling.check(query.shape[-1], value.shape[-1], query.dtype, blocks)


def _gpu_problem(call: Call, query: Array, key: Array, value: Array) -> programs.Problem:
    batch, length, heads, width = query.shape
    return programs.Problem(
        batch=batch,
        length=length,
        heads=key.shape[2],
        group=heads // key.shape[2],
        width=width,
        value_width=value.shape[-1],
        scale=call.scale,
        dtype=query.dtype,
        blocks=call.tiling,
        interpret=call.platform == "interpret_gpu",
    )


def _gpu_sums(p: programs.Problem, log_decay: Array) -> Array:
    return gates.sums(log_decay, p.blocks.chunk, p.padded, 1, p.dtype)


def problem(call: Call, query: Array, key: Array, value: Array, log_decay: Array) -> Problem:
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    return Problem(
        batch=batch,
        length=length,
        heads=kv_heads,
        group=heads // kv_heads,
        width=width,
        value_width=value.shape[-1],
        constant=log_decay.ndim == 1,
        scale=call.scale,
        dtype=query.dtype,
        tiling=call.tiling,
        interpret=call.platform == "interpret",
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    call: Call, keep: bool, query: Array, key: Array, value: Array, log_decay: Array, state: Array, *borders: Array
) -> Any:
    if call.platform in GPU:
        gpu = _gpu_problem(call, query, key, value)
        if log_decay.ndim == 4:
            return channel_gpu.forward(gpu, query, key, value, log_decay, state, out_dtype=call.out_dtype), state
        sums = _gpu_sums(gpu, log_decay)
        return additive_gpu.forward(gpu, query, key, value, sums, state, out_dtype=call.out_dtype), state
    p = problem(call, query, key, value, log_decay)
    options: dict[str, Any] = {"keep": keep, "out_dtype": call.out_dtype}
    heads = (flat(query), flat(key), flat(value))
    if log_decay.ndim == 4:
        out, end, starts = channel_tpu.forward(p, *heads, (flat(log_decay), *borders), state, **options)
    else:
        (out, end), kept = additive_tpu.forward(p, *heads, gate_arrays(p, log_decay), state, **options)
        starts = kept[0] if keep else None
    return (out.reshape(*query.shape[:3], -1), end), starts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    call: Call, query: Array, key: Array, value: Array, log_decay: Array, state: Array, *borders: Array
) -> tuple[Array, Array]:
    """`borders`: of `gates.borders`, at most one."""
    return _run(call, False, query, key, value, log_decay, state, *borders)[0]


def attend_forward(call: Call, *operands: Any) -> Any:
    query, key, value, log_decay, state, *borders = (x.value for x in operands)
    out, starts = once(functools.partial(_run, call, True), query, key, value, log_decay, state, *borders)
    # The gradient of the gates costs about a tenth of the backward pass, and slopes of Lightning Attention want none.
    return out, (query, key, value, log_decay, starts, *borders, noted(operands[3].perturbed))


def attend_backward(call: Call, residuals: Any, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    borders = residuals[5:-1]
    found = once(functools.partial(_gradients, call), residuals, *zeros_for_symbols(cotangents))
    return *found, *[None] * len(borders)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(call: Call, residuals: Any, out_gradient: Array, end_gradient: Array) -> tuple[Any, ...]:
    query, key, value, log_decay, starts, *borders, with_gates = residuals
    out_gradient = out_gradient.astype(query.dtype)
    sums: Array | None
    if call.platform in GPU:
        gpu = _gpu_problem(call, query, key, value)
        if log_decay.ndim == 4:
            return channel_gpu.backward(gpu, query, key, value, log_decay, starts, out_gradient, end_gradient)
        gates_and_ends = (_gpu_sums(gpu, log_decay), starts, out_gradient, end_gradient)
        dq, dk, dv, dstate, sums = additive_gpu.backward(gpu, query, key, value, *gates_and_ends)
    elif log_decay.ndim == 4:
        p = problem(call, query, key, value, log_decay)
        heads, ends = (flat(query), flat(key), flat(value)), (starts, flat(out_gradient), end_gradient)
        dq, dk, dv, dstate, db = channel_tpu.backward(p, *heads, (flat(log_decay), *borders), *ends)
        dgates = gates.of_channel_sums(db.reshape(log_decay.shape), log_decay, p.tiling.chunk)
        return dq.reshape(query.shape), dk.reshape(key.shape), dv.reshape(value.shape), dgates, dstate
    else:
        p = problem(call, query, key, value, log_decay)
        (dq, dk, dv, dstate), sums = additive_tpu.backward(
            p,
            flat(query),
            flat(key),
            flat(value),
            gate_arrays(p, log_decay),
            starts,
            flat(out_gradient),
            end_gradient,
            with_gates=was_noted(with_gates),
        )
    if sums is None or not was_noted(with_gates):
        dgates = jnp.zeros_like(log_decay)
    else:
        dgates = gates.of_sums(sums, log_decay, key.shape[1], call.tiling.chunk)
    return dq.reshape(query.shape), dk.reshape(key.shape), dv.reshape(value.shape), dgates, dstate


attend.defvjp(attend_forward, attend_backward, symbolic_zeros=True)
