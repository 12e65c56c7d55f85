"""What linear mixers put between their heads and the output projection: a gate made from the token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jattn import checks

Activation = Literal["sigmoid", "silu"]
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"sigmoid": jax.nn.sigmoid, "silu": jax.nn.silu}


class Gate(nnx.Module):
    """f(x W), or f(x W_1 W_2 + b) through `rank` channels; nothing between the two matrices."""

    def __init__(
        self,
        width: int,
        features: int,
        rank: int | None = None,
        *,
        activation: Activation = "sigmoid",
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.check_choice("activation", activation, _ACTIVATIONS)
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        down = None if rank is None else checks.check_count("gate_rank", rank)
        self.down = None if down is None else nnx.Linear(width, down, use_bias=False, **settings)
        self.up = nnx.Linear(width if down is None else down, features, use_bias=use_bias, **settings)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return _ACTIVATIONS[self.activation](self.up(x if self.down is None else self.down(x)))

    def flops(self, tokens: int) -> float:
        return matrix_flops(tokens, self.down, self.up)


def matrix_flops(tokens: int, *layers: nnx.Linear | None) -> float:
    """Multiply-adds times two of the layers that are there."""
    return 2.0 * tokens * sum(layer.in_features * layer.out_features for layer in layers if layer is not None)
