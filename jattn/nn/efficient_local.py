"""Efficient local attention with its parameters, to be put anywhere in a convolutional network; see `jattn.ela`."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn import checks
from jattn.vision.efficient_local import VARIANTS, check_groups, ela

Name = Literal["T", "B", "S", "L"]


class ELA(nnx.Module):
    """The image gated by its rows and its columns.

    Args:
      channels: C, a multiple of 32 for variant T and of 16 for the others.
      variant: of the paper; see `jattn.vision.efficient_local.VARIANTS`.
    """

    def __init__(self, channels: int, variant: Name = "S", *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        checks.check_choice("variant", variant, tuple(VARIANTS))
        taps, width, self.num_groups = VARIANTS[variant]
        check_groups("num_groups", self.num_groups, channels)
        self.feature_groups = channels // width
        # Uniform within (taps x width)^-1/2, as PyTorch starts a convolution.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (taps, width, channels), param_dtype))
        self.scale = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        weights = (part[...].astype(x.dtype) for part in (self.kernel, self.scale, self.bias))
        return ela(x, *weights, feature_groups=self.feature_groups, num_groups=self.num_groups)

    def flops(self, height: int, width: int) -> int:
        """Of the two convolutions along strips of one image."""
        taps, group, channels = self.kernel.shape
        return 2 * (height + width) * taps * group * channels
