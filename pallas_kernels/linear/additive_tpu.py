"""The additive recurrence on TPU: one walk over the chunks forward, one backward.

    S' = total S + (k * write)^T v                     o = scale [(q k^T) * pair | q * read] [v ; S]

    p  = scale (do v^T) * pair      a = scale (q k^T) * pair      dS' is the gradient of the state after the chunk
    dq = p k   + scale (do * read) S^T      dk = p^T q + (v dS'^T) * write      dv = a^T do + (k * write) dS'
    dS = total dS' + scale (q * read)^T do  db = rowsum(q * dq - k * dk), and the last row of db gains sum(S' * dS')

The scores of unit i + lag stand before the products that end unit i. The forward walk keeps the state at the start of
every grid step, and the backward walk computes the states between again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear import walk
from pallas_kernels.linear.walk import Problem


def _forward_kernel(p: Problem, keep: int, *refs: Any) -> None:
    """Writes the state before every `keep` chunks, unless `keep` is 0."""
    count = 3 if p.constant else 1
    q_ref, k_ref, v_ref, *rest = refs
    gate_refs, (s0_ref, *outs, carried) = rest[:count], rest[count:]
    o_ref, end_ref = outs[:2]
    step = pl.program_id(2)
    size, t = p.tiling.chunk, p.tiling

    @pl.when(step == 0)
    def _() -> None:
        carried[...] = s0_ref[0]

    weights = walk.weights(p, gate_refs)
    state = [carried[h] for h in range(t.heads)]

    def begin(unit: tuple[int, int]) -> Any:
        c, h = unit
        w = weights(c, h)
        k = walk.part(p, k_ref, c, h, p.width, step=step)
        lhs = []
        for r in range(p.group):
            q = walk.part(p, q_ref, c, h * p.group + r, p.width)
            scores = (walk.dot(q, k, (1, 1)) * w.pair).astype(q.dtype)
            lhs.append(jnp.concatenate([scores, (q * w.read[:, : p.width]).astype(q.dtype)], axis=1))
        v = walk.part(p, v_ref, c, h, p.value_width, step=step)
        # The token axis of k is turned around for k^T v, so k waits for nothing and v takes the decay.
        return lhs, (v * w.write[:, : p.value_width]).astype(v.dtype), w.total

    units = [(c, h) for c in range(t.chunks) for h in range(t.heads)]
    for (c, h), (lhs, write, total) in walk.interleaved(units, t.lag, begin):
        if keep and c % keep == 0:
            outs[2][0, c // keep, h] = state[h]
        k = walk.part(p, k_ref, c, h, p.width, step=step)
        v = walk.part(p, v_ref, c, h, p.value_width, step=step)
        rhs = jnp.concatenate([v, state[h].astype(v.dtype)], axis=0)
        for r in range(p.group):
            n = h * p.group + r
            out = walk.dot(lhs[r], rhs)
            if p.scale != 1:
                out *= p.scale
            o_ref[0, c * size : (c + 1) * size, n * p.value_width : (n + 1) * p.value_width] = out.astype(o_ref.dtype)
        state[h] = total * state[h] + walk.dot(k, write, (0, 0))
    for h in range(t.heads):
        carried[h] = state[h]

    @pl.when(step == p.steps - 1)
    def _() -> None:
        end_ref[0] = carried[...]


def _backward_kernel(with_gates: bool, p: Problem, *refs: Any) -> None:
    count = 3 if p.constant else 1
    q_ref, k_ref, v_ref, do_ref, *rest = refs
    gate_refs, (start_ref, dend_ref, dq_ref, dk_ref, dv_ref, d0_ref, *more) = rest[:count], rest[count:]
    states, carried = more[-2:]
    step = p.steps - 1 - pl.program_id(2)
    size, t = p.tiling.chunk, p.tiling

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried[...] = dend_ref[0]

    weights = walk.weights(p, gate_refs)
    part = functools.partial(walk.part, p, step=step)

    for h in range(t.heads):
        states[0, h] = start_ref[0, 0, h]
    # The state after the last chunk is wanted only by the gradient of the gates.
    for c in range(t.chunks if with_gates else t.chunks - 1):
        for h in range(t.heads):
            w = weights(c, h)
            k, v = part(k_ref, c, h, p.width), part(v_ref, c, h, p.value_width)
            written = walk.dot(k, (v * w.write[:, : p.value_width]).astype(v.dtype), (0, 0))
            states[c + 1, h] = w.total * states[c, h] + written

    gradient = [carried[h] for h in range(t.heads)]

    def begin(unit: tuple[int, int]) -> Any:
        c, h = unit
        w, k, v = weights(c, h), part(k_ref, c, h, p.width), part(v_ref, c, h, p.value_width)
        by_query = []
        for n in range(h * p.group, (h + 1) * p.group):
            q, do = part(q_ref, c, n, p.width), part(do_ref, c, n, p.value_width)
            pair = p.scale * w.pair if p.scale != 1 else w.pair
            a = (walk.dot(q, k, (1, 1)) * pair).astype(q.dtype)
            b = (walk.dot(do, v, (1, 1)) * pair).astype(q.dtype)
            read = p.scale * w.read if p.scale != 1 else w.read
            by_query.append((a, b, (do * read[:, : p.value_width]).astype(do.dtype)))
        return w.write, (v * w.write[:, : p.value_width]).astype(v.dtype), w.total, by_query

    units = [(c, h) for c in reversed(range(t.chunks)) for h in range(t.heads)]
    sums: list[jax.Array] = []
    for (c, h), (write, written, kept, by_query) in walk.interleaved(units, t.lag, begin):
        rows = slice(c * size, (c + 1) * size)
        k = part(k_ref, c, h, p.width)
        entered = states[c, h].astype(k.dtype)
        left = gradient[h].astype(k.dtype)
        dk = walk.dot(written, left, (1, 1))
        dv = write[:, : p.value_width] * walk.dot(k, left)
        gradient_before = kept * gradient[h]
        by_row = jnp.zeros((size, p.width), jnp.float32)
        for r, (a, b, read) in enumerate(by_query):
            n = h * p.group + r
            q, do = part(q_ref, c, n, p.width), part(do_ref, c, n, p.value_width)
            dq = walk.dot(b, k) + walk.dot(read, entered, (1, 1))
            dk += walk.dot(b, q, (0, 0))
            dv += walk.dot(a, do, (0, 0))
            gradient_before += walk.dot(q, read, (0, 0))
            dq_ref[0, rows, n * p.width : (n + 1) * p.width] = dq.astype(dq_ref.dtype)
            by_row += q * dq
        dk_ref[0, rows, h * p.width : (h + 1) * p.width] = dk.astype(dk_ref.dtype)
        dv_ref[0, rows, h * p.value_width : (h + 1) * p.value_width] = dv.astype(dv_ref.dtype)
        if with_gates:
            last = walk.iota((size, 1), 0) == size - 1
            # The rounded gradient, for that is what dk holds, and most of them cancels.
            at_end = jnp.sum(states[c + 1, h] * left, keepdims=True)
            sums.append(jnp.sum(by_row - k * dk, axis=1, keepdims=True) + jnp.where(last, at_end, 0))
            if len(sums) == t.heads:
                more[0][0, 0, :, rows] = jnp.concatenate(sums, axis=1).T
                sums.clear()
        gradient[h] = gradient_before
    for h in range(t.heads):
        carried[h] = gradient[h]

    @pl.when(pl.program_id(2) == p.steps - 1)
    def _() -> None:
        d0_ref[0] = carried[...]


def forward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: Sequence[jax.Array],
    state: jax.Array,
    *,
    keep: bool,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `walk.forward`."""
    macs = p.group * p.tiling.chunk * (p.width + p.value_width) + (p.group + 1) * p.width * p.value_width
    gates = zip(walk.gate_names(p), gate, strict=True)
    operands = [("query", query), ("key", key), ("value", value), *gates, ("state", state)]
    name = "linear_attention_forward"
    return walk.forward(p, _forward_kernel, name, macs, operands, keep=keep, out_dtype=out_dtype)


def backward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: Sequence[jax.Array],
    starts: jax.Array,
    out_gradient: jax.Array,
    end_gradient: jax.Array,
    *,
    with_gates: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query, key, value, the initial state and, `with_gates`, of the sums b `[B, K, padded]`."""
    t = p.tiling
    macs = p.group * (2 * t.chunk * (p.width + p.value_width) + 2 * p.width * p.value_width)
    macs += 3 * p.width * p.value_width
    operands = [("query", query), ("key", key), ("value", value), ("out", out_gradient)]
    operands += zip(walk.gate_names(p), gate, strict=True)
    operands += [("starts", starts), ("state", end_gradient)]
    more = [("sums", (p.batch, p.heads // t.heads, t.heads, p.padded))] if with_gates else []
    kernel = functools.partial(_backward_kernel, with_gates)
    dq, dk, dv, d0, *sums = walk.backward(p, kernel, "linear_attention_backward", macs, operands, more)
    return dq, dk, dv, d0, sums[0].reshape(p.batch, p.heads, p.padded) if with_gates else None
