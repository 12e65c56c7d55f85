"""The block of Mamba-2 (Dao and Gu 2024, section 7; the released `Mamba2` module).

    C, B, u = silu(conv(x W_C)), silu(conv(x W_B)), silu(conv(x W_u))      Delta = softplus(x W_Delta + b)
    S_t = exp(-exp(r) Delta_t) S_{t-1} + B_t (Delta_t u_t)^T               o_t = S_t^T C_t + d u_t
    y = RMSNorm(o * silu(x W_z)) W_o

with r, Delta and d for each head, and B and C for each group of heads.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.linear.arguments import LinearState
from jattn.linear.gated import simple_gla, simple_gla_step
from jattn.nn.carried import attend_carried
from jattn.nn.decay import SoftplusDecay
from jattn.nn.delta import ConvolvedState
from jattn.nn.gate import Gate
from jattn.nn.mixer import Projections, rms_normalise
from jattn.nn.short_conv import HeadConvolutions


class Mamba2Mixer(nnx.Module):
    """Mamba-2's block, as many parameters as the released one: a language model of it needs no MLP.

    Differs from the released module in what stands in one matrix there: the five projections, and the convolution of
    u, B and C.

    Args:
      width: D.
      num_heads: N heads of u; the released models have heads of 64 channels, N = 2 D / 64.
      num_kv_heads: G groups that share B and C, a divisor of N; 1 unless told.
      head_dim: P, channels of a head; 2 D / N unless told.
      state_dim: n, rows of a head's state.
      taps: tokens that the convolutions see.
      layer_index, num_layers: accepted as every mixer does; not used.

    State: `ConvolvedState`; the memory is `[B, N, n, P]` in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        state_dim: int = 128,
        taps: int = 4,
        layer_index: Any = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del layer_index, num_layers
        checks.check_count("width", width)
        checks.check_count("num_heads", num_heads)
        groups = 1 if num_kv_heads is None else num_kv_heads
        checks.check_grouped_heads(num_heads, groups)
        if head_dim is None and 2 * width % num_heads:
            raise ValueError(
                f"num_heads: a width of {width} does not divide by {num_heads} heads, nor does its double, which they "
                "share here; choose a divisor of that, or give head_dim"
            )
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.projections = p = Projections(
            width,
            num_heads=groups,
            num_kv_heads=groups,
            head_dim=checks.check_count("state_dim", state_dim),
            num_value_heads=num_heads,
            value_dim=2 * width // num_heads if head_dim is None else checks.check_count("head_dim", head_dim),
            **settings,
        )
        self.convolutions = HeadConvolutions(p, taps=taps, use_bias=True, param_dtype=param_dtype, rngs=rngs)
        self.decay = SoftplusDecay(width, num_heads, **settings)
        self.D = nnx.Param(jnp.ones(num_heads, param_dtype))
        self.gate = Gate(width, p.features, activation="silu", **settings)
        self.norm_scale = nnx.Param(jnp.ones(p.features, param_dtype))

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
        read, write, u = heads
        step, log_decay = self.decay.with_step(x)
        each = u.shape[2] // read.shape[2]
        out, memory = attend_carried(
            simple_gla,
            simple_gla_step,
            (jnp.repeat(read, each, axis=2), jnp.repeat(write, each, axis=2), (step * u).astype(u.dtype)),
            {"log_decay": log_decay[..., 0]},
            segment_ids=segment_ids,
            state=memory,
            scale=1.0,
        )
        out = out + self.D[...].astype(u.dtype)[:, None] * u
        return self._finish(x, out), None if memory is None or past is None else ConvolvedState(memory, past)

    def _finish(self, x: Float[Array, "B T D"], heads: Float[Array, "B T N P"]) -> Float[Array, "B T D"]:
        """The gate, the norm over the heads of a group, the output projection."""
        gated = heads.reshape(*x.shape[:-1], -1) * self.gate(x)
        groups = self.projections.num_kv_heads
        normal = rms_normalise(gated.reshape(*x.shape[:-1], groups, -1), eps=1e-5).reshape(gated.shape)
        return self.projections.out(normal * self.norm_scale[...].astype(normal.dtype))

    def init_state(self, batch: int, capacity: int, dtype: Any) -> ConvolvedState:
        """The memory in float32 or wider, the convolutions' past in `dtype`; whatever the `capacity`."""
        del capacity
        p = self.projections
        shape = batch, p.num_value_heads, p.head_dim, p.value_dim
        memory = LinearState(jnp.zeros(shape, checks.accumulator_dtype(dtype)), None)
        return ConvolvedState(memory, self.convolutions.init_state(batch, dtype))

    def flops(self, batch: int, length: int) -> float:
        """Of the recurrence: every state is written and read."""
        p, tokens = self.projections, batch * length
        parts = p.flops(tokens) + self.convolutions.flops(tokens) + self.decay.flops(tokens) + self.gate.flops(tokens)
        return parts + 4.0 * tokens * p.num_value_heads * p.head_dim * p.value_dim
