"""The forward walk on TPU with queries as rows: scores [t, s], sums [t, values].

Maxima are kept as 128 columns that are all alike: a single column would be spread over the lanes for every tile. Row
sums are kept lane by lane, or where that is free are a product with a column of ones beside the values.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse import scores, walk
from pallas_kernels.block_sparse.intervals import Test
from pallas_kernels.block_sparse.marks import NOTHING
from pallas_kernels.block_sparse.tiling import LANES
from pallas_kernels.block_sparse.walk import Problem, Refs, Step


def scratch(p: Problem, is_bounded: bool) -> dict[str, Any]:
    columns, found = pltpu.VMEM((p.tiling.block_q, LANES), jnp.float32), dict[str, Any]()
    if not is_bounded:
        found["m"] = columns
    if p.sum_lane is None:
        found["l"] = columns
    return found | {"acc": pltpu.VMEM((p.tiling.block_q, p.ones_width), jnp.float32)}


def begin_row(p: Problem, step: Step, r: Refs) -> None:
    r.acc[...] = jnp.zeros_like(r.acc)
    if r.l is not None:
        r.l[...] = jnp.zeros_like(r.l)
    if r.sinks is not None:
        sink = r.sinks[step.n]
        m, lowered = jnp.full_like(r.m, sink * scores.LOG2E), scores.lowered(p, r, step, p.tiling.forward.q)
        r.m[...] = jnp.maximum(m if lowered is None else m - walk.upright(lowered * scores.LOG2E), walk.LEAST)
        l = jnp.where(sink == -jnp.inf, 0.0, 1.0)
        if p.sum_lane is not None:
            r.acc[...] = jnp.where(walk.iota(r.acc.shape, 1) >= p.sum_lane, l, 0.0)
        else:
            r.l[...] = jnp.where(walk.iota(r.l.shape, 1) == 0, l, 0.0)
    elif r.m is not None:
        r.m[...] = jnp.full_like(r.m, walk.LEAST)
    if r.prepared is not None:
        r.prepared[...] = scores.prepared(p, r.query[...])


def visit(p: Problem, step: Step, r: Refs, test: Test) -> None:
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


def end_row(p: Problem, step: Step, r: Refs) -> None:
    l = jnp.sum(r.l[...], axis=1, keepdims=True) if p.sum_lane is None else r.acc[:, p.sum_lane : p.sum_lane + 1]
    seen = l > 0 if p.marks is None else (l > 0) & (r.m[:, :1] > NOTHING)
    l = jnp.where(seen, l, 1)
    out = r.acc[:, : p.value_width] * (1 / l)
    r.out[...] = (out if p.marks is None else jnp.where(seen, out, 0)).astype(r.out.dtype)
    largest = 0 if r.m is None else r.m[:, :1] * math.log(2)
    lse = jnp.where(seen, largest + jnp.log(l), -jnp.inf)
    lse, lowered = (
        jnp.broadcast_to(lse, (p.tiling.block_q, LANES)).T[:1],
        scores.lowered(p, r, step, p.tiling.forward.q),
    )
    r.lse[...] = lse if lowered is None else lse + lowered
