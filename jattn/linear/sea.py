"""SEA: sparse attention over the keys that a linear-cost estimate of the attention matrix singles out.

    est, e = sea_estimate(q, k, v)    est [N, T, L], L cells in place of T keys; see `jattn.linear.sea_estimator`
    p      = softmax_L(est)
    kept   = the keys of the largest cells of p       about k per row and head; see `jattn.linear.sea_selection`
    sparse = softmax attention over the kept keys
    s      = Linear e                          two logits per row and head
    o      = sigmoid(s_1) sigmoid(s_0) sparse + (1 - sigmoid(s_1)) avg

avg is the mean of the values so far if causal; else, per head, the sum of the values weighed by the mean row of p. What
is kept has no gradient: the estimate learns by s, by avg, and by distillation (`jattn.linear.sea_loss`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.dispatch import Choice, Implementation, dispatch
from jattn.linear import arguments
from jattn.linear.arguments import LinearState
from jattn.linear.recurrence import linear_attention
from jattn.linear.sea_estimator import sea_estimate
from jattn.linear.sea_params import SEAParams, check_params
from jattn.linear.sea_selection import (
    FlattenDim,
    Reach,
    causal_reach,
    check_selection,
    sea_interpolate,
    sea_select,
    two_way_reach,
)
from jattn.linear.sea_sparse import check_gathered, dense_attention, gathered_attention


class SEAIntermediates(NamedTuple):
    """What a call of `sea_attention` made on its way.

    Attributes:
      estimate: est, logits.
      encoding: e.
      cells: which were kept.
      gates: s.
    """

    estimate: Float[Array, "B N T L"]
    encoding: Float[Array, "B T N D"]
    cells: Bool[Array, "B N T L"]
    gates: Float[Array, "B T N 2"]


def sea_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    params: SEAParams,
    mask: Bool[Array, "B 1 1 T"] | None = None,
    *,
    k_budget: float,
    is_causal: bool = True,
    k_flatten_dim: FlattenDim | None = None,
    k_oversample: float = 1.0,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    return_intermediates: bool = False,
    implementation: Choice = None,
) -> Any:
    """Sparse attention with an estimated mask (Lee et al. 2024, section 3), linear in the length.

    Where the paper is silent this follows gmlwns2000/sea-attention: `is_causal=True` is its OPT layer, `False` its BERT
    layer. It differs from both in what sorting leaves open: of equal probabilities the first cell is kept.

    Args:
      query, key, value: of one floating dtype; query head n reads key head `n // (N // K)`.
      params: of the estimator; see `init_sea_params`, which is told the same `is_causal`. Any floating dtype.
      mask: key padding, `[B, 1, 1, T]`, True for a real token. In causal order a padded key is not read at all; in the
        other the features of padded keys count in the estimate, as they do in the released code.
      k_budget: keys per row and head that are read, on average.
      is_causal: a token sees itself and the tokens before it, or all tokens.
      k_flatten_dim: which cells compete, see `sea_select`; `None` is "causal_batch" in causal order, where "head" and
        "batch" would look ahead, and else "batch".
      k_oversample: keep so many times more cells and read that part of their keys.
      scale: of the logits of sparse attention; `None` means `H ** -0.5`. In causal order it multiplies the query for
        the estimate too, as OPT does.
      segment_ids: packed sequences, non-decreasing along time; each is as if it stood alone. Causal only.
      return_intermediates: return `(out, SEAIntermediates)`.
      implementation: "xla" gathers the keys that are read, a block of rows at a time, and never makes T x T weights;
        "reference" makes them. "head" and "batch" are for "reference" alone.

    Returns:
      `[B, T, N, V]` in the query's dtype. The estimate is computed in float32 or wider.

    Raises:
      TypeError, ValueError: a wrong shape, dtype, option or combination of them.
    """
    sizes = check_inputs(query, key, value, params, is_causal)
    checks.check_flags(return_intermediates=return_intermediates)
    arguments.check_padding_mask(mask, {**sizes, "S": sizes["T"]})
    arguments.check_segment_ids(segment_ids, sizes)
    if k_flatten_dim is None:
        k_flatten_dim = "causal_batch" if is_causal else "batch"
    check_selection(k_budget, k_flatten_dim, k_oversample)
    if is_causal and k_flatten_dim in ("head", "batch"):
        raise ValueError(
            f"k_flatten_dim: {k_flatten_dim!r} lets a row compete with later ones; in causal order pass 'causal_batch' "
            f"or 'query'"
        )
    if segment_ids is not None and not is_causal:
        raise ValueError("segment_ids: packed sequences need is_causal=True; without an order run each by itself")
    keep = None if mask is None else jnp.broadcast_to(mask[:, 0, 0], (sizes["B"], sizes["T"]))
    position = positions_in_segments(segment_ids, query)
    reach = token_reach(keep, query, is_causal=is_causal, segment_ids=segment_ids)
    lengths = position + 1 if is_causal else jnp.maximum(reach.width, 1)
    scale = arguments.scale(scale, default=sizes["H"] ** -0.5)
    wide = widened(query, key, value, params, keep, scale if is_causal else 1.0)
    selection: dict[str, Any] = {"k_budget": k_budget, "k_flatten_dim": k_flatten_dim, "k_oversample": k_oversample}
    options: dict[str, Any] = {"segment_ids": segment_ids, "implementation": implementation}
    est, encoding, _ = sea_estimate(*wide, keep, position=position, **options)
    probabilities = jax.nn.softmax(est, axis=-1)
    if keep is not None:
        probabilities = jnp.where(keep[:, None, :, None], probabilities, 0)
    cells = sea_select(probabilities, lengths, keep, **selection)
    sparse = attend_cells(
        jnp.asarray(query),
        jnp.asarray(key),
        jnp.asarray(value),
        cells,
        reach,
        scale=scale,
        is_padded=keep is not None,
        implementation=implementation,
        **selection,
    )
    if is_causal:
        average, _ = running_average(wide[2], **options)
    else:
        average = estimated_average(wide[2], probabilities, reach)
    out, gates = mix(sparse, average, encoding, wide[3])
    out = out.astype(query.dtype)
    return (out, SEAIntermediates(est, encoding, cells, gates)) if return_intermediates else out


def attend_cells(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    cells: Bool[Array, "B N T L"],
    reach: Reach,
    *,
    implementation: Choice = None,
    **options: Any,
) -> Float[Array, "B T N V"]:
    """Softmax attention over the keys of the cells, in the accumulator dtype; see `jattn.linear.sea_sparse`."""
    return dispatch("sea_attention", _IMPLEMENTATIONS, implementation, query, key, value, cells, reach, **options)


def running_average(
    value: Float[Array, "B T K V"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    state: LinearState | None = None,
    implementation: Choice = None,
) -> tuple[Float[Array, "B T K V"], LinearState]:
    """avg in causal order: linear attention in which all tokens are alike. Padded ones are 0 and count."""
    ones = jnp.ones_like(value[..., :1])
    return linear_attention(
        ones,
        ones,
        value,
        normalize=True,
        eps=0.0,
        segment_ids=segment_ids,
        initial_state=state,
        return_state=True,
        implementation=implementation,
    )


def estimated_average(
    value: Float[Array, "B T K V"], probabilities: Float[Array, "B N T L"], reach: Reach
) -> Float[Array, "B 1 N V"]:
    """avg without an order; padded rows are 0 in `probabilities` and count in their mean."""
    one = Reach(reach.number, reach.first[:, :1], reach.width[:, :1], reach.start[:, :1])
    weights = sea_interpolate(jnp.mean(probabilities, axis=2, keepdims=True), one, 0.0)[:, :, 0]
    grouped = weights.reshape(weights.shape[0], value.shape[2], -1, weights.shape[-1])
    out = jnp.einsum("bkgs,bskv->bkgv", grouped, value)
    return out.reshape(out.shape[0], 1, weights.shape[1], -1)


def mix(
    sparse: Float[Array, "B T N V"],
    average: Float[Array, "B rows M V"],
    encoding: Float[Array, "B T N D"],
    params: SEAParams,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N 2"]]:
    """o, and s; an average for every key head serves its query heads."""
    logits = encoding @ params.gates.kernel + params.gates.bias
    gates = jax.nn.sigmoid(logits)
    of_sparse, whole = gates[..., :1], gates[..., 1:]
    shape = (*sparse.shape[:2], average.shape[2], -1)
    rest = (1 - whole).reshape(*shape, 1) * average[:, :, :, None]
    return whole * of_sparse * sparse + rest.reshape(sparse.shape), logits


def token_reach(
    keep: Bool[Array, "B T"] | None, like: Array, *, is_causal: bool, segment_ids: Int[Array, "B T"] | None = None
) -> Reach:
    """Which keys the rows of a whole sequence see."""
    if is_causal:
        return causal_reach(keep, positions_in_segments(segment_ids, like))
    return two_way_reach(jnp.ones(like.shape[:2], bool) if keep is None else keep)


def positions_in_segments(segment_ids: Int[Array, "B T"] | None, like: Array) -> Int[Array, "B T"]:
    """The place of every token in its own sequence, from 0."""
    # Zeros made from an operand lie on a mesh as it does.
    index = jnp.zeros_like(like[:, :, 0, 0], dtype=jnp.int32) + jnp.arange(like.shape[1], dtype=jnp.int32)
    if segment_ids is None:
        return index
    starts = arguments.segment_starts(jnp.asarray(segment_ids), like)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def check_inputs(query: Any, key: Any, value: Any, params: Any, is_causal: Any) -> dict[str, int]:
    arguments.check_arrays(query=query, key=key, value=value)
    sizes = checks.bind_shapes(("query", query, "B T N H"), ("key", key, "B T K H"), ("value", value, "B T K V"))
    checks.check_floating(query=query)
    checks.check_same_dtype(query=query, key=key, value=value)
    checks.check_grouped_heads(sizes["N"], sizes["K"])
    checks.check_no_empty(sizes, "BTNHV")
    checks.check_flags(is_causal=is_causal)
    return check_params(params, sizes, is_causal)


def widened(
    query: Array, key: Array, value: Array, params: SEAParams, keep: Array | None, scale: float
) -> tuple[Array, Array, Array, SEAParams]:
    """What the estimate is made from: in the accumulator dtype, values of padded tokens 0."""
    accumulator = checks.accumulator_dtype(query.dtype)
    query, key, value, params = jax.tree.map(lambda x: jnp.asarray(x, accumulator), (query, key, value, params))
    if keep is not None:
        value = jnp.where(keep[:, :, None, None], value, 0)
    return scale * query, key, value, params


_IMPLEMENTATIONS = (
    Implementation("xla", gathered_attention, check_gathered),
    Implementation("reference", dense_attention),
)
