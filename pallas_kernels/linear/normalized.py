"""The additive recurrence on TPU with outputs that are divided by the sum of their weights.

    z_t = exp(g_t) z_{t-1} + k_t          o_t = scale S_t^T q_t / (scale q_t . (z_t + eps[1]) + eps[0])

Elsewhere a channel of ones beside the values does the same, for one tile of lanes more of values and of outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.derivatives import noted, once, was_noted, zeros_for_symbols
from pallas_kernels.entry import Platform, alike
from pallas_kernels.linear import additive, additive_tpu, gates, tiling
from pallas_kernels.linear.call import Call, flat, gate_arrays, given_gates
from pallas_kernels.linear.tiling import Tiling
from pallas_kernels.linear.walk import Problem

Eps = tuple[float, float]


def normalized_linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    log_decay: Float[Array, " K"] | Float[Array, "B T K"],
    segment_ids: Int[Array, "B T"] | None,
    state: Float[Array, "B K H V"],
    z: Float[Array, "B K H"],
    *,
    scale: float,
    eps: Eps,
    platform: Platform,
    blocks: Tiling | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B K H V"], Float[Array, "B K H"]]:
    """As `additive.linear_attention` on TPU, and z after the last token.

    Args:
      z: sum of keys before the first token, float32.
      eps: added to the divisor and to every component of z. An output whose divisor is 0 is 0.

    Raises:
      NotImplementedError: what the kernel does not do, with the reason.
    """
    additive.check(query, key, value, log_decay, platform=platform, blocks=blocks)
    batch, length, queries, width = query.shape
    heads = key.shape[2]
    cut = blocks or tiling.choose(batch, length, heads, queries // heads, width, value.shape[-1], query.dtype)
    per_token = (batch, length, heads)
    log_decay = given_gates(log_decay, segment_ids, per_token=per_token, step=cut.forward.tokens)
    call = Call(scale, query.dtype, platform, cut)
    return attend(call, eps, *alike(query, key, value, log_decay, state, z))


def _problem(call: Call, eps: Eps, *operands: Array) -> Problem:
    return dataclasses.replace(additive.problem(call, *operands), eps=eps)


def _by_group(p: Problem, z: Array) -> Array:
    return z.reshape(p.batch, -1, p.tiling.heads, p.width)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(call: Call, eps: Eps, keep: bool, *operands: Array) -> Any:
    query, key, value, log_decay, state, z = operands
    p = _problem(call, eps, query, key, value, log_decay)
    arrays = (gate_arrays(p, log_decay), state, _by_group(p, z))
    (out, end, z_end, divisors), starts = additive_tpu.forward(
        p, flat(query), flat(key), flat(value), *arrays, keep=keep, out_dtype=call.out_dtype
    )
    return (out.reshape(*query.shape[:3], -1), end, z_end.reshape(z.shape)), divisors, starts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    call: Call, eps: Eps, query: Array, key: Array, value: Array, log_decay: Array, state: Array, z: Array
) -> tuple[Array, Array, Array]:
    return _run(call, eps, False, query, key, value, log_decay, state, z)[0]


def attend_forward(call: Call, eps: Eps, *operands: Any) -> Any:
    query, key, value, log_decay, state, z = (x.value for x in operands)
    run = functools.partial(_run, call, eps, True)
    results, divisors, starts = once(run, query, key, value, log_decay, state, z)
    return results, (query, key, value, log_decay, results[0], divisors, starts, noted(operands[3].perturbed))


def attend_backward(call: Call, eps: Eps, residuals: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    return once(functools.partial(_gradients, call, eps), residuals, *zeros_for_symbols(cotangents))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(
    call: Call, eps: Eps, residuals: Any, out_gradient: Array, end_gradient: Array, z_gradient: Array
) -> tuple[Any, ...]:
    query, key, value, log_decay, out, divisors, (starts, z_starts), with_gates = residuals
    p = _problem(call, eps, query, key, value, log_decay)
    # After the last token the kernel divided by anything.
    is_used = (divisors != 0) & (jnp.arange(p.padded) < p.length)
    inverses = jnp.where(is_used, 1 / jnp.where(is_used, divisors, 1), 0)
    products = jnp.moveaxis(jnp.sum(out_gradient.astype(jnp.float32) * out, axis=-1), 1, 2)
    products = jnp.pad(products, ((0, 0), (0, 0), (0, p.padded - p.length))).reshape(divisors.shape)
    divided = additive_tpu.Divided(inverses, -products * inverses, z_starts, _by_group(p, z_gradient))
    gradients, sums = additive_tpu.backward(
        p,
        flat(query),
        flat(key),
        flat(value),
        gate_arrays(p, log_decay),
        starts,
        flat(out_gradient).astype(query.dtype),
        end_gradient,
        divided,
        with_gates=was_noted(with_gates),
    )
    dgates = jnp.zeros_like(log_decay)
    if sums is not None:
        dgates = gates.of_sums(sums, log_decay, key.shape[1], call.tiling.chunk)
    dq, dk, dv, dstate, dz = gradients
    dz = dz.reshape(z_gradient.shape)
    return dq.reshape(query.shape), dk.reshape(key.shape), dv.reshape(value.shape), dgates, dstate, dz


attend.defvjp(attend_forward, attend_backward, symbolic_zeros=True)
