"""Softmax attention over listed pairs of blocks on TPU: the backward walks.

With u of `scores`, L = lse log2(e) (+inf for a row that saw nothing) and delta_t = <do_t, o_t> - dlse_t:

    p = 2^(u - L)                dz = p (do v^T - delta)        dy = the derivative of `scores` times dz
    dv^T += do^T p               dk^T += scale q^T dy           dq += scale dy k

The gradients of keys and values are added up transposed: all matrices then lie as the matrix units read them, and where
these are 256 wide the product takes half as long, for its 128 rows are the ones that move. They stay in on-chip memory
for a whole sequence while one walk by rows makes all three gradients. Where they do not fit there are two walks: by
rows for dq, and by columns for dk and dv of one block at a time. Sums over the query heads of a key head, over steps
and over tiles are in float32 and in the order of the grid.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse import scores, walk
from pallas_kernels.block_sparse.lists import EDGE, FULL, PARTIAL, col_of, kind_of, row_of
from pallas_kernels.block_sparse.tiling import LANES
from pallas_kernels.block_sparse.walk import Problem, Refs, Step

ONES = 16
"""Rows of ones below q^T, one tile of bfloat16, whose products with dy are the gradient of the bias of keys."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One walk, over a grid (batch, heads, group, steps) or by columns (batch, heads, steps, group).

    Attributes:
      queries, keys: which gradients it makes.
      held: blocks of dk and dv that are kept: all of them, or by columns one.
      heads, group: `heads` lists of gradients of keys, each for `group` query heads.
    """

    by_col: bool
    queries: bool
    keys: bool
    held: int
    heads: int
    group: int

    def grid(self, p: Problem) -> tuple[int, int, int, int]:
        if self.by_col:
            return p.batch, self.heads, p.col_steps, self.group
        return p.batch, self.heads, self.group, p.steps

    def where(self, b: Any, h: Any, first: Any, second: Any) -> tuple[Any, Any, Any]:
        a, g = (first, second) if self.by_col else (second, first)
        return b, h * self.group + g, a


def plans(p: Problem) -> list[Plan]:
    """One walk if the gradients of keys and values of a head fit on the chip, else two."""
    widths = p.width + p.value_width
    taken = p.columns * p.tiling.block_kv * widths * (4 + 2 * jnp.dtype(p.dtype).itemsize)
    if taken <= p.tiling.resident:
        return [Plan(False, True, True, p.columns, p.kv_heads, p.group)]
    # Lists of single query heads visit different columns at a time: their gradients are added up afterwards.
    alone = p.list_heads > p.kv_heads
    return [
        Plan(False, True, False, 0, p.kv_heads, p.group),
        Plan(True, False, True, 1, p.heads if alone else p.kv_heads, 1 if alone else p.group),
    ]


def _kernel(p: Problem, plan: Plan, table: Any, r: Refs) -> None:
    t, steps = p.tiling, p.col_steps if plan.by_col else p.steps
    ids = [pl.program_id(i) for i in range(4)]
    b, n, a = plan.where(*ids)
    g = ids[3] if plan.by_col else ids[2]
    before, code, after = (walk.code_at(p, table, b, n, a + i, steps) for i in (-1, 0, 1))
    row, col, kind = row_of(code), col_of(code), kind_of(code)
    block_of = col_of if plan.by_col else row_of
    first = (a == 0) | (block_of(before) != block_of(code))
    last = (a == steps - 1) | (block_of(after) != block_of(code))

    @pl.when((g == 0) & (first if plan.by_col else a == 0))
    def _() -> None:
        for sums in (r.key_sums, r.value_sums, *(r[name] for name in r if name.startswith("dcaptured"))):
            if sums is not None:
                sums[...] = jnp.zeros_like(sums)

    begin_row = functools.partial(_begin_row, p, row * t.block_q, r)
    if plan.by_col:
        begin_row()
    else:
        pl.when(first)(begin_row)

    step = Step(b, n, row * t.block_q, col * t.block_kv, kind)
    visit = functools.partial(_visit, p, step, 0 if plan.by_col else col, r)
    pl.when(kind == FULL)(functools.partial(visit, masked=False))
    pl.when((kind == PARTIAL) | (kind == EDGE))(functools.partial(visit, masked=True))

    if plan.queries:

        @pl.when(last)
        def _() -> None:
            r.dq[...] = (r.query_sums[...] * p.scale).astype(r.dq.dtype)

    if plan.keys:
        at_end = (g == plan.group - 1) & (last if plan.by_col else a == steps - 1)
        pl.when(at_end)(functools.partial(_end_columns, p, plan, r))


def _begin_row(p: Problem, start: Any, r: Refs) -> None:
    q, do = _inside(p, r.query[...], start), _inside(p, r.out_gradient[...], start)
    if r.query_sums is not None:
        r.query_sums[...] = jnp.zeros_like(r.query_sums)
    if r.key_sums is not None:
        r.q_upright[: p.width] = q.T
        r.do_upright[...] = do.T
        if r.dkv_bias is not None:
            r.q_upright[p.width :] = jnp.ones((ONES, q.shape[0]), q.dtype)
    if r.prepared is not None:
        r.prepared[...] = scores.prepared(p, q)
    r.shift_columns[...] = walk.upright(r.shift[...])
    r.delta_columns[...] = walk.upright(r.delta[...])
    scores.begin_queries(p, r)


class Begun(NamedTuple):
    """What the products of a tile give: logits, tanh of the soft cap, the way back to y, the mask, and do v^T."""

    u: jax.Array
    capped: jax.Array | None
    pull_back: Callable[[jax.Array], jax.Array] | None
    allowed: jax.Array | None
    dp: jax.Array


def _inside(p: Problem, x: jax.Array, start: Any) -> jax.Array:
    return scores.within(x, start, p.q_len) if p.ragged_q else x


def _visit(p: Problem, step: Step, slot: Any, r: Refs, *, masked: bool) -> None:
    t = p.tiling
    rows, columns = walk.parts(t.block_q, t.backward.q), walk.parts(t.block_kv, t.backward.kv)
    units = [(i, j) for j in range(len(columns)) for i in range(len(rows))]

    queries = scores.queries(p, r, masked=masked)

    def query(i: int, ref: Any) -> jax.Array:
        x = ref[rows[i]]
        return _inside(p, x, step.q_start + rows[i].start) if masked else x

    def key(j: int, ref: Any) -> jax.Array:
        x = ref[columns[j]]
        return scores.within(x, step.kv_start + columns[j].start, p.kv_len) if masked and p.ragged_kv else x

    def begin(unit: tuple[int, int]) -> Begun:
        i, j = unit
        here = scores.place(step, rows[i], columns[j])
        q = query(i, queries) if r.prepared is None else queries[rows[i]]
        y = scores.biased(p, r, scores.product(p, q, key(j, r.key)), here, columns[j])
        x, pull_back = _modified(p, here, y, r)
        u, capped = scores.binary(p, x)
        allowed = scores.allowed(p, r, here, rows[i], columns[j]) if masked else None
        if allowed is not None:
            u = jnp.where(allowed, u, -jnp.inf)
        dp = walk.dot(query(i, r.out_gradient), key(j, r.value), (1, 1))
        return Begun(u, capped, pull_back, allowed, dp)

    for (i, j), (u, capped, pull_back, allowed, dp) in walk.ahead(units, t.backward.lag, begin):
        weights = jnp.exp2(u - walk.wide(r.shift_columns[rows[i]], t.backward.kv))
        kept = scores.kept(p, r, scores.place(step, rows[i], columns[j]))
        if kept is not None:
            dp = dp * kept
        dy = weights * (dp - walk.wide(r.delta_columns[rows[i]], t.backward.kv))
        if capped is not None:
            dy = dy * (1 - capped * capped)
        if pull_back is not None:
            dy = pull_back(dy)
            if allowed is not None:  # elsewhere the caller's derivative may be anything
                dy = jnp.where(allowed, dy, 0)
        dy = dy.astype(p.dtype)
        if r.key_sums is not None:
            weights = (weights if kept is None else weights * kept).astype(p.dtype)
            r.value_sums[slot, :, columns[j]] += walk.dot(r.do_upright[:, rows[i]], weights)
            r.key_sums[slot, :, columns[j]] += walk.dot(r.q_upright[:, rows[i]], dy)
        if r.query_sums is not None:
            r.query_sums[rows[i]] += walk.dot(dy, key(j, r.key))


def _modified(p: Problem, here: scores.Place, x: jax.Array, r: Refs) -> tuple[jax.Array, Any]:
    """f(y), and what turns dx into dy and adds the gradients of what f read from captured arrays to theirs."""
    if p.score_mod is None:
        return x, None
    wanted = [i for i in range(len(p.captured)) if f"dcaptured{i}" in r]
    read: list[tuple[int, Any]] = []

    def modify(x: jax.Array, offsets: list[jax.Array]) -> jax.Array:
        def scalar(i: int, flat: Any) -> Any:
            value = r[f"captured{i}"][flat]
            if i not in wanted:
                return value
            read.append((i, flat))
            return value + offsets[len(read) - 1]

        return scores.modified(p, r, here, x, scalar)

    # Every scalar that is read is a variable of its own, at a value to which nothing is added.
    offsets = [jnp.float32(0)] * p.reads if wanted else []
    modified, transpose = jax.vjp(modify, x, offsets)

    def pull_back(dx: jax.Array) -> jax.Array:
        dy, gradients = transpose(dx)
        for (i, flat), gradient in zip(read, gradients[: len(read)], strict=True):
            sums = r[f"dcaptured{i}"]
            sums[...] += jnp.where(walk.iota(sums.shape, 1) == flat, gradient, 0)
        return dy

    return modified, pull_back


def _end_columns(p: Problem, plan: Plan, r: Refs) -> None:
    size = p.tiling.block_kv

    def block(j: Any, _: Any) -> None:
        at = pl.ds(pl.multiple_of(j * size, size), size)
        r.dk[at] = (r.key_sums[j, : p.width].T * p.scale).astype(r.dk.dtype)
        r.dv[at] = r.value_sums[j].T.astype(r.dv.dtype)
        if r.dkv_bias is not None:
            r.dkv_bias[j] = r.key_sums[j, p.width : p.width + 1]

    jax.lax.fori_loop(0, plan.held, block, None)


def backward(
    p: Problem,
    by_row: jax.Array,
    by_col: jax.Array | None,
    operands: Mapping[str, jax.Array | None],
    *,
    with_bias: bool,
    with_captured: tuple[int, ...],
) -> dict[str, jax.Array]:
    """Gradients: dq, dk, dv as the operands are; with_bias dkv_bias `[B, K, 1, S]`, and dcaptured of some, flat.

    Args:
      operands: as `forward` takes them, and out_gradient, shift `[B, N, 1, T]` (L above) and delta, in whole blocks.
    """
    found: dict[str, jax.Array] = {}
    for plan in plans(p):
        table = by_col if plan.by_col else by_row
        if table is None:
            raise ValueError(f"by_col: expected a list, since the gradients of {p.kv_len} keys do not fit the chip")
        found |= _walk(p, plan, table, operands, with_bias=with_bias, with_captured=with_captured)
    for name in ("dk", "dv"):
        found[name] = _grouped(p, found[name][:, : p.kv_len], p.width if name == "dk" else p.value_width)
    if with_bias:
        bias = found["dkv_bias"].reshape(p.batch, p.kv_heads, -1, p.columns * p.tiling.block_kv)
        found["dkv_bias"] = jnp.sum(bias, axis=2, keepdims=True)[..., : p.kv_len]
    for i in with_captured:
        found[f"dcaptured{i}"] = jnp.sum(found[f"dcaptured{i}"], axis=(0, 1, 2))
    return found


def _grouped(p: Problem, x: jax.Array, width: int) -> jax.Array:
    """Gradients of single query heads added up."""
    if x.shape[-1] == p.kv_heads * width:
        return x
    by_head = x.reshape(*x.shape[:2], p.kv_heads, p.group, width)
    return jnp.sum(by_head, axis=3).astype(p.dtype).reshape(*x.shape[:2], -1)


def _walk(
    p: Problem,
    plan: Plan,
    table: jax.Array,
    operands: Mapping[str, jax.Array | None],
    *,
    with_bias: bool,
    with_captured: tuple[int, ...],
) -> dict[str, jax.Array]:
    t, f32 = p.tiling, jnp.float32
    blocks = walk.specs(p, plan.where, p.col_steps if plan.by_col else p.steps)
    blocks |= {"out_gradient": blocks["out"], "shift": blocks["lse"], "delta": blocks["lse"], "dq": blocks["query"]}
    results: dict[str, Any] = {}
    scratch: dict[str, Any] = dict.fromkeys(("shift_columns", "delta_columns"), ((t.block_q, LANES), f32))
    scratch |= scores.query_scratch(p, operands)
    if plan.queries:
        results["dq"] = ((p.batch, p.q_len, p.heads * p.width), p.dtype)
        scratch["query_sums"] = ((t.block_q, p.width), f32)
        for i in with_captured:
            size = math.prod(p.captured[i])
            results[f"dcaptured{i}"] = ((p.batch, plan.heads, 1, size), f32)
            blocks[f"dcaptured{i}"] = pl.BlockSpec((None, None, 1, size), lambda b, h, *_: (b, h, 0, 0))
    if plan.keys:
        rows = p.width + (ONES if with_bias else 0)
        held, dtype = plan.held * t.block_kv, p.dtype if plan.heads == p.kv_heads else f32

        def key(sizes: tuple[int | None, ...], index: Any) -> pl.BlockSpec:
            def at(b: Any, h: Any, first: Any, second: Any, table: Any) -> Any:
                _, n, a = plan.where(b, h, first, second)
                return index(b, h, col_of(walk.code_at(p, table, b, n, a, p.col_steps)) if plan.by_col else 0)

            return pl.BlockSpec(sizes, at)

        for name, width in (("dk", p.width), ("dv", p.value_width)):
            results[name] = ((p.batch, p.columns * t.block_kv, plan.heads * width), dtype)
            blocks[name] = key((None, held, width), lambda b, h, col: (b, col, h))
        if with_bias:
            results["dkv_bias"] = ((p.batch, plan.heads, p.columns, 1, t.block_kv), f32)
            blocks["dkv_bias"] = key((None, None, plan.held, 1, t.block_kv), lambda b, h, col: (b, h, col, 0, 0))
        scratch["q_upright"] = ((rows, t.block_q), p.dtype)
        scratch["do_upright"] = ((p.value_width, t.block_q), p.dtype)
        scratch["key_sums"] = ((plan.held, rows, t.block_kv), f32)
        scratch["value_sums"] = ((plan.held, p.value_width, t.block_kv), f32)
    found = walk.call(
        p,
        functools.partial(_kernel, p, plan),
        "block_sparse_attention_backward" + ("_keys" if plan.by_col else "" if plan.keys else "_queries"),
        plan.grid(p),
        table,
        operands,
        results,
        blocks,
        scratch,
        products=p.width * (1 + plan.queries + plan.keys) + p.value_width * (1 + plan.keys),
    )
    return dict(zip(results, found, strict=True))
