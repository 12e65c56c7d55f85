"""Efficient local attention; the properties are those of the specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jattn
from jattn import ela
from jattn.vision.efficient_local import VARIANTS

B, H, W, C = 2, 7, 11, 6
OPTIONS = {"feature_groups": 2, "num_groups": 3}


def inputs(seed=0, shape=(B, H, W, C), taps=5, groups=2, dtype=np.float64):
    rng = np.random.default_rng(seed)
    channels = shape[-1]
    arrays = (
        rng.standard_normal(shape) + 0.5,
        rng.standard_normal((taps, channels // groups, channels)),
        rng.standard_normal(channels),
        rng.standard_normal(channels),
    )
    return [a.astype(dtype) for a in arrays]


def slow_gate(strip, kernel, scale, bias, feature_groups, num_groups, eps):
    """Of one strip [L, C], channel by channel and place by place."""
    length, channels = strip.shape
    taps, width, _ = kernel.shape
    convolved = np.zeros((length, channels))
    for place, out in np.ndindex(length, channels):
        first = out // (channels // feature_groups) * width
        for tap, into in np.ndindex(taps, width):
            at = place + tap - taps // 2
            if 0 <= at < length:
                convolved[place, out] += strip[at, first + into] * kernel[tap, into, out]
    size = channels // num_groups
    for start in range(0, channels, size):
        group = convolved[:, start : start + size]
        convolved[:, start : start + size] = (group - group.mean()) / np.sqrt(group.var() + eps)
    return 1 / (1 + np.exp(-(convolved * scale + bias)))


def slow(x, *weights, feature_groups, num_groups, eps=1e-5):
    out = []
    for image in x:
        rows, columns = (
            slow_gate(image.mean(axis), *weights, feature_groups, num_groups, eps) for axis in (1, 0)
        )  # fmt: skip
        out.append(image * rows[:, None] * columns[None])
    return np.stack(out)


@pytest.mark.parametrize(
    ("taps", "feature_groups", "num_groups", "eps"), [(5, 2, 3, 1e-5), (7, 6, 1, 1e-5), (3, 1, 6, 1e-2), (1, 3, 2, 0.5)]
)
def test_is_the_definition(taps, feature_groups, num_groups, eps):
    given = inputs(taps=taps, groups=feature_groups)
    options = {"feature_groups": feature_groups, "num_groups": num_groups, "eps": eps}
    with jax.enable_x64(True):
        got = ela(*given, **options)
    np.testing.assert_allclose(got, slow(*given, **options), atol=1e-12)


def test_rows_and_columns_trade_places():
    x, *weights = inputs()
    with jax.enable_x64(True):
        got, turned = (np.asarray(ela(a, *weights, **OPTIONS)) for a in (x, x.swapaxes(1, 2)))
    np.testing.assert_allclose(turned.swapaxes(1, 2), got, atol=1e-12)


def test_without_scale_and_bias_both_gates_are_a_half():
    x, kernel, scale, _ = inputs(dtype=np.float32)
    zero = np.zeros_like(scale)
    np.testing.assert_array_equal(ela(x, kernel, zero, zero, **OPTIONS), x / 4)


def test_gates_do_not_see_how_bright_an_image_is():
    x, *weights = inputs()
    with jax.enable_x64(True):
        got, brighter = (np.asarray(ela(a * x, *weights, **OPTIONS, eps=1e-12)) for a in (1.0, 3.7))
    np.testing.assert_allclose(brighter, 3.7 * got, rtol=1e-9)


def test_a_gate_reads_means_of_rows_only():
    """Columns that trade places leave the rows' gates alone, and values within a row may move."""
    x, *weights = inputs()
    order = np.random.default_rng(1).permutation(W)
    with jax.enable_x64(True):
        got, shuffled = (np.asarray(ela(a, *weights, **OPTIONS)) / a for a in (x, x[:, :, order]))
    np.testing.assert_allclose(shuffled[:, 1] / shuffled[:, 0], (got[:, 1] / got[:, 0])[:, :1].repeat(W, 1), rtol=1e-9)


def test_rows_of_the_batch_are_independent():
    x, *weights = inputs(dtype=np.float32)
    both = ela(x, *weights, **OPTIONS)
    changed = ela(np.concatenate([x[:1], x[1:] ** 3]), *weights, **OPTIONS)
    np.testing.assert_allclose(changed[0], both[0], atol=1e-6)
    assert np.abs(changed[1] - both[1]).max() > 0.1
    mapped = jax.vmap(lambda one: ela(one[None], *weights, **OPTIONS)[0])(x)
    np.testing.assert_allclose(mapped, both, atol=1e-6)


def test_one_place_has_the_bias_alone():
    """One place and one channel to a group have no variance; their gate is sigmoid(bias) and not NaN."""
    x, kernel, scale, bias = inputs(shape=(B, 1, 1, C), groups=C)
    with jax.enable_x64(True):
        got = ela(x, kernel, scale, bias, feature_groups=C, num_groups=C)
        gradient = jax.grad(lambda x: ela(x, kernel, scale, bias, feature_groups=C, num_groups=C).sum())(x)
    want = 1 / (1 + np.exp(-bias)) ** 2
    np.testing.assert_allclose(got, x * want, atol=1e-12)
    np.testing.assert_allclose(gradient, np.broadcast_to(want, x.shape), atol=1e-12)


def test_gradients_forwards_and_backwards():
    given = inputs(shape=(1, 3, 5, 4))
    with jax.enable_x64(True):
        op = functools.partial(ela, feature_groups=2, num_groups=2)
        check_grads(op, given, order=1, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


def test_bfloat16_has_statistics_in_float32():
    """Means of 251 values near 100 differ by less than bfloat16 tells apart."""
    x, *weights = inputs(shape=(1, 13, 251, C))
    given = [jnp.asarray(a, jnp.bfloat16) for a in (100 + x, *weights)]
    got = ela(*given, **OPTIONS)
    assert got.dtype == jnp.bfloat16
    want = slow(*(np.asarray(a, np.float64) for a in given), **OPTIONS)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0.01)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    x, *weights = inputs(shape=(4, H, W, C), dtype=np.float32)
    op = jax.jit(functools.partial(ela, **OPTIONS))
    want = op(x, *weights)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("rows")))
        got = op(placed, *(jax.device_put(a, NamedSharding(mesh, P())) for a in weights))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("rows")), got.ndim)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_published_settings():
    assert VARIANTS["T"] == (5, 1, 32)
    assert VARIANTS["B"] == (7, 1, 16)
    assert VARIANTS["S"] == (5, 8, 16)
    assert VARIANTS["L"] == (7, 8, 16)


def test_errors():
    given = inputs(dtype=np.float32)

    def refuse(message, index=None, array=None, error=ValueError, **options):
        arrays = list(given)
        if index is not None:
            arrays[index] = array
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda: ela(*arrays, **(OPTIONS | options)))

    x = given[0]
    refuse(r"x: expected 4 dimensions \[B, H, W, C\]", 0, x[0])
    refuse("num_groups: 6 channels do not divide by 4 groups; choose a divisor of 6, or make", num_groups=4)
    refuse("feature_groups: 6 channels do not divide by 4 groups", feature_groups=4)
    refuse("num_groups: expected at least 1, got 0", num_groups=0)
    refuse(r"conv_kernel: expected \[k, 2, 6\] for 6 channels in 3 feature_groups, got \(5, 3, 6\)", feature_groups=3)
    refuse("conv_kernel: expected an odd number of taps, got 4; pad it", 1, given[1][:4])
    refuse(r"gn_scale: expected \[C\] with C = 6 as in x, got \(5,\)", 2, given[2][:5])
    refuse("gn_bias: expected dtype float32 as in x, got float16", 3, given[3].astype(np.float16), TypeError)
    refuse("x: expected a floating dtype, got int32", 0, x.astype(np.int32), TypeError)
    refuse("dimension W is 0", 0, x[:, :, :0])


def test_is_public():
    assert jattn.ela is ela
