"""Convolutions of images with PyTorch's padding: d (k - 1) / 2 zeros on every side, so odd kernels keep the size.

A side of n pixels becomes floor((n - 1) / stride) + 1, rows and columns alike, whatever the dilation d.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from flax import nnx

from jattn import checks

Init = Literal["fan_out", "torch"]


def convolution(
    channels_in: int,
    channels_out: int,
    kernel: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    use_bias: bool = True,
    init: Init = "fan_out",
    **settings: Any,
) -> nnx.Conv:
    """A square convolution of an odd `kernel`, HWIO, its bias zero.

    Args:
      groups: of channels that are convolved apart; `channels_in` for a depthwise convolution.
      init: "fan_out" is normal with variance 2 / (k^2 channels_out / groups) (He et al. 2015), "torch" uniform within
        (k^2 channels_in / groups)^-1/2, as PyTorch starts a convolution by itself.
      settings: dtype, param_dtype and rngs of the layer.
    """
    if checks.check_count("kernel", kernel) % 2 == 0:
        raise ValueError(f"kernel: expected an odd number, for the middle to be a pixel, got {kernel}")
    if init == "fan_out":
        kernel_init = nnx.initializers.normal(math.sqrt(2 * groups / (kernel**2 * channels_out)))
    else:
        kernel_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nnx.Conv(
        channels_in,
        channels_out,
        (kernel, kernel),
        strides=stride,
        padding=dilation * (kernel // 2),
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=kernel_init,
        **settings,
    )


def strided(side: int, stride: int) -> int:
    """Pixels along a side after such a convolution."""
    return (side - 1) // stride + 1


def convolution_flops(layer: nnx.Conv, pixels: int) -> int:
    """Multiply-adds times two for `pixels` outputs, the padding's counted too."""
    return (
        2 * pixels * math.prod(layer.kernel_size) * layer.in_features * layer.out_features // layer.feature_group_count
    )
