"""Neighborhood attention transformers: NAT, DiNAT, DiNAT_s, isotropic (Hassani et al. 2023; Hassani and Shi 2022).

x = tokens(image);   x = block(x) for a stage's blocks, x = down(x), for every stage;   logits = mean(norm(x)) W + b

Blocks are pre-norm transformer blocks whose attention sees a window around every token. In DiNAT the keys of every
second block are some tokens apart. Two layouts exist:

    "conv"  tokens are two 3 x 3 convolutions and a norm, down is a 3 x 3 convolution of stride 2 and a norm
    "swin"  tokens are patches and a norm, down is a norm of 2 x 2 tokens side by side and a dense layer (DiNAT_s)

An isotropic model is one stage of the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn import checks
from jattn.nn.conv import convolution, convolution_flops, strided
from jattn.nn.drop_path import check_drop_path, drop_path_rates, training_key
from jattn.nn.neighborhood import NeighborhoodAttention
from jattn.nn.stack import run_blocks
from jattn.nn.vision_block import VisionBlock, check_images, check_stages, classify, dense_init


@dataclasses.dataclass(frozen=True)
class NATConfig:
    """Everything that fixes the model's parameters and its function.

    Attributes:
      num_classes, in_channels: of the logits and the images.
      width: channels of the first stage; each later one has twice those before.
      depths, num_heads: blocks, and heads of each, of every stage.
      dilations: how far apart the keys of a stage's second, fourth, ... block are; 1 at the others. `None` is 1
        throughout.
      kernel_size: tokens of the window along a side.
      mlp_ratio: channels inside the MLP by those outside.
      layout: "conv" or "swin".
      stem_stride: pixels of the image to a token of the first stage, along a side; 1, 2 or 4 in layout "conv".
      qkv_bias, rel_pos_bias: whether projections to queries, keys and values have a bias, and logits one by offset.
      layer_scale: what the branches' scales start at; `None` leaves them out.
      drop_path: chance that the last block's branches are left out of a row in training; 0 at the first, even between.
      clamp_window: let windows shrink to what a small image has. Otherwise it is refused.
      dtype, param_dtype: of the computation and of the master weights.
    """

    num_classes: int = 1000
    in_channels: int = 3
    width: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    dilations: tuple[int, ...] | None = None
    kernel_size: int = 7
    mlp_ratio: float = 3.0
    layout: Literal["conv", "swin"] = "conv"
    stem_stride: int = 4
    qkv_bias: bool = True
    rel_pos_bias: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.2
    clamp_window: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("num_classes", "in_channels", "width", "kernel_size", "stem_stride"):
            checks.check_count(name, getattr(self, name))
        given = {} if self.dilations is None else {"dilations": self.dilations}
        check_stages(depths=self.depths, num_heads=self.num_heads, **given)
        checks.check_choice("layout", self.layout, ("conv", "swin"))
        if self.layout == "conv":
            checks.check_choice("stem_stride", self.stem_stride, (1, 2, 4))
            if self.width % 2:
                raise ValueError(f"width: the first convolution has half of it, so it is even, got {self.width}")
        flags = ("qkv_bias", "rel_pos_bias", "clamp_window")
        checks.check_flags(**{name: getattr(self, name) for name in flags})
        check_drop_path(self.drop_path)

    def block_dilations(self, stage: int) -> tuple[int, ...]:
        """Of every block of a stage."""
        apart = 1 if self.dilations is None else self.dilations[stage]
        return tuple(apart if index % 2 else 1 for index in range(self.depths[stage]))

    def least_side(self) -> int:
        """Pixels that an image's height and width must have for every window to fit."""
        window = 1 if self.clamp_window else self.kernel_size
        spans = [window * max(self.block_dilations(stage)) for stage in range(len(self.depths))]
        return max((span - 1) * self.stem_stride * 2**stage + 1 for stage, span in enumerate(spans))


class Tokenizer(nnx.Module):
    """Tokens of the first stage."""

    def __init__(self, config: NATConfig, **settings: Any):
        width, stride = config.width, config.stem_stride
        self.patch = stride if config.layout == "swin" else None
        if config.layout == "swin":
            init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            self.strides: tuple[int, ...] = (stride,)
            side = (stride, stride)
            patches = nnx.Conv(
                config.in_channels, width, side, strides=side, padding="VALID", kernel_init=init, **settings
            )
            self.convolutions = nnx.List([patches])
        else:
            self.strides = (min(stride, 2), max(1, stride // 2))
            sizes = (config.in_channels, width // 2, width)
            self.convolutions = nnx.List(
                [
                    convolution(before, after, 3, stride=step, init="torch", **settings)
                    for before, after, step in zip(sizes, sizes[1:], self.strides, strict=False)
                ]
            )
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, **settings)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        if self.patch is not None:
            x = _pad_to(x, self.patch)
        for layer in self.convolutions:
            x = layer(x)
        return self.norm(x)

    def flops(self, height: int, width: int) -> int:
        total = 0
        for layer, stride in zip(self.convolutions, self.strides, strict=True):
            height, width = (strided(side, stride) for side in (height, width))
            total += convolution_flops(layer, height * width)
        return total


class Downsampler(nnx.Module):
    """Half the side and twice the channels."""

    def __init__(self, width: int, layout: str, **settings: Any):
        if layout == "conv":
            self.reduction: Any = convolution(width, 2 * width, 3, stride=2, use_bias=False, init="torch", **settings)
            self.norm = nnx.LayerNorm(2 * width, epsilon=1e-5, **settings)
        else:
            self.reduction = nnx.Linear(4 * width, 2 * width, use_bias=False, kernel_init=dense_init, **settings)
            self.norm = nnx.LayerNorm(4 * width, epsilon=1e-5, **settings)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        if isinstance(self.reduction, nnx.Conv):
            return self.norm(self.reduction(x))
        x = _pad_to(x, 2)
        # The order of the four is Swin's: down a column first.
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(jnp.concatenate(corners, axis=-1)))

    def flops(self, pixels: int) -> int:
        """For `pixels` tokens after it."""
        if isinstance(self.reduction, nnx.Conv):
            return convolution_flops(self.reduction, pixels)
        return 2 * pixels * self.reduction.in_features * self.reduction.out_features


class NATStage(nnx.Module):
    """Blocks of one size, and the way down to the next."""

    def __init__(self, config: NATConfig, index: int, rates: tuple[float, ...], **settings: Any):
        width = config.width * 2**index
        self.rates = rates
        blocks = []
        for dilation in config.block_dilations(index):
            attention = NeighborhoodAttention(
                width,
                num_heads=config.num_heads[index],
                kernel_size=(config.kernel_size,) * 2,
                dilation=dilation,
                qkv_bias=config.qkv_bias,
                rel_pos_bias=config.rel_pos_bias,
                clamp_window=config.clamp_window,
                **settings,
            )
            hidden = int(config.mlp_ratio * width)
            blocks.append(VisionBlock(attention, width, hidden, layer_scale=config.layer_scale, **settings))
        self.blocks = nnx.List(blocks)
        last = index == len(config.depths) - 1
        self.downsample = None if last else Downsampler(width, config.layout, **settings)

    def __call__(self, x: Float[Array, "B H W C"], *, key: Array | None, first: int) -> Float[Array, "B H W C"]:
        return run_blocks(self.blocks, x, rates=self.rates, key=key, first=first)

    def flops(self, height: int, width: int) -> int:
        pixels = height * width
        return sum(block.attention.flops(1, (height, width)) + block.mlp.flops(pixels) for block in self.blocks)


class NAT(nnx.Module):
    """The model that `config` describes."""

    def __init__(self, config: NATConfig, *, rngs: nnx.Rngs):
        self.config = config
        settings: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype), "rngs": rngs
        }  # fmt: skip
        self.embed = Tokenizer(config, **settings)
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nnx.List([NATStage(config, index, own, **settings) for index, own in enumerate(rates)])
        features = config.width * 2 ** (len(rates) - 1)
        self.norm = nnx.LayerNorm(features, epsilon=1e-5, **settings)
        self.head = nnx.Linear(features, config.num_classes, kernel_init=dense_init, **settings)

    def __call__(
        self, images: Float[Array, "B H W C"], *, train: bool = False, key: Array | None = None
    ) -> Float[Array, "B classes"]:
        """Logits in float32 or wider.

        Args:
          images: of `config.least_side()` pixels along each side or more.
          train: leave out branches at random.
          key: where all randomness comes from; read only when training with `drop_path` > 0, and needed then.

        Raises:
          ValueError, TypeError: a wrong shape or dtype, an image too small for a window, or no key where one is needed.
        """
        return classify(self.head, self.norm(self.features(images, train=train, key=key)[-1]))

    def features(
        self, images: Float[Array, "B H W C"], *, train: bool = False, key: Array | None = None
    ) -> tuple[Float[Array, "B h w D"], ...]:
        """What the last block of every stage gives; the head normalises that of the last. Arguments as of the call."""
        config = self.config
        x = check_images(images, config)
        least = config.least_side()
        if min(x.shape[1:3]) < least:
            shrink = "" if config.clamp_window else ", or make the model with clamp_window=True, which shrinks windows"
            raise ValueError(
                f"images: the windows of {config.kernel_size} tokens need {least} pixels along each side or more, got "
                f"{x.shape[1]} x {x.shape[2]}; resize them, take a smaller stem_stride, window or dilation{shrink}"
            )
        key = training_key(key, config.drop_path, train=train)
        x = self.embed(x)
        pyramid: list[Array] = []
        for index, stage in enumerate(self.stages):
            x = stage(x, key=key, first=sum(config.depths[:index]))
            pyramid.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(pyramid)

    def flops(self, batch: int, height: int, width: int) -> int:
        """Multiply-adds times two of a forward call on images of that size; norms left out."""
        total = self.embed.flops(height, width) + 2 * self.head.in_features * self.head.out_features
        height, width = (strided(side, self.config.stem_stride) for side in (height, width))
        for stage in self.stages:
            total += stage.flops(height, width)
            if stage.downsample is not None:
                height, width = (strided(side, 2) for side in (height, width))
                total += stage.downsample.flops(height * width)
        return batch * total


def _pad_to(x: Float[Array, "B H W C"], multiple: int) -> Float[Array, "B h w C"]:
    """Zeros below and to the right until both sides are multiples."""
    below, right = (-side % multiple for side in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else x


def _variant(width: int, depths: tuple[int, ...], mlp_ratio: float, drop_path: float, **options: Any) -> NATConfig:
    """One of the authors' models, all of which have heads of 32 channels."""
    heads = tuple(width * 2**stage // 32 for stage in range(len(depths)))
    return NATConfig(width=width, depths=depths, num_heads=heads, mlp_ratio=mlp_ratio, drop_path=drop_path, **options)


def _variants() -> dict[str, NATConfig]:
    deep, deep_swin, apart = (3, 4, 18, 5), (2, 2, 18, 2), (8, 4, 2, 1)
    sizes: dict[str, tuple[int, tuple[int, ...], float, float]] = {
        "mini": (64, (3, 4, 6, 5), 3.0, 0.2),
        "tiny": (64, deep, 3.0, 0.2),
        "small": (96, deep, 2.0, 0.3),
        "base": (128, deep, 2.0, 0.5),
        "large": (192, deep, 2.0, 0.35),
    }
    swin_sizes: dict[str, tuple[int, tuple[int, ...], float, float]] = {
        "tiny": (96, (2, 2, 6, 2), 4.0, 0.2),
        "small": (96, deep_swin, 4.0, 0.3),
        "base": (128, deep_swin, 4.0, 0.5),
        "large": (192, deep_swin, 4.0, 0.35),
    }
    table: dict[str, NATConfig] = {}
    for name, size in sizes.items():
        if name != "large":
            table[f"nat_{name}"] = _variant(*size, layer_scale=1e-5 if name in ("small", "base") else None)
        table[f"dinat_{name}"] = _variant(*size, layer_scale=1e-5 if name == "base" else None, dilations=apart)
    for name, size in swin_sizes.items():
        table[f"dinat_s_{name}"] = _variant(*size, layout="swin", dilations=apart)
    for name, width, drop_path in (("small", 384, 0.1), ("base", 768, 0.4)):
        for prefix, dilations in (("nat", None), ("dinat", (2,))):
            table[f"{prefix}_isotropic_{name}"] = _variant(
                width, (12,), 4.0, drop_path, layout="swin", stem_stride=16, dilations=dilations
            )
    return table


VARIANTS: Mapping[str, NATConfig] = MappingProxyType(_variants())
