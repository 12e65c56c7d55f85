"""Neighborhood attention of a grid of tokens with its projections; see `jattn.neighborhood_attention`.

q, k, v = split(x W + b);   y = NA(q, k, v) W_out + b_out

The columns of W are queries, keys and values, each by head, as in NATTEN. What a token knows of places is a bias for
every offset within the window (NAT, DiNAT), or rotary positions, whose channels are shared out evenly among the axes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jattn import checks
from jattn.neighborhood.neighborhood import neighborhood_attention
from jattn.neighborhood.window import Neighborhood
from jattn.nn.layout import attend
from jattn.nn.vision_block import dense_init
from jattn.positions import apply_rotary_axes

PerAxis = int | tuple[int, ...]


class NeighborhoodAttention(nnx.Module):
    """Every token attends to the window around it.

    Args:
      width: D.
      num_heads: N, a divisor of D.
      kernel_size: tokens of the window along each axis; its length is the rank of the grid.
      stride, dilation, is_causal, scale, clamp_window: as in `jattn.neighborhood_attention`.
      qkv_bias: whether there is a b.
      rel_pos_bias: whether the logits get a bias for every head and offset.
      rope_theta: base of the rotary wavelengths, `None` for no rotary positions.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        kernel_size: tuple[int, ...],
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        is_causal: bool | tuple[bool, ...] = False,
        scale: float | None = None,
        qkv_bias: bool = True,
        rel_pos_bias: bool = False,
        rope_theta: float | None = None,
        clamp_window: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not isinstance(kernel_size, tuple) or not 1 <= len(kernel_size) <= 3:
            raise ValueError(
                f"kernel_size: expected a tuple of one, two or three numbers, one for every axis, got {kernel_size!r}"
            )
        if checks.check_count("width", width) % checks.check_count("num_heads", num_heads):
            raise ValueError(
                f"num_heads: a width of {width} does not divide by {num_heads} heads; choose a divisor of the width"
            )
        self.num_heads = num_heads
        self.rank = len(kernel_size)
        self.rope_theta = rope_theta
        head_dim = width // num_heads
        if rope_theta is not None and head_dim % (2 * self.rank):
            raise ValueError(
                f"rope_theta: each of {self.rank} axes turns pairs of channels, so a head dim that is a multiple of "
                f"{2 * self.rank} is needed, got {head_dim}"
            )
        self.neighborhood = Neighborhood(kernel_size, stride, dilation, is_causal)
        self.scale = scale
        self.clamp_window = clamp_window
        settings: dict[str, Any] = {
            "dtype": dtype, "param_dtype": param_dtype, "kernel_init": dense_init, "rngs": rngs
        }  # fmt: skip
        self.qkv = nnx.Linear(width, 3 * width, use_bias=qkv_bias, **settings)
        self.out = nnx.Linear(width, width, **settings)
        offsets = (num_heads, *(2 * window - 1 for window in kernel_size))
        self.rel_pos_bias = nnx.Param(dense_init(rngs.params(), offsets, param_dtype)) if rel_pos_bias else None

    def __call__(
        self, x: Float[Array, "B *grid D"], *, key_mask: Bool[Array, "B ..."] | None = None
    ) -> Float[Array, "B *grid D"]:
        """Mix the tokens of a grid.

        Args:
          x: tokens.
          key_mask: which of them may be attended; `None` is all.

        Raises:
          ValueError, TypeError: another rank than that of the window, or what the op raises.
        """
        kernel_size = self.neighborhood.kernel_size
        if x.ndim != self.rank + 2:
            raise ValueError(
                f"x: expected [B, *grid, D] with {self.rank} axes of a grid, as the window {kernel_size} has, got "
                f"{x.shape}"
            )
        heads = self.qkv(x).reshape(*x.shape[:-1], 3, self.num_heads, -1)
        query, key, value = (heads[..., i, :, :] for i in range(3))
        if self.rope_theta is not None:
            query, key = self._rotate(query), self._rotate(key)
        out = attend(
            neighborhood_attention,
            query,
            key,
            value,
            kernel_size=kernel_size,
            stride=self.neighborhood.stride,
            dilation=self.neighborhood.dilation,
            is_causal=self.neighborhood.is_causal,
            scale=self.scale,
            clamp_window=self.clamp_window,
            arrays={"rel_pos_bias": self._bias(x.shape[1:-1], query.dtype), "key_mask": key_mask},
        )
        return self.out(out.reshape(*x.shape[:-1], -1))

    def flops(self, batch: int, grid: tuple[int, ...]) -> int:
        """Multiply-adds times two of one call."""
        tokens, width = batch * math.prod(grid), self.out.in_features
        return 8 * tokens * width**2 + 4 * tokens * math.prod(self._windows(grid)) * width

    def _windows(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of a window along each axis of a grid."""
        windows: Any = self.neighborhood.on(grid, self.clamp_window).kernel_size
        return windows

    def _bias(self, grid: tuple[int, ...], dtype: Any) -> Float[Array, "N ..."] | None:
        """The offsets that windows on this grid have: a window that was clamped has those in the middle."""
        if self.rel_pos_bias is None:
            return None
        bias = self.rel_pos_bias[...].astype(dtype)
        for axis, window in enumerate(self._windows(grid), start=1):
            cut = (bias.shape[axis] + 1) // 2 - window
            bias = jax.lax.slice_in_dim(bias, cut, bias.shape[axis] - cut, axis=axis)
        return bias

    def _rotate(self, x: Float[Array, "B *grid N H"]) -> Float[Array, "B *grid N H"]:
        batch, *grid, heads, _ = x.shape
        places = jnp.stack(jnp.meshgrid(*map(jnp.arange, grid), indexing="ij"), axis=-1).reshape(1, -1, self.rank)
        tokens = x.reshape(batch, -1, heads, x.shape[-1])
        return apply_rotary_axes(tokens, places, theta=self.rope_theta or 1.0).reshape(x.shape)
