"""The forward walk with queries as columns: where it is taken, and the same attention as ever."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.dot_product import dot_product_attention
from jattn.masks import Causal, Full, SlidingWindow
from pallas_kernels.block_sparse import attention, choose, forward_columns_tpu, forward_rows_tpu
from pallas_kernels.block_sparse.cases import CAUSAL
from tests.pallas_kernels.test_block_sparse import COLUMNS, assert_as_dense, operands, small, work_lists


@pytest.fixture
def walks(monkeypatch):
    """Which forms of the walk were traced."""
    found = set()
    for form in (forward_rows_tpu, forward_columns_tpu):
        visit, name = form.visit, form.__name__.split("_")[-2]
        monkeypatch.setattr(form, "visit", lambda *x, visit=visit, name=name: (found.add(name), visit(*x))[1])
    attention._run.clear_cache()
    return found


@pytest.mark.parametrize(
    ("sizes", "mask", "more"),
    [
        ((2, 211, 307, 4, 2, 128, 80), Causal(offset=40), {"kv_bias": (2, 2, 307)}),
        ((1, 307, 256, 2, 1, 80, 128), SlidingWindow(20, 1000), {}),
        ((1, 307, 211, 2, 2, 16, 16), Full(), {"kv_bias": (1, 2, 211), "sinks": (2,)}),
        ((1, 256, 512, 2, 1, 64, 127), Causal(offset=256), {}),
        ((1, 307, 211, 1, 1, 128, 128), Causal(offset=-120), {"sinks": (1,)}),
    ],
    ids=["grouped", "one side below, rows that see nothing", "no mask, no sink", "nothing ragged", "a sink or nothing"],
)
def test_values_and_gradients(walks, sizes, mask, more):
    arguments, cotangents = operands(*sizes, **more)
    if "kv_bias" in more:
        arguments["kv_bias"] = jnp.where(jnp.arange(sizes[2]) % 7 == 3, -jnp.inf, arguments["kv_bias"])
    if isinstance(mask, Full):  # a query that sees nothing has no gradient without a sink
        arguments["sinks"] = arguments["sinks"].at[0].set(-jnp.inf)
    assert_as_dense(arguments, cotangents, mask, cut=dataclasses.replace(COLUMNS, split=False))
    assert walks == {"columns"}


@pytest.mark.parametrize("widths", [(128, 128), (64, 64)], ids=["128", "64"])
def test_bfloat16(walks, widths):
    """Logits of deviation 16, keys a hundred times as long as others, and rows that see only these or none."""
    arguments, cotangents = operands(1, 211, 307, 2, 1, *widths, dtype=jnp.bfloat16)
    arguments["query"] *= 16 / (0.2 * widths[0] ** 0.5)
    long = jnp.isin(jnp.arange(307), np.array([0, 3, 130, 301]))[:, None, None]
    arguments["key"] = jnp.where(long, 100, 1).astype(jnp.bfloat16) * arguments["key"]
    assert_as_dense(arguments, cotangents, Causal(offset=-20), cut=COLUMNS, ratio=5e-3)
    assert walks == {"columns"}


def test_lists_of_batch_rows_and_heads(walks):
    """Full blocks, masked ones, some listed twice over for other heads, and a row of blocks that no list names."""
    kinds = np.random.default_rng(3).choice(3, (2, 2, 2, 2)).astype(np.int32)
    kinds[0, 1, 1] = 0
    assert_as_dense(*operands(2, 211, 307, 4, 2, 32, 32), Causal(offset=60), kinds, cut=COLUMNS)
    assert walks == {"columns"}


def test_keys_that_end_inside_a_block_without_a_mask(walks):
    arguments, _ = operands(1, 100, 211, 1, 1, 16, 16)
    got = small(**arguments, cut=COLUMNS, scale=0.2)()
    want = dot_product_attention(**arguments, scale=0.2, return_lse=True, implementation="reference")
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert walks == {"columns"}


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (Causal() & SlidingWindow(50), {}),
        (Causal(), {"soft_cap": 3.0}),
        (Causal(), {"score_mod": lambda score, *_: jnp.tanh(score)}),
        (Causal(), {"dropout_rate": 0.5, "dropout_seed": jnp.uint32(1)}),
    ],
    ids=["two sides", "a soft cap", "a score function that does more than to add", "dropout"],
)
def test_what_is_left_to_rows(walks, mask, options):
    call = small(cut=COLUMNS, element=mask.elem, interval=mask.interval, **options)
    jax.eval_shape(lambda: call())
    assert walks == {"rows"}


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tiles_make_up_strips_and_strips_blocks(kind, dtype):
    for length in range(128, 4097, 128):
        cut = choose(length, length, 128, 128, dtype, kind=kind)
        assert cut.block_kv % cut.strip == 0
        for tile in (cut.forward, cut.backward, *(cut.turned or ())):
            assert cut.strip % tile.kv == 0
            assert tile.kv % 256 == 0 or cut.block_kv < 1280
            assert cut.block_q % tile.q == 0
        assert cut.turned is None or len({tile.q for tile in cut.turned}) == 1


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
def test_a_length_of_which_tiles_are_no_strip(kind):
    """1280 keys are two strips of 640, but five tiles."""
    arguments, _ = operands(1, 1280, 1280, 1, 1, 16, 16, dtype=jnp.bfloat16)
    cut = choose(1280, 1280, 16, 16, jnp.bfloat16, kind=kind)
    q, kv = np.meshgrid(np.arange(0, 1280, cut.block_q), np.arange(0, 1280, cut.block_kv), indexing="ij")
    kinds = np.where(kv < q + cut.block_q, 1, 0).astype(np.int32)[None, None]
    call = small(
        **arguments, **dict(zip(("by_row", "by_col"), work_lists(kinds), strict=True)),
        cut=cut, block_q=cut.block_q, block_kv=cut.block_kv, scale=0.2,
        element=CAUSAL.element, interval=CAUSAL.interval,
    )  # fmt: skip
    want = dot_product_attention(**arguments, is_causal=True, scale=0.2, implementation="reference")
    np.testing.assert_allclose(call()[0].astype(np.float32), want.astype(np.float32), atol=0.02)
