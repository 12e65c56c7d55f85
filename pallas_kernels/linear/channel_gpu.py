"""The additive recurrence with a decay for every key channel on GPU: states first, then all chunks side by side.

    S' = exp(b_C) S + (k * exp(b_C - b))^T v             o  = scale (A v + (q * exp b) S)
    dS = exp(b_C) dS' + scale (q * exp b)^T do           dS' is the gradient of the state after a chunk

A[r, j] = sum_h q[r, h] k[j, h] exp(b[r, h] - b[j, h]) is made by halves of halves of a chunk, as in `channel_tpu`:
where r lies in the second half of a block of 2 s rows and j in its first, with m the row where the second begins,

    A[r, j] = (q * d)[r] . (k * d)[j]                    d = exp(-|b - b_m|)

and s = C / 2, C / 4, .., 1 are all pairs but the diagonal. With p = scale do v^T of the pairs of a level,

    dq = sum (p (k * d)) * d + scale exp(b) * (do S^T)             over levels, and p k for the diagonal
    dk = sum (p^T (q * d)) * d + exp(b_C - b) * (v dS'^T)
    dv = scale A^T do + (k * exp(b_C - b)) dS'
    dg = sum from a row to the last of its chunk of q * dq - k * dk, and rowsum(S' * dS')

A goes through device memory, so that the kernels that multiply by it leave the levels' rows out of their registers.
Gradients of channels of keys are made tile by tile for the same reason.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.linear import gates, programs
from pallas_kernels.linear.programs import Blocks, Problem
from pallas_kernels.linear.walk import shape


def choose(dtype: Any) -> Blocks:
    """Read off registers and spills in `python -m pallas_kernels.lab report --family linear --targets h100`."""
    return Blocks() if dtype == jnp.bfloat16 else Blocks(value_tile=64, warps=(8, 8, 8), stages=1)


def _tile(p: Problem) -> int:
    """Key channels that a program works on at a time: as many bytes of them for either dtype."""
    return min(p.blocks.tile * 2 // p.dtype.itemsize, p.wide)


def _narrow(p: Problem) -> int:
    """The same for gradients, which with twice as many would need every register that there is."""
    return max(16, _tile(p) // 2)


def _sums_of(p: Problem, ref: Any, chunk: Any, first: Any, size: int, rows: Any = None) -> list[jax.Array]:
    """The parts of b of a chunk, `size` channels from `first` on, for every row or for those of its `rows`."""
    start, square, mask = chunk * p.blocks.chunk, (p.blocks.chunk, size), None
    columns = jnp.broadcast_to((first + jnp.arange(size))[None], square)
    if p.width % size:
        mask = columns < p.width
    place: Any = pl.ds(start, p.blocks.chunk)
    channel: Any = pl.ds(first, size)
    if rows is not None:
        place, channel = jnp.broadcast_to((start + rows)[:, None], square), columns
    at = [ref.at[jnp.int32(i), place, jnp.int32(0), channel] for i in range(gates.parts(p.dtype))]
    return [plgpu.load(x, mask=mask, other=None if mask is None else 0) for x in at]


def _last_of(p: Problem, ref: Any, chunk: Any, first: Any, size: int) -> list[jax.Array]:
    mask = first + jnp.arange(size) < p.width if p.width % size else None
    place = (chunk + 1) * p.blocks.chunk - 1
    at = [ref.at[jnp.int32(i), place, jnp.int32(0), pl.ds(first, size)] for i in range(gates.parts(p.dtype))]
    return [plgpu.load(x, mask=mask, other=None if mask is None else 0) for x in at]


def _exp_of(p: Problem, parts: Sequence[jax.Array]) -> jax.Array:
    return gates.exponential(p.dtype)(programs.total(parts))


def _until_end(p: Problem, sums: Sequence[jax.Array], last: Sequence[jax.Array]) -> jax.Array:
    """exp(b_C - b)."""
    return _exp_of(p, [z[None] - x for x, z in zip(sums, last, strict=True)])


def _level(
    p: Problem, ref: Any, chunk: Any, first: Any, sums: Sequence[jax.Array], i: Any
) -> tuple[jax.Array, jax.Array]:
    """For s = C / 2, C / 4, ..: d of all rows, and which rows meet which columns."""
    place, halvings = jnp.arange(p.blocks.chunk), _levels(p) - 1 - i
    half = place >> halvings
    middle = _sums_of(p, ref, chunk, first, sums[0].shape[1], rows=(half | 1) << halvings)
    since = programs.total(x - m for x, m in zip(sums, middle, strict=True))
    # Comparing one number of a row with one of a column leaves no square of integers in registers.
    pairs = jnp.where(half & 1 == 1, half, -1)[:, None] == (half + 1)[None, :]
    return gates.exponential(p.dtype)(-jnp.abs(since)), pairs


def _levels(p: Problem) -> int:
    return p.blocks.chunk.bit_length() - 1


def _diagonal(p: Problem) -> jax.Array:
    place = jnp.arange(p.blocks.chunk)
    return place[:, None] == place[None, :]


def _sums_kernel(p: Problem, gate_ref: Any, sums_ref: Any) -> None:
    chunk, size = pl.program_id(0), _tile(p)
    first = pl.program_id(2) * size
    gate = jnp.maximum(programs.rows(p, gate_ref, chunk, first, size, p.width), gates.FORGET)
    mask = None
    if p.width % size:
        mask = jnp.broadcast_to((first + jnp.arange(size) < p.width)[None], gate.shape)
    for i, part in enumerate(gates.split(gate, p.dtype)):
        where = jnp.int32(i), pl.ds(chunk * p.blocks.chunk, p.blocks.chunk), jnp.int32(0), pl.ds(first, size)
        plgpu.store(sums_ref.at[where], jnp.cumsum(part, axis=0), mask=mask)


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
        sums, last = _sums_of(p, sums_ref, chunk, row, t), _last_of(p, sums_ref, chunk, row, t)
        weight = p.scale * _exp_of(p, sums) if backward else _until_end(p, sums, last)
        state = _exp_of(p, last)[:, None] * state
        for n in range(group):
            a = programs.rows(p, a_ref, chunk, row, t, p.width, head=n)
            b = programs.rows(p, b_ref, chunk, column, t, p.value_width, head=n)
            state += programs.dot(p, (a * weight).astype(a.dtype), b, (0, 0))
        return state

    begin = plgpu.load(begin_ref.at[tile.at], mask=tile.mask, other=None if tile.mask is None else 0)
    state = jax.lax.fori_loop(0, p.chunks, turn, begin.astype(jnp.float32))
    plgpu.store(end_ref.at[tile.at], state, mask=tile.mask)


def _scores_kernel(p: Problem, q_ref: Any, k_ref: Any, sums_ref: Any, scores_ref: Any) -> None:
    chunk, size, t = pl.program_id(0), p.blocks.chunk, _tile(p)

    def tile(i: Any, scores: jax.Array) -> jax.Array:
        q = programs.rows(p, q_ref, chunk, i * t, t, p.width)
        k = programs.rows(p, k_ref, chunk, i * t, t, p.width)
        own = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1)
        scores += jnp.where(_diagonal(p), own[:, None], 0)
        sums = _sums_of(p, sums_ref, chunk, i * t, t)

        def turn(level: Any, scores: jax.Array) -> jax.Array:
            decay, pairs = _level(p, sums_ref, chunk, i * t, sums, level)
            late, early = (q * decay).astype(q.dtype), (k * decay).astype(k.dtype)
            return scores + jnp.where(pairs, programs.dot(p, late, early, (1, 1)), 0)

        return jax.lax.fori_loop(0, _levels(p), turn, scores)

    scores = jax.lax.fori_loop(0, -(-p.width // t), tile, jnp.zeros((size, size), jnp.float32))
    scores_ref[...] = scores.astype(scores_ref.dtype)


def _outputs_kernel(p: Problem, *refs: Any) -> None:
    q_ref, v_ref, sums_ref, scores_ref, states_ref, o_ref = refs
    chunk, size = pl.program_id(0), min(p.blocks.value_tile, p.value_wide)
    column = pl.program_id(2) * size
    t, v = _tile(p), programs.rows(p, v_ref, chunk, column, size, p.value_width)

    def tile(i: Any, out: jax.Array) -> jax.Array:
        q = programs.rows(p, q_ref, chunk, i * t, t, p.width)
        read = (q * _exp_of(p, _sums_of(p, sums_ref, chunk, i * t, t))).astype(q.dtype)
        return out + programs.dot(p, read, _state_tile(p, states_ref, i * t, t, column, size))

    out = jax.lax.fori_loop(0, -(-p.width // t), tile, programs.dot(p, scores_ref[...], v))
    programs.store_rows(p, o_ref, chunk, column, p.value_width, p.scale * out)


def _value_gradients_kernel(p: Problem, *refs: Any) -> None:
    """What values get through the state is the first query head's of a group."""
    k_ref, do_ref, sums_ref, scores_ref, after_ref, dv_ref = refs
    chunk, size = pl.program_id(0), min(p.blocks.value_tile, p.value_wide)
    column = pl.program_id(2) * size
    t, first = _tile(p), _first(p)
    do = programs.rows(p, do_ref, chunk, column, size, p.value_width)

    def tile(i: Any, dv: jax.Array) -> jax.Array:
        k = programs.rows(p, k_ref, chunk, i * t, t, p.width)
        sums, last = _sums_of(p, sums_ref, chunk, i * t, t), _last_of(p, sums_ref, chunk, i * t, t)
        written = (first * k * _until_end(p, sums, last)).astype(k.dtype)
        return dv + programs.dot(p, written, _state_tile(p, after_ref, i * t, t, column, size))

    direct = p.scale * programs.dot(p, scores_ref[...], do, (0, 0))
    dv = jax.lax.fori_loop(0, -(-p.width // t), tile, direct)
    programs.store_rows(p, dv_ref, chunk, column, p.value_width, dv)


def _first(p: Problem) -> jax.Array:
    return (pl.program_id(1) % p.group == 0).astype(jnp.float32)


def _gradients_kernel(p: Problem, *refs: Any) -> None:
    """Of a tile of the key channels of one chunk and query head; what they get through the state as for values."""
    q_ref, k_ref, v_ref, do_ref, sums_ref, states_ref, after_ref, dq_ref, dk_ref, dg_ref = refs
    chunk, size, t = pl.program_id(0), p.blocks.chunk, _narrow(p)
    row, wide = pl.program_id(2) * t, min(p.blocks.tile, p.value_wide)

    def through(i: Any, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        weights, dq, dk, kept = found
        v = programs.rows(p, v_ref, chunk, i * wide, wide, p.value_width)
        do = programs.rows(p, do_ref, chunk, i * wide, wide, p.value_width)
        before, after = (_state_tile(p, ref, row, t, i * wide, wide) for ref in (states_ref, after_ref))
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
    sums, last = _sums_of(p, sums_ref, chunk, row, t), _last_of(p, sums_ref, chunk, row, t)
    weights *= p.scale
    dq *= p.scale * _exp_of(p, sums)
    dk *= _first(p) * _until_end(p, sums, last)
    at_end = _first(p) * _exp_of(p, last) * kept + jnp.sum(k * dk, axis=0)
    own = jnp.sum(jnp.where(_diagonal(p), weights, 0), axis=1)[:, None]
    dq += own * k
    dk += own * q

    def turn(level: Any, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dq, dk = found
        decay, pairs = _level(p, sums_ref, chunk, row, sums, level)
        weight = jnp.where(pairs, weights, 0).astype(q.dtype)
        dq += decay * programs.dot(p, weight, (k * decay).astype(k.dtype))
        dk += decay * programs.dot(p, weight, (q * decay).astype(q.dtype), (0, 0))
        return dq, dk

    dq, dk = jax.lax.fori_loop(0, _levels(p), turn, (dq, dk))
    programs.store_rows(p, dq_ref, chunk, row, p.width, dq)
    programs.store_rows(p, dk_ref, chunk, row, p.width, dk)
    programs.store_rows(p, dg_ref, chunk, row, p.width, at_end[None] + _sum_to_end(p, q * dq - k * dk))


def _state_tile(p: Problem, ref: Any, row: Any, rows: int, column: Any, columns: int) -> jax.Array:
    where, mask = (pl.ds(row, rows), pl.ds(column, columns)), None
    if p.width % rows or p.value_width % columns:
        mask = (row + jnp.arange(rows) < p.width)[:, None] & (column + jnp.arange(columns) < p.value_width)[None]
    return plgpu.load(ref.at[where], mask=mask, other=None if mask is None else 0)


def _sum_to_end(p: Problem, x: jax.Array) -> jax.Array:
    """Of every row and those after it, by products: of bfloat16 for the upper and the lower half of the bits."""
    place = jnp.arange(p.blocks.chunk)
    after = (place[:, None] <= place[None, :]).astype(p.dtype)
    high = x.astype(p.dtype)
    out = programs.dot(p, after, high)
    if p.dtype != jnp.float32:
        out += programs.dot(p, after, (x - high.astype(jnp.float32)).astype(p.dtype))
    return out


def _sums(p: Problem, log_decay: jax.Array) -> jax.Array:
    """The parts of b, `[B, parts, padded, K, H]`; gates after the last token are 0."""
    t, parts = _tile(p), gates.parts(p.dtype)
    wide = -(-p.width // t) * t

    def head(i: Any, j: Any, *_: Any) -> Any:
        return j // p.heads, 0, j % p.heads, 0

    return programs.call(
        p,
        functools.partial(_sums_kernel, p),
        "channel_linear_attention_sums",
        (p.chunks, p.batch * p.heads, wide // t),
        p.blocks.warps[1],
        parts * log_decay.size,
        in_specs=[pl.BlockSpec((None, p.padded, 1, wide), head)],
        out_specs=_sums_spec(p, wide, axis=1),
        out_shape=shape((p.batch, parts, p.padded, p.heads, p.width), jnp.float32, log_decay),
    )(log_decay)


def _sums_spec(p: Problem, wide: int, *, grouped: int = 1, axis: int) -> pl.BlockSpec:
    """Of the key head of a program, as `programs.sums_spec`."""

    def index(*at: Any) -> Any:
        head = at[axis] // grouped
        return head // p.heads, 0, 0, head % p.heads, 0

    return pl.BlockSpec((None, gates.parts(p.dtype), p.padded, 1, wide), index)


def _states(
    p: Problem, a: jax.Array, b: jax.Array, sums: jax.Array, begin: jax.Array, *, backward: bool = False
) -> tuple[jax.Array, jax.Array]:
    name = "channel_linear_attention_state_gradients" if backward else "channel_linear_attention_states"
    kernel = functools.partial(_states_kernel, p, backward)
    return programs.states(
        p,
        kernel,
        name,
        _sums_spec(p, -(-p.width // p.blocks.tile) * p.blocks.tile, axis=0),
        a,
        b,
        sums,
        begin,
        group=p.group if backward else 1,
    )


def _scores_spec(p: Problem) -> pl.BlockSpec:
    queries, size = p.heads * p.group, p.blocks.chunk
    return pl.BlockSpec((None, None, size, size), lambda i, j, *_: (j // queries, j % queries, i, 0))


def _scores(p: Problem, query: jax.Array, key: jax.Array, sums: jax.Array) -> jax.Array:
    """A of every chunk, `[B, N, padded, C]` in the operands' dtype."""
    queries, tokens, size = p.heads * p.group, programs.query_heads(p), p.blocks.chunk
    return programs.call(
        p,
        functools.partial(_scores_kernel, p),
        "channel_linear_attention_scores",
        (p.chunks, p.batch * queries),
        p.blocks.warps[1],
        2 * p.batch * queries * p.padded * size * p.width * _levels(p),
        in_specs=[tokens(p.wide), tokens(p.wide, shared=p.group), _sums_spec(p, p.wide, grouped=p.group, axis=1)],
        out_specs=_scores_spec(p),
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
    values, tokens = -(-p.value_width // size) * size, programs.query_heads(p)
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
            _sums_spec(p, p.wide, grouped=p.group, axis=1),
            _scores_spec(p),
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
    size, t = min(p.blocks.value_tile, p.value_wide), _narrow(p)
    values, wide = -(-p.value_width // size) * size, -(-p.width // t) * t
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
            _sums_spec(p, p.wide, grouped=p.group, axis=1),
            _scores_spec(p),
            programs.chunk_state_spec(p, values),
        ],
        out_specs=tokens(values),
        out_shape=shape((*by_query, p.value_width), partial, query),
    )(key, out_gradient, sums, _scores(p, query, key, sums), after)
    per_token = p.blocks.chunk * (2 * _levels(p) * p.width + wide // t * p.value_width) + 2 * p.width * p.value_width
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
            _sums_spec(p, wide, grouped=p.group, axis=1),
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
