"""Masks under which a query sees neighbors alone, on the kernels for TPU: which intervals are found, and every test."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jattn.masks import Causal, Chunked, Full, SlidingWindow, Stride
from pallas_kernels.block_sparse import intervals
from tests.pallas_kernels.test_block_sparse import CUT, TWO_WALKS, WIDE_UNITS, assert_as_dense, of_mask, operands

ONE_STRIP = dataclasses.replace(CUT, strip=256)
T, S = 307, 451
Q_DOCUMENTS = np.repeat([4, 1, 9, 2, 7, 3], [128, 1, 1, 126, 1, 50])  # they begin at the edges of blocks and inside
KV_DOCUMENTS = np.repeat([4, 1, 9, 2, 7, 3], [256, 1, 127, 1, 16, 50])
SORTED = {id: place for place, id in enumerate([4, 1, 9, 2, 7, 3])}


def in_order(ids):
    return np.array([SORTED[id] for id in ids.tolist()])


def brute_force(rule, q_ids, kv_ids):
    low, high = rule(np.arange(len(q_ids)))
    seen = (low[:, None] <= np.arange(len(kv_ids))) & (np.arange(len(kv_ids)) < high[:, None])
    return seen & (q_ids[:, None] == kv_ids)


SEGMENTS = {
    "rising": (in_order(Q_DOCUMENTS), in_order(KV_DOCUMENTS)),
    "rising, with gaps, from a negative one": (3 * in_order(Q_DOCUMENTS) - 7, 3 * in_order(KV_DOCUMENTS) - 7),
    "padding of 0 at the end": ((in_order(Q_DOCUMENTS) + 1) % 6, (in_order(KV_DOCUMENTS) + 1) % 6),
    "padding that is not on the other side": (
        np.where(np.arange(T) < 250, in_order(Q_DOCUMENTS), -1),
        np.where(np.arange(S) < 300, in_order(KV_DOCUMENTS), -2),
    ),
    "queries in another order": (in_order(Q_DOCUMENTS)[::-1], in_order(KV_DOCUMENTS)),
    "one": (np.zeros(T, int), np.zeros(S, int)),
    "of one token each": (np.arange(T) * 7 % 451, np.arange(S)),
    "around the largest integer": (
        in_order(Q_DOCUMENTS).astype(np.int32) + np.int32(2**31 - 3),
        in_order(KV_DOCUMENTS).astype(np.int32) + np.int32(2**31 - 3),
    ),
}
OUT_OF_ORDER = {
    "neither rising": (Q_DOCUMENTS, KV_DOCUMENTS),
    "falling": (5 - in_order(Q_DOCUMENTS), 5 - in_order(KV_DOCUMENTS)),
    "one that comes twice": (np.repeat([0, 1, 0], [100, 100, 107]), np.repeat([0, 1, 0], [150, 150, 151])),
    "one that begins and ends": (np.repeat([0, 1, 2, 0], [99, 9, 99, 100]), np.repeat([0, 1, 2, 0], [99, 9, 99, 244])),
    "random": (np.arange(T) * 7919 % 5, np.arange(S) * 7919 % 5),
    "as far apart as places go": tuple(np.arange(n) * 7919 % 2 * (2**31 // S - 1) - 3 for n in (T, S)),
}
WIDE = {
    "a step further apart": tuple(np.arange(n) * 7919 % 2 * (2**31 // S) - 3 for n in (T, S)),
    "random and all over": tuple(np.arange(n) * 7919 % 5 * 2**29 - 2**30 for n in (T, S)),
    "as far apart as integers": tuple(np.where(np.arange(n) % 3, 2**31 - 1, -(2**31)) for n in (T, S)),
}
ORDERS = [(SEGMENTS, intervals.IN_ORDER), (OUT_OF_ORDER, intervals.APART), (WIDE, intervals.WIDE)]


@pytest.mark.parametrize(
    ("ids", "order"),
    [pytest.param(ids, order, id=name) for found, order in ORDERS for name, ids in found.items()],
)
def test_intervals_of_segments(ids, order):
    """In every row of a batch on its own: another row's order changes nothing."""
    q_ids, kv_ids = (np.stack([x, np.zeros_like(x)]).astype(np.int32) for x in ids)
    rule = (Causal(90) & SlidingWindow(200, 90)).interval
    found, sides = intervals.find(rule, jnp.asarray(q_ids), jnp.asarray(kv_ids), q_len=T, kv_len=S, block_kv=128)
    assert sides == 2
    np.testing.assert_array_equal(found.order, [order, intervals.IN_ORDER])
    for row in range(2):
        low, high = np.int64(found.ends[row]) + found.q_origins[row]
        places = np.asarray(found.kv_places[row, 0])
        seen = (low[:, None] <= places) & (places < high[:, None])
        compared = found.order[row] == intervals.WIDE  # then the intervals are of the rule alone
        ids = (np.zeros(T), np.zeros(S)) if compared else (q_ids[row], kv_ids[row])
        np.testing.assert_array_equal(seen, brute_force(rule, *ids))
        assert 0 <= np.min(found.ends) <= np.max(found.ends) <= S


def test_an_id_beyond_all_keys():
    q_ids, kv_ids = jnp.full((1, 3), 5, jnp.int32), jnp.zeros((1, 256), jnp.int32)
    found, _ = intervals.find(None, q_ids, kv_ids, q_len=3, kv_len=256, block_kv=128)
    np.testing.assert_array_equal(found.ends, 256)


def test_sides():
    def sides(mask, kv_len=512):
        return intervals.find(mask.interval, None, None, q_len=T, kv_len=kv_len, block_kv=128)

    assert sides(Causal(200))[1] == sides(Causal(200), S)[1] == sides(SlidingWindow(20, 512))[1] == 1
    assert sides(SlidingWindow(20, 300))[1] == sides(Chunked(50))[1] == sides(SlidingWindow(20, 512), S)[1] == 2
    assert sides(Causal() | Stride(4)) is None
    assert sides(Causal())[0].order is None


# Batch rows with segments of their own: in order, apart, and such as are compared.
NAMES = "rising", "of one token each", "padding that is not on the other side"
NAMES += "one that comes twice", "as far apart as places go", "random and all over"
IDS = tuple(np.stack([(SEGMENTS | OUT_OF_ORDER | WIDE)[name][side] for name in NAMES]) for side in (0, 1))


@pytest.mark.parametrize(
    ("mask", "cut", "more"),
    [
        (Causal(90) & SlidingWindow(200, 90), CUT, {}),
        (Causal(90) & SlidingWindow(20, 90), TWO_WALKS, {"sinks": (2,), "kv_bias": (len(NAMES), 1, S)}),
        (Causal(90) & SlidingWindow(20, 90), ONE_STRIP, {}),
        (Full(), ONE_STRIP, {}),
    ],
    ids=["wide window", "narrow window, two walks", "narrow window, one strip", "segments alone"],
)
def test_segments(mask, cut, more):
    arguments, cotangents = operands(len(NAMES), T, S, 2, 1, 16, 16, **more)
    kinds = np.minimum(of_mask(mask, T, S), 1)
    assert_as_dense(
        arguments, cotangents, mask, kinds, cut=cut, segments=tuple(jnp.asarray(ids, jnp.int32) for ids in IDS)
    )


@pytest.mark.parametrize(
    ("mask", "lengths", "cut"),
    [
        (Causal(129), (T, S), CUT),
        (Causal(30), (T, S), ONE_STRIP),
        (SlidingWindow(1, S), (T, 512), CUT),
        (SlidingWindow(126, S), (T, 512), ONE_STRIP),
        (SlidingWindow(5, S), (S, T), ONE_STRIP),
        (SlidingWindow(20, 126), (T, S), CUT),
        (SlidingWindow(126, 60), (T, S), ONE_STRIP),
        (Chunked(101), (T, S), ONE_STRIP),
        (Chunked(128), (T, S), ONE_STRIP),
        (SlidingWindow(127), (T, S), ONE_STRIP),
        (SlidingWindow(0), (T, S), ONE_STRIP),
        (SlidingWindow(0), (T, S), CUT),
    ],
    ids=[
        *("a strip with one pair", "causal", "a strip with one pair, later keys", "a tile with one pair less"),
        *("a ragged end", "a tile with one pair less above", "a tile with one pair less below", "chunks"),
        *("chunks as wide as tiles", "a window as wide as a tile", "of one key", "of one key, by strips"),
    ],
)
def test_masks(mask, lengths, cut):
    """Of tiles that are open or hidden but for a pair. Where lists say so a block is full, whatever the mask says."""
    kinds = of_mask(mask, *lengths)
    kinds[0, 0, 1, -1] = kinds[0, 0, 0, 0] = 2
    assert_as_dense(*operands(1, *lengths, 2, 1, 16, 16), mask, kinds, cut=cut)


def test_a_ragged_block_that_lists_call_full():
    """Whatever the mask says, though both ends of its intervals are in there."""
    kinds = of_mask(SlidingWindow(0), T, S)
    kinds[0, 0, 2, 1] = 2
    assert_as_dense(*operands(1, T, S, 2, 1, 16, 16), SlidingWindow(0), kinds, cut=ONE_STRIP)


def test_bfloat16_and_queries_that_see_nothing():
    """Neither keys nor, where it is -inf, a sink."""
    arguments, cotangents = operands(1, T, S, 2, 1, 128, 128, dtype=jnp.bfloat16, sinks=(2,))
    arguments["sinks"] = jnp.asarray([-jnp.inf, 0.3])
    got = assert_as_dense(arguments, cotangents, Causal(-150) & SlidingWindow(250), cut=WIDE_UNITS, ratio=5e-3)
    np.testing.assert_array_equal(got["lse"][0, :150], np.broadcast_to(np.float32([-np.inf, 0.3]), (150, 2)))
