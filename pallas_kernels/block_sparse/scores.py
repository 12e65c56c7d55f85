"""Logits of a tile of queries and keys, in binary logarithms.

With y = scale q k^T + bias and x = f(y), where f is the identity or a caller's score function,

    u = log2(e) c tanh(x / c)  with a soft cap c,  else  log2(e) x        u = -inf where the pair is not allowed

and dy = f'(y) (1 - tanh(x / c)^2) dz for z = u ln 2. Where all that f does is to add (`addends`), the u of each query
fall short by a number. The constants are multiplied into the queries where that is free: in float32, and where
`split` gives their two bfloat16 halves the empty half of a matrix unit.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse import addends, dropout, intervals, marks, strips, walk
from pallas_kernels.block_sparse.intervals import Test
from pallas_kernels.block_sparse.lists import EDGE, FULL, PARTIAL
from pallas_kernels.block_sparse.tiling import LANES
from pallas_kernels.block_sparse.walk import Problem, Refs, Step, iota

LOG2E = math.log2(math.e)
INDICES = (
    "captured: the kernel keeps captured arrays in scalar memory and reads them by one scalar index per axis, such as "
    "slopes[head]; {} is none (a function that does nothing but add a number for every distance may read a table as "
    "table[head, kv_pos - q_pos + c])"
)


class Table:
    """A captured array as a score function sees it in the kernel: scalars, read by scalar indices."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[Any], Any]) -> None:
        self.shape, self._read = shape, read

    def __getitem__(self, index: Any) -> Any:
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) != len(self.shape) or not all(map(_is_scalar, indices)):
            raise NotImplementedError(INDICES.format(repr(index)[:80]))
        flat: Any = 0
        for i, size in zip(indices, self.shape, strict=True):
            flat = flat * size + (i + size if isinstance(i, (int, np.integer)) and i < 0 else i)
        return self._read(flat)


def _is_scalar(index: Any) -> bool:
    return isinstance(index, (int, np.integer)) or (isinstance(index, (jax.Array, np.ndarray)) and index.ndim == 0)


def tables(shapes: Sequence[tuple[int, ...]], read: Callable[[int, Any], Any]) -> list[Any]:
    """What a score function gets for arrays of `shapes`; `read(which, flat index)`."""
    return [
        Table(shape, lambda flat, i=i: read(i, flat)) if shape else read(i, 0)  # type: ignore[misc]
        for i, shape in enumerate(shapes)
    ]


class Place(NamedTuple):
    """Where a tile is: in a step, at positions `[t, 1]` and `[1, s]`."""

    step: Step
    q_pos: jax.Array
    kv_pos: jax.Array


def place(step: Step, rows: slice, columns: slice) -> Place:
    t, s = rows.stop - rows.start, columns.stop - columns.start
    return Place(step, step.q_start + rows.start + iota((t, 1), 0), step.kv_start + columns.start + iota((1, s), 1))


def _factor(p: Problem) -> float:
    """What y is multiplied by at once, where no score function wants it as it is."""
    if p.bends:
        return 1.0
    return LOG2E if p.soft_cap is None else 1 / p.soft_cap


def is_prepared(p: Problem) -> bool:
    """Whether `prepared` changes the queries."""
    return p.split or p.dtype == jnp.float32


def prepared_width(p: Problem) -> int:
    return 2 * p.width if p.split else p.width


def prepared(p: Problem, q: jax.Array) -> jax.Array:
    """Queries as `product` takes them."""
    scaled = q.astype(jnp.float32) * (p.scale * _factor(p))
    if not p.split:
        return scaled
    high = scaled.astype(q.dtype)
    return jnp.concatenate([high, (scaled - high.astype(jnp.float32)).astype(q.dtype)], axis=1)


def queries(p: Problem, refs: Refs, test: Test) -> Any:
    """Where the queries are that `product` takes in this block; in a masked one with the penalties of its keys."""
    found = refs.query if refs.prepared is None else refs.prepared
    if test is Test.NOTHING or p.marks is None:
        return found
    marks.mark(p.marks, found, refs)
    return refs.marked


def product(p: Problem, q: jax.Array, k: jax.Array) -> jax.Array:
    return walk.dot(q, twice(p, k), (1, 1))


def twice(p: Problem, k: jax.Array) -> jax.Array:
    """Keys for the halves of the queries."""
    return jnp.concatenate([k, k], axis=1) if p.split else k


def scaled(p: Problem, x: jax.Array) -> jax.Array:
    """q k^T times its factor, from what a product of `prepared` queries gives."""
    return x if is_prepared(p) else x * (p.scale * _factor(p))


def biased(p: Problem, refs: Refs, x: jax.Array, at: Place, rows: slice, columns: slice) -> jax.Array:
    """y times its factor, from what `product` gives."""
    x, row = scaled(p, x), by_key(p, refs, at, columns)
    if p.strip is not None:
        x = x + strips.tile(p.strip, refs.strips, origin(p, refs, at.step), rows, columns)
    return x if row is None else x + row


def by_key(p: Problem, refs: Refs, at: Place, columns: slice) -> jax.Array | None:
    """What all queries at a place are added alike, a row of keys; `None`: nothing."""
    rows = []
    if refs.kv_bias is not None:
        bias = refs.kv_bias[:, columns]
        rows.append(jnp.where(at.kv_pos < p.kv_len, bias, 0) if p.ragged_kv else bias)
    if p.adds:
        rows.append(addends.row(addend(p, at.step, lambda: reader(refs)), at.q_pos, at.kv_pos))
    return functools.reduce(operator.add, rows) * _factor(p) if rows else None


def origin(p: Problem, refs: Refs, step: Step) -> Any:
    """Where the logits of a pair of blocks, or a part of it, begin in a strip."""
    part = step.kv_start - step.col * p.tiling.block_kv
    return refs.table[p.rows + step.col] - refs.table[step.row] + part


def lines(p: Problem, numbers: jax.Array | None) -> jax.Array | None:
    """The numbers for distances as `biased` adds them."""
    return None if numbers is None else numbers * _factor(p)


def begin_head(p: Problem, refs: Refs) -> None:
    """The strip of a head, and what a walk of turned tiles asks intervals with."""
    intervals.begin_head(refs)
    if p.strip is not None:
        strips.make(p.strip, refs.lines, refs.sources, refs.strips)


def head_scratch(p: Problem) -> dict[str, Any]:
    """Where `begin_head` puts it."""
    return {} if p.strip is None else {"strips": pltpu.VMEM((p.strip.rows, p.strip.lanes), jnp.float32)}


def addend(p: Problem, step: Step, begin: Callable[[], Callable[[int, Any], Any]]) -> addends.Addend:
    """g, of a score function that adds; `begin` gives what reads captured arrays once."""

    def g(q_pos: jax.Array, kv_pos: jax.Array) -> jax.Array:
        zero = jnp.zeros(jnp.broadcast_shapes(q_pos.shape, kv_pos.shape), jnp.float32)
        return _scored(p, Place(step, q_pos, kv_pos), zero, begin())

    return g


def lowered(p: Problem, refs: Refs, step: Step, tile: int) -> jax.Array | None:
    """What the logits z of a block fall short by, `[1, block_q]`; `None`: nothing. `tile`: queries of a tile."""
    if not p.adds:
        return None
    return addends.column(addend(p, step, lambda: reader(refs)), step.q_start, p.tiling.block_q, tile)


def modified(p: Problem, refs: Refs, at: Place, x: jax.Array, read: Callable[[int, Any], Any]) -> jax.Array:
    """f(y), or y if its addend is there already."""
    return _scored(p, at, x, read) if p.bends else x


def _scored(p: Problem, at: Place, x: jax.Array, read: Callable[[int, Any], Any]) -> jax.Array:
    assert p.score_mod is not None
    return p.score_mod(x, at.step.b, at.step.n, at.q_pos, at.kv_pos, *tables(p.captured, read))


def kept(p: Problem, refs: Refs, at: Place) -> jax.Array | None:
    """What dropout multiplies probabilities by; `None`: nothing."""
    if not p.dropout_rate:
        return None
    return dropout.factors(refs.seed[0], at.step.b, at.step.n, at.q_pos, at.kv_pos, p.dropout_rate, jnp.float32)


def reader(refs: Refs) -> Callable[[int, Any], Any]:
    return lambda i, flat: refs[f"captured{i}"][flat]


def binary(p: Problem, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """u, and with a soft cap tanh(x / c), from x times its factor."""
    if p.soft_cap is None:
        return (x * LOG2E if p.bends else x), None
    t = jnp.tanh(x * (1 / p.soft_cap) if p.bends else x)
    return t * (p.soft_cap * LOG2E), t


def allowed(p: Problem, refs: Refs, at: Place, rows: slice, columns: slice, test: Test) -> jax.Array | None:
    """Which pairs of a tile are allowed; `None`: all."""
    if test is Test.NOTHING:
        return None
    rules, width = [], columns.stop - columns.start
    if test is not Test.RULES:
        found = intervals.allowed(p, refs, at.step, rows, columns, at.kv_pos, test)
        if test is not Test.SEGMENTS:
            return found
        rules.append(found)
    elif p.element is not None:
        rules.append(p.element(at.q_pos, at.kv_pos, at.step.n))
    if refs.q_ids is not None:
        rules.append(walk.wide(refs.q_ids[rows], width) == refs.kv_segments[:, columns])
    if p.guards:
        place = refs.place[:, columns]
        after = (place + p.guards) - walk.wide(refs.low_columns[0, rows], width)
        before = walk.wide(refs.high_columns[0, rows], width) - place
        rules.append(after & before & p.guards == p.guards)
    for axis in range(0 if p.guards or p.marks is not None else p.axes):
        place = refs.place[axis : axis + 1, columns]
        rules.append(walk.wide(refs.low_columns[axis, rows], width) <= place)
        rules.append(place < walk.wide(refs.high_columns[axis, rows], width))
    if rules and (p.ragged_q or p.ragged_kv):
        rules = [functools.reduce(operator.and_, rules) | (at.step.kind == EDGE)]
    if p.ragged_kv:
        rules.append(at.kv_pos < p.kv_len)
    return functools.reduce(operator.and_, rules) if rules else None


def visit(p: Problem, step: Step, refs: Refs, size: int, each: Callable[[Step, Refs, Test], None]) -> None:
    """Visits the block of a step with `each(step, refs, test)`, at once or in parts; `size`: keys of a tile."""
    pl.when(step.kind == FULL)(functools.partial(each, step, refs, Test.NOTHING))

    @pl.when((step.kind == PARTIAL) | (step.kind == EDGE))
    def _() -> None:
        if p.sides:
            intervals.visit(p, step, refs, size, each)
        else:
            each(step, refs, Test.RULES)


def begin_queries(p: Problem, refs: Refs) -> None:
    """What masks ask of queries, as columns that are all alike; of turned tiles as rows."""
    if refs.q_ids is not None:
        refs.q_ids[...] = walk.upright(refs.q_segments[...])
    if p.sides:
        return intervals.begin_queries(p, refs)
    if p.marks is not None:
        return marks.begin_queries(p.marks, refs.low[...], refs.high[...], refs, walk.upright)
    for axis in range(p.axes):
        refs.low_columns[axis] = walk.upright(refs.low[axis : axis + 1])
        refs.high_columns[axis] = walk.upright(refs.high[axis : axis + 1])


def query_scratch(p: Problem, operands: Mapping[str, Any]) -> dict[str, Any]:
    """Where `begin_queries` puts it, and queries as `product` takes them."""
    scratch, columns = intervals.scratch(p), (p.tiling.block_q, LANES)
    if p.turned:
        return scratch
    if is_prepared(p):
        scratch["prepared"] = pltpu.VMEM((p.tiling.block_q, prepared_width(p)), p.dtype)
    if operands["q_segments"] is not None:
        scratch["q_ids"] = pltpu.VMEM(columns, jnp.int32)
    if p.marks is not None:
        scratch |= dict.fromkeys(("low_marks", "high_marks"), pltpu.VMEM(columns, jnp.int32))
        scratch["marked"] = pltpu.VMEM((p.tiling.block_q, prepared_width(p)), p.dtype)
    elif p.axes:
        scratch |= dict.fromkeys(("low_columns", "high_columns"), pltpu.VMEM((p.axes, *columns), jnp.int32))
    return scratch


def within(x: jax.Array, start: Any, length: int) -> jax.Array:
    """Rows after the end of a sequence as 0: what is read there may be NaN, and 0 NaN is NaN."""
    return jnp.where(start + iota((x.shape[0], 1), 0) < length, x, 0)
