"""A few queries against many keys: the keys in parts side by side, merged by their log-sum-exp ("flash decoding").

A program of a GPU kernel has a tile of queries and walks over all of its keys. With one to eight queries there are
fewer programs than multiprocessors. So the keys become rows of a larger batch, part i of row b being row b n + i:

    [B, S, K, H] -> [B n, S / n, K, H]        o, lse = merge of n parts

A kernel does not know a part's positions, so the mask and the score function are asked at those of the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jattn.blockwise import Operands
from jattn.masks import EMPTY, FULL, Mask
from jattn.sparse.block_mask import BlockMask

MOST_QUERIES = 8
BLOCK = 128
SHORTEST = 512
PROGRAMS = 264
"""Two for each of an H100's multiprocessors."""


def parts_of(operands: Operands, mask: Any, soft_cap: float | None, dropout_rate: float) -> int:
    """Into how many parts the keys of a call are best cut; 1: they stay whole.

    Masked scores are -inf in a part, which a soft cap would make numbers of; dropout is a function of true positions.
    """
    (batch, q_len, heads, _), kv_len = operands.query.shape, operands.key.shape[1]
    if q_len > MOST_QUERIES or not isinstance(mask, Mask) or soft_cap is not None or dropout_rate:
        return 1
    parts = 1
    while batch * heads * parts < PROGRAMS and kv_len % (2 * parts * BLOCK) == 0 and kv_len >= 2 * parts * SHORTEST:
        parts *= 2
    return parts


def attend_parts(
    attend: Callable[..., tuple[Array, Array]],
    parts: int,
    x: Operands,
    kv_bias: Array | None,
    mask: Mask,
    score_mod: Callable[..., Array] | None,
) -> tuple[Array, Array]:
    """`attend(operands, kv_bias, block_mask, score_mod)` of all parts at once, merged."""
    from jattn.dot_product import merge_attentions  # which has this module's kernels among its implementations

    batch, q_len = x.query.shape[:2]
    length = x.key.shape[1] // parts

    def cut(a: Array) -> Array:
        return a.reshape(batch * parts, length, *a.shape[2:])

    listed = mask.block_kinds(q_len, parts * length, q_len, BLOCK) != EMPTY
    kinds = np.where(np.tile(listed.reshape(parts, 1, 1, -1), (batch, 1, 1, 1)), FULL, EMPTY)
    rows = x._replace(
        query=jnp.repeat(x.query, parts, axis=0),
        key=cut(x.key),
        value=cut(x.value),
        sinks=None,
        q_segments=None if x.q_segments is None else jnp.repeat(x.q_segments, parts, axis=0),
        kv_segments=None if x.kv_segments is None else cut(x.kv_segments),
    )
    if kv_bias is not None:
        by_part = kv_bias.reshape(batch, kv_bias.shape[1], parts, length)
        kv_bias = jnp.moveaxis(by_part, 2, 1).reshape(batch * parts, -1, length)
    # At least a tile of queries: a block may reach beyond their end.
    block_mask = BlockMask.from_map(kinds, q_len, length, 16, BLOCK)
    out, lse = attend(rows, kv_bias, block_mask, _of_part(mask, score_mod, parts, length))
    outs = [a[:, 0] for a in jnp.split(out.reshape(batch, parts, *out.shape[1:]), parts, axis=1)]
    lses = [a[:, 0] for a in jnp.split(lse.reshape(batch, parts, *lse.shape[1:]), parts, axis=1)]
    if x.sinks is not None:
        outs.append(jnp.zeros_like(outs[0]))
        lses.append(jnp.broadcast_to(x.sinks.astype(lse.dtype), lses[0].shape))
    return merge_attentions(outs, lses)


@functools.lru_cache(maxsize=64)
def _of_part(mask: Mask, score_mod: Callable[..., Array] | None, parts: int, length: int) -> Callable[..., Array]:
    """The score function and the mask of keys at their positions in the whole."""

    def score(x: Array, b: Array, h: Array, q_pos: Array, kv_pos: Array, *captured: Any) -> Array:
        kv_pos = kv_pos + b % parts * length
        if score_mod is not None:
            x = score_mod(x, b // parts, h, q_pos, kv_pos, *captured)
        return jnp.where(mask.elem(q_pos, kv_pos, h), x, -jnp.inf)

    return score
