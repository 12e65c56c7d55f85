"""Does sparse attention cost what its blocks cost, in time and memory, and masks next to nothing?

Forward and backward over full attention of `dot_product_attention`; masks are built fresh, not from the cache.
"""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import jax
import numpy as np

from benchmarks.measure import Result, interleaved, median, ratio, temporary_bytes
from jattn import BlockMask, block_sparse_attention, dot_product_attention, power_attention_mask
from jattn.masks import Causal, Chunked, Mask, Sink, SlidingWindow

LENGTH, HEADS, WIDTH, BLOCK = 16384, 2, 64, 128
MASKS: dict[str, Mask] = {
    "window of 256": Causal() & SlidingWindow(255),
    "window of 1024 and 64 sinks": Causal() & (SlidingWindow(1023) | Sink(64)),
    "documents of 2048": Causal() & Chunked(2048),
    "power of two": power_attention_mask(block_size=BLOCK),
    "causal": Causal(),
}


def run() -> Result:
    shape = (1, LENGTH, HEADS, WIDTH)
    arrays = [jax.random.normal(jax.random.key(i), shape) for i in range(4)]
    sparse = {name: _gradient(BlockMask.from_expr(mask, LENGTH, LENGTH, BLOCK, BLOCK)) for name, mask in MASKS.items()}
    calls = {name: lambda f=f: f(*arrays) for name, f in {"dense": _gradient(None), **sparse}.items()}
    seconds = interleaved(calls, rounds=3)
    rows: list[dict[str, Any]] = []
    for name, mask in MASKS.items():
        blocks = BlockMask.from_expr(mask, LENGTH, LENGTH, BLOCK, BLOCK)
        speed = ratio(seconds, "dense", name)
        rows.append(
            {
                "mask": name,
                "share of blocks, %": 100 * blocks.density,
                "ms": 1e3 * median(seconds, name),
                "times as fast as dense": speed,
                "of what the blocks promise, %": 100 * speed * blocks.density,
                "temporary, MB": temporary_bytes(sparse[name], *arrays) / 1e6,
            }
        )
    memory = {length: _temporary(length) for length in (32768, 65536, 131072, 262144)}
    build, peak, steps = _build()
    per_token = {length: found / length for length, found in memory.items()}
    targets = [
        ("window of 256 at T 16384: times as fast as dense", rows[0]["times as fast as dense"], 20.0, "at least"),
        ("temporary bytes a token, T 262144 over T 32768", per_token[262144] / per_token[32768], 1.1, "at most"),
        ("window of 1024 at T 131072: seconds to build the mask", build, 0.3, "at most"),
        ("the same: MB while it is built", peak / 1e6, 50.0, "at most"),
        ("the same: steps over the pairs of blocks", steps, 1.0, "at most"),
    ]
    notes = [
        f"temporary memory, window of 256: {memory[262144] / 1e6:.0f} MB at T 262144, {per_token[262144]:.0f} B a token"
    ]
    title = f"Block-sparse attention, forward + backward, T {LENGTH}, {HEADS} x {WIDTH}, float32"
    return Result(title, rows, targets, notes)


def _gradient(mask: BlockMask | None) -> Any:
    def loss(q: Any, k: Any, v: Any, do: Any) -> Any:
        out = dot_product_attention(q, k, v) if mask is None else block_sparse_attention(q, k, v, mask)
        return (out * do).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def _temporary(length: int) -> int:
    mask = BlockMask.from_expr(MASKS["window of 256"], length, length, BLOCK, BLOCK)
    return temporary_bytes(_gradient(mask), *[jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), np.float32)] * 4)


def _build() -> tuple[float, int, float]:
    """Seconds, peak bytes, and steps over the sum of max(1, pairs) of the rows."""
    length, block = 131072, 512
    times, peaks = [], []
    for window in range(1023, 1026):  # the cache knows none of them
        mask = Causal() & SlidingWindow(window)
        start = time.perf_counter()
        blocks = BlockMask.from_expr(mask, length, length, block, block)
        blocks.work_list()
        times.append(time.perf_counter() - start)
        tracemalloc.start()
        BlockMask.from_expr(Causal() & SlidingWindow(window + 10), length, length, block, block).work_list()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    pairs = np.maximum(mask.block_kinds(length, length, block, block).astype(bool).sum(axis=1), 1).sum()
    return sorted(times)[1], max(peaks), blocks.num_steps / int(pairs)
