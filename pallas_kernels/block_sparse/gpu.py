"""What the block-sparse kernels for GPU share: sizes, walks over lists, reads that stop at the ends, logits, the call.

Programs run side by side, each with one tile of queries (or of keys) of a batch row and head, and each loops over the
blocks of its own list, tile by tile: first those whose pairs are asked for, then those in which all pairs are allowed.
A tile's sizes are powers of two. Logits are kept as x and one positive number, `unit`, for which

    log2(e) z = unit x        so that 2^(unit x - unit m) takes one multiplication and addition for each pair
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.block_sparse import dropout, scores
from pallas_kernels.block_sparse.scores import LOG2E
from pallas_kernels.block_sparse.tiling import LEAST, Blocks, Program
from pallas_kernels.block_sparse.walk import Refs, in_turn


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is fixed while tracing.

    Attributes:
      group: query heads of a key head.
      captured: shapes of the arrays that the score function reads.
      axes: of the coordinates that windows are of, 0 without; `groups` batch rows in turn have windows of their own.
      distances: sizes of a head's table of `relative`, or how many numbers for distances a head has, () without.
      layers: of the gradient of a table, `runs` of that of numbers for distances, for lists of `list_rows` batch rows
        in turn.
    """

    batch: int
    q_len: int
    kv_len: int
    heads: int
    group: int
    width: int
    value_width: int
    scale: float
    soft_cap: float | None
    element: Callable[..., Any] | None
    score_mod: Callable[..., Any] | None
    captured: tuple[tuple[int, ...], ...]
    dropout_rate: float
    dtype: Any
    axes: int
    groups: int
    distances: tuple[int, ...]
    layers: int
    runs: int
    list_rows: int
    blocks: Blocks
    interpret: bool

    @property
    def kv_heads(self) -> int:
        return self.heads // self.group

    @property
    def wide(self) -> int:
        return max(LEAST, pl.next_power_of_2(self.width))

    @property
    def value_wide(self) -> int:
        return max(LEAST, pl.next_power_of_2(self.value_width))

    @property
    def rows(self) -> int:
        return -(-self.q_len // self.blocks.block_q)

    @property
    def columns(self) -> int:
        return -(-self.kv_len // self.blocks.block_kv)

    @property
    def ragged_kv(self) -> bool:
        return self.kv_len % self.blocks.block_kv > 0

    def listed(self, lists: Any) -> int:
        """Pairs of blocks that `BlockLists` have room for."""
        return self.batch * self.heads * math.prod(lists.idx.shape[2:])


class Tokens(NamedTuple):
    """Tokens of a tile, from `start`: `upright` as a column `[size, 1]`, else as a row `[1, size]`.

    Attributes:
      length: of the sequence, or `None` where it has whole blocks.
    """

    start: Any
    size: int
    length: int | None
    upright: bool = True

    @property
    def position(self) -> jax.Array:
        return self.laid(self.start + jnp.arange(self.size))

    @property
    def inside(self) -> jax.Array | None:
        """Which tokens there are, `[size]`; `None`: all."""
        return None if self.length is None else self.start + jnp.arange(self.size) < self.length

    def laid(self, x: jax.Array) -> jax.Array:
        return x[:, None] if self.upright else x[None, :]


def queries(p: Problem, start: Any, size: int, *, upright: bool = True) -> Tokens:
    return Tokens(start, size, p.q_len if p.q_len % p.blocks.block_q else None, upright)


def keys(p: Problem, start: Any, size: int, *, upright: bool = False) -> Tokens:
    return Tokens(start, size, p.kv_len if p.ragged_kv else None, upright)


def load(ref: Any, tokens: Tokens, width: int, *head: Any) -> jax.Array:
    """The tokens' `[size, channels]`, channels a power of two; 0 beyond the last token and channel."""
    wide = max(LEAST, pl.next_power_of_2(width))
    at, mask = _matrix(tokens, width, wide, head)
    return plgpu.load(ref.at[at], mask=mask, other=None if mask is None else 0)


def store(ref: Any, tokens: Tokens, width: int, x: jax.Array, *head: Any) -> None:
    at, mask = _matrix(tokens, width, x.shape[1], head)
    plgpu.store(ref.at[at], x.astype(ref.dtype), mask=mask)


def _matrix(tokens: Tokens, width: int, wide: int, head: tuple[Any, ...]) -> tuple[Any, jax.Array | None]:
    rules = [] if tokens.inside is None else [tokens.inside[:, None]]
    if width < wide:
        rules.append((jnp.arange(wide) < width)[None, :])
    mask = jnp.broadcast_to(functools.reduce(operator.and_, rules), (tokens.size, wide)) if rules else None
    return (pl.ds(tokens.start, tokens.size), *head, pl.ds(0, wide)), mask


def load_row(ref: Any, tokens: Tokens, *head: Any, other: float = 0) -> jax.Array:
    """One number for each token, laid as the tokens are."""
    at, mask = (*head, pl.ds(tokens.start, tokens.size)), tokens.inside
    return tokens.laid(plgpu.load(ref.at[at], mask=mask, other=None if mask is None else other))


def store_row(ref: Any, tokens: Tokens, x: jax.Array, *head: Any) -> None:
    plgpu.store(ref.at[*head, pl.ds(tokens.start, tokens.size)], x.astype(ref.dtype), mask=tokens.inside)


def dot(p: Problem, a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """a b, contracting dimension `over[0]` of a with `over[1]` of b, added up in float32."""
    precision: Any = None
    if a.dtype == jnp.float32:
        # Tensor cores have no float32; three products of its halves come within a few units in the last place.
        precision = jax.lax.Precision.HIGHEST if p.interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jax.lax.dot_general(
        a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def power(p: Problem, factor: float, x: jax.Array, less: jax.Array) -> jax.Array:
    """2^(factor x - less), and 0 below 2^-126, in two instructions.

    XLA forbids Triton to join a product and a sum, and `jnp.exp2` becomes four instructions that are right there too.
    """
    if p.interpret:
        return jnp.exp2(factor * x - less)
    code = f"fma.rn.f32 $0, $1, 0f{np.float32(factor).view(np.uint32):08X}, $2; ex2.approx.ftz.f32 $0, $0;"
    less, like = jnp.broadcast_to(-less, x.shape), jax.ShapeDtypeStruct(x.shape, x.dtype)
    (found,) = plgpu.elementwise_inline_asm(
        code, args=[x, less], constraints="=f,f,f", pack=1, result_shape_dtypes=[like]
    )
    return found


def walk(
    p: Problem, r: Refs, b: Any, n: Any, at: Any, sizes: tuple[int, int], visit: Callable[..., Any], sums: Any
) -> Any:
    """Visits the list of block `at`, tile by tile; `visit(masked, start of the tile, sums) -> sums`.

    Args:
      sizes: tokens of a block on the other side, and of a tile of it.
    """
    size, tile = sizes
    times, (list_rows, list_heads, _, width) = size // tile, r.idx.shape
    which = in_turn(b, list_rows, p.batch) if list_rows > 1 else 0, jax.lax.div(n, jnp.int32(p.heads // list_heads)), at
    partial, total = (x[which] * times for x in (r.n_partial, r.n_total))

    def turn(masked: bool, i: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        block, sums = state
        start = block * size if times == 1 else block * size + jax.lax.rem(i, jnp.int32(times)) * tile
        # A turn ahead, so that the address of the next tile is known when it is to be copied.
        place = jnp.minimum(jax.lax.div(i + 1, jnp.int32(times)), width - 1)
        return r.idx[*which, place], visit(masked, start, sums)

    state = r.idx[*which, 0], sums
    if has_rules(p, r):
        state = jax.lax.fori_loop(0, partial, functools.partial(turn, True), state)
    else:
        partial = 0
    return jax.lax.fori_loop(partial, total, functools.partial(turn, False), state)[1]


def has_rules(p: Problem, r: Refs) -> bool:
    """Whether partial blocks have rules for pairs."""
    return p.element is not None or r.q_segments is not None or p.axes > 0


class Place(NamedTuple):
    """A tile of queries and keys, one of them upright."""

    b: Any
    n: Any
    q: Tokens
    kv: Tokens


class Asked(NamedTuple):
    """What is asked of queries: segments, codes for entries of tables, and on each axis where windows begin and end."""

    ids: jax.Array | None
    code: jax.Array | None
    low: Sequence[jax.Array]
    high: Sequence[jax.Array]


def asked(p: Problem, r: Refs, rows: Tokens) -> Asked:
    ids, code = (None if ref is None else load_row(ref, rows) for ref in (r.q_segments, r.q_code))
    if r.table is not None and r.q_code is None:
        code = rows.position
    bounds = ([load_row(ref, rows, jnp.int32(axis)) for axis in range(p.axes)] for ref in (r.low, r.high))
    return Asked(ids, code, *bounds)


def allowed(p: Problem, r: Refs, at: Place, of_queries: Asked, *, masked: bool) -> jax.Array | None:
    """Which pairs are allowed; `None`: all. Beyond the last query nothing is: there the callers have zeros."""
    rules = []
    if masked and p.element is not None:
        rules.append(p.element(at.q.position, at.kv.position, at.n))
    if masked and of_queries.ids is not None:
        rules.append(of_queries.ids == load_row(r.kv_segments, at.kv))
    for axis in range(p.axes if masked else 0):
        place = load_row(r.place, at.kv, jnp.int32(axis))
        rules += [of_queries.low[axis] <= place, place < of_queries.high[axis]]
    if at.kv.inside is not None:
        rules.append(at.kv.laid(at.kv.inside))
    return functools.reduce(operator.and_, rules) if rules else None


def kept(p: Problem, r: Refs, at: Place) -> jax.Array | None:
    """What dropout multiplies probabilities by; `None`: nothing."""
    if not p.dropout_rate:
        return None
    return dropout.factors(r.seed[0], at.b, at.n, at.q.position, at.kv.position, p.dropout_rate, jnp.float32)


def has_score(p: Problem, r: Refs) -> bool:
    """Whether something stands between the scaled product and the soft cap."""
    return p.score_mod is not None or r.kv_bias is not None or r.table is not None


def entries(p: Problem, r: Refs, at: Place, code: jax.Array) -> jax.Array:
    """Of a head's table for a tile; of pairs that are not in windows or beyond the ends, any.

    Without codes of `relative` it has numbers for distances, the first for the last query and the first key.
    """
    kv_code = at.kv.position + (p.q_len - 1) if r.kv_code is None else load_row(r.kv_code, at.kv)
    index = jnp.clip(kv_code - code, 0, r.table.shape[1] - 1)
    return plgpu.load(r.table.at[jnp.broadcast_to(at.n, index.shape), index])


def unit(p: Problem, r: Refs) -> float:
    if p.soft_cap is not None:
        return p.soft_cap * LOG2E
    return p.scale * LOG2E if p.scale > 0 and not has_score(p, r) else LOG2E


class Read(NamedTuple):
    """One number that the score function reads: from which array, where, and the number."""

    array: int
    flat: Any
    value: Any


def reads(p: Problem, b: Any, n: Any, read: Callable[[int, Any], Any]) -> list[Read]:
    """All that the score function reads for a batch row and head, in order; the places depend on nothing else."""
    found: list[Read] = []

    def note(i: int, flat: Any) -> Any:
        found.append(Read(i, flat, read(i, flat)))
        return found[-1].value

    if p.score_mod is not None:
        place = jnp.zeros((1, 1), jnp.int32)
        p.score_mod(jnp.zeros((1, 1)), b, n, place, place, *scores.tables(p.captured, note))
    return found


def modified(p: Problem, at: Place, y: jax.Array, values: Sequence[Any]) -> jax.Array:
    """f(y), where the score function reads `values`."""
    assert p.score_mod is not None
    rest = iter(values)
    tables = scores.tables(p.captured, lambda i, flat: next(rest))
    return p.score_mod(y, at.b, at.n, at.q.position, at.kv.position, *tables)


class Logits(NamedTuple):
    """x, the tanh of a soft cap, and what turns dx into [dy, gradients of numbers that the score function read]."""

    x: jax.Array
    capped: jax.Array | None
    pull_back: Callable[[jax.Array], Sequence[Any]] | None


def logits(
    p: Problem,
    r: Refs,
    at: Place,
    of_queries: Asked,
    product: jax.Array,
    read: Sequence[Read],
    *,
    trained: Sequence[int] | None = None,
) -> Logits:
    """Of the products of a tile's queries and keys.

    Args:
      trained: which numbers that are read have gradients; `None`: there is no way back from x.
    """
    x, pull_back = product, None
    if has_score(p, r):
        x = x * p.scale
        if r.kv_bias is not None:
            x = x + load_row(r.kv_bias, at.kv)
        if of_queries.code is not None:
            x = x + entries(p, r, at, of_queries.code)
        values = [each.value for each in read]

        def score(y: jax.Array, *free: jax.Array) -> jax.Array:
            replaced = dict(zip(trained or (), free, strict=True))
            return modified(p, at, y, [replaced.get(i, value) for i, value in enumerate(values)])

        if p.score_mod is None:
            pass
        elif trained is None:
            x = score(x)
        else:
            x, pull_back = jax.vjp(score, x, *[values[i] for i in trained])
    elif p.soft_cap is None and unit(p, r) == LOG2E:
        x = x * p.scale
    if p.soft_cap is None:
        return Logits(x, None, pull_back)
    factor = (1 if has_score(p, r) else p.scale) / p.soft_cap
    # tanh of factor x, off by a unit in the last place of 1: in a logit that is the cap times as little.
    capped = 1 - 2 / (1 + power(p, 2 * LOG2E * factor, x, jnp.zeros_like(x)))
    return Logits(capped, capped, pull_back)


def specs(p: Problem, *, by_key: bool) -> dict[str, pl.BlockSpec]:
    """All tokens of what a program reads or writes, for a grid (tile, batch and query head, or `by_key` key head).

    By key an array of queries has the heads of a group.
    """
    padded_q, padded_kv = p.rows * p.blocks.block_q, p.columns * p.blocks.block_kv
    heads, group, shared = (p.kv_heads, p.group, 1) if by_key else (p.heads, None, p.group)

    def spec(sizes: tuple[int | None, ...], index: Callable[[Any, Any], Any]) -> pl.BlockSpec:
        return pl.BlockSpec(sizes, lambda i, j: index(j // heads, j % heads))

    def query(width: int) -> pl.BlockSpec:
        return spec((None, padded_q, group, width), lambda b, h: (b, 0, h, 0))

    def key(width: int) -> pl.BlockSpec:
        return spec((None, padded_kv, None, width), lambda b, h: (b, 0, h // shared, 0))

    def whole(*sizes: int) -> pl.BlockSpec:
        return pl.BlockSpec(sizes, lambda *_: (0,) * len(sizes))

    windows = spec((None, p.axes, padded_q), lambda b, h: (in_turn(b, p.groups, p.batch), 0, 0))
    per_query = spec((None, group, padded_q), lambda b, h: (b, h, 0))
    bias = spec((None, None, padded_kv), lambda b, h: (b, h // shared, 0))
    return {
        "query": query(p.wide),
        "out_gradient": query(p.value_wide),
        "key": key(p.wide),
        "value": key(p.value_wide),
        "kv_bias": bias,
        "q_segments": spec((None, padded_q), lambda b, h: (b, 0)),
        "kv_segments": spec((None, padded_kv), lambda b, h: (b, 0)),
        **dict.fromkeys(("low", "high"), windows),
        "place": whole(p.axes, padded_kv),
        "table": whole(p.heads, math.prod(p.distances)),
        "q_code": whole(padded_q),
        "kv_code": whole(padded_kv),
        "shift": per_query,
        "delta": per_query,
        "out": query(p.value_wide),
        "lse": per_query,
        "dq": query(p.wide),
        "dk": key(p.wide),
        "dv": key(p.value_wide),
        "dkv_bias": bias,
        "sinks": whole(p.heads),
        "seed": whole(1),
        **{f"captured{i}": whole(math.prod(shape)) for i, shape in enumerate(p.captured)},
    }


def call(
    p: Problem,
    kernel: Callable[[Refs], None],
    name: str,
    program: Program,
    grid: tuple[int, int],
    lists: Any,
    operands: Mapping[str, jax.Array | None],
    results: Mapping[str, tuple[Sequence[int], Any]],
    blocks: Mapping[str, pl.BlockSpec],
    *,
    listed: int,
    products: int,
    begun: Mapping[str, str] | None = None,
) -> dict[str, jax.Array]:
    """Runs a kernel, which gets its arrays by name.

    Args:
      operands: those that are `None` are left out.
      results: shapes and dtypes.
      listed: pairs of blocks; `products`: multiplications of a pair of a query and a key.
      begun: operands that results begin as, and these.
    """
    given: dict[str, jax.Array] = lists._asdict()
    arranged = dict(blocks) | {
        name: pl.BlockSpec(x.shape, lambda *_, axes=x.ndim: (0,) * axes) for name, x in given.items()
    }
    given |= {name: x for name, x in operands.items() if x is not None}
    axes = jax.typeof(given["query"]).manual_axis_type
    shapes = [jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=axes) for shape, dtype in results.values()]
    arrays: list[Any] = [*given.values(), *shapes]
    pairs = listed * p.blocks.block_q * p.blocks.block_kv
    names = [*given, *results]
    found = pl.pallas_call(
        lambda *refs: kernel(Refs(zip(names, refs, strict=True))),
        grid=grid,
        in_specs=[arranged[name] for name in given],
        out_specs=[arranged[name] for name in results],
        out_shape=shapes,
        name=name,
        input_output_aliases={names.index(x): list(results).index(y) for x, y in (begun or {}).items()},
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
            transcendentals=pairs,
        ),
        compiler_params=plgpu.CompilerParams(num_warps=program.warps, num_stages=program.stages),
        interpret=p.interpret,
    )(*given.values())
    return dict(zip(results, found, strict=True))
