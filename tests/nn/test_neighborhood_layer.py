"""The layer of neighborhood attention against plain NumPy, and what places it knows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.nn.neighborhood import NeighborhoodAttention
from tests.models.plain import neighborhood

B, D, HEADS = 2, 12, 3


def make(kernel_size=(3, 3), *, width=D, num_heads=HEADS, seed=0, **options):
    """A layer whose weights are all random."""
    settings = {"param_dtype": jnp.float64 if jax.config.jax_enable_x64 else jnp.float32, "rngs": nnx.Rngs(0)}
    layer = NeighborhoodAttention(width, num_heads=num_heads, kernel_size=kernel_size, **settings, **options)
    rng = np.random.default_rng(seed)
    for leaf in jax.tree.leaves(nnx.state(layer), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        leaf[...] = jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype)
    return layer


def tokens(*grid, width=D, seed=1):
    return np.random.default_rng(seed).standard_normal((B, *grid, width))


def run(layer, x, **options):
    graph, state = nnx.split(layer)
    return np.asarray(jax.jit(lambda state, x, options: nnx.merge(graph, state)(x, **options))(state, x, options))


def plain(layer, x, kernel, dilation, rpb=None):
    """Of a two-dimensional layer with NATTEN's columns: query, key and value, each by head."""
    heads = x @ np.asarray(layer.qkv.kernel[...])
    if layer.qkv.bias is not None:
        heads = heads + np.asarray(layer.qkv.bias[...])
    query, key, value = np.moveaxis(heads.reshape(*x.shape[:-1], 3, HEADS, -1), -3, 0)
    out = neighborhood(query, key, value, rpb, kernel, dilation).reshape(x.shape)
    return out @ np.asarray(layer.out.kernel[...]) + np.asarray(layer.out.bias[...])


@pytest.mark.parametrize(
    ("kernel", "dilation", "options"),
    [(3, 1, {}), (3, 2, {"rel_pos_bias": True}), (5, 1, {"rel_pos_bias": True, "qkv_bias": False})],
)
def test_is_the_definition(kernel, dilation, options):
    with jax.enable_x64(True):
        layer, x = make((kernel,) * 2, dilation=dilation, **options), tokens(7, 11)
        rpb = None if layer.rel_pos_bias is None else np.asarray(layer.rel_pos_bias[...])
        got = run(layer, x)
        np.testing.assert_allclose(got, plain(layer, x, kernel, dilation, rpb), atol=1e-10)
    assert (layer.qkv.bias is None) == (options.get("qkv_bias") is False)


def test_a_clamped_window_keeps_the_middle_of_the_bias():
    """A grid of 5 x 5 has windows of 5 x 5 where 7 x 7 do not fit, and their offsets are those of the middle."""
    with jax.enable_x64(True):
        layer, x = make((7, 7), rel_pos_bias=True, clamp_window=True), tokens(5, 5)
        middle = np.asarray(layer.rel_pos_bias[...])[:, 2:-2, 2:-2]
        np.testing.assert_allclose(run(layer, x), plain(layer, x, 5, 1, middle), atol=1e-10)
        assert layer.flops(1, (5, 5)) == 8 * 25 * D**2 + 4 * 25 * 25 * D
    with pytest.raises(ValueError, match=r"kernel_size: a window of 7 .* axis 0 has 5"):
        jax.eval_shape(make((7, 7)), tokens(5, 5).astype(np.float32))


@pytest.mark.parametrize("grid", [(13,), (5, 7), (5, 7, 4)])
def test_rotary_positions_are_relative_along_every_axis(grid):
    """Where all tokens are alike but one, what a query away from borders reads depends on the offset alone."""
    rank = len(grid)
    with jax.enable_x64(True):
        layer = make((3,) * rank, width=36, num_heads=3, rope_theta=100.0)
        still = make((3,) * rank, width=36, num_heads=3)
        for axis in range(rank):
            base = np.broadcast_to(tokens(*(1,) * rank, width=36), (B, *grid, 36)).copy()
            outs = []
            for place in (1, 2):
                at = [1] * rank
                at[axis] = place
                marked, seen = base.copy(), list(at)
                seen[axis] -= 1
                marked[:, *seen] += 1
                outs.append([run(made, marked)[:, *at] for made in (layer, still)])
            np.testing.assert_allclose(outs[0][0], outs[1][0], atol=1e-10)
            assert np.abs(outs[0][0] - outs[0][1]).max() > 1e-3


@pytest.mark.parametrize("axis", [0, 1])
def test_rotary_positions_tell_before_from_behind(axis):
    with jax.enable_x64(True):
        layer, base = make(rope_theta=100.0), np.broadcast_to(tokens(1, 1), (B, 5, 7, D)).copy()
        outs = []
        for step in (-1, 1):
            marked, at = base.copy(), [2, 3]
            at[axis] += step
            marked[:, *at] += 1
            outs.append(run(layer, marked)[:, 2, 3])
        assert np.abs(outs[0] - outs[1]).max() > 1e-3


def test_hidden_keys_are_not_read():
    layer, x = make(), tokens(5, 7).astype(np.float32)
    mask = np.ones((B, 5, 7), bool)
    mask[0, 2, 3] = False
    changed = x.copy()
    changed[0, 2, 3] += 1
    seen, hidden = (functools.partial(run, layer, **options) for options in ({}, {"key_mask": mask}))
    others = np.ones((B, 5, 7), bool)
    others[0, 2, 3] = False  # the token itself still asks with another query
    np.testing.assert_allclose(hidden(changed)[others], hidden(x)[others], atol=1e-6)
    assert np.abs(seen(changed) - seen(x))[others].max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 3}, "kernel_size: expected a tuple of one, two or three numbers, .* got 3"),
        ({"kernel_size": (3,) * 4}, "kernel_size: expected a tuple of one, two or three numbers"),
        ({"num_heads": 5}, "num_heads: a width of 12 does not divide by 5 heads; choose a divisor"),
        ({"num_heads": 2, "rope_theta": 10.0}, "rope_theta: each of 2 axes .* multiple of 4 is needed, got 6"),
        ({"stride": 4}, "stride: 4 on axis 0 is more than the window of 3"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_rank_is_the_windows():
    with pytest.raises(ValueError, match=r"x: expected \[B, \*grid, D\] with 2 axes .* got \(2, 13, 12\)"):
        make()(tokens(13).astype(np.float32))
