"""The selective scan of Mamba: n states for every channel, with a time step that depends on the token.

    Delta_t = softplus(delta_t + delta_bias)
    h_t = exp(Delta_t A) * h_{t-1} + Delta_t u_t B_t^T          h [C, n]
    y_t = (h_t C_t + D * u_t) * silu(z_t)

In chunks: of the [T, C, n] states only one chunk's exist at a time, in the backward pass too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.linear import arguments
from jattn.linear.dsf import Mode, dsf_scan
from jattn.linear.dsf_systems import s6_dsf


def selective_scan(
    u: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D n"],
    B: Float[Array, "B T n"],
    C: Float[Array, "B T n"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B T D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    delta_softplus: bool = False,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B D n"] | None = None,
    return_state: bool = False,
    mode: Mode = "chunk",
    chunk_size: int | None = None,
) -> Any:
    """Mamba's `selective_scan_fn` (Gu and Dao 2023, algorithm 2) with its argument names; tokens stand before channels.

    Args:
      u: inputs.
      delta: time steps or, with `delta_softplus`, what they are the softplus of, after `delta_bias` is added.
      A: rates, negative for a state that decays.
      B, C: what writes to and reads from the states of all channels.
      D: of the input that passes the state by.
      z: logits of a SiLU gate on the output.
      segment_ids: packed sequences, non-decreasing along time; a token sees its own segment only. The initial state
        belongs to the first token's segment, the state returned to the last token's.
      initial_state: state before the first token, in the accumulator dtype (float32 or wider).
      return_state: also return the state after the last token.
      mode, chunk_size: see `dsf_scan`.

    Returns:
      `[B, T, D]` in the dtype of `u`, or `(that, [B, D, n])`.

    Raises:
      TypeError: a wrong dtype or type. ValueError: a wrong shape or option.
    """
    arguments.check_arrays(u=u, delta=delta, A=A, B=B, C=C)
    channels = (("u", u, "B T D"), ("delta", delta, "B T D"), ("z", z, "B T D"), ("delta_bias", delta_bias, "D"))
    sizes = checks.bind_shapes(*channels, ("A", A, "D n"))
    checks.bind_shapes(("B", B, "B T n"), ("C", C, "B T n"), ("initial_state", initial_state, "B D n"), **sizes)
    checks.bind_shapes(("D", D, "D"), **sizes)
    checks.check_floating(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    checks.check_flags(delta_softplus=delta_softplus)
    delta = delta.astype(checks.accumulator_dtype(delta.dtype))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = jax.nn.softplus(delta)
    system = s6_dsf(u, delta, A, B, C, D)._replace(segment_ids=segment_ids)
    before = None if initial_state is None else jnp.swapaxes(initial_state, 1, 2)[:, None]
    out, state = dsf_scan(system, initial_state=before, return_state=True, mode=mode, chunk_size=chunk_size)
    out = out[:, :, 0]
    if z is not None:
        out = (out * jax.nn.silu(z.astype(delta.dtype))).astype(u.dtype)
    return (out, jnp.swapaxes(state[:, 0], 1, 2)) if return_state else out


def selective_scan_step(
    u: Float[Array, "B D"],
    delta: Float[Array, "B D"],
    A: Float[Array, "D n"],
    B: Float[Array, "B n"],
    C: Float[Array, "B n"],
    state: Float[Array, "B D n"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    delta_softplus: bool = False,
) -> tuple[Float[Array, "B D"], Float[Array, "B D n"]]:
    """One token of `selective_scan`: the output and the state to pass with the next token."""
    if state is None:
        raise TypeError("state: expected an array, got None; start from zeros [B, D, n]")
    given = {"u": u, "delta": delta, "B": B, "C": C}
    arguments.check_arrays(**given, A=A)
    sizes = checks.bind_shapes(("u", u, "B D"), ("delta", delta, "B D"), ("z", z, "B D"), ("A", A, "D n"))
    checks.bind_shapes(("B", B, "B n"), ("C", C, "B n"), ("state", state, "B D n"), **sizes)
    accumulator = checks.accumulator_dtype(*(x.dtype for x in (*given.values(), A, delta_bias) if x is not None))
    if state.dtype != accumulator:
        raise TypeError(f"state: expected dtype {accumulator}, in which states are kept, got {state.dtype}")
    token: dict[str, Any] = {name: None if x is None else x[:, None] for name, x in {**given, "z": z}.items()}
    options: dict[str, Any] = {"D": D, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
    out, state = selective_scan(A=A, **token, **options, initial_state=state, return_state=True, mode="scan")
    return out[:, 0], state
