"""Which blocks of keys a block of queries, or a single query, is to see, chosen from the data.

With the means q_i of query blocks and k_j of key blocks (over the tokens that they have) and r = 1 / sqrt(H), the score
of a pair is r <q_i, k_j>. A row of scores becomes a choice by

    top k:      the k largest, without those that are -inf
    top cdf:    in descending order of p = softmax(scores), as many as have a cumulated p of at most tau, at least one

and a choice becomes a `BlockMask` for `block_sparse_attention`. The ready ones are SpargeAttn (Zhang et al. 2025), the
selected branch of NSA (Yuan et al. 2025), MoBA (Lu et al. 2025) and the vertical-slash and block forms of MInference
(Jiang et al. 2024); its A shape is the symbolic mask `Causal() & (SlidingWindow(w) | Sink(n))`. A choice has no
gradient. Positions start at 0 for queries and keys alike.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from jattn.checks import (
    accumulator_dtype,
    bind_shapes,
    check_array,
    check_count,
    check_floating,
    check_grouped_heads,
    check_no_empty,
    check_same_dtype,
)
from jattn.masks import EMPTY, Causal, Full, Mask
from jattn.sparse.block_mask import BlockMask, check_static, listed_kinds


def pool_blocks(x: Float[Array, "B L N H"], block: int) -> Float[Array, "B n N H"]:
    """The mean of every block of `block` tokens, over the tokens that it has, in the accumulator dtype.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or block.
    """
    bind_shapes(("x", x, "B L N H"))
    check_floating(x=x)
    check_count("block", block)
    sums = _blocks(x.astype(accumulator_dtype(x.dtype)), block).sum(axis=2)
    return sums / _tokens(x.shape[1], block)[:, None, None]


def select_topk(
    scores: Float[Array, "*lists nq nk"], k: int
) -> tuple[Int32[Array, "*lists nq k"], Int32[Array, "*lists nq"]]:
    """The k largest scores of each row, for `BlockMask.from_indices(idx, ..., num=num)`.

    Returns:
      `idx`, in descending order of score (the first of equal ones first), and `num`, how many of its k slots hold a
      choice: a score of -inf is none.

    Raises:
      ValueError, TypeError: no scores, or k that is not from 1 to nk.
    """
    _check_scores(scores)
    if check_count("k", k) > scores.shape[-1]:
        raise ValueError(f"k: expected at most the {scores.shape[-1]} blocks that there are, got {k}")
    best, idx = jax.lax.top_k(jax.lax.stop_gradient(scores), k)
    return idx.astype(np.int32), jnp.sum(best > -jnp.inf, axis=-1, dtype=np.int32)


def select_topcdf(scores: Float[Array, "*lists nq nk"], tau: float) -> Bool[Array, "*lists nq nk"]:
    """The likeliest blocks of each row, as many as have a cumulated softmax of at most tau, and at least one.

    A score of -inf is never chosen.

    Raises:
      ValueError, TypeError: no scores, or tau that is not from 0 to 1.
    """
    _check_scores(scores)
    if not isinstance(tau, (int, float, np.number)) or isinstance(tau, bool) or not 0 <= tau <= 1:
        raise ValueError(f"tau: expected a number from 0 to 1, got {tau!r}")
    scores = jax.lax.stop_gradient(scores).astype(accumulator_dtype(scores.dtype))
    possible = scores > -jnp.inf
    best = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - best)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)
    order = jnp.argsort(-scores, axis=-1, stable=True)
    cumulated = jnp.cumsum(jnp.take_along_axis(weights / total, order, axis=-1), axis=-1)
    taken = (jnp.minimum(cumulated, 1) <= tau).at[..., 0].set(True)
    rank = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(taken, rank, axis=-1) & possible


def sparge_selection(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    *,
    tau: float = 0.9,
    similarity: float = 0.1,
    mask: Mask | None = None,
    first_block: bool = False,
    block_q: int = 128,
    block_kv: int = 64,
) -> BlockMask:
    """SpargeAttn's prediction: top cdf over scores of means, where a mean says something about its block.

    A block is like itself when the mean of the cosines of all pairs of its tokens is above `similarity`. Key blocks
    that are not are seen by all, and query blocks that are not see all.

    Args:
      mask: what is seen in a chosen block; blocks that it leaves empty have no share in the softmax. `None` is all.
      first_block: choose the first key block too.

    Returns:
      A dynamic mask with lists for each batch row and query head.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option.
    """
    query, key = _checked(query, key)
    lengths = query.shape[1], key.shape[1]
    kinds = _kinds(mask, *lengths, block_q, block_kv)
    q_alike = jnp.moveaxis(_self_similarity(query, block_q) > similarity, 2, 1)
    kv_alike = jnp.moveaxis(_self_similarity(key, block_kv) > similarity, 2, 1)
    kv_alike = jnp.repeat(kv_alike, query.shape[2] // key.shape[2], axis=1)
    scores = _pooled_scores(query, key, block_q, block_kv)
    scores = jnp.where(kv_alike[:, :, None] & (kinds != EMPTY), scores, -jnp.inf)
    chosen = select_topcdf(scores, tau) | ~q_alike[..., None] | ~kv_alike[:, :, None]
    if first_block:
        chosen = chosen.at[..., 0].set(True)
    return _from_chosen(chosen, mask, *lengths, block_q, block_kv)


def block_topk_selection(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    *,
    k: int,
    mask: Mask | None = None,
    block_q: int = 64,
    block_kv: int = 64,
) -> BlockMask:
    """MInference's block form: the top k key blocks of each query block by the scores of their means.

    Arguments, result and errors are those of `sparge_selection`; k is at most the number of key blocks.
    """
    query, key = _checked(query, key)
    lengths = query.shape[1], key.shape[1]
    seen = _kinds(mask, *lengths, block_q, block_kv) != EMPTY
    idx, num = select_topk(jnp.where(seen, _pooled_scores(query, key, block_q, block_kv), -jnp.inf), k)
    return BlockMask.from_indices(idx, *lengths, block_q, block_kv, num=num, mask=mask)


def vertical_slash_selection(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    *,
    columns: int,
    diagonals: int,
    last: int = 64,
    block_q: int = 64,
    block_kv: int = 64,
) -> BlockMask:
    """MInference's vertical-slash form: blocks with a strong column or diagonal of the last queries' causal attention.

    The probabilities of the last queries, summed along a column (a key) and along a diagonal (a distance t - s), say
    which `columns` keys and which `diagonals` distances matter; a block is chosen when it has one of either in it.

    Returns:
      A dynamic causal mask with lists for each batch row and query head.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option, or another number of keys than of queries.
    """
    query, key = _checked(query, key)
    bind_shapes(("query", query, "B T N H"), ("key", key, "B T K H"))
    length = query.shape[1]
    last = min(check_count("last", last), length)
    for name, count in (("columns", columns), ("diagonals", diagonals)):
        if check_count(name, count) > length:
            raise ValueError(f"{name}: expected at most the length {length}, got {count}")
    t, s = np.arange(length - last, length)[:, None], np.arange(length)
    logits = jnp.where(s <= t, _products(query[:, -last:], key), -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)  # [B, N, last, T]
    by_distance = jnp.zeros((*weights.shape[:2], length), weights.dtype)
    by_distance = by_distance.at[..., np.maximum(t - s, 0)].add(weights)  # of later keys the weight is 0
    strong_keys = _marked(weights.sum(axis=2), columns)
    strong_distances = _marked(by_distance, diagonals)
    nq, nk = math.ceil(length / block_q), math.ceil(length / block_kv)
    in_column = _blocks(strong_keys[..., None], block_kv, axis=2)[..., 0].any(axis=-1)
    before = jnp.pad(jnp.cumsum(strong_distances, axis=-1), ((0, 0), (0, 0), (1, 0)))  # how many are smaller
    nearest = np.arange(nq)[:, None] * block_q - (np.arange(nk) + 1) * block_kv + 1
    farthest = (np.arange(nq)[:, None] + 1) * block_q - np.arange(nk) * block_kv
    crossed = before[..., np.clip(farthest, 0, length)] > before[..., np.clip(nearest, 0, length)]
    return _from_chosen(crossed | in_column[:, :, None], Causal(), length, length, block_q, block_kv)


def nsa_selection(
    query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], *, k: int = 16, block: int = 64
) -> BlockMask:
    """The selected branch of NSA: each query sees, causally, the k blocks that matter most to the heads of its group.

    The importance of a block is the sum over the query heads of a key head of softmax(r <q_t, k_j>) over the blocks
    that have ended by t; the first block, that of the query and the one before count 1 for each head.

    Returns:
      A dynamic causal mask with query blocks of one token and lists for each batch row and key head. Choosing takes
      O(T^2 / block) memory.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option, or another number of keys than of queries.
    """
    query, key = _checked(query, key)
    bind_shapes(("query", query, "B T N H"), ("key", key, "B T K H"))
    batch, length, heads, _ = query.shape
    kv_heads = key.shape[2]
    scores = _products(query, pool_blocks(key, block)).reshape(batch, kv_heads, heads // kv_heads, length, -1)
    t, j = np.arange(length)[:, None], np.arange(scores.shape[-1])
    ended, own = (j + 1) * block <= t + 1, t // block
    shifted = jnp.where(ended, scores - jnp.max(jnp.where(ended, scores, -jnp.inf), axis=-1, keepdims=True), -jnp.inf)
    weights = jnp.where(ended, jnp.exp(shifted), 0)
    weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1)
    importance = jnp.where((j == 0) | (j == own) | (j == own - 1), 1, weights).sum(axis=2)
    importance = jnp.where(j <= own, importance, -jnp.inf)
    idx, num = select_topk(importance, min(check_count("k", k), len(j)))
    return BlockMask.from_indices(idx, length, length, 1, block, num=num, mask=Causal())


def moba_selection(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], *, k: int, block: int) -> BlockMask:
    """MoBA: each query of each head sees the k earlier blocks with the largest <q_t, k_j>, and its own up to itself.

    Returns:
      A dynamic causal mask with query blocks of one token and lists for each batch row and query head. Choosing takes
      O(T^2 / block) memory.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option, or another number of keys than of queries.
    """
    query, key = _checked(query, key)
    bind_shapes(("query", query, "B T N H"), ("key", key, "B T K H"))
    length = query.shape[1]
    scores = _products(query, pool_blocks(key, block))
    j, own = np.arange(scores.shape[-1]), np.arange(length)[:, None] // block
    scores = jnp.where(j == own, jnp.inf, jnp.where(j < own, scores, -jnp.inf))
    idx, num = select_topk(scores, min(check_count("k", k, minimum=0) + 1, len(j)))
    return BlockMask.from_indices(idx, length, length, 1, block, num=num, mask=Causal())


def _checked(query: Any, key: Any) -> tuple[Array, Array]:
    """Queries and keys that fit together, cut off from derivatives."""
    sizes = bind_shapes(("query", query, "B T N H"), ("key", key, "B S K H"))
    check_floating(query=query)
    check_same_dtype(query=query, key=key)
    check_no_empty(sizes, "BTSNKH")
    check_grouped_heads(sizes["N"], sizes["K"])
    return jax.lax.stop_gradient(jnp.asarray(query)), jax.lax.stop_gradient(jnp.asarray(key))


def _check_scores(scores: Any) -> None:
    check_array("scores", scores)
    check_floating(scores=scores)
    if scores.ndim < 2 or 0 in scores.shape:
        raise ValueError(f"scores: expected [..., nq, nk], got {tuple(scores.shape)}")


def _kinds(mask: Mask | None, q_len: int, kv_len: int, block_q: int, block_kv: int) -> np.ndarray:
    if mask is not None:
        check_static("mask", mask)
    return (Full() if mask is None else mask).block_kinds(q_len, kv_len, block_q, block_kv)


def _from_chosen(
    chosen: Bool[Array, "B N nq nk"], mask: Mask | None, q_len: int, kv_len: int, block_q: int, block_kv: int
) -> BlockMask:
    kind = listed_kinds(chosen, mask, q_len, kv_len, block_q, block_kv)
    return BlockMask.from_map(kind, q_len, kv_len, block_q, block_kv, mask=mask)


def _products(query: Float[Array, "B T N H"], key: Float[Array, "B n K H"]) -> Float[Array, "B N T n"]:
    """r <q, k> in the accumulator dtype."""
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    acc = accumulator_dtype(query.dtype)
    products = jnp.einsum("btkgh,bnkh->bkgtn", grouped, key, preferred_element_type=acc) * dim**-0.5
    return products.reshape(batch, heads, length, -1)


def _pooled_scores(query: Array, key: Array, block_q: int, block_kv: int) -> Float[Array, "B N nq nk"]:
    return _products(pool_blocks(query, block_q), pool_blocks(key, block_kv))


def _self_similarity(x: Float[Array, "B L N H"], block: int) -> Float[Array, "B n N"]:
    """The mean cosine of all pairs of a block's tokens: the squared length of the mean of its unit vectors."""
    x = x.astype(accumulator_dtype(x.dtype))
    length = jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True))
    return jnp.sum(pool_blocks(x / jnp.where(length > 0, length, 1), block) ** 2, axis=-1)


def _marked(scores: Float[Array, "B N L"], count: int) -> Bool[Array, "B N L"]:
    """Where the `count` largest are."""
    _, idx = jax.lax.top_k(scores, count)
    return jnp.put_along_axis(jnp.zeros(scores.shape, bool), idx, True, axis=-1, inplace=False)


def _blocks(x: Array, block: int, axis: int = 1) -> Array:
    """An axis of length L as two, `[ceil(L / block), block]`, filled up with zeros."""
    beyond = -x.shape[axis] % block
    x = jnp.pad(x, [(0, beyond if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])


def _tokens(length: int, block: int) -> np.ndarray:
    """How many tokens each block has."""
    first = np.arange(0, length, block)
    return np.minimum(first + block, length) - first
