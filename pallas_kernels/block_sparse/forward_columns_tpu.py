"""The forward walk on TPU with queries as columns: scores k q^T [s, t], sums v^T p [values, t].

Where matrix units are 256 wide and values 128, those of rows would stand half empty in the product with weights. Here
the weights are the side that is held, and the values, transposed once for a step, are the one that moves: half as many
rows. Maxima and sums of queries are rows, so a mask, a maximum or the log-sum-exp of a query needs nothing spread over
lanes. Queries are transposed once for all their keys: a right side that the compiler has to turn is pushed twice as
slowly. Column sums are those of a row of ones below the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse import intervals, scores, walk
from pallas_kernels.block_sparse.intervals import Test
from pallas_kernels.block_sparse.walk import Problem, Refs, Step

SUBLANES = 8
ROWS = 16
"""One tile of bfloat16."""


def takes(p: Problem, operands: Mapping[str, Any]) -> bool:
    """Whether a problem's tiles are turned: where the chip likes to, and what is asked of a pair is a row of numbers.

    On v6e blocks that are masked on both sides take 5 % longer than with queries as rows, full ones 6 to 12 % less.
    """
    by_rows = p.strip is not None or p.axes or p.bends or p.soft_cap is not None or p.sum_lane is None
    asks_pairs = p.sides > 1 or (not p.sides and (p.element is not None or operands["q_segments"] is not None))
    return p.tiling.turned is not None and not by_rows and not asks_pairs


def _ones(p: Problem) -> int:
    """The row of the transposed values from which there are ones."""
    assert p.sum_lane is not None
    return p.sum_lane


def _height(p: Problem) -> int:
    """Rows of the transposed values, with one of ones."""
    return -(-(_ones(p) + 1) // ROWS) * ROWS


def scratch(p: Problem) -> dict[str, Any]:
    size = p.tiling.block_q
    return {
        "m": pltpu.VMEM((SUBLANES, size), jnp.float32),
        "acc": pltpu.VMEM((_ones(p) // SUBLANES * SUBLANES + SUBLANES, size), jnp.float32),
        "turned_queries": pltpu.VMEM((scores.prepared_width(p), size), p.dtype),
        "turned_values": pltpu.VMEM((_height(p), p.tiling.block_kv), p.dtype),
    }


def begin_row(p: Problem, step: Step, r: Refs) -> None:
    if r.sinks is not None:
        sink = r.sinks[step.n]
        m, lowered = jnp.full_like(r.m, sink * scores.LOG2E), scores.lowered(p, r, step, p.tiling.block_q)
        r.m[...] = jnp.maximum(m if lowered is None else m - lowered * scores.LOG2E, walk.LEAST)
        r.acc[...] = jnp.where((walk.iota(r.acc.shape, 0) >= _ones(p)) & (sink > -jnp.inf), 1.0, 0.0)
    else:
        r.acc[...] = jnp.zeros_like(r.acc)
        r.m[...] = jnp.full_like(r.m, walk.LEAST)
    r.turned_queries[...] = (scores.prepared(p, r.query[...]) if scores.is_prepared(p) else r.query[...]).T


def visit(p: Problem, step: Step, r: Refs, test: Test) -> None:
    assert p.tiling.turned is not None
    masked = test is not Test.NOTHING
    t, keys = p.tiling.turned[masked], r.key.shape[0]
    rows, columns = walk.parts(p.tiling.block_q, t.q), walk.parts(keys, t.kv)
    units = [(i, j) for j in range(len(columns)) for i in range(len(rows))]
    m = [r.m[:, at] for at in rows]
    _turn_values(p, step, r, masked)
    added = [_added(p, step, r, at) for at in columns]

    def begin(unit: tuple[int, int]) -> jax.Array:
        i, j = unit
        k, extra = r.key[columns[j]], added[j]
        x = scores.scaled(p, walk.dot(scores.twice(p, k), r.turned_queries[:, rows[i]]))
        x = x if extra is None else x + walk.wide(extra, t.q)
        allowed = intervals.allowed_turned(p, r, step, rows[i], columns[j]) if masked else None
        return x if allowed is None else jnp.where(allowed, x, -jnp.inf)

    begun: dict[Any, jax.Array] = {}
    for later, unit in walk.staggered(units, t.lag):
        if later is not None:
            begun[later] = begin(later)
        if unit is None:
            continue
        (i, j), x = unit, _by_sublane(begun.pop(unit))
        largest = jnp.maximum(m[i], jnp.max(jnp.max(x, axis=0), axis=0, keepdims=True))
        acc, m[i] = jnp.exp2(m[i] - largest) * _by_sublane(r.acc[:, rows[i]]), largest
        weights = jnp.exp2(x - largest).reshape(t.kv, t.q).astype(p.dtype)
        moved = walk.dot(r.turned_values[:, columns[j]], weights)
        r.acc[:, rows[i]] = acc.reshape(-1, t.q) + moved[: r.acc.shape[0]]
    for at, largest in zip(rows, m, strict=True):
        r.m[:, at] = largest


def _turn_values(p: Problem, step: Step, r: Refs, masked: bool) -> None:
    """Of a block, above ones."""
    values, keys, height = r.value[...], r.value.shape[0], _height(p)
    if masked and p.ragged_kv:
        values = scores.within(values, step.kv_start, p.kv_len)
    held = min(p.value_width, height)  # narrower ones have the ones beside them
    r.turned_values[:held, :keys] = values.T[:held]
    if held < height:
        r.turned_values[held:, :keys] = jnp.ones((height - held, keys), p.dtype)


def _added(p: Problem, step: Step, r: Refs, columns: slice) -> jax.Array | None:
    """What the scores of some keys are added, as columns that are all alike."""
    row = scores.by_key(p, r, scores.place(step, slice(0, p.tiling.block_q), columns), columns)
    return None if row is None else walk.upright(row)


def _by_sublane(x: jax.Array) -> jax.Array:
    return x.reshape(-1, SUBLANES, x.shape[1])


def end_row(p: Problem, step: Step, r: Refs) -> None:
    l = r.acc[_ones(p) : _ones(p) + 1]
    seen = l > 0
    l = jnp.where(seen, l, 1)
    out = r.acc[: p.value_width] * (1 / l)
    if out.shape[0] < p.value_width:  # what is beyond the values is multiplied by 0, which makes no 0 of NaN
        out = jnp.concatenate([out, jnp.zeros((p.value_width - out.shape[0], out.shape[1]), out.dtype)])
    r.out[...] = out.T.astype(r.out.dtype)
    lse, lowered = r.m[:1] * math.log(2) + jnp.log(l), scores.lowered(p, r, step, p.tiling.block_q)
    lse = jnp.where(seen, lse, -jnp.inf)
    r.lse[...] = lse if lowered is None else lse + lowered
