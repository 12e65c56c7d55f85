"""Dynamical systems: attention, linear attention, state space models and RNNs in one parametrisation.

    h_t = lam_t * h_{t-1} + beta_t * k_t v_t^T        h [n, p], lam_t = exp(step_t * rate)
    y_t = c_t^T h_t + D * v_t                         summed over n

or, written out, y = Phi v with the lower triangular Phi_{ij} = c_i^T (lam_i * .. * lam_{j+1} * beta_j k_j) + D [i = j]
for each of the p channels. A mixer is a choice of lam, beta, k, c and D (`jattn.linear.dsf_systems` has those of the
published ones), and any of them may be taken from another mixer. lam is kept as the logarithm's two factors, one that
varies along time and one that may not: an array [T, n, p] is never needed as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from jattn import checks
from jattn.linear import arguments, chunked
from jattn.linear.arguments import LinearState

Mode = Literal["scan", "associative", "chunk", "convolution"]

CHUNK = 64  # tokens whose states exist at the same time


class DSFSystem(NamedTuple):
    """The parts of a system. An axis may be 1 where a part does not vary along it; `value` has all of its axes.

    Attributes:
      step, rate: lam_t = exp(step_t * rate), the eigenvalues of the transition; `rate` may be complex.
      beta, key, value: beta_t * k_t v_t^T is added to the state.
      query: c_t, what is read of the state.
      skip: D, or `None` for 0.
      segment_ids: non-decreasing along time; lam is 0 where another segment begins. An initial state belongs to the
        first token's segment.
    """

    step: Float[Array, "B T N n p"]
    rate: Inexact[Array, "N n p"]
    beta: Float[Array, "B T N n p"]
    key: Inexact[Array, "B T N n p"]
    value: Inexact[Array, "B T N p"]
    query: Inexact[Array, "B T N n p"]
    skip: Float[Array, "N p"] | None = None
    segment_ids: Int[Array, "B T"] | None = None


def dsf_scan(
    system: DSFSystem,
    *,
    initial_state: Inexact[Array, "B N n p"] | None = None,
    return_state: bool = False,
    mode: Mode = "chunk",
    chunk_size: int | None = None,
) -> Any:
    """The outputs y of a system, token after token or faster.

    Args:
      system: its parts.
      initial_state: state before the first token, in the accumulator dtype: float32 or wider, complex where a part is.
      return_state: also return the state after the last token.
      mode: "scan" is the recurrence as it stands. "associative" computes all states [T, n, p] at once. "chunk" holds
        those of one chunk, also in the backward pass; where lam and the read-out do not depend on p it is causal linear
        attention in matrix products, in which the growth of a state within a chunk must be a number of its dtype.
        "convolution" is a Fourier transform along time, for a system of which only `value` varies along it.
      chunk_size: tokens in a chunk, a power of two; `None` chooses.

    Returns:
      `[B, T, N, p]` in the dtype of `value`, or complex where a part is, or `(that, state)`.

    Raises:
      TypeError: a wrong dtype or type. ValueError: a wrong shape or option, or what "convolution" cannot do.
    """
    sizes = check_system(system)
    checks.check_choice("mode", mode, get_args(Mode))
    checks.check_flags(return_state=return_state)
    arguments.check_chunk_size(chunk_size)
    accumulator = _accumulator(system)
    if initial_state is not None:
        checks.bind_shapes(("initial_state", initial_state, "B N n p"), **sizes)
        if initial_state.dtype != accumulator:
            raise TypeError(
                f"initial_state: expected dtype {accumulator}, in which states are kept, got {initial_state.dtype}"
            )
    if mode == "convolution":
        _check_convolution(system, sizes, initial_state is not None or return_state)
        return _convolve(system, accumulator).astype(_out_dtype(system))
    if mode == "chunk" and _is_attention(system, sizes):
        out, state = _attend(system, sizes, initial_state, chunk_size)
    else:
        run, size = {
            "scan": (_one_token, 1),
            "associative": (_associative, sizes["T"]),
            "chunk": (_associative, chunk_size or CHUNK),
        }[mode]
        state = jnp.zeros([sizes[a] for a in "BNnp"], accumulator) if initial_state is None else initial_state
        out, state = _in_pieces(system, state, run, min(size, sizes["T"]))
    out = out.astype(_out_dtype(system))
    return (out, state) if return_state else out


def dsf_materialize(system: DSFSystem) -> Inexact[Array, "B N T T"] | Inexact[Array, "B N T T p"]:
    """Phi of y = Phi v, for tests and pictures; with an axis for the channels p where they differ in more than `value`.

    Raises:
      TypeError, ValueError: as `dsf_scan`.
    """
    sizes = check_system(system)
    batch, length, heads = (sizes[a] for a in "BTN")
    lam = dsf_eigenvalues(system)
    accumulator = _accumulator(system)
    written = (system.beta * system.key).astype(accumulator)
    shape = jnp.broadcast_shapes(lam.shape, written.shape)
    written = jnp.moveaxis(jnp.broadcast_to(written, shape), 1, 0)
    tokens = jnp.arange(length)[:, None, None, None, None]

    def row(pasts: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        """What token i reads of each token j: pasts [j, B, N, n, p] holds lam_i .. lam_{j+1} beta_j k_j."""
        index, lam, query = token
        pasts = jnp.where(tokens == index, written, lam * pasts)
        return pasts, jnp.sum(query * pasts, axis=-2)

    over_time = (jnp.moveaxis(_along_time(x, length), 1, 0) for x in (lam, system.query))
    _, phi = jax.lax.scan(row, jnp.zeros_like(written), (jnp.arange(length), *over_time))  # [i, j, B, N, p]
    phi = jnp.broadcast_to(jnp.transpose(phi, (2, 3, 0, 1, 4)), (batch, heads, length, length, phi.shape[-1]))
    if system.skip is not None:
        phi += system.skip[:, None, None, :] * jnp.eye(length, dtype=phi.dtype)[:, :, None]
    return phi[..., 0] if phi.shape[-1] == 1 else phi


def dsf_eigenvalues(system: DSFSystem) -> Inexact[Array, "B T N n p"]:
    """lam of every token, 0 where a segment begins; axes n and p are 1 where lam does not vary along them."""
    sizes = check_system(system)
    accumulator = checks.accumulator_dtype(system.step.dtype, system.rate.dtype)
    lam = jnp.exp(system.step.astype(accumulator) * system.rate)
    lam = jnp.broadcast_to(lam, (*(sizes[a] for a in "BTN"), *lam.shape[3:]))
    if system.segment_ids is None:
        return lam
    starts = arguments.segment_starts(system.segment_ids, system.value)
    return jnp.where(starts[:, :, None, None, None], 0, lam)


def check_system(system: Any) -> dict[str, int]:
    """The sizes B, T, N, n and p of a system.

    Raises:
      TypeError: it is no `DSFSystem`, or a part is no array or has no floating or complex dtype.
      ValueError: a shape disagrees with that of `value` or, in n, with the other parts.
    """
    if not isinstance(system, DSFSystem):
        raise TypeError(f"system: expected a DSFSystem, got {type(system).__name__}")
    parts = {name: x for name, x in zip(system._fields, system, strict=True) if name != "segment_ids" and x is not None}
    for name, x in parts.items():
        checks.check_array(f"system.{name}", x)
        may_be_complex = name in ("rate", "key", "value", "query")
        if not jnp.issubdtype(x.dtype, jnp.inexact if may_be_complex else jnp.floating):
            raise TypeError(
                f"system.{name}: expected a floating{' or complex' * may_be_complex} dtype, got {x.dtype}; "
                "cast it with .astype(jnp.float32)"
            )
    sizes = checks.bind_shapes(("system.value", system.value, "B T N p"))
    checks.check_no_empty(sizes, "BTNp")
    states = {name: parts[name].shape[-2] for name in ("step", "rate", "beta", "key", "query") if parts[name].ndim > 1}
    sizes["n"] = max(states.values(), default=1)
    layouts = {"rate": "N n p", "skip": "N p"}
    for name, x in parts.items():
        if name != "value":
            letters = layouts.get(name, "B T N n p")
            checks.check_broadcastable(f"system.{name}", x, tuple(sizes[a] for a in letters.split()), letters)
    arguments.check_segment_ids(system.segment_ids, sizes)
    return sizes


def _accumulator(system: DSFSystem) -> Any:
    return checks.accumulator_dtype(*(x.dtype for x in system[:6]))


def _out_dtype(system: DSFSystem) -> Any:
    accumulator = _accumulator(system)
    return accumulator if jnp.issubdtype(accumulator, jnp.complexfloating) else system.value.dtype


def _along_time(x: Array, length: int) -> Array:
    return jnp.broadcast_to(x, (x.shape[0], length, *x.shape[2:]))


# States of a piece of the sequence, from lam and what is added, [B, t, N, n, p], and the state before it


def _one_token(lam: Array, added: Array, state: Array) -> Array:
    return lam * state[:, None] + added


def _associative(lam: Array, added: Array, state: Array) -> Array:
    added = jnp.concatenate([added[:, :1] + lam[:, :1] * state[:, None], added[:, 1:]], axis=1)

    def then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(then, (lam, added), axis=1)[1]


def _in_pieces(
    system: DSFSystem, state: Inexact[Array, "B N n p"], run: Callable[[Array, Array, Array], Array], size: int
) -> tuple[Inexact[Array, "B T N p"], Inexact[Array, "B N n p"]]:
    """A scan over pieces of `size` tokens, whose states `run` computes and which are forgotten once they are read."""
    batch, length = system.value.shape[:2]
    pieces = -(-length // size)
    starts = arguments.segment_starts(system.segment_ids, system.value)[:, :, None, None, None]
    parts = {
        "step": _along_time(system.step, length),  # a token beyond the last has a step of 0, and so changes nothing
        "beta": system.beta,
        "key": system.key,
        "value": system.value[:, :, :, None, :],
        "query": system.query,
        "starts": starts,
    }
    constant = {name: x for name, x in parts.items() if x.shape[1] != length}

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, size, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(state: Array, varying: dict[str, Array]) -> tuple[Array, Array]:
        part = constant | varying
        wide = {name: x.astype(checks.accumulator_dtype(x.dtype)) for name, x in part.items() if name != "starts"}
        lam = jnp.where(part["starts"], 0, jnp.exp(wide["step"] * system.rate)).astype(state.dtype)
        added = (wide["beta"] * wide["key"] * wide["value"]).astype(state.dtype)
        added = jnp.broadcast_to(added, (batch, added.shape[1], *state.shape[1:]))
        states = run(lam, added, state)
        out = jnp.sum(wide["query"] * states, axis=-2)
        if system.skip is not None:
            out += system.skip * wide["value"][..., 0, :]
        return states[:, -1], out.astype(_out_dtype(system))

    varying = {name: split(x) for name, x in parts.items() if name not in constant}
    if pieces == 1:
        state, out = piece(state, {name: x[0] for name, x in varying.items()})
        return out, state
    state, out = jax.lax.scan(piece, state, varying)
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(batch, -1, *out.shape[3:])[:, :length], state


def _is_attention(system: DSFSystem, sizes: dict[str, int]) -> bool:
    """Whether matrix products do it: scores instead of states, which are cheaper where a head has some n."""
    alike = (system.step, system.rate, system.key, system.query)
    separable = 1 in system.beta.shape[3:]
    is_real = not jnp.issubdtype(_accumulator(system), jnp.complexfloating)
    return is_real and sizes["n"] > 1 and separable and all(x.shape[-1] == 1 for x in alike)


def _attend(
    system: DSFSystem, sizes: dict[str, int], state: Float[Array, "B N n p"] | None, chunk_size: int | None
) -> tuple[Float[Array, "B T N p"], Float[Array, "B N n p"]]:
    """The system as causal linear attention; not by the public op, which refuses decays above 1."""
    shape = tuple(sizes[a] for a in "BTNn")
    accumulator = _accumulator(system)
    key, value, dtype = system.key, system.value, system.value.dtype
    if system.beta.shape[4] == 1:
        key = key * system.beta
    else:
        value = (value * system.beta[..., 0, :]).astype(dtype)
    query, key = (jnp.broadcast_to(x[..., 0], shape).astype(dtype) for x in (system.query, key))
    log_decay = (system.step.astype(accumulator) * system.rate)[..., 0]
    if log_decay.shape[0] == log_decay.shape[1] == log_decay.shape[3] == 1:
        log_decay = jnp.broadcast_to(log_decay[0, 0, :, 0], shape[2])
    elif log_decay.shape[3] == 1:
        log_decay = jnp.broadcast_to(log_decay[..., 0], shape[:3])
    else:
        log_decay = jnp.broadcast_to(log_decay, shape)
    out, state = chunked.causal(
        query,
        key,
        value,
        arguments.clamp(log_decay, accumulator),
        system.segment_ids,
        arguments.packed(None if state is None else LinearState(state, None), key, value, accumulator),
        scale=1.0,
        chunk_size=chunk_size,
        out_dtype=accumulator,
    )
    if system.skip is not None:
        out += system.skip * system.value
    return out, state


def _convolve(system: DSFSystem, accumulator: Any) -> Inexact[Array, "B T N p"]:
    """y = w * v with w_t = c^T (lam^t * beta k), D beside w_0."""
    length = system.value.shape[1]
    wide = checks.accumulator_dtype(system.step.dtype)  # bfloat16 has no 257
    age = jnp.arange(length, dtype=wide)[:, None, None, None]
    powers = jnp.exp(age * (system.step.astype(wide) * system.rate)[:, 0, None])  # [B, T, N, n, p]; B and p may be 1
    kernel = jnp.sum(system.query * powers[..., :, :] * system.beta * system.key, axis=-2).astype(accumulator)
    if system.skip is not None:
        kernel = kernel.at[:, 0].add(system.skip)
    is_complex = jnp.issubdtype(accumulator, jnp.complexfloating)
    forward, back = (jnp.fft.fft, jnp.fft.ifft) if is_complex else (jnp.fft.rfft, jnp.fft.irfft)
    spectrum = forward(kernel, 2 * length, axis=1) * forward(system.value.astype(accumulator), 2 * length, axis=1)
    return back(spectrum, 2 * length, axis=1)[:, :length]


def _check_convolution(system: DSFSystem, sizes: dict[str, int], has_state: bool) -> None:
    if has_state:
        raise ValueError(
            "initial_state, return_state: mode 'convolution' has no state; 'scan', 'associative' and 'chunk' carry one"
        )
    if system.segment_ids is not None:
        raise ValueError("system.segment_ids: mode 'convolution' sees across segments; use another mode")
    for name in ("step", "beta", "key", "query"):
        length = getattr(system, name).shape[1]
        if length != 1:
            raise ValueError(
                f"system.{name}: mode 'convolution' needs a part that does not vary along time, [B, 1, N, n, p], got "
                f"{length} of {sizes['T']} tokens; use another mode"
            )
