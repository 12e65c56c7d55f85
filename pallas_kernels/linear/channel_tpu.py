"""The additive recurrence with a decay for every key channel on TPU: one walk over the chunks forward, one backward.

    S~ = enter S        o = scale (A v + (q * read) S~)        S' = leave (keep S~ + (k * write)^T v)

A[r, j] = sum_h q[r, h] k[j, h] exp(b[r, h] - b[j, h]) is, level by level of `channel_decays`, a product of late rows of
q * d and early rows of k * d. Backward the same factors, for p = scale do v^T of a level's pairs and dS~' = leave dS':

    dq = d * (p (k * d)) + scale read * (do S~^T)         dk = d * (p^T (q * d)) + write * (v dS~'^T)
    dv = scale A^T do + (k * write) dS~'                  dS = enter (keep dS~' + scale (q * read)^T do)
    db = q * dq - k * dk, and the last token's row of db gains rowsum(S' * dS')

States are held as [V, H]: their decays then lie along the lanes, as those of rows do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear import channel_decays as decays
from pallas_kernels.linear import walk
from pallas_kernels.linear.channel_decays import Way, plus, times, turned
from pallas_kernels.linear.walk import Problem, dot

DELAY = 3
"""Turns between a chunk and the next, so that decays of one are made beside products of another."""


def _forward_kernel(p: Problem, keep: int, *refs: Any) -> None:
    """Writes the state before every `keep` chunks, unless `keep` is 0."""
    q_ref, k_ref, v_ref, *rest = refs
    gate_ref, borders_ref, (s0_ref, *outs, sums_ref, state) = decays.gate_refs(p, rest)
    o_ref, end_ref = outs[:2]
    step, heads = pl.program_id(2), range(p.tiling.heads)
    part = functools.partial(walk.part, p, step=step)

    def turn(way: Way, c: Any, h: int) -> Iterator[None]:
        k, v = part(k_ref, c, h, p.width), part(v_ref, c, h, p.value_width)
        queries = [walk.part(p, q_ref, c, n, p.width) for n in p.queries(h)]
        d = way.decays(c, decays.kept_sums(p, sums_ref, c, h))
        yield
        scores = [jnp.float32(0) if d.is_one else decays.own_scores(p, q, k) for q in queries]
        for level in d.levels():
            early = level.decayed_early(k)
            for r, q in enumerate(queries):
                late = level.decayed_late(q)
                scores[r] = jnp.where(level.pairs, level.back(dot(late, early, (1, 1)), late=True), scores[r])
            yield
        if keep and h == 0:
            walk.keep(outs[2], state, c, keep)
        entered = times(d.enter, state[h])
        for r, n in enumerate(p.outputs(h)):
            read = way.reads(c, queries[r] * d.read).astype(p.dtype)
            out = dot(scores[r].astype(p.dtype), v) + dot(read, entered.astype(p.dtype), (1, 1))
            if p.scale != 1:
                out *= p.scale
            walk.put(p, o_ref, c, n, out)
        yield
        written = dot(v, way.writes(c, k * d.write).astype(p.dtype), (0, 0))
        state[h] = times(d.leave, times(d.keep, entered) + written)

    def work(way: Way) -> None:
        def chunks(together: Sequence[Any]) -> None:
            units = [(i, c, h) for i, c in enumerate(together) for h in heads]
            walk.lockstep(walk.delayed(turn(way, c, h), i * DELAY) for i, c, h in units)

        walk.chunks(p, chunks, together=way.together)

    with walk.carried(p, state, s0_ref, end_ref):
        decays.by_strength(p, gate_ref, borders_ref, step, work, sums_ref=sums_ref)


def _backward_kernel(p: Problem, *refs: Any) -> None:
    q_ref, k_ref, v_ref, do_ref, *rest = refs
    gate_ref, borders_ref, (start_ref, dend_ref, *outs) = decays.gate_refs(p, rest)
    dq_ref, dk_ref, dv_ref, d0_ref, db_ref, states, sums_ref, kept_entered, gradient = outs
    step, t, size = p.steps - 1 - pl.program_id(2), p.tiling, p.tiling.chunk
    part, heads = functools.partial(walk.part, p, step=step), range(t.heads)

    def again(way: Way, c: Any, h: int) -> Iterator[None]:
        d = way.decays(c, decays.kept_sums(p, sums_ref, c, h))
        yield
        write = way.writes(c, part(k_ref, c, h, p.width) * d.write).astype(p.dtype)
        written = dot(part(v_ref, c, h, p.value_width), write, (0, 0))
        entered = times(d.enter, states[0, h])
        kept_entered[c, h] = entered.astype(p.dtype)
        states[c + 1, h] = left = times(d.keep, entered) + written
        states[0, h] = times(d.leave, left)

    def turn(way: Way, c: Any, h: int) -> Iterator[None]:
        k, v = part(k_ref, c, h, p.width), part(v_ref, c, h, p.value_width)
        pairs = list(zip(p.queries(h), p.outputs(h), strict=True))
        queries = [part(q_ref, c, n, p.width) for n, _ in pairs]
        gradients = [part(do_ref, c, m, p.value_width) for _, m in pairs]
        d = way.decays(c, decays.kept_sums(p, sums_ref, c, h))
        of_left = times(d.leave, gradient[h])
        entered, left = kept_entered[c, h], of_left.astype(p.dtype)
        yield
        weights = [p.scale * dot(do, v, (1, 1)) for do in gradients]
        of_read, of_write = [way.reads(c, p.scale * dot(do, entered)) for do in gradients], way.writes(c, dot(v, left))
        dv = dot(way.writes(c, k * d.write).astype(p.dtype), left, (1, 1))
        dq: list[Any] = [None] * len(queries)
        dk: Any = None
        scores = [jnp.float32(0)] * len(queries)
        if not d.is_one:
            own = [decays.own_weights(p, x) for x in weights]
            scores = [decays.own_scores(p, q, k) for q in queries]
            dq = [x * k + d.read * y for x, y in zip(own, of_read, strict=True)]
            dk = sum((x * q for x, q in zip(own, queries, strict=True)), d.write * of_write)
        yield
        for level in d.levels():
            early = level.decayed_early(k)
            of_early: Any = of_write if d.is_one else None
            for r, q in enumerate(queries):
                late = level.decayed_late(q)
                scores[r] = jnp.where(level.pairs, level.back(dot(late, early, (1, 1)), late=True), scores[r])
                weight = level.late(jnp.where(level.pairs, weights[r], 0)).astype(p.dtype)
                of_late = plus(of_read[r] if d.is_one else None, dot(weight, early))
                dq[r] = plus(dq[r], level.back(level.late_decay * of_late, late=True))
                of_early = plus(of_early, level.early(dot(weight, late, (0, 0))))
            dk = plus(dk, level.back(level.early_decay * of_early, late=False))
            yield
        before = times(d.keep, of_left)
        by_row = -k * dk
        for r, (n, _) in enumerate(pairs):
            dv += dot((p.scale * scores[r]).astype(p.dtype), gradients[r], (0, 0))
            before += dot(gradients[r], way.reads(c, p.scale * queries[r] * d.read).astype(p.dtype), (0, 0))
            by_row += queries[r] * dq[r]
            walk.put(p, dq_ref, c, n, dq[r])
        yield
        # The rounded gradient, for that is what dk holds, and most of them cancels.
        at_end = jnp.sum(states[c + 1, h] * left, axis=0, keepdims=True)
        last = jnp.clip(p.length - 1 - step * t.tokens - c * size, 0, size - 1)
        by_row += jnp.where(walk.iota((size, 1), 0) == last, at_end, 0)
        walk.put(p, dk_ref, c, h, dk)
        walk.put(p, db_ref, c, h, by_row)
        walk.put(p, dv_ref, c, h, dv)
        gradient[h] = times(d.enter, before)

    def work(way: Way) -> None:
        def chunks(stream: Callable[..., Iterator[None]], together: Sequence[Any]) -> None:
            for c in together:
                walk.lockstep(stream(way, c, h) for h in heads)

        walk.chunks(p, functools.partial(chunks, again), together=way.together)
        walk.chunks(p, functools.partial(chunks, turn), together=way.together, backward=True)

    states[0] = start_ref[0, 0]
    with walk.carried(p, gradient, dend_ref, d0_ref):
        decays.by_strength(p, gate_ref, borders_ref, step, work, sums_ref=sums_ref)


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
    """See `walk.forward`; gates are `[B, T, K * H]`, then `gates.borders` if any. Costs are of moderate decay."""
    macs = p.group * p.tiling.chunk * (p.width + p.value_width) + (p.group + 1) * p.width * p.value_width
    p = dataclasses.replace(p, turned=True, packed=len(gate) > 1)
    operands = [("query", query), ("key", key), ("value", value), *zip(("key", "borders"), gate, strict=False)]
    operands.append(("state", turned(state)))
    name = "channel_linear_attention_forward"
    scratch = [decays.scratch_of_sums(p, p.tiling.forward)]
    (out, end), kept = walk.forward(
        p, _forward_kernel, name, macs, operands, keep=keep, out_dtype=out_dtype, scratch=scratch
    )
    return out, turned(end), kept[0] if keep else None


def backward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate: Sequence[jax.Array],
    starts: jax.Array,
    out_gradient: jax.Array,
    end_gradient: jax.Array,
) -> list[jax.Array]:
    """Gradients of query, key, value, the initial state, and of the sums b `[B, T, K * H]`."""
    macs = p.group * p.tiling.chunk * (3 * p.width + 2 * p.value_width)
    macs += (2 * p.group + 3) * p.width * p.value_width
    operands = [("query", query), ("key", key), ("value", value), ("out", out_gradient)]
    operands += zip(("key", "borders"), gate, strict=False)
    operands += [("starts", starts), ("state", turned(end_gradient))]
    name = "channel_linear_attention_backward"
    units = (p.tiling.chunks, p.tiling.heads)
    scratch = [
        decays.scratch_of_sums(p, p.tiling),
        pltpu.VMEM((*units, p.value_width, p.width), p.dtype),
    ]
    p = dataclasses.replace(p, turned=True, packed=len(gate) > 1)
    *gradients, start, db = walk.backward(p, _backward_kernel, name, macs, operands, [("key", gate[0].shape)], scratch)
    return [*gradients, turned(start), db]
