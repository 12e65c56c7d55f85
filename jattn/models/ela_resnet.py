"""A ResNet of bottlenecks with efficient local attention inside (He et al. 2016; Xu and Wan 2024).

block(x) = relu(shortcut(x) + BN(conv1x1(a)));   a = ELA(relu(BN(conv3x3(relu(BN(conv1x1(x)))))))

The attention gates the narrow inside of a bottleneck, C channels of 4 C. The stride is that of the 3 x 3 convolution.
logits = mean(x) W_head + b_head. `attention=None` is the plain ResNet, to compare with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn import checks
from jattn.nn.batch_norm import BatchNorm
from jattn.nn.conv import convolution, convolution_flops, strided
from jattn.nn.efficient_local import ELA, Name
from jattn.nn.layout import pin
from jattn.nn.vision_block import check_images, check_stages, classify, dense_init
from jattn.vision.efficient_local import VARIANTS as SETTINGS

EXPANSION = 4
"""Channels of a stage by those inside its bottlenecks."""


@dataclasses.dataclass(frozen=True)
class ELAResNetConfig:
    """Everything that fixes the model's parameters and its function.

    Attributes:
      num_classes, in_channels: of the logits and the images.
      widths, depths: channels inside the bottlenecks, a quarter of those outside, and blocks, of every stage.
      attention: a variant of ELA, "T", "B", "S" or "L", or `None` for none.
      shortcut: whether the gated image is added to the image, a = u + ELA(u). The paper has a = ELA(u), the ResNet in
        the released code of DeepLab adds.
      stem_stride: pixels of the image to a pixel of the first stage, along a side: 4 is a 7 x 7 convolution of stride 2
        and a 3 x 3 maximum of stride 2, 2 is that convolution alone, 1 is a 3 x 3 convolution, for small images.
      stem_width: channels of that convolution.
      dtype, param_dtype: of the computation and of the master weights.
    """

    num_classes: int = 1000
    in_channels: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    attention: Name | None = "S"
    shortcut: bool = False
    stem_stride: Literal[1, 2, 4] = 4
    stem_width: int = 64
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("num_classes", "in_channels", "stem_width"):
            checks.check_count(name, getattr(self, name))
        check_stages(widths=self.widths, depths=self.depths)
        checks.check_choice("attention", self.attention, (*SETTINGS, None))
        checks.check_flags(shortcut=self.shortcut)
        checks.check_choice("stem_stride", self.stem_stride, (1, 2, 4))
        if self.attention is not None:
            groups = SETTINGS[self.attention].num_groups
            if any(width % groups for width in self.widths):
                raise ValueError(
                    f"widths: ELA-{self.attention} normalises {groups} groups of channels and needs multiples of "
                    f"{groups}, got {self.widths}"
                )


class Bottleneck(nnx.Module):
    """1 x 1 to `width` channels, 3 x 3, the attention, 1 x 1 to 4 `width`, around a shortcut."""

    def __init__(self, before: int, width: int, stride: int, config: ELAResNetConfig, **settings: Any):
        plain = {name: value for name, value in settings.items() if name != "rngs"}
        after = EXPANSION * width
        self.stride = stride
        self.gate_shortcut = config.shortcut
        self.narrow = convolution(before, width, 1, use_bias=False, **settings)
        self.narrow_norm = BatchNorm(width, **plain)
        self.middle = convolution(width, width, 3, stride=stride, use_bias=False, **settings)
        self.middle_norm = BatchNorm(width, **plain)
        self.attention = (
            None
            if config.attention is None
            else ELA(width, config.attention, param_dtype=settings["param_dtype"], rngs=settings["rngs"])
        )
        self.widen = convolution(width, after, 1, use_bias=False, **settings)
        self.widen_norm = BatchNorm(after, **plain)
        fits = stride == 1 and before == after
        self.shortcut = None if fits else convolution(before, after, 1, stride=stride, use_bias=False, **settings)
        self.shortcut_norm = None if fits else BatchNorm(after, **plain)

    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B h w D"]:
        inside = jax.nn.relu(self.narrow_norm(self.narrow(x), train=train))
        inside = jax.nn.relu(self.middle_norm(self.middle(inside), train=train))
        if self.attention is not None:
            gated = self.attention(inside)
            inside = inside + gated if self.gate_shortcut else gated
        branch = self.widen_norm(self.widen(inside), train=train)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x), train=train)
        return jax.nn.relu(x + branch)

    def flops(self, height: int, width: int) -> int:
        """Of one image that is `height` x `width` before the block."""
        total = convolution_flops(self.narrow, height * width)
        height, width = (strided(side, self.stride) for side in (height, width))
        layers = [self.middle, self.widen] + ([] if self.shortcut is None else [self.shortcut])
        total += sum(convolution_flops(layer, height * width) for layer in layers)
        return total + (0 if self.attention is None else self.attention.flops(height, width))


class ELAResNet(nnx.Module):
    """The model that `config` describes."""

    def __init__(self, config: ELAResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        settings: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype), "rngs": rngs
        }  # fmt: skip
        kernel, stride = (3, 1) if config.stem_stride == 1 else (7, 2)
        before = config.stem_width
        self.stem = convolution(config.in_channels, before, kernel, stride=stride, use_bias=False, **settings)
        self.stem_norm = BatchNorm(before, dtype=settings["dtype"], param_dtype=settings["param_dtype"])
        stages = []
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            blocks = []
            for index in range(depth):
                step = 2 if stage and not index else 1
                blocks.append(Bottleneck(before, width, step, config, **settings))
                before = EXPANSION * width
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.head = nnx.Linear(before, config.num_classes, kernel_init=dense_init, **settings)

    def __call__(
        self, images: Float[Array, "B H W C"], *, train: bool = False, key: Array | None = None
    ) -> Float[Array, "B classes"]:
        """Logits in float32 or wider.

        Args:
          images: of any size.
          train: normalise by the batch and bring running statistics up to date.
          key: taken as every model here takes one; nothing is random.

        Raises:
          ValueError, TypeError: a wrong shape or dtype.
        """
        return classify(self.head, self.features(images, train=train, key=key)[-1])

    def features(
        self, images: Float[Array, "B H W C"], *, train: bool = False, key: Array | None = None
    ) -> tuple[Float[Array, "B h w D"], ...]:
        """The output of every stage; the head reads the mean of the last. Arguments as of the call."""
        del key
        x = self.stem(check_images(images, self.config))
        x = jax.nn.relu(self.stem_norm(x, train=train))
        if self.config.stem_stride == 4:
            x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        pyramid: list[Array] = []
        for stage in self.stages:
            for block in stage:
                x = block(pin(x), train=train)
            pyramid.append(x)
        return tuple(pyramid)

    def flops(self, batch: int, height: int, width: int) -> int:
        """Multiply-adds times two of a forward call on images of that size; norms, gates and the maximum left out."""
        stride = min(self.config.stem_stride, 2)
        sides = [strided(side, stride) for side in (height, width)]
        total = convolution_flops(self.stem, sides[0] * sides[1])
        if self.config.stem_stride == 4:
            sides = [strided(side, 2) for side in sides]
        for stage in self.stages:
            for block in stage:
                total += block.flops(sides[0], sides[1])
                sides = [strided(side, block.stride) for side in sides]
        return batch * (total + 2 * self.head.in_features * self.head.out_features)


VARIANTS: Mapping[str, ELAResNetConfig] = MappingProxyType(
    {"resnet50": ELAResNetConfig(attention=None)}
    | {f"ela_resnet50_{name.lower()}": ELAResNetConfig(attention=name) for name in ("T", "B", "S", "L")}
)
