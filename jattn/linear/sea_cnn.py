"""The two networks that turn SEA's images, one row per query, into logits over L cells.

    two-way:  conv 3x3, every second row - ReLU - conv 3x3 - ReLU - rows twice - conv 3x3 - bilinear to [T, L]
    causal:   LayerNorm - (conv 3x3 - ReLU) twice - columns 4 times - conv 1x1 - pool L + 2 to L - LayerNorm

A causal convolution reads rows t, t - 2, t - 4 and columns x - 2, x, x + 2, so that an estimate looks 8 rows back. Its
1x1 convolution pads the width, so two border columns hold its bias alone; averages of 2 to 4 neighbours take the L + 2
columns back to L.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jattn.linear.sea_params import CausalCNN, Dense, Norm, TwoWayCNN

TAPS = (4, 2, 0)
PAST = max(TAPS)
"""Rows before the first that one causal convolution reads."""

Image = Float[Array, "B T C W"]
Rows = Float[Array, "B 4 W C"]


def two_way_cnn(image: Image, cnn: TwoWayCNN) -> Float[Array, "B N T L"]:
    """BERT's network."""
    length, _, width = image.shape[1:]
    x = jax.nn.relu(_convolve(jnp.swapaxes(image, 2, 3), cnn.first, stride=2))
    x = jax.nn.relu(_convolve(x, cnn.second))
    x = _convolve(jnp.repeat(x, 2, axis=1), cnn.last)
    shape = (x.shape[0], length, 2 * width, x.shape[-1])
    return jnp.moveaxis(jax.image.resize(x, shape, "bilinear", antialias=False), -1, 1)


def causal_cnn(
    image: Image, cnn: CausalCNN, position: Int[Array, "B T"], past: tuple[Rows, Rows] | None = None
) -> tuple[Float[Array, "B N T L"], tuple[Rows, Rows]]:
    """OPT's network.

    Args:
      position: of every row in its own sequence; rows of other sequences are not read.
      past: the rows before these that the two convolutions read; zeros where there are none.

    Returns:
      the logits, and the last rows for a later call.
    """
    after = []
    x = jnp.swapaxes(layer_norm(image, cnn.norm), 2, 3)
    for index, layer in enumerate((cnn.first, cnn.second)):
        if past is None:
            rows = jnp.pad(x, ((0, 0), (PAST, 0), (0, 0), (0, 0)))
        else:
            rows = jnp.concatenate([past[index].astype(x.dtype), x], axis=1)
        after.append(rows[:, x.shape[1] :])
        x = jax.nn.relu(_convolve_causal(rows, layer, position))
    x = jnp.repeat(x @ cnn.last.kernel[0, 0], 4, axis=2)
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0))) + cnn.last.bias
    return layer_norm(_pool(jnp.moveaxis(x, -1, 1)), cnn.last_norm), (after[0], after[1])


def layer_norm(x: Float[Array, "*batch width"], norm: Norm) -> Float[Array, "*batch width"]:
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * norm.scale + norm.bias


def _convolve(x: Float[Array, "B T W C"], layer: Dense, stride: int = 1) -> Float[Array, "B rows W d_out"]:
    """3x3, as many columns as before."""
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(x, layer.kernel, (stride, 1), ((1, 1), (1, 1)), dimension_numbers=numbers)
    return out + layer.bias


def _convolve_causal(
    rows: Float[Array, "B rows W C"], layer: Dense, position: Int[Array, "B T"]
) -> Float[Array, "B T W d_out"]:
    """The rows that a row reads stand side by side as channels; a convolution of columns does the rest."""
    length, channels = position.shape[1], rows.shape[3]
    seen = [
        jnp.where((position >= tap)[:, :, None, None], rows[:, PAST - tap : PAST - tap + length], 0) for tap in TAPS
    ]
    kernel = jnp.swapaxes(layer.kernel, 0, 1).reshape(1, 3, len(TAPS) * channels, -1)
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(
        jnp.concatenate(seen, axis=-1), kernel, (1, 1), ((0, 0), (2, 2)), rhs_dilation=(1, 2), dimension_numbers=numbers
    )
    return out + layer.bias


def _pool(x: Float[Array, "*batch padded"]) -> Float[Array, "*batch L"]:
    """Adaptive average pooling of L + 2 columns to L: window i is floor(i (L + 2) / L) .. ceil((i + 1) (L + 2) / L)."""
    padded = x.shape[-1]
    cells = np.arange(padded - 2)
    start, stop = cells * padded // len(cells), -(-(cells + 1) * padded // len(cells))
    sums = jnp.zeros_like(x, shape=(*x.shape[:-1], len(cells)))
    for i in range(max(stop - start)):
        sums += jnp.where(start + i < stop, x[..., np.minimum(start + i, padded - 1)], 0)
    return sums / (stop - start)
