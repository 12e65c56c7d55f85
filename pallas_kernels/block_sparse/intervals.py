"""Masks under which a query sees neighbors alone: the keys low(t) <= s < high(t).

Causal masks and sliding windows are of this form, and segments are where those of keys lie one after another: then the
keys of a query's segment are neighbors, and what it sees is where both intervals meet. Whether they do is known on the
device only. Ids count as in order if they do not decrease once the first one is taken for the smallest, modulo 2^32:
so padding may have any id that is not used before it.

Segments that are not in order are set apart: with a place for every key, id S + s, a query sees the interval of places
id S + low(t) <= place < id S + high(t). Only where ids differ by so much that places do not fit 32 bits are they
compared themselves.
"""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, UInt32

from pallas_kernels.block_sparse import walk
from pallas_kernels.block_sparse.lists import EDGE
from pallas_kernels.block_sparse.tiling import LANES
from pallas_kernels.block_sparse.walk import Problem, Refs, Step

Rule = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray] | None]
"""Of positions of queries, the first key that each sees and the one after the last; `None`: it sees others."""


class Intervals(NamedTuple):
    """Of every query.

    Attributes:
      ends: low and high, within the keys that there are; of the rule alone where segments are not in order.
      order: what segments of a batch row are: `IN_ORDER`, `APART` or `WIDE`; `None` without segments.
      q_origins, kv_places: places of keys and what a query's ends are counted from, if segments are apart; else
        positions, from 0. After the last key, -1.
    """

    ends: Int[Array, "G 2 T"]
    order: Int[Array, " B"] | None
    q_origins: Int[Array, "B 1 T"] | None
    kv_places: Int[Array, "B 1 S"] | None


WIDE, IN_ORDER, APART = range(3)


def find(
    rule: Rule | None,
    q_segments: Int[Array, "B T"] | None,
    kv_segments: Int[Array, "B S"] | None,
    *,
    q_len: int,
    kv_len: int,
    block_kv: int,
) -> tuple[Intervals, int] | None:
    """The intervals of a rule and of segments, and on how many sides they end in blocks; `None`: the rule has none."""
    given = rule(np.arange(q_len)) if rule is not None else (np.zeros(q_len, int), np.full(q_len, kv_len))
    if given is None:
        return None
    begin, end = (np.clip(x, 0, kv_len) for x in given)
    sides = 2 if begin.any() and (end < -(-kv_len // block_kv) * block_kv).any() else 1
    low, high = (jnp.asarray(x, jnp.int32)[None] for x in (begin, end))
    if q_segments is None or kv_segments is None:
        return Intervals(jnp.stack([low, high], axis=1), None, None, None), sides
    first, beyond, in_order = _segments(q_segments, kv_segments)
    low = jnp.where(in_order[:, None], jnp.maximum(low, first), low)
    high = jnp.where(in_order[:, None], jnp.minimum(high, beyond), high)
    origins, places, fits = _apart(q_segments, kv_segments)
    order = jnp.where(in_order, IN_ORDER, jnp.where(fits, APART, WIDE))
    origins = jnp.where((order == APART)[:, None], origins, 0)
    places = jnp.where((order == APART)[:, None], places, np.arange(kv_len, dtype=np.int32))
    return Intervals(jnp.stack([low, high], axis=1), order.astype(jnp.int32), origins[:, None], places[:, None]), 2


def whole(x: Intervals, q_len: int, kv_len: int) -> Intervals:
    """With queries beyond the last that see what it sees, and places of no keys."""

    def longer(queries: Array) -> Array:
        return jnp.pad(queries, [(0, 0), (0, 0), (0, q_len - queries.shape[2])], mode="edge")

    if x.q_origins is None or x.kv_places is None:
        return x._replace(ends=longer(x.ends))
    missing = [(0, 0), (0, 0), (0, kv_len - x.kv_places.shape[2])]
    places = jnp.pad(x.kv_places, missing, constant_values=-1)
    return x._replace(ends=longer(x.ends), q_origins=longer(x.q_origins), kv_places=places)


def _segments(q_ids: Int[Array, "B T"], kv_ids: Int[Array, "B S"]) -> tuple[Array, Array, Array]:
    """The first key of each query's segment, the one after its last, and of each batch row if keys are in order."""
    keys, queries = (_unsigned(x - kv_ids[:, :1]) for x in (kv_ids, q_ids))
    in_order = jnp.all(keys[:, 1:] >= keys[:, :-1], axis=1)
    return _count(keys, queries, jnp.less), _count(keys, queries, jnp.less_equal), in_order


def _apart(q_ids: Int[Array, "B T"], kv_ids: Int[Array, "B S"]) -> tuple[Array, Array, Array]:
    """Origins of queries and places of keys, and of each batch row if they fit."""
    both = jnp.concatenate([q_ids, kv_ids], axis=1)
    least, most = (find(both, axis=1, keepdims=True) for find in (jnp.min, jnp.max))
    kv_len = kv_ids.shape[1]
    origins = ((both - least) * kv_len).astype(jnp.int32)
    fits = _unsigned(most - least) < np.uint32((2**31 - 1) // kv_len)
    places = origins[:, q_ids.shape[1] :] + np.arange(kv_len, dtype=np.int32)
    return origins[:, : q_ids.shape[1]], places, fits[:, 0]


def _count(keys: UInt32[Array, "B S"], x: UInt32[Array, "B T"], is_before: Callable[..., Array]) -> Int[Array, "B T"]:
    """How many of the rising keys are before each x: whole tiles of lanes, then lanes. (Sorts compile for seconds.)"""
    batch, kv_len = keys.shape
    padded = jnp.pad(keys, [(0, 0), (0, -kv_len % LANES)], constant_values=np.uint32(2**32 - 1))
    tiles = padded.reshape(batch, -1, LANES)
    tile = jnp.sum(is_before(tiles[:, None, :, -1], x[:, :, None]), axis=2, dtype=jnp.int32)
    lanes = jnp.take_along_axis(tiles, jnp.minimum(tile, tiles.shape[1] - 1)[:, :, None], axis=1)
    inside = jnp.sum(is_before(lanes, x[:, :, None]), axis=2, dtype=jnp.int32)
    return jnp.minimum(tile * LANES + inside, kv_len)


def _unsigned(x: Int[Array, "B n"]) -> UInt32[Array, "B n"]:
    return jax.lax.bitcast_convert_type(x.astype(jnp.int32), jnp.uint32)


class Test(enum.Enum):
    """What is asked of pairs: nothing; intervals, of which one side is open, or both sides; segments too; all rules."""

    NOTHING = enum.auto()
    SIDE = enum.auto()
    INTERVAL = enum.auto()
    SEGMENTS = enum.auto()
    RULES = enum.auto()


_HIGH, _LOW, _SPAN = range(3)
_AXES = {"key": 0, "value": 0, "kv_bias": 1, "kv_segments": 1, "kv_places": 1, "key_sums": 2, "value_sums": 2}
"""Along which axis the keys of a block lie."""


def scratch(p: Problem) -> dict[str, Any]:
    size, found = p.tiling.block_q, dict[str, Any]()
    if p.turned:
        found["counts"] = pltpu.VMEM((2, p.tiling.forward.kv, LANES), jnp.int32)
    if p.sides:
        found["bounds"] = pltpu.VMEM((3, 1, size) if p.turned else (3, size, LANES), jnp.int32)
        found["reach"] = pltpu.SMEM((4,), jnp.int32)
    return found


def begin_head(refs: Refs) -> None:
    """The numbers of the keys of a turned tile, and their complements: to load them is free, to make them is not."""
    if refs.counts is not None:
        refs.counts[0] = walk.iota(refs.counts.shape[1:], 0)
        refs.counts[1] = ~refs.counts[0]


def begin_queries(p: Problem, refs: Refs) -> None:
    """The intervals of a block, and how far they reach."""
    low, high = refs.ends[:1], refs.ends[1:]
    first = low if refs.q_origins is None else low + refs.q_origins[...]
    for i, x in ((_HIGH, high), (_LOW, -first), (_SPAN, jnp.maximum(high - low, 0))):
        refs.bounds[i] = x if p.turned else walk.upright(x)
    for i, x in enumerate((jnp.min(low), jnp.max(low), jnp.min(high), jnp.max(high))):
        refs.reach[i] = x


def allowed(
    p: Problem, refs: Refs, step: Step, rows: slice, columns: slice, kv_pos: jax.Array, test: Test
) -> jax.Array:
    """Which pairs of a tile are in intervals, by what `test` leaves open."""
    width = columns.stop - columns.start
    if test is Test.SIDE:
        # s < high, or low <= s as ~s < -low: which of them is open here decides between rows alone.
        low = step.kv_start + columns.start < refs.reach[1]
        place = jnp.where(low, ~kv_pos, kv_pos)
        if p.ragged_q or p.ragged_kv:
            least, most = jnp.int32(-(2**31)), jnp.int32(2**31 - 1)
            place = jnp.where(step.kind == EDGE, jnp.where(kv_pos < p.kv_len, least, most), place)
        return place < walk.wide(refs.bounds[jnp.where(low, _LOW, _HIGH), rows], width)
    # Unsigned, what is below low is beyond all spans. Where segments are compared themselves origins are 0.
    place = kv_pos if refs.kv_places is None or test is Test.SEGMENTS else refs.kv_places[:, columns]
    after = place + walk.wide(refs.bounds[_LOW, rows], width)
    after, span = (
        jax.lax.bitcast_convert_type(x, jnp.uint32) for x in (after, walk.wide(refs.bounds[_SPAN, rows], width))
    )
    return after < span


def allowed_turned(p: Problem, refs: Refs, step: Step, rows: slice, columns: slice) -> jax.Array | None:
    """The same of turned tiles, of which one side is open or none: what is added to keys is taken from rows."""
    start = step.kv_start + columns.start
    low, bound = jnp.bool_(False), p.kv_len - start
    if p.sides:
        low = (start < refs.reach[1]) & (step.kind != EDGE)
        found = refs.bounds[jnp.where(low, _LOW, _HIGH), :, rows] + jnp.where(low, start, -start)
        bound = jnp.where(step.kind == EDGE, bound, found)
    elif not p.ragged_kv:
        return None
    return walk.wide(refs.counts[low.astype(jnp.int32)], rows.stop - rows.start) < bound


def visit(p: Problem, step: Step, refs: Refs, size: int, each: Callable[[Step, Refs, Test], None]) -> None:
    """Visits a block that is not full: by strips where some are hidden or segments are to be compared, else at once.

    Args:
      size: keys of a tile.
      each: visits a block or a strip of it, at its step and with its part of what belongs to keys.
    """
    t = p.tiling
    lowest, low, high, highest = (refs.reach[i] for i in range(4))  # the keys from low to high are all seen

    def hidden(start: Any) -> Any:
        return (start >= highest) | (start + t.strip <= lowest)

    def starts(size: int) -> list[Any]:
        return [step.kv_start + i for i in range(0, t.block_kv, size)]

    strips = starts(t.strip)
    order = jnp.int32(IN_ORDER) if refs.order is None else refs.order[step.b]
    is_wide, by_strips, crossed = order == WIDE, order == WIDE, order == APART
    if len(strips) > 1:
        by_strips |= functools.reduce(operator.or_, map(hidden, strips))
    if p.sides > 1:  # in some tile both of them
        crossed |= functools.reduce(operator.or_, ((i < low) & (i + size > high) for i in starts(size)))
    by_strips &= step.kind != EDGE
    crossed &= ~by_strips & (step.kind != EDGE)
    pl.when(~by_strips & ~crossed)(functools.partial(each, step, refs, Test.SIDE))
    if p.sides > 1:
        pl.when(crossed)(functools.partial(each, step, refs, Test.INTERVAL))

    def strip(i: Any, _: Any) -> None:
        at = pl.ds(pl.multiple_of(i * t.strip, t.strip), t.strip)
        here = step._replace(kv_start=step.kv_start + i * t.strip)
        of_keys = {name: refs[name].at[(*[slice(None)] * axis, at)] for name, axis in _AXES.items() if name in refs}
        part, seen = Refs(refs | of_keys), ~hidden(here.kv_start)
        if refs.order is not None:
            pl.when(seen & is_wide)(functools.partial(each, here, part, Test.SEGMENTS))
        if len(strips) > 1:
            pl.when(seen & ~is_wide)(functools.partial(each, here, part, Test.INTERVAL if p.sides > 1 else Test.SIDE))

    if refs.order is not None or len(strips) > 1:
        pl.when(by_strips)(lambda: jax.lax.fori_loop(0, len(strips), strip, None))
