"""The op on the block-sparse kernels, interpreted, against its dense definition in float64; which tiles are chosen."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.dispatch import Implementation
from jattn.neighborhood import neighborhood
from jattn.neighborhood.fused import check_fused_neighborhood, choose_tiles
from jattn.neighborhood.tiles import tile_stats
from jattn.neighborhood.window import Neighborhood
from pallas_kernels.block_sparse.lists import BUDGET

B, N, K, H, V = 2, 4, 2, 13, 19


@pytest.fixture(params=["tpu", "gpu"])
def machine(request, monkeypatch):
    """`implementation="interpret"` is that of the kernels of one machine."""
    if request.param == "gpu":
        run, check = (
            functools.partial(f, "interpret_gpu") for f in (neighborhood._on_kernels, check_fused_neighborhood)
        )
        others = [each for each in neighborhood._IMPLEMENTATIONS if each.name != "interpret"]
        monkeypatch.setattr(neighborhood, "_IMPLEMENTATIONS", (*others, Implementation("interpret", run, check)))
    return request.param


def arrays(grid, dtype=np.float32, additional=0, hidden=0.0):
    rng = np.random.default_rng(0)
    sizes = (("query", (*grid, N, H)), ("key", (*grid, K, H)), ("value", (*grid, K, V)))
    if additional:
        sizes += ("additional_keys", (additional, K, H)), ("additional_values", (additional, K, V))
    found = {name: jnp.asarray(rng.standard_normal((B, *shape)), dtype) for name, shape in sizes}
    mask = {"key_mask": jnp.asarray(rng.random((B, *grid)) >= hidden)} if hidden else {}
    return found, mask


def results(implementation, given, mask, **options):
    def run(given):
        out, lse = jattn.neighborhood_attention(
            **given, **mask, **options, return_lse=True, implementation=implementation
        )
        seen = jnp.isfinite(lse)
        lse = jnp.where(seen, lse, 0)
        return jnp.sum(jnp.sin(3 * out.astype(lse.dtype))) + jnp.sum(jnp.cos(lse)), (out, lse, seen)

    (_, found), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(given)
    return dict(zip(("out", "lse", "seen"), found, strict=True)) | gradients


def assert_as_dense(given, mask, *, ratio=1e-5, **options):
    got = results("interpret", given, mask, **options)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x), np.float64) for name, x in given.items()}
        want = results("reference", wide, mask, **options)
    for name, wanted in want.items():
        a, b = np.asarray(got[name], np.float64), np.asarray(wanted, np.float64)
        assert np.sqrt(np.mean((a - b) ** 2)) <= ratio * np.sqrt(np.mean(b**2)), name
    return got


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((211,), {"kernel_size": 31, "dilation": 3}),
        ((17, 19), {"kernel_size": (5, 7), "stride": (2, 1), "dilation": (2, 1)}),
        ((17, 19), {"kernel_size": (4, 6), "stride": (4, 5), "is_causal": (True, False)}),
        ((5, 7, 11), {"kernel_size": (3, 4, 5), "is_causal": (False, True, False), "dilation": (1, 1, 2)}),
    ],
    ids=["a line in unequal groups", "strides and groups", "blocks, causal downwards", "a volume"],
)
def test_windows(machine, grid, options):
    assert_as_dense(*arrays(grid), **options)


def test_hidden_keys_and_additional_tokens(machine):
    """Windows of which some are hidden whole, with and without tokens that all see."""
    got = assert_as_dense(*arrays((13, 11), hidden=0.7), kernel_size=2)
    hidden = ~np.asarray(got["seen"])
    assert 10 < hidden[..., 0].sum() < 100
    assert not np.asarray(got["out"])[hidden].any()
    assert not np.asarray(got["query"])[hidden].any()
    assert_as_dense(*arrays((13, 11), additional=3, hidden=0.7), kernel_size=2)


def test_bfloat16(machine):
    assert_as_dense(*arrays((17, 19), jnp.bfloat16), kernel_size=(5, 7), ratio=5e-3)


def test_tiles_of_ones_own(machine):
    """Tiles that differ between queries and keys change nothing."""
    assert_as_dense(*arrays((17, 19)), kernel_size=(5, 7), q_tile=(8, 16), kv_tile=(4, 32))


def test_what_the_kernels_do_not_do(machine):
    given, _ = arrays((17, 19))
    attend = functools.partial(jattn.neighborhood_attention, **given, kernel_size=5, implementation="interpret")
    with pytest.raises(NotImplementedError, match=r"q_tile: the kernel has tiles of a multiple of .* not \(3, 5\)"):
        attend(q_tile=(3, 5))


@pytest.mark.parametrize(
    ("grid", "window", "pairs_of_natten"),
    [((32768,), 2048, 4336), ((256, 256), 80, 34884), ((30, 48, 80), (18, 24, 24), 148896)],
)
def test_tiles_visit_no_more_than_those_that_natten_has_published(grid, window, pairs_of_natten):
    """Its problems of language, images and video, in pairs of tiles of 128 tokens."""
    q_tile, kv_tile = choose_tiles(grid, Neighborhood(window).on(grid), width=128, on_gpu=True)
    visited = tile_stats(grid, window, q_tile=q_tile, kv_tile=kv_tile).visited
    assert visited * math.prod(q_tile) * math.prod(kv_tile) <= pairs_of_natten * 128**2


@pytest.mark.parametrize(
    ("grid", "window", "dilation"),
    [((64, 64), 13, 1), ((30, 48, 80), (18, 24, 24), 1), ((56, 56), 7, 8), ((7, 7), 7, 1), ((32768,), 2048, 1)],
)
def test_the_tiles_of_a_tpu(grid, window, dilation):
    """Whole lanes, lists that fit scalar memory, and keys whose marks find room where that is possible."""
    neighborhood = Neighborhood(window, 1, dilation).on(grid)
    q_tile, kv_tile = choose_tiles(grid, neighborhood, width=32, on_gpu=False)
    assert math.prod(q_tile) % 128 == math.prod(kv_tile) % 128 == 0
    stats = tile_stats(grid, window, 1, dilation, q_tile=q_tile, kv_tile=kv_tile)
    assert 4 * stats.visited <= BUDGET
    assert len(grid) == 1 or sum(kv_tile) <= 128 - 32
    assert choose_tiles(grid, neighborhood, q_tile, width=32, on_gpu=False) == (q_tile, kv_tile)
