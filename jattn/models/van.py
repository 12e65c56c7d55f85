"""The visual attention network: a pyramid of stages whose tokens are mixed by large kernel attention (Guo et al. 2022).

x = BN(conv(x)), a quarter of the image's side at first and half of it at each later stage;   x = block(x) for the
stage's blocks;   x = LayerNorm(x).   logits = mean(x) W_head + b_head

The first convolution is 7 x 7, the others 3 x 3; both look past the patch that they make a token of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn import checks
from jattn.nn.batch_norm import BatchNorm
from jattn.nn.conv import convolution, convolution_flops, strided
from jattn.nn.drop_path import check_drop_path, drop_path_rates, fold, training_key
from jattn.nn.large_kernel import VANBlock
from jattn.nn.layout import pin
from jattn.nn.vision_block import check_images, check_stages, classify, dense_init
from jattn.vision.large_kernel import GATES, Gate, large_kernel_sizes


@dataclasses.dataclass(frozen=True)
class VANConfig:
    """Everything that fixes the model's parameters and its function.

    Attributes:
      num_classes, in_channels: of the logits and the images.
      widths, depths, mlp_ratios: channels, blocks, and channels inside the MLP by those outside, of every stage.
      stem_stride: pixels of the image to a pixel of the first stage, along a side.
      kernel, dilation, gate: of the attention, as in `jattn.nn.LKA`.
      drop_path: chance that the last block's branches are left out of a row in training; 0 at the first, even between.
      dtype, param_dtype: of the computation and of the master weights.
    """

    num_classes: int = 1000
    in_channels: int = 3
    widths: tuple[int, ...] = (32, 64, 160, 256)
    depths: tuple[int, ...] = (3, 3, 5, 2)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    stem_stride: int = 4
    kernel: int = 21
    dilation: int = 3
    gate: Gate = "mul"
    drop_path: float = 0.1
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("num_classes", "in_channels", "stem_stride"):
            checks.check_count(name, getattr(self, name))
        check_stages(widths=self.widths, depths=self.depths, mlp_ratios=self.mlp_ratios)
        large_kernel_sizes(self.kernel, self.dilation)
        checks.check_choice("gate", self.gate, GATES)
        check_drop_path(self.drop_path)


class VANStage(nnx.Module):
    """Half the side, or a quarter at the first stage, then blocks at that size."""

    def __init__(self, config: VANConfig, index: int, rates: tuple[float, ...], **settings: Any):
        rngs = settings["rngs"]
        plain = {name: value for name, value in settings.items() if name != "rngs"}
        width = config.widths[index]
        before = config.widths[index - 1] if index else config.in_channels
        kernel, self.stride = (3, 2) if index else (7, config.stem_stride)
        self.embed = convolution(before, width, kernel, stride=self.stride, **settings)
        self.embed_norm = BatchNorm(width, **plain)
        attention: dict[str, Any] = {name: getattr(config, name) for name in ("kernel", "dilation", "gate")}
        hidden = config.mlp_ratios[index] * width
        self.blocks = nnx.List([VANBlock(width, hidden, rate=rate, **attention, **settings) for rate in rates])
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs, **plain)

    def __call__(
        self, x: Float[Array, "B H W C"], *, train: bool, key: Array | None, first: int
    ) -> Float[Array, "B h w D"]:
        x = self.embed_norm(self.embed(x), train=train)
        for index, block in enumerate(self.blocks):
            x = block(pin(x), train=train, key=fold(key, first + index))
        return self.norm(x)


class VAN(nnx.Module):
    """The model that `config` describes."""

    def __init__(self, config: VANConfig, *, rngs: nnx.Rngs):
        self.config = config
        settings: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype), "rngs": rngs
        }  # fmt: skip
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nnx.List([VANStage(config, index, own, **settings) for index, own in enumerate(rates)])
        self.head = nnx.Linear(config.widths[-1], config.num_classes, kernel_init=dense_init, **settings)

    def __call__(
        self, images: Float[Array, "B H W C"], *, train: bool = False, key: Array | None = None
    ) -> Float[Array, "B classes"]:
        """Logits in float32 or wider.

        Args:
          images: of any size.
          train: normalise by the batch, bring running statistics up to date, leave out branches at random.
          key: where all randomness comes from; read only when training with `drop_path` > 0, and needed then.

        Raises:
          ValueError, TypeError: a wrong shape or dtype, or no key where one is needed.
        """
        return classify(self.head, self.features(images, train=train, key=key)[-1])

    def features(
        self, images: Float[Array, "B H W C"], *, train: bool = False, key: Array | None = None
    ) -> tuple[Float[Array, "B h w D"], ...]:
        """The normalised output of every stage; the head reads the mean of the last. Arguments as of the call."""
        x = check_images(images, self.config)
        key = training_key(key, self.config.drop_path, train=train)
        pyramid: list[Array] = []
        for index, stage in enumerate(self.stages):
            x = stage(x, train=train, key=key, first=sum(self.config.depths[:index]))
            pyramid.append(x)
        return tuple(pyramid)

    def flops(self, batch: int, height: int, width: int) -> int:
        """Multiply-adds times two of a forward call on images of that size; norms and gates left out."""
        total = 2 * self.head.in_features * self.head.out_features
        for stage in self.stages:
            height, width = (strided(side, stage.stride) for side in (height, width))
            pixels = height * width
            total += convolution_flops(stage.embed, pixels) + sum(block.flops(pixels) for block in stage.blocks)
        return batch * total


def _variants() -> dict[str, VANConfig]:
    middle, large = (64, 128, 320, 512), (96, 192, 480, 768)
    # The released code has drop_path for B0 to B3 only; the larger ones take that of B3.
    table = {
        "van_b0": ((32, 64, 160, 256), (3, 3, 5, 2), 0.1),
        "van_b1": (middle, (2, 2, 4, 2), 0.1),
        "van_b2": (middle, (3, 3, 12, 3), 0.1),
        "van_b3": (middle, (3, 5, 27, 3), 0.2),
        "van_b4": (middle, (3, 6, 40, 3), 0.2),
        "van_b5": (large, (3, 3, 24, 3), 0.2),
        "van_b6": ((96, 192, 384, 768), (6, 6, 90, 6), 0.2),
    }
    return {name: VANConfig(widths=w, depths=d, drop_path=rate) for name, (w, d, rate) in table.items()}


VARIANTS: Mapping[str, VANConfig] = MappingProxyType(_variants())
