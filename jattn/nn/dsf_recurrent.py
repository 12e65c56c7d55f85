"""The recurrent rows of the dynamical systems framework as layers: S6, its scalar form, LRU, qLSTM and RG-LRU.

    S6       Delta, B, C from x;    y = (scan(x; Delta, A, B, C) + D x) W_o
    LRU      h_t = lam * h_{t-1} + gamma * (B x_t),  y = Re(C h) + D x              complex, the same for all tokens
    qLSTM    g, u = x W_i;  u = conv(u);  h = scan(u);  y = (gelu(g) * sigmoid(o) * h) W_o
    RG-LRU   y = (gelu(x W_g) * scan(conv(x W_u))) W_o

`as_dsf(x)` is such a layer as a system, `finish(x, dsf_scan(layer.as_dsf(x)))` its output once more. What has no heads
takes `num_heads` and `num_kv_heads` as every mixer does, and does not use them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Complex, Float, Int

from jattn import checks
from jattn.linear.arguments import segment_starts
from jattn.linear.dsf import DSFSystem, dsf_scan
from jattn.linear.dsf_systems import lru_dsf, qlstm_dsf, rglru_dsf, s6_dsf
from jattn.linear.selective_scan import selective_scan
from jattn.nn.decay import step_bias
from jattn.nn.dsf import numbered
from jattn.nn.gate import matrix_flops
from jattn.nn.short_conv import ShortConvolution


class RecurrentState(NamedTuple):
    """The memory of every channel, and the last inputs of the short convolution."""

    memory: Float[Array, "B C"]
    past: Float[Array, "B past C"]


def _wide(x: Array) -> Array:
    return x.astype(checks.accumulator_dtype(x.dtype))


class S6Mixer(nnx.Module):
    """S6, the core of Mamba without its convolution, gate and wide projections (Gu and Dao 2023, algorithm 2).

    Args:
      width: D channels.
      head_dim: n, states of a channel; 16 unless told, as in Mamba.
      shared_rate: one rate for all, and a time step that only its bias tells apart between channels: what the paper
        (Sieber et al. 2024) calls SSD.
      num_heads, num_kv_heads, layer_index, num_layers: accepted as every mixer does; not used.

    State: `[B, D, n]` in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 1,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        shared_rate: bool = False,
        layer_index: Any = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del num_heads, num_kv_heads, layer_index, num_layers
        checks.check_flags(shared_rate=shared_rate)
        self.width = checks.check_count("width", width)
        self.states = 16 if head_dim is None else checks.check_count("head_dim", head_dim)
        self.rank = 1 if shared_rate else math.ceil(width / 16)
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.x_proj = linear(width, self.rank + 2 * self.states)
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # in +-rank^-0.5
        self.dt_proj = None if shared_rate else linear(self.rank, width, kernel_init=uniform)
        self.dt_bias = nnx.Param(step_bias(rngs.params(), (width,), param_dtype))
        rates = jnp.log(jnp.arange(1, self.states + 1, dtype=param_dtype))
        self.A_log = nnx.Param(jnp.zeros((), param_dtype) if shared_rate else jnp.tile(rates, (width, 1)))
        self.D = nnx.Param(jnp.ones(width, param_dtype))
        self.out_proj = linear(width, width, kernel_init=nnx.initializers.zeros)

    def parts(self, x: Float[Array, "B T D"]) -> dict[str, Any]:
        """The arguments of `selective_scan`."""
        delta, B, C = jnp.split(self.x_proj(x), [self.rank, self.rank + self.states], axis=-1)
        delta = jnp.broadcast_to(delta, x.shape) if self.dt_proj is None else self.dt_proj(delta)
        A = jnp.broadcast_to(-jnp.exp(_wide(self.A_log[...])), (self.width, self.states))
        return {"u": x, "delta": delta, "A": A, "B": B, "C": C, "D": self.D[...], "delta_bias": self.dt_bias[...]}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: Float[Array, "B D n"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B D n"] | None]:
        options: dict[str, Any] = {"segment_ids": segment_ids, "initial_state": state, "return_state": True}
        out, after = selective_scan(**self.parts(x), delta_softplus=True, **options)
        return self.out_proj(out), None if state is None else after

    def as_dsf(self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None) -> DSFSystem:
        """The system of D channels with n states each."""
        parts = self.parts(x)
        delta = jax.nn.softplus(_wide(parts["delta"]) + parts.pop("delta_bias"))
        parts["A"] = -jnp.exp(_wide(self.A_log[...]))
        return s6_dsf(**{**parts, "delta": delta})._replace(segment_ids=segment_ids)

    def finish(self, x: Float[Array, "B T D"], out: Float[Array, "B T 1 D"]) -> Float[Array, "B T D"]:
        """The layer's output from its system's."""
        return self.out_proj(out[:, :, 0].astype(x.dtype))

    def init_state(self, batch: int, capacity: int, dtype: Any) -> Float[Array, "B D n"]:
        """Of the same size whatever the `capacity`; float32 or wider, whatever the `dtype`."""
        del capacity
        return jnp.zeros((batch, self.width, self.states), checks.accumulator_dtype(dtype))

    def flops(self, batch: int, length: int) -> float:
        """Every state decays, is written and is read."""
        tokens = batch * length
        return matrix_flops(tokens, self.x_proj, self.dt_proj, self.out_proj) + 6.0 * tokens * self.width * self.states


class SSDMixer(S6Mixer):
    """S6 with one rate for all channels and states."""

    def __init__(self, width: int, **options: Any):
        super().__init__(width, **{"shared_rate": True, **options})


class LRUMixer(nnx.Module):
    """The linear recurrent unit (Orvieto et al. 2023): dense complex maps around a diagonal that tokens do not change.

    Args:
      width: D.
      state_dim: M complex states, by default D.
      r_min, r_max: |lam|^2 starts uniform between their squares.
      num_heads, num_kv_heads, head_dim, layer_index, num_layers: accepted as every mixer does; not used.

    State: `[B, M]` in complex64 or wider.
    """

    def __init__(
        self,
        width: int,
        *,
        state_dim: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        num_heads: int = 1,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_index: Any = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del num_heads, num_kv_heads, head_dim, layer_index, num_layers
        checks.check_count("width", width)
        states = width if state_dim is None else checks.check_count("state_dim", state_dim)
        self.width, self.states = width, states
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"r_min, r_max: expected 0 <= r_min < r_max <= 1, got {r_min} and {r_max}")
        self.dtype = dtype

        def uniform() -> Array:
            return jax.random.uniform(rngs.params(), (states,), param_dtype, minval=1e-6)

        def normal(shape: tuple[int, ...], scale: float) -> nnx.Param:
            return nnx.Param(scale * jax.random.normal(rngs.params(), shape, param_dtype))

        squared = uniform() * (r_max**2 - r_min**2) + r_min**2
        self.nu_log = nnx.Param(jnp.log(-0.5 * jnp.log(squared)))
        self.theta_log = nnx.Param(jnp.log(6.28 * uniform()))
        self.gamma_log = nnx.Param(0.5 * jnp.log1p(-squared))
        self.B_re, self.B_im = (normal((width, states), (2 * width) ** -0.5) for _ in range(2))
        self.C_re, self.C_im = (normal((states, width), states**-0.5) for _ in range(2))
        self.D = normal((width,), 1.0)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: Complex[Array, "B M"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Complex[Array, "B M"] | None]:
        before = None if state is None else state[:, None, None]
        system = self.as_dsf(x, segment_ids=segment_ids)
        out, after = dsf_scan(system, initial_state=before, return_state=True)
        return self.finish(x, out), None if state is None else after[:, 0, 0]

    def as_dsf(self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None) -> DSFSystem:
        """The system of M channels with one complex state each, whose inputs are B x."""
        Bu = jax.lax.complex(*(_wide(x) @ _wide(part[...]) for part in (self.B_re, self.B_im)))
        rates = (_wide(part[...]) for part in (self.nu_log, self.theta_log, self.gamma_log))
        return lru_dsf(Bu, *rates)._replace(segment_ids=segment_ids)

    def finish(self, x: Float[Array, "B T D"], out: Complex[Array, "B T 1 M"]) -> Float[Array, "B T D"]:
        """The layer's output, Re(C h) + D x, from its system's."""
        h = out[:, :, 0]
        read = h.real @ _wide(self.C_re[...]) - h.imag @ _wide(self.C_im[...])
        return (read + _wide(self.D[...]) * _wide(x)).astype(x.dtype if self.dtype is None else self.dtype)

    def init_state(self, batch: int, capacity: int, dtype: Any) -> Complex[Array, "B M"]:
        """Of the same size whatever the `capacity`; complex64 or wider, whatever the `dtype`."""
        del capacity
        wide = jnp.promote_types(checks.accumulator_dtype(dtype), jnp.complex64)
        return jnp.zeros((batch, self.states), wide)

    def flops(self, batch: int, length: int) -> float:
        """A complex number times a real one is two products."""
        return 8.0 * batch * length * self.width * self.states


class QLSTMMixer(nnx.Module):
    """The quasi LSTM of the paper (Sieber et al. 2024): an LSTM's cell with gates that see no state.

    Args:
      width: D.
      expand: hidden channels C over D.
      reversed_sigmoid: forget by sigmoid(-f)^alpha, as S6 does, with a learned alpha that starts at 1.
      taps: tokens that the short convolution sees.
      num_heads, num_kv_heads, head_dim, layer_index, num_layers: accepted as every mixer does; not used.

    State: `RecurrentState`; the memory is `[B, C]` in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        expand: int = 2,
        reversed_sigmoid: bool = False,
        taps: int = 4,
        num_heads: int = 1,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_index: Any = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del num_heads, num_kv_heads, head_dim, layer_index, num_layers
        checks.check_flags(reversed_sigmoid=reversed_sigmoid)
        hidden = checks.check_count("expand", expand) * checks.check_count("width", width)
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.in_proj = nnx.Linear(width, 2 * hidden, use_bias=False, **settings)
        options: dict[str, Any] = {"activation": None, "use_bias": True, "param_dtype": param_dtype, "rngs": rngs}
        self.convolution = ShortConvolution(hidden, taps=taps, **options)
        self.gates = nnx.Linear(hidden, 3 * hidden, **settings)
        self.alpha = nnx.Param(jnp.ones((), param_dtype)) if reversed_sigmoid else None
        self.out_proj = nnx.Linear(hidden, width, use_bias=False, kernel_init=nnx.initializers.zeros, **settings)

    def _system(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, past: Float[Array, "B past C"] | None
    ) -> tuple[DSFSystem, Float[Array, "B past C"] | None]:
        _, u = jnp.split(self.in_proj(x), 2, axis=-1)
        u, past = self.convolution(u, segment_ids=segment_ids, state=past)
        forget, write, read = jnp.split(_wide(self.gates(u)), 3, axis=-1)
        alpha = None if self.alpha is None else _wide(self.alpha[...])
        return qlstm_dsf(u, forget, write, read, alpha)._replace(segment_ids=segment_ids), past

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: RecurrentState | None = None,
    ) -> tuple[Float[Array, "B T D"], RecurrentState | None]:
        memory, past = (None, None) if state is None else state
        system, past = self._system(x, segment_ids, past)
        out, memory = _scan_channels(system, memory)
        return self.finish(x, out), None if memory is None or past is None else RecurrentState(memory, past)

    def as_dsf(self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None) -> DSFSystem:
        """The system of C channels with one state each, behind the convolution."""
        return self._system(x, segment_ids, None)[0]

    def finish(self, x: Float[Array, "B T D"], out: Float[Array, "B T 1 C"]) -> Float[Array, "B T D"]:
        """The layer's output from its system's."""
        gate, _ = jnp.split(self.in_proj(x), 2, axis=-1)
        return self.out_proj(jax.nn.gelu(gate, approximate=False) * out[:, :, 0].astype(gate.dtype))

    def init_state(self, batch: int, capacity: int, dtype: Any) -> RecurrentState:
        """The memory in float32 or wider, the convolution's past in `dtype`; whatever the `capacity`."""
        return _init_channels(self.convolution, batch, dtype)

    def flops(self, batch: int, length: int) -> float:
        tokens = batch * length
        return matrix_flops(tokens, self.in_proj, self.gates, self.out_proj) + self.convolution.flops(tokens)


class ReversedQLSTMMixer(QLSTMMixer):
    """The quasi LSTM that forgets as S6 does."""

    def __init__(self, width: int, **options: Any):
        super().__init__(width, **{"reversed_sigmoid": True, **options})


class BlockLinear(nnx.Module):
    """A linear map whose matrix has `blocks` square blocks on its diagonal, and a bias that starts at zero."""

    def __init__(self, width: int, blocks: int, *, param_dtype: Any, rngs: nnx.Rngs):
        size = width // blocks
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.kernel = nnx.Param(init(rngs.params(), (blocks, size, size), param_dtype))
        self.bias = nnx.Param(jnp.zeros((blocks, size), param_dtype))

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """In float32 or wider."""
        kernel, bias = self.kernel[...], self.bias[...]
        blocks = x.reshape(*x.shape[:-1], *bias.shape)
        return (jnp.einsum("btni,nio->btno", _wide(blocks), _wide(kernel)) + bias).reshape(x.shape)


class RGLRU(nnx.Module):
    """The real-gated linear recurrent unit (De et al. 2024, eq. 1 to 4), gates of `blocks` blocks on the diagonal.

    The largest lam of a channel starts as a^8, with a^2 uniform from 0.9^2 to 0.999^2.
    """

    def __init__(self, width: int, blocks: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.write_gate = BlockLinear(width, blocks, param_dtype=param_dtype, rngs=rngs)
        self.recurrence_gate = BlockLinear(width, blocks, param_dtype=param_dtype, rngs=rngs)
        squared = jax.random.uniform(rngs.params(), (width,), param_dtype, 0.9**2, 0.999**2)
        self.decay = nnx.Param(jnp.log(jnp.expm1(-0.5 * jnp.log(squared))))

    def as_dsf(self, x: Float[Array, "B T C"], starts: Bool[Array, "B T"] | None = None) -> DSFSystem:
        """The system of C channels with one state each; a document starts where `starts` says so."""
        return rglru_dsf(x, self.recurrence_gate(x), self.write_gate(x), _wide(self.decay[...]), starts)


class RGLRUMixer(nnx.Module):
    """Griffin's recurrent block (De et al. 2024, section 2.3; RecurrentGemma).

    Args:
      width: D, channels of the recurrence too.
      num_heads: blocks of the gates' matrices.
      taps: tokens that the short convolution sees.
      num_kv_heads, head_dim, layer_index, num_layers: accepted as every mixer does; not used.

    A document begins where its position is 0, as in the released code, or where a segment does: nothing is kept there.

    State: `RecurrentState`; the memory is `[B, D]` in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        taps: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_index: Any = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del num_kv_heads, head_dim, layer_index, num_layers
        if checks.check_count("width", width) % checks.check_count("num_heads", num_heads):
            raise ValueError(
                f"num_heads: a width of {width} does not divide by {num_heads} heads; choose a divisor of the width"
            )
        self.width, self.blocks = width, num_heads
        settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate_proj = nnx.Linear(width, width, **settings)
        self.in_proj = nnx.Linear(width, width, **settings)
        options: dict[str, Any] = {"activation": None, "use_bias": True, "param_dtype": param_dtype, "rngs": rngs}
        self.convolution = ShortConvolution(width, taps=taps, **options)
        self.rglru = RGLRU(width, num_heads, param_dtype=param_dtype, rngs=rngs)
        self.out_proj = nnx.Linear(width, width, kernel_init=nnx.initializers.zeros, **settings)

    def _system(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        past: Float[Array, "B past D"] | None,
    ) -> tuple[DSFSystem, Float[Array, "B past D"] | None]:
        starts = (positions == 0) | segment_starts(segment_ids, x)
        if past is not None:  # which the convolution takes for the first token's document
            past = jnp.where(starts[:, :1, None], 0, past)
        u, past = self.convolution(self.in_proj(x), segment_ids=jnp.cumsum(starts, axis=1), state=past)
        return self.rglru.as_dsf(u, starts), past

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: RecurrentState | None = None,
    ) -> tuple[Float[Array, "B T D"], RecurrentState | None]:
        memory, past = (None, None) if state is None else state
        system, past = self._system(x, positions, segment_ids, past)
        out, memory = _scan_channels(system, memory)
        return self.finish(x, out), None if memory is None or past is None else RecurrentState(memory, past)

    def as_dsf(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> DSFSystem:
        """The system of D channels with one state each, behind the convolution."""
        return self._system(x, numbered(x) if positions is None else positions, segment_ids, None)[0]

    def finish(self, x: Float[Array, "B T D"], out: Float[Array, "B T 1 D"]) -> Float[Array, "B T D"]:
        """The layer's output from its system's."""
        gate = jax.nn.gelu(self.gate_proj(x))
        return self.out_proj(gate * out[:, :, 0].astype(gate.dtype))

    def init_state(self, batch: int, capacity: int, dtype: Any) -> RecurrentState:
        """The memory in float32 or wider, the convolution's past in `dtype`; whatever the `capacity`."""
        return _init_channels(self.convolution, batch, dtype)

    def flops(self, batch: int, length: int) -> float:
        tokens = batch * length
        gates = 4.0 * tokens * self.width**2 / self.blocks
        linear = matrix_flops(tokens, self.gate_proj, self.in_proj, self.out_proj)
        return linear + gates + self.convolution.flops(tokens)


def _scan_channels(
    system: DSFSystem, memory: Float[Array, "B C"] | None
) -> tuple[Float[Array, "B T 1 C"], Float[Array, "B C"] | None]:
    """The outputs of a system with one state for every channel, and the state after it when one was given."""
    before = None if memory is None else memory[:, None, None]
    out, after = dsf_scan(system, initial_state=before, return_state=True)
    return out, None if memory is None else after[:, 0, 0]


def _init_channels(convolution: ShortConvolution, batch: int, dtype: Any) -> RecurrentState:
    memory = jnp.zeros((batch, convolution.features), checks.accumulator_dtype(dtype))
    return RecurrentState(memory, convolution.init_state(batch, dtype))
