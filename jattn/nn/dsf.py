"""The attention rows of the dynamical systems framework as layers: softmax, linear and normalised attention.

The layers of the paper's experiments (Sieber et al. 2024): projections with bias, no norm, no gate, and values that
share the width among the heads however small the states are made:

    softmax       y_t = sum_{j <= t} exp(q_t . k_j / sqrt(H)) v_j / sum_{j <= t} exp(q_t . k_j / sqrt(H))
    linear        y_t = sum_{j <= t} (phi(q_t) . phi(k_j)) v_j / sum_{j <= t} phi(q_t) . phi(k_j),    phi = elu + 1
    normalised    y_t = sum_{j <= t} (q_t . k_j) v_j / eta(x_t),                      eta = exp(x W + b) for every head

`as_dsf(x)` is such a layer as a system, `finish(x, dsf_scan(layer.as_dsf(x)))` its output once more. The released
layers stand behind learned positions, which these do without: rotary ones turn q and k unless `rope_theta` is `None`.
"""

from __future__ import annotations

from typing import Any, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.linear.arguments import LinearState
from jattn.linear.dsf import DSFSystem
from jattn.linear.dsf_systems import (
    NormalizeIn,
    Normalizer,
    elu_features,
    linear_attention_dsf,
    log_normalizer,
    normalized_attention_dsf,
    softmax_dsf,
)
from jattn.linear.recurrence import linear_attention, linear_attention_step
from jattn.nn.carried import attend_carried
from jattn.nn.gate import matrix_flops
from jattn.nn.softmax import RotaryBlock, SoftmaxMixer


def _released(width: int, options: dict[str, Any]) -> dict[str, Any]:
    """Options of an `RotaryBlock` as the released layers have them, where none are given."""
    heads = options["num_heads"]
    checks.check_count("num_heads", heads)
    if options.get("value_dim") is None and width % heads:
        raise ValueError(
            f"num_heads: a width of {width} does not divide by {heads} heads; choose a divisor of the width, or give "
            "value_dim"
        )
    return {"use_bias": True, "qk_norm": False, "value_dim": width // heads, **options}


def numbered(x: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """The positions of one document."""
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


def _system_heads(
    block: RotaryBlock, x: Float[Array, "B T D"], positions: Int[Array, "B T"] | None
) -> tuple[Float[Array, "B T N _"], ...]:
    """Queries, keys and values; a system has keys and values of its own for every query head."""
    query, key, value = block.heads(x, numbered(x) if positions is None else positions)
    groups = query.shape[2] // key.shape[2]
    return query, jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)


def _memory(block: RotaryBlock, batch: int, dtype: Any) -> Float[Array, "B K H V"]:
    p = block.projections
    shape = (batch, p.num_kv_heads, p.head_dim, p.value_dim)
    return jnp.zeros(shape, checks.accumulator_dtype(dtype))


def _recurrence_flops(block: RotaryBlock, tokens: int) -> float:
    p = block.projections
    return p.flops(tokens) + 4.0 * tokens * p.num_heads * p.head_dim * p.value_dim


class SoftmaxDSFMixer(SoftmaxMixer):
    """Softmax attention as a system: exact with a cache that grows, of some order with a state that does not.

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim: D, N, K, H and V; K defaults to N, H and V to D / N.
      use_bias, qk_norm, rope_theta: as in `RotaryBlock`; the released layer has biases, and of the others none.
      layer_index, num_layers: accepted as every mixer does; not used.

    State: a `KVCache`.
    """

    def __init__(self, width: int, **options: Any):
        super().__init__(width, **_released(width, options))

    def as_dsf(
        self,
        x: Float[Array, "B T D"],
        *,
        order: int,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> DSFSystem:
        """The system with the exponential's Taylor polynomial of `order` in the exponential's place."""
        return softmax_dsf(*_system_heads(self, x, positions), order=order, segment_ids=segment_ids)

    def finish(self, x: Float[Array, "B T D"], out: Float[Array, "B T N V"]) -> Float[Array, "B T D"]:
        """The layer's output from its system's."""
        return self.projections.merge(out.astype(x.dtype))


class LinearTransformerMixer(RotaryBlock):
    """Linear attention with the features elu + 1 and the sum of the weights as denominator (Katharopoulos et al. 2020).

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim: D, N, K, H and V; K defaults to N, H and V to D / N.
      use_bias, qk_norm, rope_theta: as in `RotaryBlock`, the rotation before the features; the released layer has
        biases, and of the others none.
      layer_index, num_layers: accepted as every mixer does; not used.

    State: `LinearState`, `[B, K, H, V]` and `[B, K, H]` in float32.
    """

    def __init__(self, width: int, *, layer_index: Any = 0, num_layers: int = 1, **options: Any):
        del layer_index, num_layers
        super().__init__(width, **_released(width, options))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: LinearState | None = None,
    ) -> tuple[Float[Array, "B T D"], LinearState | None]:
        query, key, value = self.heads(x, positions)
        heads = (elu_features(query), elu_features(key), value)
        op, step = linear_attention, linear_attention_step
        options: dict[str, Any] = {"segment_ids": segment_ids, "state": state, "normalize": True, "eps": 0.0}
        out, state = attend_carried(op, step, heads, {}, **options)
        return self.finish(x, out), state

    def as_dsf(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        normalize_in: NormalizeIn = "state",
    ) -> DSFSystem:
        """The system; `normalize_in` as in `normalized_attention_dsf`."""
        heads = _system_heads(self, x, positions)
        return linear_attention_dsf(*heads, normalize_in=normalize_in, segment_ids=segment_ids)

    def finish(self, x: Float[Array, "B T D"], out: Float[Array, "B T N V"]) -> Float[Array, "B T D"]:
        """The layer's output from its system's."""
        return self.projections.merge(out.astype(x.dtype))

    def init_state(self, batch: int, capacity: int, dtype: Any) -> LinearState:
        """Of the same size whatever the `capacity`; float32 or wider, whatever the `dtype`."""
        del capacity
        memory = _memory(self, batch, dtype)
        return LinearState(memory, jnp.zeros_like(memory[..., 0]))

    def flops(self, batch: int, length: int) -> float:
        """Of the recurrence; the chunked form does up to `chunk / H` times more work in its matmuls."""
        return _recurrence_flops(self, batch * length)


class NormalizedMixer(RotaryBlock):
    """Normalised attention (Sieber et al. 2024, section 4): what divides a token's sum is read off the token alone.

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim: D, N, K, H and V; K defaults to N, H and V to D / N.
      normalizer: eta from x W + b, see `log_normalizer`.
      use_bias, qk_norm, rope_theta: as in `RotaryBlock`; the released layer has biases, and of the others none.
      layer_index, num_layers: accepted as every mixer does; not used.

    State: `LinearState`, the plain sum, `[B, K, H, V]` in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        normalizer: Normalizer = "exp",
        layer_index: Any = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        del layer_index, num_layers
        checks.check_choice("normalizer", normalizer, get_args(Normalizer))
        self.normalizer = normalizer
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(width, **_released(width, options), **settings)
        self.eta = nnx.Linear(width, self.projections.num_heads, **settings)

    def log_eta(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N"]:
        """In float32 or wider."""
        return log_normalizer(self.eta(x).astype(checks.accumulator_dtype(x.dtype)), self.normalizer)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: LinearState | None = None,
    ) -> tuple[Float[Array, "B T D"], LinearState | None]:
        query, key, value = self.heads(x, positions)
        query = (query * jnp.exp(-self.log_eta(x))[..., None]).astype(value.dtype)
        op, step = linear_attention, linear_attention_step
        out, state = attend_carried(op, step, (query, key, value), {}, segment_ids=segment_ids, state=state)
        return self.finish(x, out), state

    def as_dsf(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        normalize_in: NormalizeIn = "state",
    ) -> DSFSystem:
        """The system; `normalize_in` as in `normalized_attention_dsf`."""
        query, key, value = _system_heads(self, x, positions)
        system = normalized_attention_dsf(query, key, value, self.log_eta(x), normalize_in=normalize_in)
        return system._replace(segment_ids=segment_ids)

    def finish(self, x: Float[Array, "B T D"], out: Float[Array, "B T N V"]) -> Float[Array, "B T D"]:
        """The layer's output from its system's."""
        return self.projections.merge(out.astype(x.dtype))

    def init_state(self, batch: int, capacity: int, dtype: Any) -> LinearState:
        """Of the same size whatever the `capacity`; float32 or wider, whatever the `dtype`."""
        del capacity
        return LinearState(_memory(self, batch, dtype), None)

    def flops(self, batch: int, length: int) -> float:
        """Of the recurrence; the chunked form does up to `chunk / H` times more work in its matmuls."""
        return _recurrence_flops(self, batch * length) + matrix_flops(batch * length, self.eta)
