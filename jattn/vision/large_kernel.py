"""Large kernel attention: an image is gated by a convolution of itself that sees far (Guo et al. 2022, eq. 1-2).

    u = DWD(DW(x));   y = x * (u W + b)

DW is a depthwise convolution of (2 d - 1) x (2 d - 1), DWD one of ceil(K / d) x ceil(K / d) whose taps are d pixels
apart; together they see K x K pixels or a little more, at C ((2 d - 1)^2 + ceil(K / d)^2) weights in place of C K^2.
With K = 21 and d = 3 that is 5 x 5 and 7 x 7, and 23 x 23 pixels. All padding is with zeros. Nothing is normalised and
there is no softmax: the cost is linear in the number of pixels.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jattn import checks

Gate = Literal["mul", "add", "none", "sigmoid"]
GATES = ("mul", "add", "none", "sigmoid")


def large_kernel_attention(
    x: Float[Array, "B H W C"],
    dw_kernel: Float[Array, "P Q 1 C"],
    dw_bias: Float[Array, " C"],
    dwd_kernel: Float[Array, "R S 1 C"],
    dwd_bias: Float[Array, " C"],
    pw_kernel: Float[Array, "1 1 C C"],
    pw_bias: Float[Array, " C"],
    *,
    dilation: int = 3,
    gate: Gate = "mul",
) -> Float[Array, "B H W C"]:
    """The image gated by what its surroundings say.

    Args:
      x: images.
      dw_kernel, dw_bias: the local depthwise convolution; its sides are odd.
      dwd_kernel, dwd_bias: the dilated depthwise convolution; its sides are odd.
      pw_kernel, pw_bias: the mixing of channels, a 1 x 1 convolution.
      dilation: d, pixels between the taps of `dwd_kernel`.
      gate: with a = u W + b, "mul" is x a, the paper's and the released code's. The others are rows of the paper's
        ablation (Table 3): "add" is x + a, "none" is a, "sigmoid" is x sigmoid(a).

    Returns:
      images like `x`. Sums are made in float32 or wider; between the convolutions they take the dtype of `x`.

    Raises:
      ValueError: shapes disagree, a side is even, an empty dimension, `dilation` below 1, or no such gate.
      TypeError: not floating, or dtypes differ.
    """
    given = {
        "x": x, "dw_kernel": dw_kernel, "dw_bias": dw_bias, "dwd_kernel": dwd_kernel, "dwd_bias": dwd_bias,
        "pw_kernel": pw_kernel, "pw_bias": pw_bias,
    }  # fmt: skip
    shapes = ("B H W C", "P Q 1 C", "C", "R S 1 C", "C", "1 1 C C", "C")
    sizes = checks.bind_shapes(*((name, a, s) for (name, a), s in zip(given.items(), shapes, strict=True)))
    checks.check_floating(**given)
    checks.check_same_dtype(**given)
    checks.check_no_empty(sizes, "BHWC")
    checks.check_count("dilation", dilation)
    checks.check_choice("gate", gate, GATES)
    for name, letters in (("dw_kernel", "PQ"), ("dwd_kernel", "RS")):
        if any(sizes[letter] % 2 == 0 for letter in letters):
            raise ValueError(
                f"{name}: expected odd sides, for the middle to be a pixel, got {tuple(given[name].shape)}; pad the "
                "kernel with a row or a column of zeros"
            )
    accumulator = checks.accumulator_dtype(x.dtype)
    u = _depthwise(x, dw_kernel, 1) + dw_bias
    u = _depthwise(u.astype(x.dtype), dwd_kernel, dilation) + dwd_bias
    mixed = jnp.einsum("bhwc,cd->bhwd", u.astype(x.dtype), pw_kernel[0, 0], preferred_element_type=accumulator)
    attention = mixed + pw_bias
    wide = x.astype(accumulator)
    out = {
        "mul": lambda: wide * attention,
        "add": lambda: wide + attention,
        "none": lambda: attention,
        "sigmoid": lambda: wide * jax.nn.sigmoid(attention),
    }[gate]()
    return out.astype(x.dtype)


def large_kernel_sizes(kernel: int, dilation: int) -> tuple[int, int]:
    """Sides 2 d - 1 and ceil(K / d) of the two depthwise convolutions that stand for one of K x K.

    Raises:
      ValueError: the second would be even, so that its middle is no pixel.
    """
    checks.check_count("kernel", kernel)
    checks.check_count("dilation", dilation)
    taps = -(-kernel // dilation)
    if taps % 2 == 0:
        raise ValueError(
            f"kernel: {kernel} at dilation {dilation} needs {taps} x {taps} taps, and an even number has no middle; "
            f"{dilation * (taps - 1)} or {dilation * taps + 1} would do"
        )
    return 2 * dilation - 1, taps


def _depthwise(x: Float[Array, "B H W C"], kernel: Float[Array, "P Q 1 C"], dilation: int) -> Float[Array, "B H W C"]:
    padding = tuple((dilation * (side // 2),) * 2 for side in kernel.shape[:2])
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        preferred_element_type=checks.accumulator_dtype(x.dtype),
    )
