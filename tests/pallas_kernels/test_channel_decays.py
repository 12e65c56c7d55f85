"""All ways of the kernels with decays of channels, and when each is taken, against the recurrence in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.linear import delta_rule
from jattn.linear import recurrence as additive
from pallas_kernels import linear
from pallas_kernels.linear import additive as additive_kernel
from pallas_kernels.linear import channel_decays, gates
from pallas_kernels.linear import delta as delta_kernel
from pallas_kernels.linear.programs import Blocks
from pallas_kernels.linear.tiling import Tiling

LENGTH = 29
BLOCKS = Tiling(chunk=8, chunks=2, heads=1, lag=1)
ON_GPU = Blocks(chunk=8, tile=8, value_tile=8)
# query heads, key heads, states
HEADS = {"alike": (2, 2, 2), "grouped": (4, 2, 2), "shared": (2, 2, 4)}
SEGMENTS = {
    "inside chunks": [17, 5, 7],
    "at their ends": [8, 16, 5],
    "many in one": [2, 1, 1, 2, 20, 3],
    "single tokens": [1] * LENGTH,
}
NAMES = ("out", "end", "query", "key", "value", "gate", "initial", "beta")


def operands(op, heads="alike", dtype=jnp.float32, width=7, value_width=5):
    queries, keys, states = HEADS[heads]
    random = [jax.random.normal(key, (1, LENGTH, 64)) for key in jax.random.split(jax.random.key(0), 8)]

    def of(i, heads, width):
        return random[i][:, :, : heads * width].reshape(1, LENGTH, heads, width)

    query, key, value = of(0, queries, width), of(1, keys, width), of(2, states, value_width)
    key /= jnp.linalg.norm(key, axis=-1, keepdims=True)
    state = jax.random.normal(jax.random.key(3), (1, states, width, value_width))
    arguments = [*(x.astype(dtype) for x in (query, key, value)), moderate(states, width), state]
    if op == "delta":
        arguments.append(jax.nn.sigmoid(random[4][:, :, :states]))
    cotangents = of(5, max(queries, states), value_width).astype(dtype), jnp.roll(state, 1, axis=-1)
    return arguments, cotangents


def moderate(states, width):
    """Up to 40 in half a chunk of 8 rows, and in other channels hardly anything."""
    strength = jnp.linspace(0.01, 10, states * width).reshape(states, width)
    return -strength * jax.random.uniform(jax.random.key(7), (1, LENGTH, states, width))


def of_halves(total, states=2, width=7, at=(...,)):
    """Gates that sum to `total` in every half of a chunk, exactly."""
    return moderate(states, width).at[at].set(total / (BLOCKS.chunk // 2))


LIMIT = gates.MODERATE
MODERATE, SPLIT, STRONG = WAYS = (0, channel_decays.SPLITS, 3)
"""Halvings of a chunk of 8 rows; what is left of a split one are pairs of rows, half of which is one row."""
ALL = {way: (way, way) for way in WAYS}
GATES = {
    # For the first and the second grid step: the way of either head.
    "moderate": (moderate(2, 7), (ALL[MODERATE], ALL[MODERATE])),
    "none": (jnp.zeros((1, LENGTH, 2, 7)), (ALL[MODERATE], ALL[MODERATE])),
    "at the limit": (of_halves(-LIMIT, at=(..., slice(3))), (ALL[MODERATE], ALL[MODERATE])),
    "beyond it": (
        of_halves(-LIMIT, at=(..., slice(3))).at[:, 3, 1, 2].add(-1e-3),
        ((MODERATE, SPLIT), ALL[MODERATE]),
    ),
    "beyond it everywhere": (of_halves(-LIMIT - 1e-2, at=(..., slice(0, None, 4))), (ALL[SPLIT], ALL[SPLIT])),
    "one channel of one head": (
        of_halves(-LIMIT - 1, at=(0, slice(20, None), 0, 2)),
        (ALL[MODERATE], (SPLIT, MODERATE)),
    ),
    "strong and weak": (moderate(2, 7).at[..., ::2].set(-20.0), (ALL[SPLIT], ALL[SPLIT])),
    "at the limit of a split": (moderate(2, 7).at[:, ::3, :, 4].set(-LIMIT), (ALL[SPLIT], ALL[SPLIT])),
    "beyond that": (
        moderate(2, 7).at[:, ::3, :, 4].set(-LIMIT).at[:, 21, 0, 4].add(-1e-3),
        (ALL[SPLIT], (STRONG, SPLIT)),
    ),
    "strong": (moderate(2, 7) * 20, (ALL[STRONG], ALL[STRONG])),
    "one that forgets all": (moderate(2, 7).at[:, 23].set(-1e4), (ALL[MODERATE], ALL[STRONG])),
}
TAKEN = []
"""Of every grid step that was run on TPU: its number, and how it was worked."""


@functools.cache
def kernel(op, way=None, blocks=BLOCKS):
    """Outputs and every gradient; with `way`, every step that way whatever its gates."""
    by_strength = channel_decays.by_strength

    def watched(p, gate_ref, borders_ref, step, work, *, sums_ref=None):
        def told(taken):
            jax.debug.callback(lambda step: TAKEN.append((int(step), taken.halvings)), step)
            work(taken)

        if way is None:
            by_strength(p, gate_ref, borders_ref, step, told, sums_ref=sums_ref)
        else:
            if sums_ref is not None:
                channel_decays.keep_all_sums(p, gate_ref, sums_ref, step)
            told(channel_decays.Way(p, way, borders_ref))

    def both(arguments, cotangents, segment_ids):
        def fused(query, key, value, gate, state, *beta):
            entry = linear.delta_rule if beta else linear.linear_attention
            operands = (query, key, value, *beta, gate, segment_ids, state)
            platform = "interpret" if isinstance(blocks, Tiling) else "interpret_gpu"
            return entry(*operands, scale=0.7, platform=platform, blocks=blocks)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(channel_decays, "by_strength", watched)
            if way is not None:
                patch.setattr(gates, "MODERATE", 1e9 if way == MODERATE else -1e9)
            # Their caches know nothing of the way that is forced.
            for entry in (additive_kernel, delta_kernel):
                for name in ("_run", "_gradients"):
                    patch.setattr(entry, name, getattr(entry, name).__wrapped__)
            out, transpose = jax.vjp(fused, *arguments)
            return (*out, *transpose(cotangents))

    return jax.jit(both)


@jax.jit
def recurrence(arguments, cotangents, segment_ids):
    def tokens(query, key, value, gate, state, *beta):
        scan = delta_rule.token_scan if beta else additive.token_scan
        options = {"scale": 0.7, "chunk_size": None, "out_dtype": query.dtype}
        return scan(query, key, value, *beta, gate, segment_ids, state, **options)

    out, transpose = jax.vjp(tokens, *arguments)
    return (*out, *transpose(cotangents))


def pairs(run, arguments, cotangents, segment_ids=None):
    """What a kernel gives and what the recurrence in float64 does, by name."""
    TAKEN.clear()
    got = run(arguments, cotangents, segment_ids)
    jax.effects_barrier()
    with jax.enable_x64(True):
        arguments, cotangents = jax.tree.map(lambda x: x.astype(jnp.float64), (arguments, cotangents))
        want = recurrence(arguments, cotangents, segment_ids)
    assert len(got) == len(want)
    return {name: (x, y) for name, x, y in zip(NAMES, got, want, strict=False)}


def assert_near(pairs, ratio):
    for name, (x, y) in pairs.items():
        x, y = np.asarray(x, np.float64), np.asarray(y)
        error = np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))
        assert error < ratio, f"{name}: {error:.2g}"


each_op = pytest.mark.parametrize("op", ["additive", "delta"])
sharing = pytest.mark.parametrize(("op", "heads"), [("additive", "grouped"), ("delta", "grouped"), ("delta", "shared")])
either_packing = pytest.mark.parametrize("packed", [None, np.repeat([[0, 1]], [11, 18], axis=1)], ids=["one", "two"])
each_way = pytest.mark.parametrize("way", WAYS)


@each_op
@pytest.mark.parametrize("name", GATES)
def test_values_gradients_and_the_way_to_them(op, name):
    arguments, cotangents = operands(op)
    arguments[3], ways = GATES[name]
    assert_near(pairs(kernel(op), arguments, cotangents), 1e-5)
    # Both heads, forward and backward.
    assert sorted(TAKEN) == [(step, way) for step, heads in enumerate(ways) for way in sorted(heads * 2)]


def ids(name):
    return np.repeat([[2 * i + 3 for i in range(len(SEGMENTS[name]))]], SEGMENTS[name], axis=1)


@each_op
@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_leave_decay_moderate(op, name):
    """Whatever the gates of their first tokens, through which nothing passes."""
    arguments, cotangents = operands(op)
    arguments[3] = arguments[3].at[:, np.cumsum(SEGMENTS[name])[:-1]].set(-1e4)
    assert_near(pairs(kernel(op), arguments, cotangents, ids(name)), 1e-5)
    assert {taken for _, taken in TAKEN} == {MODERATE}


@each_op
@pytest.mark.parametrize("way", [SPLIT, STRONG])
@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_and_strong_gates(op, name, way):
    arguments, cotangents = operands(op)
    arguments[3] = GATES["strong and weak"][0]
    assert_near(pairs(kernel(op, way), arguments, cotangents, ids(name)), 1e-5)
    assert {taken for _, taken in TAKEN} == {way}


ONE_CHUNK = dataclasses.replace(BLOCKS, chunk=64, chunks=1)


@each_op
@pytest.mark.parametrize("way", [MODERATE, SPLIT, 6])
def test_halves_that_are_whole_tiles(op, way):
    """A chunk of 64 rows, split into 16."""
    arguments, cotangents = operands(op)
    arguments[3] /= 8
    assert_near(pairs(kernel(op, way, ONE_CHUNK), arguments, cotangents), 1e-5)
    assert {taken for _, taken in TAKEN} == {way}


@each_op
def test_a_split_at_its_limit(op):
    """Of either half of 16 rows one forgets as much as may be, the first row of the second half among them."""
    arguments, cotangents = operands(op)
    arguments[3] = jnp.zeros_like(arguments[3]).at[:, 1::16, :, 4].set(-LIMIT).at[:, 8::16, :, 4].set(-LIMIT)
    assert_near(pairs(kernel(op, blocks=ONE_CHUNK), arguments, cotangents), 1e-5)
    assert {taken for _, taken in TAKEN} == {SPLIT}


@each_op
@pytest.mark.parametrize(("share", "way"), [(0.9, MODERATE), (1.1, SPLIT)])
def test_the_limit_in_bfloat16(op, share, way):
    """Where sums are those of binary logarithms."""
    arguments, cotangents = in_bfloat16(op)
    arguments[3] = of_halves(-share * LIMIT, width=16, at=(..., slice(3)))
    assert_near_in_bfloat16(pairs(kernel(op), arguments, cotangents))
    assert {taken for _, taken in TAKEN} == {way}


@each_op
@pytest.mark.parametrize("chunks", [3, 4])
def test_chunks_in_a_loop(op, chunks):
    """One by one, and two by two."""
    arguments, cotangents = operands(op)
    arguments[3] = GATES["strong"][0]
    assert_near(pairs(kernel(op, blocks=dataclasses.replace(BLOCKS, chunks=chunks)), arguments, cotangents), 1e-5)
    assert {taken for _, taken in TAKEN} == {STRONG}


@each_way
@either_packing
@sharing
def test_heads_that_share(op, heads, packed, way):
    blocks = dataclasses.replace(BLOCKS, heads=2)
    assert_near(pairs(kernel(op, way, blocks), *operands(op, heads), packed), 1e-5)
    assert {taken for _, taken in TAKEN} == {way}


@each_op
@each_way
@either_packing
def test_bfloat16(op, packed, way):
    assert_near_in_bfloat16(pairs(kernel(op, way), *in_bfloat16(op), packed))
    assert {taken for _, taken in TAKEN} == {way}


def in_bfloat16(op):
    return operands(op, dtype=jnp.bfloat16, width=16, value_width=11)


def assert_near_in_bfloat16(found):
    summed = ("gate", "beta")
    assert_near({name: pair for name, pair in found.items() if name not in summed}, 5e-3)
    assert_near({name: pair for name, pair in found.items() if name in summed}, 1e-2)


@each_op
@pytest.mark.parametrize("name", GATES)
def test_values_and_gradients_on_gpu(op, name):
    arguments, cotangents = operands(op)
    arguments[3], _ = GATES[name]
    assert_near(pairs(kernel(op, blocks=ON_GPU), arguments, cotangents), 1e-5)


@each_op
@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_on_gpu(op, name):
    assert_near(pairs(kernel(op, blocks=ON_GPU), *operands(op), ids(name)), 1e-5)


each_way_on_gpu = pytest.mark.parametrize("way", [MODERATE, STRONG])


@each_op
@pytest.mark.parametrize(("name", "way"), [("at the limit", MODERATE), ("beyond it everywhere", STRONG)])
def test_the_way_on_gpu(op, name, way):
    """The one that is taken gives the bits of the one that is forced, and not those of the other: in every tile."""
    arguments, cotangents = operands(op)
    arguments[3], _ = GATES[name]
    forced = {way: kernel(op, way, ON_GPU)(arguments, cotangents, None) for way in (MODERATE, STRONG)}
    chosen = kernel(op, blocks=ON_GPU)(arguments, cotangents, None)
    for x, y in zip(chosen, forced.pop(way), strict=True):
        np.testing.assert_array_equal(x, y)
    (other,) = forced.values()
    assert any(np.any(x != y) for x, y in zip(chosen, other, strict=True))


@each_way_on_gpu
@sharing
def test_heads_that_share_on_gpu(op, heads, way):
    assert_near(pairs(kernel(op, way, ON_GPU), *operands(op, heads)), 1e-5)


@each_op
@each_way_on_gpu
def test_bfloat16_on_gpu(op, way):
    assert_near_in_bfloat16(pairs(kernel(op, way, ON_GPU), *in_bfloat16(op)))
