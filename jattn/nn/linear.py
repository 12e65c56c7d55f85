"""Linear-attention mixers: constant memory however long the text.

`LightningMixer` is the token mixer of TransNormerLLM and MiniMax (fixed decay per head); `LinearMixer` learns its decay
from the token (Yang et al. 2024, section 4.4).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.linear.lightning import lightning_attention, lightning_attention_step, lightning_slopes
from jattn.linear.recurrence import LinearState, linear_attention, linear_attention_step
from jattn.nn.carried import attend_carried
from jattn.nn.gate import Activation, Gate, matrix_flops
from jattn.nn.mixer import Projections

Norm = Literal["layernorm", "rmsnorm", "srmsnorm", "head_rmsnorm", "head_layernorm"]


def _output_norm(kind: Norm, projections: Projections, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """Over all heads together or, `head_*`, over each on its own."""
    checks.check_choice("norm", kind, get_args(Norm))
    settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    if kind == "head_rmsnorm":
        return nnx.RMSNorm(projections.value_dim, epsilon=1e-5, **settings)
    if kind == "head_layernorm":
        return nnx.LayerNorm(projections.value_dim, epsilon=1e-5, use_scale=False, use_bias=False, **settings)
    if kind == "layernorm":
        return nnx.LayerNorm(projections.features, epsilon=1e-5, **settings)
    return nnx.RMSNorm(projections.features, epsilon=1e-6, use_scale=kind == "rmsnorm", **settings)


class LinearBlock(nnx.Module):
    """What the linear mixers share: projections, a norm, an output gate or none, the state.

    y = (Norm(heads) * f(x W_gate)) W_o

    Args:
      width, num_heads, num_kv_heads, head_dim: D, N, K and H; K defaults to N, H to D / N.
      value_dim: V, by default H.
      norm: over all heads together, "layernorm", "rmsnorm" or, without parameters, "srmsnorm"; or over each head,
        "head_rmsnorm" with one scale for all and "head_layernorm" without parameters.
      gate: f, "sigmoid" or "silu"; `None` leaves the gate out.
      gate_rank: channels between two gate matrices; `None` is one full matrix.

    State: `LinearState`, `[B, K, H, V]` in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_value_heads: int | None = None,
        value_dim: int | None = None,
        norm: Norm = "rmsnorm",
        gate: Activation | None = "sigmoid",
        gate_rank: int | None = None,
        gate_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.projections = Projections(
            width,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_value_heads=num_value_heads,
            value_dim=value_dim,
            **settings,
        )
        self.norm = _output_norm(norm, self.projections, **settings)
        self.norm_by_head = norm.startswith("head_")
        features = self.projections.features
        gate_settings: dict[str, Any] = {"activation": gate, "use_bias": gate_bias, **settings}
        self.gate = None if gate is None else Gate(width, features, gate_rank, **gate_settings)

    def finish(self, x: Float[Array, "B T D"], heads: Float[Array, "B T N V"]) -> Float[Array, "B T D"]:
        """The norm, the gate and the output projection."""
        merged = (*heads.shape[:-2], -1)
        heads = self.norm(heads).reshape(merged) if self.norm_by_head else self.norm(heads.reshape(merged))
        return self.projections.out(heads if self.gate is None else heads * self.gate(x))

    def init_state(self, batch: int, capacity: int, dtype: Any) -> Any:
        """`[B, K, H, V]`, whatever the `capacity`; float32 or wider, whatever the `dtype`."""
        del capacity
        p = self.projections
        shape = (batch, p.num_value_heads, p.head_dim, p.value_dim)
        return LinearState(jnp.zeros(shape, checks.accumulator_dtype(dtype)), None)

    def flops(self, batch: int, length: int) -> float:
        """Of the recurrence; the chunked form does up to `chunk / H` times more work in its matmuls."""
        p = self.projections
        tokens = batch * length
        gate = 0.0 if self.gate is None else self.gate.flops(tokens)
        return p.flops(tokens) + gate + 4.0 * tokens * p.num_heads * p.head_dim * p.value_dim


class LightningMixer(LinearBlock):
    """Lightning Attention-2 as TransNormerLLM uses it (`examples/module/tnl_attn.py` of the released code).

    y = (Norm(lightning(silu(x W_q), silu(x W_k), silu(x W_v))) * sigmoid(x W_1 W_2)) W_o

    Args:
      width, num_heads, num_kv_heads, head_dim: D, N, K and H; K defaults to N, H to D / N.
      norm: over all heads together: "layernorm" (the released code), "srmsnorm" (the paper, no parameters), "rmsnorm"
        (MiniMax).
      gate_rank: channels between the two gate matrices (released code: H); `None` is one full matrix (MiniMax).
      slope_variant: which schedule of decays, see `lightning_slopes`.
      layer_index, num_layers: deeper layers decay less; `layer_index` may be traced.

    State: `LinearState`, `[B, K, H, H]` in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        slope_variant: Literal["repo", "paper", "minimax"] = "repo",
        layer_index: Any = 0,
        num_layers: int = 1,
        **options: Any,
    ):
        super().__init__(width, num_heads=num_heads, num_kv_heads=num_kv_heads, **options)
        heads = self.projections.num_kv_heads
        table = [lightning_slopes(heads, layer, num_layers, variant=slope_variant) for layer in range(num_layers)]
        self.slopes = nnx.Variable(jnp.stack(table)[layer_index])

    def _heads(self, x: Array) -> tuple[Array, ...]:
        return tuple(jax.nn.silu(part) for part in self.projections.split(x))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: LinearState | None = None,
    ) -> tuple[Float[Array, "B T D"], LinearState | None]:
        op, step = lightning_attention, lightning_attention_step
        gates = {"slopes": self.slopes[...]}
        out, state = attend_carried(op, step, self._heads(x), gates, segment_ids=segment_ids, state=state)
        return self.finish(x, out), state


class LinearMixer(LinearBlock):
    """Gated linear attention: the decay of every key channel is computed from the token (Yang et al. 2024, eq. 3).

    log a = log_sigmoid(x W_1 W_2 + b) / normaliser, y = (Norm(attention) * sigmoid(x W)) W_o, keys and queries plain.

    Args:
      width, num_heads, num_kv_heads, head_dim, norm, gate_rank: as in `LightningMixer`.
      decay: "channel" for a gate per key channel (GLA), "head" for one per head (Mamba-2 form), "none" for a plain sum.
      decay_rank: channels between the two matrices of the decay gate (released code: 16).
      decay_normaliser: divides the log gate, so that a fresh layer forgets slowly (released code: 16).
      layer_index, num_layers: accepted as every mixer does; not used.

    State: `LinearState`, `[B, K, H, H]` in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        decay: Literal["channel", "head", "none"] = "channel",
        decay_rank: int = 16,
        decay_normaliser: float = 16.0,
        layer_index: Any = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        del layer_index, num_layers
        super().__init__(width, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **options)
        self.decay = decay
        self.decay_normaliser = decay_normaliser
        checks.check_choice("decay", decay, ("channel", "head", "none"))
        if decay == "none":
            self.decay_down = self.decay_up = None
            return
        heads = self.projections.num_kv_heads
        features = heads * self.projections.head_dim if decay == "channel" else heads
        self.decay_down = nnx.Linear(width, decay_rank, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.decay_up = nnx.Linear(decay_rank, features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def log_decay(self, x: Float[Array, "B T D"]) -> Array | None:
        """`[B, T, K, H]`, `[B, T, K]` or `None`; float32 or wider."""
        if self.decay_down is None or self.decay_up is None:
            return None
        gate = self.decay_up(self.decay_down(x))
        gate = jax.nn.log_sigmoid(gate.astype(checks.accumulator_dtype(x.dtype))) / self.decay_normaliser
        heads = self.projections.num_kv_heads
        return gate.reshape(*x.shape[:-1], heads, -1) if self.decay == "channel" else gate

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: LinearState | None = None,
    ) -> tuple[Float[Array, "B T D"], LinearState | None]:
        op, step = linear_attention, linear_attention_step
        heads, gates = self.projections.split(x), {"log_decay": self.log_decay(x)}
        scale = self.projections.head_dim**-0.5
        out, state = attend_carried(op, step, heads, gates, segment_ids=segment_ids, state=state, scale=scale)
        return self.finish(x, out), state

    def flops(self, batch: int, length: int) -> float:
        return super().flops(batch, length) + matrix_flops(batch * length, self.decay_down, self.decay_up)
