"""The additive recurrence on GPU, where programs run side by side: states first, chunk after chunk, then all chunks.

    S' = total S + (k * write)^T v                       o  = scale ((q k^T) * pair v + (q * read) S)
    dS = total dS' + scale (q * read)^T do               dS' is the gradient of the state after a chunk

    a  = scale (q k^T) * pair      b = scale (do v^T) * pair
    dq = b k + scale read * (do S^T)      dk = b^T q + write * (v dS'^T)      dv = a^T do + (k * write) dS'
    db = rowsum(q * dq - k * dk), and the last row of db gains sum(S' * dS')

The states of all chunks go through device memory, as they do in flash-linear-attention: in exchange the second kernel
has a program for every chunk. They are made again for the backward pass, so that only the arguments are kept for it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.linear import gates, programs
from pallas_kernels.linear.programs import Problem
from pallas_kernels.linear.walk import shape


def _states_kernel(p: Problem, backward: bool, *refs: Any) -> None:
    """All states of a tile: before every chunk, or backward the gradients of those after it.

    Forward `a` and `b` are keys and values, backward they are queries and the gradients of outputs.
    """
    a_ref, b_ref, sums_ref, begin_ref, states_ref, end_ref = refs
    t, group = p.blocks.tile, p.group if backward else 1
    row, column = pl.program_id(1) * t, pl.program_id(2) * t
    exp = gates.exponential(p.dtype)
    tile = programs.state_tile(p, row, column)

    def turn(i: Any, state: jax.Array) -> jax.Array:
        chunk = p.chunks - 1 - i if backward else i
        plgpu.store(states_ref.at[(chunk, *tile.at)], state.astype(states_ref.dtype), mask=tile.mask)
        whole, last = programs.sums_of(p, sums_ref, chunk)
        inside = programs.total(whole) if backward else programs.total(z - x for x, z in zip(whole, last, strict=True))
        weight = (p.scale if backward else 1.0) * exp(inside)[:, None]
        state = exp(programs.total(last)) * state
        for n in range(group):
            a = programs.rows(p, a_ref, chunk, row, t, p.width, head=n)
            b = programs.rows(p, b_ref, chunk, column, t, p.value_width, head=n)
            state += programs.dot(p, a, (b * weight).astype(b.dtype), (0, 0))
        return state

    begin = plgpu.load(begin_ref.at[tile.at], mask=tile.mask, other=None if tile.mask is None else 0)
    state = jax.lax.fori_loop(0, p.chunks, turn, begin.astype(jnp.float32))
    plgpu.store(end_ref.at[tile.at], state, mask=tile.mask)


def _outputs_kernel(p: Problem, *refs: Any) -> None:
    q_ref, k_ref, v_ref, sums_ref, states_ref, o_ref = refs
    chunk, size = pl.program_id(0), min(p.blocks.value_tile, p.value_wide)
    column = pl.program_id(2) * size
    whole, _ = programs.sums_of(p, sums_ref, chunk)
    q = programs.rows(p, q_ref, chunk, 0, p.wide, p.width)
    k = programs.rows(p, k_ref, chunk, 0, p.wide, p.width)
    v = programs.rows(p, v_ref, chunk, column, size, p.value_width)
    scores = (programs.dot(p, q, k, (1, 1)) * programs.pair(p, whole)).astype(v.dtype)
    out = gates.exponential(p.dtype)(programs.total(whole))[:, None] * programs.dot(
        p, q, programs.state_of(p, states_ref, column, size)
    )
    programs.store_rows(p, o_ref, chunk, column, p.value_width, p.scale * (out + programs.dot(p, scores, v)))


def _gradients_kernel(p: Problem, *refs: Any) -> None:
    """Of one chunk and query head; what keys and values get through the state is the first head's of a group."""
    q_ref, k_ref, v_ref, do_ref, sums_ref, states_ref, after_ref, dq_ref, dk_ref, dv_ref, db_ref = refs
    chunk, exp, t = pl.program_id(0), gates.exponential(p.dtype), min(p.blocks.tile, p.value_wide)
    first = (pl.program_id(1) % p.group == 0).astype(jnp.float32)
    whole, last = programs.sums_of(p, sums_ref, chunk)
    write = first * exp(programs.total(z - x for x, z in zip(whole, last, strict=True)))[:, None]
    read, pair = p.scale * exp(programs.total(whole))[:, None], p.scale * programs.pair(p, whole)
    q = programs.rows(p, q_ref, chunk, 0, p.wide, p.width)
    k = programs.rows(p, k_ref, chunk, 0, p.wide, p.width)
    a = (programs.dot(p, q, k, (1, 1)) * pair).astype(q.dtype)

    def tile(i: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Value channels tile by tile: whole states would not leave registers for the sums."""
        b, dq, dk, kept = sums
        v = programs.rows(p, v_ref, chunk, i * t, t, p.value_width)
        do = programs.rows(p, do_ref, chunk, i * t, t, p.value_width)
        before, after = programs.state_of(p, states_ref, i * t, t), programs.state_of(p, after_ref, i * t, t)
        programs.store_rows(
            p, dv_ref, chunk, i * t, p.value_width, write * programs.dot(p, k, after) + programs.dot(p, a, do, (0, 0))
        )
        kept += jnp.sum(before.astype(jnp.float32) * after.astype(jnp.float32))
        return (
            b + programs.dot(p, do, v, (1, 1)),
            dq + programs.dot(p, do, before, (1, 1)),
            dk + programs.dot(p, v, after, (1, 1)),
            kept,
        )

    square, wide = ((p.blocks.chunk, n) for n in (p.blocks.chunk, p.wide))
    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in (square, wide, wide, ()))
    b, dq, dk, kept = jax.lax.fori_loop(0, p.value_wide // t, tile, zeros)
    dk *= write
    at_end = first * exp(programs.total(last)) * kept + jnp.sum(k * dk)
    b = (b * pair).astype(q.dtype)
    dq = read * dq + programs.dot(p, b, k)
    dk += programs.dot(p, b, q, (0, 0))
    programs.store_rows(p, dq_ref, chunk, 0, p.width, dq)
    programs.store_rows(p, dk_ref, chunk, 0, p.width, dk)
    ends = jnp.arange(p.blocks.chunk) == p.blocks.chunk - 1
    db = jnp.sum(q * dq - k * dk, axis=1) + jnp.where(ends, at_end, 0)
    db_ref[pl.ds(chunk * p.blocks.chunk, p.blocks.chunk)] = db


def _states(
    p: Problem, a: jax.Array, b: jax.Array, sums: jax.Array, begin: jax.Array, *, backward: bool = False
) -> tuple[jax.Array, jax.Array]:
    name = "linear_attention_state_gradients" if backward else "linear_attention_states"
    kernel = functools.partial(_states_kernel, p, backward)
    return programs.states(
        p, kernel, name, programs.sums_spec(p, axis=0), a, b, sums, begin, group=p.group if backward else 1
    )


def forward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sums: jax.Array,
    state: jax.Array,
    *,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, N, V]` and the state after the last token."""
    states, end = _states(p, key, value, sums, state)
    size, queries = min(p.blocks.value_tile, p.value_wide), p.heads * p.group
    values, tokens = -(-p.value_width // size) * size, programs.query_heads(p)
    out = programs.call(
        p,
        functools.partial(_outputs_kernel, p),
        "linear_attention_outputs",
        (p.chunks, p.batch * queries, values // size),
        p.blocks.warps[1],
        2 * p.batch * queries * p.padded * (p.blocks.chunk * (p.width + p.value_width) + p.width * p.value_width),
        in_specs=[
            tokens(p.wide),
            tokens(p.wide, shared=p.group),
            tokens(values, shared=p.group),
            programs.sums_spec(p, grouped=p.group, axis=1),
            programs.chunk_state_spec(p, values),
        ],
        out_specs=tokens(values),
        out_shape=shape((*query.shape[:3], p.value_width), out_dtype, query),
    )(query, key, value, sums, states)
    return out, end


def backward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sums: jax.Array,
    state: jax.Array,
    out_gradient: jax.Array,
    end_gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key, value, the initial state, and of the sums b `[B, K, padded]`."""
    states, _ = _states(p, key, value, sums, state)
    after, dstate = _states(p, query, out_gradient, sums, end_gradient, backward=True)
    queries, tokens = p.heads * p.group, programs.query_heads(p)
    by_query = (p.batch, p.length, queries)
    partial = jnp.float32 if p.group > 1 else p.dtype
    dq, dk, dv, db = programs.call(
        p,
        functools.partial(_gradients_kernel, p),
        "linear_attention_gradients",
        (p.chunks, p.batch * queries),
        p.blocks.warps[2],
        2
        * p.batch
        * queries
        * p.padded
        * (2 * p.blocks.chunk * (p.width + p.value_width) + 3 * p.width * p.value_width),
        in_specs=[
            tokens(p.wide),
            tokens(p.wide, shared=p.group),
            tokens(p.value_wide, shared=p.group),
            tokens(p.value_wide),
            programs.sums_spec(p, grouped=p.group, axis=1),
            *[programs.chunk_state_spec(p, p.value_wide)] * 2,
        ],
        out_specs=[
            tokens(p.wide),
            tokens(p.wide),
            tokens(p.value_wide),
            pl.BlockSpec((None, None, p.padded), lambda i, j: (j // queries, j % queries, 0)),
        ],
        out_shape=[
            shape(query.shape, p.dtype, query),
            shape((*by_query, p.width), partial, query),
            shape((*by_query, p.value_width), partial, query),
            shape((p.batch, queries, p.padded), jnp.float32, query),
        ],
    )(query, key, value, out_gradient, sums, states, after)
    if p.group > 1:
        dk, dv = (jnp.sum(x.reshape(*key.shape[:3], p.group, -1), axis=3).astype(p.dtype) for x in (dk, dv))
        db = jnp.sum(db.reshape(p.batch, p.heads, p.group, -1), axis=2)
    return dq, dk, dv, dstate, db
