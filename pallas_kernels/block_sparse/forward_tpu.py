"""Softmax attention over listed pairs of blocks on TPU: the forward walk.

A grid step is one listed pair of a query and a key block. With the logits u of `scores`, over the steps of a row:

    m' = max(m, rowmax u)    p = 2^(u - m')    l' = 2^(m - m') l + rowsum p    acc' = 2^(m - m') acc + p v
    o = acc / l              lse = m ln 2 + log l                              l = 0: o = 0, lse = -inf

from l = 0 and the least finite m, for -inf less it is -inf; with a sink from m = sink log2(e), l = 1. A step is cut in
tiles, and the scores of later tiles are begun before the softmax of this one, or the matrix units would stand still in
its exponentials. Maxima are kept as 128 columns that are all alike: a single column would be spread over the lanes for
every tile. Row sums are kept lane by lane, or where that is free are a product with a column of ones beside the values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse import scores, walk
from pallas_kernels.block_sparse.intervals import Test
from pallas_kernels.block_sparse.lists import col_of, kind_of, row_of
from pallas_kernels.block_sparse.marks import NOTHING
from pallas_kernels.block_sparse.tiling import LANES
from pallas_kernels.block_sparse.walk import Problem, Refs, Step

LEAST = float(jnp.finfo(jnp.float32).min)
FARTHEST = 96.0
"""A bound of logits, to the base 2, from which 2^20 weights and values of 2^10 may add up, and none vanishes."""


def _is_bounded(p: Problem, sinks: Any) -> bool:
    """Whether no running maximum is needed."""
    return p.soft_cap is not None and p.soft_cap * scores.LOG2E <= FARTHEST and sinks is None


def _kernel(p: Problem, table: Any, r: Refs) -> None:
    t = p.tiling
    b, n, a = (pl.program_id(i) for i in range(3))
    before, code, after = (walk.code_at(p, table, b, n, a + i, p.steps) for i in (-1, 0, 1))
    row, col, kind = row_of(code), col_of(code), kind_of(code)

    pl.when(a == 0)(functools.partial(scores.begin_head, p, r))
    step = Step(b, n, row, col, row * t.block_q, col * t.block_kv, kind)
    pl.when((a == 0) | (row_of(before) != row))(functools.partial(_begin_row, p, step, r))
    scores.visit(p, step, r, t.forward.kv, functools.partial(_visit, p))

    @pl.when((a == p.steps - 1) | (row_of(after) != row))
    def _() -> None:
        l = jnp.sum(r.l[...], axis=1, keepdims=True) if p.sum_lane is None else r.acc[:, p.sum_lane : p.sum_lane + 1]
        seen = l > 0 if p.marks is None else (l > 0) & (r.m[:, :1] > NOTHING)
        l = jnp.where(seen, l, 1)
        out = r.acc[:, : p.value_width] * (1 / l)
        r.out[...] = (out if p.marks is None else jnp.where(seen, out, 0)).astype(r.out.dtype)
        largest = 0 if r.m is None else r.m[:, :1] * math.log(2)
        lse = jnp.where(seen, largest + jnp.log(l), -jnp.inf)
        lse, lowered = jnp.broadcast_to(lse, (t.block_q, LANES)).T[:1], scores.lowered(p, r, step, p.tiling.forward.q)
        r.lse[...] = lse if lowered is None else lse + lowered


def _begin_row(p: Problem, step: Step, r: Refs) -> None:
    if r.sinks is None:
        if r.m is not None:
            r.m[...] = jnp.full_like(r.m, LEAST)
        r.acc[...] = jnp.zeros_like(r.acc)
        if r.l is not None:
            r.l[...] = jnp.zeros_like(r.l)
    else:
        sink = r.sinks[step.n]
        m, lowered = jnp.full_like(r.m, sink * scores.LOG2E), scores.lowered(p, r, step, p.tiling.forward.q)
        r.m[...] = jnp.maximum(m if lowered is None else m - walk.upright(lowered * scores.LOG2E), LEAST)
        l = jnp.where(sink == -jnp.inf, 0.0, 1.0)
        if p.sum_lane is not None:
            r.acc[...] = jnp.where(walk.iota(r.acc.shape, 1) >= p.sum_lane, l, 0.0)
        else:
            r.acc[...] = jnp.zeros_like(r.acc)
            r.l[...] = jnp.where(walk.iota(r.l.shape, 1) == 0, l, 0.0)
    if r.prepared is not None:
        r.prepared[...] = scores.prepared(p, r.query[...])
    scores.begin_queries(p, r)


def _visit(p: Problem, step: Step, r: Refs, test: Test) -> None:
    t, masked = p.tiling, test is not Test.NOTHING
    rows, columns = walk.parts(t.block_q, t.forward.q), walk.parts(r.key.shape[0], t.forward.kv)
    units = [(i, j) for j in range(len(columns)) for i in range(len(rows))]
    m = None if r.m is None else [r.m[at] for at in rows]
    queries = scores.queries(p, r, test)

    def begin(unit: tuple[int, int]) -> jax.Array:
        i, j = unit
        here = scores.place(step, rows[i], columns[j])
        x = scores.biased(p, r, scores.product(p, queries[rows[i]], r.key[columns[j]]), here, rows[i], columns[j])
        x, _ = scores.binary(p, scores.modified(p, r, here, x, scores.reader(r)))
        allowed = scores.allowed(p, r, here, rows[i], columns[j], test)
        return x if allowed is None else jnp.where(allowed, x, -jnp.inf)

    begun: dict[Any, jax.Array] = {}
    for later, unit in walk.staggered(units, t.forward.lag):
        if later is not None:
            begun[later] = begin(later)
        if unit is None:
            continue
        (i, j), x = unit, begun.pop(unit)
        v = r.value[columns[j]]
        if masked and p.ragged_kv:
            v = scores.within(v, step.kv_start + columns[j].start, p.kv_len)
        kept = None
        if m is not None:
            largest = jnp.maximum(m[i], jnp.max(x, axis=1, keepdims=True))
            x, kept, m[i] = x - walk.wide(largest, t.forward.kv), jnp.exp2(m[i] - largest), largest
        weights = jnp.exp2(x)
        if p.sum_lane is None:
            l = r.l[rows[i]] if kept is None else kept * r.l[rows[i]]
            r.l[rows[i]] = l + sum(weights[:, at] for at in walk.parts(t.forward.kv, LANES))
        dropped = scores.kept(p, r, scores.place(step, rows[i], columns[j]))
        weights = weights if dropped is None else weights * dropped
        moved = walk.dot(weights.astype(v.dtype), walk.with_ones(p, v))
        acc = r.acc[rows[i]] if kept is None else walk.wide(kept, moved.shape[1]) * r.acc[rows[i]]
        r.acc[rows[i]] = acc + moved
    for at, largest in zip(rows, m or [], strict=False):
        r.m[at] = largest


def forward(p: Problem, table: jax.Array, operands: Mapping[str, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, N * value_width]` and the natural log-sum-exp `[B, N, 1, T]`, as long as whole blocks are.

    Args:
      operands: query, key, value, kv_bias `[B, K, 1, S]`, q_segments `[B, 1, T]`, kv_segments `[B, 1, S]`, sinks `[N]`
        and the captured arrays, flat.
    """
    t, f32 = p.tiling, jnp.float32
    padded = p.rows * t.block_q
    scratch: dict[str, Any] = {}
    if not _is_bounded(p, operands["sinks"]):
        scratch["m"] = pltpu.VMEM((t.block_q, LANES), f32)
    if p.sum_lane is None:
        scratch["l"] = pltpu.VMEM((t.block_q, LANES), f32)
    scratch |= scores.head_scratch(p)
    scratch["acc"] = pltpu.VMEM((t.block_q, p.ones_width), f32)
    scratch |= scores.query_scratch(p, operands)
    out, lse = walk.call(
        p,
        functools.partial(_kernel, p),
        "block_sparse_attention_forward",
        (p.batch, p.heads, p.steps),
        table,
        operands,
        {
            "out": ((p.batch, p.q_len, p.heads * p.value_width), p.dtype),
            "lse": ((p.batch, p.heads, 1, padded), f32),
        },
        walk.specs(p, lambda b, n, a: (b, n, a), p.steps),
        scratch,
        products=p.width + p.value_width,
    )
    return out, lse
