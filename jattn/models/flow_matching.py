"""Flow matching: what a velocity model is trained on, at which times, and how it makes an image.

    x_t = (1 - t) image + t noise        v = d x_t / dt = noise - image        t = 1 is pure noise, t = 0 the image

(Lipman et al. 2023; the direction of time is that of Esser et al. 2024.) Training times are logit-normal,

    t = sigmoid(mu + delta z), z ~ N(0, 1)        p(t) = N((logit t - mu) / delta) / (delta t (1 - t))

Conditions act early, where t is large: CSAS (Zhou et al. 2026) moves the times there with mu > 0 and delta > 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jattn import checks


def logit_normal(z: Float[Array, "*B"], mu: float = 0.0, delta: float = 1.0) -> Float[Array, "*B"]:
    """`sigmoid(mu + delta z)`: standard normal numbers as times; the defaults are the standard logit-normal."""
    checks.check_array("z", z)
    checks.check_floating(z=z)
    _check_parameters(mu, delta)
    return jax.nn.sigmoid(mu + delta * z)


def logit_normal_pdf(t: Float[Array, "*B"], mu: float = 0.0, delta: float = 1.0) -> Float[Array, "*B"]:
    """Density of `logit_normal` at t; 0 at and outside of 0 and 1. Gradients are finite everywhere."""
    checks.check_array("t", t)
    checks.check_floating(t=t)
    _check_parameters(mu, delta)
    inside = (t > 0) & (t < 1)
    t = jnp.where(inside, t, 0.5)
    z = (jnp.log(t) - jnp.log1p(-t) - mu) / delta
    density = jnp.exp(-0.5 * z**2) / (delta * math.sqrt(2 * math.pi) * t * (1 - t))
    return jnp.where(inside, density, 0)


def csas_timesteps(
    key: Key[Array, ""], shape: Sequence[int], mu: float = 0.5, delta: float = 1.5, dtype: Any = jnp.float32
) -> Float[Array, "*B"]:
    """Times to train at, with more of them early in denoising (Zhou et al. 2026, "CSAS").

    Args:
      key: of `jax.random`.
      shape: of the result.
      mu, delta: location and scale. The paper has mu > 0 and delta > 1, and in a figure 0.5 and 1.5. That delta is a
        standard deviation and not a variance is our choice. 0 and 1 give the standard logit-normal.

    Returns:
      numbers in (0, 1): half of them above sigmoid(mu), and Phi(mu / delta) of them above 1 / 2.
    """
    return logit_normal(jax.random.normal(key, tuple(shape), dtype), mu, delta)


def noisy(images: Float[Array, "B ..."], noise: Float[Array, "B ..."], t: Float[Array, " B"]) -> Float[Array, "B ..."]:
    """x_t, of each image at its own time."""
    for name, x in (("images", images), ("noise", noise)):
        checks.check_array(name, x)
    checks.check_floating(images=images)
    checks.check_same_dtype(images=images, noise=noise)
    if images.shape != noise.shape:
        raise ValueError(f"noise: expected {tuple(images.shape)} as in images, got {tuple(noise.shape)}")
    checks.bind_shapes(("t", t, "B"), B=images.shape[0])
    t = t.reshape(-1, *(1,) * (images.ndim - 1)).astype(images.dtype)
    return (1 - t) * images + t * noise


def flow_matching_loss(
    velocity: Callable[[Array, Array], Array],
    images: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    t: Float[Array, " B"],
) -> Float[Array, " B"]:
    """Mean squared error of `velocity(x_t, t)` against `noise - images`, of each image, in float32 or wider.

    Args:
      velocity: a model, called once; its result has the shape of `images`.
      images, noise: data and standard normal numbers.
      t: a time for each image, such as from `csas_timesteps`. Times are not reweighted.

    Raises:
      ValueError, TypeError: a wrong shape or dtype, of what the model returns too.
    """
    found = velocity(noisy(images, noise, t), t)
    _check_velocity(found, "images", images)
    acc = checks.accumulator_dtype(images.dtype, found.dtype)
    error = found.astype(acc) - (noise.astype(acc) - images.astype(acc))
    return jnp.mean(error**2, axis=tuple(range(1, images.ndim)))


def euler_sample(
    velocity: Callable[[Array, Array, Any], tuple[Array, Any]],
    noise: Float[Array, "B ..."],
    *,
    steps: int,
    carry: Any = None,
) -> tuple[Float[Array, "B ..."], Any]:
    """From noise at t = 1 to an image at t = 0 in equal steps: x <- x - velocity(x, t) / steps.

    Args:
      velocity: `velocity(x, t [B], carry) -> (v, carry)`, called at t = 1, 1 - 1 / steps, ..., 1 / steps.
      noise: where to start.
      steps: how many.
      carry: what the first call gets; each later call gets what the one before returned, of the same shapes.

    Returns:
      `(images, carry)`, images in the noise's dtype.

    Raises:
      ValueError, TypeError: a wrong dtype or number of steps, a velocity of another shape than the noise.
    """
    checks.check_array("noise", noise)
    checks.check_floating(noise=noise)
    checks.check_count("steps", steps)
    acc = checks.accumulator_dtype(noise.dtype)

    def step(state: tuple[Array, Any], t: Array) -> tuple[tuple[Array, Any], None]:
        x, carry = state
        v, carry = velocity(x.astype(noise.dtype), jnp.full(noise.shape[:1], t), carry)
        _check_velocity(v, "noise", noise)
        return (x - v.astype(acc) / steps, carry), None

    times = 1 - jnp.arange(steps, dtype=acc) / steps
    (x, carry), _ = jax.lax.scan(step, (noise.astype(acc), carry), times)
    return x.astype(noise.dtype), carry


def _check_velocity(found: Array, name: str, like: Array) -> None:
    if found.shape != like.shape:
        raise ValueError(f"velocity: expected it to return {tuple(like.shape)} as {name}, got {tuple(found.shape)}")


def _check_parameters(mu: Any, delta: Any) -> None:
    for name, number in (("mu", mu), ("delta", delta)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name}: expected a static number, got {type(number).__name__}")
        if not math.isfinite(number):
            raise ValueError(f"{name}: expected a finite number, got {number}")
    if delta <= 0:
        raise ValueError(f"delta: expected a positive number, got {delta}")
