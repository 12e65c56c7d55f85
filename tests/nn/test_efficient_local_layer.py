"""The layer of efficient local attention: the published settings and how its weights start."""

import jax
import numpy as np
import pytest
from flax import nnx

from jattn import ela
from jattn.nn.efficient_local import ELA


@pytest.mark.parametrize(
    ("variant", "taps", "width", "groups"), [("T", 5, 1, 32), ("B", 7, 1, 16), ("S", 5, 8, 16), ("L", 7, 8, 16)]
)
def test_holds_the_parameters_of_the_op(variant, taps, width, groups):
    layer = ELA(96, variant, rngs=nnx.Rngs(0))
    assert layer.kernel.shape == (taps, width, 96)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(layer))) == taps * width * 96 + 2 * 96
    # PyTorch's start: uniform within (k C / g)^-1/2, GN as if it were not there.
    bound = (taps * width) ** -0.5
    assert 0.95 * bound < np.abs(layer.kernel[...]).max() <= bound
    np.testing.assert_allclose(np.std(layer.kernel[...]), bound / np.sqrt(3), rtol=0.1)
    x = jax.random.normal(jax.random.key(0), (2, 7, 5, 96))
    ones = np.ones(96, np.float32)
    want = ela(x, layer.kernel[...], ones, 0 * ones, feature_groups=96 // width, num_groups=groups)
    np.testing.assert_array_equal(layer(x), want)
    assert layer.flops(7, 5) == 2 * 12 * taps * width * 96


def test_bfloat16():
    layer, x = ELA(16, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (1, 5, 3, 16))
    half = layer(x.astype("bfloat16"))
    assert half.dtype == "bfloat16"
    np.testing.assert_allclose(half.astype("float32"), layer(x), atol=0.03)


def test_errors():
    with pytest.raises(ValueError, match="num_groups: 24 channels do not divide by 16 groups; choose a divisor of 24"):
        ELA(24, "S", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="variant: expected one of 'T', 'B', 'S', 'L', got 'M'"):
        ELA(32, "M", rngs=nnx.Rngs(0))
