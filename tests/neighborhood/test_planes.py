"""A bias in three dimensions and masks of keys beside it, by the kernels of one pass, interpreted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.neighborhood.planes import runs
from jattn.neighborhood.window import Neighborhood, visible
from tests.neighborhood.test_one_pass import B, arrays, assert_as_dense, only_one_pass

__all__ = ["only_one_pass"]  # the block-sparse kernels would give the same results


@pytest.mark.parametrize(
    ("grid", "window", "dilation", "more"),
    [
        ((5, 7, 6), (3, 3, 3), 1, {}),
        ((6, 5, 4), (4, 3, 2), 1, {}),
        ((7, 5, 6), (3, 3, 2), (2, 1, 3), {"heads": 4, "kv_heads": 2, "value_width": 9}),
        ((4, 5, 6), (4, 3, 3), 1, {"additional": 3}),
        ((3, 5, 4), (1, 3, 3), 1, {}),
    ],
    ids=["a cube", "even windows", "groups that are not equal, heads that share", "all planes", "a plane alone"],
)
def test_a_bias_in_three_dimensions(grid, window, dilation, more):
    heads = more.pop("heads", 2)
    assert_as_dense(arrays(grid, heads, 16, bias=window, **more), kernel_size=window, dilation=dilation)


def test_a_video_in_bfloat16():
    got = assert_as_dense(arrays((5, 7, 6), 2, 16, jnp.bfloat16, bias=(3, 3, 3)), kernel_size=3, ratio=8e-3)
    assert got["out"].dtype == got["d rel_pos_bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("extent", "window", "dilation"), [(9, 3, 1), (11, 4, 2), (5, 5, 1), (13, 6, 2), (7, 1, 3), (6, 2, 3)]
)
def test_runs_hold_all_that_windows_hold_once(extent, window, dilation):
    (axis,) = Neighborhood((window,), dilation=(dilation,)).axes((extent,))
    counts = np.zeros((extent, extent), int)
    for run in runs(axis):
        for t in range(run.first, run.last):
            for plane in (t + e * dilation for e in range(run.least, run.most + 1)):
                if 0 <= plane < extent:
                    counts[t, plane] += 1
    assert counts.max() == 1
    assert (counts[visible(axis)] == 1).all()


@pytest.mark.parametrize(("grid", "window"), [((7, 9), (3, 3)), ((23,), (5,)), ((4, 5, 6), (3, 3, 3))])
@pytest.mark.parametrize("scale", [None, -0.5])
def test_hidden_keys_beside_a_bias(grid, window, scale):
    """One row of the batch sees nothing: it has 0 and -inf, and hands on no gradient."""
    x = arrays(grid, 2, 16, bias=window)
    mask = np.random.default_rng(1).random((B, *grid)) > 0.6
    mask[0] = False

    def results(implementation):
        def loss(x):
            options = {"kernel_size": window, "scale": scale, "return_lse": True, "implementation": implementation}
            out, lse = jattn.neighborhood_attention(**x, key_mask=jnp.asarray(mask), **options)
            return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.where(lse > -jnp.inf, jnp.cos(lse), 0)), (out, lse)

        (_, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
        return dict(zip(("out", "lse"), found, strict=True)) | gradients

    got, want = results("interpret"), results("xla")
    seen = np.isfinite(want["lse"])
    assert 0 < seen[1].sum() <= seen[1].size
    for name, wanted in want.items():
        a, b = (np.where(seen, x, 0) if name == "lse" else np.asarray(x) for x in (got[name], wanted))
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max(), err_msg=name)
    assert np.isneginf(np.asarray(got["lse"])[~seen]).all()
    assert not got["query"][0].any()
    assert not got["value"][~mask].any()


def test_what_is_left_to_others():
    def attend(window, **options):
        x = jax.ShapeDtypeStruct((B, 5, 32, 32, 2, 32), jnp.float32)
        bias = jax.ShapeDtypeStruct((2, *(2 * w - 1 for w in window)), jnp.float32)
        options |= {"kernel_size": window, "implementation": "pallas_tpu"}
        return jax.eval_shape(lambda x, b: jattn.neighborhood_attention(x, x, x, rel_pos_bias=b, **options), x, bias)

    with pytest.raises(AssertionError, match="not in one pass"):
        attend((3, 25, 25))
    with pytest.raises(AssertionError, match="not in one pass"):
        attend((3, 3, 3), q_tile=(4, 8, 8))
    with pytest.raises(NotImplementedError, match=r"rel_pos_bias: .*; and in one pass: q_tile: there is none there"):
        attend((3, 3, 3), q_tile=(1, 8, 16), kv_tile=(128, 1, 1))
    assert attend((3, 3, 3)).shape == (B, 5, 32, 32, 2, 32)
