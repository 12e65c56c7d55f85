"""Batch normalisation (Ioffe and Szegedy 2015) of images, with PyTorch's running statistics.

    train:     m = mean(x), s = mean((x - m)^2) over the batch and all places, by channel; n values each
               running mean = 0.9 running mean + 0.1 m,   running var = 0.9 running var + 0.1 s n / (n - 1)
    otherwise: m, s = the running ones
    y = (x - m) / sqrt(s + eps) * scale + bias

`nnx.BatchNorm` keeps the biased variance, so that it drifts from weights that PyTorch trained.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn import checks


class BatchNorm(nnx.Module):
    """Normalises each channel over batch and places.

    The running statistics are `nnx.BatchStat`s, changed in place when training. They carry no gradient. On a mesh,
    under `jit`, they are those of the global batch.

    Args:
      channels: C.
      momentum: how much of the running statistics a batch replaces.
      eps: added to the variance.
      dtype: of the output; `None` is the input's.
      param_dtype: of scale and bias.
    """

    def __init__(
        self,
        channels: int,
        *,
        momentum: float = 0.1,
        eps: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.momentum = momentum
        self.eps = eps
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))
        statistics = checks.accumulator_dtype(param_dtype)
        self.mean = nnx.BatchStat(jnp.zeros(channels, statistics))
        self.var = nnx.BatchStat(jnp.ones(channels, statistics))

    def __call__(self, x: Float[Array, "B *grid C"], *, train: bool) -> Float[Array, "B *grid C"]:
        """Statistics and products are in float32 or wider.

        Raises:
          ValueError: training on a single value per channel, which has no variance.
        """
        wide = x.astype(checks.accumulator_dtype(x.dtype))
        mean, var = self.mean[...], self.var[...]
        if train:
            count = math.prod(x.shape[:-1])
            if count < 2:
                raise ValueError(
                    f"x: training needs two values per channel or more for their variance, got shape {x.shape}; "
                    "give it more rows or larger images"
                )
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(wide, axis=axes)
            var = jnp.mean((wide - mean) ** 2, axis=axes)
            self._follow(self.mean, mean)
            self._follow(self.var, var * (count / (count - 1)))
        y = (wide - mean) * jax.lax.rsqrt(var + self.eps) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype if self.dtype is None else self.dtype)

    def _follow(self, running: nnx.BatchStat, batch: Float[Array, " C"]) -> None:
        new = (1 - self.momentum) * running[...] + self.momentum * jax.lax.stop_gradient(batch)
        running[...] = new.astype(running[...].dtype)
