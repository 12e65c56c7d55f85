"""The first axis of a grid over eight host devices, against one device: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jattn
from jattn.sharding import shard_attention


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def arrays(grid):
    rng = np.random.default_rng(0)
    shapes = {"query": (2, *grid, 4, 5), "key": (2, *grid, 2, 5), "value": (2, *grid, 2, 7)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def results(op, x, mask):
    def run(x):
        out = op(*(x[name] for name in ("query", "key", "value")), key_mask=mask, rel_pos_bias=x.get("rel_pos_bias"))
        return jnp.sum(jnp.sin(3 * out)), out

    return jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options={"xla_backend_optimization_level": 0})(x)


def assert_as_dense(devices, x, mask=None, **options):
    def whole(query, key, value, **given):
        return jattn.neighborhood_attention(query, key, value, **given, **options)

    split = shard_attention(jattn.neighborhood_attention, mesh(**devices), **axes_of(devices), **options)
    got, want = results(split, x, mask), results(whole, x, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, want)


def axes_of(devices):
    return {{"data": "batch", "tensor": "heads", "space": "context"}[name]: name for name in devices}


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((24, 7), {"kernel_size": (5, 3)}),
        ((24, 7), {"kernel_size": (6, 4), "stride": (3, 2)}),
        ((24, 7), {"kernel_size": (5, 3), "dilation": (3, 2)}),
        ((24, 7), {"kernel_size": (11, 3), "is_causal": (True, False), "stride": (3, 1)}),
        ((24,), {"kernel_size": 19}),
        ((24,), {"kernel_size": 2, "is_causal": True}),
        ((16, 5, 3), {"kernel_size": (3, 3, 2), "dilation": (2, 1, 1)}),
    ],
)
def test_pieces_of_a_grid(grid, options):
    """Windows within a neighbor, beyond it, as wide as nearly everything; strides, groups and causal axes."""
    devices = {"space": 8 if len(grid) == 3 else 4, "data": 1 if len(grid) == 3 else 2}
    assert_as_dense(devices, arrays(grid), **options)


def test_hidden_keys_biases_and_heads():
    x = arrays((16, 7))
    x["rel_pos_bias"] = jnp.asarray(np.random.default_rng(1).standard_normal((4, 9, 5)), jnp.float32)
    mask = jnp.asarray(np.random.default_rng(2).random((2, 16, 7)) > 0.3)
    assert_as_dense({"space": 4, "tensor": 2}, x, mask, kernel_size=(5, 3))


def test_pieces_that_do_not_divide():
    split = shard_attention(jattn.neighborhood_attention, mesh(space=8), context="space", kernel_size=3, stride=2)
    with pytest.raises(NotImplementedError, match="pieces of 3 rows do not divide by stride x dilation = 2"):
        split(*arrays((24,)).values())
    with pytest.raises(ValueError, match="does not divide over 8 devices"):
        split(*arrays((23,)).values())
