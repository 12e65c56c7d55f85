"""Batch normalisation: PyTorch's statistics, in training and out of it, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.test_util import check_grads

from jattn.nn.batch_norm import BatchNorm

SHAPE = (5, 3, 7, 11)


def make(dtype=np.float64, momentum=0.1, **options):
    """A layer whose four vectors are all random."""
    norm = BatchNorm(SHAPE[-1], param_dtype=dtype, momentum=momentum, **options)
    rng = np.random.default_rng(0)
    for part in (norm.scale, norm.bias, norm.mean, norm.var):
        part[...] = jnp.asarray(rng.uniform(0.5, 1.5, SHAPE[-1]), part[...].dtype)
    return norm


def image(seed=1, dtype=np.float64):
    return (2 * np.random.default_rng(seed).standard_normal(SHAPE) + 0.7).astype(dtype)


@pytest.mark.parametrize(("momentum", "eps"), [(0.1, 1e-5), (0.3, 0.5)])
def test_training_uses_and_follows_the_batch(momentum, eps):
    with jax.enable_x64(True):
        norm, x = make(momentum=momentum, eps=eps), image()
        mean, var, scale, bias = (np.asarray(a[...]) for a in (norm.mean, norm.var, norm.scale, norm.bias))
        y = norm(x, train=True)
        flat = x.reshape(-1, SHAPE[-1])
        np.testing.assert_allclose(y, (x - flat.mean(0)) / np.sqrt(flat.var(0) + eps) * scale + bias, atol=1e-12)
        np.testing.assert_allclose(norm.mean[...], (1 - momentum) * mean + momentum * flat.mean(0), atol=1e-12)
        # The variance that is kept is the unbiased one.
        np.testing.assert_allclose(norm.var[...], (1 - momentum) * var + momentum * flat.var(0, ddof=1), atol=1e-12)


def test_otherwise_uses_the_running_statistics_and_leaves_them():
    with jax.enable_x64(True):
        norm, x = make(), image()
        before = [np.asarray(a[...]) for a in (norm.mean, norm.var, norm.scale, norm.bias)]
        y = norm(x, train=False)
        mean, var, scale, bias = before
        np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, atol=1e-12)
        for part, kept in zip((norm.mean, norm.var), before, strict=False):
            np.testing.assert_array_equal(part[...], kept)


def test_gradients_pass_through_the_statistics_and_not_into_the_running_ones():
    with jax.enable_x64(True):
        graph, parameters, statistics = nnx.split(make(), nnx.Param, nnx.BatchStat)

        def run(parameters, x):
            norm = nnx.merge(graph, parameters, statistics, copy=True)
            return norm(x, train=True), nnx.state(norm, nnx.BatchStat)

        x = image()[:2, :, :2]
        check_grads(lambda p, x: run(p, x)[0], (parameters, x), order=1, modes=("rev",), atol=1e-5, rtol=1e-5)
        kept = jax.grad(lambda x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(run(parameters, x)[1])))(x)
        np.testing.assert_array_equal(kept, np.zeros_like(x))


def test_on_a_mesh_the_batch_is_the_global_one():
    x = image(dtype=np.float32)[:4]
    x[2:] += 3  # the two devices' own statistics are far apart
    graph, state = nnx.split(make(np.float32))

    def run(state, x):
        norm = nnx.merge(graph, state)
        return norm(x, train=True), nnx.state(norm, nnx.BatchStat)

    want = jax.jit(run)(state, x)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    for a, b in zip(*map(jax.tree.leaves, (jax.jit(run)(state, placed), want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_statistics_of_bfloat16_are_float32():
    """Around 100 bfloat16 tells apart steps of a half, so that the images' own spread would be lost in its sums."""
    norm, x = make(np.float32), jnp.asarray(100 + image(), jnp.bfloat16)
    y = norm(x, train=True)
    assert y.dtype == jnp.bfloat16
    assert norm.mean[...].dtype == norm.var[...].dtype == jnp.float32
    wide = np.asarray(x, np.float64).reshape(-1, SHAPE[-1])
    fresh = make(np.float32)
    np.testing.assert_allclose(norm.mean[...], 0.9 * fresh.mean[...] + 0.1 * wide.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 * fresh.var[...] + 0.1 * wide.var(0, ddof=1), rtol=1e-4)


def test_one_value_has_no_variance():
    norm = BatchNorm(3)
    with pytest.raises(ValueError, match=r"x: training needs two values per channel or more .* shape \(1, 1, 1, 3\)"):
        norm(jnp.ones((1, 1, 1, 3)), train=True)
    assert norm(jnp.ones((1, 1, 1, 3)), train=False).shape == (1, 1, 1, 3)
