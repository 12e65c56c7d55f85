"""Calls whose schedules `python -m pallas_kernels.lab report --family block_sparse` reads: forward, then backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse import WorkList, block_sparse_attention, choose
from pallas_kernels.lab import Case
from pallas_kernels.lab.chips import CHIPS

LENGTH, HEADS, WIDTH, WINDOW = 4096, 8, 128, 1024


def cases(target: str) -> dict[str, Case]:
    """Causal; a window in packed sequences, whose blocks are mostly partial; ALiBi with slopes that are trained.

    The least that is moved: q, k, v -> o forward, q, k, v, o, do -> dq, dk, dv backward.
    """
    if target == "h100":
        return {}
    arrays = (jax.ShapeDtypeStruct((1, LENGTH, HEADS, WIDTH), jnp.bfloat16),) * 4
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    slopes = jax.ShapeDtypeStruct((HEADS,), jnp.float32)
    kind, least = CHIPS[target].kind, 12 * arrays[0].size * arrays[0].dtype.itemsize

    def causal(query: Any, key: Any, value: Any, **options: Any) -> Any:
        return _attend(kind, lambda near, far: (far >= 0, near >= 0), _causal, query, key, value, **options)

    def window(query: Any, key: Any, value: Any, ids: Any) -> Any:
        def classify(near: Any, far: Any) -> Any:
            return (far >= 0) & (near <= WINDOW), np.zeros_like(near, bool)

        return _attend(kind, classify, _window, query, key, value, q_segment_ids=ids, kv_segment_ids=ids)

    def alibi(query: Any, key: Any, value: Any, slopes: Any) -> Any:
        return causal(query, key, value, score_mod=_alibi, captured=(slopes,))

    return {
        "causal": Case(_gradient(causal), arrays, least),
        "window-segments": Case(_gradient(window), (*arrays, ids), least),
        "alibi": Case(_gradient(alibi), (*arrays, slopes), least),
    }


def _gradient(attention: Callable[..., Any]) -> Callable[..., Any]:
    def both(query: Any, key: Any, value: Any, d_out: Any, *more: Any) -> Any:
        trained = tuple(x for x in more if jnp.issubdtype(x.dtype, jnp.floating))
        fixed = more[len(trained) :]
        out, transpose = jax.vjp(lambda *x: attention(*x, *fixed)[0], query, key, value, *trained)
        return out, transpose(d_out)

    return both


def _attend(kind: str, classify: Any, element: Any, query: Any, key: Any, value: Any, **options: Any) -> Any:
    """Attention over the blocks that `classify` lists by the least and the greatest distance of their pairs."""
    cut = choose(LENGTH, LENGTH, WIDTH, WIDTH, query.dtype, kind=kind)
    q, kv = (np.arange(0, LENGTH, block) for block in (cut.block_q, cut.block_kv))
    some, every = classify(q[:, None] - kv - cut.block_kv + 1, q[:, None] + cut.block_q - 1 - kv)
    by_col, by_row = np.nonzero(some.T)[::-1], np.nonzero(some)
    by_row, by_col = (
        WorkList(*(np.asarray(x, np.int32)[None, None] for x in (*pairs, 1 + every[pairs])))
        for pairs in (by_row, by_col)
    )
    return block_sparse_attention(
        query,
        key,
        value,
        by_row,
        by_col,
        element=element,
        scale=WIDTH**-0.5,
        block_q=cut.block_q,
        block_kv=cut.block_kv,
        platform="tpu",
        cut=cut,
        **options,
    )


def _causal(q_pos: Any, kv_pos: Any, head: Any) -> Any:
    return kv_pos <= q_pos


def _window(q_pos: Any, kv_pos: Any, head: Any) -> Any:
    return (kv_pos <= q_pos) & (kv_pos >= q_pos - WINDOW)


def _alibi(score: Any, b: Any, h: Any, q_pos: Any, kv_pos: Any, slopes: Any) -> Any:
    return score + slopes[h] * (kv_pos - q_pos)
