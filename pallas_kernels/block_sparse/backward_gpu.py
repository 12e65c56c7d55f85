"""Softmax attention over listed pairs of blocks on GPU: the backward walks.

With logits of `gpu`, L = lse log2(e) (+inf for a row that saw nothing) and delta_t = <do_t, o_t> - dlse_t:

    p = 2^(unit x - L)           dz = p (do v^T - delta)        dy = the derivative of `logits` times dz
    dq = scale dy k              dk = scale dy^T q              dv = p^T do

One kernel has a tile of queries in a program and walks over its list for dq; the other has a tile of keys and walks
over the query blocks of the transposed list, for every query head of its key head in turn, so that each gradient is
added up by one program, in float32 and in one order. The second has keys upright: p^T and dy^T are then made as the
matrix units read them, in registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse import gpu
from pallas_kernels.block_sparse.gpu import Place, Problem
from pallas_kernels.block_sparse.walk import Refs


class Rows(NamedTuple):
    """What the backward pass knows of queries: L, delta and what masks ask."""

    shift: jax.Array
    delta: jax.Array
    asked: gpu.Asked


def rows_of(p: Problem, r: Refs, rows: gpu.Tokens, *head: Any) -> Rows:
    shift, delta = gpu.load_row(r.shift, rows, *head, other=jnp.inf), gpu.load_row(r.delta, rows, *head)
    return Rows(shift, delta, gpu.asked(p, r, rows))


def weights_of(
    p: Problem,
    r: Refs,
    at: Place,
    product: jax.Array,
    rows: Rows,
    read: Sequence[gpu.Read],
    *,
    masked: bool,
    trained: Sequence[int] = (),
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, Sequence[Any]]]]:
    """p times what dropout does, and what turns do v^T into dy and the gradients of `trained` numbers of the scores."""
    x, capped, pull_back = gpu.logits(p, r, at, rows.asked, product, read, trained=trained)
    allowed = gpu.allowed(p, r, at, rows.asked, masked=masked)
    if allowed is not None:
        x = jnp.where(allowed, x, -jnp.inf)
    weights, kept = gpu.power(p, gpu.unit(p, r), x, rows.shift), gpu.kept(p, r, at)

    def gradients(dp: jax.Array) -> tuple[jax.Array, Sequence[Any]]:
        dy = weights * ((dp if kept is None else dp * kept) - rows.delta)
        if capped is not None:
            dy = dy * (1 - capped * capped)
        if pull_back is None:
            return dy, []
        dy, *of_read = pull_back(dy)
        # Where a pair is not allowed the caller's derivative may be anything.
        return dy if allowed is None else jnp.where(allowed, dy, 0), of_read

    return weights if kept is None else weights * kept, gradients


def _queries_kernel(p: Problem, wanted: tuple[int, ...], r: Refs) -> None:
    """dq of a tile of queries; of the arrays `wanted` what every number read of them gets from it."""
    t = p.blocks.queries
    tile = pl.num_programs(0) - 1 - pl.program_id(0)
    b, n = (f(pl.program_id(1), jnp.int32(p.heads)) for f in (jax.lax.div, jax.lax.rem))
    rows = gpu.queries(p, tile * t.q, t.q)
    q, do = gpu.load(r.query, rows, p.width), gpu.load(r.out_gradient, rows, p.value_width)
    of_rows = rows_of(p, r, rows)
    read = gpu.reads(p, b, n, lambda i, flat: r[f"captured{i}"][flat])
    trained = [i for i, each in enumerate(read) if each.array in wanted]

    def visit(masked: bool, begin: Any, sums: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        dq, totals = sums
        at = Place(b, n, rows, gpu.keys(p, begin, t.kv))
        k, v = gpu.load(r.key, at.kv, p.width), gpu.load(r.value, at.kv, p.value_width)
        product = gpu.dot(p, q, k, (1, 1))
        _, gradients = weights_of(p, r, at, product, of_rows, read, masked=masked, trained=trained)
        dy, of_read = gradients(gpu.dot(p, do, v, (1, 1)))
        totals = [total + more for total, more in zip(totals, of_read, strict=True)]
        return dq + gpu.dot(p, dy.astype(k.dtype), k), totals

    sums = jnp.zeros((t.q, p.wide), jnp.float32), [jnp.float32(0) for _ in trained]
    block = jax.lax.div(rows.start, jnp.int32(p.blocks.block_q))
    dq, totals = gpu.walk(p, r, b, n, block, (p.blocks.block_kv, t.kv), visit, sums)
    gpu.store(r.dq, rows, p.width, dq * p.scale)
    for i, total in enumerate(totals):
        r.dread[i, pl.program_id(1), tile] = total


def _keys_kernel(p: Problem, r: Refs) -> None:
    """dk, dv and the gradient of the bias of a tile of keys."""
    t = p.blocks.keys
    b, h = (f(pl.program_id(1), jnp.int32(p.kv_heads)) for f in (jax.lax.div, jax.lax.rem))
    columns = gpu.keys(p, pl.program_id(0) * t.kv, t.kv, upright=True)
    k, v = gpu.load(r.key, columns, p.width), gpu.load(r.value, columns, p.value_width)
    block = jax.lax.div(columns.start, jnp.int32(p.blocks.block_kv))

    def head(g: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        n = h * p.group + g
        read = gpu.reads(p, b, n, lambda i, flat: r[f"captured{i}"][flat])

        def visit(masked: bool, begin: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dk, dv, *dbias = sums
            at = Place(b, n, gpu.queries(p, begin, t.q, upright=False), columns)
            q, do = gpu.load(r.query, at.q, p.width, g), gpu.load(r.out_gradient, at.q, p.value_width, g)
            product = gpu.dot(p, k, q, (1, 1))
            weights, gradients = weights_of(p, r, at, product, rows_of(p, r, at.q, g), read, masked=masked)
            dv += gpu.dot(p, weights.astype(do.dtype), do)
            dy, _ = gradients(gpu.dot(p, v, do, (1, 1)))
            dk += gpu.dot(p, dy.astype(q.dtype), q)
            return dk, dv, *[x + jnp.sum(dy, axis=1) for x in dbias]

        return gpu.walk(p, r, b, n, block, (p.blocks.block_q, t.q), visit, sums)

    sums = tuple(jnp.zeros((t.kv, width), jnp.float32) for width in (p.wide, p.value_wide))
    if r.dkv_bias is not None:
        sums = *sums, jnp.zeros(t.kv, jnp.float32)
    dk, dv, *dbias = head(jnp.int32(0), sums) if p.group == 1 else jax.lax.fori_loop(0, p.group, head, sums)
    gpu.store(r.dk, columns, p.width, dk * p.scale)
    gpu.store(r.dv, columns, p.value_width, dv)
    for x in dbias:
        gpu.store_row(r.dkv_bias, columns, x)


def backward(
    p: Problem,
    by_row: Any,
    by_col: Any,
    operands: Mapping[str, jax.Array | None],
    *,
    with_bias: bool,
    with_captured: tuple[int, ...],
) -> dict[str, jax.Array]:
    """Gradients: dq, dk, dv as the operands are; with_bias dkv_bias `[B, K, S]`, and dcaptured of some, flat.

    Args:
      operands: as `forward` takes them, and out_gradient as the outputs, shift `[B, N, T]` (L above) and delta.
    """
    if by_col is None:
        raise ValueError("by_col: expected a list, since the gradients of keys are added up by their blocks")
    read = _places(p, operands)
    count = sum(array in with_captured for array, _ in read)
    t, tiles = p.blocks.queries, p.rows * (p.blocks.block_q // p.blocks.queries.q)
    blocks = gpu.specs(p, by_key=False)
    results: dict[str, Any] = {"dq": ((p.batch, p.q_len, p.heads, p.width), p.dtype)}
    if count:
        size = count, p.batch * p.heads, tiles
        results["dread"] = size, jnp.float32
        blocks["dread"] = pl.BlockSpec(size, lambda *_: (0, 0, 0))
    found = gpu.call(
        p,
        functools.partial(_queries_kernel, p, with_captured),
        "block_sparse_attention_backward_queries",
        t,
        (tiles, p.batch * p.heads),
        by_row,
        operands,
        results,
        blocks,
        listed=p.listed(by_row),
        products=2 * p.width + p.value_width,
    )
    results = {
        "dk": ((p.batch, p.kv_len, p.kv_heads, p.width), p.dtype),
        "dv": ((p.batch, p.kv_len, p.kv_heads, p.value_width), p.dtype),
    }
    if with_bias:
        results["dkv_bias"] = (p.batch, p.kv_heads, p.kv_len), jnp.float32
    t, tiles = p.blocks.keys, p.columns * (p.blocks.block_kv // p.blocks.keys.kv)
    found |= gpu.call(
        p,
        functools.partial(_keys_kernel, p),
        "block_sparse_attention_backward_keys",
        t,
        (tiles, p.batch * p.kv_heads),
        by_col,
        operands,
        results,
        gpu.specs(p, by_key=True),
        listed=p.listed(by_col),
        products=2 * p.width + 2 * p.value_width,
    )
    if count:
        sums = iter(jnp.sum(found.pop("dread"), axis=2))
        found |= _captured(p, [(array, flat, next(sums)) for array, flat in read if array in with_captured])
    return found


def _places(p: Problem, operands: Mapping[str, Any]) -> list[tuple[int, jax.Array]]:
    """The arrays that the score function reads numbers of, in order, and where, `[B N]`."""
    arrays: list[int] = []

    def places(b: jax.Array, n: jax.Array) -> list[Any]:
        found = gpu.reads(p, b, n, lambda i, flat: operands[f"captured{i}"][flat])
        arrays[:] = [each.array for each in found]
        return [jnp.asarray(each.flat, jnp.int32) for each in found]

    index = jnp.arange(p.batch * p.heads, dtype=jnp.int32)
    flat = jax.vmap(places)(index // p.heads, index % p.heads)
    return list(zip(arrays, flat, strict=True))


def _captured(p: Problem, gradients: list[tuple[int, jax.Array, jax.Array]]) -> dict[str, jax.Array]:
    """What was read of every number of an array, added up in one order: a scatter would use atomics."""
    found: dict[str, jax.Array] = {}
    for array, flat, gradient in gradients:
        size = jnp.arange(max(1, functools.reduce(lambda a, b: a * b, p.captured[array], 1)))
        added = jnp.sum(jnp.where(flat[:, None] == size, gradient[:, None], 0), axis=0)
        found[f"dcaptured{array}"] = found.get(f"dcaptured{array}", 0) + added
    return found
