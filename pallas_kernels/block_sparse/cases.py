"""Calls whose schedules `python -m pallas_kernels.lab report --family block_sparse` reads: forward, then backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse import (
    BlockLists,
    Blocks,
    Tiling,
    WorkList,
    block_sparse_attention,
    choose,
    choose_blocks,
)
from pallas_kernels.block_sparse.relative import fitted
from pallas_kernels.lab import Case
from pallas_kernels.lab.chips import CHIPS

LENGTH, HEADS, WIDTH, WINDOW = 4096, 8, 128, 1024
TESTS = "hot regions in the order of the code: full blocks, one end of intervals in each tile, both ends, segments too"


def cases(target: str) -> dict[str, Case]:
    """Causal; a window in packed sequences (mostly partial blocks); ALiBi with trained slopes; a trained table of
    distances; a soft cap; dropout.

    The least that is moved: q, k, v -> o forward, q, k, v, o, do -> dq, dk, dv backward.
    """
    if target == "h100":
        return _gpu()
    arrays = (jax.ShapeDtypeStruct((1, LENGTH, HEADS, WIDTH), jnp.bfloat16),) * 4
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    slopes = jax.ShapeDtypeStruct((HEADS,), jnp.float32)
    least = 12 * arrays[0].size * arrays[0].dtype.itemsize
    kind, shape = CHIPS[target].kind, (LENGTH, LENGTH, WIDTH, WIDTH, jnp.bfloat16)
    cut = choose(*shape, kind=kind)
    packed = choose(*shape, block_kv=1024, kind=kind)  # as the op does

    def causal(query: Any, key: Any, value: Any, **options: Any) -> Any:
        return _attend(cut, _is_causal, CAUSAL, query, key, value, **options)

    def window(query: Any, key: Any, value: Any, ids: Any) -> Any:
        def classify(near: Any, far: Any) -> Any:
            return (far >= 0) & (near <= WINDOW), np.zeros_like(near, bool)

        return _attend(packed, classify, WINDOWS, query, key, value, q_segment_ids=ids, kv_segment_ids=ids)

    def alibi(query: Any, key: Any, value: Any, slopes: Any) -> Any:
        return causal(query, key, value, score_mod=_alibi, captured=(slopes,))

    def relative(query: Any, key: Any, value: Any, table: Any) -> Any:
        return small(query, key, value, score_mod=_relative, captured=(table,))

    # Smaller blocks, which take less long to compile.
    small = functools.partial(_attend, choose(*shape, block_q=512, block_kv=512, kind=kind), _is_causal, CAUSAL)
    return {
        "causal": Case(_gradient(causal), arrays, least),
        "window-segments": Case(_gradient(window), (*arrays, ids), least, TESTS),
        "alibi": Case(_gradient(alibi), (*arrays, slopes), least),
        "relative": Case(_gradient(relative), (*arrays, jax.ShapeDtypeStruct((HEADS, LENGTH), jnp.float32)), least),
        "soft-cap": Case(_gradient(functools.partial(causal, soft_cap=50.0)), arrays, least),
        "dropout": Case(_gradient(_dropout(small)), (*arrays, jax.ShapeDtypeStruct((), jnp.uint32)), least),
    }


def _gpu() -> dict[str, Case]:
    """Causal with heads of two widths, dropout, a trained table of distances; and all that a call can have at once.

    The last has masks on every side.
    """
    found: dict[str, Case] = {}
    for width in (64, 128):
        arrays = (jax.ShapeDtypeStruct((1, LENGTH, HEADS, width), jnp.bfloat16),) * 4
        cut = choose_blocks(LENGTH, LENGTH, width, width, jnp.bfloat16)
        attention = functools.partial(_attend, cut, _is_causal, CAUSAL)
        found[f"causal-{width}"] = Case(_gradient(attention), arrays, 12 * arrays[0].size * arrays[0].dtype.itemsize)
        if width == 64:
            found["dropout"] = Case(_gradient(_dropout(attention)), (*arrays, jax.ShapeDtypeStruct((), jnp.uint32)))
        else:
            table = jax.ShapeDtypeStruct((HEADS, LENGTH), jnp.float32)
            found["relative"] = Case(_gradient(_with_table(fitted(cut, width, jnp.bfloat16))), (*arrays, table))

    batch, length, heads, kv_heads, width, value_width = 2, 1000, 4, 2, 40, 24
    cut = choose_blocks(length, length, width, value_width, jnp.bfloat16, block_q=512, block_kv=384)

    def everything(query: Any, key: Any, value: Any, slopes: Any, sinks: Any, bias: Any, ids: Any) -> Any:
        options: Any = {"score_mod": _alibi, "captured": (slopes,), "sinks": sinks, "kv_bias": bias, "soft_cap": 20.0}
        options |= {"q_segment_ids": ids, "kv_segment_ids": ids}
        return _attend(cut, _is_causal, CAUSAL, query, key, value, **options)

    query, key, value, out = (
        jax.ShapeDtypeStruct((batch, length, *sizes), jnp.bfloat16)
        for sizes in ((heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width))
    )
    per_head = jax.ShapeDtypeStruct((heads,), jnp.float32)
    bias = jax.ShapeDtypeStruct((batch, kv_heads, length), jnp.float32)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    arguments = (query, key, value, out, per_head, per_head, bias, ids)
    return found | {"everything": Case(_gradient(everything), arguments)}


def _with_table(cut: Blocks) -> Callable[..., Any]:
    def attention(query: Any, key: Any, value: Any, table: Any) -> Any:
        return _attend(cut, _is_causal, CAUSAL, query, key, value, score_mod=_relative, captured=(table,))

    return attention


def _dropout(attention: Callable[..., Any]) -> Callable[..., Any]:
    def dropped(query: Any, key: Any, value: Any, seed: Any) -> Any:
        return attention(query, key, value, dropout_rate=0.1, dropout_seed=seed)

    return dropped


def _gradient(attention: Callable[..., Any]) -> Callable[..., Any]:
    def both(query: Any, key: Any, value: Any, d_out: Any, *more: Any) -> Any:
        trained = tuple(x for x in more if jnp.issubdtype(x.dtype, jnp.floating))
        fixed = more[len(trained) :]
        out, transpose = jax.vjp(lambda *x: attention(*x, *fixed)[0], query, key, value, *trained)
        return out, transpose(d_out)

    return both


def _attend(cut: Tiling | Blocks, classify: Any, mask: Rule, query: Any, key: Any, value: Any, **options: Any) -> Any:
    """Attention over the blocks that `classify` lists by the least and the greatest distance of their pairs."""
    q, kv = (np.arange(0, x.shape[1], block) for x, block in ((query, cut.block_q), (key, cut.block_kv)))
    some, every = classify(q[:, None] - kv - cut.block_kv + 1, q[:, None] + cut.block_q - 1 - kv)
    by_row: Any
    by_col: Any
    if isinstance(cut, Blocks):
        by_row, by_col = (_block_lists(np.where(some, 1 + every, 0)[None, None], axis) for axis in (3, 2))
    else:
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
        element=mask.element,
        interval=mask.interval,
        scale=query.shape[3] ** -0.5,
        block_q=cut.block_q,
        block_kv=cut.block_kv,
        platform="gpu" if isinstance(cut, Blocks) else "tpu",
        cut=cut,
        **options,
    )


def _block_lists(kinds: np.ndarray, axis: int) -> BlockLists:
    """A list for each row of kinds `[1, 1, rows, columns]`, or with axis 2 for each column."""
    kinds = np.moveaxis(kinds, axis, 3)
    order = np.argsort(np.where(kinds == 0, 3, kinds), axis=3, kind="stable")
    return BlockLists(order, np.sum(kinds == 1, axis=3), np.sum(kinds > 0, axis=3))


def _is_causal(near: Any, far: Any) -> Any:
    return far >= 0, near >= 0


def _causal(q_pos: Any, kv_pos: Any, head: Any) -> Any:
    return kv_pos <= q_pos


def _window(q_pos: Any, kv_pos: Any, head: Any) -> Any:
    return (kv_pos <= q_pos) & (kv_pos >= q_pos - WINDOW)


class Rule(NamedTuple):
    """A mask for elements and as intervals."""

    element: Callable[..., Any]
    interval: Callable[..., Any]


CAUSAL = Rule(_causal, lambda q_pos: (np.zeros_like(q_pos), q_pos + 1))
WINDOWS = Rule(_window, lambda q_pos: (q_pos - WINDOW, q_pos + 1))


def _alibi(score: Any, b: Any, h: Any, q_pos: Any, kv_pos: Any, slopes: Any) -> Any:
    return score + slopes[h] * (kv_pos - q_pos)


def _relative(score: Any, b: Any, h: Any, q_pos: Any, kv_pos: Any, table: Any) -> Any:
    return score + table[h, jnp.clip(q_pos - kv_pos, 0, table.shape[1] - 1)]
