"""Times, loss and sampler of flow matching."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.models.flow_matching import (
    csas_timesteps,
    euler_sample,
    flow_matching_loss,
    logit_normal,
    logit_normal_pdf,
    noisy,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def phi(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_csas_moves_times_to_the_noise():
    """Median sigmoid(mu) and P(t > 1/2) = Phi(mu / delta), within five standard errors of 200,000 draws."""
    count = 200_000
    t = np.asarray(csas_timesteps(jax.random.key(0), (count,)))
    assert t.shape == (count,)
    assert t.dtype == np.float32
    assert np.all((t > 0) & (t < 1))
    assert sigmoid(0.5) == pytest.approx(0.6225, abs=1e-4)
    assert phi(1 / 3) == pytest.approx(0.6306, abs=1e-4)
    error = 5 * 0.5 / math.sqrt(count)
    assert np.mean(t > sigmoid(0.5)) == pytest.approx(0.5, abs=error)
    assert np.mean(t > 0.5) == pytest.approx(phi(1 / 3), abs=error)
    # delta is a standard deviation: its square would give Phi(0.5 / sqrt(1.5)) = 0.658
    assert abs(phi(0.5 / math.sqrt(1.5)) - phi(1 / 3)) > 2 * error
    z = np.log(t / (1 - t))
    assert np.mean(z) == pytest.approx(0.5, abs=0.02)
    assert np.std(z) == pytest.approx(1.5, abs=0.02)


def test_defaults_are_the_standard_logit_normal():
    z = jax.random.normal(jax.random.key(1), (3, 5))
    np.testing.assert_allclose(logit_normal(z), 1 / (1 + np.exp(-z)), rtol=1e-6)
    np.testing.assert_array_equal(csas_timesteps(jax.random.key(1), (3, 5), mu=0.0, delta=1.0), logit_normal(z))
    assert csas_timesteps(jax.random.key(1), (), dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(("mu", "delta"), [(0.0, 1.0), (0.5, 1.5), (-1.0, 0.3)])
def test_the_density_is_that_of_the_times(mu, delta):
    with jax.enable_x64(True):
        # Even steps in the logit reach what even steps in t cannot.
        z = np.linspace(-30, 30, 20_001)
        t = 1 / (1 + np.exp(-z))
        mass = np.asarray(logit_normal_pdf(t, mu, delta)) * t * (1 - t) * (z[1] - z[0])
        assert mass.sum() == pytest.approx(1, abs=1e-9)
        for quantile in (0.1, 0.5, 0.8):
            below = mass[t < quantile].sum()
            assert below == pytest.approx(phi((math.log(quantile / (1 - quantile)) - mu) / delta), abs=2e-3)


def test_the_density_at_the_ends():
    t = jnp.asarray([-0.5, 0.0, 1.0, 1.5])
    assert not np.any(logit_normal_pdf(t))
    slopes = jax.vmap(jax.grad(logit_normal_pdf))(jnp.asarray([0.0, 0.3, 1.0]))
    assert np.all(np.isfinite(slopes))
    assert slopes[1] > 0


def test_noise_is_at_one_and_images_at_zero():
    images, noise = np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(np.float32)
    x = noisy(images, noise, np.array([0.0, 1.0, 0.25], np.float32))
    np.testing.assert_array_equal(x[0], images[0])
    np.testing.assert_array_equal(x[1], noise[1])
    np.testing.assert_allclose(x[2], 0.75 * images[2] + 0.25 * noise[2], rtol=1e-6)


def test_the_loss_is_the_error_of_the_velocity():
    images, noise = np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(np.float32)
    t = np.array([0.1, 0.5, 0.9], np.float32)
    assert np.all(flow_matching_loss(lambda x, t: jnp.asarray(noise - images), images, noise, t) < 1e-12)
    got = flow_matching_loss(lambda x, t: 2 * x, images, noise, t)
    assert got.shape == (3,)
    x = (1 - t[:, None, None]) * images + t[:, None, None] * noise
    np.testing.assert_allclose(got, np.mean((2 * x - noise + images) ** 2, axis=(1, 2)), rtol=1e-5)
    half = flow_matching_loss(lambda x, t: x, images.astype(jnp.bfloat16), noise.astype(jnp.bfloat16), t)
    assert half.dtype == jnp.float32


def test_the_loss_is_least_at_the_mean_velocity():
    """Of data that is one point, x_t = (1 - t) a + t noise tells the noise: the velocity is (x_t - a) / t."""
    noise = np.random.default_rng(0).standard_normal((4, 7)).astype(np.float32)
    a = np.full((4, 7), 0.3, np.float32)
    t = np.asarray(csas_timesteps(jax.random.key(0), (4,)))
    loss = flow_matching_loss(lambda x, t: (x - 0.3) / t[:, None], a, noise, t)
    assert np.all(loss < 1e-9)


def test_euler_goes_from_noise_to_the_image():
    noise = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)

    def velocity(x, t, carry):
        return (x - 0.3) / t[:, None], (carry[0] + 1, carry[1].at[carry[0]].set(t[0]))

    for steps in (1, 4):  # a straight path needs one step
        start = jnp.asarray(0), jnp.zeros(steps)
        images, (calls, times) = euler_sample(velocity, noise, steps=steps, carry=start)
        np.testing.assert_allclose(images, np.full((3, 5), 0.3), atol=1e-6)
        assert calls == steps
        np.testing.assert_allclose(times, 1 - np.arange(steps) / steps, rtol=1e-6)


def test_more_steps_are_nearer_to_a_curved_path():
    """dx/dt = x from t = 1 to 0 gives x / e; Euler errs by a half of 1 / steps, to first order."""
    noise = jnp.ones((1, 1))
    errors = [float(euler_sample(lambda x, t, c: (x, c), noise, steps=s)[0][0, 0]) - math.exp(-1) for s in (50, 100)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert euler_sample(lambda x, t, c: (x, c), noise.astype(jnp.bfloat16), steps=2)[0].dtype == jnp.bfloat16


IMAGES = np.zeros((2, 3), np.float32)
T = np.full(2, 0.5, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: logit_normal(IMAGES, delta=0.0), ValueError, "delta: expected a positive number, got 0"),
        (lambda: logit_normal_pdf(IMAGES, mu=float("nan")), ValueError, "mu: expected a finite number, got nan"),
        (lambda: csas_timesteps(jax.random.key(0), (2,), mu="a"), TypeError, "mu: expected a static number, got str"),
        (lambda: logit_normal(3.0), TypeError, "z: expected an array, got float"),
        (lambda: logit_normal(np.arange(3)), TypeError, "z: expected a floating dtype, got int64"),
        (lambda: noisy(IMAGES, IMAGES[:, 1:], T), ValueError, r"noise: expected \(2, 3\) as in images, got \(2, 2\)"),
        (lambda: noisy(IMAGES, IMAGES, T[:1]), ValueError, r"t: expected \[B\] with B = 2"),
        (
            lambda: flow_matching_loss(lambda x, t: x[:, :1], IMAGES, IMAGES, T),
            ValueError,
            r"velocity: expected it to return \(2, 3\) as images, got \(2, 1\)",
        ),
        (
            lambda: euler_sample(lambda x, t, c: (x[:1], c), IMAGES, steps=2),
            ValueError,
            r"velocity: expected it to return \(2, 3\) as noise, got \(1, 3\)",
        ),
        (
            lambda: euler_sample(lambda x, t, c: (x, c), IMAGES, steps=0),
            ValueError,
            "steps: expected at least 1, got 0",
        ),
    ],
)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
