"""How much pairs of blocks matter to PSA, estimated from few logits (Li et al. 2025, Pyramid Sparse Attention).

With logits z_ts = scale <q_t, k_s>, an importance I_ij of query block i and key block j, in one of two ways:

    sampling:      over some tokens t of block i and s of block j, R_tj = max_s z_ts and M_t = max_j R_tj,
                   I_ij = max_t exp(R_tj - M_t) / sum_j (the same)
    antidiagonal:  over strides u and v of w tokens, P = softmax_v( sum_{a < w} z_{u w + w - 1 - a, v w + a} / w ),
                   I_ij = sum of P_uv over the strides u of block i and v of block j

Either goes through the query blocks one by one, so that no array has T x S entries, and is a constant of derivatives.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jattn.checks import (
    accumulator_dtype,
    bind_shapes,
    check_causal_lengths,
    check_count,
    check_flags,
    check_floating,
    check_grouped_heads,
    check_integer,
    check_no_empty,
    check_same_dtype,
    check_values,
)
from jattn.dispatch import over_mesh
from jattn.dot_product import make_score

Sampled = tuple[Int[Array, "B N mq"], Int[Array, "B K mk"]]


def psa_importance_sampling(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    *,
    rng: Key[Array, ""] | None = None,
    sampled: Sampled | None = None,
    block_q: int = 128,
    block_kv: int = 128,
    scale: float | None = None,
) -> Float[Array, "B N nq nk"]:
    """PSA's importance for video generation: from a quarter of the queries and a quarter of the keys, drawn at random.

    Positions within a block are drawn without replacement, the same for all blocks of a batch row and head. A last
    block that is short has its last token again in the places that it lacks. The paper writes a maximum of attention
    probabilities; this is the released code's, which divides by the largest weight of a row instead of by their sum.

    Args:
      query, key: `[B, T, N, H]` and `[B, S, K, H]`; query head n reads key head `n // (N // K)`.
      rng: what positions are drawn with, `max(1, block // 4)` of a block; `None` if they are given.
      sampled: `(query positions [B, N, mq], key positions [B, K, mk])` within a block, from 0 to its size - 1.
      block_q, block_kv: tokens of a block.
      scale: of the logits; `None` is `H ** -0.5`.

    Returns:
      In float32 (float64 for float64); rows sum to 1. Memory is that of one row of blocks at a time, `mq S / 4`.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; nothing to draw with, or both a key and positions.
    """
    sizes = _check_query_key(query, key)
    blocks = check_count("block_q", block_q), check_count("block_kv", block_kv)
    score = make_score(scale, None, sizes["H"])
    return _sampling(query, key, _positions(rng, sampled, sizes, blocks), blocks=blocks, scale=score.scale)


def psa_importance_antidiagonal(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    *,
    stride: int = 16,
    is_causal: bool = False,
    block_q: int = 128,
    block_kv: int = 128,
    scale: float | None = None,
) -> Float[Array, "B N nq nk"]:
    """PSA's importance for video understanding: sums of antidiagonals of the logits, as in XAttention (Xu et al. 2025).

    The released code works through chunks, and masks too much where the length is a multiple of one; this does not.

    Args:
      query, key: `[B, T, N, H]` and `[B, S, K, H]`; query head n reads key head `n // (N // K)`.
      stride: w, a divisor of both blocks; takes T S / w products of vectors of H. A last stride that is short is filled
        up with zeros.
      is_causal: for T = S; a stride sees those up to its own.
      block_q, block_kv: tokens of a block.
      scale: of the logits, which are divided by w besides; `None` is `H ** -0.5`.

    Returns:
      In float32 (float64 for float64); a row sums to how many strides of queries its block has. Memory is that of one
      row of blocks at a time, `block_q S / w^2`.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a stride that does not divide a block.
    """
    sizes = _check_query_key(query, key)
    check_flags(is_causal=is_causal)
    if is_causal:
        check_causal_lengths(sizes["T"], sizes["S"])
    check_count("stride", stride)
    for name, block in (("block_q", block_q), ("block_kv", block_kv)):
        if check_count(name, block) % stride:
            raise ValueError(f"stride: expected a divisor of {name} = {block}, got {stride}")
    score = make_score(scale, None, sizes["H"])
    return _antidiagonal(
        query, key, blocks=(block_q, block_kv), stride=int(stride), scale=score.scale, is_causal=bool(is_causal)
    )


def psa_similarity(key: Float[Array, "B S K H"], block_kv: int = 128) -> Float[Array, "B K nk 3"]:
    """How alike the tokens of a key block are that levels 2, 4 and 8 would merge: the mean of their cosines.

    Of tokens 0 and 1 in each pair, 0 and 3 in each four, 0 and 7 in each eight. A last block that is short has its last
    token again in the places that it lacks.

    Raises:
      ValueError, TypeError: a wrong shape or dtype; a block that is not a multiple of 8.
    """
    sizes = bind_shapes(("key", key, "B S K H"))
    check_floating(key=key)
    check_no_empty(sizes, "BSKH")
    check_pooled_block(block_kv)
    return _similarity(jnp.asarray(key), block_kv=int(block_kv))


def _positions(rng: Any, sampled: Any, sizes: dict[str, int], blocks: tuple[int, int]) -> Any:
    """Where in a block samples are: as given, or drawn."""
    if (rng is None) == (sampled is None):
        raise ValueError(
            "rng: expected a jax.random.key to draw positions with, or the positions as sampled=, not both"
        )
    if sampled is None:
        if not isinstance(rng, jax.Array) or not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
            raise TypeError(f"rng: expected a jax.random.key(...), got {type(rng).__name__}")
        if rng.shape != ():
            raise ValueError(f"rng: expected one key, got shape {tuple(rng.shape)}")
        drawn = []
        for key, heads, block in zip(jax.random.split(rng), (sizes["N"], sizes["K"]), blocks, strict=True):
            order = jnp.argsort(jax.random.uniform(key, (sizes["B"], heads, block)), axis=-1)
            drawn.append(order[..., : max(1, block // 4)])
        return tuple(drawn)
    if not isinstance(sampled, (tuple, list)) or len(sampled) != 2:
        raise TypeError(
            f"sampled: expected (query positions [B, N, mq], key positions [B, K, mk]), got {type(sampled).__name__}"
        )
    for i, (array, letter, block) in enumerate(zip(sampled, "NK", blocks, strict=True)):
        name = f"sampled[{i}]"
        bind_shapes((name, array, f"B {letter} m"), B=sizes["B"], **{letter: sizes[letter]})
        check_integer(**{name: array})
        if array.shape[2] == 0:
            raise ValueError(f"{name}: expected at least one position, got shape {tuple(array.shape)}")
        outside = functools.partial(_outside, block)
        check_values(name, array, outside, f"expected positions within a block, 0 to {block - 1}")
    return tuple(sampled)


def _outside(size: int, x: Any) -> Any:
    return (x < 0) | (x >= size)


@functools.partial(jax.jit, static_argnames=("blocks", "scale"))
def _sampling(query: Array, key: Array, positions: Any, *, blocks: tuple[int, int], scale: float) -> Array:
    run = functools.partial(_sampled_rows, blocks, scale)
    return over_mesh(run, heads_of(query), *jax.lax.stop_gradient((query, key)), positions)


def _sampled_rows(blocks: tuple[int, int], scale: float, query: Array, key: Array, positions: Any) -> Array:
    acc = accumulator_dtype(query.dtype)
    (q_at, kv_at), (kv_heads, heads) = positions, (key.shape[2], query.shape[2])
    queries = _picked(query, q_at, blocks[0])
    keys = _picked(key, kv_at, blocks[1])

    def row(q: Float[Array, "B m N H"]) -> Float[Array, "B N nk"]:
        q = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, -1)
        logits = jnp.einsum("bmkgh,bjckh->bkgmjc", q, keys, preferred_element_type=acc) * scale
        best = jnp.max(logits, axis=-1)
        weights = jnp.max(jnp.exp(best - jnp.max(best, axis=-1, keepdims=True)), axis=3)
        return (weights / jnp.sum(weights, axis=-1, keepdims=True)).reshape(q.shape[0], heads, -1)

    return jnp.moveaxis(jax.lax.map(row, jnp.moveaxis(queries, 1, 0)), 0, 2)


def _picked(x: Float[Array, "B L N H"], at: Int[Array, "B N m"], block: int) -> Float[Array, "B n m N H"]:
    """The tokens at some places of every block."""
    first = np.arange(0, x.shape[1], block)
    idx = jnp.minimum(first[:, None] + at[:, :, None], x.shape[1] - 1)
    idx = jnp.moveaxis(idx.reshape(*at.shape[:2], -1), 1, 2)
    picked = jnp.take_along_axis(x, idx[..., None], axis=1)
    return picked.reshape(x.shape[0], len(first), -1, *x.shape[2:])


@functools.partial(jax.jit, static_argnames=("blocks", "stride", "scale", "is_causal"))
def _antidiagonal(
    query: Array, key: Array, *, blocks: tuple[int, int], stride: int, scale: float, is_causal: bool
) -> Array:
    run = functools.partial(_antidiagonal_rows, blocks, stride, scale, is_causal)
    return over_mesh(run, heads_of(query), *jax.lax.stop_gradient((query, key)))


def _antidiagonal_rows(
    blocks: tuple[int, int], stride: int, scale: float, is_causal: bool, query: Array, key: Array
) -> Array:
    acc = accumulator_dtype(query.dtype)
    q_len, kv_len, heads, kv_heads = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
    queries = _strides(query, blocks[0], stride)[:, :, :, ::-1]
    keys = _strides(key, blocks[1], stride)
    keys = keys.reshape(key.shape[0], -1, *keys.shape[3:])  # [B, v, w, K, H]
    v = np.arange(keys.shape[1])

    def row(block: Any) -> Float[Array, "B N nk"]:
        q, u = block  # [B, c, w, N, H], [c]
        q = q.reshape(*q.shape[:3], kv_heads, heads // kv_heads, -1)
        logits = jnp.einsum("bcwkgh,bvwkh->bkgcv", q, keys, preferred_element_type=acc) * (scale / stride)
        seen = v * stride < kv_len
        if is_causal:
            seen = seen & (v <= u[:, None])
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        weights = jnp.where((u * stride < q_len)[:, None], weights, 0)
        sums = weights.sum(axis=3).reshape(*weights.shape[:3], -1, blocks[1] // stride).sum(axis=-1)
        return sums.reshape(q.shape[0], heads, -1)

    rows = jnp.arange(queries.shape[1] * queries.shape[2]).reshape(queries.shape[1], -1)
    return jnp.moveaxis(jax.lax.map(row, (jnp.moveaxis(queries, 1, 0), rows)), 0, 2)


def _strides(x: Float[Array, "B L N H"], block: int, stride: int) -> Float[Array, "B n c w N H"]:
    """Strides in blocks, filled up with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)])
    return x.reshape(x.shape[0], -1, block // stride, stride, *x.shape[2:])


def pad_blocks(x: Float[Array, "B L N H"], block: int) -> Float[Array, "B n_block N H"]:
    """With the last token again, up to a whole number of blocks."""
    return jnp.concatenate([x, jnp.repeat(x[:, -1:], -x.shape[1] % block, axis=1)], axis=1)


@functools.partial(jax.jit, static_argnames="block_kv")
def _similarity(key: Array, *, block_kv: int) -> Array:
    return over_mesh(functools.partial(_cosines, block_kv), heads_of(key), jax.lax.stop_gradient(key))


def _cosines(block_kv: int, key: Array) -> Array:
    x = pad_blocks(key, block_kv)
    x = x.astype(accumulator_dtype(x.dtype))
    length = jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True))
    x = x / jnp.where(length > 0, length, 1)
    similar = []
    for level in (2, 4, 8):
        groups = x.reshape(x.shape[0], -1, level, *x.shape[2:])
        cosine = jnp.sum(groups[:, :, 0] * groups[:, :, -1], axis=-1)
        similar.append(cosine.reshape(x.shape[0], -1, block_kv // level, x.shape[2]).mean(axis=2))
    return jnp.moveaxis(jnp.stack(similar, axis=-1), 1, 2)


def _check_query_key(query: Any, key: Any) -> dict[str, int]:
    sizes = bind_shapes(("query", query, "B T N H"), ("key", key, "B S K H"))
    check_floating(query=query)
    check_same_dtype(query=query, key=key)
    check_no_empty(sizes, "BTSNKH")
    check_grouped_heads(sizes["N"], sizes["K"])
    return sizes


def heads_of(x: Array) -> P:
    """Where the batch and the heads of `[B, L, N, H]` are, for an array that begins with these two."""
    spec = jax.typeof(x).sharding.spec
    return P(spec[0], spec[2])


def check_pooled_block(block_kv: Any) -> None:
    if check_count("block_kv", block_kv) % 8:
        raise ValueError(f"block_kv: expected a multiple of 8, the most tokens that are pooled, got {block_kv}")
