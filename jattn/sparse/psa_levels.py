"""How finely PSA's query blocks read the key blocks, given how much each matters (Li et al. 2025).

Every row of an importance, in descending order, is cut into ranks that are read at level 1 (whole), 2, 4, 8 (means of
so many tokens) and 0 (not at all). With e the share of the row's sum that the first ranks have together:

    topk:            ranks up to a share of the row's blocks
    thresholdbound:  ranks up to the one with which e passes a bound
    energybound:     ranks with e between two bounds

A block of few means would leave a tile of a kernel half empty, so levels may be given to multiples of blocks, and a
block whose tokens are not alike may be kept from coarse levels. Levels are constants of derivatives.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Int32

from jattn.checks import (
    accumulator_dtype,
    check_array,
    check_choice,
    check_count,
    check_flags,
    check_floating,
    check_integer,
    check_values,
)
from jattn.dispatch import over_mesh
from jattn.masks import EMPTY, FULL, PARTIAL
from jattn.sparse.psa_importance import psa_similarity

LEVELS = (0, 1, 2, 4, 8)
Rule = Literal["topk", "thresholdbound", "energybound"]
Ratios = Mapping[int, tuple[float, float]]

TOPK_RATIOS: Ratios = MappingProxyType({1: (0.0, 0.1), 2: (0.1, 0.15), 4: (0.15, 0.15), 8: (0.15, 0.35)})
"""The released default of "topk"."""
BOUND_RATIOS: Ratios = MappingProxyType({1: (0.0, 0.4), 2: (0.4, 0.5), 4: (0.5, 0.6), 8: (0.6, 0.8)})
"""The released setting for Wan 2.1 14B, of "thresholdbound"."""


def psa_levels(
    scores: Float[Array, "*lists nq nk"],
    *,
    rule: Rule | None = None,
    mask_ratios: Ratios | None = None,
    is_causal: bool = False,
    block_q: int = 128,
    block_kv: int = 128,
    tile: int | None = None,
    text_length: int = 0,
    min_full_ratio: float = 0.06,
) -> Int32[Array, "*lists nq nk"]:
    """The level of every pair of blocks from an importance: 0 (left out), 1, 2, 4 or 8 (means of so many tokens).

    Args:
      scores: an importance, of at least 0. Of equal ones the first ranks first.
      rule: "topk" or, for what is not causal, "thresholdbound", for what is, "energybound". `None` is the latter two.
      mask_ratios: level -> (low, high). "topk": ranks up to `int(high nk)` that no earlier level has, in the order of
        the mapping; causal: ranks `int(low c)` to `int(high c)` of the row's c candidates. "thresholdbound": ranks up
        to and with the one whose e passes high, in the order of high (low is not read). "energybound": ranks with
        low < e <= high. `None` is `TOPK_RATIOS` or `BOUND_RATIOS`, the released presets.
      is_causal: blocks with later keys are left out, those with keys that only some of the queries may see, and the
        first block of keys, get level 1.
      block_q, block_kv: tokens of a block.
      tile: without `is_causal`, level r is given to a multiple of `ceil(r / (block_kv // tile))` blocks, rounded up,
        or down where there are no more blocks; their means then fill tiles of so many keys. At most `block_kv`; `None`
        is 32, or `block_kv` where that is less.
      text_length: so many last tokens are a text: their blocks of keys, if causal also those of queries, get level 1.
      min_full_ratio: "thresholdbound" gives level 1 to at least `int(min_full_ratio nk) + 1` blocks.

    Returns:
      Levels that carry no gradient.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option.
    """
    check_array("scores", scores)
    check_floating(scores=scores)
    if scores.ndim < 2 or 0 in scores.shape:
        raise ValueError(f"scores: expected [..., nq, nk], got {tuple(scores.shape)}")
    check_values("scores", scores, lambda x: x < 0, "expected an importance of at least 0, as psa_importance_* give")
    options = LevelOptions.checked(rule, mask_ratios, is_causal, block_q, block_kv, tile, text_length, min_full_ratio)
    nq, nk = scores.shape[-2:]
    for name, blocks, block in (("nq", nq, block_q), ("nk", nk, block_kv)):
        if text_length > blocks * block:
            raise ValueError(f"text_length: {name} = {blocks} blocks have {blocks * block} tokens, got {text_length}")
    return _levels(jnp.asarray(scores), options=options)


def psa_similarity_cap(
    key: Float[Array, "B S K H"], block_kv: int = 128, thresholds: tuple[float, float, float] = (0.7, 0.65, 0.6)
) -> Int32[Array, "B K nk"]:
    """The coarsest level that a key block may be read at: the largest whose similarity is above its threshold, or 1.

    The caller takes the minimum of this and of levels; a level of 0 stays 0. Defaults are the released ones for video;
    those for language models are (0.75, 0.7, 0.7).

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a block that is not a multiple of 8.
    """
    above = psa_similarity(key, block_kv) > np.array(_check_thresholds(thresholds))
    return jnp.max(jnp.where(above, np.array(LEVELS[2:], np.int32), 1), axis=-1)


def psa_density(levels: Int[Array, "*lists nq nk"]) -> Float[Array, ""]:
    """What is read, relative to all: the mean over the pairs of blocks of 1 / level, of 0 for level 0."""
    check_array("levels", levels)
    check_integer(levels=levels)
    return jnp.mean(jnp.where(levels > 0, 1 / jnp.maximum(levels, 1), 0))


@dataclasses.dataclass(frozen=True)
class LevelOptions:
    """The options of `psa_levels`, checked, hashable and with defaults filled in; a ratio is (level, low, high)."""

    rule: str
    ratios: tuple[tuple[int, float, float], ...]
    is_causal: bool
    block_q: int
    block_kv: int
    tile: int
    text_length: int
    min_full_ratio: float

    @classmethod
    def checked(
        cls, rule: Any, mask_ratios: Any, is_causal: Any, block_q: Any, block_kv: Any, tile: Any, text_length: Any,
        min_full_ratio: Any,
    ) -> LevelOptions:  # fmt: skip
        check_flags(is_causal=is_causal)
        by_share = "energybound" if is_causal else "thresholdbound"
        if rule is not None:
            check_choice("rule", rule, ("topk", by_share))
        rule = rule or by_share
        if mask_ratios is None:
            mask_ratios = TOPK_RATIOS if rule == "topk" else BOUND_RATIOS
        check_count("block_q", block_q)
        check_count("block_kv", block_kv)
        tile = min(32, block_kv) if tile is None else tile
        if check_count("tile", tile) > block_kv:
            raise ValueError(f"tile: expected at most block_kv = {block_kv}, got {tile}")
        check_count("text_length", text_length, minimum=0)
        _check_share("min_full_ratio", min_full_ratio)
        return cls(
            rule, _checked_ratios(mask_ratios), bool(is_causal), int(block_q), int(block_kv), int(tile),
            int(text_length), float(min_full_ratio),
        )  # fmt: skip


def _checked_ratios(ratios: Any) -> tuple[tuple[int, float, float], ...]:
    if not isinstance(ratios, Mapping):
        raise TypeError(f"mask_ratios: expected a mapping of levels to (low, high), got {type(ratios).__name__}")
    checked = []
    for level, bounds in ratios.items():
        if isinstance(level, bool) or level not in LEVELS:
            raise ValueError(f"mask_ratios: expected levels 0, 1, 2, 4 and 8, got {level!r}")
        name = f"mask_ratios[{level}]"
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise TypeError(f"{name}: expected (low, high), got {bounds!r}")
        low, high = (_check_share(name, bound) for bound in bounds)
        if low > high:
            raise ValueError(f"{name}: expected low <= high, got {low} and {high}")
        checked.append((int(level), low, high))
    return tuple(checked)


def _check_share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name}: expected a static number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a share from 0 to 1, got {value}")
    return float(value)


def _check_thresholds(thresholds: Any) -> tuple[float, ...]:
    if not isinstance(thresholds, (tuple, list)) or len(thresholds) != 3:
        raise TypeError(f"thresholds: expected three cosines, for levels 2, 4 and 8, got {thresholds!r}")
    for value in thresholds:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise TypeError(f"thresholds: expected static numbers, got {type(value).__name__}")
        if not -1 <= value <= 1:
            raise ValueError(f"thresholds: expected cosines from -1 to 1, got {value}")
    return tuple(map(float, thresholds))


def pair_kinds(nq: int, nk: int, block_q: int, block_kv: int) -> np.ndarray:
    """Of a causal call: the pairs of blocks of which all, some and no queries may see all of the keys' block.

    `FULL` where each key is at or before each query, `EMPTY` where none is at or before any. Blocks that reach beyond
    the end are taken whole, since means of their tokens cover what is there no more.
    """
    q_first, kv_first = np.arange(nq)[:, None] * block_q, np.arange(nk) * block_kv
    past = kv_first + block_kv - 1 <= q_first
    future = kv_first > q_first + block_q - 1
    return np.where(past, FULL, np.where(future, EMPTY, PARTIAL))


@functools.partial(jax.jit, static_argnames="options")
def _levels(scores: Array, *, options: LevelOptions) -> Array:
    *lists, _, _ = jax.typeof(scores).sharding.spec
    return over_mesh(functools.partial(_ranked, options), P(*lists), scores)


def _ranked(options: LevelOptions, scores: Array) -> Array:
    nq, nk = scores.shape[-2:]
    kinds = np.full((nq, nk), FULL)
    if options.is_causal:
        kinds = pair_kinds(nq, nk, options.block_q, options.block_kv)
    scores = jnp.where(kinds == EMPTY, 0, jax.lax.stop_gradient(scores).astype(accumulator_dtype(scores.dtype)))
    order = jnp.argsort(jnp.where(kinds == EMPTY, jnp.inf, -scores), axis=-1, stable=True)
    shares: Any = None
    if options.rule != "topk":
        shares = jnp.take_along_axis(scores, order, axis=-1)
        total = jnp.sum(shares, axis=-1, keepdims=True)
        shares = jnp.cumsum(shares / jnp.where(total > 0, total, 1), axis=-1)
    if options.is_causal:
        by_rank = _ranks_between(options, shares, np.sum(kinds != EMPTY, axis=-1)[:, None], nk)
    else:
        by_rank = _ranks_up_to(options, shares, nk)
    by_rank = jnp.broadcast_to(by_rank, scores.shape)
    levels = jnp.take_along_axis(by_rank, jnp.argsort(order, axis=-1), axis=-1)
    levels = jnp.where(_whole(options, kinds), 1, levels)
    return jnp.where(kinds == EMPTY, 0, levels).astype(np.int32)


def _ranks_between(options: LevelOptions, shares: Array | None, candidates: np.ndarray, nk: int) -> Any:
    """The level of every rank: its place, or its share, is between two bounds."""
    rank = np.arange(nk)
    by_rank: Any = np.zeros((len(candidates), nk), np.int32)
    for level, low, high in options.ratios:
        if shares is None:
            first, end = (np.trunc(candidates * bound) for bound in (low, high))
            by_rank = np.where((rank >= first) & (rank < end), level, by_rank)
        else:
            by_rank = jnp.where((shares > low) & (shares <= high), level, by_rank)
    return by_rank


def _ranks_up_to(options: LevelOptions, shares: Array | None, nk: int) -> Any:
    """The level of every rank: each level takes up where the one before ended, and ends where its bound says."""
    rank, xp = np.arange(nk), np if shares is None else jnp
    ratios = options.ratios if shares is None else sorted(options.ratios, key=lambda ratio: ratio[2])
    by_rank: Any = np.zeros((1, nk), np.int32)
    start: Any = np.zeros((1, 1), np.int32)
    for level, _, high in ratios:
        if shares is None:
            end = xp.maximum(int(nk * high), start)
        else:
            # A share of 1 is a sum of rounded ones.
            within = jnp.sum(shares <= high + 1e-6, axis=-1, keepdims=True, dtype=np.int32)
            end = jnp.where(within > 0, within + 1, start)
            end = jnp.maximum(end, int(options.min_full_ratio * nk) + 1) if level == 1 else end
            end = jnp.clip(end, start, nk)
        merged = math.ceil(level / (options.block_kv // options.tile))
        if merged > 1:
            length = -(-(end - start) // merged) * merged
            end = xp.where(start + length > nk, start + (nk - start) // merged * merged, start + length)
        by_rank = xp.where((rank >= start) & (rank < end), level, by_rank)
        start = end
    return by_rank


def _whole(options: LevelOptions, kinds: np.ndarray) -> np.ndarray:
    """The pairs of blocks that have level 1 whatever their importance is."""
    nq, nk = kinds.shape
    text_kv = math.ceil(options.text_length / options.block_kv)
    whole = np.broadcast_to(np.arange(nk) >= nk - text_kv, kinds.shape)
    if not options.is_causal:
        return whole
    text_q = math.ceil(options.text_length / options.block_q)
    return whole | (np.arange(nq) >= nq - text_q)[:, None] | (kinds == PARTIAL) | (np.arange(nk) == 0)
