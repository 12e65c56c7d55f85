"""The plain vision transformer for images of any size (Dosovitskiy et al. 2021; Beyer et al. 2022).

x = patches(image) W + b + p;   x = block(x) for every layer;   logits = mean(norm(x)) W_head + b_head

p are sines and cosines of a patch's row and column, so no parameter depends on the image's size. There is no class
token: the head reads the mean over all patches, as in the plainer variant of Beyer et al.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn import checks
from jattn.dot_product import dot_product_attention
from jattn.nn.drop_path import check_drop_path, drop_path_rates, fold, training_key
from jattn.nn.layout import attend, pin
from jattn.nn.mixer import Projections
from jattn.nn.vision_block import VisionBlock, check_images, classify, dense_init


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that fixes the model's parameters and its function.

    Attributes:
      num_classes, in_channels: of the logits and the images.
      patch: side of a patch in pixels.
      width, num_layers, num_heads, mlp_width: D, a multiple of 4 and of the heads; depth; N; channels inside the MLP.
      layer_scale: what the branches' scales start at; `None` leaves them out.
      drop_path: chance that the last block's branches are left out of a row in training; 0 at the first, even between.
      dtype, param_dtype: of the computation and of the master weights.
    """

    num_classes: int = 1000
    in_channels: int = 3
    patch: int = 16
    width: int = 384
    num_layers: int = 12
    num_heads: int = 6
    mlp_width: int = 1536
    layer_scale: float | None = None
    drop_path: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("num_classes", "in_channels", "patch", "num_layers", "num_heads", "mlp_width"):
            checks.check_count(name, getattr(self, name))
        checks.check_count("width", self.width, minimum=8)
        check_drop_path(self.drop_path)
        if self.width % 4:
            raise ValueError(
                f"width: rows and columns have sines and cosines each, so a multiple of 4 is needed, got {self.width}"
            )


class ViTAttention(nnx.Module):
    """Softmax attention of every token over all."""

    def __init__(self, width: int, num_heads: int, **settings: Any):
        self.projections = Projections(
            width, num_heads=num_heads, num_kv_heads=None, head_dim=None, use_bias=True, **settings
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.projections.merge(attend(dot_product_attention, *self.projections.split(x), arrays={}))

    def flops(self, batch: int, tokens: int) -> int:
        p = self.projections
        return int(p.flops(batch * tokens)) + 2 * batch * tokens**2 * p.num_heads * (p.head_dim + p.value_dim)


class ViT(nnx.Module):
    """The model that `config` describes. Output projections of the attention start at zero."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        settings: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}
        side, width = config.patch, config.width
        self.embed = nnx.Linear(side**2 * config.in_channels, width, rngs=rngs, **settings)

        def layer(key: Array) -> VisionBlock:
            own = nnx.Rngs(params=key)
            attention = ViTAttention(width, config.num_heads, rngs=own, **settings)
            return VisionBlock(
                attention, width, config.mlp_width, layer_scale=config.layer_scale, eps=1e-6, rngs=own, **settings
            )

        self.blocks = nnx.vmap(layer)(jax.random.split(rngs.params(), config.num_layers))
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs, **settings)
        self.head = nnx.Linear(width, config.num_classes, kernel_init=dense_init, rngs=rngs, **settings)

    def __call__(
        self, images: Float[Array, "B H W C"], *, train: bool = False, key: Array | None = None
    ) -> Float[Array, "B classes"]:
        """Logits in float32 or wider.

        Args:
          images: sides are multiples of `patch`.
          train: leave out branches at random.
          key: where all randomness comes from; read only when training with `drop_path` > 0, and needed then.

        Raises:
          ValueError, TypeError: a wrong shape or dtype, or no key where one is needed.
        """
        return classify(self.head, self.features(images, train=train, key=key)[-1])

    def features(
        self, images: Float[Array, "B H W C"], *, train: bool = False, key: Array | None = None
    ) -> tuple[Float[Array, "B h w D"]]:
        """What the head reads the mean of: one map, for all layers have the same size. Arguments as of the call."""
        config = self.config
        x, (rows, columns) = self._patches(check_images(images, config))
        key = training_key(key, config.drop_path, train=train)
        x = self.embed(x) + sincos_positions(rows, columns, config.width).astype(x.dtype)
        graph, parameters = nnx.split(self.blocks)
        (rates,) = drop_path_rates(config.drop_path, (config.num_layers,))

        def layer(x: Array, slice_: Any) -> tuple[Array, None]:
            weights, rate, index = slice_
            return pin(nnx.merge(graph, weights)(x, rate=rate, key=fold(key, index))), None

        slices = parameters, jnp.asarray(rates, jnp.float32), jnp.arange(config.num_layers)
        x, _ = jax.lax.scan(layer, pin(x), slices)
        return (self.norm(x).reshape(x.shape[0], rows, columns, -1),)

    def flops(self, batch: int, height: int, width: int) -> int:
        """Multiply-adds times two of a forward call on images of that size."""
        config = self.config
        tokens = (height // config.patch) * (width // config.patch)
        layer = self.blocks.attention.flops(batch, tokens) + self.blocks.mlp.flops(batch * tokens)
        ends = self.embed.in_features * tokens + config.num_classes
        return config.num_layers * layer + 2 * batch * config.width * ends

    def _patches(self, images: Float[Array, "B H W C"]) -> tuple[Float[Array, "B T pixels"], tuple[int, int]]:
        side = self.config.patch
        batch, height, width, channels = images.shape
        if height % side or width % side:
            raise ValueError(
                f"images: height and width must be multiples of the patch {side}, got {height} x {width}; resize or "
                "pad them, or choose another patch"
            )
        rows, columns = height // side, width // side
        x = images.reshape(batch, rows, side, columns, side, channels)
        return jnp.swapaxes(x, 2, 3).reshape(batch, rows * columns, -1), (rows, columns)


def sincos_positions(rows: int, columns: int, width: int) -> Float[Array, "T D"]:
    """Sines and cosines of the column, then of the row, at `width / 4` rates from 1 to 10^-4, row by row."""
    rates = 10_000.0 ** -jnp.linspace(0, 1, width // 4)
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (column, row)]
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=-1)


VARIANTS: Mapping[str, ViTConfig] = MappingProxyType(
    {
        f"vit_{name}": ViTConfig(width=width, num_heads=heads, mlp_width=4 * width)
        for name, width, heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12))
    }
)
