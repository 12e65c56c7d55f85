"""Lists of blocks against the dense mask: what is listed, in which order, in both directions, static and traced."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattn.masks import Causal, Fn, Full, Mask, PowerOfTwo, Sink, SlidingWindow
from jattn.sparse.block_mask import BlockMask, create_block_mask
from tests.test_masks import trees

T, S = 17, 23
blocks = st.integers(1, 9)


def random_mask(rng: np.random.Generator, *lists: int, q_len: int = T, kv_len: int = S) -> np.ndarray:
    """A mask with empty, partial and full blocks in it."""
    mask = rng.random((*lists, q_len, kv_len)) < 0.4
    mask[..., : q_len // 3, kv_len // 2 :] = True
    mask[..., q_len // 2 :, : kv_len // 3] = False
    return mask


def assert_lists(block_mask: BlockMask, kinds: np.ndarray, exact: bool = True) -> None:
    """The invariants of the data structure, for the kinds `[Bm, Nm, nq, nk]` that it should hold."""
    block_mask = jax.tree.map(np.asarray, block_mask)
    for idx, n_partial, n_total, bank, wanted in (
        (block_mask.kv_idx, block_mask.n_partial, block_mask.n_total, block_mask.kv_bank, kinds),
        (block_mask.q_idx, block_mask.qn_partial, block_mask.qn_total, block_mask.q_bank, np.swapaxes(kinds, 2, 3)),
    ):
        assert {a.dtype for a in (idx, n_partial, n_total)} == {np.dtype(np.int32)}
        assert idx.shape[:3] == n_partial.shape == n_total.shape == wanted.shape[:3]
        assert (block_mask.mask is None) == (bank is not None)
        if exact:
            assert idx.shape[-1] == max(1, np.max(n_total))
        for at in np.ndindex(wanted.shape[:3]):
            listed = idx[at].tolist()
            partial, full = np.flatnonzero(wanted[at] == 1).tolist(), np.flatnonzero(wanted[at] == 2).tolist()
            assert (n_partial[at], n_total[at]) == (len(partial), len(partial) + len(full))
            last = (partial + full or [0])[-1]
            assert listed == partial + full + [last] * (len(listed) - n_total[at])


def assert_work_lists(block_mask: BlockMask, kinds: np.ndarray) -> None:
    """Sorted, partial before full, no pair twice, every row (or column) at least once, nothing else."""
    for transposed in (False, True):
        steps = jax.tree.map(np.asarray, block_mask.work_list(transposed))
        per_row = np.maximum((kinds > 0).sum(axis=2 if transposed else 3), 1).sum(axis=2)
        assert {a.dtype for a in steps[:3]} == {np.dtype(np.int32)}
        for at in np.ndindex(kinds.shape[:2]):
            row, col, kind = (a[at] for a in steps[:3])
            owner, other = (col, row) if transposed else (row, col)
            assert (np.diff(owner) >= 0).all()
            assert set(owner) == set(range(kinds.shape[3 if transposed else 2]))
            real = [tuple(step) for step in zip(owner, kind, other, strict=True) if step[1]]
            assert real == sorted(set(real))
            wanted = kinds[at].T if transposed else kinds[at]
            assert {(i, j): k for i, k, j in real} == {(i, j): wanted[i, j] for i, j in np.argwhere(wanted).tolist()}
            if block_mask.is_static:
                assert len(row) == per_row.max()
                assert (kind[per_row[at] :] == 0).all()
                beyond = np.arange(per_row[at], len(row))
                assert (row[beyond] == row[per_row[at] - 1]).all()
                assert (col[beyond] == col[per_row[at] - 1]).all()
                assert ((kind == 0) & (np.arange(len(row)) < per_row[at])).sum() == (~(wanted > 0).any(axis=1)).sum()
        if not transposed:
            assert block_mask.num_steps == steps.row.shape[-1]


@given(trees, blocks, blocks)
def test_a_symbolic_mask(mask: Mask, block_q: int, block_kv: int):
    block_mask = BlockMask.from_expr(mask, T, S, block_q, block_kv)
    np.testing.assert_array_equal(block_mask.to_dense()[0, 0], mask.dense(T, S))
    kinds = mask.block_kinds(T, S, block_q, block_kv).copy()
    if T % block_q:
        kinds[-1] = np.minimum(kinds[-1], 1)
    if S % block_kv:
        kinds[:, -1] = np.minimum(kinds[:, -1], 1)
    np.testing.assert_array_equal(block_mask.to_map(), kinds[None, None])
    assert_lists(block_mask, kinds[None, None])
    assert_work_lists(block_mask, kinds[None, None])
    assert block_mask.density == (kinds > 0).mean()
    assert block_mask.num_steps == np.maximum((kinds > 0).sum(axis=1), 1).sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), blocks, blocks, st.sampled_from([(), (3,), (1, 3), (2, 1), (2, 3)]))
def test_a_dense_mask(seed: int, block_q: int, block_kv: int, lists: tuple[int, ...]):
    mask = random_mask(np.random.default_rng(seed), *lists)
    wanted = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    static = BlockMask.from_dense(mask, block_q, block_kv)
    np.testing.assert_array_equal(static.to_dense(), wanted)
    kinds = np.asarray(static.to_map())
    assert_lists(static, kinds)
    assert_work_lists(static, kinds)
    if T % block_q:
        assert (kinds[:, :, -1] < 2).all()


@pytest.mark.parametrize(("lists", "block_q", "block_kv"), [((), 4, 8), ((2, 3), 5, 4)])
def test_a_traced_dense_mask(lists: tuple[int, ...], block_q: int, block_kv: int):
    mask = random_mask(np.random.default_rng(0), *lists)
    static = BlockMask.from_dense(mask, block_q, block_kv)
    dynamic = jax.jit(lambda mask: BlockMask.from_dense(mask, block_q, block_kv))(mask)
    assert static.is_static
    assert not dynamic.is_static
    np.testing.assert_array_equal(dynamic.to_dense(), static.to_dense())
    kinds = np.asarray(static.to_map())
    assert_lists(dynamic, kinds, exact=False)
    assert_work_lists(dynamic, kinds)
    assert dynamic.num_steps == kinds.shape[2] * kinds.shape[3]
    assert float(dynamic.density) == pytest.approx(static.density)


def test_the_bank_holds_each_block_once():
    block_mask = BlockMask.from_dense(np.tril(np.ones((64, 64), bool)), 8, 8)
    assert block_mask.bank.shape == (2, 8, 8)  # the diagonal block, after the one that is all true
    assert block_mask.bank[0].all()
    heads = BlockMask.from_dense(np.tril(np.ones((2, 3, 64, 64), bool)), 8, 8)
    assert len(heads.bank) == 2


@settings(max_examples=20, deadline=None)
@given(trees, blocks, blocks)
def test_a_map_gives_back_what_made_it(mask: Mask, block_q: int, block_kv: int):
    first = BlockMask.from_expr(mask, T, S, block_q, block_kv)
    again = BlockMask.from_map(first.to_map(), T, S, block_q, block_kv, mask=mask)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_traced_map_has_the_width_that_is_given():
    mask = Causal() & SlidingWindow(6)
    wanted = BlockMask.from_expr(mask, T, S, 4, 4)
    traced = jax.jit(lambda kind: BlockMask.from_map(kind, T, S, 4, 4, mask=mask, max_blocks=3, max_q_blocks=4))(
        wanted.to_map()
    )
    assert (traced.kv_idx.shape[-1], traced.q_idx.shape[-1]) == (3, 4)
    np.testing.assert_array_equal(traced.to_dense(), wanted.to_dense())
    assert_lists(traced, wanted.to_map(), exact=False)


def test_a_map_with_a_bank_of_its_own():
    rng = np.random.default_rng(0)
    bank = rng.random((3, 8, 8)) < 0.5
    kind = np.array([[1, 2, 0], [2, 1, 2]], np.int8)
    ids = np.array([[2, 9, 9], [9, 0, 9]], np.int32)
    for xp in (np, jnp):
        block_mask = BlockMask.from_map(xp.asarray(kind), 16, 21, 8, 8, bank=xp.asarray(bank), bank_ids=xp.asarray(ids))
        dense = np.asarray(block_mask.to_dense())[0, 0]
        np.testing.assert_array_equal(dense[:8, :8], bank[2])
        np.testing.assert_array_equal(dense[8:, 8:16], bank[0])
        assert dense[:8, 8:16].all()
        assert not dense[:8, 16:].any()
        assert dense[8:, 16:].all()  # a full block that reaches beyond the keys is partial and all true
        assert block_mask.to_map()[0, 0, 1, 2] == 1


def test_one_dense_row_costs_one_row():
    kind = np.eye(8, 10, dtype=np.int8)
    kind[0] = 2
    block_mask = BlockMask.from_map(kind, 64, 80, 8, 8)
    assert block_mask.num_steps == 10 + 8 - 1
    assert block_mask.work_list().row.shape == (1, 1, 10 + 8 - 1)
    assert block_mask.kv_idx.shape[-1] == 10


@pytest.mark.parametrize("block", [128, 512])
def test_a_long_mask_is_built_in_no_time(block: int):
    length = 131_072
    mask = Causal() & SlidingWindow(1023) | Sink(3 + block)  # nobody has built this one before
    tracemalloc.start()
    block_mask = BlockMask.from_expr(mask, length, length, block, block)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * 2**20
    start = time.process_time()
    BlockMask.from_expr(mask | Sink(5), length, length, block, block)
    assert time.process_time() - start < 0.3
    assert block_mask.num_steps == np.maximum(block_mask.n_total, 1).sum()


def test_a_window_has_no_step_too_many():
    block_mask = BlockMask.from_expr(Causal() & SlidingWindow(1024), 131_072, 131_072, 512, 512)
    assert block_mask.num_steps == 3 * 256 - 3
    power = BlockMask.from_expr(Causal() & PowerOfTwo(512), 32_768, 32_768, 512, 512)
    assert power.num_steps == sum(1 + sum(2**e <= i for e in range(6)) for i in range(64))
    prefix = BlockMask.from_expr(Causal() | Sink(1024), 4096, 4096, 512, 512)
    assert prefix.num_steps == sum(max(i + 1, 2) for i in range(8))


def test_builds_are_cached_by_value_and_read_only():
    first = BlockMask.from_expr(Causal() & Sink(3), 31, 37, 8, 8)
    assert BlockMask.from_expr(Causal() & Sink(3), 31, 37, 8, 8) is first
    with pytest.raises(ValueError, match="read-only"):
        first.kv_idx[0] = 1


def test_it_is_a_tree_that_passes_through_jit():
    static = BlockMask.from_expr(Causal(), T, S, 4, 4)
    seen = []

    @jax.jit
    def through(block_mask: BlockMask) -> Any:
        seen.append(block_mask.is_static)
        return block_mask, block_mask.work_list()

    dynamic, steps = through(static)
    assert seen == [False]
    assert dynamic.mask == Causal()
    np.testing.assert_array_equal(dynamic.to_dense(), static.to_dense())
    assert steps.row.shape[-1] == 5 * 5 == dynamic.num_steps


# Selections


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("mask", [None, Causal(), SlidingWindow(6, 3)], ids=str)
def test_indices(mask: Mask | None, traced: bool):
    rng = np.random.default_rng(0)
    idx = np.argsort(rng.random((2, 3, 5, 6)), axis=-1)[..., :4].astype(np.int32)  # 4 of the 6 blocks, in any order
    num = rng.integers(0, 5, idx.shape[:-1])
    idx[np.arange(4) >= num[..., None]] = 77  # slots that hold no choice are not read

    def build(idx: Any, num: Any) -> BlockMask:
        return BlockMask.from_indices(idx, T, S, 4, 4, num=num, mask=mask)

    block_mask = jax.jit(build)(idx, num) if traced else build(idx, num)
    listed = np.zeros((2, 3, 5, 6), bool)
    for at in np.ndindex(num.shape):
        listed[at][idx[at][: num[at]]] = True
    wanted = listed.repeat(4, 2).repeat(4, 3)[..., :T, :S] & (Full() if mask is None else mask).dense(T, S)
    np.testing.assert_array_equal(block_mask.to_dense(), wanted)
    assert block_mask.kv_idx.shape[-1] <= 4
    assert_work_lists(block_mask, np.asarray(block_mask.to_map()))


def test_traced_repeats_count_once():
    idx = jnp.array([[2, 0, 2, 2], [1, 1, 1, 1]])
    block_mask = jax.jit(lambda idx: BlockMask.from_indices(idx, 8, 16, 4, 4))(idx)
    np.testing.assert_array_equal(block_mask.n_total[0, 0], [2, 1])
    np.testing.assert_array_equal(block_mask.kv_idx[0, 0, 0, :2], [0, 2])


# Segments


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), blocks, blocks, st.booleans())
def test_segments(seed: int, block_q: int, block_kv: int, ordered: bool):
    rng = np.random.default_rng(seed)
    q_ids, kv_ids = rng.integers(0, 5, (2, T)), rng.integers(0, 5, (2, S))
    if ordered:
        q_ids, kv_ids = np.sort(q_ids), np.sort(kv_ids)
    before = BlockMask.from_dense(random_mask(rng, 1, 3), block_q, block_kv)
    after = before.refine_segments(q_ids, kv_ids)
    assert after.is_static
    same = (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]
    np.testing.assert_array_equal(after.to_dense() & same, before.to_dense() & same)
    kinds, old = np.asarray(after.to_map()), np.asarray(before.to_map())
    assert (kinds <= old).all()
    up = kinds.repeat(block_q, 2).repeat(block_kv, 3)[..., :T, :S]
    assert np.broadcast_to(same, up.shape)[up == 2].all()  # what stays full is of one segment
    assert_lists(after, kinds)
    shifted = before.refine_segments(q_ids + 1000, kv_ids + 1000)
    np.testing.assert_array_equal(shifted.to_map(), kinds)


def test_traced_segments():
    rng = np.random.default_rng(0)
    q_ids, kv_ids = rng.integers(0, 5, (2, T)), np.sort(rng.integers(0, 5, (2, S)))
    before = BlockMask.from_dense(random_mask(rng, 1, 3), 4, 4)
    after = jax.jit(BlockMask.refine_segments)(before, q_ids, kv_ids)
    wanted = before.refine_segments(q_ids, kv_ids)
    np.testing.assert_array_equal(after.to_dense(), wanted.to_dense())
    assert_lists(after, wanted.to_map(), exact=False)
    assert after.kv_idx.shape[-1] == before.kv_idx.shape[-1]


def test_documents_cost_what_they_are():
    ids = np.repeat([[3, 1, 2, 7]], 64, axis=1)
    causal = BlockMask.from_expr(Causal(), 256, 256, 16, 16)
    documents = causal.refine_segments(ids, ids)
    assert causal.num_steps == 16 * 17 // 2
    assert documents.num_steps == 4 * (4 * 5 // 2)
    assert (documents.to_map() == 2).sum() == 4 * 6


# Predicates


def test_a_predicate_is_asked_about_every_pair():
    alibi = jnp.array([3, 9, 20])
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (2, S)))

    def predicate(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q - k < alibi[h]) & (q >= k) & (ids[b, q] == ids[b, k])

    for context in (lambda f: f(), lambda f: jax.jit(lambda x: (f(), x)[1])(0.0)):
        made = []
        context(lambda made=made: made.append(create_block_mask(predicate, 2, 3, S, S, 4, 8)))
        assert made[0].is_static
        distance = np.arange(S)[:, None] - np.arange(S)
        wanted = (distance < np.array([3, 9, 20])[:, None, None]) & (distance >= 0)
        wanted = wanted & (ids[:, :, None] == ids[:, None, :])[:, None]
        np.testing.assert_array_equal(made[0].to_dense(), wanted)
    shared = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, S, 4, 8)
    np.testing.assert_array_equal(shared.to_map(), BlockMask.from_expr(Causal(), T, S, 4, 8).to_map())


def test_a_predicate_over_many_positions_holds_one_row_of_blocks():
    length = 8192
    tracemalloc.start()
    block_mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 512), None, None, length, length, 64, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < length**2 / 8
    assert len(block_mask.bank) == 3
    np.testing.assert_array_equal(
        block_mask.to_map(), BlockMask.from_expr(Causal() & SlidingWindow(511), length, length, 64, 64).to_map()
    )


# Pictures


def test_pictures(capsys):
    BlockMask.from_expr(Causal(), 24, 32, 8, 8).show()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("BlockMask(Causal(), 24 x 32 in blocks of 8 x 8, static, one list of 3 rows")
    assert lines[3:] == ["      0  ▒▒· · ·", "      8  ██▒▒· ·", "     16  ████▒▒·"]
    long = BlockMask.from_expr(Causal(), 9000, 9000, 100, 100)
    long.show()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("one cell is 300 x 300 positions")
    assert len(lines) == 3 + 30
    assert lines[-1].endswith("██▒▒")
    assert ElementTree.fromstring(long._repr_svg_()).tag.endswith("svg")
    heads = BlockMask.from_dense(np.stack([np.eye(8, dtype=bool), np.ones((8, 8), bool)]), 4, 4)
    heads.show(head=1)
    assert "2 lists" in (text := capsys.readouterr().out)
    assert text.splitlines()[-1] == "      4  ████"


# Bad input

MAP = np.ones((5, 6), np.int8)
BAD = {
    "predicate for a mask": (lambda: BlockMask.from_expr(lambda q, k: q >= k, T, S), TypeError, "create_block_mask"),
    "no length": (lambda: BlockMask.from_expr(Causal(), 0, S), ValueError, "q_len: expected at least 1, got 0"),
    "no block": (lambda: BlockMask.from_expr(Causal(), T, S, 4, 0), ValueError, "block_kv: expected at least 1"),
    "booleans": (lambda: BlockMask.from_map(MAP > 0, T, S, 4, 4), TypeError, r"kind\.astype\(np\.int8\)"),
    "a fourth kind": (lambda: BlockMask.from_map(3 * MAP, T, S, 4, 4), ValueError, "kind: expected 0"),
    "another grid": (lambda: BlockMask.from_map(MAP, T, S, 8, 4), ValueError, r"kind: expected \[\.\.\., 3, 6\]"),
    "a list": (lambda: BlockMask.from_map(MAP.tolist(), T, S, 4, 4), TypeError, "kind: expected an array"),
    "no room": (
        lambda: BlockMask.from_map(MAP, T, S, 4, 4, max_blocks=5),
        ValueError,
        "max_blocks: a list has 6 blocks, got room for 5",
    ),
    "a bank without ids": (
        lambda: BlockMask.from_map(MAP, T, S, 4, 4, bank=np.ones((1, 4, 4), bool)),
        ValueError,
        "bank: expected bank and bank_ids",
    ),
    "a block of other size": (
        lambda: BlockMask.from_map(MAP, T, S, 4, 4, bank=np.ones((1, 4, 5), bool), bank_ids=0 * MAP),
        ValueError,
        "bank: expected .* block_kv = 4",
    ),
    "a repeat": (
        lambda: BlockMask.from_indices(np.zeros((5, 2), int), T, S, 4, 4),
        ValueError,
        "idx: a block is chosen twice .* num=",
    ),
    "a block that is not there": (
        lambda: BlockMask.from_indices(np.full((5, 1), 6), T, S, 4, 4),
        ValueError,
        "idx: expected blocks 0 to 5",
    ),
    "more than there are slots": (
        lambda: BlockMask.from_indices(np.zeros((5, 1), int), T, S, 4, 4, num=np.full(5, 2)),
        ValueError,
        "num: expected 0 to 1",
    ),
    "an additive mask": (lambda: BlockMask.from_dense(np.zeros((T, S))), TypeError, r"mask\.astype\(bool\)"),
    "segments of another length": (
        lambda: BlockMask.from_expr(Causal(), T, S).refine_segments(np.ones((1, S), int), np.ones((1, S), int)),
        ValueError,
        "q_segments: expected .* T = 17",
    ),
    "a predicate of numbers": (lambda: create_block_mask(lambda b, h, q, k: q - k, 1, 1, T, S), TypeError, "booleans"),
    "no head": (lambda: create_block_mask(lambda b, h, q, k: q > k, 1, 0, T, S), ValueError, "heads: expected at"),
    "a traced array in a predicate": (
        lambda: jax.jit(lambda x: create_block_mask(lambda b, h, q, k: x[q] == x[k], 1, 1, T, T))(np.arange(T)),
        TypeError,
        "predicate: it reads a traced array.*segment_ids=",
    ),
    "a traced array in a mask": (
        lambda: jax.jit(lambda x: BlockMask.from_expr(Fn(lambda q, k, h: x[q] == x[k], "x"), T, T))(np.arange(T)),
        TypeError,
        "mask: it reads a traced array.*from_indices",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
