"""Mixers of additive linear attention under the names they were published with: RetNet, HGRN2, simple GLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.linear.arguments import LinearState
from jattn.linear.gated import simple_gla, simple_gla_step
from jattn.linear.recurrence import linear_attention, linear_attention_step
from jattn.linear.retention import retention, retention_gamma, retention_step
from jattn.nn.carried import attend_carried
from jattn.nn.delta import ConvolvedState
from jattn.nn.gate import matrix_flops
from jattn.nn.linear import LinearBlock
from jattn.nn.short_conv import HeadConvolutions
from jattn.positions import apply_rotary


class RetNetMixer(LinearBlock):
    """Multi-scale retention (Sun et al. 2023, eq. 8): y = (GroupNorm(retention(q, k, v)) * silu(x W_gate)) W_o.

    Queries and keys are turned by rotary positions, so H is even. The norm takes mean and variance over each head.

    Args:
      width, num_heads, num_kv_heads, head_dim: D, N, K and H; K defaults to N, H to D / N.
      value_dim: V, by default H (the paper: 2 H).
      layer_index, num_layers: accepted as every mixer does; not used.

    State: `LinearState`, `[B, K, H, V]` in float32.
    """

    def __init__(self, width: int, *, layer_index: Any = 0, num_layers: int = 1, **options: Any):
        del layer_index, num_layers
        super().__init__(width, **{"norm": "head_layernorm", "gate": "silu", **options})
        self.gamma = nnx.Variable(retention_gamma(self.projections.num_kv_heads))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: LinearState | None = None,
    ) -> tuple[Float[Array, "B T D"], LinearState | None]:
        query, key, value = self.projections.split(x)
        heads = (apply_rotary(query, positions), apply_rotary(key, positions), value)
        gates = {"gamma": self.gamma[...]}
        out, state = attend_carried(retention, retention_step, heads, gates, segment_ids=segment_ids, state=state)
        return self.finish(x, out), state


class HGRN2Mixer(LinearBlock):
    """HGRN2 (Qin et al. 2024, eq. 8): linear attention in which what is forgotten makes room for what is written.

        f = b + (1 - b) sigmoid(x W_f),      S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T,      q = silu(x W_q)

    and y = RMSNorm(o) W_o, the norm over all heads. Differs from the released code in the lower bound b: for layer l of
    L it is l / L, what the learned bounds of the released model start from.

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim: D, N, K, H and V; K defaults to N, H to D / N, V to H.
      layer_index, num_layers: l and L; `layer_index` may be traced.

    State: `LinearState`, `[B, K, H, V]` in float32.
    """

    def __init__(self, width: int, *, layer_index: Any = 0, num_layers: int = 1, **options: Any):
        super().__init__(width, **{"norm": "rmsnorm", "gate": None, **options})
        self.lower_bound = nnx.Variable(jnp.asarray(layer_index / num_layers, jnp.float32))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: LinearState | None = None,
    ) -> tuple[Float[Array, "B T D"], LinearState | None]:
        query, forget, value = self.projections.split(x)
        logits, bound = forget.astype(checks.accumulator_dtype(x.dtype)), self.lower_bound[...]
        key = ((1 - bound) * jax.nn.sigmoid(-logits)).astype(value.dtype)
        log_decay = jnp.logaddexp(jnp.log(bound), jnp.log1p(-bound) + jax.nn.log_sigmoid(logits))
        out, state = attend_carried(
            linear_attention,
            linear_attention_step,
            (jax.nn.silu(query), key, value),
            {"log_decay": log_decay},
            segment_ids=segment_ids,
            state=state,
            scale=self.projections.head_dim**-0.5,
        )
        return self.finish(x, out), state


class SimpleGLAMixer(LinearBlock):
    """Gated linear attention with one decay per head, behind short convolutions, as in Mamba-2.

    log a = log_sigmoid(x W + b) / normaliser, q, k, v = silu(conv(.)), y = (RMSNorm_head(o) * silu(x W_gate)) W_o, as
    in flash-linear-attention's `SimpleGatedLinearAttention`.

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim: D, N, K, H and V; K defaults to N, H to D / N, V to H.
      decay_normaliser: divides the log decay, so that a fresh layer forgets slowly (released code: 16).
      taps: tokens that the short convolutions see.
      layer_index, num_layers: accepted as every mixer does; not used.

    State: `ConvolvedState`; the memory is `[B, K, H, V]` in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        decay_normaliser: float = 16.0,
        taps: int = 4,
        layer_index: Any = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        del layer_index, num_layers
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(width, **{"norm": "head_rmsnorm", "gate": "silu", **settings, **options})
        self.convolutions = HeadConvolutions(self.projections, taps=taps, param_dtype=param_dtype, rngs=rngs)
        self.decay_normaliser = decay_normaliser
        self.decay_up = nnx.Linear(width, self.projections.num_kv_heads, **settings)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: ConvolvedState | None = None,
    ) -> tuple[Float[Array, "B T D"], ConvolvedState | None]:
        memory, past = (None, None) if state is None else state
        heads, past = self.convolutions(self.projections.split(x), segment_ids=segment_ids, state=past)
        logits = self.decay_up(x).astype(checks.accumulator_dtype(x.dtype))
        gates = {"log_decay": jax.nn.log_sigmoid(logits) / self.decay_normaliser}
        out, memory = attend_carried(simple_gla, simple_gla_step, heads, gates, segment_ids=segment_ids, state=memory)
        return self.finish(x, out), None if memory is None or past is None else ConvolvedState(memory, past)

    def init_state(self, batch: int, capacity: int, dtype: Any) -> ConvolvedState:
        """The memory in float32 or wider, the convolutions' past in `dtype`; whatever the `capacity`."""
        return ConvolvedState(super().init_state(batch, capacity, dtype), self.convolutions.init_state(batch, dtype))

    def flops(self, batch: int, length: int) -> float:
        tokens = batch * length
        return super().flops(batch, length) + self.convolutions.flops(tokens) + matrix_flops(tokens, self.decay_up)
