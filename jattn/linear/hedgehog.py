"""Hedgehog: linear attention whose feature maps learn to mimic softmax.

    u      = x W + b                         a map W [H, F] and b [F] for every head, one for queries, one for keys
    phi(x) = [f(u), f(-u)]                   2 F features, none negative
    a_ts   = phi_q(q_t) . phi_k(k_s) / (sum_r phi_q(q_t) . phi_k(k_r) + eps)          r, s <= t if causal
    o_t    = sum_s a_ts v_s

Four f are in use, and they are not the same attention: what f divides a query by cancels in a_ts, what it divides a
key by does not.

    exp            exp(u)                                 the paper
    softmax_dim    softmax over the F channels of u       LoLCATs, by the same authors
    exp_dim        exp(u - max u)                         LoLCATs
    softmax_joint  one softmax over [2 u, -2 u]           flash-linear-attention

There is no 1 / sqrt(H): the maps learn the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.dispatch import Choice
from jattn.linear import arguments
from jattn.linear.arguments import LinearState
from jattn.linear.recurrence import linear_attention, linear_attention_step

Activation = Literal["exp", "softmax_dim", "exp_dim", "softmax_joint"]


def hedgehog_feature_map(
    x: Float[Array, "*batch K H"],
    weight: Float[Array, "M H F"] | None = None,
    bias: Float[Array, "M F"] | None = None,
    *,
    activation: Activation = "softmax_dim",
    fullspace: bool = True,
    temp: float = 1.0,
    eps: float = 1e-12,
) -> Float[Array, "*batch M features"]:
    """The features of queries or keys (Zhang et al. 2024, eq. 3; HazyResearch/lolcats, `feature_map.py`).

    Args:
      x: queries or keys, heads before channels.
      weight: W of M maps, M a multiple of K: map m reads head `m // (M // K)`. `None` is the identity, M = K and F = H.
      bias: b.
      activation: f.
      fullspace: `False` leaves out f(-u), so that there are F features.
      temp: multiplies u.
      eps: the least feature of "softmax_dim" and "exp_dim". In float16 the default is 0.

    Returns:
      2 F features (or F), computed in float32 or wider and returned in the dtype of `x`. "exp" overflows float32 where
      |u| > 88, and float16 beyond 11; the others never do.

    Raises:
      TypeError: a wrong dtype or type. ValueError: a wrong shape or option.
    """
    checks.check_array("x", x)
    if x.ndim < 2:
        raise ValueError(f"x: expected at least the dimensions [K, H], got shape {tuple(x.shape)}")
    heads, width = x.shape[-2:]
    checks.check_floating(x=x, weight=weight, bias=bias)
    known = {"H": width} if weight is not None else {"H": width, "F": width, "M": heads}
    sizes = checks.bind_shapes(("weight", weight, "M H F"), ("bias", bias, "M F"), **known)
    if heads == 0 or sizes["M"] == 0 or sizes["M"] % heads:
        raise ValueError(f"weight: expected as many maps as the {heads} heads of x or a multiple, got {sizes['M']}")
    checks.check_no_empty(sizes, "HF")
    checks.check_choice("activation", activation, get_args(Activation))
    checks.check_flags(fullspace=fullspace)
    least = _check_eps(eps)

    accumulator = checks.accumulator_dtype(x.dtype)
    u = x.astype(accumulator)
    if weight is not None:
        grouped = weight.astype(accumulator).reshape(heads, -1, width, sizes["F"])
        u = jnp.einsum("...kh,kghf->...kgf", u, grouped).reshape(*x.shape[:-2], sizes["M"], sizes["F"])
    if bias is not None:
        u = u + bias.astype(accumulator)
    features = _features(arguments.number("temp", temp) * u, activation, least)
    return (features if fullspace else features[..., : sizes["F"]]).astype(x.dtype)


def hedgehog_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    query_weight: Float[Array, "N H F"] | None = None,
    key_weight: Float[Array, "K H F"] | Float[Array, "N H F"] | None = None,
    mask: Bool[Array, "B 1 1 S"] | None = None,
    *,
    query_bias: Float[Array, "N F"] | None = None,
    key_bias: Float[Array, "K F"] | Float[Array, "N F"] | None = None,
    activation: Activation = "softmax_dim",
    is_causal: bool = True,
    eps: float = 1e-12,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: Choice = None,
) -> Any:
    """Attention with Hedgehog features, linear in the length (Zhang et al. 2024, eq. 3 and 4).

    It is `linear_attention` of the features, normalised. Rotary positions, if any, come before it.

    Args:
      query_weight, query_bias: maps of the query heads; see `hedgehog_feature_map`. Their dtype may differ from that of
        `query`. `None` is the identity, with which the paper's maps start.
      key_weight, key_bias: maps of the keys. K of them are one per key head; N of them are one per query head, as in
        LoLCATs: then every query head has a state of its own.
      mask: key padding, `[B, 1, 1, S]`, True for a real token; a padded key has no features.
      is_causal: a token sees itself and the tokens before it; `False`: all tokens, and T and S may differ.
      eps: added to the denominator.
      initial_state, return_state: the state is `LinearState` over features, `S [B, M, 2F, V]` and `z [B, M, 2F]` for M
        maps of keys.

    The other arguments, the result and the errors are those of `linear_attention`.
    """
    arguments.check_arrays(query=query, key=key, value=value)
    sizes = checks.bind_shapes(("query", query, "B T N H"), ("key", key, "B S K H"), ("value", value, "B S K V"))
    checks.check_floating(query=query)
    checks.check_same_dtype(query=query, key=key, value=value)
    checks.check_flags(return_state=return_state)
    sizes = check_maps(sizes, query_weight, key_weight, query_bias, key_bias, activation)
    if initial_state is not None:
        arguments.check_state(initial_state, query, {**sizes, "H": 2 * sizes["F"]}, normalize=True, heads="M")
    features = (
        hedgehog_feature_map(query, query_weight, query_bias, activation=activation),
        hedgehog_feature_map(key, key_weight, key_bias, activation=activation),
    )

    def attend(query: Array, key: Array, state: LinearState | None) -> Any:
        return linear_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=is_causal,
            normalize=True,
            eps=eps,
            segment_ids=segment_ids,
            initial_state=state,
            return_state=return_state,
            chunk_size=chunk_size,
            implementation=implementation,
        )

    if sizes["M"] == sizes["K"]:
        return attend(*features, initial_state)
    return _by_query_head(attend, features, initial_state, sizes["K"], return_state)


def hedgehog_attention_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K V"],
    state: LinearState,
    query_weight: Float[Array, "N H F"] | None = None,
    key_weight: Float[Array, "K H F"] | Float[Array, "N H F"] | None = None,
    *,
    query_bias: Float[Array, "N F"] | None = None,
    key_bias: Float[Array, "K F"] | Float[Array, "N F"] | None = None,
    activation: Activation = "softmax_dim",
    eps: float = 1e-12,
) -> tuple[Float[Array, "B N V"], LinearState]:
    """One token of causal `hedgehog_attention`: the output and the state to pass with the next token."""
    arguments.check_arrays(query=query, key=key, value=value)
    sizes = checks.bind_shapes(("query", query, "B N H"), ("key", key, "B K H"), ("value", value, "B K V"))
    checks.check_floating(query=query)
    checks.check_same_dtype(query=query, key=key, value=value)
    sizes = check_maps(sizes, query_weight, key_weight, query_bias, key_bias, activation)
    if state is None:
        raise TypeError("state: expected a LinearState, got None; start from zeros of [B, M, 2F, V] and [B, M, 2F]")
    arguments.check_state(state, query, {**sizes, "H": 2 * sizes["F"]}, normalize=True, name="state", heads="M")
    features = (
        hedgehog_feature_map(query, query_weight, query_bias, activation=activation),
        hedgehog_feature_map(key, key_weight, key_bias, activation=activation),
    )

    def attend(query: Array, key: Array, state: LinearState) -> tuple[Array, LinearState]:
        return linear_attention_step(query, key, value, state, normalize=True, eps=eps)

    if sizes["M"] == sizes["K"]:
        return attend(*features, state)
    return _by_query_head(attend, features, state, sizes["K"], True)


def check_maps(
    sizes: dict[str, int], query_weight: Any, key_weight: Any, query_bias: Any, key_bias: Any, activation: Any
) -> dict[str, int]:
    """`sizes` with F, and M, how many maps the keys have."""
    checks.check_grouped_heads(sizes["N"], sizes["K"])
    weights = {"query_weight": query_weight, "key_weight": key_weight, "query_bias": query_bias, "key_bias": key_bias}
    for name, x in weights.items():
        if x is not None:
            checks.check_array(name, x)
    checks.check_floating(**weights)
    known = {letter: sizes[letter] for letter in "NKH"}
    if key_weight is None:
        known["M"] = known["K"]
    elif key_weight.ndim == 3 and key_weight.shape[0] not in (sizes["K"], sizes["N"]):
        raise ValueError(
            f"key_weight: expected [M, H, F] with M = {sizes['K']}, a map for every key head, or {sizes['N']}, one for "
            f"every query head, got {tuple(key_weight.shape)}"
        )
    letters = {"query_weight": "N H F", "key_weight": "M H F", "query_bias": "N F", "key_bias": "M F"}
    found = checks.bind_shapes(*((name, weights[name], letters[name]) for name in letters), **known)
    features = found.setdefault("F", found["H"])
    if features != found["H"] and (query_weight is None or key_weight is None):
        identity = "query_weight" if query_weight is None else "key_weight"
        other = next(name for name, x in weights.items() if x is not None)
        raise ValueError(
            f"{other}: expected F = H = {found['H']}, as {identity} is left out and so the identity, got F = {features}"
        )
    checks.check_no_empty(found, "F")
    checks.check_choice("activation", activation, get_args(Activation))
    return {**sizes, **found}


def _features(u: Array, activation: Activation, least: float) -> Array:
    """[f(u), f(-u)] over the last axis."""
    if activation == "softmax_joint":
        return jax.nn.softmax(jnp.concatenate([2 * u, -2 * u], axis=-1), axis=-1)
    if activation == "exp":
        return jnp.exp(jnp.concatenate([u, -u], axis=-1))
    halves = (
        jax.nn.softmax(x, axis=-1) if activation == "softmax_dim" else jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
        for x in (u, -u)
    )
    return jnp.maximum(jnp.concatenate(list(halves), axis=-1), least)


def _by_query_head(
    attend: Callable[[Array, Array, Any], Any],
    features: tuple[Float[Array, "B *T N features"], Float[Array, "B *T N features"]],
    state: LinearState | None,
    kv_heads: int,
    has_state: bool,
) -> Any:
    """`attend` with keys of the query heads' own; mapped over the heads of a group, which so share their values."""
    heads = features[0].ndim - 2

    def split(x: Array, axis: int) -> Array:
        return x.reshape(*x.shape[:axis], kv_heads, -1, *x.shape[axis + 1 :])

    def join(x: Array, axis: int) -> Array:
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    query, key = (split(x, heads) for x in features)
    mapped = jax.vmap(attend, (heads + 1, heads + 1, 2), (heads + 1, 2) if has_state else heads + 1)
    result = mapped(query, key, jax.tree.map(lambda x: split(x, 1), state))
    if not has_state:
        return join(result, heads)
    out, state = result
    return join(out, heads), jax.tree.map(lambda x: join(x, 1), state)


def _check_eps(eps: Any) -> float:
    number = arguments.number("eps", eps)
    if number < 0:
        raise ValueError(f"eps: expected at least 0, got {number}")
    return number
