"""Relative position bias over tiles on the kernels for TPU, interpreted, against the dense definition in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.neighborhood import fused, neighborhood, one_pass, planes
from jattn.neighborhood.tiles import tile_plan
from jattn.neighborhood.window import Neighborhood
from pallas_kernels.block_sparse import Relative, Windows, WorkList, block_sparse_attention, tiling
from tests.neighborhood.test_fused_bias import B, H, K, N, V, arrays, assert_as_dense
from tests.pallas_kernels.test_block_sparse import TWO_WALKS, work_lists

QUICK = {"xla_backend_optimization_level": 0}
TILES = {"q_tile": (32, 4), "kv_tile": (8, 16)}
"""Of which a strip has 32 rows."""


@pytest.fixture(autouse=True)
def only_tiles(monkeypatch):
    """One pass would give the same results."""

    def attend(*_, **__):
        raise AssertionError("in one pass")

    for module in (one_pass, planes):
        monkeypatch.setattr(module, "attend", attend)
    monkeypatch.setattr(fused, "ONE_PASS", 1e9)


@pytest.mark.parametrize(
    ("grid", "window", "options"),
    [
        ((211,), (31,), {"dilation": 3}),
        ((17, 19), (5, 4), {"dilation": (2, 1), "q_tile": (32, 4), "kv_tile": (8, 16)}),
        ((5, 3, 11), (3, 2, 5), {"dilation": (1, 1, 2), "q_tile": (16, 1, 8), "kv_tile": (4, 4, 8)}),
    ],
    ids=["a line in unequal groups", "an image in groups, even windows", "a volume"],
)
def test_windows(grid, window, options):
    assert_as_dense(arrays(grid, window), kernel_size=window, **options)


def test_hidden_keys():
    """And windows that are hidden whole."""
    mask = jnp.asarray(np.random.default_rng(1).random((B, 13, 11)) >= 0.7)
    got = assert_as_dense(arrays((13, 11), (2, 2)), kernel_size=2, key_mask=mask, **TILES)
    hidden = ~np.asarray(got["seen"])
    assert 10 < hidden[..., 0].sum() < 100
    assert not np.asarray(got["out"])[hidden].any()
    assert not np.asarray(got["query"])[hidden].any()


def test_bfloat16():
    got = assert_as_dense(arrays((13, 11), (5, 7), jnp.bfloat16), kernel_size=(5, 7), ratio=5e-3, **TILES)
    assert got["rel_pos_bias"].dtype == got["key"].dtype == jnp.bfloat16


def test_beside_what_else_logits_have_in_two_walks():
    """A soft cap, a score function, sinks, biases of keys; heads that share keys, of which each has its numbers."""
    grid, window = (16, 32), (5, 9)
    plan = tile_plan(grid, window, q_tile=(16, 8), kv_tile=(16, 16))
    rng, tokens = np.random.default_rng(0), plan.q_tiles * plan.q_places
    sizes = ((1, tokens, N, H), (1, tokens, K, H), (1, tokens, K, V), (N, 9, 17), (1, K, tokens), (N,), (N,))
    given = [jnp.asarray(rng.standard_normal(size), jnp.float32) for size in sizes]
    kinds = np.zeros((1, 1, plan.q_tiles, plan.kv_tiles), np.int32)
    steps = plan.steps()
    kinds[0, 0, steps.row[0, 0], steps.col[0, 0]] = steps.kind[0, 0]
    lists, places = work_lists(kinds), (plan.query_coordinates, plan.key_coordinates)
    slopes = given.pop()

    def score_mod(score, b, h, q_pos, kv_pos, slopes):
        return score * slopes[h]

    def kernels(query, key, value, table, kv_bias, sinks, slopes):
        options = {"kv_bias": kv_bias, "sinks": sinks, "score_mod": score_mod, "captured": (slopes,), "soft_cap": 2.0}
        options |= {"windows": Windows(plan.lo, plan.hi, places[1]), "rel_bias": Relative(table, places[0])}
        options |= {"scale": 0.3, "platform": "interpret", "block_q": 128, "block_kv": 256, "cut": TWO_WALKS}
        return block_sparse_attention(query, key, value, *lists, **options)

    def dense(query, key, value, table, kv_bias, sinks, slopes):
        key, value, kv_bias = (jnp.repeat(x, N // K, axis) for x, axis in ((key, 2), (value, 2), (kv_bias, 1)))
        distance = places[1][:, None] - places[0][:, :, None]
        middle = np.array(window)[:, None, None] - 1
        y = 0.3 * jnp.einsum("btnh,bsnh->bnts", query, key) + kv_bias[:, :, None]
        y = y + table[:, *np.clip(distance + middle, 0, 2 * middle)]
        z = 2 * jnp.tanh(y * slopes[:, None, None] / 2)
        seen = ((plan.lo[0][..., None] <= places[1][:, None]) & (places[1][:, None] < plan.hi[0][..., None])).all(
            axis=0
        )
        z = jnp.where(seen, z, -jnp.inf)
        lse = jnp.logaddexp(jax.nn.logsumexp(z, axis=-1), sinks[:, None])
        out = jnp.einsum("bnts,bsnv->btnv", jnp.where(seen, jnp.exp(z - lse[..., None]), 0), value)
        return out, jnp.moveaxis(lse, 1, 2)

    def run(attention, given):
        def total(given):
            out, lse = attention(*given)
            return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.cos(lse)), (out, lse)

        found = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)(given)
        return jax.tree.leaves((found[0][1], found[1]))

    given.append(slopes)
    got = run(kernels, given)
    with jax.enable_x64(True):
        want = run(dense, [jnp.asarray(np.asarray(x), np.float64) for x in given])
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.sqrt(np.mean((a - b) ** 2)) <= 2e-6 * np.sqrt(np.mean(b**2))


# What is chosen


@pytest.mark.parametrize(
    ("grid", "window", "width"),
    [((64, 64), 25, 64), ((8192,), 1023, 64), ((16, 32, 32), (7, 15, 15), 128), ((30, 48, 80), (18, 24, 24), 128)],
)
def test_wide_windows_run_on_tpu(grid, window, width):
    """Tiles are chosen whose numbers fit the chip."""
    neighborhood = Neighborhood(window).on(grid)
    tiles = fused.choose_tiles(grid, neighborhood, width=width, on_gpu=False, biased=True)
    fused._strip(neighborhood.axes(grid), *tiles).check(tiling.room())
    shape = jax.ShapeDtypeStruct((1, *grid, 2, width), jnp.bfloat16)
    sizes = (2 * axis.window - 1 for axis in neighborhood.axes(grid))
    bias = jax.ShapeDtypeStruct((2, *sizes), jnp.float32)
    attend = functools.partial(jattn.neighborhood_attention, kernel_size=window)
    (decision,) = jattn.explain(attend, shape, shape, shape, rel_pos_bias=bias)
    assert decision.chosen["tpu"] == "pallas_tpu"


def refused(**tiles):
    x = jax.ShapeDtypeStruct((1, 64, 64, 2, 64), jnp.float32)
    operands = neighborhood.Operands(x, x, x, rel_pos_bias=jax.ShapeDtypeStruct((2, 49, 49), jnp.float32))
    options = {"neighborhood": Neighborhood(25).on((64, 64)), "score": fused.Score(1.0, None)}
    options |= {"q_tile": None, "kv_tile": None} | tiles
    with pytest.raises(NotImplementedError) as error:
        jax.eval_shape(lambda x: fused.check_fused_neighborhood("tpu", x, **options), operands)
    return str(error.value)


def test_tiles_that_have_no_numbers_are_refused_with_the_reason(monkeypatch):
    assert "rel_pos_bias: blocks are boxes of powers of two" in refused(q_tile=(16, 24), kv_tile=(16, 24))
    assert "the keys must be a multiple of 128" in refused(q_tile=(4, 32), kv_tile=(16, 16))
    monkeypatch.setattr(tiling, "room", lambda: 2**18)
    message = refused()
    assert "rel_pos_bias: its numbers take" in message
    assert "0.2 MiB for them; and in one pass: a window has at most 512 keys there, not 625" in message


def call(**changes):
    """A call of the kernels on 256 tokens of a line."""
    place = np.arange(256, dtype=np.int32)[None]
    windows = Windows(np.maximum(place - 2, 0)[None], np.minimum(place + 3, 256)[None], place)
    lists = work_lists(np.full((1, 1, 2, 2), 1))
    x = dict.fromkeys(("query", "key", "value"), jax.ShapeDtypeStruct((1, 256, 2, 16), jnp.float32))
    given = {"by_row": lists[0], "by_col": lists[1], "windows": windows, "platform": "tpu", "place": place}
    given |= {"scale": 1.0, "block_q": 128, "block_kv": 128} | changes
    bias = Relative(jnp.zeros((2, 5)), given.pop("place"))
    return jax.eval_shape(functools.partial(block_sparse_attention, rel_bias=bias, **given), **x)


def test_a_bias_that_does_not_belong_to_the_call():
    assert call()[0].shape == (1, 256, 2, 16)
    with pytest.raises(ValueError, match="by_row: with a relative bias, expected lists as arrays of NumPy"):
        call(by_row=WorkList(*(jnp.asarray(x) for x in work_lists(np.full((1, 1, 2, 2), 1))[0])))
    with pytest.raises(ValueError, match=r"relative: .* expected blocks of 128 tokens that are boxes of a grid"):
        call(place=np.arange(256)[None] + 64)
