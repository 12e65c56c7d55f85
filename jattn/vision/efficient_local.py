"""Efficient local attention: an image is gated by its rows' and its columns' means (Xu and Wan 2024).

z_h = mean over columns of x,   z_w = mean over rows of x
a_h = sigmoid(GN(F(z_h))),   a_w = sigmoid(GN(F(z_w)));   y[h, w] = x[h, w] a_h[h] a_w[w]

F is a convolution along the strip, in groups of channels, without bias; GN is a group normalisation over the channels
of a group and the whole strip. One F and one GN serve both strips, each with statistics of its own, in all of the
released code; the paper writes F_h and F_w.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jattn import checks


class Variant(NamedTuple):
    """A published setting: the convolution's taps, the channels it mixes, and the groups of the normalisation."""

    taps: int
    group_width: int
    num_groups: int


VARIANTS = {"T": Variant(5, 1, 32), "B": Variant(7, 1, 16), "S": Variant(5, 8, 16), "L": Variant(7, 8, 16)}
"""ELA-T, -B, -S and -L. The released code uses L in MobileNetV2 and YOLOX, T in YOLOF, S and B in DeepLab."""


def ela(
    x: Float[Array, "B H W C"],
    conv_kernel: Float[Array, "k width C"],
    gn_scale: Float[Array, " C"],
    gn_bias: Float[Array, " C"],
    *,
    feature_groups: int,
    num_groups: int,
    eps: float = 1e-5,
) -> Float[Array, "B H W C"]:
    """The image times a gate for every row and one for every column, by channel.

    Args:
      x: images.
      conv_kernel: of F; k is odd, the strip is padded with k // 2 zeros, and `width` is C / `feature_groups`.
      gn_scale, gn_bias: of GN, by channel.
      feature_groups: how many groups of channels F convolves apart; C for a depthwise F.
      num_groups: how many groups of channels GN normalises apart.
      eps: added to the (biased) variance. A strip of one place with one channel to a group has no variance, and its
        gate is that of the bias alone.

    Returns:
      images like `x`; means, statistics and gates are float32 or wider.

    Raises:
      ValueError: shapes disagree, C does not divide by either number of groups, k is even, an empty dimension.
      TypeError: not floating, or dtypes differ.
    """
    sizes = checks.bind_shapes(
        ("x", x, "B H W C"), ("conv_kernel", conv_kernel, "k width C"), ("gn_scale", gn_scale, "C"),
        ("gn_bias", gn_bias, "C"),
    )  # fmt: skip
    given = {"x": x, "conv_kernel": conv_kernel, "gn_scale": gn_scale, "gn_bias": gn_bias}
    checks.check_floating(**given)
    checks.check_same_dtype(**given)
    checks.check_no_empty(sizes, "BHWC")
    channels = sizes["C"]
    check_groups("feature_groups", feature_groups, channels)
    check_groups("num_groups", num_groups, channels)
    if sizes["width"] != channels // feature_groups:
        raise ValueError(
            f"conv_kernel: expected [k, {channels // feature_groups}, {channels}] for {channels} channels in "
            f"{feature_groups} feature_groups, got {tuple(conv_kernel.shape)}"
        )
    if sizes["k"] % 2 == 0:
        raise ValueError(f"conv_kernel: expected an odd number of taps, got {sizes['k']}; pad it with one of zeros")
    accumulator = checks.accumulator_dtype(x.dtype)

    def gate(strip: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        convolved = jax.lax.conv_general_dilated(
            strip,
            conv_kernel.astype(accumulator),
            (1,),
            ((sizes["k"] // 2,) * 2,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=feature_groups,
        )
        grouped = convolved.reshape(*strip.shape[:2], num_groups, channels // num_groups)
        mean = jnp.mean(grouped, axis=(1, 3), keepdims=True)
        variance = jnp.mean((grouped - mean) ** 2, axis=(1, 3), keepdims=True)
        normal = ((grouped - mean) * jax.lax.rsqrt(variance + eps)).reshape(strip.shape)
        return jax.nn.sigmoid(normal * gn_scale + gn_bias)

    rows = gate(jnp.mean(x, axis=2, dtype=accumulator))
    columns = gate(jnp.mean(x, axis=1, dtype=accumulator))
    return (x * rows[:, :, None] * columns[:, None]).astype(x.dtype)


def check_groups(name: str, groups: int, channels: int) -> None:
    """`groups` divides `channels`."""
    if channels % checks.check_count(name, groups):
        raise ValueError(
            f"{name}: {channels} channels do not divide by {groups} groups; choose a divisor of {channels}, or make "
            f"the channels a multiple of {groups}"
        )
