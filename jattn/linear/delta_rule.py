"""The delta rule: a linear memory that overwrites what it holds under a key instead of adding to it.

    S~_t = diag(exp g_t) S_{t-1}                                  [H, V], key index first
    S_t  = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T                 erase what k_t reads, write v_t
    o_t  = scale * S_t^T q_t

It decays first and then writes. Without gates g_t this is DeltaNet, with one per token and head the gated delta rule,
with one per token and key channel Kimi delta attention (KDA). Where keys have norm 1, beta = 1 replaces the value and
beta = 0 leaves the state alone; up to beta = 2 the state does not grow, and longer keys count as a larger beta.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.dispatch import Choice, Implementation, dispatch
from jattn.linear import arguments, wy
from jattn.linear.arguments import LinearState
from pallas_kernels import linear as kernel


def delta_rule(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T Kv V"],
    beta: Float[Array, "B T Kv"] | None = None,
    log_decay: Float[Array, " Kv"] | Float[Array, "B T Kv"] | Float[Array, "B T Kv H"] | None = None,
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
    """The delta rule, causal (Schlag et al. 2021, eq. 24; gates: Yang et al. 2025, eq. 10; per channel: Kimi Linear).

    There is a state for every value head. Key and value heads may be fewer than the query's (query head n reads state
    `n // (N // Kv)`), or values may be more than keys and queries (state h has key and query head `h // (Kv // K)`).

    Args:
      query, key, value: of one floating dtype. Normalise keys to length 1 (and queries, as the authors' layers do).
      beta: how much of a value is written, from 0 to 2; `None` means 1. The dtype may differ from that of `query`.
      log_decay: natural logarithm, at most 0, of the decay of the state before a token is written: `[Kv]`,
        `[B, T, Kv]` or, per key channel, `[B, T, Kv, H]`. Values below -10000 count as -10000.
      mask: key padding, `[B, 1, 1, T]`, True for a real token. A padded token writes nothing and decays nothing.
      scale: multiplies the query; `None` means `H ** -0.5`.
      reverse: a token sees itself and the tokens after it; equals flipping every argument and the output along time.
      segment_ids: packed sequences, non-decreasing along time; a token sees its own segment only. The initial state
        belongs to the first token's segment, the state returned to the last token's (the other way round in reverse).
      initial_state: `S [B, Kv, H, V]` before the first token, of the accumulator dtype; `z` is `None`.
      return_state: also return the state after the last token.
      chunk_size: tokens per chunk, a power of two; `None` chooses.
      implementation: "pallas_tpu", "pallas_gpu" and "xla" work in chunks, "reference" token by token; see
        `jattn.explain`. The kernels have first derivatives, backward; the others have all.

    Returns:
      `[B, T, max(N, Kv), V]` in the query's dtype, or `(that, LinearState)`.

    Raises:
      TypeError: a wrong dtype or type. ValueError: a wrong shape, option or combination of them, a gate above 0, a beta
      outside of 0 to 2 (while these are traced their values are not known and not checked).
    """
    arguments.check_arrays(query=query, key=key, value=value)
    sizes = checks.bind_shapes(("query", query, "B T N H"), ("key", key, "B T K H"), ("value", value, "B T Kv V"))
    _check_operands(query, key, value, beta, sizes, "B T Kv")
    checks.check_no_empty(sizes, ("B", "T", "N", "H", "V"))
    checks.check_flags(reverse=reverse, return_state=return_state)
    arguments.check_log_decay(log_decay, sizes, ("Kv", "B T Kv", "B T Kv H"))
    arguments.check_padding_mask(mask, {**sizes, "S": sizes["T"]})
    arguments.check_segment_ids(segment_ids, sizes)
    arguments.check_state(initial_state, query, sizes, normalize=False, heads="Kv")
    arguments.check_chunk_size(chunk_size)
    operands = (query, key, value, beta, log_decay, mask, segment_ids, initial_state)
    out, state = dispatch(
        "delta_rule",
        _IMPLEMENTATIONS,
        implementation,
        *jax.tree.map(jnp.asarray, operands),
        scale=arguments.scale(scale, default=sizes["H"] ** -0.5),
        reverse=reverse,
        chunk_size=chunk_size,
    )
    return (out, state) if return_state else out


def delta_rule_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B Kv V"],
    state: LinearState,
    beta: Float[Array, "B Kv"] | None = None,
    log_decay: Float[Array, " Kv"] | Float[Array, "B Kv"] | Float[Array, "B Kv H"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B O V"], LinearState]:
    """One token of `delta_rule`: the arguments without their time axis, and the state made explicit.

    Returns:
      `[B, max(N, Kv), V]` in the query's dtype, and the state to pass with the next token. Donate `state` to update it
      in place.

    Raises:
      TypeError, ValueError: as `delta_rule`.
    """
    arguments.check_arrays(query=query, key=key, value=value)
    sizes = checks.bind_shapes(("query", query, "B N H"), ("key", key, "B K H"), ("value", value, "B Kv V"))
    _check_operands(query, key, value, beta, sizes, "B Kv")
    arguments.check_log_decay(log_decay, sizes, ("Kv", "B Kv", "B Kv H"))
    if state is None:
        raise TypeError("state: expected a LinearState, got None; start from LinearState(zeros [B, Kv, H, V], None)")
    arguments.check_state(state, query, sizes, normalize=False, name="state", heads="Kv")
    dtype = state.S.dtype
    beta = jnp.ones((1, 1), dtype) if beta is None else beta.astype(dtype)
    kept = None if log_decay is None else jnp.exp(arguments.clamp(log_decay, dtype))
    kept = kept if kept is None or kept.ndim == 3 else kept[..., None]
    S, out = _advance(state.S, query.astype(dtype), key.astype(dtype), value.astype(dtype), beta, kept)
    out = arguments.scale(scale, default=sizes["H"] ** -0.5) * out
    return out.astype(query.dtype), LinearState(S, None)


def _advance(
    state: Float[Array, "B Kv H V"],
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B Kv V"],
    beta: Float[Array, "B Kv"],
    kept: Float[Array, "B Kv H"] | None,
) -> tuple[Float[Array, "B Kv H V"], Float[Array, "B O V"]]:
    """The state after a token and what the query reads in it; sizes of `beta` and `kept` may be 1."""
    batch, heads, width, value_width = state.shape
    query, key = (wy.per_state_head(x, max(heads, x.shape[1]), axis=1) for x in (query, key))
    state = state if kept is None else kept[..., None] * state
    error = value - jnp.einsum("bkhv,bkh->bkv", state, key)
    state += key[..., None] * (beta[..., None] * error)[..., None, :]
    out = jnp.einsum("bkgh,bkhv->bkgv", query.reshape(batch, heads, -1, width), state)
    return state, out.reshape(batch, -1, value_width)


def token_scan(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T Kv V"],
    beta: Float[Array, "B T Kv"],
    log_decay: Float[Array, " ..."],
    segment_ids: Int[Array, "B T"] | None,
    state: Float[Array, "B Kv H V"],
    *,
    scale: float,
    chunk_size: int | None,
    out_dtype: Any,
) -> tuple[Float[Array, "B T O V"], Float[Array, "B Kv H V"]]:
    """The recurrence as it stands, one token after another: the definition that faster forms are held to."""
    del chunk_size
    gates = jnp.broadcast_to(log_decay, beta.shape) if log_decay.ndim == 1 else log_decay
    gates = gates if gates.ndim == 4 else gates[..., None]
    starts = arguments.segment_starts(segment_ids, query)

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        query, key, value, beta, gate, starts = token
        kept = jnp.where(starts[:, None, None], 0, jnp.exp(gate))
        state, out = _advance(state, query, key, value, beta, kept)
        return state, (scale * out).astype(out_dtype)

    tokens = (*(x.astype(state.dtype) for x in (query, key, value, beta, gates)), starts)
    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(out, 0, 1), state


def _attend(
    causal: Callable[..., tuple[Array, Array]],
    query: Array,
    key: Array,
    value: Array,
    beta: Array | None,
    log_decay: Array | None,
    mask: Array | None,
    segment_ids: Array | None,
    initial_state: LinearState | None,
    *,
    scale: float,
    reverse: bool,
    chunk_size: int | None,
) -> tuple[Array, LinearState]:
    """The whole op from a kernel of the causal recurrence, `wy.causal` or `token_scan`."""
    accumulator = checks.accumulator_dtype(query.dtype)
    heads = value.shape[2]
    beta = jnp.ones_like(value[..., 0], accumulator) if beta is None else beta.astype(accumulator)
    log_decay = jnp.zeros(heads, accumulator) if log_decay is None else arguments.clamp(log_decay, accumulator)
    if mask is not None:
        key, value, log_decay = arguments.without_padding(mask, key, value, log_decay)
        beta = jnp.where(mask[:, 0, 0, :, None], beta, 0)
    state = arguments.packed(initial_state, wy.per_state_head(key[:, :1], heads, axis=2), value, accumulator)
    flip = functools.partial(jnp.flip, axis=1) if reverse else lambda x: x
    time = [flip(x) for x in (query, key, value, beta)]
    out, state = causal(
        *time,
        log_decay if log_decay.ndim == 1 else flip(log_decay),
        None if segment_ids is None else flip(segment_ids),
        state,
        scale=scale,
        chunk_size=chunk_size,
        out_dtype=query.dtype,
    )
    return flip(out), LinearState(state, None)


def _check_operands(query: Any, key: Any, value: Any, beta: Any, sizes: dict[str, int], layout: str) -> None:
    checks.check_floating(query=query)
    checks.check_same_dtype(query=query, key=key, value=value)
    arguments.check_value_heads(sizes["N"], sizes["K"], sizes["Kv"])
    checks.bind_shapes(("beta", beta, layout), **sizes)
    checks.check_floating(beta=beta)
    message = "expected numbers from 0 to 2, got others; pass jax.nn.sigmoid of a gate's logits"
    checks.check_values("beta", beta, lambda x: (x < 0) | (x > 2), message)


def _check_fused(
    platform: kernel.Platform,
    query: Array,
    key: Array,
    value: Array,
    beta: Array | None,
    log_decay: Array | None,
    *arrays: Any,
    chunk_size: int | None,
    **options: Any,
) -> None:
    if chunk_size is not None:
        raise NotImplementedError("the kernel has chunks of its own; leave chunk_size out")
    gates = jax.ShapeDtypeStruct(value.shape[2:3], "float32") if log_decay is None else log_decay
    kernel.delta.check(query, key, value, gates, platform=platform)


def _fused(name: str, platform: kernel.Platform) -> Implementation:
    def causal(*operands: Any, scale: float, chunk_size: int | None, out_dtype: Any) -> tuple[Array, Array]:
        del chunk_size
        return kernel.delta_rule(*operands, scale=scale, platform=platform, out_dtype=out_dtype)

    return Implementation(name, functools.partial(_attend, causal), functools.partial(_check_fused, platform))


_IMPLEMENTATIONS = (
    _fused("pallas_tpu", "tpu"),
    _fused("pallas_gpu", "gpu"),
    Implementation("xla", functools.partial(_attend, wy.causal)),
    Implementation("reference", functools.partial(_attend, token_scan)),
    _fused("interpret", "interpret"),
)
