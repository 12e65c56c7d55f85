"""The protocol of a token mixer, and the projections that most mixers share.

A mixer maps `[B, T, D]` to `[B, T, D]`. Given a state it goes on from there, so prefill followed by decoding one token
at a time gives what one parallel call over the whole gives.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks

State = Any


class Mixer(Protocol):
    """What a layer must offer to stand in a language model's `pattern`.

    Its constructor takes `(width, *, num_heads, num_kv_heads, head_dim, layer_index, num_layers, dtype, param_dtype,
    rngs)` and options of its own. `layer_index` may be traced: a scanned model builds all its layers at once.
    """

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mix tokens. The state that comes back is `None` when none was given.

        A given state belongs to the segment of the first token; the state returned is that of the last segment.
        """
        ...

    def init_state(self, batch: int, capacity: int, dtype: Any) -> State:
        """An empty state for `batch` rows that will see at most `capacity` tokens."""
        ...

    def flops(self, batch: int, length: int) -> float:
        """Multiply-adds times two of one forward call, projections included."""
        ...


class Projections(nnx.Module):
    """Query, key, value and output projections, without bias unless told, heads split and merged.

    The output projection starts at zero, so that a new layer passes its input through unchanged. Value heads are as
    many and as wide as the keys' unless told; the output then has as many heads as there are queries or values.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        num_value_heads: int | None = None,
        value_dim: int | None = None,
        use_bias: bool = False,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        checks.check_count("width", width)
        checks.check_count("num_heads", num_heads)
        if head_dim is None and width % num_heads:
            raise ValueError(
                f"num_heads: a width of {width} does not divide by {num_heads} heads; "
                "choose a divisor of the width, or give head_dim"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = width // num_heads if head_dim is None else head_dim
        checks.check_grouped_heads(self.num_heads, self.num_kv_heads)
        self.num_value_heads = self.num_kv_heads if num_value_heads is None else num_value_heads
        self.value_dim = self.head_dim if value_dim is None else checks.check_count("value_dim", value_dim)
        self.features = max(self.num_heads, self.num_value_heads) * self.value_dim

        def linear(features_in: int, features_out: int, init: Any) -> nnx.Linear:
            return nnx.Linear(
                features_in,
                features_out,
                use_bias=use_bias,
                kernel_init=init,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        fan_in = nnx.initializers.lecun_normal()
        self.query = linear(width, self.num_heads * self.head_dim, fan_in)
        self.key = linear(width, self.num_kv_heads * self.head_dim, fan_in)
        self.value = linear(width, self.num_value_heads * self.value_dim, fan_in)
        self.out = linear(self.features, width, nnx.initializers.zeros)

    def split(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T Kv V"]]:
        """Queries, keys and values by head."""
        lead = x.shape[:-1]
        return (
            self.query(x).reshape(*lead, self.num_heads, self.head_dim),
            self.key(x).reshape(*lead, self.num_kv_heads, self.head_dim),
            self.value(x).reshape(*lead, self.num_value_heads, self.value_dim),
        )

    def merge(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The output projection of the heads side by side."""
        return self.out(x.reshape(*x.shape[:-2], -1))

    def flops(self, tokens: int) -> float:
        layers = (self.query, self.key, self.value, self.out)
        return 2.0 * tokens * sum(layer.in_features * layer.out_features for layer in layers)


def last_segment(segment_ids: Int[Array, "B T"] | None, like: Int[Array, "B T"]) -> Array:
    """`[B, T]` booleans: True where a token belongs to the segment of its row's last token."""
    if segment_ids is None:
        return jnp.ones(like.shape, bool)
    return segment_ids == segment_ids[:, -1:]


def rms_normalise(x: Array, eps: float = 1e-6) -> Array:
    """x / sqrt(mean(x ** 2) + eps) over the last axis, without parameters; statistics in float32."""
    wide = x.astype(checks.accumulator_dtype(x.dtype))
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def l2_normalise(x: Array, eps: float = 1e-6) -> Array:
    """x / sqrt(sum(x ** 2) + eps) over the last axis; statistics in float32."""
    wide = x.astype(checks.accumulator_dtype(x.dtype))
    return (wide * jax.lax.rsqrt(jnp.sum(wide**2, axis=-1, keepdims=True) + eps)).astype(x.dtype)
