"""Relative position bias on the kernels for GPU, interpreted, against the dense definition in float64; pairs alike."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jattn
from jattn.dispatch import Implementation
from jattn.models.nat import NAT, NATConfig
from jattn.neighborhood import fused, neighborhood
from jattn.neighborhood.tiles import tile_plan
from jattn.neighborhood.window import Neighborhood
from pallas_kernels.block_sparse import BlockLists, Relative, Windows, block_sparse_attention, relative, relative_gpu

B, N, K, H, V = 2, 6, 2, 13, 19


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    """`implementation="interpret"` is that of the kernels for GPU."""
    run, check = (
        functools.partial(f, "interpret_gpu") for f in (neighborhood._on_kernels, fused.check_fused_neighborhood)
    )
    others = [each for each in neighborhood._IMPLEMENTATIONS if each.name != "interpret"]
    monkeypatch.setattr(neighborhood, "_IMPLEMENTATIONS", (*others, Implementation("interpret", run, check)))


def arrays(grid, window, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"query": (B, *grid, N, H), "key": (B, *grid, K, H), "value": (B, *grid, K, V)}
    shapes["rel_pos_bias"] = (N, *(2 * w - 1 for w in window))
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def loss(x, implementation, **options):
    """A number that depends on all outputs and log-sum-exps, and these."""
    out, lse = jattn.neighborhood_attention(**x, **options, return_lse=True, implementation=implementation)
    seen = jnp.isfinite(lse)
    lse = jnp.where(seen, lse, 0)
    return jnp.sum(jnp.sin(3 * out.astype(lse.dtype))) + jnp.sum(jnp.cos(lse)), (out, lse, seen)


def results(x, implementation, **options):
    run = jax.value_and_grad(functools.partial(loss, implementation=implementation, **options), has_aux=True)
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    for _ in range(2):
        (_, found), gradients = run(x)
        yield dict(zip(("out", "lse", "seen"), found, strict=True)) | gradients


def assert_as_dense(x, *, ratio=2e-6, **options):
    got, again = results(x, "interpret", **options)
    jax.tree.map(np.testing.assert_array_equal, got, again)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(a), np.float64) for name, a in x.items()}
        want = next(results(wide, "reference", **options))
    for name, wanted in want.items():
        a, b = np.asarray(got[name], np.float64), np.asarray(wanted, np.float64)
        assert np.sqrt(np.mean((a - b) ** 2)) <= ratio * np.sqrt(np.mean(b**2)), name
    return got


@pytest.mark.parametrize(
    ("grid", "window", "programs", "options"),
    [
        ((101,), (11,), 10**6, {"dilation": 3}),
        ((17, 19), (5, 4), 1, {"dilation": (2, 1)}),
        ((5, 7, 11), (3, 2, 5), 100, {"dilation": (1, 1, 2)}),
        ((13, 11), (3, 5), 700, {"q_tile": (3, 16), "kv_tile": (4, 16)}),
    ],
    ids=["a line in unequal groups", "an image in groups, even windows", "a volume", "tiles that do not line up"],
)
def test_windows(grid, window, programs, options, monkeypatch):
    """The pairs of a kind shared out to one program each, to one, to some."""
    monkeypatch.setattr(relative_gpu, "PROGRAMS", programs)
    assert_as_dense(arrays(grid, window), kernel_size=window, **options)


def test_windows_that_the_op_does_not_define_a_bias_for(monkeypatch):
    """Strides, blocks and causal axes, whose distances are in the table too."""
    monkeypatch.setattr(neighborhood, "check_rel_pos_bias", lambda *_: None)
    options = {"stride": (2, 3), "dilation": (1, 2), "is_causal": (True, False)}
    assert_as_dense(arrays((13, 17), (5, 3)), kernel_size=(5, 3), **options)


def test_hidden_keys():
    """And windows that are hidden whole."""
    mask = jnp.asarray(np.random.default_rng(1).random((B, 13, 11)) >= 0.7)
    got = assert_as_dense(arrays((13, 11), (2, 2)), kernel_size=2, key_mask=mask)
    hidden = ~np.asarray(got["seen"])
    assert 10 < hidden[..., 0].sum() < 100
    assert not np.asarray(got["out"])[hidden].any()
    assert not np.asarray(got["query"])[hidden].any()


def test_bfloat16():
    got = assert_as_dense(arrays((13, 11), (5, 7), jnp.bfloat16), kernel_size=(5, 7), ratio=5e-3)
    assert got["rel_pos_bias"].dtype == got["key"].dtype == jnp.bfloat16


def program(trained):
    """The jaxpr of a call with the gradients of some arrays."""
    x = arrays((13, 11), (3, 3))
    fixed = {name: a for name, a in x.items() if name not in trained}

    def run(free):
        return loss(free | fixed, "interpret", kernel_size=3)[0]

    free = {name: x[name] for name in trained}
    return str(jax.make_jaxpr(jax.grad(run) if trained else run)(free))


@pytest.mark.parametrize(
    ("trained", "kernels"), [((), 1), (("query", "key", "value"), 3), (("query", "rel_pos_bias"), 4)]
)
def test_which_kernels_run(trained, kernels):
    """That of the bias only where its gradient is asked for."""
    found = program(trained)
    assert found.count("pallas_call[") == kernels
    assert ("block_sparse_attention_backward_table" in found) == ("rel_pos_bias" in trained)


def test_nothing_is_added_up_in_any_order():
    """No atomics in kernels and no scatters around them: on a GPU the same bits come twice."""
    found = program(("query", "key", "value", "rel_pos_bias"))
    assert "atomic" not in found
    assert "scatter" not in found


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_inside_shard_map(platform):
    """With checks of what varies, on abstract arrays."""
    x = arrays((13, 11), (3, 3))
    table = x.pop("rel_pos_bias")

    def each(x, table):
        operands = neighborhood.Operands(**x, rel_pos_bias=table)
        options = {"neighborhood": Neighborhood(3).on((13, 11)), "score": fused.Score(1.0, None)}
        return jnp.sum(fused.general(platform, operands, **options, q_tile=None, kv_tile=None)[0])[None]

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    total = jax.shard_map(each, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    got = jax.eval_shape(jax.grad(lambda x, table: total(x, table).sum(), (0, 1)), x, table)
    assert got[1].shape == table.shape


def test_with_everything_that_the_kernels_have():
    """A soft cap, a score function with trained numbers, sinks, biases of keys, segments; rows that see nothing."""
    rng, length, size = np.random.default_rng(0), 48, 16
    shapes = ((B, length, N, H), (B, length, K, H), (B, length, K, V), (N, 9), (N,), (B, K, length), (N,))
    given = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    place = np.arange(length, dtype=np.int32)[None]
    low, high = np.maximum(place - 4, 0)[None], np.minimum(place + 5, length)[None]
    high[..., 7] = 0
    ids = jnp.asarray(np.repeat([[0, 1], [2, 2]], [20, 28], axis=1))
    met = np.abs(np.arange(3)[:, None] - np.arange(3)) <= 1
    order = np.argsort(~met, axis=1, kind="stable")
    lists = BlockLists(order[None, None], met.sum(1)[None, None], met.sum(1)[None, None])

    def score_mod(score, b, h, q_pos, kv_pos, slopes):
        return score - 0.1 * (b + 1) * slopes[h] * jnp.abs(q_pos - kv_pos)

    def kernels(query, key, value, table, slopes, kv_bias, sinks):
        options = {"score_mod": score_mod, "captured": (slopes,), "kv_bias": kv_bias, "sinks": sinks}
        options |= {"q_segment_ids": ids, "kv_segment_ids": ids, "windows": Windows(low, high, place)}
        options |= {"rel_bias": Relative(table, place), "scale": 0.3, "soft_cap": 2.0, "platform": "interpret_gpu"}
        return block_sparse_attention(query, key, value, lists, lists, block_q=size, block_kv=size, **options)

    def dense(query, key, value, table, slopes, kv_bias, sinks):
        key, value, kv_bias = (jnp.repeat(x, N // K, axis) for x, axis in ((key, 2), (value, 2), (kv_bias, 1)))
        distance = place - place.T
        y = 0.3 * jnp.einsum("btnh,bsnh->bnts", query, key) + kv_bias[:, :, None]
        y = y + table[:, np.clip(distance + 4, 0, 8)]
        slopes = slopes[:, None, None] * np.arange(1, B + 1)[:, None, None, None]
        z = 2 * jnp.tanh((y - 0.1 * slopes * np.abs(distance)) / 2)
        seen = (place >= low[0].T) & (place < high[0].T) & (ids[:, None, :, None] == ids[:, None, None])
        z = jnp.where(seen, z, -jnp.inf)
        lse = jnp.logaddexp(jax.nn.logsumexp(z, axis=-1), sinks[:, None])
        out = jnp.einsum("bnts,bsnv->btnv", jnp.where(seen, jnp.exp(z - lse[..., None]), 0), value)
        return out, jnp.moveaxis(lse, 1, 2)

    def run(attention, given):
        def total(given):
            out, lse = attention(*given)
            return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.cos(lse)), (out, lse)

        found = jax.jit(jax.value_and_grad(total, has_aux=True))(given)
        return jax.tree.leaves((found[0][1], found[1]))

    got = run(kernels, given)
    with jax.enable_x64(True):
        want = run(dense, [jnp.asarray(np.asarray(x), np.float64) for x in given])
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.sqrt(np.mean((a - b) ** 2)) <= 2e-6 * np.sqrt(np.mean(b**2))


# Pairs of tiles that are alike


@pytest.mark.parametrize(
    ("grid", "window", "dilation", "q_tile", "kv_tile", "layers"),
    [
        ((101,), (11,), (3,), (16,), (16,), 1),
        ((17, 19), (5, 4), (2, 1), (4, 8), (4, 4), 1),
        ((17, 19), (5, 4), (1, 1), (3, 16), (4, 32), 8),
        ((5, 7, 11), (3, 2, 5), (1, 2, 1), (2, 2, 4), (1, 4, 8), 4),
    ],
)
def test_pairs_that_are_alike(grid, window, dilation, q_tile, kv_tile, layers):
    """Every listed pair of tiles is of one kind, its distances are those of the kind, and no two sums share a place."""
    plan = tile_plan(grid, window, 1, dilation, q_tile=q_tile, kv_tile=kv_tile)
    sizes = [2 * w - 1 for w in window]
    bias = Relative(jnp.zeros((N, *sizes)), plan.query_coordinates)
    lists = fused._lists("gpu", plan, False)
    found, count = relative.alike(bias, plan.key_coordinates, lists, blocks=(plan.q_places, plan.kv_places))
    assert count == layers
    q, kv = (
        x.reshape(len(grid), -1, size)
        for x, size in ((plan.query_coordinates, plan.q_places), (plan.key_coordinates, plan.kv_places))
    )
    listed = {
        (g, row, int(col))
        for g, row in itertools.product(range(plan.groups), range(plan.q_tiles))
        for col in lists.idx[g, 0, row, : lists.n_total[g, 0, row]]
    }
    seen, written = [], set()
    for kind, (pairs, layer) in enumerate(zip(found.pairs.tolist(), found.layer.tolist(), strict=True)):
        of_kind = [tuple(int(x[kind, i]) for x in (found.list_row, found.row, found.col)) for i in range(pairs)]
        seen += of_kind
        distances = {(kv[:, col, None, :] - q[:, row, :, None]).tobytes() for _, row, col in of_kind}
        (bits,) = distances
        distance = np.frombuffer(bits, np.int32).reshape(len(grid), plan.q_places, plan.kv_places)
        inside = (np.abs(distance) < np.array(window)[:, None, None]).all(axis=0)
        for t, s in np.argwhere(inside):
            place = layer, t, *distance[:, t, s].tolist()
            assert place not in written
            written.add(place)
    assert len(seen) == len(set(seen))
    assert set(seen) == listed


def call(**changes):
    """A call of the kernels on 32 tokens of a line."""
    place = np.arange(32, dtype=np.int32)[None]
    windows = Windows(np.maximum(place - 2, 0)[None], np.minimum(place + 3, 32)[None], place)
    every = np.full((1, 1, 2), 2)
    lists = BlockLists(np.tile(np.arange(2), (1, 1, 2, 1)), every, every)
    x = dict.fromkeys(("query", "key", "value"), jax.ShapeDtypeStruct((1, 32, 2, 16), jnp.float32))
    given = {"by_row": lists, "by_col": lists, "windows": windows, "platform": "gpu", "table": (2, 5), "place": place}
    given |= {"scale": 1.0, "block_q": 16, "block_kv": 16} | changes
    table = jnp.zeros(given.pop("table"))
    return jax.eval_shape(
        functools.partial(block_sparse_attention, rel_bias=Relative(table, given.pop("place")), **given), **x
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, None, ""),
        ({"windows": None}, ValueError, "relative: expected windows too"),
        ({"table": (3, 5)}, ValueError, r"expected a table \[2, a size for each of 1 axes\] and place \[1, 32\], got"),
        ({"table": (2, 5, 5)}, ValueError, r"got \[2, 5, 5\] and \[1, 32\]"),
        ({"place": np.arange(31)[None]}, ValueError, r"got \[2, 5\] and \[1, 31\]"),
        ({"place": jnp.arange(32)[None]}, ValueError, "expected places of queries and keys as arrays of NumPy"),
        ({"place": np.arange(32)[None, ::-1]}, ValueError, "relative: .* the same offsets of tokens in all blocks"),
        ({"place": 2 * np.arange(32)[None]}, None, ""),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_bias_that_does_not_belong_to_the_call(changes, error, message):
    if error is None:
        assert call(**changes)[0].shape == (1, 32, 2, 16)
        return
    with pytest.raises(error, match=message):
        call(**changes)


def test_lists_and_blocks_that_have_no_kinds():
    traced = BlockLists(jnp.zeros((1, 1, 2, 1), int), jnp.ones((1, 1, 2), int), jnp.ones((1, 1, 2), int))
    with pytest.raises(ValueError, match=r"by_row: .* expected lists of all heads as arrays of NumPy"):
        call(by_row=traced, by_col=None)
    of_heads = BlockLists(np.zeros((1, 2, 2, 1), int), np.ones((1, 2, 2), int), np.ones((1, 2, 2), int))
    with pytest.raises(ValueError, match=r"by_row: .* expected lists of all heads as arrays of NumPy"):
        call(by_row=of_heads, by_col=None)
    place = np.arange(32, dtype=np.int32)[None] + 5
    with pytest.raises(ValueError, match=r"windows: .* expected blocks of 16 tokens that are boxes of a grid"):
        call(windows=Windows(place[None], place[None], place))
    ones = np.ones((1, 1, 1), int)
    lists = BlockLists(np.zeros((1, 1, 1, 1), int), ones, ones)
    with pytest.raises(ValueError, match=r"relative: .* expected whole blocks of 48, got 32 tokens"):
        call(by_row=lists, by_col=None, block_q=48)


# What is chosen


def test_nat_runs_on_the_kernels_of_a_gpu():
    config = NATConfig(num_classes=3, width=32, depths=(2, 1), num_heads=(1, 2), dilations=(2, 1), kernel_size=3)
    decisions = jattn.explain(NAT(config, rngs=nnx.Rngs(0)), jnp.zeros((1, 32, 32, 3)))
    chosen = [each.chosen["cuda"] for each in decisions if each.op == "neighborhood_attention"]
    assert chosen == ["pallas_gpu"] * 3


def test_a_table_whose_gradient_is_too_large():
    window, grid = (25, 25, 25), (50, 50, 50)
    x = [jax.ShapeDtypeStruct((1, *grid, 24, 16), jnp.float32)] * 3
    bias = jax.ShapeDtypeStruct((24, *(2 * w - 1 for w in window)), jnp.float32)

    def check(q_tile, kv_tile):
        options = {"neighborhood": Neighborhood(window).on(grid), "score": fused.Score(1.0, None)}
        options |= {"q_tile": q_tile, "kv_tile": kv_tile}
        operands = neighborhood.Operands(*x, rel_pos_bias=bias)
        jax.eval_shape(lambda x: fused.check_fused_neighborhood("gpu", x, **options), operands)

    taken = 4 * 24 * 49**3 * 256 / 2**30
    with pytest.raises(NotImplementedError, match=rf"rel_pos_bias: the gradient of a table .* takes {taken:.1f} GiB"):
        check((4, 8, 8), (4, 8, 8))
    check((4, 4, 4), (4, 4, 4))
    with pytest.raises(NotImplementedError, match="a smaller q_tile"):
        check((4, 4, 4), (4, 4, 16))
