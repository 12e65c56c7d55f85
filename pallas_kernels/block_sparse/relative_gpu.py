"""The gradient of the table of a relative bias on GPU: a walk over the pairs of blocks of each kind.

A program has a head, a tile of a pair of blocks, and a share of the pairs of a kind in all batch rows. It adds up the
dy of `backward_gpu` in registers, and writes each sum once, to where nothing else writes:

    D[share, layer, n, t, d] = sum of dy_ts        dtable_n[d] = sum over shares, layers and t of D
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import entry
from pallas_kernels.block_sparse import gpu
from pallas_kernels.block_sparse.backward_gpu import rows_of, weights_of
from pallas_kernels.block_sparse.gpu import Place, Problem, Tokens
from pallas_kernels.block_sparse.relative import Alike
from pallas_kernels.block_sparse.tiling import Program
from pallas_kernels.block_sparse.walk import Refs, in_turn

PROGRAMS = 512
"""That fill a GPU: four on each of the multiprocessors of an H100."""
_OF_ROWS = ("query", "key", "value", "out_gradient", "shift", "delta", "kv_bias", "q_segments", "kv_segments")
_OF_GROUPS = ("low", "high")


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of an array of all of them: `row.at[i]` is `ref.at[row, i]`, for a read takes one index."""

    ref: Any
    row: Any

    @property
    def at(self) -> _Row:
        return self

    def __getitem__(self, index: tuple[Any, ...]) -> Any:
        return self.ref.at[(self.row, *index)]


def _in_row(p: Problem, r: Refs, b: Any) -> Refs:
    """The arrays of a batch row, where they are as `specs` has them."""
    rows = dict.fromkeys(_OF_ROWS, b) | dict.fromkeys(_OF_GROUPS, in_turn(b, p.groups, p.batch))
    return Refs({name: _Row(ref, rows[name]) if name in rows else ref for name, ref in r.items()})


def specs(p: Problem, operands: Mapping[str, jax.Array | None]) -> dict[str, pl.BlockSpec]:
    """Of the same arrays with all batch rows, for a grid (any, and any number of times all query heads)."""
    found = gpu.specs(p, by_key=False)
    for name in (*_OF_ROWS, *_OF_GROUPS):
        x, one = operands[name], found[name]
        if x is not None:
            _, *sizes = one.block_shape or ()
            found[name] = pl.BlockSpec((x.shape[0], *sizes), lambda i, j, index=one.index_map: index(i, j % p.heads))
    return found


def gradient(p: Problem, r: Refs, b: Any, n: Any, rows: Tokens, columns: Tokens, *, masked: bool) -> jax.Array:
    """dy of a tile of a batch row and head."""
    own, at = _in_row(p, r, b), Place(b, n, rows, columns)
    q, do = gpu.load(own.query, at.q, p.width), gpu.load(own.out_gradient, at.q, p.value_width)
    k, v = gpu.load(own.key, at.kv, p.width), gpu.load(own.value, at.kv, p.value_width)
    read = gpu.reads(p, b, n, lambda i, flat: r[f"captured{i}"][flat])
    _, gradients = weights_of(p, own, at, gpu.dot(p, q, k, (1, 1)), rows_of(p, own, at.q), read, masked=masked)
    dy, _ = gradients(gpu.dot(p, do, v, (1, 1)))
    return dy


def program(p: Problem) -> Program:
    """That of the gradients of queries, which loads these in every turn too.

    It may have so much of queries and keys ahead as the other has of keys.
    """
    t = p.blocks.queries
    ahead = (t.q + t.stages * t.kv) // (t.q + t.kv)
    return dataclasses.replace(t, stages=max(1, ahead))


def _kernel(p: Problem, t: Program, shares: int, r: Refs) -> None:
    """What a share of the pairs of blocks of a kind gives to a head's table, for one tile of such pairs."""
    across = p.blocks.block_kv // t.kv
    kind, part = divided(pl.program_id(0), p.blocks.block_q // t.q * across)
    (share, n), (down, right) = divided(pl.program_id(1), p.heads), divided(part, across)
    count = r.pairs[kind]

    def tiles(pair: Any) -> tuple[Tokens, Tokens]:
        row, col = r.row[kind, pair] * p.blocks.block_q, r.col[kind, pair] * p.blocks.block_kv
        return gpu.queries(p, row + down * t.q, t.q), gpu.keys(p, col + right * t.kv, t.kv)

    def visit(i: Any, sums: jax.Array) -> jax.Array:
        turn, pair = divided(share + i * shares, count)
        b = turn * p.list_rows + r.list_row[kind, pair]
        return sums + gradient(p, r, b, n, *tiles(pair), masked=True)

    turns = jax.lax.div(p.batch // p.list_rows * count - share + shares - 1, jnp.int32(shares))
    sums = jax.lax.fori_loop(0, turns, visit, jnp.zeros((t.q, t.kv), jnp.float32))

    rows, columns = tiles(0)
    index, inside = jnp.int32(0), jnp.bool_(True)
    for axis, size in enumerate(p.distances):
        tokens = ((r.q_place, rows), (r.place, columns))
        q_place, kv_place = (gpu.load_row(ref, side, jnp.int32(axis)) for ref, side in tokens)
        distance = kv_place - q_place + size // 2
        index, inside = index * size + distance, inside & (distance >= 0) & (distance < size)
    token = down * t.q + jnp.arange(t.q)[:, None]
    at = share * p.layers + r.layer[kind], n, token, jnp.where(inside, index, math.prod(p.distances))
    plgpu.store(r.dtable.at[tuple(jnp.broadcast_to(x, inside.shape) for x in at)], sums, mask=inside)


def divided(x: Any, by: Any) -> tuple[Any, Any]:
    by = jnp.int32(by)
    return jax.lax.div(x, by), jax.lax.rem(x, by)


def backward(p: Problem, alike: Alike, operands: Mapping[str, jax.Array | None]) -> jax.Array:
    """The gradient of the table `[N, entries]`; what the kernel does not write to is 0."""
    t = program(p)
    (kinds, most), rows = alike.row.shape, p.batch // p.list_rows
    tiles = kinds * (p.blocks.block_q // t.q) * (p.blocks.block_kv // t.kv)
    shares = max(1, min(-(-PROGRAMS // (tiles * p.heads)), rows * most))
    shape = shares * p.layers, p.heads, p.blocks.block_q, math.prod(p.distances)
    query = operands["query"]
    assert query is not None
    _, zeros = entry.alike(query, jnp.zeros(shape, jnp.float32))
    found = gpu.call(
        p,
        functools.partial(_kernel, p, t, shares),
        "block_sparse_attention_backward_table",
        t,
        (tiles, p.heads * shares),
        alike,
        {**operands, "zeros": zeros},
        {"dtable": (shape, jnp.float32)},
        specs(p, operands) | dict.fromkeys(("zeros", "dtable"), pl.BlockSpec(shape, lambda *_: (0,) * 4)),
        listed=p.heads * rows * kinds * most,
        products=p.width + p.value_width,
        begun={"zeros": "dtable"},
    )
    return jnp.sum(found["dtable"], axis=(0, 2))
