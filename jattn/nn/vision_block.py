"""The pre-norm block of vision transformers, and what stands at both ends of an image classifier.

x = x + drop(g1 * attention(norm(x))),   x = x + drop(g2 * mlp(norm(x))),   mlp(x) = gelu(x W1 + b1) W2 + b2

g1 and g2 are layer scales (Touvron et al. 2021), one number per channel; `drop` is stochastic depth. GELU is the exact
one. The classifier is a linear map of the mean over all places.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn import checks
from jattn.nn.drop_path import drop_path, fold

dense_init = nnx.initializers.normal(0.02)
"""How vision models start a dense layer. Their authors cut the normal at 2, which is a hundred deviations."""


class VisionMLP(nnx.Module):
    """y = gelu(x W1 + b1) W2 + b2."""

    def __init__(self, width: int, hidden: int, **settings: Any):
        checks.check_count("hidden", hidden)
        self.up = nnx.Linear(width, hidden, kernel_init=dense_init, **settings)
        self.down = nnx.Linear(hidden, width, kernel_init=dense_init, **settings)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))

    def flops(self, tokens: int) -> int:
        return 4 * tokens * self.up.in_features * self.up.out_features


class VisionBlock(nnx.Module):
    """A pre-norm block around any attention of images.

    Args:
      attention: maps `[B, *grid, D]` to the same.
      width: D.
      hidden: channels inside the MLP.
      layer_scale: what g1 and g2 start at; `None` leaves them out.
      eps: of the norms.
    """

    def __init__(
        self,
        attention: Any,
        width: int,
        hidden: int,
        *,
        layer_scale: float | None = None,
        eps: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = nnx.LayerNorm(width, epsilon=eps, **settings)
        self.attention = attention
        self.mlp_norm = nnx.LayerNorm(width, epsilon=eps, **settings)
        self.mlp = VisionMLP(width, hidden, **settings)
        scales = [None if layer_scale is None else nnx.Param(jnp.full(width, layer_scale, param_dtype)) for _ in "12"]
        self.attention_scale, self.mlp_scale = scales

    def __call__(
        self, x: Float[Array, "B *grid D"], *, rate: float | Array = 0.0, key: Array | None = None
    ) -> Float[Array, "B *grid D"]:
        """The block's output; with a key each branch is left out of a row at `rate`."""
        branch = scale_layer(self.attention(self.attention_norm(x)), self.attention_scale)
        x = x + drop_path(branch, rate, fold(key, 0))
        branch = scale_layer(self.mlp(self.mlp_norm(x)), self.mlp_scale)
        return x + drop_path(branch, rate, fold(key, 1))


def scale_layer(x: Float[Array, "*B D"], scale: nnx.Param | None) -> Float[Array, "*B D"]:
    return x if scale is None else x * scale[...].astype(x.dtype)


def check_images(images: Array, config: Any) -> Float[Array, "B H W C"]:
    """`images` in the dtype of the computation.

    Raises:
      ValueError, TypeError: not `[B, H, W, C]` with the model's channels, an empty dimension, or no floating dtype.
    """
    sizes = checks.bind_shapes(("images", images, "B H W C"), C=config.in_channels)
    checks.check_floating(images=images)
    checks.check_no_empty(sizes, "BHW")
    return images.astype(jnp.dtype(config.dtype))


def classify(head: nnx.Linear, x: Float[Array, "B h w D"]) -> Float[Array, "B classes"]:
    """Logits of the mean over all places; the mean and the logits are float32 or wider."""
    accumulator = checks.accumulator_dtype(x.dtype)
    pooled = jnp.mean(x, axis=(1, 2), dtype=accumulator).astype(x.dtype)
    return head(pooled).astype(accumulator)


def check_stages(**counts: tuple[int, ...]) -> None:
    """Every argument has one positive number for every stage."""
    (first, stages), *_ = counts.items()
    for name, values in counts.items():
        if not isinstance(values, tuple) or not values:
            raise ValueError(f"{name}: expected a tuple of one number or more, one for every stage, got {values!r}")
        if len(values) != len(stages):
            raise ValueError(
                f"{name}: expected one number for every stage, {len(stages)} as in {first}, got {len(values)}"
            )
        for index, value in enumerate(values):
            checks.check_count(f"{name}[{index}]", value)
