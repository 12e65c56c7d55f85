"""A short causal convolution of every channel with itself alone, as linear mixers have before their op.

y_t = f(sum_{d < W} w_d * x_{t-d} + b),      w [W, C], d = 0 the token itself; tokens of other segments count as 0
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.nn.mixer import Projections


class ShortConvolution(nnx.Module):
    """Depthwise causal convolution.

    Args:
      features: C.
      taps: W, tokens that one output sees.
      activation: f, "silu" or `None` for none.
      use_bias: whether there is a b, which starts at zero.

    State: the last W - 1 inputs of the last segment, `[B, W - 1, C]`; zeros where it has fewer.
    """

    def __init__(
        self,
        features: int,
        *,
        taps: int = 4,
        activation: Literal["silu"] | None = "silu",
        use_bias: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features = features
        self.taps = checks.check_count("taps", taps)
        checks.check_choice("activation", activation, ("silu", None))
        self.activation = activation
        # Uniform in +-W^-0.5, as PyTorch starts a convolution of W inputs.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (taps, features), param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype)) if use_bias else None

    def __call__(
        self,
        x: Float[Array, "B T C"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Float[Array, "B past C"] | None = None,
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B past C"] | None]:
        """The outputs and, if one was given, the state after the last token. Sums are in float32 or wider."""
        batch, length, features = x.shape
        kernel = self.kernel[...]
        past = kernel.shape[0] - 1
        accumulator = checks.accumulator_dtype(x.dtype)
        before = jnp.zeros((batch, past, features), x.dtype) if state is None else state.astype(x.dtype)
        inputs = jnp.concatenate([before, x], axis=1)
        ids = None
        if segment_ids is not None:  # what came before belongs to the first token's segment
            ids = jnp.concatenate([jnp.repeat(segment_ids[:, :1], past, axis=1), segment_ids], axis=1)
        out = jnp.zeros(x.shape, accumulator)
        for distance in range(past + 1):
            start = past - distance
            seen = inputs[:, start : start + length].astype(accumulator)
            if ids is not None and segment_ids is not None:
                seen = jnp.where((ids[:, start : start + length] == segment_ids)[..., None], seen, 0)
            out += kernel[distance].astype(accumulator) * seen
        if self.bias is not None:
            out += self.bias[...].astype(accumulator)
        out = (out if self.activation is None else jax.nn.silu(out)).astype(x.dtype)
        if state is None:
            return out, None
        last = inputs[:, length:]
        if ids is not None:
            last = jnp.where((ids[:, length:] == ids[:, -1:])[..., None], last, 0)
        return out, last.astype(state.dtype)

    def init_state(self, batch: int, dtype: Any) -> Float[Array, "B past C"]:
        """No past at all."""
        return jnp.zeros((batch, self.taps - 1, self.features), dtype)

    def flops(self, tokens: int) -> float:
        return 2.0 * tokens * self.taps * self.features


class HeadConvolutions(nnx.Module):
    """A `ShortConvolution` each for the queries, keys and values of a mixer, heads side by side.

    State: a tuple of the three states.
    """

    def __init__(
        self, projections: Projections, *, taps: int, use_bias: bool = False, param_dtype: Any, rngs: nnx.Rngs
    ):
        def convolution(layer: nnx.Linear) -> ShortConvolution:
            options: dict[str, Any] = {"taps": taps, "use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
            return ShortConvolution(layer.out_features, **options)

        self.query, self.key, self.value = (
            convolution(layer) for layer in (projections.query, projections.key, projections.value)
        )

    def __call__(
        self,
        heads: tuple[Float[Array, "B T _ _"], ...],
        *,
        segment_ids: Int[Array, "B T"] | None,
        state: tuple[Array, ...] | None,
    ) -> tuple[list[Float[Array, "B T _ _"]], tuple[Array, ...] | None]:
        """The convolved queries, keys and values, and the state after the last token when one was given."""
        out: list[Array] = []
        after: list[Any] = []
        for index, (x, convolution) in enumerate(zip(heads, (self.query, self.key, self.value), strict=True)):
            before = None if state is None else state[index]
            flat, last = convolution(x.reshape(*x.shape[:2], -1), segment_ids=segment_ids, state=before)
            out.append(flat.reshape(x.shape))
            after.append(last)
        return out, None if state is None else tuple(after)

    def init_state(self, batch: int, dtype: Any) -> tuple[Array, ...]:
        return tuple(convolution.init_state(batch, dtype) for convolution in (self.query, self.key, self.value))

    def flops(self, tokens: int) -> float:
        return sum(convolution.flops(tokens) for convolution in (self.query, self.key, self.value))
