"""The additive recurrence on GPU, where programs run side by side: states first, chunk after chunk, then all chunks.

    S' = total S + (k * write)^T v                       o  = scale ((q k^T) * pair v + (q * read) S)
    dS = total dS' + scale (q * read)^T do               dS' is the gradient of the state after a chunk

    a  = scale (q k^T) * pair      b = scale (do v^T) * pair
    dq = b k + scale read * (do S^T)      dk = b^T q + write * (v dS'^T)      dv = a^T do + (k * write) dS'
    db = rowsum(q * dq - k * dk), and the last row of db gains sum(S' * dS')

The states of all chunks go through device memory, as they do in flash-linear-attention: in exchange the second kernel
has a program for every chunk. They are made again for the backward pass, so that only the arguments are kept for it.
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
    """Sizes of a call; `group` query heads read one key head."""

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


def _dot(p: Problem, a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """a b, contracting dimension `over[0]` of a with `over[1]` of b, added up in float32."""
    precision: Any = None
    if a.dtype == jnp.float32:
        # Tensor cores have no float32; three products of its halves come within a few units in the last place.
        precision = jax.lax.Precision.HIGHEST if p.interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jax.lax.dot_general(
        a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _rows(p: Problem, ref: Any, chunk: Any, first: Any, size: int, width: int, *, head: int = 0) -> jax.Array:
    """Tokens of a chunk, `size` channels from `first` on; 0 beyond the last token and channel."""
    where = pl.ds(chunk * p.blocks.chunk, p.blocks.chunk), jnp.int32(head), pl.ds(first, size)
    mask = _mask(p, chunk, first, size, width)
    return ref[where] if mask is None else plgpu.load(ref.at[where], mask=mask, other=0)


def _store_rows(p: Problem, ref: Any, chunk: Any, first: Any, width: int, x: jax.Array, *, head: int = 0) -> None:
    where = pl.ds(chunk * p.blocks.chunk, p.blocks.chunk), jnp.int32(head), pl.ds(first, x.shape[1])
    plgpu.store(ref.at[where], x.astype(ref.dtype), mask=_mask(p, chunk, first, x.shape[1], width))


def _mask(p: Problem, chunk: Any, first: Any, size: int, width: int) -> jax.Array | None:
    mask = None
    if p.length % p.blocks.chunk:
        mask = (chunk * p.blocks.chunk + jnp.arange(p.blocks.chunk) < p.length)[:, None]
    if width % size:
        columns = (first + jnp.arange(size) < width)[None]
        mask = columns if mask is None else mask & columns
    return mask if mask is None else jnp.broadcast_to(mask, (p.blocks.chunk, size))


def _sums(p: Problem, ref: Any, chunk: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """The parts of the gates' sums b of a chunk, and of the last of them."""
    first, count = chunk * p.blocks.chunk, gates.parts(p.dtype)
    whole = [ref[i, pl.ds(first, p.blocks.chunk)] for i in range(count)]
    return whole, [ref[i, first + p.blocks.chunk - 1] for i in range(count)]


def _states_kernel(p: Problem, backward: bool, *refs: Any) -> None:
    """All states of a tile: before every chunk, or backward the gradients of those after it.

    Forward `a` and `b` are keys and values, backward they are queries and the gradients of outputs.
    """
    a_ref, b_ref, sums_ref, begin_ref, states_ref, end_ref = refs
    t, group = p.blocks.tile, p.group if backward else 1
    row, column = pl.program_id(1) * t, pl.program_id(2) * t
    exp = gates.exponential(p.dtype)
    tile = _state_tile(p, row, column)

    def turn(i: Any, state: jax.Array) -> jax.Array:
        chunk = p.chunks - 1 - i if backward else i
        plgpu.store(states_ref.at[(chunk, *tile.at)], state.astype(states_ref.dtype), mask=tile.mask)
        whole, last = _sums(p, sums_ref, chunk)
        inside = _total(whole) if backward else _total(z - x for x, z in zip(whole, last, strict=True))
        weight = (p.scale if backward else 1.0) * exp(inside)[:, None]
        state = exp(_total(last)) * state
        for n in range(group):
            a = _rows(p, a_ref, chunk, row, t, p.width, head=n)
            b = _rows(p, b_ref, chunk, column, t, p.value_width, head=n)
            state += _dot(p, a, (b * weight).astype(b.dtype), (0, 0))
        return state

    begin = plgpu.load(begin_ref.at[tile.at], mask=tile.mask, other=None if tile.mask is None else 0)
    state = jax.lax.fori_loop(0, p.chunks, turn, begin.astype(jnp.float32))
    plgpu.store(end_ref.at[tile.at], state, mask=tile.mask)


@dataclasses.dataclass(frozen=True)
class _Tile:
    at: tuple[Any, Any]
    mask: jax.Array | None


def _state_tile(p: Problem, row: Any, column: Any) -> _Tile:
    t, mask = p.blocks.tile, None
    if p.width % t or p.value_width % t:
        mask = (row + jnp.arange(t) < p.width)[:, None] & (column + jnp.arange(t) < p.value_width)[None]
    return _Tile((pl.ds(row, t), pl.ds(column, t)), mask)


def _state(p: Problem, ref: Any, column: Any, size: int) -> jax.Array:
    """All rows of a state and `size` columns; 0 beyond its own."""
    where = pl.ds(0, p.wide), pl.ds(column, size)
    if p.width == p.wide and p.value_width % size == 0:
        return ref[where]
    mask = (jnp.arange(p.wide) < p.width)[:, None] & (column + jnp.arange(size) < p.value_width)[None]
    return plgpu.load(ref.at[where], mask=mask, other=0)


def _total(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _pair(p: Problem, whole: Sequence[jax.Array]) -> jax.Array:
    """exp(b_r - b_j) at and below the diagonal."""
    place = jnp.arange(p.blocks.chunk)
    difference = _total(x[:, None] - x[None, :] for x in whole)
    # Above the diagonal the exponent is positive, and exp of it may overflow.
    return gates.exponential(p.dtype)(jnp.where(place[:, None] >= place[None, :], difference, -jnp.inf))


def _outputs_kernel(p: Problem, *refs: Any) -> None:
    q_ref, k_ref, v_ref, sums_ref, states_ref, o_ref = refs
    chunk, size = pl.program_id(0), min(p.blocks.value_tile, p.value_wide)
    column = pl.program_id(2) * size
    whole, _ = _sums(p, sums_ref, chunk)
    q = _rows(p, q_ref, chunk, 0, p.wide, p.width)
    k = _rows(p, k_ref, chunk, 0, p.wide, p.width)
    v = _rows(p, v_ref, chunk, column, size, p.value_width)
    scores = (_dot(p, q, k, (1, 1)) * _pair(p, whole)).astype(v.dtype)
    out = gates.exponential(p.dtype)(_total(whole))[:, None] * _dot(p, q, _state(p, states_ref, column, size))
    _store_rows(p, o_ref, chunk, column, p.value_width, p.scale * (out + _dot(p, scores, v)))


def _gradients_kernel(p: Problem, *refs: Any) -> None:
    """Of one chunk and query head; what keys and values get through the state is the first head's of a group."""
    q_ref, k_ref, v_ref, do_ref, sums_ref, states_ref, after_ref, dq_ref, dk_ref, dv_ref, db_ref = refs
    chunk, exp, t = pl.program_id(0), gates.exponential(p.dtype), min(p.blocks.tile, p.value_wide)
    first = (pl.program_id(1) % p.group == 0).astype(jnp.float32)
    whole, last = _sums(p, sums_ref, chunk)
    write = first * exp(_total(z - x for x, z in zip(whole, last, strict=True)))[:, None]
    read, pair = p.scale * exp(_total(whole))[:, None], p.scale * _pair(p, whole)
    q = _rows(p, q_ref, chunk, 0, p.wide, p.width)
    k = _rows(p, k_ref, chunk, 0, p.wide, p.width)
    a = (_dot(p, q, k, (1, 1)) * pair).astype(q.dtype)

    def tile(i: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Value channels tile by tile: whole states would not leave registers for the sums."""
        b, dq, dk, kept = sums
        v = _rows(p, v_ref, chunk, i * t, t, p.value_width)
        do = _rows(p, do_ref, chunk, i * t, t, p.value_width)
        before, after = _state(p, states_ref, i * t, t), _state(p, after_ref, i * t, t)
        _store_rows(p, dv_ref, chunk, i * t, p.value_width, write * _dot(p, k, after) + _dot(p, a, do, (0, 0)))
        kept += jnp.sum(before.astype(jnp.float32) * after.astype(jnp.float32))
        return b + _dot(p, do, v, (1, 1)), dq + _dot(p, do, before, (1, 1)), dk + _dot(p, v, after, (1, 1)), kept

    square, wide = ((p.blocks.chunk, n) for n in (p.blocks.chunk, p.wide))
    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in (square, wide, wide, ()))
    b, dq, dk, kept = jax.lax.fori_loop(0, p.value_wide // t, tile, zeros)
    dk *= write
    at_end = first * exp(_total(last)) * kept + jnp.sum(k * dk)
    b = (b * pair).astype(q.dtype)
    dq = read * dq + _dot(p, b, k)
    dk += _dot(p, b, q, (0, 0))
    _store_rows(p, dq_ref, chunk, 0, p.width, dq)
    _store_rows(p, dk_ref, chunk, 0, p.width, dk)
    ends = jnp.arange(p.blocks.chunk) == p.blocks.chunk - 1
    db = jnp.sum(q * dq - k * dk, axis=1) + jnp.where(ends, at_end, 0)
    db_ref[pl.ds(chunk * p.blocks.chunk, p.blocks.chunk)] = db


def _call(p: Problem, kernel: Any, name: str, grid: tuple[int, ...], warps: int, flops: int, **options: Any) -> Any:
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


def _states(
    p: Problem, a: jax.Array, b: jax.Array, sums: jax.Array, begin: jax.Array, *, backward: bool
) -> tuple[jax.Array, jax.Array]:
    """`[B, K, chunks, H, V]` in the operands' dtype, and the state at the end."""
    t, group = p.blocks.tile, p.group if backward else 1
    full = (p.batch, p.heads, p.width, p.value_width)
    tiles = (p.batch * p.heads, -(-p.width // t), -(-p.value_width // t))
    rounded = tiles[1] * t, tiles[2] * t

    def head(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, p.padded, group, width), lambda i, *_: (i // p.heads, 0, i % p.heads, 0))

    state = pl.BlockSpec((None, None, *rounded), lambda i, *_: (i // p.heads, i % p.heads, 0, 0))
    return _call(
        p,
        functools.partial(_states_kernel, p, backward),
        "linear_attention_state_gradients" if backward else "linear_attention_states",
        tiles,
        p.blocks.warps[0],
        2 * p.batch * p.heads * group * p.padded * p.width * p.value_width,
        in_specs=[head(rounded[0]), head(rounded[1]), _sums_spec(p, axis=0), state],
        out_specs=[
            pl.BlockSpec((None, None, p.chunks, *rounded), lambda i, *_: (i // p.heads, i % p.heads, 0, 0, 0)),
            state,
        ],
        out_shape=[shape((*full[:2], p.chunks, *full[2:]), p.dtype, a), shape(full, jnp.float32, a)],
    )(a, b, sums, begin)


def _query_heads(p: Problem) -> Any:
    """Blocks of all tokens of query head `j` of a grid (chunk, batch and head, ...), or of the key head it reads."""
    queries = p.heads * p.group

    def tokens(width: int, *, shared: int = 1) -> pl.BlockSpec:
        block = (None, p.padded, 1, width)
        return pl.BlockSpec(block, lambda i, j, *_: (j // queries, 0, j % queries // shared, 0))

    return tokens


def _sums_spec(p: Problem, *, grouped: int = 1, axis: int) -> pl.BlockSpec:
    """Of the key head of a program, whose batch and head, or query head of `grouped`, is on `axis` of the grid."""

    def index(*at: Any) -> Any:
        head = at[axis] // grouped
        return head // p.heads, head % p.heads, 0, 0

    return pl.BlockSpec((None, None, gates.parts(p.dtype), p.padded), index)


def _chunk_state_spec(p: Problem, values: int) -> pl.BlockSpec:
    """The state of a program's chunk, for the key head that its query head reads."""

    def index(i: Any, j: Any, *_: Any) -> Any:
        head = j // p.group
        return head // p.heads, head % p.heads, i, 0, 0

    return pl.BlockSpec((None, None, None, p.wide, values), index)


def forward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sums: jax.Array,
    state: jax.Array,
    *,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, N, V]` and the state after the last token."""
    states, end = _states(p, key, value, sums, state, backward=False)
    size, queries = min(p.blocks.value_tile, p.value_wide), p.heads * p.group
    values, tokens = -(-p.value_width // size) * size, _query_heads(p)
    out = _call(
        p,
        functools.partial(_outputs_kernel, p),
        "linear_attention_outputs",
        (p.chunks, p.batch * queries, values // size),
        p.blocks.warps[1],
        2 * p.batch * queries * p.padded * (p.blocks.chunk * (p.width + p.value_width) + p.width * p.value_width),
        in_specs=[
            tokens(p.wide),
            tokens(p.wide, shared=p.group),
            tokens(values, shared=p.group),
            _sums_spec(p, grouped=p.group, axis=1),
            _chunk_state_spec(p, values),
        ],
        out_specs=tokens(values),
        out_shape=shape((*query.shape[:3], p.value_width), out_dtype, query),
    )(query, key, value, sums, states)
    return out, end


def backward(
    p: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sums: jax.Array,
    state: jax.Array,
    out_gradient: jax.Array,
    end_gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key, value, the initial state, and of the sums b `[B, K, padded]`."""
    states, _ = _states(p, key, value, sums, state, backward=False)
    after, dstate = _states(p, query, out_gradient, sums, end_gradient, backward=True)
    queries, tokens = p.heads * p.group, _query_heads(p)
    by_query = (p.batch, p.length, queries)
    partial = jnp.float32 if p.group > 1 else p.dtype
    dq, dk, dv, db = _call(
        p,
        functools.partial(_gradients_kernel, p),
        "linear_attention_gradients",
        (p.chunks, p.batch * queries),
        p.blocks.warps[2],
        2
        * p.batch
        * queries
        * p.padded
        * (2 * p.blocks.chunk * (p.width + p.value_width) + 3 * p.width * p.value_width),
        in_specs=[
            tokens(p.wide),
            tokens(p.wide, shared=p.group),
            tokens(p.value_wide, shared=p.group),
            tokens(p.value_wide),
            _sums_spec(p, grouped=p.group, axis=1),
            *[_chunk_state_spec(p, p.value_wide)] * 2,
        ],
        out_specs=[
            tokens(p.wide),
            tokens(p.wide),
            tokens(p.value_wide),
            pl.BlockSpec((None, None, p.padded), lambda i, j: (j // queries, j % queries, 0)),
        ],
        out_shape=[
            shape(query.shape, p.dtype, query),
            shape((*by_query, p.width), partial, query),
            shape((*by_query, p.value_width), partial, query),
            shape((p.batch, queries, p.padded), jnp.float32, query),
        ],
    )(query, key, value, out_gradient, sums, states, after)
    if p.group > 1:
        dk, dv = (jnp.sum(x.reshape(*key.shape[:3], p.group, -1), axis=3).astype(p.dtype) for x in (dk, dv))
        db = jnp.sum(db.reshape(p.batch, p.heads, p.group, -1), axis=2)
    return dq, dk, dv, dstate, db
