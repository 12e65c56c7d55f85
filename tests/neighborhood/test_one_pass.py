"""Neighborhood attention in one pass, interpreted, against its definition in float64; tables, and what is chosen."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jattn
from jattn.models.nat import NAT, NATConfig
from jattn.neighborhood import fused
from jattn.neighborhood.one_pass import cut
from jattn.neighborhood.window import Neighborhood, visible
from pallas_kernels.neighborhood import attention as one_pass
from pallas_kernels.neighborhood import one_pass_tpu, tables
from pallas_kernels.neighborhood.tables import Problem
from tests.golden import harness

B = 2
GOLDEN = harness.HERE / "neighborhood_attention.npz"


@pytest.fixture(autouse=True)
def only_one_pass(monkeypatch):
    """The block-sparse kernels would give the same results. Short turns compile in less time."""

    def general(*_, **__):
        raise AssertionError("not in one pass")

    monkeypatch.setattr(fused, "general", general)
    monkeypatch.setattr(fused, "REGISTERS", 1e9)
    monkeypatch.setattr(one_pass_tpu, "TURN", 3)


def arrays(grid, heads, width, dtype=np.float32, bias=None, additional=0, kv_heads=None, value_width=None):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    x = {"query": normal(B, *grid, heads, width), "key": normal(B, *grid, kv_heads or heads, width)}
    x["value"] = normal(B, *grid, kv_heads or heads, value_width or width)
    if additional:
        x |= {f"additional_{name}": normal(B, additional, heads, width) for name in ("keys", "values")}
    return x if bias is None else x | {"rel_pos_bias": normal(heads, *(2 * w - 1 for w in bias))}


def results(implementation, x, **options):
    """Outputs, log-sum-exps and the gradients of a number that depends on all of both."""

    def loss(x):
        out, lse = jattn.neighborhood_attention(**x, **options, return_lse=True, implementation=implementation)
        return jnp.sum(jnp.sin(3 * out.astype(lse.dtype))) + jnp.sum(jnp.cos(lse)), (out, lse)

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    return dict(zip(("out", "lse"), found, strict=True)) | {f"d {name}": d for name, d in gradients.items()}


def assert_as_dense(x, ratio=2e-6, **options):
    got = results("interpret", x, **options)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(a), np.float64) for name, a in x.items()}
        want = results("reference", wide, **options)
    assert got.keys() == want.keys()
    for name, wanted in want.items():
        a, b = np.asarray(got[name], np.float64), np.asarray(wanted)
        assert np.sqrt(np.mean((a - b) ** 2)) <= ratio * np.sqrt(np.mean(b**2)), name
    return got


@pytest.mark.parametrize(
    ("grid", "heads", "width", "window"),
    [
        ((13, 11), 4, 32, (3, 3)),
        ((7, 7), 4, 32, (7, 7)),
        ((9, 23), 3, 16, (5, 5)),
        ((19, 17), 2, 64, (3, 7)),
        ((11, 13), 3, 13, (4, 6)),
        ((67,), 2, 32, (7,)),
    ],
    ids=["many tiles", "all that there is", "ends of tiles", "an oblong window", "even windows, odd heads", "a line"],
)
def test_windows_with_a_bias(grid, heads, width, window):
    assert_as_dense(arrays(grid, heads, width, bias=window), kernel_size=window)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (5, 4), "stride": (2, 3)},
        {"kernel_size": 5, "is_causal": (False, True)},
        {"kernel_size": (3, 2), "dilation": (2, 3)},
    ],
    ids=["strides", "causal along one axis", "groups that are not equal"],
)
def test_windows_without_a_bias(options):
    assert_as_dense(arrays((13, 11), 4, 32), **options)


def test_a_bias_of_distances_in_a_group():
    assert_as_dense(arrays((13, 11), 2, 32, bias=(3, 3)), kernel_size=3, dilation=(2, 3))


def test_heads_that_do_not_fill_the_last_lanes():
    """Six of 32 channels are a program of four and one of two, beside which there is nothing."""
    assert_as_dense(arrays((7, 11), 6, 32, bias=(3, 3)), kernel_size=3)


@pytest.mark.parametrize("value_width", [19, 48])
def test_heads_that_share_keys_and_values_of_another_width(value_width):
    assert_as_dense(arrays((7, 11), 6, 32, bias=(3, 3), kv_heads=2, value_width=value_width), kernel_size=3)


def test_heads_that_do_not_divide_the_lanes():
    """Four of 48 channels, as of 64."""
    assert_as_dense(arrays((7, 11), 4, 48, bias=(3, 3)), kernel_size=3)


@pytest.fixture
def small_chip(monkeypatch):
    """One that holds images of 60 keys at most."""
    choose = tables.choose
    monkeypatch.setattr(tables, "choose", lambda p: choose(p) if math.prod(p.key_grid) <= 60 else None)


@pytest.mark.parametrize(
    ("grid", "options", "images"),
    [
        ((13, 11), {"kernel_size": (3, 5)}, 7),
        ((23, 5), {"kernel_size": (4, 3), "stride": (3, 2)}, 4),
        ((19, 7), {"kernel_size": 3, "is_causal": (True, False)}, 4),
        ((17, 23), {"kernel_size": 3, "dilation": (2, 3)}, 2 * 3 * 2),
        ((131,), {"kernel_size": 7}, 4),
    ],
    ids=["both axes", "strides", "causal", "groups that are not equal", "a line"],
)
def test_large_images_in_bands(grid, options, images, small_chip, monkeypatch):
    seen, attend = [], one_pass.one_pass_attention
    monkeypatch.setattr(one_pass, "one_pass_attention", lambda *x, **o: seen.append(x[0].shape) or attend(*x, **o))
    window = (
        None if {"stride", "is_causal"} & set(options) else Neighborhood(options["kernel_size"]).on(grid).kernel_size
    )
    assert_as_dense(arrays(grid, 2, 16, bias=window), **options)
    assert {shape[0] for shape in seen} == {B * images}


@pytest.mark.parametrize(
    "axis", [(29, 5, 2, 1, False), (29, 4, 1, 3, True), (31, 7, 1, 4, False), (12, 12, 1, 1, False)]
)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 64])
def test_bands_hold_all_that_their_queries_see(axis, count):
    (axis,) = Neighborhood(*((each,) for each in axis[1:])).axes(axis[:1])
    found, dilation = cut(axis, count), axis.dilation
    wanted, got = visible(axis), np.zeros((axis.extent, axis.extent), bool)
    for group in range(dilation):
        for i, (first, start) in enumerate(zip(found.first, found.start, strict=True)):
            row = group * found.bands + i
            assert found.bounds.first[row] == first - start
            for place in range(found.queries):
                low, high = found.bounds.low[row][place], found.bounds.high[row][place]
                assert 0 <= low < high <= found.keys
                query, keys = first + place, start + np.arange(low, high)
                if query * dilation + group < axis.extent:
                    got[query * dilation + group, keys * dilation + group] = True
    assert (got == wanted).all()
    assert found.bands <= count


def test_bfloat16():
    got = assert_as_dense(arrays((13, 11), 4, 32, jnp.bfloat16, bias=(5, 5)), kernel_size=5, ratio=6e-3)
    assert got["out"].dtype == got["d key"].dtype == got["d rel_pos_bias"].dtype == jnp.bfloat16
    assert got["lse"].dtype == jnp.float32


def test_additional_tokens():
    assert_as_dense(arrays((7, 11), 2, 32, bias=(3, 3), additional=5), kernel_size=3)


def test_logits_of_any_size():
    """Of some hundreds, where float32 is some 1e-5 apart and so are the logarithms of weights."""
    x = arrays((7, 11), 2, 32)
    assert_as_dense(x | {"query": 90 * x["query"]}, kernel_size=3, ratio=2e-4)


@pytest.mark.parametrize(("turn", "abreast"), [(1, 1), (3, 2), (64, 5)])
def test_how_tiles_are_scheduled_changes_nothing(turn, abreast, monkeypatch):
    """Turns of the loop and what is left after them; eight rows of tiles of two columns."""
    monkeypatch.setattr(one_pass_tpu, "TURN", turn)
    monkeypatch.setattr(one_pass_tpu, "ABREAST", abreast)
    # Their caches know nothing of either.
    for name in ("_run", "_gradients"):
        monkeypatch.setattr(one_pass, name, getattr(one_pass, name).__wrapped__)
    monkeypatch.setattr(tables, "choose", lambda p: dataclasses.replace(p, tile=(2, 8)))
    assert_as_dense(arrays((15, 11), 2, 16, bias=(3, 3)), kernel_size=3)


def test_nan_beyond_an_image_is_not_met():
    """A token that is not a number reaches those that see it and no others, forward."""
    grid, window = (13, 11), 3
    x = arrays(grid, 2, 32)
    want = results("reference", x, kernel_size=window)["out"]
    x["query"] = x["query"].at[1, 5, 7].set(jnp.nan)
    got = results("interpret", x, kernel_size=window)["out"]
    assert np.isnan(got[1, 5, 7]).all()
    seen = np.ones((B, *grid), bool)
    seen[1, 5, 7] = False
    np.testing.assert_allclose(got[seen], want[seen], atol=2e-6)


@pytest.mark.parametrize("case", [0, 4, 5, 7])
def test_natten_gives_the_same(case):
    """Those of its cases that are done in one pass: a line, all of a grid, blocks, groups with additional tokens."""
    with np.load(GOLDEN) as archive:
        file = dict(archive)
    config, prefix = json.loads(str(file["meta"]))["cases"][case], f"c{case}_"
    options = {name: tuple(config[name]) for name in ("kernel_size", "stride", "dilation", "is_causal")}
    names = {"q": "query", "k": "key", "v": "value", "additional_keys": "additional_keys"}
    names["additional_values"] = "additional_values"
    x = {name: jnp.asarray(file[prefix + short]) for short, name in names.items() if prefix + short in file}

    def attend(x):
        options_of_call = {**options, "scale": config["scale"], "implementation": "interpret", "return_lse": True}
        return jattn.neighborhood_attention(**x, **options_of_call)

    out, pull_back, lse = jax.vjp(attend, x, has_aux=True)
    (gradients,) = pull_back(jnp.asarray(file[prefix + "do"]))
    got = {"out": out, "lse": lse} | {f"d{short}": gradients[name] for short, name in names.items() if name in x}
    for name, array in got.items():
        wanted = file[prefix + name.replace("dadditional", "d_additional")]
        np.testing.assert_allclose(array, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


# Tables


def bounds(grid, window):
    return tuple(cut(axis, 1).bounds for axis in Neighborhood(window).axes(grid))


@pytest.mark.parametrize(
    ("grid", "window", "tile"), [((13, 11), (3, 5), (4, 8)), ((9, 23), (5, 4), (3, 16)), ((7, 11), (7, 11), (2, 8))]
)
def test_the_table_is_the_mask_and_the_bias_of_every_tile(grid, window, tile):
    """Every tile of the grid put together from its kind, against who sees whom pair by pair."""
    heads, rng = 3, np.random.default_rng(1)
    bias = rng.standard_normal((heads, *(2 * w - 1 for w in window))).astype(np.float32)
    p = Problem(1, heads, 16, bounds(grid, window), tile, True, 1.0, jnp.dtype("float32"), True)
    table = np.asarray(tables.table(p, jnp.asarray(bias)))
    table = table.reshape(p.kinds, p.x.reach, p.y.reach, heads, *tile)
    got = np.full((heads, *grid, *grid), -np.inf, np.float32)
    for t, s in itertools.product(range(p.x.tiles), range(p.y.tiles)):
        kind = table[p.x.kind[0, t] * p.y.kinds + p.y.kind[0, s]]
        for i, j in itertools.product(range(tile[0]), range(tile[1])):
            at = t * tile[0] + i, s * tile[1] + j
            if at[0] < grid[0] and at[1] < grid[1]:
                first = int(p.x.start[0, t]), int(p.y.start[0, s])
                assert first[0] >= 0
                assert first[0] + p.x.reach <= grid[0]
                stop = min(first[1] + p.y.reach, grid[1])
                keys = slice(first[0], first[0] + p.x.reach), slice(first[1], stop)
                block = np.moveaxis(kind[..., i, j], -1, 0)
                got[:, *at, *keys] = block[:, :, : stop - first[1]]
                assert np.isneginf(block[:, :, stop - first[1] :]).all()
    tokens = math.prod(grid)
    assert ((got > -np.inf).reshape(heads, tokens, tokens) == Neighborhood(window).dense(grid)).all()
    for n, *pair in np.argwhere(got > -np.inf)[::7]:
        entry = (pair[2] - pair[0] + window[0] - 1, pair[3] - pair[1] + window[1] - 1)
        assert got[n, *pair] == bias[n, *entry]


def test_tiles_that_are_alike_have_one_table():
    p = problem((56, 56), 2, 32, 7)
    assert p.tile == (8, 8)
    assert (p.x.reach, p.y.reach) == (14, 16)
    assert p.kinds == 9
    assert (p.x.kind[0] == p.x.kind[0, 1]).sum() == p.x.tiles - 2


# What is chosen


def problem(grid, heads, width, window, biased=True):
    axes = bounds(grid, window)
    x = jax.ShapeDtypeStruct((8, *grid, heads, width), jnp.bfloat16)
    return one_pass.problem(x, x, x, axes=axes, biased=biased, scale=1.0, platform="tpu")


@pytest.mark.parametrize(("grid", "heads"), [((56, 56), 2), ((28, 28), 4), ((14, 14), 8), ((7, 7), 16)])
def test_the_stages_of_nat_fit_the_chip(grid, heads):
    p = problem(grid, heads, 32, 7)
    assert p.taken <= tables.BUDGET < one_pass_tpu.VMEM
    assert p.together == min(heads, 4)
    others = [dataclasses.replace(p, tile=tile) for tile in itertools.product((1, 2, 4, 7), (8, 16))]
    assert all(p.work <= other.work for other in others if other.columns <= tables.MOST_COLUMNS)


def test_nat_with_a_bias_runs_on_the_kernel(monkeypatch):
    monkeypatch.undo()
    config = NATConfig(num_classes=3, width=32, depths=(2, 1), num_heads=(1, 2), dilations=(2, 1), kernel_size=3)
    model = NAT(config, rngs=nnx.Rngs(0))
    decisions = jattn.explain(model, jnp.zeros((1, 32, 32, 3)))
    chosen = [each.chosen["tpu"] for each in decisions if each.op == "neighborhood_attention"]
    assert chosen == ["pallas_tpu"] * 3


def test_it_is_taken_where_it_takes_less_time(monkeypatch):
    """Windows of 7 in one pass, in bands where the chip does not hold an image; not those as wide as a large tile."""
    monkeypatch.undo()

    def taken(grid, window, heads=4, width=32, biased=False, **options):
        x = fused.Operands(*[jax.ShapeDtypeStruct((1, *grid, heads, width), jnp.bfloat16)] * 3)
        if biased:
            sizes = (2 * w - 1 for w in (window if isinstance(window, tuple) else (window,) * len(grid)))
            x = x._replace(rel_pos_bias=jax.ShapeDtypeStruct((heads, *sizes), jnp.float32))
        neighborhood = Neighborhood(window).on(grid)
        found = fused._in_one_pass("tpu", x, neighborhood, fused.Score(1.0, None), options.get("q_tile"), None)
        return found is not None

    for grid in ((256, 256), (56, 56), (28, 28), (14, 14), (7, 7)):
        assert taken(grid, 7)
    assert taken((64, 64), 13)
    assert not taken((32, 32), 31)
    assert not taken((64, 64), 61)
    with pytest.raises(NotImplementedError, match="does not fit the chip"):
        problem((64, 64), 4, 32, 61)
    assert not taken((32768,), 2048)
    assert not taken((5, 7, 11), 3)
    assert not taken((56, 56), 7, q_tile=(8, 16))
    for grid, window in (((56, 56), 7), ((14, 14), 7), ((64, 64), 13), ((16, 28, 28), (3, 7, 7))):
        assert taken(grid, window, biased=True)
    for grid, window in (((32, 32), 21), ((64, 64), 25), ((16, 32, 32), (7, 15, 15))):
        assert not taken(grid, window, biased=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_tile": (8, 16)}, "kv_tile: there is none there"),
        ({"width": 160}, "query: heads that fill 128 lanes are taken in one pass, not 2 of 256"),
        ({"dtype": jnp.float16}, "query: the kernel multiplies bfloat16 or float32 alone, not float16"),
        (
            {"window": 21, "grid": (256, 256), "heads": 4},
            r"an image of \(21, 36\) with such windows does not fit the chip in one pass",
        ),
        ({"window": 23, "grid": (64, 64)}, "a window has at most 512 keys there, not 529"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_bias_that_is_not_taken_in_one_pass(changes, message):
    changes = dict(changes)
    grid, heads = changes.pop("grid", (7, 5)), changes.pop("heads", 2)
    shape = jax.ShapeDtypeStruct((B, *grid, heads, changes.pop("width", 32)), changes.pop("dtype", jnp.float32))
    window = changes.pop("window", 3)
    x = dict.fromkeys(("query", "key", "value"), shape) | changes
    bias = jax.ShapeDtypeStruct((x["query"].shape[-2], *[2 * window - 1] * len(grid)), jnp.float32)
    kv_tile = x.pop("kv_tile", None)
    operands = fused.Operands(**x, rel_pos_bias=bias)
    call = {"neighborhood": Neighborhood(window).on(grid), "score": fused.Score(1.0, None), "kv_tile": kv_tile}
    with pytest.raises(NotImplementedError, match=message):
        fused._one_pass("tpu", operands, **call, q_tile=None)
    check = functools.partial(fused.check_fused_neighborhood, "tpu", **call, q_tile=None)
    if shape.dtype == jnp.float16:  # the others are taken over tiles
        with pytest.raises(NotImplementedError, match=f"; and in one pass: {message}"):
            jax.eval_shape(check, operands)
    else:
        jax.eval_shape(check, operands)


def test_inside_shard_map():
    x = arrays((7, 11), 2, 32, bias=(3, 3))
    table = x.pop("rel_pos_bias")

    def loss(x, table):
        options = {"kernel_size": 3, "rel_pos_bias": table, "implementation": "interpret"}
        return jnp.sum(jnp.sin(jattn.neighborhood_attention(**x, **options)))[None]

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    each = jax.shard_map(loss, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
    got = jax.jit(jax.grad(lambda x, table: each(x, table).sum(), (0, 1)))(x, table)
    want = jax.jit(jax.grad(lambda x, table: loss(x, table).sum(), (0, 1)))(x, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
