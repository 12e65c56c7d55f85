"""The additive recurrence with a decay for every key channel on GPU: states first, then all chunks side by side.

    S' = exp(b_C) S + (k * exp(b_C - b))^T v             o  = scale (A v + (q * exp b) S)
    dS = exp(b_C) dS' + scale (q * exp b)^T do           dS' is the gradient of the state after a chunk

A[r, j] = sum_h q[r, h] k[j, h] exp(b[r, h] - b[j, h]) is made as `levels` says. With the decays d of a level and
p = scale do v^T of its pairs,

    dq = sum (p (k * d)) * d + scale exp(b) * (do S^T)             over levels, and p k for the diagonal
    dk = sum (p^T (q * d)) * d + exp(b_C - b) * (v dS'^T)
    dv = scale A^T do + (k * exp(b_C - b)) dS'
    dg = sum from a row to the last of its chunk of q * dq - k * dk, and rowsum(S' * dS')

A goes through device memory, so that the kernels that multiply by it leave the levels' rows out of their registers.
Gradients of channels of keys are made tile by tile for the same reason.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.linear import gates, levels, programs
from pallas_kernels.linear.programs import Blocks, Problem
from pallas_kernels.linear.walk import shape


def choose(dtype: Any) -> Blocks:
    """Read off registers and spills in `python -m pallas_kernels.lab report --family linear --targets h100`."""
    return Blocks() if dtype == jnp.bfloat16 else Blocks(value_tile=64, warps=(8, 8, 8), stages=1)


def _sums_kernel(p: Problem, gate_ref: Any, sums_ref: Any) -> None:
    size = levels.tile(p)
    levels.summed(p, gate_ref, sums_ref, pl.program_id(0), pl.program_id(2) * size, size)


def _states_kernel(p: Problem, backward: bool, *refs: Any) -> None:
    """All states of a tile: before every chunk, or backward the gradients of those after it.

    Forward `a` and `b` are keys and values, backward they are queries and the gradients of outputs.
    """
    a_ref, b_ref, sums_ref, begin_ref, states_ref, end_ref = refs
    t, group = p.blocks.tile, p.group if backward else 1
    row, column = pl.program_id(1) * t, pl.program_id(2) * t
    tile = programs.state_tile(p, row, column)

    def turn(i: Any, state: jax.Array) -> jax.Array:
        chunk = p.chunks - 1 - i if backward else i
        plgpu.store(states_ref.at[(chunk, *tile.at)], state.astype(states_ref.dtype), mask=tile.mask)
        sums, last = levels.sums_of(p, sums_ref, chunk, row, t), levels.last_of(p, sums_ref, chunk, row, t)
        weight = p.scale * levels.exp_of(p, sums) if backward else levels.until_end(p, sums, last)
        state = levels.exp_of(p, last)[:, None] * state
        for n in range(group):
            a = programs.rows(p, a_ref, chunk, row, t, p.width, head=n)
            b = programs.rows(p, b_ref, chunk, column, t, p.value_width, head=n)
            state += programs.dot(p, (a * weight).astype(a.dtype), b, (0, 0))
        return state

    begin = plgpu.load(begin_ref.at[tile.at], mask=tile.mask, other=None if tile.mask is None else 0)
    state = jax.lax.fori_loop(0, p.chunks, turn, begin.astype(jnp.float32))
    plgpu.store(end_ref.at[tile.at], state, mask=tile.mask)


def _scores_kernel(p: Problem, q_ref: Any, k_ref: Any, sums_ref: Any, scores_ref: Any) -> None:
    (scores,) = levels.scores(p, q_ref, k_ref, sums_ref, pl.program_id(0))
    scores_ref[...] = scores.astype(scores_ref.dtype)


def _outputs_kernel(p: Problem, *refs: Any) -> None:
    q_ref, v_ref, sums_ref, scores_ref, states_ref, o_ref = refs
    chunk, size = pl.program_id(0), min(p.blocks.value_tile, p.value_wide)
    column = pl.program_id(2) * size
    t, v = levels.tile(p), programs.rows(p, v_ref, chunk, column, size, p.value_width)

    def tile(i: Any, out: jax.Array) -> jax.Array:
        q = programs.rows(p, q_ref, chunk, i * t, t, p.width)
        read = (q * levels.exp_of(p, levels.sums_of(p, sums_ref, chunk, i * t, t))).astype(q.dtype)
        return out + programs.dot(p, read, levels.state_tile(p, states_ref, i * t, t, column, size))

    out = jax.lax.fori_loop(0, -(-p.width // t), tile, programs.dot(p, scores_ref[...], v))
    programs.store_rows(p, o_ref, chunk, column, p.value_width, p.scale * out)


def _value_gradients_kernel(p: Problem, *refs: Any) -> None:
    """What values get through the state is the first query head's of a group."""
    k_ref, do_ref, sums_ref, scores_ref, after_ref, dv_ref = refs
    chunk, size = pl.program_id(0), min(p.blocks.value_tile, p.value_wide)
    column = pl.program_id(2) * size
    t, first = levels.tile(p), levels.first_of_group(p)
    do = programs.rows(p, do_ref, chunk, column, size, p.value_width)

    def tile(i: Any, dv: jax.Array) -> jax.Array:
        k = programs.rows(p, k_ref, chunk, i * t, t, p.width)
        sums, last = levels.sums_of(p, sums_ref, chunk, i * t, t), levels.last_of(p, sums_ref, chunk, i * t, t)
        written = (first * k * levels.until_end(p, sums, last)).astype(k.dtype)
        return dv + programs.dot(p, written, levels.state_tile(p, after_ref, i * t, t, column, size))

    direct = p.scale * programs.dot(p, scores_ref[...], do, (0, 0))
    dv = jax.lax.fori_loop(0, -(-p.width // t), tile, direct)
    programs.store_rows(p, dv_ref, chunk, column, p.value_width, dv)


def _gradients_kernel(p: Problem, *refs: Any) -> None:
    """Of a tile of the key channels of one chunk and query head; what they get through the state as for values."""
    q_ref, k_ref, v_ref, do_ref, sums_ref, states_ref, after_ref, dq_ref, dk_ref, dg_ref = refs
    chunk, size, t = pl.program_id(0), p.blocks.chunk, levels.narrow(p)
    row, wide = pl.program_id(2) * t, min(p.blocks.tile, p.value_wide)

    def through(i: Any, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        weights, dq, dk, kept = found
        v = programs.rows(p, v_ref, chunk, i * wide, wide, p.value_width)
        do = programs.rows(p, do_ref, chunk, i * wide, wide, p.value_width)
        before, after = (levels.state_tile(p, ref, row, t, i * wide, wide) for ref in (states_ref, after_ref))
        return (
            weights + programs.dot(p, do, v, (1, 1)),
            dq + programs.dot(p, do, before, (1, 1)),
            dk + programs.dot(p, v, after, (1, 1)),
            kept + jnp.sum(before.astype(jnp.float32) * after.astype(jnp.float32), axis=1),
        )

    zeros = tuple(jnp.zeros(sizes, jnp.float32) for sizes in ((size, size), (size, t), (size, t), (t,)))
    weights, dq, dk, kept = jax.lax.fori_loop(0, p.value_wide // wide, through, zeros)
    q = programs.rows(p, q_ref, chunk, row, t, p.width)
    k = programs.rows(p, k_ref, chunk, row, t, p.width)
    sums, last = levels.sums_of(p, sums_ref, chunk, row, t), levels.last_of(p, sums_ref, chunk, row, t)
    weights *= p.scale
    dq *= p.scale * levels.exp_of(p, sums)
    dk *= levels.first_of_group(p) * levels.until_end(p, sums, last)
    at_end = levels.first_of_group(p) * levels.exp_of(p, last) * kept + jnp.sum(k * dk, axis=0)
    own = jnp.sum(jnp.where(levels.diagonal(p), weights, 0), axis=1)[:, None]
    dq += own * k
    dk += own * q

    def turn(level: levels.Level, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dq, dk = found
        weight = jnp.where(level.pairs, weights, 0).astype(q.dtype)
        dq += level.late * programs.dot(p, weight, (k * level.early).astype(k.dtype))
        dk += level.early * programs.dot(p, weight, (q * level.late).astype(q.dtype), (0, 0))
        return dq, dk

    dq, dk = levels.over(p, sums_ref, chunk, row, sums, turn, (dq, dk))
    programs.store_rows(p, dq_ref, chunk, row, p.width, dq)
    programs.store_rows(p, dk_ref, chunk, row, p.width, dk)
    programs.store_rows(p, dg_ref, chunk, row, p.width, at_end[None] + levels.sum_to_end(p, q * dq - k * dk))


def _sums(p: Problem, log_decay: jax.Array) -> jax.Array:
    """The parts of b, `[B, parts, padded, K, H]`; gates after the last token are 0."""
    t, parts = levels.tile(p), gates.parts(p.dtype)
    wide = levels.up_to(p.width, t)
    return programs.call(
        p,
        functools.partial(_sums_kernel, p),
        "channel_linear_attention_sums",
        (p.chunks, p.batch * p.heads, wide // t),
        p.blocks.warps[1],
        parts * log_decay.size,
        in_specs=[programs.state_heads(p, wide, axis=1)],
        out_specs=levels.sums_spec(p, wide, axis=1),
        out_shape=shape(levels.sums_shape(p), jnp.float32, log_decay),
    )(log_decay)


def _states(
    p: Problem, a: jax.Array, b: jax.Array, sums: jax.Array, begin: jax.Array, *, backward: bool = False
) -> tuple[jax.Array, jax.Array]:
    name = "channel_linear_attention_state_gradients" if backward else "channel_linear_attention_states"
    kernel = functools.partial(_states_kernel, p, backward)
    return programs.states(
        p,
        kernel,
        name,
        levels.sums_spec(p, levels.up_to(p.width, p.blocks.tile), axis=0),
        a,
        b,
        sums,
        begin,
        group=p.group if backward else 1,
    )


def _scores(p: Problem, query: jax.Array, key: jax.Array, sums: jax.Array) -> jax.Array:
    """A of every chunk, `[B, N, padded, C]` in the operands' dtype."""
    queries, tokens, size = p.heads * p.group, programs.query_heads(p), p.blocks.chunk
    return programs.call(
        p,
        functools.partial(_scores_kernel, p),
        "channel_linear_attention_scores",
        (p.chunks, p.batch * queries),
        p.blocks.warps[1],
        2 * p.batch * queries * p.padded * size * p.width,
        in_specs=[tokens(p.wide), tokens(p.wide, shared=p.group), levels.sums_spec(p, p.wide, grouped=p.group, axis=1)],
        out_specs=levels.scores_spec(p),
        out_shape=shape((p.batch, queries, p.padded, size), p.dtype, query),
    )(query, key, sums)


def forward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, N, V]` and the state after the last token."""
    sums = _sums(p, log_decay)
    states, end = _states(p, key, value, sums, state)
    size, queries = min(p.blocks.value_tile, p.value_wide), p.heads * p.group
    values, tokens = levels.up_to(p.value_width, size), programs.query_heads(p)
    out = programs.call(
        p,
        functools.partial(_outputs_kernel, p),
        "channel_linear_attention_outputs",
        (p.chunks, p.batch * queries, values // size),
        p.blocks.warps[1],
        2 * p.batch * queries * p.padded * p.value_width * (p.blocks.chunk + p.width),
        in_specs=[
            tokens(p.wide),
            tokens(values, shared=p.group),
            levels.sums_spec(p, p.wide, grouped=p.group, axis=1),
            levels.scores_spec(p),
            programs.chunk_state_spec(p, values),
        ],
        out_specs=tokens(values),
        out_shape=shape((*query.shape[:3], p.value_width), out_dtype, query),
    )(query, value, sums, _scores(p, query, key, sums), states)
    return out, end


def backward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    out_gradient: jax.Array,
    end_gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key, value, the gates and the initial state."""
    sums = _sums(p, log_decay)
    states, _ = _states(p, key, value, sums, state)
    after, dstate = _states(p, query, out_gradient, sums, end_gradient, backward=True)
    queries, tokens = p.heads * p.group, programs.query_heads(p)
    by_query = (p.batch, p.length, queries)
    partial = jnp.float32 if p.group > 1 else p.dtype
    size, t = min(p.blocks.value_tile, p.value_wide), levels.narrow(p)
    values, wide = levels.up_to(p.value_width, size), levels.up_to(p.width, t)
    dv = programs.call(
        p,
        functools.partial(_value_gradients_kernel, p),
        "channel_linear_attention_value_gradients",
        (p.chunks, p.batch * queries, values // size),
        p.blocks.warps[1],
        2 * p.batch * queries * p.padded * p.value_width * (p.blocks.chunk + p.width),
        in_specs=[
            tokens(p.wide, shared=p.group),
            tokens(values),
            levels.sums_spec(p, p.wide, grouped=p.group, axis=1),
            levels.scores_spec(p),
            programs.chunk_state_spec(p, values),
        ],
        out_specs=tokens(values),
        out_shape=shape((*by_query, p.value_width), partial, query),
    )(key, out_gradient, sums, _scores(p, query, key, sums), after)
    per_token = p.blocks.chunk * (2 * p.width + wide // t * p.value_width) + 2 * p.width * p.value_width
    dq, dk, dg = programs.call(
        p,
        functools.partial(_gradients_kernel, p),
        "channel_linear_attention_gradients",
        (p.chunks, p.batch * queries, wide // t),
        p.blocks.warps[2],
        2 * p.batch * queries * p.padded * per_token,
        in_specs=[
            tokens(wide),
            tokens(wide, shared=p.group),
            tokens(p.value_wide, shared=p.group),
            tokens(p.value_wide),
            levels.sums_spec(p, wide, grouped=p.group, axis=1),
            *[programs.chunk_state_spec(p, p.value_wide)] * 2,
        ],
        out_specs=[tokens(wide)] * 3,
        out_shape=[
            shape(query.shape, p.dtype, query),
            shape((*by_query, p.width), partial, query),
            shape((*by_query, p.width), jnp.float32, query),
        ],
    )(query, key, value, out_gradient, sums, states, after)
    if p.group > 1:
        dk, dv, dg = (jnp.sum(x.reshape(*key.shape[:3], p.group, -1), axis=3) for x in (dk, dv, dg))
    return dq, dk.astype(p.dtype), dv.astype(p.dtype), jnp.where(log_decay > gates.FORGET, dg, 0), dstate
