"""Softmax attention over listed pairs of blocks on GPU: the forward walk.

A program has a tile of queries of one head and walks over the key blocks of its list. With logits of `gpu`:

    m' = max(m, rowmax x)    p = 2^(unit (x - m'))    l' = 2^(unit (m - m')) l + rowsum p    acc' likewise + p v
    o = acc / l              lse = unit m ln 2 + log l                              l = 0: o = 0, lse = -inf

from m = -inf, l = 0, or with a sink m = sink log2(e) / unit, l = 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse import gpu
from pallas_kernels.block_sparse.gpu import Place, Problem
from pallas_kernels.block_sparse.scores import LOG2E
from pallas_kernels.block_sparse.walk import Refs


def _kernel(p: Problem, r: Refs) -> None:
    t, unit = p.blocks.forward, gpu.unit(p, r)
    # Under a causal mask later queries see more: what takes longest begins first.
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * t.q
    b, n = (f(pl.program_id(1), jnp.int32(p.heads)) for f in (jax.lax.div, jax.lax.rem))
    rows = gpu.queries(p, start, t.q)
    q = gpu.load(r.query, rows, p.width)
    of_queries = gpu.asked(p, r, rows)
    read = gpu.reads(p, b, n, lambda i, flat: r[f"captured{i}"][flat])

    def visit(masked: bool, begin: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        m, l, acc = sums
        at = Place(b, n, rows, gpu.keys(p, begin, t.kv))
        k, v = gpu.load(r.key, at.kv, p.width), gpu.load(r.value, at.kv, p.value_width)
        x, _, _ = gpu.logits(p, r, at, of_queries, gpu.dot(p, q, k, (1, 1)), read)
        allowed = gpu.allowed(p, r, at, of_queries, masked=masked)
        if allowed is not None:
            x = jnp.where(allowed, x, -jnp.inf)
        largest = jnp.maximum(m, jnp.max(x, axis=1))
        shift = jnp.where(largest == -jnp.inf, 0, largest * unit)
        weights, kept = gpu.power(p, unit, x, shift[:, None]), gpu.power(p, unit, m, shift)
        l = kept * l + jnp.sum(weights, axis=1)
        dropped = gpu.kept(p, r, at)
        weights = weights if dropped is None else weights * dropped
        return largest, l, kept[:, None] * acc + gpu.dot(p, weights.astype(v.dtype), v)

    zeros = jnp.zeros(t.q, jnp.float32)
    m, l = (zeros - jnp.inf, zeros) if r.sinks is None else (zeros + r.sinks[n] * (LOG2E / unit), zeros + 1)
    sums = m, l, jnp.zeros((t.q, p.value_wide), jnp.float32)
    block = jax.lax.div(start, jnp.int32(p.blocks.block_q))
    m, l, acc = gpu.walk(p, r, b, n, block, (p.blocks.block_kv, t.kv), visit, sums)
    seen = l > 0
    l = jnp.where(seen, l, 1)
    gpu.store(r.out, rows, p.value_width, acc * (1 / l)[:, None])
    gpu.store_row(r.lse, rows, jnp.where(seen, m * (unit * math.log(2)) + jnp.log(l), -jnp.inf))


def forward(p: Problem, by_row: Any, operands: Mapping[str, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, N, V]` and the natural log-sum-exp `[B, N, T]`.

    Args:
      by_row: `lists.BlockLists`.
      operands: query, key, value as the op has them, kv_bias `[B, K, S]`, q_segments `[B, T]`, kv_segments `[B, S]`,
        sinks `[N]`, the captured arrays, flat, and those of `Windows` and `Codes`.
    """
    found = gpu.call(
        p,
        functools.partial(_kernel, p),
        "block_sparse_attention_forward",
        p.blocks.forward,
        (p.rows * (p.blocks.block_q // p.blocks.forward.q), p.batch * p.heads),
        by_row,
        operands,
        {
            "out": ((p.batch, p.q_len, p.heads, p.value_width), p.dtype),
            "lse": ((p.batch, p.heads, p.q_len), jnp.float32),
        },
        gpu.specs(p, by_key=False),
        listed=p.listed(by_row),
        products=p.width + p.value_width,
    )
    return found["out"], found["lse"]
