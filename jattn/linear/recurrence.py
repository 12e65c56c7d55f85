"""Linear attention: one recurrence over tokens, with or without decay, normalised or not.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T           [H, V], key index first
    z_t = exp(g_t) * z_{t-1} + k_t                    [H], only when normalised
    o_t = scale * S_t^T q_t                           not normalised
    o_t = scale * S_t^T q_t / (scale * q_t . z_t + eps)

The gates g_t <= 0 are logarithms of decays: none, one per head, one per token and head, or one per token and
channel. The normaliser is one more value channel that holds ones, so [S | z] is carried as one state. Without a
causal order every query reads the sum over all keys; with decay that sum weighs key j for query t by exp(-|b_t -
b_j|), b = cumsum g.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.dispatch import Choice, Implementation, dispatch
from jattn.linear import arguments, chunked
from jattn.linear.arguments import LinearState
from pallas_kernels import linear as kernel

EpsMode = Literal["denominator", "z"]


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    log_decay: Float[Array, " K"] | Float[Array, "B S K"] | Float[Array, "B S K H"] | None = None,
    mask: Bool[Array, "B 1 1 S"] | None = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    eps_mode: EpsMode = "denominator",
    reverse: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: Choice = None,
) -> Any:
    """Linear attention, linear in the length (Katharopoulos et al. 2020, eq. 9; gates: Yang et al. 2024, eq. 3).

    Query head n reads key and value head `n // (N // K)`. Feature maps, if any, are the caller's.

    Args:
      query, key, value: of one floating dtype. T and S may differ when `is_causal=False` and there is no decay.
      log_decay: natural logarithm, at most 0, of the decay of the state before a token is added. `[K]` is one constant
        per head, `[B, S, K]` one per token and head, `[B, S, K, H]` one per key channel too. Values below -10000 count
        as -10000: the state is forgotten. The dtype may differ from that of `query`.
      mask: key padding, `[B, 1, 1, S]`, True for a real token. A padded token adds nothing and decays nothing.
      is_causal: a token sees itself and the tokens before it; `False`: all tokens, gates counted between the two.
      scale: multiplies the query; `None` means 1.
      normalize: divide by the summed weights. Keys and queries should be non-negative features.
      eps: added to the denominator (`eps_mode="denominator"`, flash-linear-attention with 1e-10) or to every component
        of z (`"z"`, performer-pytorch with 1e-6). A row whose denominator is 0 gives 0.
      reverse: a token sees itself and the tokens after it; equals flipping every argument and the output along time.
      segment_ids: packed sequences, non-decreasing along time; a token sees its own segment only. The initial state
        belongs to the first token's segment, the state returned to the last token's (the other way round in reverse).
      initial_state: state before the first token, of the accumulator dtype (float32, float64 for float64 operands).
      return_state: also return the state after the last token. Without causal order, decay and segments have no state.
      chunk_size: tokens per chunk, a power of two; `None` chooses.
      implementation: "pallas_tpu", "pallas_gpu" and "xla" work in chunks, "reference" token by token; see
        `jattn.explain`. The kernels have first derivatives, backward; the others have all.

    Returns:
      `[B, T, N, V]` in the query's dtype, or `(that, LinearState)`.

    Raises:
      TypeError: a wrong dtype or type. ValueError: a wrong shape, option or combination of them.
    """
    arguments.check_arrays(query=query, key=key, value=value)
    sizes = checks.bind_shapes(("query", query, "B T N H"), ("key", key, "B S K H"), ("value", value, "B S K V"))
    checks.check_floating(query=query)
    checks.check_same_dtype(query=query, key=key, value=value)
    checks.check_grouped_heads(sizes["N"], sizes["K"])
    checks.check_no_empty(sizes, "BTSNHV")
    checks.check_flags(is_causal=is_causal, reverse=reverse, return_state=return_state)
    _check_options(normalize, eps, eps_mode)
    arguments.check_log_decay(log_decay, sizes, ("K", "B S K", "B S K H"))
    arguments.check_padding_mask(mask, sizes)
    arguments.check_segment_ids(segment_ids, sizes)
    arguments.check_state(initial_state, query, sizes, normalize)
    arguments.check_chunk_size(chunk_size)
    has_state = initial_state is not None or return_state
    _check_order(sizes, is_causal, reverse, log_decay is not None, segment_ids is not None, has_state)
    operands = (query, key, value, log_decay, mask, segment_ids, initial_state)
    out, state = dispatch(
        "linear_attention",
        _IMPLEMENTATIONS,
        implementation,
        *jax.tree.map(jnp.asarray, operands),
        is_causal=is_causal,
        scale=arguments.scale(scale),
        normalize=normalize,
        eps=eps,
        eps_mode=eps_mode,
        reverse=reverse,
        chunk_size=chunk_size,
    )
    return (out, state) if return_state else out


def linear_attention_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K V"],
    state: LinearState,
    log_decay: Float[Array, " K"] | Float[Array, "B K"] | Float[Array, "B K H"] | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    eps_mode: EpsMode = "denominator",
) -> tuple[Float[Array, "B N V"], LinearState]:
    """One token of causal `linear_attention`: the arguments without their time axis, and the state made explicit.

    Returns:
      `[B, N, V]` in the query's dtype, and the state to pass with the next token. Donate `state` to update it in place.

    Raises:
      TypeError, ValueError: as `linear_attention`.
    """
    arguments.check_arrays(query=query, key=key, value=value)
    sizes = checks.bind_shapes(("query", query, "B N H"), ("key", key, "B K H"), ("value", value, "B K V"))
    checks.check_floating(query=query)
    checks.check_same_dtype(query=query, key=key, value=value)
    checks.check_grouped_heads(sizes["N"], sizes["K"])
    _check_options(normalize, eps, eps_mode)
    arguments.check_log_decay(log_decay, sizes, ("K", "B K", "B K H"))
    if state is None:
        raise TypeError("state: expected a LinearState, got None; start from LinearState(zeros [B, K, H, V], None)")
    arguments.check_state(state, query, sizes, normalize, name="state")

    S, z = state
    accumulator = S.dtype
    k = key.astype(accumulator)
    update = k[..., None] * value.astype(accumulator)[..., None, :]
    if log_decay is None:
        S, z = S + update, None if z is None else z + k
    else:
        kept = jnp.exp(arguments.clamp(log_decay, accumulator))
        kept = kept.reshape(*(kept.shape if kept.ndim == 3 else (*kept.shape, 1)))  # [K, 1], [B, K, 1] or [B, K, H]
        S, z = kept[..., None] * S + update, None if z is None else kept * z + k
    q = query.astype(accumulator).reshape(sizes["B"], sizes["K"], -1, sizes["H"])
    out = arguments.scale(scale) * jnp.einsum("bkgh,bkhv->bkgv", q, S)
    if z is not None:
        weights = arguments.scale(scale) * jnp.einsum("bkgh,bkh->bkg", q, z)
        out = _normalized(out, weights, q, arguments.scale(scale), eps, eps_mode)
    return out.reshape(sizes["B"], sizes["N"], -1).astype(query.dtype), LinearState(S, z)


def token_scan(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    log_decay: Float[Array, " ..."],
    segment_ids: Int[Array, "B T"] | None,
    state: Float[Array, "B K H V"],
    *,
    scale: float,
    chunk_size: int | None,
    out_dtype: Any,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B K H V"]]:
    """The recurrence as it stands, one token after another: the definition that faster forms are held to."""
    del chunk_size
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (batch, length, kv_heads))
    gates = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    starts = arguments.segment_starts(segment_ids, query)

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, gate, starts = token
        kept = jnp.where(starts[:, None, None], 0, jnp.exp(gate))
        state = kept[..., None] * state + k[..., None] * v[..., None, :]
        return state, (scale * jnp.einsum("bkgh,bkhv->bkgv", q, state)).astype(out_dtype)

    grouped = query.reshape(batch, length, kv_heads, -1, width)
    tokens = (*(x.astype(state.dtype) for x in (grouped, key, value, gates)), starts)
    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(out, 0, 1).reshape(batch, length, heads, -1), state


def _attend(
    causal: Callable[..., tuple[Array, Array]],
    divided: Callable[..., tuple[Array, Array, Array]] | None,
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    mask: Array | None,
    segment_ids: Array | None,
    initial_state: LinearState | None,
    *,
    is_causal: bool,
    scale: float,
    normalize: bool,
    eps: float,
    eps_mode: EpsMode,
    reverse: bool,
    chunk_size: int | None,
) -> tuple[Array, LinearState]:
    """The whole op from a kernel of the causal recurrence.

    `causal(query, key, value, log_decay, segment_ids, state, *, scale, chunk_size, out_dtype) -> (out, state)` takes
    `log_decay` of shape [K], [B, T, K] or [B, T, K, H] and a state, both in the accumulator dtype. `divided`, if there
    is one, normalises too, for gates without channels: `normalized_linear_attention`.
    """
    accumulator = checks.accumulator_dtype(query.dtype)
    needs_order = is_causal or log_decay is not None or segment_ids is not None
    log_decay = jnp.zeros(key.shape[2], accumulator) if log_decay is None else arguments.clamp(log_decay, accumulator)
    if mask is not None:
        key, value, log_decay = arguments.without_padding(mask, key, value, log_decay)
    values = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1) if normalize else value
    state = arguments.packed(initial_state, key, values, accumulator)
    out_dtype = query.dtype if is_causal and not normalize else accumulator
    run = functools.partial(causal, scale=scale, chunk_size=chunk_size, out_dtype=out_dtype)

    if not needs_order:
        state += jnp.einsum("bskh,bskv->bkhv", key, values, preferred_element_type=accumulator)
        out = scale * _read(query, state)
    elif is_causal:
        flip = functools.partial(jnp.flip, axis=1) if reverse else lambda x: x
        gates = log_decay if log_decay.ndim == 1 else flip(log_decay)
        ids = None if segment_ids is None else flip(segment_ids)
        if normalize and divided is not None and log_decay.ndim < 4:
            both = (eps, 0.0) if eps_mode == "denominator" else (0.0, eps)
            time = (flip(query), flip(key), flip(value), gates, ids)
            out, S, z = divided(*time, state[..., :-1], state[..., -1], scale=scale, eps=both)
            return flip(out), LinearState(S, z)
        out, state = run(flip(query), flip(key), flip(values), gates, ids, state)
        out = flip(out)
    else:
        out = _both_ways(run, query, key, values, log_decay, segment_ids, state, scale)

    if normalize:
        out, weights = out[..., :-1], out[..., -1]
        out = _normalized(out, weights, query.astype(accumulator), scale, eps, eps_mode)
        return out.astype(query.dtype), LinearState(state[..., :-1], state[..., -1])
    return out.astype(query.dtype), LinearState(state, None)


def _both_ways(
    run: Callable[..., tuple[Array, Array]],
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array,
    segment_ids: Array | None,
    state: Array,
    scale: float,
) -> Array:
    """Forward plus backward in time, less the token itself, which both count.

    The gate of token t + 1 lies between t and t + 1, so backward it is the gate of token t.
    """
    forward, _ = run(query, key, value, log_decay, segment_ids, state)
    if log_decay.ndim > 1:
        log_decay = jnp.flip(jnp.concatenate([log_decay[:, 1:], jnp.zeros_like(log_decay[:, :1])], axis=1), axis=1)
    ids = None if segment_ids is None else jnp.flip(segment_ids, axis=1)
    backward, _ = run(*(jnp.flip(x, axis=1) for x in (query, key, value)), log_decay, ids, state)
    batch, length, kv_heads, width = key.shape
    grouped = query.reshape(batch, length, kv_heads, -1, width)
    own = scale * jnp.einsum("btkgh,btkh->btkg", grouped, key, preferred_element_type=state.dtype)
    own = (own[..., None] * value.astype(state.dtype)[:, :, :, None]).reshape(forward.shape)
    return forward + jnp.flip(backward, axis=1) - own


def _read(query: Array, state: Array) -> Array:
    """[B, T, N, V]: what every query reads from one state."""
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, state.shape[1], -1, width)
    out = jnp.einsum("btkgh,bkhv->btkgv", grouped, state.astype(query.dtype), preferred_element_type=state.dtype)
    return out.reshape(batch, length, heads, -1)


def _normalized(out: Array, weights: Array, query: Array, scale: float, eps: float, eps_mode: EpsMode) -> Array:
    """out / (weights + eps), where "z" stands for an eps beside every component of z; 0 where the denominator is 0."""
    denominator = weights + (eps if eps_mode == "denominator" else scale * eps * jnp.sum(query, axis=-1))
    is_empty = denominator == 0
    return jnp.where(is_empty[..., None], 0, out / jnp.where(is_empty, 1, denominator)[..., None])


def _check_options(normalize: bool, eps: float, eps_mode: str) -> None:
    checks.check_flags(normalize=normalize)
    checks.check_choice("eps_mode", eps_mode, ("denominator", "z"))
    if arguments.number("eps", eps) < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")


def _check_order(
    sizes: dict[str, int], is_causal: bool, reverse: bool, has_decay: bool, has_segments: bool, has_state: bool
) -> None:
    lengths = f"{sizes['T']} queries and {sizes['S']} keys"
    if is_causal:
        if sizes["T"] != sizes["S"]:
            raise ValueError(f"is_causal: the order needs one key for every query, got {lengths}; pass is_causal=False")
        return
    if reverse:
        raise ValueError("reverse: turns a causal order around, but is_causal=False has none; leave one of them out")
    needs_positions = " and ".join(["log_decay"] * has_decay + ["segment_ids"] * has_segments)
    if needs_positions and sizes["T"] != sizes["S"]:
        raise ValueError(f"{needs_positions}: with is_causal=False it needs a key for every query, got {lengths}")
    if needs_positions and has_state:
        raise ValueError(
            f"initial_state, return_state: with is_causal=False and {needs_positions} no single state exists; "
            f"run both directions with is_causal=True and reverse="
        )


def _check_fused(
    platform: kernel.Platform,
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None,
    mask: Array | None,
    segment_ids: Array | None,
    initial_state: LinearState | None,
    *,
    is_causal: bool,
    normalize: bool,
    chunk_size: int | None,
    **options: Any,
) -> None:
    if not is_causal and log_decay is None and segment_ids is None:
        raise NotImplementedError("a sum over all keys is two matrix products, which the compiler does as well")
    if chunk_size is not None:
        raise NotImplementedError("the kernel has chunks of its own; leave chunk_size out")
    gates = jax.ShapeDtypeStruct(key.shape[2:3], "float32") if log_decay is None else log_decay
    # One more channel, of ones, where the kernel does not divide by itself.
    values = jax.ShapeDtypeStruct((*value.shape[:-1], value.shape[-1] + normalize), value.dtype)
    kernel.additive.check(query, key, values, gates, platform=platform)


def _fused(name: str, platform: kernel.Platform) -> Implementation:
    def causal(*operands: Any, scale: float, chunk_size: int | None, out_dtype: Any) -> tuple[Array, Array]:
        del chunk_size
        return kernel.linear_attention(*operands, scale=scale, platform=platform, out_dtype=out_dtype)

    divided = None
    if platform in ("tpu", "interpret"):
        divided = functools.partial(kernel.normalized_linear_attention, platform=platform)
    return Implementation(name, functools.partial(_attend, causal, divided), functools.partial(_check_fused, platform))


_IMPLEMENTATIONS = (
    _fused("pallas_tpu", "tpu"),
    _fused("pallas_gpu", "gpu"),
    Implementation("xla", functools.partial(_attend, chunked.causal, None)),
    Implementation("reference", functools.partial(_attend, token_scan, None)),
    _fused("interpret", "interpret"),
)
