"""The arithmetic of softmax attention on one tile of queries and keys; the blockwise and the banded path share it.

For queries q_t, keys k_s and values v_s of a tile, with everything but operands and outputs in the accumulator dtype:

    x_ts = scale <q_t, k_s> + bias_ts       z_ts = c tanh(x_ts / c)  with a soft cap c, else x_ts

Forward, over any number of tiles in any order, from m = -inf, l = 0, acc = 0 (with a sink: m = sink, l = 1):

    m' = max(m, max_s z_ts)             p_ts = exp(z_ts - m')
    l' = exp(m - m') l + sum_s p_ts     acc' = exp(m - m') acc + sum_s p_ts v_s
    o = acc / l,  lse = m + log l       (l = 0: o = 0, lse = -inf)

Backward, from lse and delta_t = <do_t, o_t> - dlse_t:

    p_ts = exp(z_ts - lse_t)  dz_ts = p_ts (<do_t, v_s> - delta_t)   dx_ts = dz_ts (1 - (z_ts / c)^2)
    dv_s = sum_t p_ts do_t    dq_t = scale sum_s dx_ts k_s           dk_s = scale sum_t dx_ts q_t      dbias_ts = dx_ts

A pair that is not allowed has p = dz = 0 by selection, never by a large negative number. The operands of the products
are multiplied by that 0: keys and values in a visited tile must be finite even where they are masked.

Queries are `[..., G, t, H]` (G query heads share one key head), keys `[..., s, H]`, values `[..., s, V]`, statistics
`[..., G, t]`; `allowed` and bias broadcast to `[..., G, t, s]`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jattn.checks import accumulator_dtype


class Score(NamedTuple):
    """How a product of query and key becomes a logit; static."""

    scale: float
    soft_cap: float | None


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


def _dot(spec: str, a: Array, b: Array) -> Array:
    """A product that keeps its operands' dtype and sums in the accumulator dtype."""
    return jnp.einsum(spec, a, b, preferred_element_type=accumulator_dtype(a.dtype))


def logits(query: Array, key: Array, bias: Array | None, score: Score) -> Float[Array, "... G t s"]:
    z = _dot("...gth,...sh->...gts", query, key) * score.scale
    if bias is not None:
        z = z + bias.astype(z.dtype)
    return z if score.soft_cap is None else score.soft_cap * jnp.tanh(z / score.soft_cap)


def initial_state(query: Array, value_dim: int, sinks: Float[Array, "... G"] | None) -> State:
    """The state before the first tile. It is made from `query` so that it is laid out over devices as the query is."""
    acc_dtype = accumulator_dtype(query.dtype)
    zero = jnp.zeros_like(query[..., 0], acc_dtype)
    acc = jnp.broadcast_to(zero[..., None], (*zero.shape, value_dim))
    if sinks is None:
        return State(zero - jnp.inf, zero, acc)
    return State(zero + sinks.astype(acc_dtype)[..., None], zero + 1, acc)


def absorb(
    state: State, query: Array, key: Array, value: Array, bias: Array | None, allowed: Bool[Array, ...] | None,
    score: Score,
) -> State:  # fmt: skip
    """The state after one more tile."""
    z = logits(query, key, bias, score)
    if allowed is not None:
        z = jnp.where(allowed, z, -jnp.inf)
    m = jnp.maximum(state.m, jnp.max(z, axis=-1))
    finite = jnp.where(m == -jnp.inf, 0, m)  # so that exp never meets inf - inf, and masked pairs give exp(-inf) = 0
    p = jnp.exp(z - finite[..., None])
    decay = jnp.exp(state.m - finite)
    l = state.l * decay + jnp.sum(p, axis=-1)
    acc = state.acc * decay[..., None] + _dot("...gts,...sv->...gtv", p.astype(value.dtype), value)
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


def gradients(
    query: Array, key: Array, value: Array, bias: Array | None, allowed: Bool[Array, ...] | None,
    shift: Array, delta: Array, d_out: Array, score: Score,
) -> Gradients:  # fmt: skip
    """What one tile adds to the gradients, all in the accumulator dtype."""
    z = logits(query, key, bias, score)
    p = jnp.exp(z - shift[..., None])
    dz = p * (_dot("...gtv,...sv->...gts", d_out, value) - delta[..., None])
    if score.soft_cap is not None:
        dz = dz * (1 - (z / score.soft_cap) ** 2)
    if allowed is not None:
        p, dz = jnp.where(allowed, p, 0), jnp.where(allowed, dz, 0)
    d_product = dz.astype(query.dtype)
    return Gradients(
        query=_dot("...gts,...sh->...gth", d_product, key) * score.scale,
        key=_dot("...gts,...gth->...sh", d_product, query) * score.scale,
        value=_dot("...gts,...gtv->...sv", p.astype(d_out.dtype), d_out),
        logits=dz,
    )
