"""Softmax attention over listed pairs of blocks on TPU: the backward walks.

With u of `scores`, L = lse log2(e) (+inf for a row that saw nothing) and delta_t = <do_t, o_t> - dlse_t:

    p = 2^(u - L)                dz = p (do v^T - delta)        dy = the derivative of `scores` times dz
    dv^T += do^T p               dk^T += scale q^T dy           dq += scale dy k

The gradients of keys and values are added up transposed: all matrices then lie as the matrix units read them, and where
these are 256 wide the product takes half as long, for its 128 rows are the ones that move. They stay in on-chip memory
for a whole sequence while one walk by rows makes all three gradients. Where they do not fit there are two walks: by
rows for dq, and by columns for dk and dv of one block at a time. Sums over the query heads of a key head, over steps
and over tiles are in float32 and in the order of the grid. Where values have ones beside them, one product is
do v^T - delta: that of [do | -delta] and [v | 1], with delta in as many channels as it takes to hold a float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse import addends, scores, strips, walk
from pallas_kernels.block_sparse.intervals import Test
from pallas_kernels.block_sparse.lists import col_of, kind_of, row_of
from pallas_kernels.block_sparse.tiling import LANES
from pallas_kernels.block_sparse.walk import Problem, Refs, Step

ROWS = 16
"""One tile of bfloat16. So many rows below q^T: ones, whose products with dy are the gradient of the bias of keys, and
what else the gradients of an addend of scores take."""


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


def plans(p: Problem, beside: int = 0) -> list[Plan]:
    """One walk if the gradients of keys and values of a head fit on the chip, `beside` other bytes, else two."""
    widths = p.width + p.value_width
    taken = p.columns * p.tiling.block_kv * widths * (4 + 2 * jnp.dtype(p.dtype).itemsize)
    if taken <= p.tiling.resident and (not beside or taken + beside <= p.tiling.most):
        return [Plan(False, True, True, p.columns, p.kv_heads, p.group)]
    # Lists of single query heads visit different columns at a time, and a strip is made once for each of them: their
    # gradients are added up afterwards.
    alone = p.list_heads > p.kv_heads or p.strip is not None
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
        for sums in (r.key_sums, r.value_sums):
            if sums is not None:
                sums[...] = jnp.zeros_like(sums)

    @pl.when((g == 0) & (a == 0))
    def _() -> None:
        for name in r:
            if name.startswith("dcaptured"):
                r[name][...] = jnp.zeros_like(r[name])

    pl.when(a == 0)(functools.partial(_begin_head, p, r))
    step = Step(b, n, row, col, row * t.block_q, col * t.block_kv, kind)
    begin_row = functools.partial(_begin_row, p, step, r)
    if plan.by_col:
        begin_row()
    else:
        pl.when(first)(begin_row)

    scores.visit(p, step, r, t.backward.kv, functools.partial(_visit, p, 0 if plan.by_col else col))

    if plan.queries:

        @pl.when(last)
        def _() -> None:
            r.dq[...] = (r.query_sums[...] * p.scale).astype(r.dq.dtype)

    if p.strip is not None and r.strip_sums is not None:
        pl.when(a == steps - 1)(functools.partial(strips.total, p.strip, r.strip_sums, r.sources, r.dlines))

    if plan.keys:
        at_end = (g == plan.group - 1) & (last if plan.by_col else a == steps - 1)
        pl.when(at_end)(functools.partial(_end_columns, p, plan, r))


def _begin_head(p: Problem, r: Refs) -> None:
    scores.begin_head(p, r)
    if p.strip is not None and r.strip_sums is not None:
        strips.clear(p.strip, r.strip_sums)


def _begin_row(p: Problem, step: Step, r: Refs) -> None:
    t = p.tiling
    q, do = (_inside(p, x[...], step.q_start) for x in (r.query, r.out_gradient))
    if r.query_sums is not None:
        r.query_sums[...] = jnp.zeros_like(r.query_sums)
    if r.key_sums is not None:
        r.q_upright[: p.width] = q.T
        r.do_upright[...] = do.T
        if r.q_upright.shape[0] > p.width:
            size = r.q_upright.shape[0] - p.width, t.block_q
            found = jnp.zeros(size, jnp.float32)
            below = [jnp.ones((1, t.block_q), jnp.float32)]
            for derivative in _derivatives(p, step, Trained(r), addends.column, step.q_start, t.block_q, t.backward.q):
                below += addends.parts(derivative, p.dtype)
            for i, row in enumerate(below):
                found = jnp.where(walk.iota(size, 0) == i, row, found)
            r.q_upright[p.width :] = found.astype(p.dtype)
    if r.prepared is not None:
        r.prepared[...] = scores.prepared(p, q)
    shift, lowered = r.shift[...], scores.lowered(p, r, step, t.backward.q)
    r.shift_columns[...] = walk.upright(shift if lowered is None else shift - lowered * scores.LOG2E)
    if r.lowered is None:
        r.delta_columns[...] = walk.upright(r.delta[...])
    else:
        _lower(p, do, r)
    scores.begin_queries(p, r)


def _is_lowered(p: Problem) -> bool:
    """Whether do v^T - delta is one product."""
    return p.sum_lane is not None and p.sum_lane + addends.pieces(p.dtype) <= p.ones_width


def _lower(p: Problem, do: jax.Array, r: Refs) -> None:
    """[do | -delta]."""
    assert p.sum_lane is not None
    r.lowered[:, : p.value_width] = do
    first = p.sum_lane // LANES * LANES
    at = slice(first, first + LANES)
    found: Any = 0.0 if first == p.value_width else do[:, at].astype(jnp.float32)
    for lane, part in enumerate(addends.parts(-r.delta[...], p.dtype), p.sum_lane - first):
        found = jnp.where(walk.iota((1, LANES), 1) == lane, walk.upright(part), found)
    r.lowered[:, at] = found.astype(p.dtype)


class Logits(NamedTuple):
    """Of a tile: u, tanh of the soft cap, the way back to y, and the mask."""

    u: jax.Array
    capped: jax.Array | None
    pull_back: Callable[[jax.Array], jax.Array] | None
    allowed: jax.Array | None


def _inside(p: Problem, x: jax.Array, start: Any) -> jax.Array:
    return scores.within(x, start, p.q_len) if p.ragged_q else x


def _visit(p: Problem, slot: Any, step: Step, r: Refs, test: Test) -> None:
    t, masked = p.tiling, test is not Test.NOTHING
    rows, columns = walk.parts(t.block_q, t.backward.q), walk.parts(r.key.shape[0], t.backward.kv)
    units = [(i, j) for j in range(len(columns)) for i in range(len(rows))]

    queries, trained = scores.queries(p, r, test), Trained(r)
    # Gradients of what an addend read, by the keys of a tile.
    gradients = [jnp.zeros((1, t.backward.kv), jnp.float32)] * (trained.most(p) if p.adds else 0)

    def query(i: int, ref: Any) -> jax.Array:
        x = ref[rows[i]]
        return _inside(p, x, step.q_start + rows[i].start) if masked else x

    def key(j: int, ref: Any) -> jax.Array:
        x = ref[columns[j]]
        return scores.within(x, step.kv_start + columns[j].start, p.kv_len) if masked and p.ragged_kv else x

    def logits(i: int, j: int) -> Logits:
        here = scores.place(step, rows[i], columns[j])
        q = query(i, queries) if r.prepared is None else queries[rows[i]]
        y = scores.biased(p, r, scores.product(p, q, key(j, r.key)), here, rows[i], columns[j])
        x, pull_back = _modified(p, here, y, r)
        u, capped = scores.binary(p, x)
        allowed = scores.allowed(p, r, here, rows[i], columns[j], test)
        return Logits(u if allowed is None else jnp.where(allowed, u, -jnp.inf), capped, pull_back, allowed)

    def products(i: int, j: int) -> jax.Array:
        v = key(j, r.value)
        if r.lowered is None:
            return walk.dot(query(i, r.out_gradient), v, (1, 1))
        return walk.dot(r.lowered[rows[i]], walk.with_ones(p, v), (1, 1))

    def weigh(i: int, j: int, x: Logits, dp: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weights of values, and dy."""
        weights = jnp.exp2(x.u - walk.wide(r.shift_columns[rows[i]], t.backward.kv))
        kept = scores.kept(p, r, scores.place(step, rows[i], columns[j]))
        if kept is not None:
            dp = dp * kept
        if r.lowered is None:
            dp = dp - walk.wide(r.delta_columns[rows[i]], t.backward.kv)
        if x.capped is not None:
            dp = dp * (1 - x.capped * x.capped)
        dy = weights * dp
        if x.pull_back is not None:
            dy = x.pull_back(dy)
            if x.allowed is not None:  # elsewhere the caller's derivative may be anything
                dy = jnp.where(x.allowed, dy, 0)
        if p.strip is not None and r.strip_sums is not None:
            strips.add(p.strip, r.strip_sums, scores.origin(p, r, step), rows[i], columns[j], dy)
        return (weights if kept is None else weights * kept).astype(p.dtype), dy.astype(p.dtype)

    def add_to_queries(i: int, j: int, weights: jax.Array, dy: jax.Array) -> None:
        if r.query_sums is not None:
            r.query_sums[rows[i]] += walk.dot(dy, key(j, r.key))

    def add_to_values(i: int, j: int, weights: jax.Array, dy: jax.Array) -> None:
        if r.value_sums is not None:
            r.value_sums[slot, :, columns[j]] += walk.dot(r.do_upright[:, rows[i]], weights)

    def add_to_keys(i: int, j: int, weights: jax.Array, dy: jax.Array) -> None:
        if r.key_sums is None:
            return
        found = walk.dot(r.q_upright[:, rows[i]], dy)
        r.key_sums[slot, :, columns[j]] += found[: r.key_sums.shape[1]]
        if gradients:
            here = scores.place(step, rows[i], columns[j])
            derivatives = _derivatives(p, step, trained, addends.row, here.q_pos, here.kv_pos)
            below = iter(walk.parts(found.shape[0], 1)[p.width :])
            ones = found[next(below)]
            for k, derivative in enumerate(derivatives):
                of_column = (found[next(below)] for _ in range(addends.pieces(p.dtype)))
                gradients[k] += ones * derivative + sum(of_column)

    # The compiler keeps the order of products and moves all else around them. So the two of a later tile, which leave
    # much to compute, stand between those of this one, which only add: the longest alone, the shorter ones together.
    alone, *together = add_to_queries, add_to_values, add_to_keys
    if gradients:
        alone, *together = add_to_keys, add_to_values, add_to_queries
    begun: dict[Any, tuple[Logits, jax.Array]] = {}
    for later, unit in walk.staggered(units, t.backward.lag + bool(gradients)):
        x = None if later is None else logits(*later)
        if unit is not None:
            found = weigh(*unit, *begun.pop(unit))
            alone(*unit, *found)
        if later is not None and x is not None:
            begun[later] = x, products(*later)
        if unit is not None:
            for add in together:
                add(*unit, *found)
    trained.add([jnp.sum(each) for each in gradients])


def _modified(p: Problem, here: scores.Place, x: jax.Array, r: Refs) -> tuple[jax.Array, Any]:
    """f(y), and what turns dx into dy and adds the gradients of what f read from captured arrays to theirs."""
    if not p.bends:
        return x, None
    trained = Trained(r)

    def modify(x: jax.Array, numbers: list[jax.Array]) -> jax.Array:
        return scores.modified(p, r, here, x, trained.reader(numbers))

    modified, transpose = jax.vjp(modify, x, [jnp.float32(0)] * trained.most(p))

    def pull_back(dx: jax.Array) -> jax.Array:
        dy, gradients = transpose(dx)
        trained.add(gradients)
        return dy

    return modified, pull_back


class Trained:
    """What a score function reads from captured arrays whose gradients are wanted.

    Every number that is read is a variable of its own, to which nothing is added.
    """

    def __init__(self, r: Refs) -> None:
        self.r, self.places = r, list[tuple[int, Any]]()

    def most(self, p: Problem) -> int:
        return p.reads if any(name.startswith("dcaptured") for name in self.r) else 0

    def reader(self, numbers: Sequence[Any]) -> Callable[[int, Any], Any]:
        self.places.clear()

        def read(i: int, flat: Any) -> Any:
            value = self.r[f"captured{i}"][flat]
            if f"dcaptured{i}" not in self.r:
                return value
            self.places.append((i, flat))
            return value + numbers[len(self.places) - 1]

        return read

    def add(self, gradients: Sequence[jax.Array]) -> None:
        """Of the numbers in the order in which they were read."""
        for (i, flat), gradient in zip(self.places, gradients[: len(self.places)], strict=True):
            sums = self.r[f"dcaptured{i}"]
            sums[...] += jnp.where(walk.iota(sums.shape, 1) == flat, gradient, 0)


def _derivatives(p: Problem, step: Step, trained: Trained, part: Any, *at: Any) -> list[jax.Array]:
    """Of the row or the column of an addend, by every number that it reads."""

    def of(*numbers: Any) -> jax.Array:
        return part(scores.addend(p, step, lambda: trained.reader(numbers)), *at)

    zeros = [jnp.float32(0)] * trained.most(p)
    return [jax.jvp(of, zeros, [*zeros[:k], jnp.float32(1), *zeros[k + 1 :]])[1] for k in range(len(zeros))]


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
    with_lines: bool,
) -> dict[str, jax.Array]:
    """Gradients: dq, dk, dv as the operands are; with_bias dkv_bias `[B, K, 1, S]`; dcaptured of some, flat; dlines.

    Args:
      operands: as `forward` takes them, and out_gradient, shift `[B, N, 1, T]` (L above) and delta, in whole blocks.
    """
    found: dict[str, jax.Array] = {}
    for plan in plans(p, 0 if p.strip is None else (1 + with_lines) * p.strip.size):
        table = by_col if plan.by_col else by_row
        if table is None:
            raise ValueError(f"by_col: expected a list, since the gradients of {p.kv_len} keys do not fit the chip")
        wanted: Any = {"with_bias": with_bias, "with_captured": with_captured, "with_lines": with_lines}
        found |= _walk(p, plan, table, operands, **wanted)
    for name in ("dk", "dv"):
        found[name] = _grouped(p, found[name][:, : p.kv_len], p.width if name == "dk" else p.value_width)
    if with_bias:
        bias = found["dkv_bias"].reshape(p.batch, p.kv_heads, -1, p.columns * p.tiling.block_kv)
        found["dkv_bias"] = jnp.sum(bias, axis=2, keepdims=True)[..., : p.kv_len]
    if with_lines:
        assert p.strip is not None
        found["dlines"] = jnp.pad(jnp.sum(found["dlines"], axis=0), [(0, 0), (0, 0), (p.strip.reach, 0)])
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
    with_lines: bool,
) -> dict[str, jax.Array]:
    t, f32 = p.tiling, jnp.float32
    blocks = walk.specs(p, plan.where, p.col_steps if plan.by_col else p.steps)
    blocks |= {"out_gradient": blocks["out"], "shift": blocks["lse"], "delta": blocks["lse"], "dq": blocks["query"]}
    results: dict[str, Any] = {}
    columns = pltpu.VMEM((t.block_q, LANES), f32)
    scratch: dict[str, Any] = {"shift_columns": columns}
    if _is_lowered(p):
        scratch["lowered"] = pltpu.VMEM((t.block_q, p.ones_width), p.dtype)
    else:
        scratch["delta_columns"] = columns
    scratch |= scores.query_scratch(p, operands) | scores.head_scratch(p)
    if plan.queries:
        results["dq"] = ((p.batch, p.q_len, p.heads * p.width), p.dtype)
        scratch["query_sums"] = pltpu.VMEM((t.block_q, p.width), f32)
        if with_lines and p.strip is not None:
            sizes = p.strip.patterns, p.strip.lanes
            scratch["strip_sums"] = pltpu.VMEM((p.strip.rows, p.strip.lanes + p.strip.reach), f32)
            results["dlines"] = (p.batch, p.heads, *sizes), f32
            blocks["dlines"] = pl.BlockSpec((None, None, *sizes), lambda *ids: (*plan.where(*ids[:4])[:2], 0, 0))
    if plan.keys if p.adds else plan.queries:
        for i in with_captured:
            size = math.prod(p.captured[i])
            results[f"dcaptured{i}"] = ((p.batch, plan.heads, 1, size), f32)
            blocks[f"dcaptured{i}"] = pl.BlockSpec((None, None, 1, size), lambda b, h, *_: (b, h, 0, 0))
    if plan.keys:
        rows = p.width + (ROWS if with_bias else 0)
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
        below = addends.rows(p.reads, p.dtype) if p.adds and with_captured else int(with_bias)
        scratch["q_upright"] = pltpu.VMEM((p.width + -(-below // ROWS) * ROWS, t.block_q), p.dtype)
        scratch["do_upright"] = pltpu.VMEM((p.value_width, t.block_q), p.dtype)
        scratch["key_sums"] = pltpu.VMEM((plan.held, rows, t.block_kv), f32)
        scratch["value_sums"] = pltpu.VMEM((plan.held, p.value_width, t.block_kv), f32)
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
