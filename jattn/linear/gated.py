"""Named forms with gates: what flash-linear-attention calls simple GLA, the gated delta rule and KDA.

    simple_gla        S_t = exp(g_t) S_{t-1} + k_t v_t^T                       g_t one number per head
    gated_delta_rule  S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T             S~_t = exp(g_t) S_{t-1}, the same
    kda               the same with S~_t = diag(exp g_t) S_{t-1}               g_t one number per key channel

All read o_t = scale * S_t^T q_t with the scale `H ** -0.5`. They are `linear_attention` and `delta_rule`, held to their
one shape of gate.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.dispatch import Choice
from jattn.linear import arguments
from jattn.linear.delta_rule import delta_rule
from jattn.linear.recurrence import LinearState, linear_attention, linear_attention_step


def simple_gla(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    log_decay: Float[Array, "B T K"] | None = None,
    mask: Bool[Array, "B 1 1 T"] | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: Choice = None,
) -> Any:
    """Causal linear attention with one gate per token and head; Mamba-2's recurrence (Dao and Gu 2024, eq. 16).

    For Mamba-2 pass q = C, k = B, v = Delta x, log_decay = Delta A and scale = 1.

    Args:
      log_decay: `[B, T, K]`, at most 0; `None` decays nothing.
      scale: multiplies the query; `None` means `H ** -0.5`.

    The other arguments, the result and the errors are those of `linear_attention`.
    """
    arguments.check_arrays(query=query, key=key)
    sizes = checks.bind_shapes(("query", query, "B T N H"), ("key", key, "B T K H"))
    arguments.check_log_decay(log_decay, sizes, ("B T K",))
    return linear_attention(
        query,
        key,
        value,
        log_decay,
        mask,
        scale=arguments.scale(scale, default=sizes["H"] ** -0.5),
        reverse=reverse,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def simple_gla_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K V"],
    state: LinearState,
    log_decay: Float[Array, "B K"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B N V"], LinearState]:
    """One token of `simple_gla`: the output and the state to pass with the next token."""
    arguments.check_arrays(query=query, key=key)
    sizes = checks.bind_shapes(("query", query, "B N H"), ("key", key, "B K H"))
    arguments.check_log_decay(log_decay, sizes, ("B K",))
    scale = arguments.scale(scale, default=sizes["H"] ** -0.5)
    return linear_attention_step(query, key, value, state, log_decay, scale=scale)


def gated_delta_rule(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T Kv V"],
    beta: Float[Array, "B T Kv"] | None = None,
    log_decay: Float[Array, "B T Kv"] | None = None,
    mask: Bool[Array, "B 1 1 T"] | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: Choice = None,
) -> Any:
    """`delta_rule` with one gate per token and head (Yang et al. 2025, eq. 10); one token is `delta_rule_step`.

    Args:
      beta: how much of a value is written, from 0 to 2; `None` means 1.
      log_decay: `[B, T, Kv]`, natural logarithm, at most 0; `None` decays nothing.
      scale: multiplies the query; `None` means `H ** -0.5`.

    The other arguments, the result and the errors are those of `delta_rule`.
    """
    _check_gate(query, value, log_decay, "B T Kv")
    return delta_rule(
        query,
        key,
        value,
        beta,
        log_decay,
        mask,
        scale=scale,
        reverse=reverse,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def kda(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T Kv V"],
    beta: Float[Array, "B T Kv"] | None = None,
    log_decay: Float[Array, "B T Kv H"] | None = None,
    mask: Bool[Array, "B 1 1 T"] | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: Choice = None,
) -> Any:
    """Kimi delta attention: `delta_rule` with a gate per token and key channel (Kimi Linear 2025, eq. 1).

    One token is `delta_rule_step`.

    Args:
      beta: how much of a value is written, from 0 to 2; `None` means 1.
      log_decay: `[B, T, Kv, H]`, natural logarithm, at most 0; `None` decays nothing. Where no channel falls below
        exp(-64) within 64 tokens the kernels are about twice as fast as beyond.
      scale: multiplies the query; `None` means `H ** -0.5`.

    The other arguments, the result and the errors are those of `delta_rule`.
    """
    _check_gate(query, value, log_decay, "B T Kv H")
    return delta_rule(
        query,
        key,
        value,
        beta,
        log_decay,
        mask,
        scale=scale,
        reverse=reverse,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def _check_gate(query: Any, value: Any, log_decay: Any, layout: str) -> None:
    arguments.check_arrays(query=query, value=value)
    sizes = checks.bind_shapes(("query", query, "B T N H"), ("value", value, "B T Kv V"))
    arguments.check_log_decay(log_decay, sizes, (layout,))
