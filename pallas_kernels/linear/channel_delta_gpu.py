"""The delta rule with a decay for every key channel on GPU: chunks side by side, and one walk over states between them.

beta stands for a diagonal matrix; read = exp b, write = exp(b_C - b) and total = exp b_C are decays of every channel.

    P[r, j] = sum_h k[r, h] k[j, h] exp(b[r, h] - b[j, h]), r > j          W = P (I + beta P)^-1
    A[r, j] = sum_h q[r, h] k[j, h] exp(b[r, h] - b[j, h]), r >= j         u = beta e
    r = v - (k * read) S       e = r - W (beta r)                          S' = total S + (k * write)^T u
    o = scale (A u + (q * read) S)

P and A are made by levels, as `levels` says, and W from P as in `delta_gpu`. Backward, with the gradient dS' of the
state after a chunk and the decays d of a level, for late rows and early columns of dA = scale do u^T and dP = -dr u^T:

    du = scale A^T do + (k * write) dS'      dy = du - W^T (beta du)      dv = dr = beta dy      dbeta = rowsum(dy * e)
    dS = total dS' + scale (q * read)^T do - (k * read)^T dr
    dq = sum d * (dA (k * d)) + scale read * (do S^T)                         over levels, and dA k for the diagonal
    dk_row = sum d * (dP (k * d)) - read * (dr S^T)
    dk_column = sum d * (dA^T (q * d) + dP^T (k * d)) + write * (u dS'^T)     dk = dk_row + dk_column
    db = q * dq + k * dk_row - k * dk_column, and the last row of db gains rowsum(S' * dS')

A gate's gradient is the sum of db over later rows, where nearly all cancels. So db is summed from factors as rounded as
those of the products, and without the diagonal, which cancels wholly.

The walk over states waits for itself, chunk after chunk. What it multiplies by, k * read, k * write and scale q * read,
is therefore made beforehand, for all chunks at once, where the gates are summed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.linear import delta_gpu, gates, levels, programs
from pallas_kernels.linear.programs import Blocks, Problem
from pallas_kernels.linear.walk import shape


def choose(dtype: Any) -> Blocks:
    """Read off registers and spills in `python -m pallas_kernels.lab report --family linear --targets h100`."""
    return Blocks() if dtype == jnp.bfloat16 else Blocks(tile=32, value_tile=64, warps=(8, 8, 8), stages=1)


def _decays_kernel(p: Problem, *refs: Any) -> None:
    """The sums b of a tile of the key channels of one chunk and state, and what the state meets decayed."""
    q_ref, k_ref, gate_ref, sums_ref, read_ref, write_ref, queries_ref = refs
    chunk, t = pl.program_id(0), levels.tile(p)
    first = pl.program_id(2) * t
    sums = levels.summed(p, gate_ref, sums_ref, chunk, first, t)
    at_end = (jnp.arange(p.blocks.chunk) == p.blocks.chunk - 1)[:, None]
    last = [jnp.sum(jnp.where(at_end, x, 0), axis=0) for x in sums]
    read = levels.exp_of(p, sums)
    k = programs.rows(p, k_ref, chunk, first, t, p.width)
    programs.store_rows(p, read_ref, chunk, first, p.width, k * read)
    programs.store_rows(p, write_ref, chunk, first, p.width, k * levels.until_end(p, sums, last))
    for n in range(p.group):
        q = programs.rows(p, q_ref, chunk, first, t, p.width, head=n)
        programs.store_rows(p, queries_ref, chunk, first, p.width, p.scale * (q * read), head=n)


def _systems_kernel(p: Problem, backward: bool, *refs: Any) -> None:
    """W of one chunk and query head, and scale A beta; backward instead of that du as far as it is scale A^T do."""
    q_ref, k_ref, sums_ref, beta_ref, *rest = refs
    chunk = pl.program_id(0)
    _, beta = delta_gpu.betas(p, beta_ref, chunk)
    alike, a = levels.scores(p, q_ref, k_ref, sums_ref, chunk, of_keys=True)
    if backward:
        do_ref, w_ref, du_ref = rest
        t, a = min(p.blocks.tile, p.value_wide), (p.scale * a).astype(p.dtype)

        @pl.loop(0, pl.cdiv(p.value_width, t))
        def _(i: Any) -> None:
            do = programs.rows(p, do_ref, chunk, i * t, t, p.value_width)
            programs.store_rows(p, du_ref, chunk, i * t, p.value_width, programs.dot(p, a, do, (0, 0)))
    else:
        w_ref, a_ref = rest
        a_ref[...] = (p.scale * beta * a).astype(a_ref.dtype)
    # All query heads of a group find the same W.
    w_ref[...] = delta_gpu.solved(p, alike, beta).astype(w_ref.dtype)


def _total(p: Problem, sums_ref: Any, chunk: Any) -> jax.Array:
    return levels.exp_of(p, levels.last_of(p, sums_ref, chunk, 0, p.wide))[:, None]


def _states_kernel(p: Problem, *refs: Any) -> None:
    """Columns of all states of a head, each before its chunk, and of e."""
    read_ref, write_ref, v_ref, sums_ref, beta_ref, w_ref, begin_ref, states_ref, e_ref, end_ref = refs
    size = delta_gpu.columns(p)
    column = pl.program_id(1) * size

    def turn(chunk: Any, state: jax.Array) -> jax.Array:
        entered = state.astype(p.dtype)
        delta_gpu.store_state(p, states_ref, column, entered, chunk)
        beta, _ = delta_gpu.betas(p, beta_ref, chunk)
        read = programs.rows(p, read_ref, chunk, 0, p.wide, p.width)
        rest = programs.rows(p, v_ref, chunk, column, size, p.value_width) - programs.dot(p, read, entered)
        e = rest - programs.dot(p, w_ref[chunk], (beta * rest).astype(p.dtype))
        programs.store_rows(p, e_ref, chunk, column, p.value_width, e)
        write = programs.rows(p, write_ref, chunk, 0, p.wide, p.width)
        return _total(p, sums_ref, chunk) * state + programs.dot(p, write, (beta * e).astype(p.dtype), (0, 0))

    state = jax.lax.fori_loop(0, p.chunks, turn, programs.state_of(p, begin_ref, column, size))
    delta_gpu.store_state(p, end_ref, column, state)


def _outputs_kernel(p: Problem, *refs: Any) -> None:
    queries_ref, e_ref, a_ref, states_ref, o_ref = refs
    chunk, size = pl.program_id(0), min(p.blocks.value_tile, p.value_wide)
    column = pl.program_id(2) * size
    q = programs.rows(p, queries_ref, chunk, 0, p.wide, p.width)
    e = programs.rows(p, e_ref, chunk, column, size, p.value_width)
    out = programs.dot(p, q, programs.state_of(p, states_ref, column, size)) + programs.dot(p, a_ref[...], e)
    programs.store_rows(p, o_ref, chunk, column, p.value_width, out)


def _state_gradients_kernel(p: Problem, *refs: Any) -> None:
    """Columns of the gradients of all states of a head, each after its chunk, and of dy."""
    queries_ref, read_ref, write_ref, do_ref, du_ref, sums_ref, beta_ref, w_ref, begin_ref, *outs = refs
    after_ref, dy_ref, end_ref = outs
    size = delta_gpu.columns(p)
    column = pl.program_id(1) * size

    def turn(i: Any, gradient: jax.Array) -> jax.Array:
        chunk = p.chunks - 1 - i
        left = gradient.astype(p.dtype)
        delta_gpu.store_state(p, after_ref, column, left, chunk)
        beta, _ = delta_gpu.betas(p, beta_ref, chunk)
        write = programs.rows(p, write_ref, chunk, 0, p.wide, p.width)
        du = programs.rows(p, du_ref, chunk, column, size, p.value_width) + programs.dot(p, write, left)
        dy = du - programs.dot(p, w_ref[chunk], (beta * du).astype(p.dtype), (0, 0))
        programs.store_rows(p, dy_ref, chunk, column, p.value_width, dy)
        read = programs.rows(p, read_ref, chunk, 0, p.wide, p.width)
        gradient = _total(p, sums_ref, chunk) * gradient
        gradient -= programs.dot(p, read, (beta * dy).astype(p.dtype), (0, 0))
        for n in range(p.group):
            q = programs.rows(p, queries_ref, chunk, 0, p.wide, p.width, head=n)
            do = programs.rows(p, do_ref, chunk, column, size, p.value_width, head=n)
            gradient += programs.dot(p, q, do, (0, 0))
        return gradient

    gradient = jax.lax.fori_loop(0, p.chunks, turn, programs.state_of(p, begin_ref, column, size))
    delta_gpu.store_state(p, end_ref, column, gradient)


def _gradients_kernel(p: Problem, *refs: Any) -> None:
    """Of a tile of the key channels of one chunk and query head; the first head of a group has what is the state's."""
    q_ref, k_ref, do_ref, e_ref, dy_ref, sums_ref, beta_ref, states_ref, after_ref, *outs = refs
    dq_ref, dk_ref, dg_ref, dv_ref, dbeta_ref = outs
    chunk, size, t = pl.program_id(0), p.blocks.chunk, levels.narrow(p)
    row, wide = pl.program_id(2) * t, min(t, p.value_wide)
    beta, along = delta_gpu.betas(p, beta_ref, chunk)
    first = levels.first_of_group(p)
    # Values and beta have no channels of keys: one of the programs writes their gradients.
    alone = (pl.program_id(2) == 0) & (pl.program_id(1) % p.group == 0)

    def through(i: Any, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        da, dp, dq, by_row, by_column, kept, dbeta = found
        do = programs.rows(p, do_ref, chunk, i * wide, wide, p.value_width)
        e = programs.rows(p, e_ref, chunk, i * wide, wide, p.value_width)
        dy = programs.rows(p, dy_ref, chunk, i * wide, wide, p.value_width)
        before, after = (levels.state_tile(p, ref, row, t, i * wide, wide) for ref in (states_ref, after_ref))
        programs.store_rows(p, dv_ref, chunk, i * wide, p.value_width, beta * dy, only=alone)
        return (
            da + programs.dot(p, do, e, (1, 1)),
            dp + programs.dot(p, dy, e, (1, 1)),
            dq + programs.dot(p, do, before, (1, 1)),
            by_row + programs.dot(p, dy, before, (1, 1)),
            by_column + programs.dot(p, e, after, (1, 1)),
            kept + jnp.sum(before.astype(jnp.float32) * after.astype(jnp.float32), axis=1),
            dbeta + jnp.sum(dy.astype(jnp.float32) * e.astype(jnp.float32), axis=1),
        )

    square, tall = (size, size), (size, t)
    zeros = tuple(jnp.zeros(x, jnp.float32) for x in (square, square, tall, tall, tall, (t,), (size,)))
    da, dp, dq, by_row, by_column, kept, dbeta = jax.lax.fori_loop(0, pl.cdiv(p.value_width, wide), through, zeros)
    here = pl.ds(chunk * size, size)
    plgpu.store(dbeta_ref.at[here], dbeta, mask=jnp.broadcast_to(alone, (size,)))
    da *= p.scale * along
    dp *= -first * beta * along
    by_row *= -first * beta
    by_column *= first * beta
    q = programs.rows(p, q_ref, chunk, row, t, p.width)
    k = programs.rows(p, k_ref, chunk, row, t, p.width)
    sums, last = levels.sums_of(p, sums_ref, chunk, row, t), levels.last_of(p, sums_ref, chunk, row, t)
    read, write = levels.exp_of(p, sums), levels.until_end(p, sums, last)
    of_write = (k * write).astype(p.dtype) * by_column
    db = (p.scale * (q * read)).astype(p.dtype) * dq + (k * read).astype(p.dtype) * by_row - of_write
    at_end = first * levels.exp_of(p, last) * kept + jnp.sum(of_write, axis=0)
    own = jnp.sum(jnp.where(levels.diagonal(p), da, 0), axis=1)[:, None]
    dq = p.scale * read * dq + own * k
    dk = read * by_row + write * by_column + own * q

    def turn(level: levels.Level, found: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        dq, dk, db = found
        queries, late = ((x * level.late).astype(p.dtype) for x in (q, k))
        early = (k * level.early).astype(p.dtype)
        of_a, of_p = (jnp.where(level.pairs, x, 0).astype(p.dtype) for x in (da, dp))
        of_queries, of_late = programs.dot(p, of_a, early), programs.dot(p, of_p, early)
        of_early = programs.dot(p, of_a, queries, (0, 0)) + programs.dot(p, of_p, late, (0, 0))
        db += queries * of_queries + late * of_late - early * of_early
        return dq + level.late * of_queries, dk + level.late * of_late + level.early * of_early, db

    dq, dk, db = levels.over(p, sums_ref, chunk, row, sums, turn, (dq, dk, db))
    programs.store_rows(p, dq_ref, chunk, row, p.width, dq)
    programs.store_rows(p, dk_ref, chunk, row, p.width, dk)
    programs.store_rows(p, dg_ref, chunk, row, p.width, at_end[None] + levels.sum_to_end(p, db))


def _decays(p: Problem, query: jax.Array, key: jax.Array, log_decay: jax.Array) -> list[jax.Array]:
    """The parts of b, `[B, parts, padded, K, H]`, and of every state k * read, k * write and scale q * read."""
    t, heads = levels.tile(p), functools.partial(programs.state_heads, p, axis=1)
    wide = levels.up_to(p.width, t)
    keys = shape((p.batch, p.length, p.heads, p.width), p.dtype, key)
    return programs.call(
        p,
        functools.partial(_decays_kernel, p),
        "channel_delta_rule_decays",
        (p.chunks, p.batch * p.heads, wide // t),
        p.blocks.warps[1],
        (gates.parts(p.dtype) + 4 + p.group) * log_decay.size,
        in_specs=[heads(wide, count=p.group, shared=p.shared), heads(wide, shared=p.shared), heads(wide)],
        out_specs=[levels.sums_spec(p, wide, axis=1), *[heads(wide)] * 2, heads(wide, count=p.group)],
        out_shape=[
            shape(levels.sums_shape(p), jnp.float32, log_decay),
            *[keys] * 2,
            shape((p.batch, p.length, p.heads * p.group, p.width), p.dtype, query),
        ],
    )(query, key, log_decay)


def _systems(
    p: Problem, query: jax.Array, key: jax.Array, sums: jax.Array, beta: jax.Array, *backward: jax.Array
) -> list[jax.Array]:
    """W `[B, K, chunks, C, C]` and scale A beta `[B, N, padded, C]`, or du `[B, T, K, V]` so far, given do."""
    c, queries, tokens = p.blocks.chunk, p.heads * p.group, programs.query_heads(p)
    systems = shape((p.batch, p.heads, p.chunks, c, c), p.dtype, key)
    per_token = c * p.width * 2 + 2 * c**2 * (levels.count(p) - 1)
    if backward:
        partial = jnp.float32 if p.group > 1 else p.dtype
        spec, out = tokens(p.value_wide), shape((p.batch, p.length, queries, p.value_width), partial, query)
        per_token += c * p.value_width
    else:
        spec, out = levels.scores_spec(p), shape((p.batch, queries, p.padded, c), p.dtype, query)
    found, more = programs.call(
        p,
        functools.partial(_systems_kernel, p, bool(backward)),
        "channel_delta_rule_systems_and_gradients" if backward else "channel_delta_rule_systems",
        (p.chunks, p.batch * queries),
        p.blocks.warps[2],
        2 * p.batch * queries * p.padded * per_token,
        in_specs=[
            tokens(p.wide, shared=p.shared),
            tokens(p.wide, shared=p.group * p.shared),
            levels.sums_spec(p, p.wide, grouped=p.group, axis=1),
            programs.per_state(p, p.padded, axis=1, grouped=p.group),
            *[tokens(p.value_wide)] * len(backward),
        ],
        out_specs=[programs.per_chunk(p, c, c, grouped=p.group), spec],
        out_shape=[systems, out],
    )(query, key, sums, beta, *backward)
    if backward and p.group > 1:
        more = jnp.sum(more.reshape(*more.shape[:2], p.heads, p.group, -1), axis=3).astype(p.dtype)
    return [found, more]


def _walk(p: Problem, kernel: Any, name: str, products: int, arrays: dict[str, jax.Array]) -> list[jax.Array]:
    """See `delta_gpu.walk`."""
    if p.wide > 128 or products > 4:
        # Rows of so many channels for two turns would not fit the shared memory.
        p = dataclasses.replace(p, blocks=dataclasses.replace(p.blocks, warps=(8, 8, 8), stages=1))
    return delta_gpu.walk(
        p, kernel, f"channel_delta_rule_{name}", products, arrays, levels.sums_spec(p, p.wide, axis=0)
    )


def _states(
    p: Problem, read: jax.Array, write: jax.Array, value: jax.Array, rows: dict[str, jax.Array], state: jax.Array
) -> list[jax.Array]:
    arrays = {"read keys": read, "written keys": write, "value": value, **rows, "state": state}
    return _walk(p, _states_kernel, "states", 2, arrays)


def forward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, O, V]`, O the larger of query heads and states, and the state after the last token."""
    sums, read, write, queries = _decays(p, query, key, log_decay)
    systems, a = _systems(p, query, key, sums, beta)
    rows = {"sums": sums, "beta": beta, "systems": systems}
    states, errors, end = _states(p, read, write, value, rows, state)
    size, heads = min(p.blocks.value_tile, p.value_wide), p.heads * p.group
    values, tokens = levels.up_to(p.value_width, size), programs.query_heads(p)
    out = programs.call(
        p,
        functools.partial(_outputs_kernel, p),
        "channel_delta_rule_outputs",
        (p.chunks, p.batch * heads, values // size),
        p.blocks.warps[1],
        2 * p.batch * heads * p.padded * p.value_width * (p.blocks.chunk + p.width),
        in_specs=[
            tokens(p.wide),
            tokens(values, shared=p.group),
            levels.scores_spec(p),
            programs.chunk_state_spec(p, values),
        ],
        out_specs=tokens(values),
        out_shape=shape((p.batch, p.length, heads, p.value_width), out_dtype, query),
    )(queries, errors, a, states)
    return out, end


def backward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    out_gradient: jax.Array,
    end_gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key, value, the initial state, the gates and beta, the last `[B, K, padded]`."""
    sums, read, write, queries = _decays(p, query, key, log_decay)
    systems, du = _systems(p, query, key, sums, beta, out_gradient)
    rows = {"sums": sums, "beta": beta, "systems": systems}
    states, errors, _ = _states(p, read, write, value, rows, state)
    arrays = {"state queries": queries, "read keys": read, "written keys": write, "out": out_gradient, "value": du}
    arrays |= {**rows, "state": end_gradient}
    after, dy, dstate = _walk(p, _state_gradients_kernel, "state_gradients", 2 + p.group, arrays)
    t, heads, tokens = levels.narrow(p), p.heads * p.group, programs.query_heads(p)
    wide = levels.up_to(p.width, t)
    per_token = p.blocks.chunk * (4 * p.width + 2 * wide // t * p.value_width)
    per_token += 3 * p.width * p.value_width
    values, betas = tokens(p.value_wide, shared=p.group), programs.per_state(p, p.padded, axis=1, grouped=p.group)
    by_query = (p.batch, p.length, heads, p.width)
    dq, dk, dg, dv, dbeta = programs.call(
        p,
        functools.partial(_gradients_kernel, p),
        "channel_delta_rule_gradients",
        (p.chunks, p.batch * heads, wide // t),
        p.blocks.warps[2],
        2 * p.batch * heads * p.padded * per_token,
        in_specs=[
            tokens(wide, shared=p.shared),
            tokens(wide, shared=p.group * p.shared),
            tokens(p.value_wide),
            *[values] * 2,
            levels.sums_spec(p, wide, grouped=p.group, axis=1),
            betas,
            *[programs.chunk_state_spec(p, p.value_wide)] * 2,
        ],
        out_specs=[*[tokens(wide)] * 3, values, betas],
        out_shape=[
            shape(by_query, jnp.float32 if p.shared > 1 else p.dtype, query),
            shape(by_query, jnp.float32 if p.shared > 1 or p.group > 1 else p.dtype, query),
            shape(by_query, jnp.float32, query),
            shape(value.shape, p.dtype, query),
            shape((p.batch, p.heads, p.padded), jnp.float32, query),
        ],
    )(query, key, out_gradient, errors, dy, sums, beta, states, after)
    of = ((dq, query), (dk, key), (dg, log_decay))
    dq, dk, dg = (jnp.sum(x.reshape(*like.shape[:3], -1, p.width), axis=3).astype(like.dtype) for x, like in of)
    return dq, dk, dv, dstate, jnp.where(log_decay > gates.FORGET, dg, 0), dbeta
