"""Softmax attention over listed pairs of blocks on TPU: the forward walk.

A grid step is one listed pair of a query and a key block. With the logits u of `scores`, over the steps of a row:

    m' = max(m, rowmax u)    p = 2^(u - m')    l' = 2^(m - m') l + rowsum p    acc' = 2^(m - m') acc + p v
    o = acc / l              lse = m ln 2 + log l                              l = 0: o = 0, lse = -inf

from l = 0 and the least finite m, for -inf less it is -inf; with a sink from m = sink log2(e), l = 1. A step is cut in
tiles, and the scores of later tiles are begun before the softmax of this one, or the matrix units would stand still in
its exponentials. Tiles lie as `forward_rows_tpu` has them, or turned as in `forward_columns_tpu`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse import forward_columns_tpu, forward_rows_tpu, scores, walk
from pallas_kernels.block_sparse.lists import col_of, kind_of, row_of
from pallas_kernels.block_sparse.walk import Problem, Refs, Step

FARTHEST = 96.0
"""A bound of logits, to the base 2, from which 2^20 weights and values of 2^10 may add up, and none vanishes."""


def _is_bounded(p: Problem, sinks: Any) -> bool:
    """Whether no running maximum is needed."""
    return p.soft_cap is not None and p.soft_cap * scores.LOG2E <= FARTHEST and sinks is None


def _form(p: Problem) -> Any:
    return forward_columns_tpu if p.turned else forward_rows_tpu


def _kernel(p: Problem, table: Any, r: Refs) -> None:
    t, form = p.tiling, _form(p)
    b, n, a = (pl.program_id(i) for i in range(3))
    before, code, after = (walk.code_at(p, table, b, n, a + i, p.steps) for i in (-1, 0, 1))
    row, col, kind = row_of(code), col_of(code), kind_of(code)
    step = Step(b, n, row, col, row * t.block_q, col * t.block_kv, kind)

    pl.when(a == 0)(functools.partial(scores.begin_head, p, r))

    @pl.when((a == 0) | (row_of(before) != row))
    def _() -> None:
        form.begin_row(p, step, r)
        scores.begin_queries(p, r)

    scores.visit(p, step, r, t.forward.kv, functools.partial(form.visit, p))
    pl.when((a == p.steps - 1) | (row_of(after) != row))(functools.partial(form.end_row, p, step, r))


def forward(p: Problem, table: jax.Array, operands: Mapping[str, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, N * value_width]` and the natural log-sum-exp `[B, N, 1, T]`, as long as whole blocks are.

    Args:
      operands: query, key, value, kv_bias `[B, K, 1, S]`, q_segments `[B, 1, T]`, kv_segments `[B, 1, S]`, sinks `[N]`
        and the captured arrays, flat.
    """
    if forward_columns_tpu.takes(p, operands):
        assert p.tiling.turned is not None
        p = dataclasses.replace(p, turned=True, tiling=dataclasses.replace(p.tiling, forward=p.tiling.turned[1]))
    padded = p.rows * p.tiling.block_q
    own = forward_columns_tpu.scratch(p) if p.turned else forward_rows_tpu.scratch(p, _is_bounded(p, operands["sinks"]))
    scratch = own | scores.head_scratch(p) | scores.query_scratch(p, operands)
    out, lse = walk.call(
        p,
        functools.partial(_kernel, p),
        "block_sparse_attention_forward",
        (p.batch, p.heads, p.steps),
        table,
        operands,
        {
            "out": ((p.batch, p.q_len, p.heads * p.value_width), p.dtype),
            "lse": ((p.batch, p.heads, 1, padded), jnp.float32),
        },
        walk.specs(p, lambda b, n, a: (b, n, a), p.steps),
        scratch,
        products=p.width + p.value_width,
    )
    return out, lse
