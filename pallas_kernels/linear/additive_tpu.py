"""The additive recurrence on TPU: one walk over the chunks forward, one backward.

    S' = total S + (k * write)^T v                     o = scale [(q k^T) * pair | q * read] [v ; S]

    p  = scale (do v^T) * pair      a = scale (q k^T) * pair      dS' is the gradient of the state after the chunk
    dq = [p | scale do * read] [k ; S^T]    dk = p^T q + (v * write) dS'^T      dv = [a^T | k * write] [do ; dS']
    dS = total dS' + scale (q * read)^T do  db = rowsum(q * dq - k * dk), and the last row of db gains sum(S' * dS')

Outputs may be divided by scale q (z + eps[1]) + eps[0], z' = total z + colsum(k * write), which is a value channel of
ones that costs no matrix product. Then do / d takes the place of do, and do v^T / d gains dd = -rowsum(do * o) / d.

p and a are made turned, as they are read most. A product of twice the depth is on v6e pushed as fast as one of two.
The scores of unit i + lag stand before the products that end unit i. The forward walk keeps the state at the start of
every grid step, and the backward walk computes the states between again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear import walk
from pallas_kernels.linear.walk import Problem

MADE = 3
"""States that a unit of the backward walk makes again, until all stand."""


def _forward_kernel(p: Problem, keep: int, *refs: Any) -> None:
    """Writes the state before every `keep` chunks, unless `keep` is 0."""
    count = 3 if p.constant else 1
    q_ref, k_ref, v_ref, *rest = refs
    gate_refs, rest = rest[:count], rest[count:]
    if p.eps is None:
        s0_ref, o_ref, end_ref, *kept, carried = rest
        z = None
    else:
        s0_ref, z0_ref, o_ref, end_ref, z_end_ref, divisors_ref, *kept, carried, z = rest
    step = pl.program_id(2)
    size, t = p.tiling.chunk, p.tiling

    @pl.when(step == 0)
    def _() -> None:
        carried[...] = s0_ref[0]
        if z is not None:
            z[...] = z0_ref[0, 0]

    weights = walk.weights(p, gate_refs)
    state = [carried[h] for h in range(t.heads)]

    def begin(unit: tuple[int, int]) -> Any:
        c, h = unit
        w = weights(c, h)
        k = walk.part(p, k_ref, c, h, p.width, step=step)
        lhs, sums = [], []
        for r in range(p.group):
            q = walk.part(p, q_ref, c, h * p.group + r, p.width)
            scores = walk.dot(q, k, (1, 1)) * w.pair
            lhs.append(jnp.concatenate([scores.astype(q.dtype), (q * w.read[:, : p.width]).astype(q.dtype)], axis=1))
            sums.append(None if z is None else jnp.sum(scores, axis=1, keepdims=True))
        v = walk.part(p, v_ref, c, h, p.value_width, step=step)
        # The token axis of k is turned around for k^T v, so k waits for nothing and v takes the decay.
        return lhs, sums, (v * w.write[:, : p.value_width]).astype(v.dtype), w

    units = [(c, h) for c in range(t.chunks) for h in range(t.heads)]
    divisors: list[jax.Array] = []
    for (c, h), (lhs, sums, write, w) in walk.interleaved(units, t.lag, begin):
        rows = slice(c * size, (c + 1) * size)
        if keep and c % keep == 0:
            kept[0][0, c // keep, h] = state[h]
            if z is not None:
                kept[1][0, c // keep, 0, h : h + 1] = z[h : h + 1]
        k = walk.part(p, k_ref, c, h, p.width, step=step)
        v = walk.part(p, v_ref, c, h, p.value_width, step=step)
        rhs = jnp.concatenate([v, state[h].astype(v.dtype)], axis=0)
        for r in range(p.group):
            n = h * p.group + r
            out = walk.dot(lhs[r], rhs)
            if p.scale != 1:
                out *= p.scale
            if z is not None:
                q = walk.part(p, q_ref, c, n, p.width)
                divisors.append(_divisor(p, sums[r], q, w.read[:, : p.width], z[h : h + 1]))
                out = jnp.where(divisors[-1] == 0, 0, out / jnp.where(divisors[-1] == 0, 1, divisors[-1]))
            o_ref[0, rows, n * p.value_width : (n + 1) * p.value_width] = out.astype(o_ref.dtype)
        state[h] = w.total[:, : p.value_width] * state[h] + walk.dot(k, write, (0, 0))
        if z is not None:
            z[h : h + 1] = _next_z(p, z[h : h + 1], k, w)
            if h == t.heads - 1:
                divisors_ref[0, 0, :, rows] = jnp.concatenate(divisors, axis=1).T
                divisors.clear()
    for h in range(t.heads):
        carried[h] = state[h]

    @pl.when(step == p.steps - 1)
    def _() -> None:
        end_ref[0] = carried[...]
        if z is not None:
            z_end_ref[0, 0] = z[...]


def _divisor(p: Problem, sums: jax.Array, q: jax.Array, read: jax.Array, z: jax.Array) -> jax.Array:
    """scale q (z_t + eps[1]) + eps[0] as a column, from the sums of the scores and z before the chunk."""
    assert p.eps is not None
    added, to_z = p.eps
    return p.scale * (sums + jnp.sum(q * (read * z + to_z), axis=1, keepdims=True)) + added


def _next_z(p: Problem, z: jax.Array, k: jax.Array, w: walk.Weights) -> jax.Array:
    return w.total[:, : p.width] * z + jnp.sum(k * w.write[:, : p.width], axis=0, keepdims=True)


def _backward_kernel(with_gates: bool, p: Problem, *refs: Any) -> None:
    count = 3 if p.constant else 1
    q_ref, k_ref, v_ref, do_ref, *rest = refs
    gate_refs, rest = rest[:count], rest[count:]
    divided = p.eps is not None
    if p.eps is not None:
        (
            start_ref,
            dend_ref,
            inverse_ref,
            dd_ref,
            z_start_ref,
            dz_end_ref,
            dq_ref,
            dk_ref,
            dv_ref,
            d0_ref,
            dz0_ref,
            *more,
        ) = rest
        *more, states, z, dz, gradient = more
    else:
        start_ref, dend_ref, dq_ref, dk_ref, dv_ref, d0_ref, *more, states, gradient = rest
    step = p.steps - 1 - pl.program_id(2)
    size, t = p.tiling.chunk, p.tiling

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        gradient[...] = dend_ref[0]
        if divided:
            dz[...] = dz_end_ref[0, 0]

    weights = walk.weights(p, gate_refs, turned=True)
    part = functools.partial(walk.part, p, step=step)

    if divided:
        z[0] = z_start_ref[0, 0, 0]

    def again(c: int, h: int) -> None:
        """The state of head `h` after chunk `c`."""
        w = weights(c, h)
        k, v = part(k_ref, c, h, p.width), part(v_ref, c, h, p.value_width)
        written = walk.dot(k, (v * w.write[:, : p.value_width]).astype(v.dtype), (0, 0))
        states[c + 1, h] = w.total[:, : p.value_width] * states[c, h] + written
        if divided:
            z[c + 1, h : h + 1] = _next_z(p, z[c, h : h + 1], k, w)

    @functools.cache
    def columns(c: int) -> tuple[jax.Array, jax.Array]:
        """1 / d and dd, a column for every query head."""
        return inverse_ref[0, 0, :, c * size : (c + 1) * size].T, dd_ref[0, 0, :, c * size : (c + 1) * size].T

    def of_z(unit: tuple[int, int], n: int, w: walk.Weights) -> jax.Array:
        """What z before the chunk is multiplied by in the divisors of query head `n`, times their gradients."""
        return p.scale * columns(unit[0])[1][:, n : n + 1] * w.read[:, : p.width]

    def begin(unit: tuple[int, int]) -> Any:
        c, h = unit
        w, k, v = weights(c, h), part(k_ref, c, h, p.width), part(v_ref, c, h, p.value_width)
        rows = slice(c * size, (c + 1) * size)
        by_query = []
        for n in range(h * p.group, (h + 1) * p.group):
            q, do = part(q_ref, c, n, p.width), part(do_ref, c, n, p.value_width)
            pair = p.scale * w.pair if p.scale != 1 else w.pair
            read = p.scale * w.read if p.scale != 1 else w.read
            a, b = walk.dot(k, q, (1, 1)) * pair, walk.dot(v, do, (1, 1))
            if divided:
                inverse, dd = (ref[0, 0, n : n + 1, rows] for ref in (inverse_ref, dd_ref))
                a, b, read = a * inverse, b * inverse + dd, read * columns(c)[0][:, n : n + 1]
            a, b = a.astype(q.dtype), (b * pair).astype(q.dtype)
            by_query.append((a, b, (do * read[:, : p.value_width]).astype(do.dtype)))
        return w, (v * w.write[:, : p.value_width]).astype(v.dtype), by_query

    def end(unit: tuple[int, int], w: walk.Weights, written: jax.Array, by_query: Any) -> Callable[[], None]:
        """Gradients of the key, the value and the state; what is returned does those of the queries and the gates."""
        c, h = unit
        rows = slice(c * size, (c + 1) * size)
        k = part(k_ref, c, h, p.width)
        queries = [part(q_ref, c, h * p.group + r, p.width) for r in range(p.group)]
        gradients = [part(do_ref, c, h * p.group + r, p.value_width) for r in range(p.group)]
        left = gradient[h].astype(k.dtype)
        dk = walk.dot(written, left, (1, 1))
        z_left: Any = dz[h : h + 1] if divided else None
        if divided:
            dk += w.write[:, : p.width] * z_left
        gradient_before = w.total[:, : p.value_width] * gradient[h]
        for q, (_, _, read) in zip(queries, by_query, strict=True):
            gradient_before += walk.dot(q, read, (0, 0))
        gradient[h] = gradient_before
        for q, (_, b, _) in zip(queries, by_query, strict=True):
            dk += walk.dot(b, q)
        dk_ref[0, rows, h * p.width : (h + 1) * p.width] = dk.astype(dk_ref.dtype)
        to_values = [(k * w.write[:, : p.width]).astype(k.dtype), *(a for a, _, _ in by_query)]
        dv = walk.dot(jnp.concatenate(to_values, axis=1), jnp.concatenate([left, *gradients], axis=0))
        dv_ref[0, rows, h * p.value_width : (h + 1) * p.value_width] = dv.astype(dv_ref.dtype)
        of_key = k * dk
        if divided:
            z_before = w.total[:, : p.width] * z_left
            for r, q in enumerate(queries):
                z_before += jnp.sum(q * of_z(unit, h * p.group + r, w), axis=0, keepdims=True)
            dz[h : h + 1] = z_before

        def of_queries() -> None:
            rhs = jnp.concatenate([k, states[c, h].astype(k.dtype).T], axis=0)
            by_row = jnp.zeros((size, p.width), jnp.float32)
            for r, (q, (_, b, read)) in enumerate(zip(queries, by_query, strict=True)):
                n = h * p.group + r
                dq = walk.dot(jnp.concatenate([b.T, read], axis=1), rhs)
                if divided:
                    dq += of_z(unit, n, w) * z[c, h : h + 1]
                by_row += q * dq
                if p.eps is not None and p.eps[1]:
                    dq += p.scale * p.eps[1] * columns(c)[1][:, n : n + 1]
                dq_ref[0, rows, n * p.width : (n + 1) * p.width] = dq.astype(dq_ref.dtype)
            if with_gates:
                # The rounded gradient, for that is what dk holds, and most of them cancels.
                at_end = jnp.sum(states[c + 1, h] * left, keepdims=True)
                if divided:
                    at_end += jnp.sum(z[c + 1, h : h + 1] * z_left, keepdims=True)
                # Turned first, sums lie along the lanes as they are stored, and no head waits for the others.
                sums = jnp.sum((by_row - of_key).T, axis=0, keepdims=True)
                more[0][0, 0, h : h + 1, rows] = sums + jnp.where(walk.iota((1, size), 1) == size - 1, at_end, 0)

        return of_queries

    for h in range(t.heads):
        states[0, h] = start_ref[0, 0, h]
    # The state after the last chunk is wanted only by the gradient of the gates.
    made = [(c, h) for h in range(t.heads) for c in range(t.chunks if with_gates else t.chunks - 1)]
    units = [(c, h) for c in reversed(range(t.chunks)) for h in range(t.heads)]
    # The compiler keeps the order of products. States are made among those of the first units, whose queries wait until
    # all stand. Then two units' queries have their turn in every unit, and at last one, late: none reads what is new.
    waiting: list[Callable[[], None]] = []
    for i, (unit, begun) in enumerate(walk.interleaved(units, t.lag, begin)):
        for one in made[i * MADE : (i + 1) * MADE]:
            again(*one)
        waiting.append(end(unit, *begun))
        if (i + 1) * MADE >= len(made):
            turn = min(2, len(waiting) - 1)
            for of_queries in waiting[:turn]:
                of_queries()
            del waiting[:turn]
    for of_queries in waiting:
        of_queries()

    @pl.when(pl.program_id(2) == p.steps - 1)
    def _() -> None:
        d0_ref[0] = gradient[...]
        if divided:
            dz0_ref[0, 0] = dz[...]


def forward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: Sequence[jax.Array],
    state: jax.Array,
    *z: jax.Array,
    keep: bool,
    out_dtype: Any,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """See `walk.forward`; z, where outputs are divided, is `[B, groups, heads, H]`."""
    macs = p.group * p.tiling.chunk * (p.width + p.value_width) + (p.group + 1) * p.width * p.value_width
    gates = zip(walk.gate_names(p), gate, strict=True)
    operands = [("query", query), ("key", key), ("value", value), *gates, ("state", state), *(("z", x) for x in z)]
    name = "linear_attention_forward"
    return walk.forward(p, _forward_kernel, name, macs, operands, keep=keep, out_dtype=out_dtype)


class Divided(NamedTuple):
    """What backward needs of divided outputs: 1 / d, dd, z before every step, and the gradient of z at the end."""

    inverses: jax.Array
    divisor_gradients: jax.Array
    starts: jax.Array
    end_gradient: jax.Array


def backward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: Sequence[jax.Array],
    starts: jax.Array,
    out_gradient: jax.Array,
    end_gradient: jax.Array,
    divided: Divided | None = None,
    *,
    with_gates: bool,
) -> tuple[list[jax.Array], jax.Array | None]:
    """Gradients of query, key, value, the initial state and z, and `with_gates` of the sums b `[B, K, padded]`."""
    t, groups = p.tiling, p.heads // p.tiling.heads
    macs = p.group * (2 * t.chunk * (p.width + p.value_width) + 2 * p.width * p.value_width)
    macs += 3 * p.width * p.value_width
    operands = [("query", query), ("key", key), ("value", value), ("out", out_gradient)]
    if p.constant:
        gate = (jnp.swapaxes(gate[0], 1, 2), *gate[1:])
    operands += zip(walk.gate_names(p), gate, strict=True)
    operands += [("starts", starts), ("state", end_gradient)]
    more, scratch = [], []
    if divided is not None:
        operands += zip(("by query", "by query", "z starts", "z"), divided, strict=True)
        more.append(("z", (p.batch, groups, t.heads, p.width)))
        scratch = [
            pltpu.VMEM((t.chunks + 1, t.heads, p.width), jnp.float32),
            pltpu.VMEM((t.heads, p.width), jnp.float32),
        ]
    if with_gates:
        more.append(("sums", (p.batch, groups, t.heads, p.padded)))
    kernel = functools.partial(_backward_kernel, with_gates)
    gradients = walk.backward(p, kernel, "linear_attention_backward", macs, operands, more, scratch)
    if not with_gates:
        return gradients, None
    return gradients[:-1], gradients[-1].reshape(p.batch, p.heads, p.padded)
