"""The delta rule with a decay for every key channel on TPU: one walk over the chunks forward, one backward.

    P[r, j] = sum_h k[r, h] k[j, h] exp(b[r, h] - b[j, h]), r > j          L = beta P          X = (I + L)^-1
    A[r, j] = sum_h q[r, h] k[j, h] exp(b[r, h] - b[j, h]), r >= j         S~ = enter S
    r = v - (k * read) S~                u = X (beta r)
    o = scale (A u + (q * read) S~)      S' = leave (keep S~ + (k * write)^T u)

P and A are products of matrices level by level of `channel_decays`: for late rows and early columns, with their decays
d, P = (k * d) (k * d)^T and A = (q * d) (k * d)^T. Backward, with dS~' = leave dS' and e = r - P u:

    du = scale A^T do + (k * write) dS~'       dy = X^T du        dv = dr = beta dy        dbeta = rowsum(dy * e)
    dA = scale do u^T at and below the diagonal                   dP = -dr u^T below it
    dq = d * (dA (k * d)) + scale read * (do S~^T)                dk_row = d * (dP (k * d)) - read * (dr S~^T)
    dk_column = d * (dA^T (q * d) + dP^T (k * d)) + write * (u dS~'^T)                     dk = dk_row + dk_column
    db = q * dq + k * dk_row - k * dk_column, and the last token's row of db gains rowsum(S' * dS')
    dS = enter (keep dS~' + scale (q * read)^T do - (k * read)^T dr)

A gate's gradient is the sum of db over later rows, where nearly all cancels. So db is summed from factors as rounded as
those of the products: q * d times dA (k * d) for a late row, k * d times what d multiplies in dk_column for an early.
States are held as [V, H]: their decays then lie along the lanes, as those of rows do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear import channel_decays as decays
from pallas_kernels.linear import walk
from pallas_kernels.linear.channel_decays import Decays, Way, column, times, turned
from pallas_kernels.linear.solve import SOLVED, unit_lower_inverse
from pallas_kernels.linear.walk import Problem, dot

DELAY = 3
"""Turns between a chunk and the next; the state needs 2 of them: the units of one wait while those of others work."""


def _pairs(p: Problem, k: jax.Array, queries: Sequence[jax.Array], d: Decays) -> Generator[None, None, list[jax.Array]]:
    """P, and A of every query."""
    rows, size = [k, *queries], p.tiling.chunk
    found = [jnp.zeros((size, size), jnp.float32) for _ in rows]
    if not d.is_one:
        found[1:] = [decays.own_scores(p, q, k) for q in queries]
    for level in d.levels():
        early, late = level.decayed_early(k), jnp.concatenate([level.decayed_late(x) for x in rows], axis=0)
        for i, x in enumerate(jnp.split(dot(late, early, (1, 1)), len(rows))):
            pairs = level.pairs if i else level.pairs & _strictly_below(size)
            found[i] = jnp.where(pairs, level.back(x, late=True), found[i])
        yield
    return found


def _strictly_below(size: int) -> jax.Array:
    return walk.iota((size, size), 0) > walk.iota((size, size), 1)


def _beta(ref: Any, c: Any, h: int) -> jax.Array:
    """beta of (chunk, head), as a row."""
    return ref[0, 0, c, h : h + 1]


def _forward_kernel(p: Problem, keep: int, *refs: Any) -> None:
    """Writes the state before every `keep` chunks, unless `keep` is 0."""
    q_ref, k_ref, v_ref, *rest = refs
    gate_ref, borders_ref, (beta_ref, s0_ref, *outs, state) = decays.gate_refs(p, rest)
    o_ref, end_ref = outs[:2]
    step, size = pl.program_id(2), p.tiling.chunk
    part = functools.partial(walk.part, p, step=step)

    def unit(way: Way, c: Any, h: int) -> Iterator[None]:
        k = part(k_ref, c, h // p.shared, p.width)
        queries = [walk.part(p, q_ref, c, n, p.width) for n in p.queries(h)]
        sums = decays.gate_sums(p, part(gate_ref, c, h, p.width))
        yield
        d = way.decays(c, sums)
        alike, *scores = yield from _pairs(p, k, queries, d)
        scores = [x.astype(p.dtype) for x in scores]
        read = jnp.concatenate([way.reads(c, x * d.read).astype(p.dtype) for x in (k, *queries)], axis=0)
        write = way.writes(c, k * d.write).astype(p.dtype)
        inverse = yield from unit_lower_inverse(column(_beta(beta_ref, c, h), size) * alike, p.dtype)
        solution = (inverse * _beta(beta_ref, c, h)).astype(p.dtype)
        if keep and h == 0:
            walk.keep(outs[2], state, c, keep)
        entered = times(d.enter, state[h])
        known, *of_queries = jnp.split(dot(read, entered.astype(p.dtype), (1, 1)), 1 + len(queries))
        rest = (part(v_ref, c, h, p.value_width) - known).astype(p.dtype)
        yield
        u = dot(solution, rest).astype(p.dtype)
        yield
        state[h] = times(d.leave, times(d.keep, entered) + dot(u, write, (0, 0)))
        yield
        for a, x, n in zip(scores, of_queries, p.outputs(h), strict=True):
            out = dot(a, u) + x
            if p.scale != 1:
                out *= p.scale
            walk.put(p, o_ref, c, n, out)

    def work(way: Way) -> None:
        def chunks(together: Sequence[Any]) -> None:
            units = [(i, c, h) for i, c in enumerate(together) for h in range(p.tiling.heads)]
            walk.lockstep(walk.delayed(unit(way, c, h), i * DELAY) for i, c, h in units)

        walk.chunks(p, chunks, together=way.together)

    with walk.carried(p, state, s0_ref, end_ref):
        decays.by_strength(p, gate_ref, borders_ref, step, work)


def _backward_kernel(p: Problem, *refs: Any) -> None:
    q_ref, k_ref, v_ref, do_ref, *rest = refs
    gate_ref, borders_ref, (beta_ref, start_ref, dend_ref, *outs) = decays.gate_refs(p, rest)
    dq_ref, dk_ref, dv_ref, d0_ref, db_ref, dbeta_ref, *outs = outs
    states, sums_ref, kept_entered, kept_pairs, kept_scores, reads, writes, solutions, rests, written, *outs = outs
    of_queries, before_of_queries, gradient = outs
    step, t, size = p.steps - 1 - pl.program_id(2), p.tiling, p.tiling.chunk
    part, heads = functools.partial(walk.part, p, step=step), range(t.heads)

    def scaled(x: Any) -> jax.Array:
        return x if p.scale == 1 else p.scale * x

    def kept(way: Way, c: Any, h: int) -> Decays:
        return way.decays(c, decays.kept_sums(p, sums_ref, c, h))

    def prepare(way: Way, c: Any, h: int) -> Iterator[None]:
        sums = decays.gate_sums(p, part(gate_ref, c, h, p.width))
        decays.keep_sums(p, sums_ref, c, h, sums)
        yield
        d, k = way.decays(c, sums), part(k_ref, c, h // p.shared, p.width)
        queries = [part(q_ref, c, n, p.width) for n in p.queries(h)]
        alike, *scores = yield from _pairs(p, k, queries, d)
        kept_pairs[c, h] = alike.astype(p.dtype)
        for i, x in enumerate(scores):
            kept_scores[c, h, i] = scaled(x).astype(p.dtype)
        for i, x in enumerate([k, *queries]):
            reads[c, h, i] = (x * d.read).astype(p.dtype)
        writes[c, h] = (k * d.write).astype(p.dtype)
        inverse = yield from unit_lower_inverse(column(_beta(beta_ref, c, h), size) * alike, p.dtype)
        solutions[c, h] = inverse.astype(p.dtype)
        d = kept(way, c, h)
        entered = times(d.enter, states[0, h])
        kept_entered[c, h] = entered.astype(p.dtype)
        rest = part(v_ref, c, h, p.value_width) - way.reads(c, dot(reads[c, h, 0], entered.astype(p.dtype), (1, 1)))
        yield
        beta = column(_beta(beta_ref, c, h), p.value_width)
        u = dot(solutions[c, h], (beta * rest).astype(p.dtype)).astype(p.dtype)
        rests[c, h] = rest
        written[c, h] = u
        yield
        left = times(d.keep, entered) + dot(way.writes(c, u), writes[c, h], (0, 0))
        states[c + 1, h] = left
        states[0, h] = times(d.leave, left)

    def ask(way: Way, c: Any, h: int) -> Iterator[None]:
        """What queries add to du and dS, which waits for no state."""
        gradients = [part(do_ref, c, m, p.value_width) for m in p.outputs(h)]
        of_queries[c, h] = sum(dot(kept_scores[c, h, i], do, (0, 0)) for i, do in enumerate(gradients))
        yield
        before = sum(dot(way.reads(c, do), reads[c, h, i], (0, 0)) for i, do in enumerate(gradients, 1))
        before_of_queries[c, h] = scaled(before)

    shared = walk.SharedSums(p)

    def turn(way: Way, c: Any, h: int) -> Iterator[None]:
        k, u = part(k_ref, c, h // p.shared, p.width), written[c, h]
        queries = [part(q_ref, c, n, p.width) for n in p.queries(h)]
        gradients = [part(do_ref, c, m, p.value_width) for m in p.outputs(h)]
        d = kept(way, c, h)
        of_left = times(d.leave, gradient[h])
        entered, left = kept_entered[c, h], of_left.astype(p.dtype)
        du = of_queries[c, h] + way.writes(c, dot(writes[c, h], left, (1, 1)))
        weights = [scaled(dot(do, u, (1, 1))) for do in gradients]
        if d.is_one:
            (level,) = d.levels()
            weights = [jnp.where(level.pairs, x, 0).astype(p.dtype) for x in weights]
        yield
        dy = dot(solutions[c, h], du.astype(p.dtype), (0, 0))
        error = rests[c, h] - dot(kept_pairs[c, h], u)
        yield
        dr = column(_beta(beta_ref, c, h), p.value_width) * dy
        walk.put(p, dv_ref, c, h, dr)
        # Turned first, sums lie along the lanes as they are stored, and no head waits for the others.
        dbeta_ref[0, 0, c, h : h + 1] = jnp.sum((dy * error).T, axis=0, keepdims=True)
        known = dot(way.reads(c, dr).astype(p.dtype), reads[c, h, 0], (0, 0))
        dr = dr.astype(p.dtype)
        before = times(d.keep, of_left) - known + before_of_queries[c, h]
        gradient[h] = times(d.enter, before)
        weight = -dot(dr, u, (1, 1))
        if d.is_one:
            weight = jnp.where(level.pairs & _strictly_below(size), weight, 0).astype(p.dtype)
        weights = [weight, *weights]
        yield
        # By row: of the key, and of every query.
        of_read = [way.reads(c, x) for x in (-dot(dr, entered), *(scaled(dot(do, entered)) for do in gradients))]
        of_write = way.writes(c, dot(u, left))
        if d.is_one:
            joined, early = jnp.concatenate(weights, axis=0), writes[c, h]
            rows = [reads[c, h, i] for i in range(len(weights))]
            yield
            of_late = [x + y for x, y in zip(jnp.split(dot(joined, early), len(rows)), of_read, strict=True)]
            of_early = dot(joined, jnp.concatenate(rows, axis=0), (0, 0)) + of_write
            by_row, by_column = [d.read * x for x in of_late], d.write * of_early
            db = sum((x * y for x, y in zip(rows, of_late, strict=True)), -early * of_early)
        else:
            own = [decays.own_weights(p, x) for x in weights[1:]]
            db = -writes[c, h] * of_write
            by_row = [d.read * x for x in of_read]
            by_column = d.write * of_write
            for i, x in enumerate(of_read):
                db += reads[c, h, i] * x
            for i, (x, q) in enumerate(zip(own, queries, strict=True), 1):
                by_row[i] += x * k
                by_column += x * q
            yield
            for level in d.levels():
                early = level.decayed_early(k)
                late = jnp.concatenate([level.decayed_late(x) for x in (k, *queries)], axis=0)
                met = [jnp.where(level.pairs, x, 0) for x in weights]
                weight = jnp.concatenate([level.late(x).astype(p.dtype) for x in met], axis=0)
                of_late, of_early = jnp.split(dot(weight, early), len(met)), level.early(dot(weight, late, (0, 0)))
                db += level.back(-level.early(early) * of_early, late=False)
                by_column += level.back(level.early_decay * of_early, late=False)
                for i, (x, row) in enumerate(zip(of_late, jnp.split(late, len(met)), strict=True)):
                    by_row[i] += level.back(level.late_decay * x, late=True)
                    db += level.back(row * x, late=True)
                yield
        last = h % p.shared == p.shared - 1
        shared.add(dk_ref, by_row[0] + by_column, c, h // p.shared, last=last)
        for n, dq in zip(p.queries(h), by_row[1:], strict=True):
            shared.add(dq_ref, dq, c, n, last=last)
        # The rounded gradient, for that is what the keys' gradients hold, and most of them cancels.
        at_end = jnp.sum(states[c + 1, h] * left, axis=0, keepdims=True)
        end = jnp.clip(p.length - 1 - step * t.tokens - c * size, 0, size - 1)
        db += jnp.where(walk.iota((size, 1), 0) == end, at_end, 0)
        walk.put(p, db_ref, c, h, db)

    def work(way: Way) -> None:
        def first(chunks: Sequence[Any]) -> None:
            units = [(i, c, h) for i, c in enumerate(chunks) for h in heads]
            # A unit's queries ask once it is eliminated, a head a turn, for the joins leave the matrix units idle.
            asked = (walk.delayed(ask(way, c, h), i * DELAY + 1 + SOLVED + h) for i, c, h in units)
            walk.lockstep([*(walk.delayed(prepare(way, c, h), i * DELAY) for i, c, h in units), *asked])

        def last(chunks: Sequence[Any]) -> None:
            # The gradient of the state is written in the third turn.
            walk.lockstep(walk.delayed(turn(way, c, h), 2 * i) for i, c in enumerate(chunks) for h in heads)

        walk.chunks(p, first, together=way.together)
        walk.chunks(p, last, together=way.together, backward=True)

    states[0] = start_ref[0, 0]
    with walk.carried(p, gradient, dend_ref, d0_ref):
        decays.by_strength(p, gate_ref, borders_ref, step, work)


def _by_chunk(p: Problem, rows: jax.Array) -> jax.Array:
    """[B, groups, heads, padded] as [B, groups, chunks, heads, C]."""
    chunks = rows.reshape(*rows.shape[:3], -1, p.tiling.chunk)
    return jnp.swapaxes(chunks, 2, 3)


def forward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: Sequence[jax.Array],
    beta: jax.Array,
    state: jax.Array,
    *,
    keep: bool,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `walk.forward`; gates are `[B, T, heads * H]`, then `gates.borders` if any. Costs are of moderate decay."""
    c = p.tiling.chunk
    macs = (1 + p.group) * c * p.width + (p.group + 1) * c * p.value_width + c * c
    macs += (p.group + 2) * p.width * p.value_width
    operands = [
        ("query", query),
        ("key", key),
        ("value", value),
        *zip(("channels", "borders"), gate, strict=False),
        ("by chunk", _by_chunk(p, beta)),
        ("state", turned(state)),
    ]
    p, name = dataclasses.replace(p, turned=True, packed=len(gate) > 1), "channel_delta_rule_forward"
    (out, end), kept = walk.forward(p, _forward_kernel, name, macs, operands, keep=keep, out_dtype=out_dtype)
    return out, turned(end), kept[0] if keep else None


def backward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: Sequence[jax.Array],
    beta: jax.Array,
    starts: jax.Array,
    out_gradient: jax.Array,
    end_gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key, value, the initial state, the sums b `[B, T, heads * H]`, beta `[B, heads, padded]`."""
    t = p.tiling
    units = (t.chunks, t.heads)
    macs = 3 * (1 + p.group) * t.chunk * p.width + (4 + 2 * p.group) * t.chunk * p.value_width + t.chunk**2
    macs += (6 + 2 * p.group) * p.width * p.value_width
    operands = [("query", query), ("key", key), ("value", value), ("out", out_gradient)]
    operands += zip(("channels", "borders"), gate, strict=False)
    operands += [("by chunk", _by_chunk(p, beta)), ("starts", starts), ("state", turned(end_gradient))]
    more = [
        ("channels", gate[0].shape),
        ("by chunk", (p.batch, p.heads // t.heads, p.padded // t.chunk, t.heads, t.chunk)),
    ]
    square = (t.chunk, t.chunk)
    scratch = [
        decays.scratch_of_sums(p, p.tiling),
        pltpu.VMEM((*units, p.value_width, p.width), p.dtype),
        pltpu.VMEM((*units, *square), p.dtype),
        pltpu.VMEM((*units, p.group, *square), p.dtype),
        pltpu.VMEM((*units, 1 + p.group, t.chunk, p.width), p.dtype),
        pltpu.VMEM((*units, t.chunk, p.width), p.dtype),
        pltpu.VMEM((*units, *square), p.dtype),
        pltpu.VMEM((*units, t.chunk, p.value_width), jnp.float32),
        pltpu.VMEM((*units, t.chunk, p.value_width), p.dtype),
        pltpu.VMEM((*units, t.chunk, p.value_width), jnp.float32),
        pltpu.VMEM((*units, p.value_width, p.width), jnp.float32),
    ]
    p, name = dataclasses.replace(p, turned=True, packed=len(gate) > 1), "channel_delta_rule_backward"
    dq, dk, dv, d0, db, dbeta = walk.backward(p, _backward_kernel, name, macs, operands, more, scratch)
    return dq, dk, dv, turned(d0), db, jnp.swapaxes(dbeta, 2, 3).reshape(p.batch, p.heads, p.padded)
