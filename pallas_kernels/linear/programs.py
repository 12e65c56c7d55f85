"""What the kernels for GPU share: sizes, reads and writes that stop at the last token and channel, weights of gates.

Programs run side by side, each with one chunk of one head, or with a tile of one head's states and all its chunks.
Their arrays have powers of two for sizes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.linear import gates
from pallas_kernels.linear.walk import shape


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up.

    Attributes:
      chunk: tokens of a chunk, which one program of the second kernel has.
      tile: rows and columns of the state that one program of the first kernel has.
      value_tile: value channels of an output program.
      warps: of a program, for states, outputs and gradients.
      stages: how many turns ahead a loop loads.
    """

    chunk: int = 64
    tile: int = 64
    value_tile: int = 128
    warps: tuple[int, int, int] = (4, 4, 8)
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of a call; `group` query heads read one state, or `shared` states have one query and one key head."""

    batch: int
    length: int
    heads: int
    group: int
    width: int
    value_width: int
    scale: float
    dtype: Any
    blocks: Blocks
    interpret: bool
    shared: int = 1

    @property
    def chunks(self) -> int:
        return -(-self.length // self.blocks.chunk)

    @property
    def padded(self) -> int:
        return self.chunks * self.blocks.chunk

    @property
    def wide(self) -> int:
        """A program's arrays have powers of two for sizes."""
        return pl.next_power_of_2(self.width)

    @property
    def value_wide(self) -> int:
        return pl.next_power_of_2(self.value_width)


def choose(dtype: Any) -> Blocks:
    """Read off registers and spills in `python -m pallas_kernels.lab report --family linear --targets h100`."""
    return Blocks() if dtype == jnp.bfloat16 else Blocks(warps=(8, 8, 8), stages=1)


def check(width: int, value_width: int, dtype: Any) -> None:
    """Raises `NotImplementedError` for heads whose states and sums do not fit the registers of a program."""
    most = 256 if dtype == jnp.bfloat16 else 128
    if max(width, value_width) > most:
        raise NotImplementedError(
            f"the kernel has heads of at most {most} channels in {dtype}, not {width} and {value_width}"
        )


def dot(p: Problem, a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """a b, contracting dimension `over[0]` of a with `over[1]` of b, added up in float32."""
    precision: Any = None
    if a.dtype == jnp.float32:
        # Tensor cores have no float32; three products of its halves come within a few units in the last place.
        precision = jax.lax.Precision.HIGHEST if p.interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jax.lax.dot_general(
        a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def rows(p: Problem, ref: Any, chunk: Any, first: Any, size: int, width: int, *, head: int = 0) -> jax.Array:
    """Tokens of a chunk, `size` channels from `first` on; 0 beyond the last token and channel."""
    where = pl.ds(chunk * p.blocks.chunk, p.blocks.chunk), jnp.int32(head), pl.ds(first, size)
    mask = _mask(p, chunk, first, size, width)
    return ref[where] if mask is None else plgpu.load(ref.at[where], mask=mask, other=0)


def store_rows(
    p: Problem, ref: Any, chunk: Any, first: Any, width: int, x: jax.Array, *, head: int = 0, only: Any = None
) -> None:
    """Of a chunk, from channel `first` on; `only` where it is true, if given."""
    where = pl.ds(chunk * p.blocks.chunk, p.blocks.chunk), jnp.int32(head), pl.ds(first, x.shape[1])
    mask = _mask(p, chunk, first, x.shape[1], width)
    if only is not None:
        mask = jnp.broadcast_to(only, x.shape) if mask is None else mask & only
    plgpu.store(ref.at[where], x.astype(ref.dtype), mask=mask)


def _mask(p: Problem, chunk: Any, first: Any, size: int, width: int) -> jax.Array | None:
    mask = None
    if p.length % p.blocks.chunk:
        mask = (chunk * p.blocks.chunk + jnp.arange(p.blocks.chunk) < p.length)[:, None]
    if width % size:
        columns = (first + jnp.arange(size) < width)[None]
        mask = columns if mask is None else mask & columns
    return mask if mask is None else jnp.broadcast_to(mask, (p.blocks.chunk, size))


def sums_of(p: Problem, ref: Any, chunk: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """The parts of the gates' sums b of a chunk, and of the last of them."""
    first, count = chunk * p.blocks.chunk, gates.parts(p.dtype)
    whole = [ref[i, pl.ds(first, p.blocks.chunk)] for i in range(count)]
    return whole, [ref[i, first + p.blocks.chunk - 1] for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Tile:
    at: tuple[Any, Any]
    mask: jax.Array | None


def state_tile(p: Problem, row: Any, column: Any) -> Tile:
    t, mask = p.blocks.tile, None
    if p.width % t or p.value_width % t:
        mask = (row + jnp.arange(t) < p.width)[:, None] & (column + jnp.arange(t) < p.value_width)[None]
    return Tile((pl.ds(row, t), pl.ds(column, t)), mask)


def state_of(p: Problem, ref: Any, column: Any, size: int) -> jax.Array:
    """All rows of a state and `size` columns; 0 beyond its own."""
    where = pl.ds(0, p.wide), pl.ds(column, size)
    if p.width == p.wide and p.value_width % size == 0:
        return ref[where]
    mask = (jnp.arange(p.wide) < p.width)[:, None] & (column + jnp.arange(size) < p.value_width)[None]
    return plgpu.load(ref.at[where], mask=mask, other=0)


def total(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def pair(p: Problem, whole: Sequence[jax.Array]) -> jax.Array:
    """exp(b_r - b_j) at and below the diagonal."""
    place = jnp.arange(p.blocks.chunk)
    difference = total(x[:, None] - x[None, :] for x in whole)
    # Above the diagonal the exponent is positive, and exp of it may overflow.
    return gates.exponential(p.dtype)(jnp.where(place[:, None] >= place[None, :], difference, -jnp.inf))


def call(p: Problem, kernel: Any, name: str, grid: tuple[int, ...], warps: int, flops: int, **options: Any) -> Any:
    def run(*operands: jax.Array) -> Any:
        moved = sum(x.size * x.dtype.itemsize for x in (*operands, *jax.tree.leaves(options["out_shape"])))
        return pl.pallas_call(
            kernel,
            grid=grid,
            name=name,
            cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=p.blocks.stages),
            interpret=p.interpret,
            **options,
        )(*operands)

    return run


def query_heads(p: Problem) -> Any:
    """Blocks of all tokens of query head `j` of a grid (chunk, batch and head, ...), or of the key head it reads."""
    queries = p.heads * p.group

    def tokens(width: int, *, shared: int = 1) -> pl.BlockSpec:
        block = (None, p.padded, 1, width)
        return pl.BlockSpec(block, lambda i, j, *_: (j // queries, 0, j % queries // shared, 0))

    return tokens


def sums_spec(p: Problem, *, grouped: int = 1, axis: int) -> pl.BlockSpec:
    """Of the key head of a program, whose batch and head, or query head of `grouped`, is on `axis` of the grid."""

    def index(*at: Any) -> Any:
        head = at[axis] // grouped
        return head // p.heads, head % p.heads, 0, 0

    return pl.BlockSpec((None, None, gates.parts(p.dtype), p.padded), index)


def state_heads(p: Problem, width: int, *, count: int = 1, shared: int = 1, axis: int) -> pl.BlockSpec:
    """All tokens of the `count` heads of a program's state, which with batch is on `axis` of the grid."""
    block = (None, p.padded, count, width)
    return pl.BlockSpec(block, lambda *at: (at[axis] // p.heads, 0, at[axis] % p.heads // shared, 0))


def per_state(p: Problem, *block: int, grouped: int = 1, axis: int) -> pl.BlockSpec:
    """Of arrays `[B, K, *block]`; what is on `axis` of the grid as for `sums_spec`."""
    zeros = (0,) * len(block)

    def index(*at: Any) -> Any:
        head = at[axis] // grouped
        return head // p.heads, head % p.heads, *zeros

    return pl.BlockSpec((None, None, *block), index)


def per_chunk(p: Problem, *block: int, grouped: int = 1) -> pl.BlockSpec:
    """Of arrays `[B, K, chunks, *block]`, for a grid (chunk, batch and state, or query head of `grouped`, ...)."""
    zeros = (0,) * len(block)

    def index(i: Any, j: Any, *_: Any) -> Any:
        head = j // grouped
        return head // p.heads, head % p.heads, i, *zeros

    return pl.BlockSpec((None, None, None, *block), index)


def chunk_state_spec(p: Problem, values: int) -> pl.BlockSpec:
    """The state of a program's chunk, for the key head that its query head reads."""
    return per_chunk(p, p.wide, values, grouped=p.group)


def states(
    p: Problem,
    kernel: Any,
    name: str,
    sums_spec: pl.BlockSpec,
    a: jax.Array,
    b: jax.Array,
    sums: jax.Array,
    begin: jax.Array,
    *,
    group: int,
) -> tuple[jax.Array, jax.Array]:
    """States `[B, K, chunks, H, V]` in the operands' dtype and the last one: sums of a^T b over `group` heads of both.

    A program has a tile of one head's states and walks over all chunks.
    """
    t = p.blocks.tile
    full = (p.batch, p.heads, p.width, p.value_width)
    tiles = (p.batch * p.heads, -(-p.width // t), -(-p.value_width // t))
    rounded = tiles[1] * t, tiles[2] * t

    def head(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, p.padded, group, width), lambda i, *_: (i // p.heads, 0, i % p.heads, 0))

    state = pl.BlockSpec((None, None, *rounded), lambda i, *_: (i // p.heads, i % p.heads, 0, 0))
    return call(
        p,
        kernel,
        name,
        tiles,
        p.blocks.warps[0],
        2 * p.batch * p.heads * group * p.padded * p.width * p.value_width,
        in_specs=[head(rounded[0]), head(rounded[1]), sums_spec, state],
        out_specs=[
            pl.BlockSpec((None, None, p.chunks, *rounded), lambda i, *_: (i // p.heads, i % p.heads, 0, 0, 0)),
            state,
        ],
        out_shape=[shape((*full[:2], p.chunks, *full[2:]), p.dtype, a), shape(full, jnp.float32, a)],
    )(a, b, sums, begin)
