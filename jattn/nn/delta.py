"""Mixers of the delta rule: a memory of fixed size that overwrites (DeltaNet, Gated DeltaNet, Kimi delta attention).

q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v)),      q and k of length 1 by head
y = (RMSNorm_head(delta_rule(q, k, v, sigmoid(x W_beta), log a)) * f(x W_gate)) W_o
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.linear.arguments import LinearState, check_value_heads
from jattn.linear.delta_rule import delta_rule, delta_rule_step
from jattn.nn.carried import attend_carried
from jattn.nn.decay import SoftplusDecay
from jattn.nn.gate import Activation, matrix_flops
from jattn.nn.linear import LinearBlock
from jattn.nn.mixer import l2_normalise
from jattn.nn.short_conv import HeadConvolutions


class ConvolvedState(NamedTuple):
    """The memory, and the last inputs of the convolutions of query, key and value, `[B, W - 1, features]` each."""

    memory: LinearState
    past: tuple[Array, ...]


class DeltaNetMixer(LinearBlock):
    """DeltaNet (Yang et al. 2024; flash-linear-attention's `DeltaNet`) and, with a decay, its successors.

    Args:
      width, num_heads, num_kv_heads, head_dim: D, N, K and H; K defaults to N, H to D / N.
      num_value_heads, value_dim: Kv and V of values and states; Kv defaults to K, V to H.
      decay: "none", or as Mamba-2 computes it "head" (Gated DeltaNet) or "channel" (KDA).
      decay_rank: channels between the two matrices of the decay; `None` is one full matrix.
      gate, gate_rank, gate_bias: the output gate f, see `LinearBlock`; DeltaNet has none unless told.
      taps: tokens that the short convolutions see.
      negative_eigenvalues: beta = 2 sigmoid, so that a state may also be turned over (Grazzi et al. 2025).
      layer_index, num_layers: accepted as every mixer does; not used.

    State: `ConvolvedState`; the memory is `[B, Kv, H, V]` in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        num_value_heads: int | None = None,
        decay: Literal["none", "head", "channel"] = "none",
        decay_rank: int | None = None,
        gate: Activation | None = None,
        taps: int = 4,
        negative_eigenvalues: bool = False,
        layer_index: Any = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        del layer_index, num_layers
        checks.check_choice("decay", decay, ("none", "head", "channel"))
        checks.check_flags(negative_eigenvalues=negative_eigenvalues)
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(
            width,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            num_value_heads=num_value_heads,
            norm="head_rmsnorm",
            gate=gate,
            **settings,
            **options,
        )
        p = self.projections
        check_value_heads(p.num_heads, p.num_kv_heads, p.num_value_heads)
        self.convolutions = HeadConvolutions(p, taps=taps, param_dtype=param_dtype, rngs=rngs)
        self.beta = nnx.Linear(width, p.num_value_heads, use_bias=False, **settings)
        self.beta_range = 2.0 if negative_eigenvalues else 1.0
        channels = p.head_dim if decay == "channel" else 1
        make = functools.partial(SoftplusDecay, width, p.num_value_heads, channels, decay_rank, **settings)
        self.decay = None if decay == "none" else make()

    def log_decay(self, x: Float[Array, "B T D"]) -> Array | None:
        """`[B, T, Kv]`, `[B, T, Kv, H]` or `None`; float32 or wider."""
        if self.decay is None:
            return None
        log_decay = self.decay(x)
        return log_decay[..., 0] if log_decay.shape[-1] == 1 else log_decay

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
        query, key, value = heads
        beta = self.beta_range * jax.nn.sigmoid(self.beta(x).astype(checks.accumulator_dtype(x.dtype)))
        out, memory = attend_carried(
            delta_rule,
            delta_rule_step,
            (l2_normalise(query), l2_normalise(key), value),
            {"beta": beta, "log_decay": self.log_decay(x)},
            segment_ids=segment_ids,
            state=memory,
        )
        return self.finish(x, out), None if memory is None or past is None else ConvolvedState(memory, past)

    def init_state(self, batch: int, capacity: int, dtype: Any) -> ConvolvedState:
        """The memory in float32 or wider, the convolutions' past in `dtype`; whatever the `capacity`."""
        return ConvolvedState(super().init_state(batch, capacity, dtype), self.convolutions.init_state(batch, dtype))

    def flops(self, batch: int, length: int) -> float:
        """Of the recurrence: a token reads its error, writes it, and reads its output."""
        p, tokens = self.projections, batch * length
        writes = 4.0 * tokens * p.num_value_heads * p.head_dim * p.value_dim
        decay = 0.0 if self.decay is None else self.decay.flops(tokens)
        parts = self.convolutions.flops(tokens) + matrix_flops(tokens, self.beta) + decay
        return super().flops(batch, length) + writes + parts


class GatedDeltaNetMixer(DeltaNetMixer):
    """Gated DeltaNet (Yang et al. 2025, section 3.4): a decay per head and a SiLU gate on the output.

    Differs from the released layer in the rates exp(r), which start uniform from 1 to 16 (there from 0), and in sizes:
    values are as wide as keys unless `value_dim` says otherwise (there twice as wide).
    """

    def __init__(self, width: int, **options: Any):
        super().__init__(width, **{"decay": "head", "gate": "silu", **options})


class KDAMixer(DeltaNetMixer):
    """Kimi delta attention (Kimi Linear 2025): a decay per key channel, both gates through V channels, sigmoid."""

    def __init__(self, width: int, **options: Any):
        head_dim = options.get("head_dim") or max(width // options["num_heads"], 1)
        rank = options.get("value_dim") or head_dim
        own = {"decay": "channel", "decay_rank": rank, "gate": "sigmoid", "gate_rank": rank, "gate_bias": True}
        super().__init__(width, **{**own, **options})
