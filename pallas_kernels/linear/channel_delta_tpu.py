"""The delta rule with a decay for every key channel on TPU: one walk over the chunks forward, one backward.

    P[r, j] = sum_h k[r, h] k[j, h] exp(b[r, h] - b[j, h]), r > j          L = beta P          X = (I + L)^-1
    A[r, j] = sum_h q[r, h] k[j, h] exp(b[r, h] - b[j, h]), r >= j         r = v - (k * read) S          u = X (beta r)
    o = scale [A | q * read] [u ; S]                                       S' = total S + (k * write)^T u

with read = exp b, write = exp(b_C - b) and total = exp b_C. P and A are products of matrices by halves of halves of the
chunk, as in `channel_tpu`: for rows of second halves and columns of first ones, with the decay d since or until the row
between them, P = (k * d) (k * d)^T and A = (q * d) (k * d)^T. Backward, with the gradient dS' of the state after the
chunk and e = r - P u:

    du = scale A^T do + (k * write) dS'        dy = X^T du        dv = dr = beta dy        dbeta = rowsum(dy * e)
    dA = scale do u^T at and below the diagonal                   dP = -dr u^T below it
    dq = d * (dA (k * d)) + scale read * (do S^T)                 dk_row = d * (dP (k * d)) - read * (dr S^T)
    dk_column = d * (dA^T (q * d) + dP^T (k * d)) + write * (u dS'^T)                      dk = dk_row + dk_column
    db = q * dq + k * dk_row - k * dk_column, and the last token's row of db gains rowsum(S' * dS')
    dS = total dS' + scale (q * read)^T do - (k * read)^T dr

A gate's gradient is the sum of db over later rows, where nearly all cancels. So db is summed from factors as rounded as
those of the products: q * d times dA (k * d) for a late row, k * d times what d multiplies in dk_column for an early.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear import gates, walk
from pallas_kernels.linear.channel_tpu import SUBLANES, Halves, gate_sums, halvings, row_decays
from pallas_kernels.linear.solve import unit_lower_inverses
from pallas_kernels.linear.walk import Problem, dot


def _diagonal(size: int) -> jax.Array:
    return walk.iota((size, size), 0) == walk.iota((size, size), 1)


def _factors(p: Problem, level: Halves, k: jax.Array, rows: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Keys of first halves, zeros between, and one below the other, each of `rows` in second halves; all decayed."""
    early = level.back((level.early(k) * level.early(level.decay)).astype(p.dtype), late=False)
    decay = level.late(level.decay)
    return early, jnp.concatenate([(level.late(x) * decay).astype(p.dtype) for x in rows], axis=0)


def _pairs(
    p: Problem, k: jax.Array, queries: Sequence[jax.Array], sums: Sequence[jax.Array]
) -> Generator[None, None, list[jax.Array]]:
    """P, and A of every query."""
    rows, size = [k, *queries], p.tiling.chunk
    # Where query and key are one token there is no decay.
    own = [jnp.sum(q.astype(jnp.float32) * k, axis=1, keepdims=True) for q in queries]
    found = [jnp.zeros((size, size), jnp.float32), *(jnp.where(_diagonal(size), x, 0) for x in own)]
    for level in halvings(p, sums):
        early, late = _factors(p, level, k, rows)
        for i, x in enumerate(jnp.split(dot(late, early, (1, 1)), len(rows))):
            found[i] = jnp.where(level.pairs, level.back(x, late=True), found[i])
        yield
    return found


def _beta(p: Problem, ref: Any, c: int, h: int) -> jax.Array:
    """beta of (chunk, head), as a row."""
    return ref[0, 0, h : h + 1, c * p.tiling.chunk : (c + 1) * p.tiling.chunk]


def _column(row: jax.Array, width: int) -> jax.Array:
    """A row as a column that is as wide as wanted."""
    return jnp.broadcast_to(jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1], (row.shape[1], width))


def _forward_kernel(p: Problem, keep: int, *refs: Any) -> None:
    """Writes the state before every `keep` chunks, unless `keep` is 0."""
    q_ref, k_ref, v_ref, gate_ref, beta_ref, s0_ref, *outs, carried = refs
    o_ref, end_ref = outs[:2]
    step, t, size = pl.program_id(2), p.tiling, p.tiling.chunk
    part = functools.partial(walk.part, p, step=step)

    units = [(c, h) for c in range(t.chunks) for h in range(t.heads)]
    lowers, lhs, keys = {}, {}, {}

    def prepare(c: int, h: int) -> Iterator[None]:
        k = part(k_ref, c, h // p.shared, p.width)
        queries = [walk.part(p, q_ref, c, n, p.width) for n in p.queries(h)]
        sums = gate_sums(p, part(gate_ref, c, h, p.width))
        yield
        alike, *scores = yield from _pairs(p, k, queries, sums)
        read, write, total = row_decays(p, sums)
        lowers[c, h] = _column(_beta(p, beta_ref, c, h), size) * alike
        keys[c, h] = (k * read).astype(p.dtype), (k * write).astype(p.dtype), total
        for a, q, n in zip(scores, queries, p.outputs(h), strict=True):
            lhs[c, n] = jnp.concatenate([a.astype(p.dtype), (q * read).astype(p.dtype)], axis=1)

    for c in range(t.chunks):
        walk.lockstep(prepare(c, h) for h in range(t.heads))
    inverses = unit_lower_inverses([lowers[unit] for unit in units], p.dtype)
    solutions = {unit: (x * _beta(p, beta_ref, *unit)).astype(p.dtype) for unit, x in zip(units, inverses, strict=True)}

    def turn(c: int, h: int) -> Iterator[None]:
        if keep and c % keep == 0:
            outs[2][0, c // keep, h] = state[h]
        (read, write, total), entered = keys[c, h], state[h].astype(p.dtype)
        rest = (part(v_ref, c, h, p.value_width) - dot(read, entered)).astype(p.dtype)
        yield
        u = dot(solutions[c, h], rest).astype(p.dtype)
        yield
        state[h] = total * state[h] + dot(write, u, (0, 0))
        yield
        rhs = jnp.concatenate([u, entered], axis=0)
        for n in p.outputs(h):
            out = dot(lhs[c, n], rhs)
            if p.scale != 1:
                out *= p.scale
            walk.put(p, o_ref, c, n, out)

    with walk.carried(p, carried, s0_ref, end_ref) as state:
        for c in range(t.chunks):
            walk.lockstep(turn(c, h) for h in range(t.heads))


def _backward_kernel(p: Problem, *refs: Any) -> None:
    q_ref, k_ref, v_ref, do_ref, gate_ref, beta_ref, start_ref, dend_ref, *outs = refs
    dq_ref, dk_ref, dv_ref, d0_ref, db_ref, dbeta_ref, *outs = outs
    states, kept_sums, kept_pairs, kept_scores, solutions, rests, written, carried = outs
    step, t, size = p.steps - 1 - pl.program_id(2), p.tiling, p.tiling.chunk
    part = functools.partial(walk.part, p, step=step)

    units = [(c, h) for c in range(t.chunks) for h in range(t.heads)]
    lowers = {}

    def decays(c: int, h: int) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
        sums = [kept_sums[c, h, i] for i in range(gates.parts(p.dtype))]
        return sums, row_decays(p, sums)

    def prepare(c: int, h: int) -> Iterator[None]:
        sums = gate_sums(p, part(gate_ref, c, h, p.width))
        for i, x in enumerate(sums):
            kept_sums[c, h, i] = x
        yield
        k, queries = part(k_ref, c, h // p.shared, p.width), [part(q_ref, c, n, p.width) for n in p.queries(h)]
        alike, *scores = yield from _pairs(p, k, queries, sums)
        kept_pairs[c, h] = alike.astype(p.dtype)
        for i, x in enumerate(scores):
            kept_scores[c, h, i] = (p.scale * x).astype(p.dtype)
        lowers[c, h] = _column(_beta(p, beta_ref, c, h), size) * alike

    for c in range(t.chunks):
        walk.lockstep(prepare(c, h) for h in range(t.heads))
    for unit, x in zip(units, unit_lower_inverses([lowers[unit] for unit in units], p.dtype), strict=True):
        solutions[unit] = x.astype(p.dtype)

    def again(c: int, h: int) -> Iterator[None]:
        _, (read, write, total) = decays(c, h)
        k = part(k_ref, c, h // p.shared, p.width)
        rest = part(v_ref, c, h, p.value_width) - dot((k * read).astype(p.dtype), states[c, h].astype(p.dtype))
        yield
        beta = _column(_beta(p, beta_ref, c, h), p.value_width)
        u = dot(solutions[c, h], (beta * rest).astype(p.dtype)).astype(p.dtype)
        rests[c, h] = rest
        written[c, h] = u
        yield
        states[c + 1, h] = total * states[c, h] + dot((k * write).astype(p.dtype), u, (0, 0))

    for h in range(t.heads):
        states[0, h] = start_ref[0, 0, h]
    for c in range(t.chunks):
        walk.lockstep(again(c, h) for h in range(t.heads))

    shared = walk.SharedSums(p)
    columns: dict[int, jax.Array] = {}

    def turn(c: int, h: int) -> Iterator[None]:
        k, u = part(k_ref, c, h // p.shared, p.width), written[c, h]
        queries = [part(q_ref, c, n, p.width) for n in p.queries(h)]
        gradients = [part(do_ref, c, m, p.value_width) for m in p.outputs(h)]
        sums, (read, write, total) = decays(c, h)
        entered, left = states[c, h].astype(p.dtype), gradient[h].astype(p.dtype)
        du = dot((k * write).astype(p.dtype), left)
        for i, do in enumerate(gradients):
            du += dot(kept_scores[c, h, i], do, (0, 0))
        yield
        dy = dot(solutions[c, h], du.astype(p.dtype), (0, 0))
        error = rests[c, h] - dot(kept_pairs[c, h], u)
        yield
        dr = _column(_beta(p, beta_ref, c, h), p.value_width) * dy
        walk.put(p, dv_ref, c, h, dr)
        columns[h] = jnp.sum(dy * error, axis=1, keepdims=True)
        dr = dr.astype(p.dtype)
        before = total * gradient[h] - dot((k * read).astype(p.dtype), dr, (0, 0))
        for q, do in zip(queries, gradients, strict=True):
            before += dot((p.scale * q * read).astype(p.dtype), do, (0, 0))
        yield
        weights = [-dot(dr, u, (1, 1)), *(p.scale * dot(do, u, (1, 1)) for do in gradients)]
        own = [jnp.sum(jnp.where(_diagonal(size), x, 0), axis=1, keepdims=True) for x in weights[1:]]
        of_read, of_write = -dot(dr, entered, (1, 1)), dot(u, left, (1, 1))
        db = (k * read).astype(p.dtype) * of_read - (k * write).astype(p.dtype) * of_write
        by_row, column = [read * of_read], write * of_write  # by row: of the key, and of every query
        for x, q, do in zip(own, queries, gradients, strict=True):
            of_read = dot(do, entered, (1, 1))
            db += (p.scale * q * read).astype(p.dtype) * of_read
            by_row.append(x * k + p.scale * read * of_read)
            column += x * q
        yield
        for level in halvings(p, sums):
            early, late = _factors(p, level, k, [k, *queries])
            met = [level.late(jnp.where(level.pairs, x, 0)).astype(p.dtype) for x in weights]
            weight = jnp.concatenate(met, axis=0)
            late_decay, early_decay = level.late(level.decay), level.early(level.decay)
            of_late, of_early = dot(weight, early), level.early(dot(weight, late, (0, 0)))
            db -= level.back(level.early(early) * of_early, late=False)
            column += level.back(early_decay * of_early, late=False)
            rows = zip(jnp.split(of_late, len(weights)), jnp.split(late * of_late, len(weights)), strict=True)
            for i, (x, by_gate) in enumerate(rows):
                by_row[i] += level.back(late_decay * x, late=True)
                db += level.back(by_gate, late=True)
            yield
        last = h % p.shared == p.shared - 1
        shared.add(dk_ref, by_row[0] + column, c, h // p.shared, last=last)
        for n, dq in zip(p.queries(h), by_row[1:], strict=True):
            shared.add(dq_ref, dq, c, n, last=last)
        # The rounded gradient, for that is what the keys' gradients hold, and most of them cancels.
        at_end = jnp.sum(states[c + 1, h] * left, axis=1, keepdims=True)
        end = jnp.clip(p.length - 1 - step * t.tokens - c * size, 0, size - 1)
        db += jnp.where(walk.iota((size, 1), 0) == end, jnp.broadcast_to(at_end, (p.width, SUBLANES)).T[:1], 0)
        walk.put(p, db_ref, c, h, db)
        gradient[h] = before

    with walk.carried(p, carried, dend_ref, d0_ref) as gradient:
        for c in reversed(range(t.chunks)):
            walk.lockstep(turn(c, h) for h in range(t.heads))
            ordered = [columns[h] for h in range(t.heads)]
            dbeta_ref[0, 0, :, c * size : (c + 1) * size] = jnp.concatenate(ordered, axis=1).T


def forward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    keep: bool,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `walk.forward`; gates are `[B, T, heads * H]`."""
    c, levels = p.tiling.chunk, p.tiling.chunk.bit_length()
    macs = (1 + p.group) * c * levels * p.width + (p.group + 1) * c * p.value_width + c * c
    macs += (p.group + 2) * p.width * p.value_width
    operands = [("query", query), ("key", key), ("value", value), ("channels", gate), ("sums", beta), ("state", state)]
    name = "channel_delta_rule_forward"
    (out, end), kept = walk.forward(p, _forward_kernel, name, macs, operands, keep=keep, out_dtype=out_dtype)
    return out, end, kept[0] if keep else None


def backward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: jax.Array,
    beta: jax.Array,
    starts: jax.Array,
    out_gradient: jax.Array,
    end_gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key, value, the initial state, the sums b `[B, T, heads * H]`, beta `[B, heads, padded]`."""
    t, levels = p.tiling, p.tiling.chunk.bit_length()
    units = (t.chunks, t.heads)
    macs = 3 * (1 + p.group) * t.chunk * levels * p.width + (4 + 2 * p.group) * t.chunk * p.value_width + t.chunk**2
    macs += (6 + 2 * p.group) * p.width * p.value_width
    operands = [("query", query), ("key", key), ("value", value), ("out", out_gradient), ("channels", gate)]
    operands += [("sums", beta), ("starts", starts), ("state", end_gradient)]
    more = [("channels", gate.shape), ("sums", (p.batch, p.heads // t.heads, t.heads, p.padded))]
    square = (t.chunk, t.chunk)
    scratch = [
        pltpu.VMEM((*units, gates.parts(p.dtype), t.chunk, p.width), jnp.float32),
        pltpu.VMEM((*units, *square), p.dtype),
        pltpu.VMEM((*units, p.group, *square), p.dtype),
        pltpu.VMEM((*units, *square), p.dtype),
        pltpu.VMEM((*units, t.chunk, p.value_width), jnp.float32),
        pltpu.VMEM((*units, t.chunk, p.value_width), p.dtype),
    ]
    name = "channel_delta_rule_backward"
    dq, dk, dv, d0, db, dbeta = walk.backward(p, _backward_kernel, name, macs, operands, more, scratch)
    return dq, dk, dv, d0, db, dbeta.reshape(p.batch, p.heads, p.padded)
