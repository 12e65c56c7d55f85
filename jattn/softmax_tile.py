"""The arithmetic of softmax attention on one tile of queries and keys; the blockwise and the banded path share it.

For queries q_t, keys k_s and values v_s of a tile, with everything but operands and outputs in the accumulator dtype:

    y_ts = scale <q_t, k_s> + bias_ts       x_ts = f(y_ts)       z_ts = c tanh(x_ts / c)  with a soft cap c, else x_ts

f is the identity or a function that the caller gives, differentiated by JAX; r_ts is 1 or, with dropout, at random 0 or
1 / (1 - rate). Forward, over any number of tiles in any order, from m = -inf, l = 0, acc = 0 (with a sink: m = sink,
l = 1):

    m' = max(m, max_s z_ts)             p_ts = exp(z_ts - m')
    l' = exp(m - m') l + sum_s p_ts     acc' = exp(m - m') acc + sum_s r_ts p_ts v_s
    o = acc / l,  lse = m + log l       (l = 0: o = 0, lse = -inf)

Backward, from lse and delta_t = <do_t, o_t> - dlse_t:

    p_ts = exp(z_ts - lse_t)      dz_ts = p_ts (r_ts <do_t, v_s> - delta_t)   dx_ts = dz_ts (1 - (z_ts / c)^2)
    dy_ts = f'(y_ts) dx_ts        dq_t = scale sum_s dy_ts k_s                dk_s = scale sum_t dy_ts q_t
    dbias_ts = dy_ts              dv_s = sum_t r_ts p_ts do_t

A pair that is not allowed has p = dz = 0 by selection, never by a large negative number. The operands of the products
are multiplied by that 0: keys and values in a visited tile must be finite even where they are masked.

Queries are `[..., G, t, H]` (G query heads share one key head), keys `[..., s, H]`, values `[..., s, V]`, statistics
`[..., G, t]`; `allowed` and bias broadcast to `[..., G, t, s]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jattn.checks import accumulator_dtype


class Score(NamedTuple):
    """How a product of query and key becomes a logit; static."""

    scale: float
    soft_cap: float | None


class Tile(NamedTuple):
    """What is attended to; the fields from `bias` on may be `None` and broadcast to `[..., G, t, s]`.

    Attributes:
      allowed: who sees whom.
      keep: what dropout multiplies a probability by, 0 or 1 / (1 - rate).
      modify: the function f, `modify(y, parameters) -> x`, with its differentiable `parameters`.
    """

    query: Float[Array, "... G t H"]
    key: Float[Array, "... s H"]
    value: Float[Array, "... s V"]
    bias: Float[Array, ...] | None = None
    allowed: Bool[Array, ...] | None = None
    keep: Float[Array, ...] | None = None
    modify: Callable[[Array, Any], Array] | None = None
    parameters: Any = None


class State(NamedTuple):
    """The running maximum, the sum of exponentials and the weighted sum of values."""

    m: Float[Array, "... G t"]
    l: Float[Array, "... G t"]
    acc: Float[Array, "... G t V"]


class Gradients(NamedTuple):
    """What one tile adds to the gradients."""

    query: Float[Array, "... G t H"]
    key: Float[Array, "... s H"]
    value: Float[Array, "... s V"]
    logits: Float[Array, "... G t s"]
    parameters: Any


def _dot(spec: str, a: Array, b: Array) -> Array:
    """A product that keeps its operands' dtype and sums in the accumulator dtype."""
    return jnp.einsum(spec, a, b, preferred_element_type=accumulator_dtype(a.dtype))


def _scores(tile: Tile, score: Score) -> Float[Array, "... G t s"]:
    y = _dot("...gth,...sh->...gts", tile.query, tile.key) * score.scale
    return y if tile.bias is None else y + tile.bias.astype(y.dtype)


def _capped(x: Array, score: Score) -> Array:
    return x if score.soft_cap is None else score.soft_cap * jnp.tanh(x / score.soft_cap)


def initial_state(query: Array, value_dim: int, sinks: Float[Array, "... G"] | None) -> State:
    """The state before the first tile. It is made from `query` so that it is laid out over devices as the query is."""
    acc_dtype = accumulator_dtype(query.dtype)
    zero = jnp.zeros_like(query[..., 0], acc_dtype)
    acc = jnp.broadcast_to(zero[..., None], (*zero.shape, value_dim))
    if sinks is None:
        return State(zero - jnp.inf, zero, acc)
    return State(zero + sinks.astype(acc_dtype)[..., None], zero + 1, acc)


def absorb(state: State, tile: Tile, score: Score) -> State:
    """The state after one more tile."""
    y = _scores(tile, score)
    z = _capped(y if tile.modify is None else tile.modify(y, tile.parameters), score)
    if tile.allowed is not None:
        z = jnp.where(tile.allowed, z, -jnp.inf)
    m = jnp.maximum(state.m, jnp.max(z, axis=-1))
    finite = jnp.where(m == -jnp.inf, 0, m)  # so that exp never meets inf - inf, and masked pairs give exp(-inf) = 0
    p = jnp.exp(z - finite[..., None])
    decay = jnp.exp(state.m - finite)
    l = state.l * decay + jnp.sum(p, axis=-1)
    kept = p if tile.keep is None else p * tile.keep
    acc = state.acc * decay[..., None] + _dot("...gts,...sv->...gtv", kept.astype(tile.value.dtype), tile.value)
    return State(m, l, acc)


def finish(state: State) -> tuple[Float[Array, "... G t V"], Float[Array, "... G t"]]:
    """Output, still in the accumulator dtype, and log-sum-exp."""
    seen = state.l > 0
    l = jnp.where(seen, state.l, 1)
    return state.acc / l[..., None], jnp.where(seen, state.m + jnp.log(l), -jnp.inf)


def row_statistics(out: Array, lse: Array, d_out: Array, d_lse: Array) -> tuple[Float[Array, ...], Float[Array, ...]]:
    """`(shift, delta)` for `gradients`; for arrays of any layout whose last axis is V, or is missing.

    A row that saw nothing gets shift = +inf and delta = 0: all its p and dz are exactly 0.
    """
    delta = jnp.sum(out.astype(lse.dtype) * d_out.astype(lse.dtype), axis=-1) - d_lse
    dead = lse == -jnp.inf
    return jnp.where(dead, jnp.inf, lse), jnp.where(dead, 0, delta)


def sink_gradient(sinks: Array, shift: Array, delta: Array, axes: tuple[int, ...]) -> Array:
    """`-sum exp(sink - lse) delta` over `axes`; `sinks` broadcasts against the statistics."""
    return -jnp.sum(jnp.exp(sinks.astype(shift.dtype) - shift) * delta, axis=axes)


def gradients(tile: Tile, shift: Array, delta: Array, d_out: Array, score: Score) -> Gradients:
    """What one tile adds to the gradients, all in the accumulator dtype."""
    x, d_parameters = _scores(tile, score), None
    if tile.modify is not None:
        x, pull_back = jax.vjp(tile.modify, x, tile.parameters)
    z = _capped(x, score)
    shifted = z - shift[..., None]
    if tile.allowed is not None:  # before exp: elsewhere it may be infinite, and 0 times that is a derivative of NaN
        shifted = jnp.where(tile.allowed, shifted, -jnp.inf)
    p = jnp.exp(shifted)
    d_p = _dot("...gtv,...sv->...gts", d_out, tile.value)
    dy = p * ((d_p if tile.keep is None else d_p * tile.keep) - delta[..., None])
    if score.soft_cap is not None:
        dy = dy * (1 - (z / score.soft_cap) ** 2)
    if tile.allowed is not None:
        dy = jnp.where(tile.allowed, dy, 0)
    if tile.modify is not None:
        dy, d_parameters = pull_back(dy)
        if tile.allowed is not None:  # elsewhere the caller's derivative may be anything
            dy = jnp.where(tile.allowed, dy, 0)
    if tile.keep is not None:
        p = p * tile.keep
    d_product = dy.astype(tile.query.dtype)
    return Gradients(
        query=_dot("...gts,...sh->...gth", d_product, tile.key) * score.scale,
        key=_dot("...gts,...gth->...sh", d_product, tile.query) * score.scale,
        value=_dot("...gts,...gtv->...sv", p.astype(d_out.dtype), d_out),
        logits=dy,
        parameters=d_parameters,
    )
