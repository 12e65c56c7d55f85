"""Large kernel attention; the properties are those of the specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jattn
from jattn import large_kernel_attention
from jattn.vision.large_kernel import GATES, large_kernel_sizes

B, H, W, C = 2, 11, 7, 3


def weights(rng, channels=C, near=5, far=7, dtype=np.float64, bias=1.0):
    shapes = (near, near, 1, channels), (channels,), (far, far, 1, channels), (channels,), (1, 1, channels, channels)
    made = [0.3 * rng.standard_normal(shape) for shape in (*shapes, (channels,))]
    return [(a * bias if a.ndim == 1 else a).astype(dtype) for a in made]


def inputs(seed=0, shape=(B, H, W, C), dtype=np.float64, **options):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(dtype), weights(rng, shape[-1], dtype=dtype, **options)


def slow_depthwise(x, kernel, bias, dilation):
    """Pixel by pixel and tap by tap; what lies outside counts as 0."""
    out = np.zeros_like(x) + bias
    sides = kernel.shape[:2]
    for row, column in np.ndindex(*x.shape[1:3]):
        for tap in np.ndindex(*sides):
            i, j = (at + dilation * (t - side // 2) for at, t, side in zip((row, column), tap, sides, strict=True))
            if 0 <= i < x.shape[1] and 0 <= j < x.shape[2]:
                out[:, row, column] += kernel[tap][0] * x[:, i, j]
    return out


def slow(x, weights, dilation=3):
    """The attention, before the gate."""
    dw, dw_bias, dwd, dwd_bias, pw, pw_bias = weights
    u = slow_depthwise(slow_depthwise(x, dw, dw_bias, 1), dwd, dwd_bias, dilation)
    return u @ pw[0, 0] + pw_bias


@pytest.mark.parametrize("gate", GATES)
def test_is_the_definition(gate):
    x, given = inputs()
    with jax.enable_x64(True):
        got = large_kernel_attention(x, *given, gate=gate)
    a = slow(x, given)
    want = {"mul": x * a, "add": x + a, "none": a, "sigmoid": x / (1 + np.exp(-a))}[gate]
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize(("near", "far", "dilation"), [(3, 5, 2), (1, 3, 1), (7, 1, 4)])
def test_other_sides_and_dilations(near, far, dilation):
    x, given = inputs(near=near, far=far)
    with jax.enable_x64(True):
        got = large_kernel_attention(x, *given, dilation=dilation)
    np.testing.assert_allclose(got, x * slow(x, given, dilation), atol=1e-12)


def test_a_pixel_reaches_23_by_23_without_holes():
    x = np.zeros((1, 31, 37, 1), np.float32)
    x[0, 15, 17] = 1
    ones = [np.ones((5, 5, 1, 1)), np.zeros(1), np.ones((7, 7, 1, 1)), np.zeros(1), np.ones((1, 1, 1, 1)), np.zeros(1)]
    out = large_kernel_attention(x, *(a.astype(np.float32) for a in ones), gate="none")
    reached = np.zeros((31, 37), bool)
    reached[15 - 11 : 15 + 12, 17 - 11 : 17 + 12] = True
    np.testing.assert_array_equal(np.asarray(out[0, ..., 0]) > 0, reached)


def test_is_one_large_convolution_away_from_borders():
    x, given = inputs(shape=(1, 29, 31, C), bias=0.0)
    dw, dwd = given[0], given[2]
    composed = np.zeros((23, 23, 1, C))
    for tap in np.ndindex(7, 7):
        rows, columns = (slice(3 * t, 3 * t + 5) for t in tap)
        composed[rows, columns] += dwd[tap] * dw
    given[4] = np.eye(C)[None, None]
    with jax.enable_x64(True):
        got = np.asarray(large_kernel_attention(x, *given, gate="none"))
    want = slow_depthwise(x, composed, 0, 1)
    np.testing.assert_allclose(got[:, 11:-11, 11:-11], want[:, 11:-11, 11:-11], atol=1e-12)
    # Each of the two is padded, so what the first one has outside is lost.
    assert np.abs(got - want).max() > 0.1


def test_the_first_bias_does_not_reach_the_padding():
    given = weights(np.random.default_rng(0))
    with jax.enable_x64(True):
        got = large_kernel_attention(np.zeros((1, H, 13, C)), *given, gate="none")
    _, dw_bias, dwd, dwd_bias, pw, pw_bias = given
    corner = dw_bias * dwd[3:, 3:, 0].sum((0, 1)) + dwd_bias
    np.testing.assert_allclose(got[0, 0, 0], corner @ pw[0, 0] + pw_bias, atol=1e-12)


def test_gates_that_are_constant():
    x, given = inputs(dtype=np.float32)
    given[4] = np.zeros_like(given[4])
    given[5] = np.ones_like(given[5])
    np.testing.assert_array_equal(large_kernel_attention(x, *given), x)
    given[5] = np.zeros_like(given[5])
    np.testing.assert_array_equal(large_kernel_attention(x, *given), np.zeros_like(x))


def test_without_biases_it_is_quadratic():
    x, given = inputs(bias=0.0)
    with jax.enable_x64(True):
        once, scaled = (np.asarray(large_kernel_attention(a * x, *given)) for a in (1.0, -1.7))
    np.testing.assert_allclose(scaled, 1.7**2 * once, atol=1e-12)


@pytest.mark.parametrize("gate", ["mul", "sigmoid"])
def test_gradients_forwards_and_backwards(gate):
    x, given = inputs(shape=(1, 5, 4, 2), near=3, far=3)
    with jax.enable_x64(True):
        op = functools.partial(large_kernel_attention, gate=gate)
        check_grads(op, (x, *given), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


def test_bfloat16_sums_in_float32():
    """49 values near 1 lose whole units when their sum is kept in eight bits."""
    x, given = inputs(shape=(1, 23, 29, 2), bias=0.0)
    x, *given = (jnp.asarray(np.abs(a) + 1, jnp.bfloat16) for a in (x, *given))
    got = large_kernel_attention(x, *given, gate="none")
    assert got.dtype == jnp.bfloat16
    want = slow(*(jax.tree.map(lambda a: np.asarray(a, np.float64), part) for part in (x, given)))
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0.015)
    gradient = jax.grad(lambda *a: large_kernel_attention(*a).astype(jnp.float32).sum(), range(7))(x, *given)
    assert all(g.dtype == jnp.bfloat16 and np.all(np.isfinite(g.astype(np.float32))) for g in gradient)


def test_rows_are_independent_and_map():
    x, given = inputs(dtype=np.float32)
    both = large_kernel_attention(x, *given)
    mapped = jax.vmap(lambda one: large_kernel_attention(one[None], *given)[0])(x)
    np.testing.assert_allclose(mapped, both, atol=1e-5)
    changed = large_kernel_attention(np.concatenate([x[:1], 2 + x[1:]]), *given)
    np.testing.assert_allclose(changed[0], both[0], atol=1e-6)
    assert np.abs(changed[1] - both[1]).max() > 0.1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    x, given = inputs(shape=(4, H, W, C), dtype=np.float32)
    want = jax.jit(large_kernel_attention)(x, *given)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("rows")))
        got = jax.jit(large_kernel_attention)(placed, *(jax.device_put(a, NamedSharding(mesh, P())) for a in given))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("rows")), got.ndim)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "parameters"), [(32, 3392), (64, 8832), (128, 25856), (256, 84480), (512, 300032)]
)
def test_parameters_of_the_papers_table(channels, parameters):
    near, far = large_kernel_sizes(21, 3)
    assert channels * (near**2 + far**2 + channels) == parameters


def test_sides_of_other_kernels():
    assert large_kernel_sizes(21, 3) == (5, 7)
    assert large_kernel_sizes(35, 4) == (7, 9)
    assert large_kernel_sizes(3, 3) == (5, 1)
    with pytest.raises(ValueError, match=r"kernel: 23 at dilation 3 needs 8 x 8 taps, .*; 21 or 25 would do"):
        large_kernel_sizes(23, 3)
    for kernel in (21, 25):
        assert large_kernel_sizes(kernel, 3)[1] % 2
    with pytest.raises(ValueError, match="dilation: expected at least 1, got 0"):
        large_kernel_sizes(21, 0)


def test_errors():
    x, given = inputs(dtype=np.float32)

    def refuse(message, index=None, array=None, error=ValueError, **options):
        arrays = [x, *given]
        if index is not None:
            arrays[index] = array
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda: large_kernel_attention(*arrays, **options))

    refuse(r"x: expected 4 dimensions \[B, H, W, C\], got shape \(2, 11, 7\)", 0, x[..., 0])
    refuse(r"dw_kernel: expected .* with 1 = 1, got \(5, 5, 3, 3\)", 1, np.zeros((5, 5, 3, 3), np.float32))
    refuse(r"dw_bias: expected \[C\] with C = 3 as in x, got \(2,\)", 2, np.zeros(2, np.float32))
    refuse(r"dwd_kernel: expected odd sides, .* got \(7, 6, 1, 3\); pad", 3, np.zeros((7, 6, 1, 3), np.float32))
    refuse(r"pw_kernel: expected 4 dimensions", 5, np.zeros((3, 3), np.float32))
    refuse("pw_bias: expected dtype float32 as in x, got float16", 6, np.zeros(3, np.float16), TypeError)
    refuse("x: expected a floating dtype, got int32", 0, np.zeros(x.shape, np.int32), TypeError)
    refuse("dimension H is 0", 0, x[:, :0])
    refuse("dilation: expected at least 1, got 0", dilation=0)
    refuse("gate: expected one of 'mul', 'add', 'none', 'sigmoid', got 'product'", gate="product")


def test_is_public():
    assert jattn.large_kernel_attention is large_kernel_attention
