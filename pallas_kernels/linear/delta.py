"""The delta rule with decay as fused kernels, differentiable in every argument.

    S~_t = diag(exp g_t) S_{t-1}      S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T      o_t = scale S_t^T q_t

    out, state = delta_rule(query, key, value, beta, log_decay, segment_ids, state, scale=1.0, platform="tpu")

What is kept for the backward pass is the arguments and, on TPU, one state for every few hundred tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.derivatives import noted, once, was_noted, zeros_for_symbols
from pallas_kernels.entry import GPU, Platform, alike
from pallas_kernels.linear import channel_delta_gpu, channel_delta_tpu, delta_gpu, delta_tpu, gates, programs, tiling
from pallas_kernels.linear.call import Call, channel_gates, flat, gate_arrays, given_gates
from pallas_kernels.linear.programs import Blocks
from pallas_kernels.linear.tiling import Tiling
from pallas_kernels.linear.walk import Problem


def delta_rule(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T Kv V"],
    beta: Float[Array, "B T Kv"],
    log_decay: Float[Array, " Kv"] | Float[Array, "B T Kv"] | Float[Array, "B T Kv H"],
    segment_ids: Int[Array, "B T"] | None,
    state: Float[Array, "B Kv H V"],
    *,
    scale: float,
    platform: Platform,
    out_dtype: Any = None,
    blocks: Tiling | Blocks | None = None,
) -> tuple[Float[Array, "B T O V"], Float[Array, "B Kv H V"]]:
    """Outputs, O the larger of N and Kv, and the state after the last token.

    Args:
      query, key, value: bfloat16 or float32; query head n reads state `n // (N // Kv)`, or states are more than the
        query and key heads, and state h has head `h // (Kv // K)`.
      beta: float32.
      log_decay: float32, at most 0; one for each state, for each token and state, or for each channel of those.
      segment_ids: sequences packed one after another; the state before the first token belongs to the first of them.
      state: float32.
      platform: "tpu" or "gpu"; "interpret" and "interpret_gpu" run their kernels step by step anywhere.
      out_dtype: of the outputs; the query's by default.
      blocks: how the work is cut up; `None` chooses.

    Raises:
      NotImplementedError: what the kernel does not do, with the reason.
    """
    check(query, key, value, log_decay, platform=platform, blocks=blocks)
    batch, length, heads, width = query.shape
    states, value_width = value.shape[2:]
    cut: Any = blocks
    borders: tuple[Array, ...] = ()
    if platform in GPU:
        cut = blocks or _gpu_kernels(log_decay).choose(query.dtype)
        per_token = log_decay if log_decay.ndim == 4 else jnp.broadcast_to(log_decay, beta.shape)
        log_decay = given_gates(per_token, segment_ids)
    else:
        shared = states // key.shape[2]
        sizes = (batch, length, states, max(heads // states, 1), width, value_width, query.dtype)
        cut = blocks or tiling.choose(*sizes, shared=shared, of_channels=log_decay.ndim == 4)
        if log_decay.ndim == 4:
            log_decay, borders = channel_gates(log_decay, segment_ids, cut)
        else:
            log_decay = given_gates(log_decay, segment_ids, per_token=(batch, length, states), step=cut.forward.tokens)
    call = Call(scale, out_dtype or query.dtype, platform, cut)
    return attend(call, *alike(query, key, value, beta, log_decay, state, *borders))


def check(query: Any, key: Any, value: Any, log_decay: Any, *, platform: Platform = "tpu", blocks: Any = None) -> None:
    """Raises `NotImplementedError` with the reason where the kernel does not do a call."""
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the kernel multiplies bfloat16 and float32, not {query.dtype}")
    if query.shape[2] != key.shape[2] != value.shape[2]:
        raise NotImplementedError("the kernel shares a state among queries or a key among states, not both")
    if platform in GPU:
        programs.check(query.shape[-1], value.shape[-1], query.dtype)
    else:
        tiling.check(query.shape[-1], value.shape[-1], query.dtype, blocks)


def _problem(call: Call, query: Array, key: Array, value: Array, log_decay: Array) -> Problem:
    batch, length, heads, width = query.shape
    states, value_width = value.shape[2:]
    return Problem(
        batch=batch,
        length=length,
        heads=states,
        group=max(heads // states, 1),
        width=width,
        value_width=value_width,
        constant=log_decay.ndim == 1,
        scale=call.scale,
        dtype=query.dtype,
        tiling=call.tiling,
        interpret=call.platform == "interpret",
        shared=states // key.shape[2],
    )


def _gpu_problem(call: Call, query: Array, key: Array, value: Array) -> programs.Problem:
    batch, length, heads, width = query.shape
    states, value_width = value.shape[2:]
    return programs.Problem(
        batch=batch,
        length=length,
        heads=states,
        group=max(heads // states, 1),
        width=width,
        value_width=value_width,
        scale=call.scale,
        dtype=query.dtype,
        blocks=call.tiling,
        interpret=call.platform == "interpret_gpu",
        shared=states // key.shape[2],
    )


def _beta_array(beta: Array, padded: int) -> Array:
    """[B, K, padded], with nothing written after the last token."""
    longer = jnp.pad(beta.astype(jnp.float32), ((0, 0), (0, padded - beta.shape[1]), (0, 0)))
    return jnp.moveaxis(longer, 1, 2)


def _tpu_beta(p: Problem, beta: Array) -> Array:
    """[B, groups, heads, padded]."""
    return _beta_array(beta, p.padded).reshape(p.batch, -1, p.tiling.heads, p.padded)


def _gpu_kernels(log_decay: Array) -> Any:
    return channel_delta_gpu if log_decay.ndim == 4 else delta_gpu


def _gpu_rows(p: programs.Problem, beta: Array, log_decay: Array) -> tuple[Array, Array]:
    """The sums of gates, or gates of channels as they are, and beta."""
    sums = log_decay if log_decay.ndim == 4 else gates.sums(log_decay, p.blocks.chunk, p.padded, 1, p.dtype)
    return sums, _beta_array(beta, p.padded)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(call: Call, keep: bool, *operands: Array) -> Any:
    query, key, value, beta, log_decay, state, *borders = operands
    if call.platform in GPU:
        gpu = _gpu_problem(call, query, key, value)
        rows = _gpu_rows(gpu, beta, log_decay)
        options: dict[str, Any] = {"out_dtype": call.out_dtype}
        return _gpu_kernels(log_decay).forward(gpu, query, key, value, *rows, state, **options), state
    p = _problem(call, query, key, value, log_decay)
    heads = (flat(query), flat(key), flat(value))
    options = {"keep": keep, "out_dtype": call.out_dtype}
    betas = _tpu_beta(p, beta)
    if log_decay.ndim == 4:
        gate = (flat(log_decay), *borders)
        out, end, starts = channel_delta_tpu.forward(p, *heads, gate, betas, state, **options)
    else:
        out, end, starts = delta_tpu.forward(p, *heads, gate_arrays(p, log_decay), betas, state, **options)
    return (out.reshape(*query.shape[:2], -1, value.shape[-1]), end), starts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    call: Call,
    query: Array,
    key: Array,
    value: Array,
    beta: Array,
    log_decay: Array,
    state: Array,
    *borders: Array,
) -> tuple[Array, Array]:
    """`borders`: of `gates.borders`, at most one."""
    return _run(call, False, query, key, value, beta, log_decay, state, *borders)[0]


def attend_forward(call: Call, *operands: Any) -> Any:
    query, key, value, beta, log_decay, state, *borders = (x.value for x in operands)
    out, starts = once(functools.partial(_run, call, True), query, key, value, beta, log_decay, state, *borders)
    return out, (query, key, value, beta, log_decay, starts, *borders, noted(operands[4].perturbed))


def attend_backward(call: Call, residuals: Any, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    borders = residuals[6:-1]
    found = once(functools.partial(_gradients, call), residuals, *zeros_for_symbols(cotangents))
    return *found, *[None] * len(borders)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(call: Call, residuals: Any, out_gradient: Array, end_gradient: Array) -> tuple[Any, ...]:
    query, key, value, beta, log_decay, starts, *borders, with_gates = residuals
    out_gradient = out_gradient.astype(query.dtype)
    if call.platform in GPU:
        gpu = _gpu_problem(call, query, key, value)
        rows_and_ends = (*_gpu_rows(gpu, beta, log_decay), starts, out_gradient, end_gradient)
        dq, dk, dv, dstate, sums, dbeta = _gpu_kernels(log_decay).backward(gpu, query, key, value, *rows_and_ends)
    else:
        p = _problem(call, query, key, value, log_decay)
        heads, ends = (flat(query), flat(key), flat(value)), (starts, flat(out_gradient), end_gradient)
        betas = _tpu_beta(p, beta)
        if log_decay.ndim == 4:
            gate = (flat(log_decay), *borders)
            dq, dk, dv, dstate, sums, dbeta = channel_delta_tpu.backward(p, *heads, gate, betas, *ends)
        else:
            dq, dk, dv, dstate, sums, dbeta = delta_tpu.backward(
                p, *heads, gate_arrays(p, log_decay), betas, *ends, with_gates=was_noted(with_gates)
            )
    dgates = jnp.zeros_like(log_decay)
    if log_decay.ndim == 4 and call.platform in GPU:
        dgates = sums  # already those of the gates
    elif log_decay.ndim == 4:
        dgates = gates.of_channel_sums(sums.reshape(log_decay.shape), log_decay, call.tiling.chunk)
    elif was_noted(with_gates):
        dgates = gates.of_sums(sums, log_decay, beta.shape[1], call.tiling.chunk)
    dbeta = jnp.moveaxis(dbeta[..., : beta.shape[1]], 1, 2).astype(beta.dtype)
    return dq.reshape(query.shape), dk.reshape(key.shape), dv.reshape(value.shape), dbeta, dgates, dstate


attend.defvjp(attend_forward, attend_backward, symbolic_zeros=True)
