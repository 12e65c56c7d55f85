"""Lists of blocks, static and traced, on four and eight host devices along the sequence, against the dense definition
on one; and how evenly their steps are spread.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn import BlockMask, block_sparse_attention, dot_product_attention
from jattn.masks import Causal, Empty, Sink, SlidingWindow
from jattn.sharding import shard_attention
from jattn.sparse.block_mask import create_block_mask
from jattn.sparse.on_mesh import even_out, loads, route
from jattn.sparse.selection import pool_blocks, select_topk

B, T, N, K, H, V = 2, 48, 6, 2, 5, 7
SEGMENTS = np.stack([np.repeat([3, 4, 9], [10, 25, 13]), np.repeat([0, 7], [30, 18])])
SINKS = np.linspace(-1, 1, N).astype(np.float32)
SLOPES = np.linspace(0.1, 0.4, N).astype(np.float32)
RANDOM = np.random.default_rng(0)
BIAS = RANDOM.standard_normal((B, K, T)).astype(np.float32)
RULE = Causal() & (SlidingWindow(13) | Sink(5))


def mesh(**axes: int) -> Any:
    count = int(np.prod(list(axes.values())))
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=jax.devices()[:count])


def arrays(kv_len: int = T) -> list[np.ndarray]:
    rng = np.random.default_rng(kv_len)
    shapes = (B, T, N, H), (B, kv_len, K, H), (B, kv_len, K, V)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def alibi(score, b, h, q_pos, kv_pos, slopes):
    return score + slopes[h] * (kv_pos - q_pos)


def documents(lengths: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(lengths)), lengths)


def both(op: Any, x: list[np.ndarray], fixed: dict[str, Any], trained: dict[str, Any]) -> Any:
    """The output, and the gradients of a projection of it by all arrays of floats."""

    def loss(x: Any, trained: Any) -> Any:
        out = op(*x, **trained, **fixed)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    quick = {"xla_backend_optimization_level": 0}
    gradients, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=quick)(x, trained)
    return out, gradients


def assert_as_one_device(
    devices: dict[str, int], make: Any, x: list[np.ndarray], ids: Any = None, trained: Any = None, **options
):
    """`make(query, key)` gives the mask, inside of the program; axes are named as the arguments that they split."""

    def on_one(query: Any, key: Any, value: Any, **given: Any) -> Any:
        block_mask = make(query, key)
        return block_sparse_attention(query, key, value, block_mask, implementation="reference", **options, **given)

    def split(query: Any, key: Any, value: Any, **given: Any) -> Any:
        axes = {axis: axis for axis in devices}
        how = shard_attention(block_sparse_attention, mesh(**devices), **axes, block_mask=make(query, key), **options)
        return how(query, key, value, **given)

    fixed = {} if ids is None else {"segment_ids": ids}
    want, got = (both(op, x, fixed, trained or {}) for op in (on_one, split))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))
        assert np.abs(b).max() > 1e-3


def test_static_lists_with_everything_that_a_call_can_have():
    lists = BlockMask.from_expr(RULE, T, T, 6, 8)
    trained = {"sinks": SINKS, "captured": (SLOPES,), "kv_bias": BIAS}
    options = {"score_mod": alibi, "logits_soft_cap": 1.7, "scale": 0.9}
    assert_as_one_device({"context": 4}, lambda *_: lists, arrays(), SEGMENTS, trained, **options)


@pytest.mark.parametrize("devices", [{"context": 8}, {"context": 4, "heads": 2}], ids=str)
def test_chosen_blocks_of_every_head_under_a_soft_cap_without_a_rule(devices):
    idx = np.argsort(np.random.default_rng(1).random((1, N, 16, 7)), axis=-1)[..., :3]
    num = np.random.default_rng(2).integers(0, 4, (1, N, 16))
    lists = BlockMask.from_indices(idx, T, T, 3, 7, num=num)
    assert_as_one_device(devices, lambda *_: lists, arrays(), trained={"kv_bias": BIAS}, logits_soft_cap=1.3)


def test_blocks_that_the_program_selects():
    def select(query: Any, key: Any) -> BlockMask:
        keys = jnp.repeat(pool_blocks(key, 8), N // K, axis=2)
        idx, num = select_topk(jnp.einsum("bqnh,bknh->bnqk", pool_blocks(query, 6), keys), 4)
        return BlockMask.from_indices(idx, T, T, 6, 8, num=num, mask=Causal(2))

    assert_as_one_device({"batch": 2, "context": 4}, select, arrays(), trained={"sinks": SINKS})


def test_a_bank_of_documents():
    ids = documents([2, 21, 9, 16])
    bank = create_block_mask(lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k) & (k > b), B, None, T, T, 3, 5)
    assert bank.bank is not None
    assert_as_one_device({"context": 4}, lambda *_: bank, arrays(), logits_soft_cap=2.0)


def test_full_blocks_are_full_whatever_the_rule_says_of_them():
    """Of fewer queries than keys, with an odd number of rows for each device and a last block that has few keys."""
    kinds = RANDOM.integers(0, 3, (B, K, 12, 8))
    assert ((kinds == 2) & (Causal(3).block_kinds(T, 60, 4, 8) != 2)).any()
    lists = BlockMask.from_map(kinds, T, 60, 4, 8, mask=Causal(3))
    assert_as_one_device({"context": 4}, lambda *_: lists, arrays(60))


@pytest.mark.parametrize(
    ("kv_len", "options"),
    [
        (T, {"mask": SlidingWindow(11, 4), "logits_soft_cap": 1.5}),
        (T, {"mask": ~Causal(-9), "is_causal": True, "logits_soft_cap": 1.5}),
        (60, {"mask": Causal(), "scale": 0.8}),
        (T, {"mask": Empty()}),
    ],
    ids=("window", "both", "longer", "nothing"),
)
def test_softmax_attention_under_any_mask(kv_len, options):
    x, dense = arrays(kv_len), functools.partial(dot_product_attention, implementation="reference", **options)
    on_mesh = shard_attention(dot_product_attention, mesh(context=4), context="context", **options)
    np.testing.assert_allclose(jax.jit(on_mesh)(*x, sinks=SINKS), dense(*x, sinks=SINKS), rtol=0, atol=1e-5)


def test_axes_may_be_explicit():
    axes = jax.make_mesh((4, 2), ("context", "tensor"), axis_types=(AxisType.Explicit, AxisType.Auto))
    lists = BlockMask.from_expr(Causal(), T, T, 6, 8)
    placed = [jax.device_put(a, NamedSharding(axes, P(None, "context"))) for a in arrays()]
    how = {"context": "context", "heads": "tensor", "block_mask": lists}
    with jax.set_mesh(axes):
        out = jax.jit(shard_attention(block_sparse_attention, axes, **how))(*placed)
    np.testing.assert_allclose(out, block_sparse_attention(*arrays(), lists), rtol=0, atol=1e-5)


# Balance, counted from lists


def spread_out(block_mask: Any, devices: int) -> tuple[float, float, float]:
    """The steps of the busiest device over the mean: of what `route` does, of pieces that stay where they are, and of
    the device that has the largest part and the smallest ones beside it.
    """
    rows, way = route(block_mask, block_mask.q_len, block_mask.kv_len, devices)
    steps = np.asarray(rows.lists.n_total).sum(axis=(0, 1))
    work = steps.reshape(devices * len(way.turns), -1).sum(axis=1)
    found = loads(way.turns, work.tolist())
    assert sum(found) == block_mask.n_total.sum()
    stay = steps.reshape(devices, -1).sum(axis=1)
    forced = work.max() + np.sort(work)[: len(way.turns) - 1].sum()
    return max(found) / stay.mean(), stay.max() / stay.mean(), forced / stay.mean()


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_causal_steps_are_spread_evenly(devices):
    busiest, before, _ = spread_out(BlockMask.from_expr(Causal(), 2048, 2048, 32, 32), devices)
    assert busiest == 1
    assert before > 1.4


@pytest.mark.parametrize("devices", [4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_the_steps_of_documents_are_spread_evenly(devices, seed):
    """Lengths as text has them: most are short, and a few are as long as what a device holds.

    A part is not cut, so no way of dealing them out has less than the largest with the smallest beside it.
    """
    lengths = np.random.default_rng(seed).lognormal(6, 0.8, 200).astype(int) + 1
    ids = documents(list(lengths))[:8192].reshape(-1, 32)
    low, high = ids.min(axis=1), ids.max(axis=1)
    kinds = (low[:, None] <= high) & (low <= high[:, None]) & np.tri(256, dtype=bool)
    busiest, before, forced = spread_out(BlockMask.from_map(kinds.astype(int), 8192, 8192, 32, 32), devices)
    assert busiest < 1.1 * max(1, forced)
    assert before > 1.1
    assert forced < 1.15


def test_traced_rows_go_in_zigzag_and_even_ones_stay():
    ways = []

    def trace(kinds: Any) -> Any:
        ways.append(route(BlockMask.from_map(kinds, 64, 64, 4, 4), 64, 64, 4)[1])
        return kinds

    jax.eval_shape(trace, jax.ShapeDtypeStruct((16, 16), jnp.int32))
    ways += [route(SlidingWindow(8), 2**12, 2**12, 4)[1], route(Causal(), 3 * 2**9, 3 * 2**9, 4)[1]]
    pairs: dict[int, list[int]] = {}
    for turn in ways[0].turns:
        for device, (part, to) in enumerate(zip(*turn, strict=True)):
            pairs.setdefault(to, []).append(2 * device + part)
    assert sorted(map(sorted, pairs.values())) == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert [turn.to for turn in ways[1].turns] == [(0, 1, 2, 3)]
    assert (ways[1].block_q, ways[2].block_q) == (512, 192)


def test_blocks_of_a_symbolic_mask_are_those_that_kernels_take():
    for length, block in ((4096, 512), (1280, 128), (768, 384), (14, 7), (13, 13), (1018, 509)):
        assert route(Causal(), 4 * length, 4 * length, 4)[1].block_q == block


def test_turns_are_permutations_for_any_number_of_parts():
    rng = np.random.default_rng(0)
    for _ in range(200):
        devices, parts = rng.integers(1, 9), rng.integers(1, 6)
        work = (rng.integers(0, 40, devices * parts) ** 2).tolist()
        turns = even_out(work, parts)
        assert all(sorted(turn.to) == list(range(devices)) for turn in turns)
        assert [sorted(each) for each in zip(*(turn.part for turn in turns), strict=True)] == [
            list(range(parts))
        ] * devices
        stay = np.reshape(work, (devices, parts)).sum(axis=1)
        assert max(loads(turns, work)) <= stay.max()
        # No device has more than the mean and the largest part together.
        assert max(loads(turns, work)) == stay.max() or max(loads(turns, work)) <= stay.mean() + max(work)
