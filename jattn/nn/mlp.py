"""Channel mixers: SwiGLU (Shazeer 2020, eq. 6) and the two-layer MLP with GELU."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jattn import checks


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) * x W_up) W_down, no biases; W_down starts at zero."""

    def __init__(self, width: int, hidden: int, *, dtype: Any = None, param_dtype: Any, rngs: nnx.Rngs):
        checks.check_count("hidden", hidden)
        settings: dict[str, Any] = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate = nnx.Linear(width, hidden, **settings)
        self.up = nnx.Linear(width, hidden, **settings)
        self.down = nnx.Linear(hidden, width, kernel_init=nnx.initializers.zeros, **settings)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    def flops(self, tokens: int) -> float:
        return 6.0 * tokens * self.gate.in_features * self.gate.out_features


class MLP(nnx.Module):
    """y = gelu(x W_up) W_down, no biases; W_down starts at zero."""

    def __init__(self, width: int, hidden: int, *, dtype: Any = None, param_dtype: Any, rngs: nnx.Rngs):
        checks.check_count("hidden", hidden)
        settings: dict[str, Any] = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.up = nnx.Linear(width, hidden, **settings)
        self.down = nnx.Linear(hidden, width, kernel_init=nnx.initializers.zeros, **settings)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(jax.nn.gelu(self.up(x)))

    def flops(self, tokens: int) -> float:
        return 4.0 * tokens * self.up.in_features * self.up.out_features
