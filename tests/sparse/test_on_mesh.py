"""Block-sparse attention on eight host devices against one: split by rows, heads and tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jattn import BlockMask, block_sparse_attention, dot_product_attention
from jattn.masks import Causal, Fn, Full, PowerOfTwo, Sink, SlidingWindow
from jattn.sharding import shard_attention
from jattn.sparse.on_mesh import even_out

B, T, N, K, H, V = 2, 48, 8, 4, 5, 7
SEGMENTS = np.stack([np.repeat([3, 4, 9], [10, 25, 13]), np.repeat([0, 7], [30, 18])])
MASK = Causal() & (SlidingWindow(9) | Sink(3))
SLOPES = np.linspace(0.1, 0.4, N).astype(np.float32)
TABLE = np.linspace(-1, 1, B * N).reshape(B, N).astype(np.float32)


def mesh(**axes):
    kinds = (AxisType.Auto,) * len(axes)
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=jax.devices()[:count])


def alibi(score, b, h, q_pos, kv_pos, slopes, table):
    return score + slopes[h] * (kv_pos - q_pos) * table[b, h]


def arrays(length=T):
    rng = np.random.default_rng(length)
    shapes = (B, length, N, H), (B, length, K, H), (B, length, K, V)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def value_and_gradients(op, x, **more):
    def loss(x, more):
        out = op(*x, **more, **fixed)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    fixed = {name: more.pop(name) for name in list(more) if name == "segment_ids"}
    quick = {"xla_backend_optimization_level": 0}
    gradients, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=quick)(x, more)
    return out, gradients


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    ("devices", "split"),
    [
        ({"data": 2, "tensor": 4}, {"batch": "data", "heads": "tensor"}),
        ({"context": 8}, {"context": "context"}),
        ({"context": 4, "tensor": 2}, {"context": "context", "heads": "tensor"}),
        ({"data": 2, "context": 3}, {"batch": "data", "context": "context"}),
    ],
    ids=lambda x: "-".join(x),
)
def test_every_split_is_one_device(devices, split):
    x, more = arrays(), {"captured": (SLOPES, TABLE), "sinks": SLOPES, "segment_ids": SEGMENTS}
    options = {"block_mask": MASK, "score_mod": alibi}
    want = value_and_gradients(lambda *x, **more: block_sparse_attention(*x, **more, **options), x, **more)
    got = value_and_gradients(shard_attention(block_sparse_attention, mesh(**devices), **split, **options), x, **more)
    assert_same(got, want)


@pytest.mark.parametrize(
    ("mask", "length"), [(Full(), 40), (Causal(offset=-5), 24), (PowerOfTwo(4) | SlidingWindow(2), 56)], ids=str
)
def test_any_mask_along_a_split_sequence(mask, length):
    x = arrays(length)
    want = value_and_gradients(lambda *x: block_sparse_attention(*x, mask), x)
    how = {"context": "context", "block_mask": mask}
    assert_same(value_and_gradients(shard_attention(block_sparse_attention, mesh(context=4), **how), x), want)


def test_pieces_of_an_odd_length():
    x = arrays(20)
    want = value_and_gradients(lambda *x: block_sparse_attention(*x, Causal()), x)
    on_mesh = shard_attention(block_sparse_attention, mesh(context=4), context="context", block_mask=Causal())
    assert_same(value_and_gradients(on_mesh, x), want)


@pytest.mark.parametrize("own", [(B, N), (1, K), (1, 1)], ids=str)
def test_lists_are_split_as_their_rows_and_heads(own):
    kinds = np.random.default_rng(0).integers(0, 3, (*own, T // 8, T // 8))
    for lists in (kinds, jnp.asarray(kinds)):
        block_mask = BlockMask.from_map(lists, T, T, 8, 8, mask=Causal(3))
        want = value_and_gradients(functools.partial(block_sparse_attention, block_mask=block_mask), arrays())
        how = {"batch": "data", "heads": "tensor", "block_mask": block_mask}
        on_mesh = shard_attention(block_sparse_attention, mesh(data=2, tensor=2), **how)
        assert_same(value_and_gradients(on_mesh, arrays()), want)


def test_sinks_are_counted_once_round_the_ring():
    want = value_and_gradients(
        lambda *x, **more: dot_product_attention(*x, is_causal=True, **more), arrays(), sinks=SLOPES
    )
    ring = shard_attention(dot_product_attention, mesh(context=4), context="context", is_causal=True)
    assert_same(value_and_gradients(ring, arrays(), sinks=SLOPES), want)


def loads(turns, work):
    found = [0] * (len(work) // 2)
    for turn in turns:
        assert sorted(turn.to) == list(range(len(found)))
        for device, (part, to) in enumerate(zip(*turn, strict=True)):
            found[to] += work[2 * device + part]
    assert all(a != b for a, b in zip(turns[0].part, turns[1].part, strict=True))
    return found


@pytest.mark.parametrize("devices", [1, 2, 3, 7, 16])
def test_causal_work_is_even_and_even_work_stays(devices):
    causal = list(range(1, 2 * devices + 1))
    assert loads(even_out(causal, 2), causal) == [2 * devices + 1] * devices
    assert all(turn.to == tuple(range(devices)) for turn in even_out([5] * 2 * devices, 2))


def test_no_work_makes_the_busiest_device_busier():
    rng = np.random.default_rng(0)
    for _ in range(300):
        work = rng.integers(0, 40, 2 * rng.integers(1, 9)).tolist()
        stay = [a + b for a, b in zip(work[::2], work[1::2], strict=True)]
        assert max(loads(even_out(work, 2), work)) <= max(stay)
        assert sum(loads(even_out(work, 2), work)) == sum(stay)


def test_no_two_devices_drop_the_same():
    """All queries are alike and see the same: they differ in what was dropped for them, a quarter of their keys."""
    query, key, value = arrays()
    value = np.broadcast_to(value[:1, :, :1], value.shape)
    on_mesh = shard_attention(
        block_sparse_attention, mesh(data=2, tensor=2, context=2), batch="data", heads="tensor", context="context",
        block_mask=Full(), dropout_rate=0.25,
    )  # fmt: skip
    drop = jax.jit(lambda seed: on_mesh(np.ones_like(query), np.ones_like(key), value, dropout_seed=seed))
    out, other = (np.asarray(drop(jnp.uint32(seed))).reshape(-1, V) for seed in (7, 8))
    assert len(np.unique(np.concatenate([out, other]), axis=0)) == 2 * B * T * N
    error, mean = out - value[0, :, 0].mean(axis=0), np.sqrt(np.mean(value**2) / T / 3)
    assert 0.8 * mean < np.sqrt(np.mean(error**2)) < 1.2 * mean


@pytest.mark.parametrize(
    ("split", "options", "error", "message"),
    [
        (
            {"context": "a"},
            {"block_mask": BlockMask.from_expr(Causal(), T, T, 16, 8)},
            ValueError,
            r"^block_mask: .* divides T / 4 = 12, got block_q = 16; build it with block_q=6, or pass a symbolic mask",
        ),
        (
            {"heads": "a"},
            {"block_mask": Causal() & Fn(lambda q, k, h: h > 0, "positive")},
            NotImplementedError,
            "index of its head",
        ),
    ],
    ids=["blocks", "head"],
)
def test_what_is_not_split_is_refused(split, options, error, message):
    with pytest.raises(error, match=message):
        shard_attention(block_sparse_attention, mesh(a=4), **split, **options)(*arrays())
