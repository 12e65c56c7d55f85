"""The additive recurrence with a decay for every key channel on TPU, by halves of halves of a chunk.

    S' = exp(b_C) S + (k * exp(b_C - b))^T v             o = scale (A v + (q * exp b) S)

A[r, j] = sum_h q[r, h] k[j, h] exp(b[r, h] - b[j, h]) is no product of two matrices, for exp(-b) overflows. But where r
lies in the second half of a block of 2 s rows and j in its first, with m the row where the second half begins,

    A[r, j] = (q * exp(b - b_m))[r] . (k * exp(b_m - b))[j]            both exponents at most 0

is one, and s = C / 2, C / 4, .., 1 are all pairs but the diagonal, where there is no decay. Backward the same factors,
for p = scale do v^T of those pairs, give dq = (p (k * exp(b_m - b))) * exp(b - b_m), and dk likewise; and

    db = q * dq - k * dk, and the last token's row of db gains rowsum(S' * dS')
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear import gates, walk
from pallas_kernels.linear.walk import Problem, dot, every_second, with_gaps

SUBLANES = 8


class Halves(NamedTuple):
    """Decays of rows of second halves since m, and of rows of first halves until then, and which rows meet which.

    Halves that are whole tiles of rows are taken out, worked on, and put back.
    """

    size: int
    decay: jax.Array
    pairs: jax.Array

    def late(self, x: jax.Array) -> jax.Array:
        return every_second(x, self.size) if self.size >= SUBLANES else x

    def early(self, x: jax.Array) -> jax.Array:
        return every_second(x, self.size, first=0) if self.size >= SUBLANES else x

    def back(self, x: jax.Array, *, late: bool) -> jax.Array:
        return with_gaps(x, self.size, first=int(late)) if self.size >= SUBLANES else x


def gate_sums(p: Problem, gate: jax.Array) -> list[jax.Array]:
    """The parts of b, summed over the rows; see `gates`."""
    (part, *more) = gates.split(jnp.maximum(gate, gates.FORGET), p.dtype)
    if not more:
        # Half of a gate's bits and then the other half, so that products of bfloat16 sum them.
        chunk = part.shape[0]
        below = (walk.iota((chunk, chunk), 0) >= walk.iota((chunk, chunk), 1)).astype(p.dtype)
        high = part.astype(p.dtype)
        return [dot(below, high) + dot(below, (part - high.astype(jnp.float32)).astype(p.dtype))]
    return [_running_sum(part), *map(_running_sum, more)]


def _running_sum(x: jax.Array) -> jax.Array:
    """Over the rows, in their dtype: products would round."""
    shift = 1
    while shift < x.shape[0]:
        x += jnp.concatenate([jnp.zeros((shift, x.shape[1]), x.dtype), x[:-shift]], axis=0)
        shift *= 2
    return x


def _middle(x: jax.Array, size: int) -> jax.Array:
    """For every row, the row where the second half of its block of 2 `size` rows begins."""
    if 2 * size > SUBLANES:
        starts = range(size, x.shape[0], 2 * size)
        return jnp.concatenate([jnp.broadcast_to(x[i : i + 1], (2 * size, x.shape[1])) for i in starts], axis=0)
    row = walk.iota((SUBLANES, x.shape[1]), 0)
    place = row // (2 * size) * (2 * size) + size
    tiles = [x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES)]
    return jnp.concatenate(
        [jnp.take_along_axis(tile, place, axis=0, mode="promise_in_bounds") for tile in tiles], axis=0
    )


def _exp_of(p: Problem, parts: Sequence[jax.Array]) -> jax.Array:
    return gates.exponential(p.dtype)(functools.reduce(jnp.add, parts))


def halvings(p: Problem, sums: Sequence[jax.Array]) -> Iterator[Halves]:
    chunk = p.tiling.chunk
    row, column = walk.iota((chunk, chunk), 0), walk.iota((chunk, chunk), 1)
    size = chunk // 2
    while size:
        since = functools.reduce(jnp.add, [x - _middle(x, size) for x in sums])
        decay = gates.exponential(p.dtype)(-jnp.abs(since))
        yield Halves(size, decay, (row // size == column // size + 1) & (row // size % 2 == 1))
        size //= 2


def row_decays(p: Problem, sums: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the state loses before each row reads it, after each row writes to it, and over the chunk, as a column."""
    last = [x[-1:] for x in sums]
    read = _exp_of(p, sums)
    write = _exp_of(p, [z - x for x, z in zip(sums, last, strict=True)])
    return read, write, jnp.broadcast_to(_exp_of(p, last), (SUBLANES, p.width)).T[:, :1]


def _forward_kernel(p: Problem, keep: int, *refs: Any) -> None:
    q_ref, k_ref, v_ref, gate_ref, s0_ref, *outs, carried = refs
    o_ref, end_ref = outs[:2]
    step, t, size = pl.program_id(2), p.tiling, p.tiling.chunk
    part = functools.partial(walk.part, p, step=step)

    diagonal = walk.iota((size, size), 0) == walk.iota((size, size), 1)

    def turn(c: int, h: int) -> Iterator[None]:
        k, v = part(k_ref, c, h, p.width), part(v_ref, c, h, p.value_width)
        queries = [walk.part(p, q_ref, c, n, p.width) for n in p.queries(h)]
        sums = gate_sums(p, part(gate_ref, c, h, p.width))
        read, write, total = row_decays(p, sums)
        yield
        scores = [jnp.where(diagonal, jnp.sum(q.astype(jnp.float32) * k, axis=1, keepdims=True), 0) for q in queries]
        for level in halvings(p, sums):
            early_decay, late_decay = level.early(level.decay), level.late(level.decay)
            early = level.back((level.early(k) * early_decay).astype(p.dtype), late=False)
            for r, q in enumerate(queries):
                late = (level.late(q) * late_decay).astype(p.dtype)
                scores[r] += jnp.where(level.pairs, level.back(dot(late, early, (1, 1)), late=True), 0)
            yield
        rhs = jnp.concatenate([v, state[h].astype(v.dtype)], axis=0)
        for r, n in enumerate(p.outputs(h)):
            lhs = jnp.concatenate([scores[r].astype(p.dtype), (queries[r] * read).astype(p.dtype)], axis=1)
            out = dot(lhs, rhs)
            if p.scale != 1:
                out *= p.scale
            walk.put(p, o_ref, c, n, out)
        yield
        state[h] = total * state[h] + dot((k * write).astype(p.dtype), v, (0, 0))

    with walk.carried(p, carried, s0_ref, end_ref) as state:
        for c in range(t.chunks):
            if keep and c % keep == 0:
                for h in range(t.heads):
                    outs[2][0, c // keep, h] = state[h]
            walk.lockstep(turn(c, h) for h in range(t.heads))


def _backward_kernel(p: Problem, *refs: Any) -> None:
    q_ref, k_ref, v_ref, do_ref, gate_ref, start_ref, dend_ref, *outs = refs
    dq_ref, dk_ref, dv_ref, d0_ref, db_ref, states, carried = outs
    step, t, size = p.steps - 1 - pl.program_id(2), p.tiling, p.tiling.chunk
    part = functools.partial(walk.part, p, step=step)

    def again(c: int, h: int) -> Iterator[None]:
        _, write, total = row_decays(p, gate_sums(p, part(gate_ref, c, h, p.width)))
        yield
        written = (part(k_ref, c, h, p.width) * write).astype(p.dtype)
        states[c + 1, h] = total * states[c, h] + dot(written, part(v_ref, c, h, p.value_width), (0, 0))

    for h in range(t.heads):
        states[0, h] = start_ref[0, 0, h]
    for c in range(t.chunks):
        walk.lockstep(again(c, h) for h in range(t.heads))

    diagonal = walk.iota((size, size), 0) == walk.iota((size, size), 1)

    def turn(c: int, h: int) -> Iterator[None]:
        k, v = part(k_ref, c, h, p.width), part(v_ref, c, h, p.value_width)
        pairs = list(zip(p.queries(h), p.outputs(h), strict=True))
        queries = [part(q_ref, c, n, p.width) for n, _ in pairs]
        gradients = [part(do_ref, c, m, p.value_width) for _, m in pairs]
        sums = gate_sums(p, part(gate_ref, c, h, p.width))
        read, write, total = row_decays(p, sums)
        entered, left = states[c, h].astype(p.dtype), gradient[h].astype(p.dtype)
        yield
        weights = [p.scale * dot(do, v, (1, 1)) for do in gradients]
        own = [jnp.sum(jnp.where(diagonal, x, 0), axis=1, keepdims=True) for x in weights]
        dk = sum((x * q for x, q in zip(own, queries, strict=True)), write * dot(v, left, (1, 1)))
        dv = dot((k * write).astype(p.dtype), left)
        dq = [x * k + p.scale * read * dot(do, entered, (1, 1)) for x, do in zip(own, gradients, strict=True)]
        scores = [jnp.where(diagonal, jnp.sum(q.astype(jnp.float32) * k, axis=1, keepdims=True), 0) for q in queries]
        yield
        for level in halvings(p, sums):
            early_decay, late_decay = level.early(level.decay), level.late(level.decay)
            early = level.back((level.early(k) * early_decay).astype(p.dtype), late=False)
            for r, q in enumerate(queries):
                late = (level.late(q) * late_decay).astype(p.dtype)
                scores[r] += jnp.where(level.pairs, level.back(dot(late, early, (1, 1)), late=True), 0)
                weight = level.late(jnp.where(level.pairs, weights[r], 0)).astype(p.dtype)
                dq[r] += level.back(late_decay * dot(weight, early), late=True)
                dk += level.back(early_decay * level.early(dot(weight, late, (0, 0))), late=False)
            yield
        before = total * gradient[h]
        by_row = -k * dk
        for r, (n, _) in enumerate(pairs):
            dv += dot((p.scale * scores[r]).astype(p.dtype), gradients[r], (0, 0))
            before += dot((p.scale * queries[r] * read).astype(p.dtype), gradients[r], (0, 0))
            by_row += queries[r] * dq[r]
            walk.put(p, dq_ref, c, n, dq[r])
        yield
        # The rounded gradient, for that is what dk holds, and most of them cancels.
        at_end = jnp.sum(states[c + 1, h] * left, axis=1, keepdims=True)
        last = jnp.clip(p.length - 1 - step * t.tokens - c * size, 0, size - 1)
        by_row += jnp.where(walk.iota((size, 1), 0) == last, jnp.broadcast_to(at_end, (p.width, SUBLANES)).T[:1], 0)
        walk.put(p, dk_ref, c, h, dk)
        walk.put(p, db_ref, c, h, by_row)
        walk.put(p, dv_ref, c, h, dv)
        gradient[h] = before

    with walk.carried(p, carried, dend_ref, d0_ref) as gradient:
        for c in reversed(range(t.chunks)):
            walk.lockstep(turn(c, h) for h in range(t.heads))


def forward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: jax.Array,
    state: jax.Array,
    *,
    keep: bool,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `walk.forward`; gates are `[B, T, K * H]`."""
    levels = p.tiling.chunk.bit_length()
    macs = p.group * p.tiling.chunk * (levels * p.width + p.value_width) + (p.group + 1) * p.width * p.value_width
    operands = [("query", query), ("key", key), ("value", value), ("key", gate), ("state", state)]
    name = "channel_linear_attention_forward"
    (out, end), kept = walk.forward(p, _forward_kernel, name, macs, operands, keep=keep, out_dtype=out_dtype)
    return out, end, kept[0] if keep else None


def backward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: jax.Array,
    starts: jax.Array,
    out_gradient: jax.Array,
    end_gradient: jax.Array,
) -> list[jax.Array]:
    """Gradients of query, key, value, the initial state, and of the sums b `[B, T, K * H]`."""
    levels = p.tiling.chunk.bit_length()
    macs = p.group * p.tiling.chunk * (3 * levels * p.width + 2 * p.value_width)
    macs += (2 * p.group + 3) * p.width * p.value_width
    operands = [("query", query), ("key", key), ("value", value), ("out", out_gradient), ("key", gate)]
    operands += [("starts", starts), ("state", end_gradient)]
    name = "channel_linear_attention_backward"
    return walk.backward(p, _backward_kernel, name, macs, operands, [("key", gate.shape)])
