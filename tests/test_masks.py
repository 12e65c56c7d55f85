"""The mask algebra: leaves against plain predicates on Python integers, trees and lists against the dense mask."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattn import masks
from jattn.mask_picture import picture, svg
from jattn.masks import (
    Causal,
    Chunked,
    Empty,
    Fn,
    Full,
    Mask,
    NearBlocks,
    PowerOfTwo,
    Prefix,
    Sink,
    SlidingWindow,
    Stride,
)

T, S = 17, 23

LEAVES = {
    Causal(): lambda t, s: s <= t,
    Causal(offset=6): lambda t, s: s <= t + 6,
    Causal(offset=-3): lambda t, s: s <= t - 3,
    SlidingWindow(4): lambda t, s: s in range(t - 4, t + 1),
    SlidingWindow(0, 5): lambda t, s: s in range(t, t + 6),
    Sink(0): lambda t, s: False,
    Prefix(7): lambda t, s: s in range(7),
    Chunked(5): lambda t, s: any({t, s} <= set(range(c, c + 5)) for c in range(0, 30, 5)),
    Stride(4): lambda t, s: (t - s) in range(-40, 40, 4),
    Stride(3, phase=2): lambda t, s: (t - s - 2) in range(-60, 60, 3),
    PowerOfTwo(): lambda t, s: t - s in (0, 1, 2, 4, 8, 16),
    PowerOfTwo(block=3): lambda t, s: t // 3 - s // 3 in (0, 1, 2, 4, 8, 16),
    PowerOfTwo(3, 4): lambda t, s: (t + 4) // 3 - s // 3 in (0, 1, 2, 4, 8, 16),
    NearBlocks(3, 2): lambda t, s: t // 3 - s // 3 in (0, 1),
    NearBlocks(4, 3, -5): lambda t, s: (t - 5) // 4 - s // 4 in (0, 1, 2),
    Full(): lambda t, s: True,
    Empty(): lambda t, s: False,
}

small = st.integers(0, 9)
leaves = st.one_of(
    st.builds(Causal, st.integers(-9, 9)),
    st.builds(SlidingWindow, small, small),
    st.builds(Sink, small),
    st.builds(Chunked, st.integers(1, 9)),
    st.builds(Stride, st.integers(4, 7), st.integers(0, 3)),
    st.builds(PowerOfTwo, st.integers(1, 4), st.integers(-6, 6)),
    st.builds(NearBlocks, st.integers(1, 4), st.integers(1, 3), st.integers(-6, 6)),
    st.sampled_from([Full(), Empty()]),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=5,
)


def kinds_of_dense(dense: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    """The exact kind of every pair of blocks."""
    rows, cols = (range(0, n, b) for n, b in zip(dense.shape, (block_q, block_kv), strict=True))
    tiles = [[dense[i : i + block_q, j : j + block_kv] for j in cols] for i in rows]
    return np.array([[2 if tile.all() else int(tile.any()) for tile in row] for row in tiles])


@pytest.mark.parametrize("mask", LEAVES, ids=repr)
def test_leaf_is_its_predicate(mask: Mask):
    wanted = [[LEAVES[mask](t, s) for s in range(S)] for t in range(T)]
    np.testing.assert_array_equal(mask.dense(T, S), wanted)


@given(leaves, st.integers(1, 6), st.integers(1, 6))
def test_classify_is_exact_for_leaves(mask: Mask, block_q: int, block_kv: int):
    wanted = kinds_of_dense(mask.dense(T, S), block_q, block_kv)
    np.testing.assert_array_equal(mask.block_kinds(T, S, block_q, block_kv), wanted)


@given(leaves, st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_classify_of_any_rectangle(mask: Mask, bounds: list[int]):
    (t0, t1), (s0, s1) = sorted(bounds[:2]), sorted(bounds[2:])
    tile = mask.dense(41, 41)[t0 : t1 + 1, s0 : s1 + 1]
    assert mask.classify(t0, t1, s0, s1) == (2 if tile.all() else int(tile.any()))


@given(trees, st.integers(1, 6), st.integers(1, 6))
def test_classify_of_a_tree_is_never_wrong(mask: Mask, block_q: int, block_kv: int):
    exact = kinds_of_dense(mask.dense(T, S), block_q, block_kv)
    kinds = mask.block_kinds(T, S, block_q, block_kv)
    assert kinds.dtype == np.int8
    assert ((kinds == exact) | (kinds == masks.PARTIAL)).all()


@given(trees, trees)
def test_operators_are_those_of_sets(a: Mask, b: Mask):
    x, y = a.dense(T, S), b.dense(T, S)
    np.testing.assert_array_equal((a & b).dense(T, S), x & y)
    np.testing.assert_array_equal((a | b).dense(T, S), x | y)
    np.testing.assert_array_equal((~a).dense(T, S), ~x)
    assert ~~a == a


INTERVALS = (Full, Empty, Causal, SlidingWindow, Sink, Chunked, NearBlocks)
walls = leaves.filter(lambda leaf: isinstance(leaf, INTERVALS))


@given(walls, walls, leaves)
def test_an_interval_is_the_mask(a: Mask, b: Mask, c: Mask):
    low, high = (a & b).interval(np.arange(T))
    np.testing.assert_array_equal((low[:, None] <= np.arange(S)) & (np.arange(S) < high[:, None]), (a & b).dense(T, S))
    simple = a & b & c
    known = isinstance(c, INTERVALS) or simple == Empty()
    assert (simple.interval(np.arange(T)) is not None) == known
    assert (a | ~Stride(4)).interval(np.arange(T)) is None or isinstance(a, Full)


@given(trees)
@settings(max_examples=40)
def test_repr_is_the_expression(mask: Mask):
    names = {name: getattr(masks, name) for name in dir(masks)}
    again = eval(repr(mask), names)
    assert again == mask
    assert hash(again) == hash(mask)


def test_repr_reads_well():
    assert repr(Causal() & SlidingWindow(1024) | Sink(4)) == "Causal() & SlidingWindow(1024) | Sink(4)"
    assert repr(Causal() & (SlidingWindow(8) | Sink(4))) == "Causal() & (SlidingWindow(8) | Sink(4))"
    assert repr(~(Causal(offset=2) | Stride(4, 1))) == "~(Causal(offset=2) | Stride(4, phase=1))"


def test_expressions_are_simplified():
    a, b, c = Causal(), Sink(2), Chunked(4)
    assert a & Full() == a == a | Empty() == a & a == a | a
    assert a & Empty() == Empty()
    assert a | Full() == Full()
    assert ~Full() == Empty()
    assert ~Empty() == Full()
    assert (a & b) & c == a & (b & c) == masks.And((a, b, c))
    assert (a | b) | c == a | (b | c) == masks.Or((a, b, c))
    assert a & b != a | b


def test_numpy_and_jax_agree_under_jit_and_the_shape_is_that_of_both():
    mask = ~(Causal(3) & (Chunked(4) | Sink(3)) | Stride(5, 2)) | PowerOfTwo(2) & Full()
    q_pos, kv_pos = np.arange(T)[:, None], np.arange(S)
    traced = jax.jit(lambda t, s: mask.elem(t, s))(jnp.asarray(q_pos), jnp.asarray(kv_pos))
    np.testing.assert_array_equal(traced, mask.dense(T, S))
    for leaf in LEAVES:
        assert leaf.elem(q_pos, kv_pos).shape == (T, S)
        assert leaf.elem(q_pos, kv_pos).dtype == bool


def test_fn_may_read_the_head_and_is_named_by_its_key():
    def local(q_pos, kv_pos, head):
        return q_pos - kv_pos < head

    mask = Fn(local, key=("local", 1)) & Causal()
    np.testing.assert_array_equal(mask.dense(T, S, head=3), (Causal() & SlidingWindow(2)).dense(T, S))
    assert Fn(local, key=1) == Fn(lambda *_: True, key=1) != Fn(local, key=2)
    assert repr(Fn(local, key=1)) == "Fn(local, key=1)"
    # Every block is partial, save where another term rules it out.
    np.testing.assert_array_equal(mask.block_kinds(8, 8, 4, 4), [[1, 0], [1, 1]])


def test_power_attention_row():
    # PowerAttention without sink and with a window of one block: block row 37, from the paper's pattern.
    kinds = (Causal() & PowerOfTwo(8)).block_kinds(320, 320, 8, 8)
    assert set(np.flatnonzero(kinds[37])) == {37, 36, 35, 33, 29, 21, 5}
    assert kinds[37, 37] == masks.PARTIAL
    assert set(kinds[37, [36, 35, 33, 29, 21, 5]]) == {masks.FULL}


@given(trees, st.integers(1, 6), st.integers(1, 6))
def test_work_lists(mask: Mask, block_q: int, block_kv: int):
    lists = mask.block_lists(T, S, block_q, block_kv)
    kinds = mask.block_kinds(T, S, block_q, block_kv)
    np.testing.assert_array_equal(lists.kinds, kinds)
    np.testing.assert_array_equal(lists.counts, (kinds > 0).sum(1))
    assert lists.density == (kinds > 0).mean()
    assert lists.num_steps == np.maximum(lists.counts, 1).sum() == len(lists.by_row.row)
    for (row, col, kind), along, across in (
        (lists.by_row, 0, 1),
        (lists.by_col, 1, 0),
    ):
        steps = list(zip(*((row, col)[axis].tolist() for axis in (along, across)), strict=True))
        assert steps == sorted(set(steps))  # sorted, and no pair twice
        assert {step[0] for step in steps} == set(range(kinds.shape[along]))  # every row, or column, is written
        np.testing.assert_array_equal(kind, kinds[row, col])
        assert {(r, c) for r, c, k in zip(row, col, kind, strict=True) if k} == set(
            zip(*np.nonzero(kinds), strict=True)
        )
        idle = (row, col)[along][kind == 0]
        assert not kinds.any(axis=across)[idle].any()  # a step of kind 0 only where there is no other


@dataclasses.dataclass(frozen=True, repr=False)
class FirstQueries(Mask):
    """`t < n`: the first `n` queries see everything."""

    n: int

    def classify(self, q_lo, q_hi, kv_lo, kv_hi):
        return (q_lo < self.n).astype(np.int8) + (q_hi < self.n)


def test_one_dense_row_costs_one_row():
    mask = FirstQueries(8) | Chunked(8)
    assert mask.block_lists(64, 80, 8, 8).num_steps == 10 + 8 - 1


def test_lists_are_cached_and_read_only():
    lists = SlidingWindow(5).block_lists(31, 37, 8, 8)
    assert SlidingWindow(5).block_lists(31, 37, 8, 8) is lists
    for array in (lists.kinds, *lists.by_row, *lists.by_col):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_long_lists_never_hold_the_mask():
    length = 131_072
    tracemalloc.start()
    lists = SlidingWindow(1024).block_lists(length, length, 512, 512)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lists.num_steps == 3 * 256 - 3
    assert peak < 16 * 2**20


def test_an_equal_mask_is_no_new_compilation():
    traced = []

    @jax.jit
    def count(x, mask):
        traced.append(mask)
        return x + mask.dense(2, 2).sum()

    for mask in (Causal() & Sink(1), Causal() & Sink(1), Causal()):
        count(1.0, mask)
    assert traced == [Causal() & Sink(1), Causal()]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SlidingWindow(-1), ValueError, "left: expected at least 0, got -1"),
        (lambda: SlidingWindow(2, -3), ValueError, "right: expected at least 0, got -3"),
        (lambda: SlidingWindow(2, 2**31 - 1), ValueError, f"right: expected at most {2**30}, got {2**31 - 1}"),
        (lambda: Causal(2**31 - 1), ValueError, f"offset: expected at most {2**30}"),
        (lambda: SlidingWindow(2.0), TypeError, "left: expected a static integer, got float"),
        (lambda: Causal(offset=True), TypeError, "offset: expected a static integer"),
        (lambda: Sink(-1), ValueError, "n: expected at least 0"),
        (lambda: Chunked(0), ValueError, "size: expected at least 1"),
        (lambda: Stride(0), ValueError, "k: expected at least 1"),
        (lambda: Stride(3, 3), ValueError, "phase: expected less than k = 3, got 3"),
        (lambda: PowerOfTwo(0), ValueError, "block: expected at least 1"),
        (lambda: NearBlocks(2, 0), ValueError, "count: expected at least 1"),
        (lambda: Fn("causal", key=1), TypeError, "function: expected a callable"),
        (lambda: Fn(lambda *_: True, key=[1]), TypeError, "key: expected a hashable value, got list"),
        (
            lambda: Fn(lambda q, k, h: 2 * (k <= q), key=1).dense(3, 3),
            TypeError,
            "function: expected booleans, got int",
        ),
        (lambda: Fn(lambda q, k, h: 1.0, key=1).dense(3, 3), TypeError, "function: expected booleans, got float"),
        (lambda: Causal() and Sink(1), TypeError, "combine masks with &"),
        (lambda: Causal() & np.ones((2, 2), bool), TypeError, "unsupported operand"),
        (lambda: Causal().block_kinds(0, 4, 2, 2), ValueError, "q_len: expected at least 1, got 0"),
        (lambda: Causal().block_lists(4, 4, 2, 0), ValueError, "block_kv: expected at least 1, got 0"),
        (lambda: Causal().show(0), ValueError, "q_len: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_picture_of_pairs(capsys):
    wanted = "\n".join(
        [
            "Causal() & SlidingWindow(1)",
            "         keys",
            "queries  0      3",
            "      0  ██· · ·",
            "      1  ████· ·",
            "      2  · ████·",
        ]
    )
    (Causal() & SlidingWindow(1)).show(3, 4)
    assert capsys.readouterr().out == wanted + "\n"


def test_picture_of_blocks_tells_the_three_kinds():
    lines = picture(Causal(), 1000).splitlines()
    assert "28 x 28 positions" in lines[0]
    assert lines[4].split() == ["28", "██▒▒·", *"·" * 33]


def test_svg_draws_the_allowed_pairs():
    mask = Causal() & SlidingWindow(2) | Sink(1)
    root = ElementTree.fromstring(mask._repr_svg_())
    rects = [rect for rect in root.iter() if rect.tag.endswith("rect") and rect.get("fill") != "#888"]
    pairs = sum((int(rect.get("width", "0")) + 1) // 10 for rect in rects)
    assert pairs == mask.dense(32, 32).sum()
    assert "Causal() &amp; SlidingWindow(2) | Sink(1)" in mask._repr_svg_()
    opacities = [rect.get("fill-opacity") for rect in ElementTree.fromstring(svg(Causal(), 4096)).iter()]
    assert {"1", "0.45"} <= set(opacities)


def test_every_leaf_of_the_module_is_tested():
    others = {masks.And, masks.Or, masks.Not, masks.Fn}
    # Ops have leaves of their own, and so do tests.
    own = {kind for kind in Mask.__subclasses__() if kind.__module__ == masks.__name__}
    assert {type(leaf) for leaf in LEAVES} == own - others
    assert all(a != b for a, b in itertools.combinations(LEAVES, 2))
