"""The exact Gaussian error linear unit, inside `shard_map` too.

    gelu(x) = x (1 + erf(x / sqrt 2)) / 2           erf(z) = z c(z^2), c a Chebyshev series on [0, 36]

The series is for `shard_map` alone: JAX 0.12 makes `lax.erf` of a primitive that refuses values that vary over the axes
of a mesh.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LARGEST = 6.0
"""Beyond it erf is 1 in float64."""


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    erf = _erf_series if jax.typeof(x).manual_axis_type.varying else jax.lax.erf
    return 0.5 * x * (1 + erf(x * 0.5**0.5))


def _ratio(t: np.ndarray) -> np.ndarray:
    """erf(z) / z where z^2 = 18 (t + 1)."""
    z = np.maximum(LARGEST * np.sqrt((t + 1) / 2), 1e-30)
    return np.vectorize(math.erf)(z) / z


SERIES = np.polynomial.Chebyshev.interpolate(_ratio, 48).coef


@jax.custom_jvp
def _erf_series(z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    inside = jnp.clip(z, -LARGEST, LARGEST)
    t = 2 * (inside / LARGEST) ** 2 - 1
    second = first = jnp.zeros_like(t)
    for coefficient in SERIES[:0:-1]:
        first, second = 2 * t * first - second + coefficient, first
    return inside * (t * first - second + SERIES[0])


@_erf_series.defjvp
def _(primals, tangents):
    (z,), (dz,) = primals, tangents
    return _erf_series(z), 2 / math.sqrt(math.pi) * jnp.exp(-(z**2)) * dz
