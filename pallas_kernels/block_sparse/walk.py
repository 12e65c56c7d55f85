"""What the walks over listed pairs of blocks share on TPU: sizes, where a grid step is, blocks, the call.

Arrays are read as [B, T, heads * width]: a head is a range of whole tiles of lanes, and nothing is transposed in
memory. What belongs to positions alone (log-sum-exps, segment ids, biases of keys) lies along the lanes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse.lists import col_of, row_of
from pallas_kernels.block_sparse.marks import Marks
from pallas_kernels.block_sparse.strips import Strip
from pallas_kernels.block_sparse.tiling import LANES, Tiling

LEAST = float(jnp.finfo(jnp.float32).min)
Indices = Callable[..., Any]
Where = Callable[..., tuple[Any, Any, Any]]
"""From the indices of the grid: which batch row, query head and step of the list."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is fixed while tracing.

    Attributes:
      group: query heads of a key head.
      width, value_width: of a head in whole tiles of lanes.
      sum_lane: the column of [values | ones] from which there are ones, for sums by products; `None`: none.
      steps: of a list; there are `list_rows` of them for batch rows, and for each of these `list_heads` for heads.
      sides: on which intervals of keys bound what queries see in a partial block, 0 where other rules are asked.
      axes: of the coordinates that windows are of, 0 without; `groups` batch rows in turn have windows of their own.
      marks: where windows are penalties of queries; `None`: they are compared.
      guards: the guard bits of windows whose axes are compared all at once, 0 where they are not.
      strip: where the numbers for distances are that logits get; `None`: they get none.
      turned: in this walk queries are the columns of a tile, not its rows.
      adds: the score function is the score and an addend, see `addends`.
      captured: shapes of the arrays that the score function reads; `reads`: how often it reads a floating-point one.
    """

    batch: int
    q_len: int
    kv_len: int
    heads: int
    group: int
    width: int
    value_width: int
    sum_lane: int | None
    scale: float
    soft_cap: float | None
    element: Callable[..., Any] | None
    score_mod: Callable[..., Any] | None
    adds: bool
    captured: tuple[tuple[int, ...], ...]
    dropout_rate: float
    reads: int
    dtype: Any
    tiling: Tiling
    steps: int
    col_steps: int
    list_rows: int
    list_heads: int
    sides: int
    axes: int
    groups: int
    marks: Marks | None
    guards: int
    strip: Strip | None
    interpret: bool
    turned: bool = False

    @property
    def kv_heads(self) -> int:
        return self.heads // self.group

    @property
    def split(self) -> bool:
        return self.tiling.split and self.dtype == jnp.bfloat16 and self.width <= LANES

    @property
    def rows(self) -> int:
        return -(-self.q_len // self.tiling.block_q)

    @property
    def columns(self) -> int:
        return -(-self.kv_len // self.tiling.block_kv)

    @property
    def bends(self) -> bool:
        """Whether the score function does more than to add to a score."""
        return self.score_mod is not None and not self.adds

    @property
    def codes(self) -> int:
        """How many codes of blocks, of queries and then of keys, stand before a list: where they are in a strip."""
        return 0 if self.strip is None else self.rows + self.columns

    @property
    def ones_width(self) -> int:
        """Of values and the ones beside them."""
        return self.value_width + (LANES if self.sum_lane == self.value_width else 0)

    @property
    def ragged_q(self) -> bool:
        return self.q_len % self.tiling.block_q > 0

    @property
    def ragged_kv(self) -> bool:
        return self.kv_len % self.tiling.block_kv > 0


class Step(NamedTuple):
    """A step of the grid: its batch row and query head, its blocks, where they begin, and of what kind the pair is."""

    b: Any
    n: Any
    row: Any
    col: Any
    q_start: Any
    kv_start: Any
    kind: Any


class Refs(dict[str, Any]):
    """The arrays of a kernel by name; `None` for one that it was not given."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def dot(a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """a b, contracting dimension `over[0]` of a with `over[1]` of b, added up in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def with_ones(p: Problem, values: jax.Array) -> jax.Array:
    """[values | ones]; where values end inside of a tile of lanes, the ones are there already."""
    extra = p.ones_width - p.value_width
    return jnp.concatenate([values, jnp.ones((values.shape[0], extra), values.dtype)], axis=1) if extra else values


def wide(x: jax.Array, width: int) -> jax.Array:
    """Columns that are all alike, as many as wanted."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def upright(row: jax.Array) -> jax.Array:
    """A row as columns that are all alike."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def parts(size: int, part: int) -> list[slice]:
    return [slice(i, i + part) for i in range(0, size, part)]


def staggered[T](units: Sequence[T], lag: int) -> Iterator[tuple[T | None, T | None]]:
    """Every unit twice: first to be begun, and `lag` turns later second, to be ended; `None` at the ends."""
    none = [None] * lag
    return zip([*units, *none], [*none, *units], strict=True)


def code_at(p: Problem, table: Any, b: Any, n: Any, a: Any, steps: int) -> Any:
    """Step a, or the nearest there is, of the list of a batch row and a query head."""
    which = n // (p.heads // p.list_heads)
    if p.list_rows > 1:
        which += in_turn(b, p.list_rows, p.batch) * p.list_heads
    return table[p.codes + which * steps + jnp.clip(a, 0, steps - 1)]


def in_turn(b: Any, rows: int, batch: int) -> Any:
    """The row for batch row b of an array whose rows serve all batch rows in turn."""
    return b if rows == batch else jax.lax.rem(b, jnp.int32(rows))


def specs(p: Problem, where: Where, steps: int) -> dict[str, pl.BlockSpec]:
    """Blocks of the kinds of arrays."""
    t = p.tiling

    def block(sizes: tuple[int | None, ...], index: Indices) -> pl.BlockSpec:
        def at(*places: Any) -> Any:
            *ids, table = places
            b, n, a = where(*ids)
            code = code_at(p, table, b, n, a, steps)
            return index(b, n, row_of(code), col_of(code))

        return pl.BlockSpec(sizes, at)

    def query(width: int) -> pl.BlockSpec:
        return block((None, t.block_q, width), lambda b, n, row, col: (b, row, n))

    def key(width: int) -> pl.BlockSpec:
        return block((None, t.block_kv, width), lambda b, n, row, col: (b, col, n // p.group))

    def group(b: Any) -> Any:
        return in_turn(b, p.groups, p.batch)

    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    return {
        "query": query(p.width),
        "key": key(p.width),
        "value": key(p.value_width),
        "out": query(p.value_width),
        "lse": block((None, None, 1, t.block_q), lambda b, n, row, col: (b, n, 0, row)),
        "kv_bias": block((None, None, 1, t.block_kv), lambda b, n, row, col: (b, n // p.group, 0, col)),
        **dict.fromkeys(("q_segments", "q_origins"), block((None, 1, t.block_q), lambda b, n, row, col: (b, 0, row))),
        **dict.fromkeys(("kv_segments", "kv_places"), block((None, 1, t.block_kv), lambda b, n, row, col: (b, 0, col))),
        **dict.fromkeys(("low", "high"), block((None, p.axes, t.block_q), lambda b, n, row, col: (group(b), 0, row))),
        "ends": block((None, 2, t.block_q), lambda b, n, row, col: (group(b), 0, row)),
        "place": block((p.axes, t.block_kv), lambda b, n, row, col: (0, col)),
        **({} if p.strip is None else _strip_specs(p.strip, block)),
        **dict.fromkeys(("sinks", "seed", "order"), scalars),
        **{f"captured{i}": scalars for i in range(len(p.captured))},
    }


def _strip_specs(strip: Strip, block: Callable[..., pl.BlockSpec]) -> dict[str, pl.BlockSpec]:
    return {
        "lines": block((None, strip.patterns, strip.reach + strip.lanes), lambda b, n, row, col: (n, 0, 0)),
        "sources": pl.BlockSpec((strip.rows, strip.later), lambda *ids: (0, 0)),
    }


def call(
    p: Problem,
    kernel: Callable[[Any, Refs], None],
    name: str,
    grid: tuple[int, ...],
    table: jax.Array,
    operands: Mapping[str, jax.Array | None],
    results: Mapping[str, tuple[Sequence[int], Any]],
    blocks: Mapping[str, pl.BlockSpec],
    scratch: Mapping[str, Any],
    *,
    products: int,
) -> list[jax.Array]:
    """Runs a kernel, which gets the list and all its arrays by name, over a grid that begins with batch and heads.

    Args:
      operands: those that are `None` are left out.
      results: shapes and dtypes.
      products: multiplications of a pair of a query and a key.
    """
    given = {name: x for name, x in operands.items() if x is not None}
    names = [*given, *results, *scratch]
    axes = jax.typeof(given["query"]).manual_axis_type
    shapes = [jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=axes) for shape, dtype in results.values()]
    arrays: list[Any] = [*given.values(), *shapes]
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    pairs = p.batch * p.heads * p.steps * p.tiling.block_q * p.tiling.block_kv
    return pl.pallas_call(
        lambda table, *refs: kernel(table, Refs(zip(("table", *names), (table, *refs), strict=True))),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[blocks[name] for name in given],
            out_specs=[blocks[name] for name in results],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=shapes,
        name=name,
        cost_estimate=pl.CostEstimate(flops=2 * products * pairs, bytes_accessed=moved, transcendentals=pairs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL,) * 2 + (pltpu.ARBITRARY,) * (len(grid) - 2),
            vmem_limit_bytes=p.tiling.vmem,
        ),
        interpret=p.interpret,
    )(table, *given.values())
