"""Lists of the blocks that each row visits, as arrays: of NumPy when all that comes is NumPy, else of JAX.

A list `[..., W]` holds ascending partial blocks, then ascending full ones, then its last one again, so that a step that
only fills it up moves no data. Two counts say where the first part ends and where the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from jattn.masks import EMPTY, FULL, PARTIAL

AnyArray = Array | np.ndarray


class Lists(NamedTuple):
    """The blocks of every row: how many are partial, how many are listed, and the place in a bank of each."""

    idx: Int32[AnyArray, "*lists n W"]
    n_partial: Int32[AnyArray, "*lists n"]
    n_total: Int32[AnyArray, "*lists n"]
    bank: Int32[AnyArray, "*lists n W"] | None


def namespace(*arrays: Any) -> Any:
    """NumPy if all arrays are NumPy's, else JAX's."""
    return np if all(x is None or isinstance(x, (np.ndarray, np.generic)) for x in arrays) else jnp


def make_lists(kind: Any, idx: Any, bank: Any, width: int) -> Lists:
    """Candidates `idx` of each row, with their kinds, as a list of the partial, then the full ones, ascending."""
    xp = namespace(kind)
    n_partial = xp.minimum(xp.sum(kind == PARTIAL, axis=-1, dtype=np.int32), width)
    n_total = xp.minimum(xp.sum(kind != EMPTY, axis=-1, dtype=np.int32), width)
    idx = xp.broadcast_to(idx, kind.shape)
    order = xp.lexsort((idx, xp.where(kind == EMPTY, FULL + 1, kind)), axis=-1)
    last = xp.minimum(np.arange(width), xp.maximum(n_total - 1, 0)[..., None])
    order = xp.take_along_axis(order, last, axis=-1)
    idx = xp.take_along_axis(idx, order, axis=-1)
    idx = xp.where(n_total[..., None] > 0, idx, 0).astype(np.int32)
    if bank is not None:
        bank = xp.take_along_axis(xp.broadcast_to(bank, kind.shape), order, axis=-1)
    return Lists(idx, n_partial, n_total, bank)


def kinds_of(idx: Any, n_partial: Any, n_total: Any) -> Any:
    """The kind of each entry of the lists."""
    xp = namespace(idx)
    slot = np.arange(idx.shape[-1])
    kind = xp.where(slot < n_partial[..., None], PARTIAL, FULL)
    return xp.where(slot < n_total[..., None], kind, EMPTY).astype(np.int32)


def spread(idx: Any, values: Any, size: int) -> Any:
    """`[..., size]` with `values` at `idx` and 0 elsewhere; a value of 0 is not written."""
    xp = namespace(idx, values)
    idx = xp.where(values != 0, idx, size)
    out = xp.zeros((*idx.shape[:-1], size + 1), values.dtype)
    if xp is np:
        np.put_along_axis(out, idx, values, axis=-1)
    else:
        out = jnp.put_along_axis(out, idx, values, axis=-1, inplace=False)
    return out[..., :size]


def id_ranges(ids: Any, block: int, xp: Any) -> tuple[Any, Any]:
    """The smallest and the largest id `[B, n]` of every block."""
    last = xp.repeat(ids[:, -1:], -ids.shape[1] % block, axis=1)
    blocks = xp.concatenate([ids, last], axis=1).reshape(ids.shape[0], -1, block)
    return blocks.min(axis=-1), blocks.max(axis=-1)


def compact(kept: Bool[AnyArray, "*lists A"], *arrays: Any) -> tuple[Int[AnyArray, "*lists"], list[Any]]:
    """The kept entries of each list moved to its front, in order and followed by its last one again; and their number.

    NumPy lists are cut to the longest. An array that is `None` stays it.
    """
    xp = namespace(kept)
    count = xp.sum(kept, axis=-1, dtype=np.int32)
    order = xp.argsort(~kept, axis=-1, stable=True)
    width = int(count.max()) if xp is np else kept.shape[-1]
    last = xp.minimum(np.arange(width), xp.maximum(count - 1, 0)[..., None])
    order = xp.take_along_axis(order, last, axis=-1)
    return count, [None if x is None else xp.take_along_axis(x, order, axis=-1) for x in arrays]


def blocks_of_rows(
    rows: Callable[[int, int, slice], np.ndarray], shape: tuple[int, ...], block: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kinds `[B, N, nq, nk]`, the distinct partial blocks `[P, block_q, block_kv]` and which of them each block is.

    `rows(b, h, slice)` gives the rows `[., S]` of a mask of `shape` [B, N, T, S], a row of blocks at a time.
    """
    batch, heads, q_len, kv_len = shape
    block_q, block_kv = block
    nq, nk = math.ceil(q_len / block_q), math.ceil(kv_len / block_kv)
    kind = np.zeros((batch, heads, nq, nk), np.int8)
    ids = np.zeros(kind.shape, np.int32)
    distinct: dict[bytes, int] = {}
    for b, h, i in np.ndindex(batch, heads, nq):
        part = slice(i * block_q, min((i + 1) * block_q, q_len))
        row = np.zeros((block_q, nk * block_kv), bool)
        row[: part.stop - part.start, :kv_len] = rows(b, h, part)
        blocks = row.reshape(block_q, nk, block_kv).swapaxes(0, 1)
        kind[b, h, i] = blocks.any(axis=(1, 2)) * 1 + blocks.all(axis=(1, 2))
        for j in np.flatnonzero(kind[b, h, i] == PARTIAL):
            ids[b, h, i, j] = distinct.setdefault(np.packbits(blocks[j]).tobytes(), len(distinct))
    bits = np.frombuffer(b"".join(distinct), np.uint8).reshape(len(distinct), math.ceil(block_q * block_kv / 8))
    bank = np.unpackbits(bits, axis=1, count=block_q * block_kv).reshape(-1, block_q, block_kv)
    return kind, bank.astype(bool), ids


def blocks_of_array(mask: Bool[Array, "B N T S"], block: tuple[int, int]) -> tuple[Array, Array, Array]:
    """The same of an array that may be traced, whose blocks are all stored."""
    padded = jnp.pad(mask, [(0, 0), (0, 0), (0, -mask.shape[2] % block[0]), (0, -mask.shape[3] % block[1])])
    nq, nk = padded.shape[2] // block[0], padded.shape[3] // block[1]
    blocks = jnp.swapaxes(padded.reshape(*mask.shape[:2], nq, block[0], nk, block[1]), 3, 4)
    kind = blocks.any((-2, -1)).astype(np.int8) + blocks.all((-2, -1))
    return kind, blocks.reshape(-1, *block), jnp.arange(kind.size).reshape(kind.shape)
