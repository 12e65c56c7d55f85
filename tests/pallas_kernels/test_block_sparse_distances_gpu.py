"""Score functions that add a number for every distance on the kernels for GPU, interpreted, against dense float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jattn
from jattn.masks import Causal, Full, SlidingWindow
from jattn.sparse.block_mask import BlockMask
from pallas_kernels.block_sparse import (
    BlockLists,
    Relative,
    Windows,
    block_sparse_attention,
    distances_gpu,
    gpu,
    limits,
)
from pallas_kernels.block_sparse.tiling import choose_blocks
from tests.pallas_kernels.test_block_sparse_distances import BY_DISTANCE, OTHERS
from tests.pallas_kernels.test_block_sparse_gpu import B, K, N, arrays, assert_as_dense, on_the_kernels, results

__all__ = ["on_the_kernels"]  # a fixture that every test here has
BUCKETS, FURTHEST = 32, 60


def buckets(score, b, h, q_pos, kv_pos, table, order):
    """T5's, in both directions."""
    distance, half = kv_pos - q_pos, BUCKETS // 2
    near = jnp.abs(distance)
    far = jnp.log(jnp.maximum(near, 1) / (half // 2)) / np.log(2 * FURTHEST / half) * (half // 2)
    bucket = jnp.where(near < half // 2, near, jnp.minimum(half // 2 + far.astype(jnp.int32), half - 1))
    return score + table[bucket + jnp.where(distance > 0, half, 0), order[h]]


def relative(score, b, h, q_pos, kv_pos, table, order):
    return score + table[order[h], kv_pos - q_pos + 100]


def logarithms(score, b, h, q_pos, kv_pos, slopes, order):
    """ALiBi's, with positive slopes and logarithms."""
    return score - jax.nn.softplus(slopes)[order[h]] * jnp.log1p(jnp.abs(kv_pos - q_pos))


def given(lengths, captured, dtype=np.float32):
    *found, _ = arrays(*lengths, 24, 16, dtype)
    return [*found, jnp.asarray(np.random.default_rng(1).standard_normal(captured), jnp.float32)]


def test_buckets(monkeypatch):
    """Under no mask, in blocks of two sizes, and as many runs as pairs of blocks."""
    monkeypatch.setattr(distances_gpu, "PROGRAMS", 10**6)
    mask = BlockMask.from_expr(Full(), 67, 101, 32, 48)
    assert_as_dense(mask, given((67, 101), (BUCKETS, N)), score_mod=buckets)


def test_logarithms_in_bfloat16_under_a_symbolic_mask_and_segments():
    ids = np.repeat([[0, 1, 2], [5, 5, 9]], [40, 3, 94], axis=1)
    mask = Causal() & SlidingWindow(90)
    assert_as_dense(mask, given((137, 137), (N,), jnp.bfloat16), ratio=1e-2, score_mod=logarithms, segment_ids=ids)


def test_everything_that_logits_have():
    rng, lengths = np.random.default_rng(2), (59, 71)
    more = {"kv_bias": jnp.asarray(rng.standard_normal((B, K, 71))), "sinks": jnp.asarray(rng.standard_normal(N))}
    more |= {"logits_soft_cap": 2.0, "dropout_rate": 0.3, "dropout_seed": 7}
    mask = BlockMask.from_expr(Causal(offset=9), *lengths, 32, 16)
    assert_as_dense(mask, given(lengths, (BUCKETS, N)), score_mod=buckets, **more)


def near(score, b, h, q_pos, kv_pos, table, order):
    """Not a number at the distances of tokens after the ends, which are never asked for."""
    distance = kv_pos - q_pos
    hidden = jnp.where(jnp.abs(distance) % 5 == 2, -jnp.inf, table[order[h], distance + 100])
    return score + jnp.where((distance <= -67) | (distance >= 101), jnp.nan, hidden)


@pytest.mark.parametrize(("list_rows", "list_heads", "programs"), [(1, N, 1), (B, K, 512)])
def test_lists_of_rows_and_heads(list_rows, list_heads, programs, monkeypatch):
    """Full blocks have no rule, whatever it says of them; one head and rows of blocks have no keys at all."""
    monkeypatch.setattr(distances_gpu, "PROGRAMS", programs)
    kinds = np.random.default_rng(3).integers(0, 3, (list_rows, list_heads, 3, 4)).astype(np.int8)
    kinds[-1, -1] = kinds[:, 0, 1] = 0
    mask = BlockMask.from_map(kinds, 67, 101, 32, 32, mask=Causal(offset=30))
    assert_as_dense(mask, given((67, 101), (N, 211)), score_mod=near)


def test_traced_lists_serve_every_selection():
    """And give the same bits again."""
    lengths, traces = (67, 101), 0
    arguments = given(lengths, (N, 211))
    kinds = np.random.default_rng(4).integers(0, 3, (2, B, N, 3, 4)).astype(np.int8)
    kinds[1, 0, 1] = kinds[1, :, :, 2] = 0

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, kinds, *arguments):
        nonlocal traces
        traces += 1
        block_mask = BlockMask.from_map(kinds, *lengths, 32, 32, mask=Causal(offset=30))
        return results(implementation, block_mask, arguments, score_mod=relative)

    for each in kinds:
        got, again, want = (
            run(name, jnp.asarray(each), *arguments) for name in ("interpret", "interpret", "reference")
        )
        for a, b, c in zip(got, again, want, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(a, c, atol=3e-5)
    assert traces == 2


@pytest.mark.parametrize(
    ("blocks", "programs", "list_heads"), [((32, 32), 1, 1), ((48, 32), 40, 3), ((16, 64), 10**6, 3)]
)
def test_runs_have_every_listed_pair_once(blocks, programs, list_heads, monkeypatch):
    """A run has its partial pairs first, and all of its pairs are equally far apart; known lists have no more runs."""
    monkeypatch.setattr(distances_gpu, "PROGRAMS", programs)
    lengths, list_rows = (283, 331), 2
    counts = [-(-length // block) for length, block in zip(lengths, blocks, strict=True)]
    kinds = np.random.default_rng(5).integers(0, 3, (list_rows, list_heads, *counts))
    kinds[:, -1, 1:] = 0
    order = np.argsort(np.where(kinds == 0, 3, kinds), axis=-1, kind="stable")
    lists = BlockLists(order, (kinds == 1).sum(-1), (kinds > 0).sum(-1))
    cut = choose_blocks(*lengths, 16, 16, jnp.float32, block_q=blocks[0], block_kv=blocks[1])
    p = gpu.Problem(
        batch=4, q_len=lengths[0], kv_len=lengths[1], heads=6, group=2, width=16, value_width=16, scale=1.0,
        soft_cap=None, element=None, score_mod=None, captured=(), dropout_rate=0.0, dtype=jnp.float32, axes=0,
        groups=1, distances=(613,), layers=0, runs=0, list_rows=list_rows, blocks=cut, interpret=True,
    )  # fmt: skip
    traced = BlockLists(*map(jnp.asarray, lists))
    known, bound = distances_gpu.count(p, lists), distances_gpu.count(p, traced)
    used = []
    for runs in (known, bound):
        found, kind = distances_gpu._runs(dataclasses.replace(p, runs=runs), traced)
        found = distances_gpu.Runs(*map(np.asarray, found))
        lasts = []
        for head in range(list_heads):
            pairs = []
            for run in range(runs):
                begin, full, end = (x[head, run] for x in (found.begin, found.full, found.end))
                list_row, row, col = (x[head, begin:end] for x in found[:3])
                apart = (col * blocks[1] - row * blocks[0] + (counts[0] - 1) * blocks[0]) // np.gcd(*blocks)
                np.testing.assert_array_equal(apart, kind[head, run])
                np.testing.assert_array_equal(
                    kinds[list_row, head, row, col], [1] * (full - begin) + [2] * (end - full)
                )
                pairs += zip(list_row.tolist(), row.tolist(), col.tolist(), strict=True)
            assert sorted(pairs) == sorted(map(tuple, np.argwhere(kinds[:, head]).tolist()))
            lasts.append(np.sum(found.end[head] > found.begin[head]))
        used.append(max(lasts))
    assert used == [known, known]
    assert known <= bound


def program(trained):
    """The jaxpr of a call with the gradients of some arguments; what is captured is read without a gather."""

    def run(free):
        x = fixed | free
        return jnp.sum(
            jattn.block_sparse_attention(
                x["query"], x["key"], x["value"], Causal(), score_mod=logarithms, implementation="interpret",
                captured=(x["slopes"], jnp.zeros(N, int)),
            )
        )  # fmt: skip

    fixed = dict(zip(("query", "key", "value", "slopes"), given((67, 67), (N,)), strict=True))
    free = {name: fixed.pop(name) for name in trained}
    return str(jax.make_jaxpr(jax.grad(run) if trained else run)(free))


@pytest.mark.parametrize(
    ("trained", "kernels"), [((), 1), (("query", "key", "value"), 3), (("query", "slopes"), 4)], ids=str
)
def test_which_kernels_run(trained, kernels):
    """That of the numbers, and the sort of the lists, only where their gradient is asked for."""
    found = program(trained)
    assert found.count("pallas_call[") == kernels
    assert ("block_sparse_attention_backward_table" in found) == (" sort[" in found) == ("slopes" in trained)
    assert "atomic" not in found


def test_inside_shard_map():
    """With checks of what varies, on abstract arrays and traced lists of every batch row."""
    query, key, value, table = given((67, 67), (N, 211))
    order, kinds = jnp.arange(N), jnp.ones((B, 1, 5, 5), jnp.int8)

    def each(query, key, value, kinds, table):
        mask = BlockMask.from_map(kinds, 67, 67, 16, 16)
        options = {"score_mod": relative, "captured": (table, order), "implementation": "pallas_gpu"}
        return jnp.sum(jattn.block_sparse_attention(query, key, value, mask, **options))[None]

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    specs = (*[P("data")] * 4, P())
    total = jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=P("data"))
    gradient = jax.grad(lambda *x: total(*x).sum(), (0, 4))
    assert jax.eval_shape(gradient, query, key, value, kinds, table)[1].shape == table.shape


def shapes(length, heads=2, width=16):
    return [jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)] * 3


def decided(x, mask, score_mod, captured):
    (decision,) = jattn.explain(jattn.block_sparse_attention, *x, mask, score_mod=score_mod, captured=captured)
    return decision


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_what_a_gpu_runs(name):
    captured = (jnp.zeros((2, 64)), jnp.zeros(4, jnp.int32))
    assert decided(shapes(60), Causal(), BY_DISTANCE[name], captured).chosen["cuda"] == "pallas_gpu"


@pytest.mark.parametrize("name", ["by query", "by the sum", "by batch row", "a multiple", "rows of a table"])
def test_what_it_does_not(name):
    refused = decided(shapes(60), Causal(), OTHERS[name], (jnp.zeros((2, 64)), jnp.zeros(4, jnp.int32))).refused
    assert "scalar memory and reads them by one scalar index per axis" in refused["pallas_gpu"]


def test_what_reads_scalars_stays_as_it_is():
    slopes = jnp.zeros((2, 2))
    found = limits.form(BY_DISTANCE["logarithms"], (slopes, slopes), lengths=(60, 60), platform="gpu")
    assert found == limits.Form(reads=2, adds=False, by_distance=False)
    assert limits.form(BY_DISTANCE["affine"], (slopes, slopes), lengths=(60, 60), platform="gpu").adds
    assert limits.form(BY_DISTANCE["a table"], (slopes, slopes), lengths=(60, 60), platform="gpu").by_distance


def test_a_few_queries_read_their_keys_whole():
    """In parts, which are rows of a larger batch, distances would not be the same for all rows."""
    arguments = given((3, 2048), (N, 2048))

    def last(score, b, h, q_pos, kv_pos, table, order):
        return score + table[h, kv_pos - q_pos + 3]

    assert_as_dense(Full(), arguments, score_mod=last)


def test_numbers_whose_gradient_is_too_large():
    x, captured = shapes(2**17, heads=24), (jnp.zeros((24, 64)), jnp.zeros(4, jnp.int32))
    refused = decided(x, Causal(), BY_DISTANCE["a table"], captured).refused["pallas_gpu"]
    assert (
        f"for 262143 distances takes {4 * 24 * 2047 * 128**2 / 2**30:.1f} GiB for 24 heads in blocks of 128" in refused
    )
    assert decided(shapes(2**17), Causal(), BY_DISTANCE["a table"], captured).chosen["cuda"] == "pallas_gpu"


def test_beside_a_bias_of_windows():
    place = np.arange(32, dtype=np.int32)[None]
    windows = Windows(place[None], place[None] + 1, place)
    every = np.full((1, 1, 2), 2)
    lists = BlockLists(np.tile(np.arange(2), (1, 1, 2, 1)), every, every)
    run = functools.partial(
        block_sparse_attention, by_row=lists, by_col=lists, windows=windows, scale=1.0, block_q=16, block_kv=16,
        score_mod=BY_DISTANCE["a table"], captured=(jnp.zeros((2, 64)), jnp.zeros(4, jnp.int32)), platform="gpu",
        rel_bias=Relative(jnp.zeros((2, 5)), place),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="beside rel_bias the kernel adds no numbers for distances"):
        run(*shapes(32))
