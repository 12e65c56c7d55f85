"""Routing attention: softmax attention within clusters of alike tokens (Roy et al. 2020, algorithm 1).

Every head has C means. Cluster c takes the w queries and the w keys that score highest by mean c, over the whole
sequence (`jattn.sparse.kmeans`), so a token is in none, one or several clusters. Query t of cluster c attends to keys:

    z_ts = <LN(q_t), LN(k_s)>  ("google")    or    H^-1/2 <q_t, k_s>  ("lucid")
    o_tc = sum_{s in c} softmax_s(z_ts) v_s
    o_t  = sum_{c of t} o_tc / (|{c of t}| + eps)        eps = 0.01 ("google") or 1e-5 ("lucid")

With w = T / C that is O(T w) pairs instead of T^2. "google" is the authors' code, google-research/routing_transformer;
"lucid" is lucidrains/routing-transformer, with another normalisation, learnt keys and values for every cluster, and a
token that sees itself only where it sees nothing else.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jattn.checks import (
    bind_shapes,
    check_array,
    check_causal_lengths,
    check_choice,
    check_count,
    check_flags,
    check_same_dtype,
)
from jattn.dispatch import Choice, Implementation, dispatch
from jattn.dot_product import check_addend, check_query_key_value
from jattn.sparse.kmeans import VARIANTS, Variant, check_means, check_token_mask
from jattn.sparse.routing_clusters import Operands, Plan, dense_clusters, gathered_clusters


def routing_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"] | None,
    value: Float[Array, "B S K V"],
    means: Float[Array, "N C H"],
    *,
    window_size: int,
    variant: Variant = "google",
    is_causal: bool = False,
    share_qk: bool = False,
    mask: Bool[Array, "B 1 1 S"] | None = None,
    query_mask: Bool[Array, "B T"] | None = None,
    padding: Literal["excluded", "routed"] = "excluded",
    mem_key: Float[Array, "N C M H"] | None = None,
    mem_value: Float[Array, "N C M V"] | None = None,
    context_window_size: int | None = None,
    commitment: float = 1e-4,
    return_aux: bool = False,
    implementation: Choice = None,
) -> Any:
    """Attention within clusters of tokens, by the scores of `means` (Roy et al. 2020, algorithm 1).

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; query head n reads key head `n // (N // K)`, which it routes by means of its own. `None` with
        `share_qk`.
      value: `[B, S, K, V]`.
      means: `[N, C, H]`, from `jattn.sparse.kmeans`. They get no gradient.
      window_size: w, how many tokens a cluster takes; all T of them if it is more.
      variant: "google" or "lucid"; see the top of this file.
      is_causal: no query sees a later key; for T = S. The outputs of a token do not depend on later values. Which
        clusters it is in does depend on later tokens, for these compete for the same places. That is so in both
        released codes, which leave later tokens out when they decode: `routing_step` does, and so differs from this.
      share_qk: queries are their own keys, normalised to length 1 in "lucid". "google" needs it to be causal.
      mask: which keys are real, `[B, 1, 1, S]` or `[1, 1, 1, S]`; with `share_qk` also which queries are.
      query_mask: `[B, T]`, which queries are real; others see nothing but learnt keys.
      padding: "excluded" leaves tokens that are not real out of clusters and of the loss. "routed" lets them compete
        and masks them then (both released codes).
      mem_key, mem_value: of "lucid", keys and values of every cluster that all its queries see. The released code has
        at least one with causal, unshared queries and keys; here a query that sees nothing has 0.
      context_window_size: how many keys a cluster takes, where that is not `window_size`; for keys that are not shared.
      commitment: the factor of the loss.
      return_aux: return `(out, RoutingAux)`.
      implementation: "xla" (gathers clusters, `[B, N, C, w, w]` weights) or "reference" (`[B, N, C, T, S]` weights).

    Returns:
      `out [B, T, N, V]` in the query's dtype, or `(out, RoutingAux)`. A query in no cluster has 0, NaN if that is what
      it holds itself. Gradients reach query, key, value and the learnt keys and values; clusters are constants. Inside
      `shard_map` the loss is that of the rows and heads at hand.

    Differs from both released codes where a query may see none of its keys: there it has the mean of what it must not
    see. Differs from "google" as released, which does not mask queries and can add learnt vectors to keys and values by
    the distance of ranks. There is no `segment_ids`: clusters are of a whole row.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; causal "google" without `share_qk`, which by comparing
        ranks within two different lists would let a query see later keys.
    """
    check_flags(is_causal=is_causal, share_qk=share_qk, return_aux=return_aux)
    check_choice("variant", variant, VARIANTS)
    check_choice("padding", padding, ("excluded", "routed"))
    sizes = _check_operands(query, key, value, share_qk)
    check_means(means, {"N": sizes["N"], "K": sizes["K"], "H": sizes["H"]})
    check_addend("means", means, query)
    if is_causal:
        check_causal_lengths(sizes["T"], sizes["S"])
        if variant == "google" and not share_qk:
            raise ValueError(
                "is_causal: variant='google' compares ranks within a cluster, and where queries and keys are not the "
                "same tokens that lets a query see later keys; pass share_qk=True and key=None, or variant='lucid', "
                "which compares positions"
            )
    _check_memory(mem_key, mem_value, query, variant, sizes, means.shape[1])
    window = check_count("window_size", window_size)
    key_window = window
    if context_window_size is not None:
        if share_qk:
            raise ValueError("context_window_size: with share_qk the keys of a cluster are its queries; leave it out")
        key_window = check_count("context_window_size", context_window_size)
    if isinstance(commitment, bool) or not isinstance(commitment, (int, float)):
        raise TypeError(f"commitment: expected a static number, got {type(commitment).__name__}")
    q_real, kv_real = _real_tokens(mask, query_mask, share_qk, sizes)
    plan = Plan(
        window=window,
        key_window=key_window,
        variant=variant,
        is_causal=bool(is_causal),
        excluded=padding == "excluded",
        commitment=float(commitment),
        return_aux=bool(return_aux),
    )
    operands = Operands(query, key, value, means, q_real, kv_real, mem_key, mem_value)
    out, aux = dispatch("routing_attention", _IMPLEMENTATIONS, implementation, operands, plan=plan)
    return (out, aux) if return_aux else out


def _check_operands(query: Any, key: Any, value: Any, share_qk: bool) -> dict[str, int]:
    """The sizes B, T, S, N, K, H, V; where queries are the keys, K is the number of value heads."""
    if not share_qk:
        if key is None:
            raise ValueError("key: expected [B, S, K, H], got None; pass share_qk=True if queries are their own keys")
        return check_query_key_value(query, key, value)
    if key is not None:
        raise ValueError("key: with share_qk=True queries are their own keys; pass None")
    check_array("query", query)
    check_array("value", value)
    q_sizes = bind_shapes(("query", query, "B T N H"))
    bind_shapes(("value", value, "B T K V"), B=q_sizes["B"], T=q_sizes["T"])
    # The keys' shape follows from the others.
    key = np.broadcast_to(np.zeros((), query.dtype), (*value.shape[:3], q_sizes["H"]))
    return check_query_key_value(query, key, value)


def _check_memory(
    mem_key: Any, mem_value: Any, query: Any, variant: Variant, sizes: dict[str, int], clusters: int
) -> None:
    if (mem_key is None) != (mem_value is None):
        missing, given = ("mem_key", "mem_value") if mem_key is None else ("mem_value", "mem_key")
        raise ValueError(f"{missing}: expected an array beside {given}, got None")
    if mem_key is None:
        return
    if variant != "lucid":
        raise ValueError(f"mem_key: variant={variant!r} has no learnt keys; pass variant='lucid' or leave them out")
    bind_shapes(
        ("mem_key", mem_key, "N C M H"),
        ("mem_value", mem_value, "N C M V"),
        **{letter: sizes[letter] for letter in "NHV"},
        C=clusters,
    )
    check_same_dtype(query=query, mem_key=mem_key, mem_value=mem_value)


def _real_tokens(
    mask: Any, query_mask: Any, share_qk: bool, sizes: dict[str, int]
) -> tuple[Array | None, Array | None]:
    """`[B, T]` and `[B, S]`, or `None` where all are real."""
    kv_real = None
    if mask is not None:
        check_array("mask", mask)
        if mask.shape not in ((rows, 1, 1, sizes["S"]) for rows in (1, sizes["B"])) or mask.dtype != jnp.bool_:
            raise ValueError(
                f"mask: expected booleans [B, 1, 1, S] = {(sizes['B'], 1, 1, sizes['S'])}, B may be 1: clusters know "
                f"real keys only, got {mask.dtype} {tuple(mask.shape)}"
            )
        kv_real = jnp.broadcast_to(jnp.asarray(mask)[:, 0, 0], (sizes["B"], sizes["S"]))
    if query_mask is None:
        return kv_real if share_qk else None, kv_real
    if share_qk:
        raise ValueError("query_mask: with share_qk mask says which queries are real; leave this out")
    check_token_mask("query_mask", query_mask, sizes["B"], sizes["T"])
    return jnp.asarray(query_mask), kv_real


# Each is called as `run(operands, *, plan)`.
_IMPLEMENTATIONS = (
    Implementation("xla", gathered_clusters),
    Implementation("reference", dense_clusters),
)
