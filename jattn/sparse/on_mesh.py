"""Block-sparse attention whose sequence is split over a mesh axis, with the work of the devices evened out.

Every device holds T / D consecutive tokens. Keys and values are gathered. Queries travel in halves of a piece, each to
the device that computes it, and the outputs come back the same way: the half with the most listed blocks goes with the
one with the fewest, and so on. For a causal mask that is the zigzag of ring attention; where the work is even as it
is, as for a window, nothing travels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jattn.masks import EMPTY, FULL, Mask
from jattn.sparse.block_mask import BlockMask
from jattn.sparse.block_sparse import ScoreMod, block_sparse_attention

LARGEST_BLOCK = 512
WORTH_A_JOURNEY = 0.95
"""Queries travel if the busiest device then has at most this share of the blocks that it has without."""


class Turn(NamedTuple):
    """What travels at once: of every device one part of its queries, and where to. Each device gets one part."""

    part: tuple[int, ...]
    to: tuple[int, ...]


def gathered_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis: str,
    block_mask: Mask | BlockMask,
    score_mod: ScoreMod | None = None,
    captured: tuple[Any, ...] = (),
    segment_ids: Array | None = None,
    logits_soft_cap: float | None = None,
    **options: Any,
) -> Array:
    """The attention of this device's queries; called inside of a `shard_map` over `axis`.

    A device does not know while tracing which rows it has, so the mask is asked as part of the scores, in every listed
    block.
    """
    if not isinstance(block_mask, Mask):
        raise NotImplementedError("context: the sequence is split under a symbolic mask, not under a BlockMask")
    if logits_soft_cap is not None:
        raise NotImplementedError("context: masked scores are -inf there, and a soft cap would make numbers of them")
    devices, length, kv_len = jax.lax.axis_size(axis), query.shape[1], key.shape[1] * jax.lax.axis_size(axis)
    parts = 1 if length % 2 else 2
    size = length // parts
    block = max(n for n in range(1, min(size, LARGEST_BLOCK) + 1) if size % n == 0)
    listed = block_mask.block_kinds(devices * length, kv_len, block, block) != EMPTY
    turns = [Turn((0,) * devices, tuple(range(devices)))]
    if parts == 2:
        turns = even_out(listed.reshape(2 * devices, -1).sum(axis=1).tolist())

    key, value = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (key, value))
    kv_ids = None if segment_ids is None else jax.lax.all_gather(segment_ids, axis, axis=1, tiled=True)
    kinds = jnp.asarray(np.where(listed, FULL, EMPTY))
    score = _placed(block_mask, score_mod)
    index = jax.lax.axis_index(axis)
    out = jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
    for turn in turns:
        back = tuple(np.argsort(turn.to).tolist())
        part = jnp.asarray(turn.part)
        start = part[index] * size
        q, ids = jax.tree.map(lambda x: _send(_cut(x, start, size), axis, turn.to), (query, segment_ids))  # noqa: B023
        sender = jnp.asarray(back)[index]
        first = sender * length + part[sender] * size
        rows = jax.lax.dynamic_slice_in_dim(kinds, first // block, size // block)
        most = int(listed.sum(axis=1).max())
        lists = BlockMask.from_map(rows, size, kv_len, block, block, max_blocks=max(1, most))
        seen: Any = None if ids is None else (ids, kv_ids)
        result = block_sparse_attention(
            q, key, value, lists, score_mod=score, captured=(first, *captured),
            segment_ids=seen, **options,
        )  # fmt: skip
        out = jax.lax.dynamic_update_slice_in_dim(out, _send(result, axis, back), start, axis=1)
    return out


def even_out(work: Sequence[float]) -> list[Turn]:
    """Two turns after which every device has two of the 2 D halves whose work is given, device i having 2 i, 2 i + 1.

    The sorted halves are paired from both ends. Devices and the pairs of halves that they get are a graph in which
    everyone has two edges, so it is a union of even cycles: the edges of each are in the one turn and the other by
    turns.
    """
    devices = len(work) // 2
    order = sorted(range(2 * devices), key=lambda half: (work[half], half))
    pairs = [(order[i], order[-1 - i]) for i in range(devices)]
    stay = max(work[2 * i] + work[2 * i + 1] for i in range(devices))
    if max(sum(work[half] for half in pair) for pair in pairs) > WORTH_A_JOURNEY * stay:
        pairs = [(2 * i, 2 * i + 1) for i in range(devices)]
    partner = {half: other for pair in pairs for half, other in (pair, pair[::-1])}
    # A pair is computed where one of its halves is, if that device has not got another pair already.
    place: dict[int, int] = {}
    for pair in pairs:
        near = [half // 2 for half in pair if half // 2 not in place.values()]
        if near:
            place |= dict.fromkeys(pair, near[0])
    free = iter(set(range(devices)) - set(place.values()))
    for pair in pairs:
        if pair[0] not in place:
            place |= dict.fromkeys(pair, next(free))

    parts, to = np.zeros((2, devices), int), np.full((2, devices), -1)
    for start in range(devices):
        half = 2 * start
        while to[0, half // 2] < 0:
            device, part = divmod(half, 2)
            parts[:, device] = part, 1 - part
            to[:, device] = place[half], place[half ^ 1]
            half = partner[half ^ 1]  # the other half's partner arrives beside it, so in the first turn
    return [Turn(tuple(p.tolist()), tuple(t.tolist())) for p, t in zip(parts, to, strict=True)]


@functools.lru_cache(maxsize=64)
def _placed(mask: Mask, score_mod: ScoreMod | None) -> ScoreMod:
    """The function and the mask of queries that begin at position `first`."""

    def score(x: Array, b: Array, h: Array, q_pos: Array, kv_pos: Array, first: Array, *captured: Any) -> Array:
        q_pos = q_pos + first
        if score_mod is not None:
            x = score_mod(x, b, h, q_pos, kv_pos, *captured)
        return jnp.where(mask.elem(q_pos, kv_pos, h), x, -math.inf)

    return score


def _cut(x: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _send(x: Array, axis: str, to: tuple[int, ...]) -> Array:
    if to == tuple(range(len(to))):
        return x
    return jax.lax.ppermute(x, axis, list(enumerate(to)))
