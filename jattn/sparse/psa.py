"""PSA, Pyramid Sparse Attention: each block of keys is read whole, as means of 2, 4 or 8 tokens, or not at all.

Keys and values have pyramids, x^1 = x and x^{2r} = the means of adjacent pairs of x^r (Li et al. 2025, section 3.2;
released code: src/psa_triton/kernels/psa_kernel_legacy.py). A level r = lev_ij in {0, 1, 2, 4, 8} says how query block
i reads key block j: query t of it attends to the block's means u at level r, each of which weighs as r tokens,

    z_tu = scale <q_t, k^r_u> + log r        lse_t = log sum_u exp(z_tu)        o_t = sum_u exp(z_tu - lse_t) v^r_u

in one softmax over all of its blocks, but for those of level 0. Causal: mean u is seen from its last token on, where
(u + 1) r - 1 <= t. A key sequence that ends within a block goes on with its last token, in means only.

So PSA is block-sparse attention over the four levels one after the other, 1.875 tokens for each of the keys', in tiles
of block_kv / 8: level r of a block is 8 / r of them. A pair of blocks costs block_q block_kv / r products.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jattn.checks import (
    accumulator_dtype,
    bind_shapes,
    check_causal_lengths,
    check_choice,
    check_count,
    check_flags,
    check_floating,
    check_integer,
    check_no_empty,
    check_values,
)
from jattn.dispatch import Choice, over_mesh
from jattn.dot_product import check_query_key_value, make_score
from jattn.masks import EMPTY, FULL, PARTIAL, Mask
from jattn.sparse.block_mask import BlockMask, listed_kinds
from jattn.sparse.block_sparse import block_sparse_attention
from jattn.sparse.psa_importance import (
    Sampled,
    check_pooled_block,
    pad_blocks,
    psa_importance_antidiagonal,
    psa_importance_sampling,
)
from jattn.sparse.psa_levels import LEVELS, Ratios, Rule, pair_kinds, psa_levels, psa_similarity_cap


def pyramid_sparse_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    importance: Literal["antidiagonal", "sampling"] = "antidiagonal",
    rule: Rule | None = None,
    mask_ratios: Ratios | None = None,
    is_causal: bool = False,
    block_q: int = 128,
    block_kv: int = 128,
    tile: int | None = None,
    text_length: int = 0,
    similarity: tuple[float, float, float] | None = None,
    stride: int = 16,
    rng: Key[Array, ""] | None = None,
    sampled: Sampled | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Choice = None,
) -> Any:
    """`psa_attention` at levels that are chosen from queries and keys (Li et al. 2025, section 3.3).

    Tokens of pictures and videos are best put in the order of `gilbert_order` before, so that what is pooled is alike.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; query head n reads key head `n // (N // K)`.
      value: `[B, S, K, V]`.
      importance: "antidiagonal" (released for video understanding, `psa_importance_antidiagonal`) or, for what is not
        causal, "sampling" (released for video generation, `psa_importance_sampling`).
      rule, mask_ratios, tile, text_length: of `psa_levels`. With the default rule every query sees something; with
        "topk" short sequences may have no block to read, and give 0.
      is_causal: for T = S. Gradients, keys and values of later blocks never reach an output; the tokens of a query's
        own block choose together what that block reads of earlier ones, here as in the released code.
      block_q, block_kv: tokens of a block; `block_kv` is a multiple of 8.
      similarity: the thresholds of `psa_similarity_cap`, which keeps blocks of unlike tokens from coarse levels; `None`
        has no such cap.
      stride: of "antidiagonal"; a divisor of both blocks.
      rng, sampled: of "sampling": a `jax.random.key`, or the positions within blocks; one of them.
      scale: of the logits; `None` is `H ** -0.5`.
      return_lse: return `(out, lse)`.
      implementation: as in `psa_attention`.

    Returns:
      As `psa_attention`. Gradients reach query, key and value; levels are constants.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option.
    """
    check_query_key_value(query, key, value)
    check_flags(is_causal=is_causal, return_lse=return_lse)
    check_choice("importance", importance, ("antidiagonal", "sampling"))
    check_pooled_block(block_kv)
    blocks: dict[str, Any] = {"block_q": block_q, "block_kv": block_kv}
    if importance == "sampling":
        if is_causal:
            raise ValueError("importance: 'sampling' looks at later keys; with is_causal=True pass 'antidiagonal'")
        scores = psa_importance_sampling(query, key, rng=rng, sampled=sampled, scale=scale, **blocks)
    else:
        for name, given in (("rng", rng), ("sampled", sampled)):
            if given is not None:
                raise ValueError(f"{name}: importance='antidiagonal' draws nothing; pass importance='sampling'")
        scores = psa_importance_antidiagonal(query, key, stride=stride, is_causal=is_causal, scale=scale, **blocks)
    levels = psa_levels(
        scores, rule=rule, mask_ratios=mask_ratios, is_causal=is_causal, tile=tile, text_length=text_length, **blocks
    )
    if similarity is not None:
        levels = _capped(levels, psa_similarity_cap(key, block_kv, similarity))
    return psa_attention(
        query, key, value, levels, is_causal=is_causal, scale=scale, return_lse=return_lse,
        implementation=implementation, **blocks,
    )  # fmt: skip


def psa_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    levels: Int[Array, "B N nq nk"],
    *,
    is_causal: bool = False,
    block_q: int = 128,
    block_kv: int = 128,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Choice = None,
) -> Any:
    """Attention to pyramids of keys and values at given levels; see the module.

    Differs from the released kernels: rows of which all levels are 0 give 0 instead of NaN, and level r works with any
    block (the newer kernel reads wrong keys where `block_kv / r` is less than half a tile). Keys at level 1 never
    include the repeated last token, as there; means do.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; query head n reads key head `n // (N // K)`.
      value: `[B, S, K, V]`.
      levels: 0, 1, 2, 4 or 8 for each pair of the `ceil(T / block_q)` and `ceil(S / block_kv)` blocks.
      is_causal: for T = S. Pairs of blocks with keys that only some of the queries may see must have level 1; while
        `levels` is traced this is not checked, and queries then see of such a block the means that have ended. Pairs of
        later keys may have any level, for there is nothing to see.
      block_q, block_kv: tokens of a block; `block_kv` is a multiple of 8. Tiles are of `block_kv / 8` keys: on CPUs
        blocks of 128 and more are quick, and TPU kernels take multiples of 1024 (and of 128 for `block_q`).
      scale: of the logits; `None` is `H ** -0.5`.
      return_lse: return `(out, lse)`.
      implementation: as in `block_sparse_attention`.

    Returns:
      `out [B, T, N, V]` in the query's dtype; `lse [B, T, N]`, natural logarithm, in float32 (float64 for float64).
      Gradients reach query, key and value through both: a token gets 1 / r of the gradient of its mean. A row of which
      all levels are 0 gives 0, lse -inf and no gradient. Memory beyond the arguments is O(T + S) and that of lists of
      tiles, about 300 bytes for each pair of blocks, batch row and head.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a level that does not exist.
    """
    sizes = check_query_key_value(query, key, value)
    check_flags(is_causal=is_causal, return_lse=return_lse)
    if is_causal:
        check_causal_lengths(sizes["T"], sizes["S"])
    check_count("block_q", block_q)
    check_pooled_block(block_kv)
    nq, nk = math.ceil(sizes["T"] / block_q), math.ceil(sizes["S"] / block_kv)
    bind_shapes(("levels", levels, "B N nq nk"), B=sizes["B"], N=sizes["N"], nq=nq, nk=nk)
    check_integer(levels=levels)
    check_values("levels", levels, lambda x: ~np.isin(x, LEVELS), "expected 0 (left out), 1, 2, 4 or 8")
    if is_causal:
        whole = pair_kinds(nq, nk, block_q, block_kv) == PARTIAL
        check_values(
            "levels", levels, lambda x: whole & (x != 1),
            "expected 1 for blocks of keys that only some of the queries may see: is_causal=True pools nothing there",
        )  # fmt: skip
    make_score(scale, None, sizes["H"])
    query, key, value, levels = map(jnp.asarray, (query, key, value, levels))
    pyramid = _Pyramid(sizes["S"], nk * block_kv, bool(is_causal))
    lists = _lists(levels, pyramid=pyramid, q_len=sizes["T"], block_q=int(block_q), tile=block_kv // 8)
    attend = functools.partial(
        block_sparse_attention, score_mod=_WeighMeans(pyramid), scale=scale, return_lse=True,
        implementation=implementation,
    )  # fmt: skip
    rows = P(*jax.typeof(query).sharding.spec[:3])
    out, lse = over_mesh(
        attend, (rows, rows), query, build_pyramid(key, block_kv), build_pyramid(value, block_kv), lists
    )
    return (out, lse) if return_lse else out


def build_pyramid(x: Float[Array, "B S K H"], block_kv: int = 128) -> Float[Array, "B virtual K H"]:
    """Tokens and their means by 2, 4 and 8, one after the other: `1.875 ceil(S / block_kv) block_kv` tokens.

    A last block that is short has its last token again. Means are taken in float32 (float64 for float64).

    Raises:
      ValueError, TypeError: a wrong shape or dtype; a block that is not a multiple of 8.
    """
    sizes = bind_shapes(("x", x, "B S K H"))
    check_floating(x=x)
    check_no_empty(sizes, "BSKH")
    check_pooled_block(block_kv)
    return _pyramid(jnp.asarray(x), block_kv=int(block_kv))


@jax.jit
def _capped(levels: Array, cap: Int[Array, "B K nk"]) -> Array:
    def smaller(levels: Array, cap: Array) -> Array:
        return jnp.minimum(levels, jnp.repeat(cap, levels.shape[1] // cap.shape[1], axis=1)[:, :, None])

    return over_mesh(smaller, P(*jax.typeof(levels).sharding.spec[:2]), levels, cap)


@functools.partial(jax.jit, static_argnames="block_kv")
def _pyramid(x: Array, *, block_kv: int) -> Array:
    def levels(x: Array) -> Array:
        whole = pad_blocks(x, block_kv).astype(accumulator_dtype(x.dtype))
        means = [whole]
        for _ in LEVELS[2:]:
            means.append(means[-1].reshape(x.shape[0], -1, 2, *x.shape[2:]).mean(axis=2))
        return jnp.concatenate(means, axis=1).astype(x.dtype)

    spec = jax.typeof(x).sharding.spec
    return over_mesh(levels, P(spec[0], None, *spec[2:]), x)


@functools.partial(jax.jit, static_argnames=("pyramid", "q_len", "block_q", "tile"))
def _lists(levels: Array, *, pyramid: _Pyramid, q_len: int, block_q: int, tile: int) -> BlockMask:
    """Which tiles of the pyramid each block of queries visits."""

    def build(levels: Array) -> BlockMask:
        listed = [jnp.repeat(levels == level, 8 // level, axis=-1) for level in LEVELS[1:]]
        where = q_len, pyramid.length, block_q, tile
        kinds = listed_kinds(jnp.concatenate(listed, axis=-1), pyramid, *where)
        # A block is read at one level, which has 8 tiles at most.
        return BlockMask.from_map(kinds, *where, mask=pyramid, max_blocks=8 * levels.shape[-1])

    spec = jax.typeof(levels).sharding.spec
    return over_mesh(build, P(*spec[:2]), levels)


@dataclasses.dataclass(frozen=True, repr=False)
class _Pyramid(Mask):
    """Who sees which token of a pyramid over `kv_len` keys and their repeated last one, `padded` tokens in all."""

    kv_len: int
    padded: int
    is_causal: bool

    @property
    def length(self) -> int:
        return self.padded * 15 // 8

    def above(self, kv_pos: Any) -> tuple[Any, Any, Any]:
        """Whether a token is at level 2 or above, 4 or above, 8."""
        return kv_pos >= self.padded, kv_pos >= self.padded * 3 // 2, kv_pos >= self.padded * 7 // 4

    def level(self, kv_pos: Any) -> Any:
        pooled, fours, eights = self.above(kv_pos)
        return 1 + pooled * 1 + fours * 2 + eights * 4

    def last(self, kv_pos: Any) -> Any:
        """The position of the last key that a token is the mean of."""
        pooled, fours, eights = self.above(kv_pos)
        first = pooled * self.padded + fours * (self.padded // 2) + eights * (self.padded // 4)
        return (kv_pos - first + 1) * self.level(kv_pos) - 1

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        if self.is_causal:
            return self.last(kv_pos) <= q_pos
        return (kv_pos < self.kv_len + 0 * q_pos) | (kv_pos >= self.padded)

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        if self.is_causal:
            some, every = self.last(kv_lo) <= q_hi, self.last(kv_hi) <= q_lo
        else:
            some, every = self.elem(q_lo, kv_lo), self.elem(q_lo, kv_hi)
        kinds = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
        # Positions of two levels have no order in common.
        return np.where(self.level(kv_lo) == self.level(kv_hi), kinds, PARTIAL).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class _WeighMeans:
    """A score function that adds log r; equal ones share a compilation."""

    pyramid: _Pyramid

    def __call__(self, score: Array, b: Array, h: Array, q_pos: Array, kv_pos: Array) -> Array:
        pooled, fours, eights = self.pyramid.above(kv_pos)
        return score + (pooled.astype(score.dtype) + fours + eights) * math.log(2)
