"""Stochastic depth (Huang et al. 2016): in training, a residual branch is left out of whole rows.

y = x m / (1 - p),      m = 1 with chance 1 - p, one m for each row of the batch, so that E[y] = x
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def drop_path(x: Float[Array, "B ..."], rate: float | Float[Array, ""], key: Array | None) -> Float[Array, "B ..."]:
    """`x` with whole rows set to 0 at `rate`, the rest scaled up; without a key, `x`."""
    if key is None:
        return x
    keep = 1 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.bernoulli(key, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, (x / keep).astype(x.dtype), 0)


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    """Rates that grow evenly from 0 at the first block of all to `rate` at the last, by stage."""
    rates = np.linspace(0, rate, sum(depths)).tolist()
    ends = np.cumsum((0, *depths))
    return tuple(tuple(rates[start:stop]) for start, stop in itertools.pairwise(ends))


def check_drop_path(rate: float) -> None:
    """`rate` is a chance below 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path: expected a chance from 0 up to, not including, 1, got {rate}")


def training_key(key: Array | None, rate: float, *, train: bool) -> Array | None:
    """The key that blocks draw from: `None` where nothing is random.

    Raises:
      ValueError: training with stochastic depth and without a key.
    """
    if not train or rate == 0:
        return None
    if key is None:
        raise ValueError(
            f"key: in training whole branches are left out at random (drop_path = {rate}); pass a jax.random.key, or "
            "make the model with drop_path = 0"
        )
    return key


def fold(key: Array | None, index: int | Array) -> Array | None:
    """The key of block `index`."""
    return None if key is None else jax.random.fold_in(key, index)
