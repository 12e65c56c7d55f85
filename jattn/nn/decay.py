"""Decays that a mixer computes from its token, as Mamba-2 does.

Delta = softplus(x W + b),      log a = -exp(r) * Delta
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn import checks
from jattn.nn.gate import matrix_flops


def step_bias(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """b such that softplus(b) is log-uniform from 0.001 to 0.1."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))


class SoftplusDecay(nnx.Module):
    """log a per head or per channel; W may go through `rank` channels. exp(r) starts uniform from 1 to 16.

    Args:
      heads, channels: numbers of r, and of Delta for each of them.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        channels: int = 1,
        rank: int | None = None,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.down = None if rank is None else nnx.Linear(width, rank, use_bias=False, **settings)
        self.up = nnx.Linear(width if rank is None else rank, heads * channels, bias_init=step_bias, **settings)
        self.log_rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), param_dtype, 1.0, 16.0)))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T K X"]:
        """log a, X the channels of a head; in float32 or wider."""
        return self.with_step(x)[1]

    def with_step(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T K X"], Float[Array, "B T K X"]]:
        """Delta and log a."""
        accumulator = checks.accumulator_dtype(x.dtype)
        logits = self.up(x if self.down is None else self.down(x)).astype(accumulator)
        rate = jnp.exp(self.log_rate[...].astype(accumulator))
        step = jax.nn.softplus(logits).reshape(*x.shape[:-1], rate.shape[0], -1)
        return step, -rate[:, None] * step

    def flops(self, tokens: int) -> float:
        return matrix_flops(tokens, self.down, self.up)
