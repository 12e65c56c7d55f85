"""The delta rule on TPU: one walk over the chunks forward, one backward.

    L  = beta (k k^T) * pair, below the diagonal         X = (I + L)^-1
    r  = v - (k * read) S                                u = X (beta r)
    o  = scale [(q k^T) * pair | q * read] [u ; S]       S' = total S + (k * write)^T u

What the state already holds under a key is taken from the value before the system is solved, so that no large numbers
are left to cancel. Backward, with the gradient dS' of the state after the chunk and e = r - (k k^T * pair) u:

    a   = scale (q k^T) * pair    du = a^T do + write * (k dS'^T)       dy = X^T du      dv = dr = beta dy
    da  = scale (do u^T) * pair   dg = -(dr u^T) * pair, below the diagonal              dbeta = rowsum(dy * e)
    dq  = da k + scale (do * read) S^T                    dk_row = dg k - (dr * read) S^T
    dk_column = dg^T k + da^T q + (u * write) dS'^T       dk = dk_row + dk_column
    db  = rowsum(q * dq + k * dk_row - k * dk_column), and the last row of db gains sum(S' * dS')
    dS  = total dS' + scale q^T (do * read) - k^T (dr * read)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear import walk
from pallas_kernels.linear.solve import unit_lower_inverses
from pallas_kernels.linear.walk import Problem, dot


def _betas(p: Problem, ref: Any, width: int) -> Callable[[int, int], tuple[jax.Array, jax.Array]]:
    """beta of (chunk, head) as a column that is as wide as wanted, and as a row."""
    size = p.tiling.chunk

    @functools.cache
    def chunk(c: int) -> tuple[jax.Array, jax.Array]:
        flat = ref[0, 0, :, c * size : (c + 1) * size]
        return flat, flat.T

    def of(c: int, h: int) -> tuple[jax.Array, jax.Array]:
        flat, tall = chunk(c)
        return jnp.broadcast_to(tall[:, h : h + 1], (size, width)), flat[h : h + 1]

    return of


def _strictly_below(size: int) -> jax.Array:
    return walk.iota((size, size), 0) > walk.iota((size, size), 1)


def _forward_kernel(p: Problem, keep: int, *refs: Any) -> None:
    """Writes the state before every `keep` chunks, unless `keep` is 0."""
    count = 3 if p.constant else 1
    q_ref, k_ref, v_ref, *rest = refs
    gate_refs, (beta_ref, s0_ref, *outs, carried) = rest[:count], rest[count:]
    o_ref, end_ref = outs[:2]
    step = pl.program_id(2)
    size, t = p.tiling.chunk, p.tiling

    weights, betas = walk.weights(p, gate_refs), _betas(p, beta_ref, size)
    below = _strictly_below(size)

    def key(c: int, h: int) -> jax.Array:
        return walk.part(p, k_ref, c, h // p.shared, p.width, step=step)

    units = [(c, h) for c in range(t.chunks) for h in range(t.heads)]
    lowers, lhs = [], {}
    for c, h in units:
        w, k = weights(c, h), key(c, h)
        queries = [walk.part(p, q_ref, c, n, p.width) for n in p.queries(h)]
        scores = dot(jnp.concatenate([k, *queries], axis=0), k, (1, 1))
        lowers.append(jnp.where(below, betas(c, h)[0] * scores[:size] * w.pair, 0))
        for r, (q, n) in enumerate(zip(queries, p.outputs(h), strict=True), 1):
            a = (scores[r * size : (r + 1) * size] * w.pair).astype(q.dtype)
            lhs[c, n] = jnp.concatenate([a, (q * w.read[:, : p.width]).astype(q.dtype)], axis=1)
    inverses = dict(zip(units, unit_lower_inverses(lowers, p.dtype), strict=True))
    solutions = {(c, h): (x * betas(c, h)[1]).astype(p.dtype) for (c, h), x in inverses.items()}

    def turn(c: int, h: int) -> Iterator[None]:
        if keep and c % keep == 0:
            outs[2][0, c // keep, h] = state[h]
        w, k, v = weights(c, h), key(c, h), walk.part(p, v_ref, c, h, p.value_width, step=step)
        entered = state[h].astype(p.dtype)
        rest = (v - dot((k * w.read[:, : p.width]).astype(p.dtype), entered)).astype(p.dtype)
        yield
        u = dot(solutions[c, h], rest)
        yield
        state[h] = w.total[:, : p.value_width] * state[h] + dot(
            k, (u * w.write[:, : p.value_width]).astype(p.dtype), (0, 0)
        )
        yield
        rhs = jnp.concatenate([u.astype(p.dtype), entered], axis=0)
        for n in p.outputs(h):
            out = dot(lhs[c, n], rhs)
            if p.scale != 1:
                out *= p.scale
            walk.put(p, o_ref, c, n, out)

    with walk.carried(p, carried, s0_ref, end_ref) as state:
        for c in range(t.chunks):
            walk.lockstep(turn(c, h) for h in range(t.heads))


def _backward_kernel(with_gates: bool, p: Problem, *refs: Any) -> None:
    count = 3 if p.constant else 1
    q_ref, k_ref, v_ref, do_ref, *rest = refs
    gate_refs, (beta_ref, start_ref, dend_ref, *outs) = rest[:count], rest[count:]
    dq_ref, dk_ref, dv_ref, d0_ref, rows_ref, states, pairs, solutions, rests, written, carried = outs
    step = p.steps - 1 - pl.program_id(2)
    size, t = p.tiling.chunk, p.tiling

    wide = max(size, p.value_width)
    weights, betas = walk.weights(p, gate_refs), _betas(p, beta_ref, wide)
    below = _strictly_below(size)
    part = functools.partial(walk.part, p, step=step)

    def key(c: int, h: int) -> jax.Array:
        return part(k_ref, c, h // p.shared, p.width)

    units = [(c, h) for c in range(t.chunks) for h in range(t.heads)]
    alike = {(c, h): dot(key(c, h), key(c, h), (1, 1)) * weights(c, h).pair for c, h in units}
    alike = {unit: jnp.where(below, x, 0) for unit, x in alike.items()}
    inverses = unit_lower_inverses([betas(*unit)[0][:, :size] * x for unit, x in alike.items()], p.dtype)
    for (c, h), inverse in zip(units, inverses, strict=True):
        pairs[c, h] = alike[c, h].astype(p.dtype)
        solutions[c, h] = inverse.astype(p.dtype)

    def again(c: int, h: int) -> Iterator[None]:
        w, k = weights(c, h), key(c, h)
        read = (k * w.read[:, : p.width]).astype(p.dtype)
        rest = part(v_ref, c, h, p.value_width) - dot(read, states[c, h].astype(p.dtype))
        yield
        u = dot(solutions[c, h], (betas(c, h)[0][:, : p.value_width] * rest).astype(p.dtype))
        rests[c, h] = rest
        written[c, h] = u.astype(p.dtype)
        yield
        # The state after the last chunk is wanted only by the gradient of the gates.
        if with_gates or c < t.chunks - 1:
            added = dot(k, (u * w.write[:, : p.value_width]).astype(p.dtype), (0, 0))
            states[c + 1, h] = w.total[:, : p.value_width] * states[c, h] + added

    for h in range(t.heads):
        states[0, h] = start_ref[0, 0, h]
    for c in range(t.chunks):
        walk.lockstep(again(c, h) for h in range(t.heads))

    shared = walk.SharedSums(p)
    columns: dict[tuple[str, int], jax.Array] = {}

    def turn(c: int, h: int) -> Iterator[None]:
        w, k, u = weights(c, h), key(c, h), written[c, h]
        write = w.write[:, : p.value_width]
        pair = p.scale * w.pair if p.scale != 1 else w.pair
        read = p.scale * w.read if p.scale != 1 else w.read
        entered, left = states[c, h].astype(p.dtype), gradient[h].astype(p.dtype)
        du = write * dot(k, left)
        queries = {n: part(q_ref, c, n, p.width) for n in p.queries(h)}
        by_query = []
        for (n, q), m in zip(queries.items(), p.outputs(h), strict=True):
            do = part(do_ref, c, m, p.value_width)
            du += dot((dot(q, k, (1, 1)) * pair).astype(p.dtype), do, (0, 0))
            da = (dot(do, u, (1, 1)) * pair).astype(p.dtype)
            by_query.append((n, q, da, (do * read[:, : p.value_width]).astype(p.dtype)))
        yield
        dy = dot(solutions[c, h], du.astype(p.dtype), (0, 0))
        error = rests[c, h] - dot(pairs[c, h], u)
        yield
        dr = betas(c, h)[0][:, : p.value_width] * dy
        walk.put(p, dv_ref, c, h, dr)
        columns["beta", h] = jnp.sum(dy * error, axis=1, keepdims=True)
        erased = (dr * w.read[:, : p.value_width]).astype(p.dtype)
        dg = jnp.where(below, -dot(dr.astype(p.dtype), u, (1, 1)) * w.pair, 0).astype(p.dtype)
        before = w.total[:, : p.value_width] * gradient[h] - dot(k, erased, (0, 0))
        yield
        dk_row = dot(dg, k) - dot(erased, entered, (1, 1))
        dk_column = dot(dg, k, (0, 0)) + dot((u * write).astype(p.dtype), left, (1, 1))
        by_row = k * dk_row
        yield
        last = h % p.shared == p.shared - 1
        for n, q, da, read_by in by_query:
            dq = dot(da, k) + dot(read_by, entered, (1, 1))
            dk_column += dot(da, q, (0, 0))
            before += dot(q, read_by, (0, 0))
            by_row += q * dq
            shared.add(dq_ref, dq, c, n, last=last)
        shared.add(dk_ref, dk_row + dk_column, c, h // p.shared, last=last)
        columns["sum", h] = jnp.zeros((size, 1), jnp.float32)
        if with_gates:
            ends = walk.iota((size, 1), 0) == size - 1
            # The rounded gradient, for that is what the keys' gradients hold, and most of them cancels.
            at_end = jnp.sum(states[c + 1, h] * left, keepdims=True)
            summed = jnp.sum(by_row - k * dk_column, axis=1, keepdims=True)
            columns["sum", h] = summed + jnp.where(ends, at_end, 0)
        gradient[h] = before

    with walk.carried(p, carried, dend_ref, d0_ref) as gradient:
        for c in reversed(range(t.chunks)):
            walk.lockstep(turn(c, h) for h in range(t.heads))
            ordered = [columns[kind, h] for kind in ("sum", "beta") for h in range(t.heads)]
            rows_ref[0, 0, :, c * size : (c + 1) * size] = jnp.concatenate(ordered, axis=1).T


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
    """See `walk.forward`."""
    c = p.tiling.chunk
    macs = (1 + p.group) * c * p.width + (p.group + 1) * c * p.value_width + c * c
    macs += (p.group + 2) * p.width * p.value_width
    gates = zip(walk.gate_names(p), gate, strict=True)
    operands = [("query", query), ("key", key), ("value", value), *gates, ("sums", beta), ("state", state)]
    (out, end), kept = walk.forward(
        p, _forward_kernel, "delta_rule_forward", macs, operands, keep=keep, out_dtype=out_dtype
    )
    return out, end, kept[0] if keep else None


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
    *,
    with_gates: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key, value, the initial state, the sums b and beta, the last two `[B, heads, padded]`.

    Those of the sums are 0 unless `with_gates`.
    """
    t = p.tiling
    groups, units = p.heads // t.heads, (t.chunks, t.heads)
    macs = (3 + 3 * p.group) * t.chunk * p.width + (4 + 2 * p.group) * t.chunk * p.value_width + t.chunk**2
    macs += (6 + 2 * p.group) * p.width * p.value_width
    operands = [("query", query), ("key", key), ("value", value), ("out", out_gradient)]
    operands += zip(walk.gate_names(p), gate, strict=True)
    operands += [("sums", beta), ("starts", starts), ("state", end_gradient)]
    more = [("two sums", (p.batch, groups, 2 * t.heads, p.padded))]
    scratch = [
        *[pltpu.VMEM((*units, t.chunk, t.chunk), p.dtype)] * 2,
        pltpu.VMEM((*units, t.chunk, p.value_width), jnp.float32),
        pltpu.VMEM((*units, t.chunk, p.value_width), p.dtype),
    ]
    kernel = functools.partial(_backward_kernel, with_gates)
    *gradients, rows = walk.backward(p, kernel, "delta_rule_backward", macs, operands, more, scratch)
    dq, dk, dv, d0 = gradients
    rows = rows.reshape(p.batch, groups, 2, t.heads, p.padded)
    sums, dbeta = (rows[:, :, i].reshape(p.batch, p.heads, p.padded) for i in range(2))
    return dq, dk, dv, d0, sums, dbeta
