"""Rotary positions against complex multiplication, and the property that gives them their use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.positions import apply_rotary, apply_rotary_axes


def rotate(x, positions, theta, layout):
    """Each channel pair as a complex number times e^{i m w}, in float64."""
    half = x.shape[-1] // 2
    a, b = (x[..., :half], x[..., half:]) if layout == "half" else (x[..., 0::2], x[..., 1::2])
    turned = (a + 1j * b) * np.exp(1j * positions[..., None, None] * theta ** (-np.arange(half) / half))
    if layout == "half":
        return np.concatenate([turned.real, turned.imag], -1)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_is_a_complex_rotation(layout):
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 7, 3, 10)), rng.integers(0, 97, (2, 7))
    out = apply_rotary(jnp.asarray(x, jnp.float32), jnp.asarray(positions), theta=500.0, layout=layout)
    np.testing.assert_allclose(out, rotate(x, positions, 500.0, layout), atol=2e-5)


def test_float64_is_float64_far_from_the_start():
    rng = np.random.default_rng(4)
    x, positions = rng.normal(size=(2, 7, 3, 10)), rng.integers(0, 10**6, (2, 7))
    with jax.enable_x64(True):
        out = apply_rotary(jnp.asarray(x), jnp.asarray(positions))
    np.testing.assert_allclose(out, rotate(x, positions, 10_000.0, "half"), atol=1e-9)


def test_products_depend_on_the_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 6)), jnp.float32) for _ in range(2))

    def product(m, n):
        turned = (apply_rotary(x, jnp.array([[p]])) for x, p in ((q, m), (k, n)))
        return float(jnp.vdot(*turned))

    assert product(5, 2) == pytest.approx(product(14, 11), abs=1e-5)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3


def test_the_rest_passes_unchanged():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 3, 2, 11)), jnp.bfloat16)
    out = apply_rotary(x, jnp.arange(3)[None], rotary_dim=4)
    assert out.dtype == jnp.bfloat16
    assert (out[..., 4:] == x[..., 4:]).all()
    assert (out[:, 1:, :, :4] != x[:, 1:, :, :4]).any(axis=-1).all()


def test_every_axis_turns_a_share_of_the_channels():
    rng = np.random.default_rng(3)
    x, places = rng.normal(size=(2, 5, 3, 12)), rng.integers(0, 23, (2, 5, 3))
    out = apply_rotary_axes(jnp.asarray(x, jnp.float32), jnp.asarray(places), theta=70.0)
    turned = [rotate(x[..., 4 * i : 4 * i + 4], places[..., i], 70.0, "half") for i in range(3)]
    np.testing.assert_allclose(out, np.concatenate(turned, axis=-1), atol=2e-5)
    with pytest.raises(ValueError, match="a head dim that is a multiple of 10 is needed, got 12"):
        apply_rotary_axes(jnp.ones((1, 1, 1, 12)), jnp.zeros((1, 1, 5), int))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": 3}, "rotary_dim: expected an even number, got 3"),
        ({"rotary_dim": 8}, "rotary_dim: expected at most the head dim 6, got 8"),
        ({"layout": "neox"}, "layout: expected one of 'half', 'interleaved', got 'neox'"),
        ({"positions": jnp.zeros((1, 2), int)}, "positions: expected .B, T. = .1, 3."),
        ({"theta": -1.0}, "theta: expected a positive number"),
    ],
)
def test_errors(change, message):
    arguments = {"x": jnp.ones((1, 3, 2, 6)), "positions": jnp.zeros((1, 3), int)} | change
    with pytest.raises(ValueError, match=message):
        apply_rotary(**arguments)


@pytest.mark.parametrize(
    ("places", "error", "message"),
    [
        (jnp.zeros((3, 2), int), ValueError, "places: expected 3 dimensions"),
        (jnp.zeros((1, 4, 2), int), ValueError, "places: expected .* with T = 3 as in x"),
        (jnp.zeros((3, 3, 2), int), ValueError, "places: expected .B, T, A. = .2, 3, 2."),
        (jnp.zeros((1, 3, 0), int), ValueError, "dimension A is 0"),
        (jnp.zeros((1, 3, 2)), TypeError, "places: expected an integer dtype, got float32"),
        ([[[0, 1]]], TypeError, "places: expected an array, got list"),
    ],
)
def test_errors_of_places(places, error, message):
    with pytest.raises(error, match=message):
        apply_rotary_axes(jnp.ones((2, 3, 2, 8)), places)
