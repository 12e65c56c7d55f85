"""Calls whose schedules `python -m pallas_kernels.lab report --family neighborhood` reads: forward, then backward.

The tables are those that `jattn.neighborhood` makes, for the plain windows here: w keys, moved inward at borders.
What is in one pass is that on TPU alone, and takes its arrays with heads side by side, as the kernels read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse import BlockLists, Relative, Windows, WorkList, block_sparse_attention, choose
from pallas_kernels.lab import Case
from pallas_kernels.lab.chips import CHIPS
from pallas_kernels.neighborhood.attention import one_pass_attention
from pallas_kernels.neighborhood.tables import Bounds


def cases(target: str) -> dict[str, Case]:
    """An image of 64 x 64 with windows of 13 x 13, and a video of 30 x 48 x 80 with windows of 18 x 24 x 24.

    On GPU also the first stage of NAT-Mini, and the video, with a trained bias of relative positions.

    On TPU also the image's lists alone: every query sees all of the keys that its tile visits, which costs no mask; and
    in one pass, with a bias, the windows of 7 x 7 in the first and the third stage of NAT-Mini, and those over tiles.

    The least that is moved: q, k, v -> o forward, q, k, v, o, do -> dq, dk, dv backward.
    """
    on_gpu = target == "h100"
    image, video = ((64, 64), (13, 13)), ((30, 48, 80), (18, 24, 24))
    found = {
        "image": _case(target, *image, (8, 16) if on_gpu else (16, 32), heads=8, width=64),
        "video": _case(target, *video, (2, 8, 8) if on_gpu else (4, 8, 16), heads=2, width=128),
    }
    if on_gpu:
        return found | {
            "nat-1-bias": _case(target, (56, 56), (7, 7), (8, 8), heads=2, width=32, batch=8, biased=True),
            "video-bias": _case(target, *video, (2, 8, 8), heads=2, width=128, biased=True),
        }
    stages: Any = {"nat-1": (56, 2), "nat-3": (14, 8)}
    found |= {name: _one_pass(*stage, window=7, batch=8) for name, stage in stages.items()}
    tiles: Any = {"batch": 8, "width": 32}
    return found | {
        "nat-1-tiles": _case(target, (56, 56), (7, 7), (8, 64), heads=2, **tiles),
        "nat-3-tiles": _case(target, (14, 14), (7, 7), (16, 16), heads=8, **tiles),
        "image-full": _case(target, *image, (16, 32), heads=8, width=64, masked=False),
    }


def wide(target: str) -> dict[str, Case]:
    """On TPU, windows wider than one pass takes, with and without a trained bias of relative positions.

    python -m pallas_kernels.lab report --module pallas_kernels.neighborhood.cases:wide
    """
    calls: Any = {
        "line": ((8192,), (1023,), (512,), 64),
        "image": ((64, 64), (25, 25), (16, 64) if target in ("v6e", "tpu7x") else (32, 16), 64),
        "volume": ((16, 32, 32), (7, 15, 15), (16, 8, 8), 128),
    }
    if target in ("v5e", "v6e"):  # the on-chip memory of others holds no numbers for such windows
        calls["video"] = (30, 48, 80), (18, 24, 24), (4, 8, 16), 128
    return {
        f"{name}{'-bias' * biased}": _case(target, grid, window, tile, heads=2, width=width, biased=biased)
        for name, (grid, window, tile, width) in calls.items()
        for biased in (False, True)
    }


def _case(
    target: str,
    grid: tuple[int, ...],
    window: tuple[int, ...],
    tile: tuple[int, ...],
    *,
    heads: int,
    width: int,
    batch: int = 1,
    masked: bool = True,
    biased: bool = False,
) -> Case:
    tiles, size = tuple(-(-x // t) for x, t in zip(grid, tile, strict=True)), math.prod(tile)
    length = math.prod(tiles) * size
    windows, kinds = _tables(grid, window, tile, tiles)
    options: Any = {"block_q": size, "block_kv": size, "scale": width**-0.5, "windows": windows if masked else None}
    if target == "h100":
        lists: Any = _block_lists(kinds), _block_lists(kinds.T)
        options["platform"] = "gpu"
    else:
        kind = CHIPS[target].kind
        cut: Any = choose(length, length, width, width, jnp.bfloat16, block_q=size, block_kv=size, kind=kind)
        lists = _work_list(kinds), WorkList(*(_work_list(kinds.T)[i] for i in (1, 0, 2)))
        options |= {"cut": cut, "platform": "tpu"}

    def attention(query: Any, key: Any, value: Any, *tables: Any) -> Any:
        bias = Relative(tables[0], windows.place) if tables else None
        return block_sparse_attention(query, key, value, *lists, rel_bias=bias, **options)[0]

    tokens = jax.ShapeDtypeStruct((batch, length, heads, width), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((heads, *(2 * w - 1 for w in window)), jnp.float32)
    arrays = tokens, tokens, tokens, *([table] if biased else []), tokens
    return Case(_gradient(attention), arrays, 12 * tokens.size * tokens.dtype.itemsize)


def _one_pass(extent: int, heads: int, *, window: int, batch: int, width: int = 32) -> Case:
    low = np.clip(np.arange(extent) - window // 2, 0, extent - window)
    bounds = Bounds((tuple(low.tolist()),), (tuple((low + window).tolist()),), extent, (0,))

    def attention(query: Any, key: Any, value: Any, bias: Any) -> Any:
        q, k, v = (x.reshape(*x.shape[:3], heads, width) for x in (query, key, value))
        options: Any = {"axes": (bounds, bounds), "scale": width**-0.5, "platform": "tpu"}
        return one_pass_attention(q, k, v, bias, **options)[0].reshape(query.shape)

    def both(query: Any, key: Any, value: Any, bias: Any, d_out: Any) -> Any:
        out, transpose = jax.vjp(attention, query, key, value, bias)
        return out, transpose(d_out)

    tokens = jax.ShapeDtypeStruct((batch, extent, extent, heads * width), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((heads, 2 * window - 1, 2 * window - 1), jnp.float32)
    return Case(both, (tokens, tokens, tokens, bias, tokens), 12 * tokens.size * tokens.dtype.itemsize)


def _tables(
    grid: tuple[int, ...], window: tuple[int, ...], tile: tuple[int, ...], tiles: tuple[int, ...]
) -> tuple[Windows, np.ndarray]:
    """Windows of queries in the order of tiles, and the kind of each pair of tiles."""
    low, place = [], []
    visited = full = np.ones((1, 1), bool)
    for extent, w, t, n in zip(grid, window, tile, tiles, strict=True):
        token = np.arange(t * n)
        start = np.clip(np.minimum(token, extent - 1) - w // 2, 0, extent - w)
        low.append(start.reshape(n, t))
        place.append(token.reshape(n, t))
        first, last, begin = start[::t, None], start[t - 1 :: t, None], np.arange(n) * t
        visited = np.kron(visited, (begin < last + w) & (begin + t > first))
        full = np.kron(full, (begin >= last) & (begin + t <= first + w))
    low, place = (_in_order(x, tile, tiles) for x in (low, place))
    return Windows(low[None], low[None] + np.array(window)[:, None], place), np.where(full, 2, visited).astype(np.int32)


def _in_order(of_axes: Any, tile: tuple[int, ...], tiles: tuple[int, ...]) -> Any:
    """Tables `[tiles, tile]` of every axis as `[axes, all tokens]`, tile after tile."""
    axes, found = len(tile), []
    for a, x in enumerate(of_axes):
        shape = [1] * (2 * axes)
        shape[a], shape[axes + a] = x.shape
        found.append(np.broadcast_to(x.reshape(shape), (*tiles, *tile)).reshape(-1))
    return np.stack(found).astype(np.int32)


def _work_list(kinds: np.ndarray) -> WorkList:
    row, col = np.nonzero(kinds)
    return WorkList(*(x.astype(np.int32)[None, None] for x in (row, col, kinds[row, col])))


def _block_lists(kinds: np.ndarray) -> BlockLists:
    order = np.argsort(np.where(kinds == 0, 3, kinds), axis=1, kind="stable")
    longest = np.sum(kinds > 0, axis=1).max()
    return BlockLists(*(x[None, None] for x in (order[:, :longest], np.sum(kinds == 1, 1), np.sum(kinds > 0, 1))))


def _gradient(attention: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arrays: Any) -> Any:
        out, transpose = jax.vjp(attention, *arrays[:-1])
        return out, transpose(arrays[-1])

    return both
