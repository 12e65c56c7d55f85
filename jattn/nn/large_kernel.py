"""The layers of the visual attention network (Guo et al. 2022).

    attention(x) = x + (LKA(gelu(x W1 + b1))) W2 + b2        its input comes out of a BatchNorm already
    mlp(x)       = gelu(DW3x3(x W1 + b1)) W2 + b2
    block(x):      x = x + drop(l1 * attention(BN(x))),   x = x + drop(l2 * mlp(BN(x)))

l1, l2 are numbers per channel that start at 0.01; `drop` is stochastic depth. The shortcut inside the attention is in
the released code; with it a block adds l1 * BN(x) even where the attention is silent.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn import checks
from jattn.nn.batch_norm import BatchNorm
from jattn.nn.conv import convolution, convolution_flops
from jattn.nn.drop_path import drop_path, fold
from jattn.nn.vision_block import scale_layer
from jattn.vision.large_kernel import GATES, Gate, large_kernel_attention, large_kernel_sizes


class LKA(nnx.Module):
    """Large kernel attention with its parameters.

    Args:
      channels: C.
      kernel: K, the side that the two depthwise convolutions stand for.
      dilation: d.
      gate: as in `jattn.large_kernel_attention`.
    """

    def __init__(self, channels: int, *, kernel: int = 21, dilation: int = 3, gate: Gate = "mul", **settings: Any):
        near, far = large_kernel_sizes(kernel, dilation)
        checks.check_choice("gate", gate, GATES)
        self.dilation = dilation
        self.gate = gate
        self.near = convolution(channels, channels, near, groups=channels, **settings)
        self.far = convolution(channels, channels, far, dilation=dilation, groups=channels, **settings)
        self.mix = convolution(channels, channels, 1, **settings)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        layers: Any = (self.near, self.far, self.mix)
        weights = [part[...].astype(x.dtype) for layer in layers for part in (layer.kernel, layer.bias)]
        return large_kernel_attention(x, *weights, dilation=self.dilation, gate=self.gate)

    def flops(self, pixels: int) -> int:
        return sum(convolution_flops(layer, pixels) for layer in (self.near, self.far, self.mix))


class VANAttention(nnx.Module):
    """x + (LKA(gelu(x W1 + b1))) W2 + b2; the arguments are those of `LKA`."""

    def __init__(self, channels: int, *, kernel: int, dilation: int, gate: Gate, **settings: Any):
        self.proj_in = convolution(channels, channels, 1, **settings)
        self.lka = LKA(channels, kernel=kernel, dilation=dilation, gate=gate, **settings)
        self.proj_out = convolution(channels, channels, 1, **settings)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x + self.proj_out(self.lka(jax.nn.gelu(self.proj_in(x), approximate=False)))

    def flops(self, pixels: int) -> int:
        return self.lka.flops(pixels) + sum(convolution_flops(p, pixels) for p in (self.proj_in, self.proj_out))


class VANMLP(nnx.Module):
    """gelu(DW3x3(x W1 + b1)) W2 + b2."""

    def __init__(self, channels: int, hidden: int, **settings: Any):
        self.up = convolution(channels, hidden, 1, **settings)
        self.near = convolution(hidden, hidden, 3, groups=hidden, **settings)
        self.down = convolution(hidden, channels, 1, **settings)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.down(jax.nn.gelu(self.near(self.up(x)), approximate=False))

    def flops(self, pixels: int) -> int:
        return sum(convolution_flops(layer, pixels) for layer in (self.up, self.near, self.down))


class VANBlock(nnx.Module):
    """A block of the network.

    Args:
      channels: C.
      hidden: channels inside the MLP.
      kernel, dilation, gate: of the `LKA`.
      rate: chance that a branch is left out of a row in training.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        kernel: int = 21,
        dilation: int = 3,
        gate: Gate = "mul",
        rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.rate = rate
        self.attention_norm = BatchNorm(channels, **settings)
        self.attention = VANAttention(channels, kernel=kernel, dilation=dilation, gate=gate, rngs=rngs, **settings)
        self.mlp_norm = BatchNorm(channels, **settings)
        self.mlp = VANMLP(channels, hidden, rngs=rngs, **settings)
        self.attention_scale = nnx.Param(jnp.full(channels, 1e-2, param_dtype))
        self.mlp_scale = nnx.Param(jnp.full(channels, 1e-2, param_dtype))

    def __call__(
        self, x: Float[Array, "B H W C"], *, train: bool = False, key: Array | None = None
    ) -> Float[Array, "B H W C"]:
        """The block's output; with a key each branch is left out of a row at `rate`."""
        branch = scale_layer(self.attention(self.attention_norm(x, train=train)), self.attention_scale)
        x = x + drop_path(branch, self.rate, fold(key, 0))
        branch = scale_layer(self.mlp(self.mlp_norm(x, train=train)), self.mlp_scale)
        return x + drop_path(branch, self.rate, fold(key, 1))

    def flops(self, pixels: int) -> int:
        return self.attention.flops(pixels) + self.mlp.flops(pixels)
