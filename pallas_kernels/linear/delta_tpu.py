"""The delta rule on TPU: one walk over the chunks forward, one backward.

    A  = (k k^T) * pair, below the diagonal              r  = v - read * (k S)
    e  = r - A u                                         u  = beta * e
    o  = scale ((q k^T) * pair u + read * (q S))         S' = total S + (k * write)^T u

What the state already holds under a key is taken from the value before the system is solved, so that no large numbers
are left to cancel. Forward, e = (I + A diag(beta))^-1 r, and beta is only ever a row: columns cost broadcasts along the
lanes. Backward, u = X (beta r) with X = (I + diag(beta) A)^-1, and with the gradient dS' of the state after the chunk:

    a   = scale (q k^T) * pair    du = a^T do + write * (k dS'^T)       dy = X^T du      dv = dr = beta dy
    da  = scale (do u^T) * pair   dg = -(dr u^T) * pair, below the diagonal              dbeta = rowsum(dy * e)
    dq  = da k + scale (do * read) S^T                    dk_row = dg k - (dr * read) S^T
    dk_column = dg^T k + da^T q + (u * write) dS'^T       dk = dk_row + dk_column
    db  = rowsum(q * dq + k * dk_row - k * dk_column), and the last row of db gains sum(S' * dS')
    dS  = total dS' + scale q^T (do * read) - k^T (dr * read)

The compiler keeps the order of products. To solve a system is much elementwise work and few products, so the units are
written side by side, each chunk `DELAY` turns behind the one before it: one is solved among the products of others. Two
heads are solved at once, and in a turn they do the work of all chunks before the next two do: kinds of it alternate.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear import walk
from pallas_kernels.linear.solve import SOLVED, Inverse, couples, unit_lower_inverses
from pallas_kernels.linear.walk import Problem, dot

DELAY = 3
"""Turns between a chunk and the next: a state, or its gradient, is read in the first and written in the third."""


def _betas(p: Problem, ref: Any, width: int) -> Callable[[int, int], jax.Array]:
    """beta of (chunk, head) as a column that is as wide as wanted."""
    size, heads = p.tiling.chunk, p.tiling.heads
    tall = jnp.concatenate([ref[0, 0, :, c * size : (c + 1) * size] for c in range(p.tiling.chunks)], axis=0).T

    return lambda c, h: jnp.broadcast_to(tall[:, c * heads + h : c * heads + h + 1], (size, width))


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

    def begin(c: int, h: int) -> tuple[jax.Array, list[jax.Array]]:
        """L, and what is multiplied with u from the left."""
        k = walk.part(p, k_ref, c, h // p.shared, p.width, step=step)
        pair = weights(c, h).pair * beta_ref[0, 0, h : h + 1, c * size : (c + 1) * size]
        queries = [walk.part(p, q_ref, c, n, p.width) for n in p.queries(h)]
        alike, *scores = jnp.split(dot(jnp.concatenate([k, *queries], axis=0), k, (1, 1)), 1 + len(queries))
        # The last row of `pair` is `write`.
        lhs = [k.T * pair[size - 1 :], *(score * pair for score in scores)]
        return alike * pair, [x.astype(p.dtype) for x in lhs]

    def finish(c: int, h: int, inverse: Inverse, lhs: Sequence[jax.Array]) -> Iterator[None]:
        w, k = weights(c, h), walk.part(p, k_ref, c, h // p.shared, p.width, step=step)
        if keep and c % keep == 0:
            outs[2][0, c // keep, h] = state[h]
        v, read = walk.part(p, v_ref, c, h, p.value_width, step=step), w.read[:, : p.value_width]
        queries = [walk.part(p, q_ref, c, n, p.width) for n in p.queries(h)]
        # Products that share their right side are one, which is pushed once.
        of_state = dot(jnp.concatenate([k, *queries], axis=0), state[h].astype(p.dtype))
        known, *asked = jnp.split(of_state, 1 + len(queries))
        rest = v - read * known
        yield
        error = inverse.times(rest).astype(p.dtype)
        yield
        of_error = dot(jnp.concatenate(lhs, axis=0), error)
        state[h] = w.total[:, : p.value_width] * state[h] + of_error[: p.width]
        for i, (x, n) in enumerate(zip(asked, p.outputs(h), strict=True)):
            out = read * x + of_error[p.width + i * size : p.width + (i + 1) * size]
            walk.put(p, o_ref, c, n, out if p.scale == 1 else p.scale * out)

    def unit(c: int, heads: Sequence[int]) -> Iterator[None]:
        lowers, lhs = zip(*(begin(c, h) for h in heads), strict=True)
        yield
        inverses = yield from unit_lower_inverses(lowers, p.dtype)
        yield from walk.together(finish(c, *one) for one in zip(heads, inverses, lhs, strict=True))

    with walk.carried(p, carried, s0_ref, end_ref) as state:
        # Behind the branch, which nothing passes: what these wait for is then hidden.
        weights = walk.weights(p, gate_refs)
        # Later chunks first: what waits for the state is then last in its turn, and has the next turn to do so.
        chunks = reversed(range(t.chunks))
        units = [(c, heads) for heads, c in itertools.product(couples(t.heads), chunks)]
        walk.lockstep(walk.delayed(unit(c, heads), c * DELAY) for c, heads in units)


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

    def prepare(c: int, heads: Sequence[int]) -> Iterator[None]:
        lowers = []
        for h in heads:
            alike = jnp.where(below, dot(key(c, h), key(c, h), (1, 1)) * weights(c, h).pair, 0)
            pairs[c, h] = alike.astype(p.dtype)
            lowers.append(betas(c, h)[:, :size] * alike)
        yield
        inverses = yield from unit_lower_inverses(lowers, p.dtype)
        for h, inverse in zip(heads, inverses, strict=True):
            solutions[c, h] = inverse.matrix
        yield from walk.together(again(c, h) for h in heads)

    def solved(c: int, h: int) -> Inverse:
        return Inverse(solutions[c, h], mirrored=h % 2 == 1)

    def again(c: int, h: int) -> Iterator[None]:
        w, k = weights(c, h), key(c, h)
        read = (k * w.read[:, : p.width]).astype(p.dtype)
        rest = part(v_ref, c, h, p.value_width) - dot(read, states[c, h].astype(p.dtype))
        yield
        u = solved(c, h).times(betas(c, h)[:, : p.value_width] * rest)
        rests[c, h] = rest
        written[c, h] = u.astype(p.dtype)
        yield
        # The state after the last chunk is wanted only by the gradient of the gates.
        if with_gates or c < t.chunks - 1:
            added = dot(k, (u * w.write[:, : p.value_width]).astype(p.dtype), (0, 0))
            states[c + 1, h] = w.total[:, : p.value_width] * states[c, h] + added

    shared = walk.SharedSums(p)
    of_queries: dict[tuple[int, int], tuple[Any, Any]] = {}

    def read_weights(c: int, h: int) -> tuple[jax.Array, jax.Array]:
        """Of (chunk, head), those of queries, times the scale: `pair` and, as wide as a value, `read`."""
        w = weights(c, h)
        pair, read = (p.scale * w.pair, p.scale * w.read) if p.scale != 1 else (w.pair, w.read)
        return pair, read[:, : p.value_width]

    def ask(c: int, h: int) -> Iterator[None]:
        """What queries add to du and dS, which waits for no state."""
        k, (pair, read) = key(c, h), read_weights(c, h)
        queries = [part(q_ref, c, n, p.width) for n in p.queries(h)]
        gradients = [part(do_ref, c, m, p.value_width) for m in p.outputs(h)]
        scores = [(dot(q, k, (1, 1)) * pair).astype(p.dtype) for q in queries]
        yield
        du = sum(dot(a, do, (0, 0)) for a, do in zip(scores, gradients, strict=True))
        yield
        before = sum(dot(q, (do * read).astype(p.dtype), (0, 0)) for q, do in zip(queries, gradients, strict=True))
        of_queries[c, h] = du, before

    def turn(c: int, h: int) -> Iterator[None]:
        w, k, u = weights(c, h), key(c, h), written[c, h]
        write = w.write[:, : p.value_width]
        pair, read = read_weights(c, h)
        rows = slice(c * size, (c + 1) * size)
        entered, left = states[c, h].astype(p.dtype), gradient[h].astype(p.dtype)
        du_of_queries, before_of_queries = of_queries.pop((c, h))
        du = write * dot(k, left) + du_of_queries
        queries = [part(q_ref, c, n, p.width) for n in p.queries(h)]
        gradients = [part(do_ref, c, m, p.value_width) for m in p.outputs(h)]
        yield
        dy = solved(c, h).times(du, (0, 0))
        error = rests[c, h] - dot(pairs[c, h], u)
        yield
        dr = betas(c, h)[:, : p.value_width] * dy
        walk.put(p, dv_ref, c, h, dr)
        # Turned first, sums lie along the lanes as they are stored, and no head waits for the others.
        rows_ref[0, 0, t.heads + h : t.heads + h + 1, rows] = jnp.sum((dy * error).T, axis=0, keepdims=True)
        erased = -dr
        erased_by = (erased * w.read[:, : p.value_width]).astype(p.dtype)
        gradient[h] = w.total[:, : p.value_width] * gradient[h] + dot(k, erased_by, (0, 0)) + before_of_queries
        # Products that share their right side are one, and so are those that are added: fewer pushes. But dg^T k stands
        # alone, for with dg k it cancels in the gradient of the gates.
        lhs = [erased.astype(p.dtype), *gradients]
        dg, *das = jnp.split(dot(jnp.concatenate(lhs, axis=0), u, (1, 1)), 1 + len(queries))
        dg = jnp.where(below, dg * w.pair, 0).astype(p.dtype)
        das = [(da * pair).astype(p.dtype) for da in das]
        yield
        lhs = [jnp.concatenate([dg, erased_by], axis=1)]
        for da, do in zip(das, gradients, strict=True):
            lhs.append(jnp.concatenate([da, (do * read).astype(p.dtype)], axis=1))
        rhs = jnp.concatenate([k, entered.T], axis=0)
        dk_row, *dqs = jnp.split(dot(jnp.concatenate(lhs, axis=0), rhs), 1 + len(queries))
        yield
        lhs = [(u * write).astype(p.dtype), *(da.T for da in das)]
        dk_column = dot(dg, k, (0, 0)) + dot(jnp.concatenate(lhs, axis=1), jnp.concatenate([left.T, *queries], axis=0))
        last = h % p.shared == p.shared - 1
        by_row = k * dk_row
        for q, dq, n in zip(queries, dqs, p.queries(h), strict=True):
            by_row += q * dq
            shared.add(dq_ref, dq, c, n, last=last)
        shared.add(dk_ref, dk_row + dk_column, c, h // p.shared, last=last)
        sums = jnp.zeros((1, size), jnp.float32)
        if with_gates:
            # The rounded gradient, for that is what the keys' gradients hold, and most of them cancels.
            at_end = jnp.sum(states[c + 1, h] * left, keepdims=True)
            sums = jnp.sum((by_row - k * dk_column).T, axis=0, keepdims=True)
            sums += jnp.where(walk.iota((1, size), 1) == size - 1, at_end, 0)
        rows_ref[0, 0, h : h + 1, rows] = sums

    units = [(c, h) for c in range(t.chunks) for h in range(t.heads)]
    with walk.carried(p, carried, dend_ref, d0_ref) as gradient:
        for h in range(t.heads):
            states[0, h] = start_ref[0, 0, h]
        # A unit's queries ask once its elimination is over, a head a turn, for the joins leave the matrix units idle.
        asked = (walk.delayed(ask(c, h), c * DELAY + SOLVED + h) for c, h in units)
        prepared = [walk.delayed(prepare(c, heads), c * DELAY) for c in range(t.chunks) for heads in couples(t.heads)]
        walk.lockstep([*prepared, *asked])
        units = [(c, h) for h in range(t.heads) for c in reversed(range(t.chunks))]
        walk.lockstep(walk.delayed(turn(c, h), (t.chunks - 1 - c) * DELAY) for c, h in units)


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
