"""The delta rule on GPU: triangular systems of all chunks, then states chunk after chunk, then all chunks.

beta stands for a diagonal matrix, and a and G for matrices of a chunk:

    G = (k k^T) * pair, below the diagonal               W = G (I + beta G)^-1
    r = v - read * (k S)       e = r - W (beta r)        S' = total S + k^T (write * beta e)
    a = scale (q k^T) * pair                             o  = a beta e + scale read * (q S)

A row writes u = beta e, where e is what its value lacks. What the state already holds under a key is taken from the
value before the system is solved, so that no large numbers are left to cancel. W gives (I + G beta)^-1 = I - W beta
and, backward, (I + beta G)^-1 = I - beta W. With the gradient dS' of the state after a chunk:

    du = a^T do + write * (k dS')      dy = du - W^T (beta du)      dv = dr = beta dy      dbeta = rowsum(dy * e)
    dS = total dS' + scale q^T (read * do) - k^T (read * dr)
    da = scale (do u^T) * pair         dg = -(dr u^T) * pair, below the diagonal
    dq = da k + scale read * (do S^T)                    dk_row = dg k - read * (dr S^T)
    dk_column = dg^T k + da^T q + write * (u dS'^T)      dk = dk_row + dk_column
    db = rowsum(q * dq + k * dk_row - k * dk_column), and the last row of db gains sum(S' * dS')

W grows from blocks of s rows on the diagonal to blocks of 2 s, where `link` are the entries of G from the first half of
a block to the second: W becomes W + (I - W beta) link (I - beta W).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.linear import gates, programs
from pallas_kernels.linear.programs import Blocks, Problem
from pallas_kernels.linear.walk import shape

SYSTEM_WARPS = 4
PROCESSORS = 132  # of an H100


def choose(dtype: Any) -> Blocks:
    """Read off registers and spills in `python -m pallas_kernels.lab report --family linear --targets h100`."""
    return Blocks() if dtype == jnp.bfloat16 else Blocks(tile=32, value_tile=64, warps=(8, 8, 8), stages=1)


def columns(p: Problem) -> int:
    """Of the state that one program walks with: fewer where processors would be left without one."""
    size = min(p.blocks.tile, p.value_wide)
    return 32 if size > 32 and p.batch * p.heads * p.value_width < PROCESSORS * size else size


def betas(p: Problem, ref: Any, chunk: Any) -> tuple[jax.Array, jax.Array]:
    """beta of a chunk as a column and as a row."""
    beta = ref[pl.ds(chunk * p.blocks.chunk, p.blocks.chunk)]
    return beta[:, None], beta[None, :]


def _place(p: Problem) -> tuple[jax.Array, jax.Array]:
    """Row and column of every entry of a chunk's matrices."""
    place = jnp.arange(p.blocks.chunk)
    return place[:, None], place[None, :]


def _read(p: Problem, whole: list[jax.Array]) -> jax.Array:
    return gates.exponential(p.dtype)(programs.total(whole))[:, None]


def _write(p: Problem, whole: list[jax.Array], last: list[jax.Array]) -> jax.Array:
    return gates.exponential(p.dtype)(programs.total(z - x for x, z in zip(whole, last, strict=True)))[:, None]


def solved(p: Problem, g: jax.Array, beta: jax.Array) -> jax.Array:
    """W of G, with beta as a row."""
    row, column = _place(p)

    def joined(level: Any, w: jax.Array) -> jax.Array:
        half, before = row >> level, column >> level
        link = jnp.where(jnp.where(half % 2 == 1, half, 0) == before + 1, g, 0)
        change = link - programs.dot(p, (link * beta).astype(p.dtype), w.astype(p.dtype))
        return w + change - programs.dot(p, (w * beta).astype(p.dtype), change.astype(p.dtype))

    return jax.lax.fori_loop(0, p.blocks.chunk.bit_length() - 1, joined, jnp.zeros_like(g))


def _systems_kernel(p: Problem, backward: bool, *refs: Any) -> None:
    """W of one chunk and state; backward the part a^T do of du too, which waits for no state."""
    k_ref, sums_ref, beta_ref, *rest = refs
    chunk = pl.program_id(0)
    whole, _ = programs.sums_of(p, sums_ref, chunk)
    (_, beta), pair = betas(p, beta_ref, chunk), programs.pair(p, whole)
    k = programs.rows(p, k_ref, chunk, 0, p.wide, p.width)
    row, column = _place(p)
    g = jnp.where(row > column, programs.dot(p, k, k, (1, 1)) * pair, 0)
    if backward:
        q_ref, do_ref, w_ref, du_ref = rest

        def seen(n: Any, du: jax.Array) -> jax.Array:
            q = programs.rows(p, q_ref, chunk, 0, p.wide, p.width, head=n)
            do = programs.rows(p, do_ref, chunk, 0, p.value_wide, p.value_width, head=n)
            a = (programs.dot(p, q, k, (1, 1)) * (p.scale * pair)).astype(p.dtype)
            return du + programs.dot(p, a, do, (0, 0))

        du = jax.lax.fori_loop(0, p.group, seen, jnp.zeros((p.blocks.chunk, p.value_wide), jnp.float32))
        programs.store_rows(p, du_ref, chunk, 0, p.value_width, du)
    else:
        (w_ref,) = rest
    w_ref[...] = solved(p, g, beta).astype(w_ref.dtype)


def store_state(p: Problem, ref: Any, column: Any, state: jax.Array, *chunk: Any) -> None:
    size, mask = state.shape[1], None
    if p.width < p.wide or p.value_width % size:
        mask = (jnp.arange(p.wide) < p.width)[:, None] & (column + jnp.arange(size) < p.value_width)[None]
    plgpu.store(ref.at[*chunk, pl.ds(0, p.wide), pl.ds(column, size)], state.astype(ref.dtype), mask=mask)


def _states_kernel(p: Problem, *refs: Any) -> None:
    """Columns of all states of a head, each before its chunk, and of e."""
    k_ref, v_ref, sums_ref, beta_ref, w_ref, begin_ref, states_ref, e_ref, end_ref = refs
    size, exp = columns(p), gates.exponential(p.dtype)
    column = pl.program_id(1) * size

    def turn(chunk: Any, state: jax.Array) -> jax.Array:
        entered = state.astype(p.dtype)
        store_state(p, states_ref, column, entered, chunk)
        whole, last = programs.sums_of(p, sums_ref, chunk)
        beta, _ = betas(p, beta_ref, chunk)
        k = programs.rows(p, k_ref, chunk, 0, p.wide, p.width)
        v = programs.rows(p, v_ref, chunk, column, size, p.value_width)
        rest = v - _read(p, whole) * programs.dot(p, k, entered)
        e = rest - programs.dot(p, w_ref[chunk], (beta * rest).astype(p.dtype))
        programs.store_rows(p, e_ref, chunk, column, p.value_width, e)
        written = (_write(p, whole, last) * beta * e).astype(p.dtype)
        return exp(programs.total(last)) * state + programs.dot(p, k, written, (0, 0))

    state = jax.lax.fori_loop(0, p.chunks, turn, programs.state_of(p, begin_ref, column, size))
    store_state(p, end_ref, column, state)


def _outputs_kernel(p: Problem, *refs: Any) -> None:
    q_ref, k_ref, e_ref, sums_ref, beta_ref, states_ref, o_ref = refs
    chunk, size = pl.program_id(0), min(p.blocks.value_tile, p.value_wide)
    column = pl.program_id(2) * size
    whole, _ = programs.sums_of(p, sums_ref, chunk)
    read, pair = p.scale * _read(p, whole), p.scale * programs.pair(p, whole) * betas(p, beta_ref, chunk)[1]
    k = programs.rows(p, k_ref, chunk, 0, p.wide, p.width)
    e = programs.rows(p, e_ref, chunk, column, size, p.value_width)
    state = programs.state_of(p, states_ref, column, size)

    @pl.loop(0, p.group)
    def queried(n: Any) -> None:
        q = programs.rows(p, q_ref, chunk, 0, p.wide, p.width, head=n)
        a = (programs.dot(p, q, k, (1, 1)) * pair).astype(p.dtype)
        out = read * programs.dot(p, q, state) + programs.dot(p, a, e)
        programs.store_rows(p, o_ref, chunk, column, p.value_width, out, head=n)


def _state_gradients_kernel(p: Problem, *refs: Any) -> None:
    """Columns of the gradients of all states of a head, each after its chunk, and of dy."""
    q_ref, k_ref, do_ref, du_ref, sums_ref, beta_ref, w_ref, begin_ref, after_ref, dy_ref, end_ref = refs
    size, exp = columns(p), gates.exponential(p.dtype)
    column = pl.program_id(1) * size

    def turn(i: Any, gradient: jax.Array) -> jax.Array:
        chunk = p.chunks - 1 - i
        left = gradient.astype(p.dtype)
        store_state(p, after_ref, column, left, chunk)
        whole, last = programs.sums_of(p, sums_ref, chunk)
        (beta, _), read = betas(p, beta_ref, chunk), _read(p, whole)
        k = programs.rows(p, k_ref, chunk, 0, p.wide, p.width)
        du = programs.rows(p, du_ref, chunk, column, size, p.value_width)
        du += _write(p, whole, last) * programs.dot(p, k, left)
        dy = du - programs.dot(p, w_ref[chunk], (beta * du).astype(p.dtype), (0, 0))
        programs.store_rows(p, dy_ref, chunk, column, p.value_width, dy)
        gradient = exp(programs.total(last)) * gradient
        gradient -= programs.dot(p, k, (read * beta * dy).astype(p.dtype), (0, 0))
        for n in range(p.group):
            q = programs.rows(p, q_ref, chunk, 0, p.wide, p.width, head=n)
            do = programs.rows(p, do_ref, chunk, column, size, p.value_width, head=n)
            gradient += programs.dot(p, q, (p.scale * read * do).astype(p.dtype), (0, 0))
        return gradient

    gradient = jax.lax.fori_loop(0, p.chunks, turn, programs.state_of(p, begin_ref, column, size))
    store_state(p, end_ref, column, gradient)


def _gradients_kernel(p: Problem, *refs: Any) -> None:
    """Of one chunk and state."""
    q_ref, k_ref, do_ref, e_ref, dy_ref, sums_ref, beta_ref, states_ref, after_ref, *outs = refs
    dq_ref, dk_ref, dv_ref, db_ref, dbeta_ref = outs
    chunk, exp, t = pl.program_id(0), gates.exponential(p.dtype), min(p.blocks.tile, p.value_wide)
    whole, last = programs.sums_of(p, sums_ref, chunk)
    beta, along = betas(p, beta_ref, chunk)
    read, pair = _read(p, whole), programs.pair(p, whole) * along
    square, wide = ((p.blocks.chunk, n) for n in (p.blocks.chunk, p.wide))
    here = pl.ds(chunk * p.blocks.chunk, p.blocks.chunk)

    def erased(i: Any, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Value channels tile by tile: whole states would not leave registers for the sums."""
        dg, by_row, by_column, kept, dbeta = found
        e = programs.rows(p, e_ref, chunk, i * t, t, p.value_width)
        dy = programs.rows(p, dy_ref, chunk, i * t, t, p.value_width)
        before, after = programs.state_of(p, states_ref, i * t, t), programs.state_of(p, after_ref, i * t, t)
        programs.store_rows(p, dv_ref, chunk, i * t, p.value_width, beta * dy)
        return (
            dg + programs.dot(p, dy, e, (1, 1)),
            by_row + programs.dot(p, dy, before, (1, 1)),
            by_column + programs.dot(p, e, after, (1, 1)),
            kept + jnp.sum(before.astype(jnp.float32) * after.astype(jnp.float32)),
            dbeta + jnp.sum(dy.astype(jnp.float32) * e.astype(jnp.float32), axis=1),
        )

    zeros = tuple(jnp.zeros(x, jnp.float32) for x in (square, wide, wide, (), square[:1]))
    dg, by_row, by_column, kept, dbeta_ref[here] = jax.lax.fori_loop(0, pl.cdiv(p.value_width, t), erased, zeros)
    k = programs.rows(p, k_ref, chunk, 0, p.wide, p.width)
    row, column = _place(p)
    dg = jnp.where(row > column, -beta * pair * dg, 0).astype(p.dtype)
    by_row = programs.dot(p, dg, k) - beta * read * by_row
    by_column *= beta * _write(p, whole, last)
    at_end = exp(programs.total(last)) * kept + jnp.sum(k * by_column)
    by_column += programs.dot(p, dg, k, (0, 0))
    db = jnp.sum(k * (by_row - by_column), axis=1) + jnp.where(row[:, 0] == p.blocks.chunk - 1, at_end, 0)

    def queried(n: Any, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dk, db = found

        def seen(i: Any, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            da, dq = found
            e = programs.rows(p, e_ref, chunk, i * t, t, p.value_width)
            do = programs.rows(p, do_ref, chunk, i * t, t, p.value_width, head=n)
            before = programs.state_of(p, states_ref, i * t, t)
            return da + programs.dot(p, do, e, (1, 1)), dq + programs.dot(p, do, before, (1, 1))

        da, dq = jax.lax.fori_loop(0, pl.cdiv(p.value_width, t), seen, zeros[:2])
        q = programs.rows(p, q_ref, chunk, 0, p.wide, p.width, head=n)
        da = (p.scale * pair * da).astype(p.dtype)
        dq = p.scale * read * dq + programs.dot(p, da, k)
        by_column = programs.dot(p, da, q, (0, 0))
        programs.store_rows(p, dq_ref, chunk, 0, p.width, dq, head=n)
        return dk + by_column, db + jnp.sum(q * dq - k * by_column, axis=1)

    dk, db_ref[here] = jax.lax.fori_loop(0, p.group, queried, (by_row + by_column, db))
    programs.store_rows(p, dk_ref, chunk, 0, p.width, dk)


def _systems(p: Problem, key: jax.Array, sums: jax.Array, beta: jax.Array, *backward: jax.Array) -> list[jax.Array]:
    """W `[B, K, chunks, C, C]`; also du `[B, T, K, V]` as far as it is a^T do, given the query and do."""
    c, count, heads = p.blocks.chunk, p.batch * p.heads, functools.partial(programs.state_heads, p, axis=1)
    systems = shape((p.batch, p.heads, p.chunks, c, c), p.dtype, key)
    values = shape((p.batch, p.length, p.heads, p.value_width), p.dtype, key)
    per_token = c * p.width + 2 * c**2 * (c.bit_length() - 2)
    per_token += p.group * c * (p.width + p.value_width) if backward else 0
    queries = [heads(p.wide, count=p.group, shared=p.shared), heads(p.value_wide, count=p.group)]
    return programs.call(
        p,
        functools.partial(_systems_kernel, p, bool(backward)),
        "delta_rule_systems_and_gradients" if backward else "delta_rule_systems",
        (p.chunks, count),
        SYSTEM_WARPS,
        2 * count * p.padded * per_token,
        in_specs=[
            heads(p.wide, shared=p.shared),
            programs.sums_spec(p, axis=1),
            programs.per_state(p, p.padded, axis=1),
            *(queries if backward else []),
        ],
        out_specs=[programs.per_chunk(p, c, c), *([heads(p.value_wide)] if backward else [])],
        out_shape=[systems, *([values] if backward else [])],
    )(key, sums, beta, *backward)


def walk(
    p: Problem, kernel: Any, name: str, products: int, arrays: dict[str, jax.Array], sums_spec: pl.BlockSpec
) -> list[jax.Array]:
    """States or gradients of them `[B, K, chunks, H, V]`, what chunks write `[B, T, K, V]`, and the last state.

    Args:
      arrays: in the order of the kernel's operands.
      sums_spec: of a program whose batch and state are on axis 0.
    """
    c, state = p.blocks.chunk, (p.width, p.value_width)
    heads, of = functools.partial(programs.state_heads, p, axis=0), functools.partial(programs.per_state, p, axis=0)
    whole = of(p.wide, p.value_wide)
    specs = {
        "query": heads(p.wide, count=p.group, shared=p.shared),
        "key": heads(p.wide, shared=p.shared),
        # Those of every state, however many share a head.
        "state queries": heads(p.wide, count=p.group),
        "read keys": heads(p.wide),
        "written keys": heads(p.wide),
        "value": heads(p.value_wide),
        "out": heads(p.value_wide, count=p.group),
        "sums": sums_spec,
        "beta": of(p.padded),
        "systems": of(p.chunks, c, c),
        "state": whole,
    }
    like = arrays["value"]
    return programs.call(
        p,
        functools.partial(kernel, p),
        name,
        (p.batch * p.heads, -(-p.value_width // columns(p))),
        p.blocks.warps[0],
        2 * p.batch * p.heads * p.padded * p.value_width * (products * p.width + c),
        in_specs=[specs[name] for name in arrays],
        out_specs=[of(p.chunks, p.wide, p.value_wide), heads(p.value_wide), whole],
        out_shape=[
            shape((p.batch, p.heads, p.chunks, *state), p.dtype, like),
            shape((p.batch, p.length, p.heads, p.value_width), p.dtype, like),
            shape((p.batch, p.heads, *state), jnp.float32, like),
        ],
    )(*arrays.values())


def _states(
    p: Problem,
    key: jax.Array,
    value: jax.Array,
    sums: jax.Array,
    beta: jax.Array,
    systems: jax.Array,
    state: jax.Array,
) -> list[jax.Array]:
    arrays = {"key": key, "value": value, "sums": sums, "beta": beta, "systems": systems, "state": state}
    return walk(p, _states_kernel, "delta_rule_states", 2, arrays, programs.sums_spec(p, axis=0))


def forward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sums: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, O, V]`, O the larger of query heads and states, and the state after the last token."""
    (systems,) = _systems(p, key, sums, beta)
    states, errors, end = _states(p, key, value, sums, beta, systems, state)
    size, count = min(p.blocks.value_tile, p.value_wide), p.batch * p.heads
    heads = functools.partial(programs.state_heads, p, axis=1)
    per_token = p.blocks.chunk * (p.width + p.value_width) + p.width * p.value_width
    out = programs.call(
        p,
        functools.partial(_outputs_kernel, p),
        "delta_rule_outputs",
        (p.chunks, count, -(-p.value_width // size)),
        p.blocks.warps[1],
        2 * count * p.group * p.padded * per_token,
        in_specs=[
            heads(p.wide, count=p.group, shared=p.shared),
            heads(p.wide, shared=p.shared),
            heads(p.value_wide),
            programs.sums_spec(p, axis=1),
            programs.per_state(p, p.padded, axis=1),
            programs.per_chunk(p, p.wide, p.value_wide),
        ],
        out_specs=heads(p.value_wide, count=p.group),
        out_shape=shape((p.batch, p.length, p.heads * p.group, p.value_width), out_dtype, query),
    )(query, key, errors, sums, beta, states)
    return out, end


def backward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sums: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    out_gradient: jax.Array,
    end_gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key, value, the initial state, the sums b and beta, the last two `[B, K, padded]`."""
    systems, du = _systems(p, key, sums, beta, query, out_gradient)
    states, errors, _ = _states(p, key, value, sums, beta, systems, state)
    arrays = {"query": query, "key": key, "out": out_gradient, "value": du}
    arrays |= {"sums": sums, "beta": beta, "systems": systems, "state": end_gradient}
    name, sums_spec = "delta_rule_state_gradients", programs.sums_spec(p, axis=0)
    after, dy, dstate = walk(p, _state_gradients_kernel, name, 2 + p.group, arrays, sums_spec)
    count, heads = p.batch * p.heads, functools.partial(programs.state_heads, p, axis=1)
    # States that share a key and a query head each have their own part of its gradient.
    partial = jnp.float32 if p.shared > 1 else p.dtype
    by_state = (p.batch, p.length, p.heads)
    per_token = (3 + 3 * p.group) * p.blocks.chunk * p.width + (1 + p.group) * p.blocks.chunk * p.value_width
    per_token += (2 + p.group) * p.width * p.value_width
    query_spec, key_spec = heads(p.wide, count=p.group, shared=p.shared), heads(p.wide, shared=p.shared)
    values, rows = heads(p.value_wide), programs.per_state(p, p.padded, axis=1)
    state_spec = programs.per_chunk(p, p.wide, p.value_wide)
    dq, dk, dv, db, dbeta = programs.call(
        p,
        functools.partial(_gradients_kernel, p),
        "delta_rule_gradients",
        (p.chunks, count),
        p.blocks.warps[2],
        2 * count * p.padded * per_token,
        in_specs=[
            query_spec,
            key_spec,
            heads(p.value_wide, count=p.group),
            *[values] * 2,
            programs.sums_spec(p, axis=1),
            rows,
            *[state_spec] * 2,
        ],
        out_specs=[heads(p.wide, count=p.group), heads(p.wide), values, rows, rows],
        out_shape=[
            shape((*by_state[:2], p.heads * p.group, p.width), partial, query),
            shape((*by_state, p.width), partial, query),
            shape(value.shape, p.dtype, query),
            *[shape((p.batch, p.heads, p.padded), jnp.float32, query)] * 2,
        ],
    )(query, key, out_gradient, errors, dy, sums, beta, states, after)
    if p.shared > 1:
        dq, dk = (jnp.sum(x.reshape(*key.shape[:3], p.shared, -1), axis=3).astype(p.dtype) for x in (dq, dk))
    return dq, dk, dv, dstate, db, dbeta
