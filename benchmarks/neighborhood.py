"""Does neighborhood attention cost what its tokens cost, and what do tiles make of NATTEN's problems?

Forward and backward on grids of growing extents at a fixed window, beside full attention under the same mask; then the
pairs of tiles that a kernel visits, counted, for the problems of the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import Result, interleaved, median, ratio, temporary_bytes
from jattn import Neighborhood, dot_product_attention, neighborhood_attention, tile_stats

WINDOW, HEADS, WIDTH, EXTENTS = 7, 4, 32, (32, 64, 128)
PUBLISHED: tuple[tuple[tuple[int, ...], Any, tuple[Any, ...], Any], ...] = (
    ((32768,), 2048, (1, 256, 2048), 128),
    ((256, 256), 80, (1, 16), (16, 8)),
    ((30, 48, 80), (18, 24, 24), (1, (16, 8, 8)), (2, 8, 8)),
)
"""Grids, windows, strides and tiles of Hassani et al. 2025."""


def run() -> Result:
    calls: dict[str, Any] = {}
    memory: dict[str, int] = {}
    for extent in EXTENTS:
        arrays = _arrays(extent)
        near = _gradient(lambda q, k, v: neighborhood_attention(q, k, v, kernel_size=WINDOW))
        calls[f"window {extent}"] = lambda near=near, arrays=arrays: near(*arrays)
        memory[f"window {extent}"] = temporary_bytes(near, *arrays)
    largest = EXTENTS[-1]
    arrays = _arrays(largest)
    mask = jnp.asarray(Neighborhood(WINDOW).dense((largest, largest))[None, None])
    dense = _gradient(lambda q, k, v: _masked(q, k, v, mask))
    calls["dense"] = lambda: dense(*arrays)
    memory["dense"] = temporary_bytes(dense, *arrays)
    seconds = interleaved(calls, rounds=3)
    rows: list[dict[str, Any]] = [
        {
            "grid": f"{extent} x {extent}",
            "attention": "dense, masked" if name == "dense" else f"window {WINDOW} x {WINDOW}",
            "ms": 1e3 * median(seconds, name),
            "us a token": 1e6 * median(seconds, name) / extent**2,
            "temporary bytes a token": memory[name] / extent**2,
        }
        for name, extent in [(f"window {extent}", extent) for extent in EXTENTS] + [("dense", largest)]
    ]
    targets = [
        (
            f"grid {largest} x {largest} over {largest // 2} x {largest // 2}: times as long",
            ratio(seconds, f"window {largest}", f"window {largest // 2}"), 4.6, "at most",
        ),
        (
            f"grid {largest} x {largest}: times as fast as dense attention under the mask",
            ratio(seconds, "dense", f"window {largest}"), 10.0, "at least",
        ),
    ]  # fmt: skip
    title = f"Neighborhood attention, forward + backward, window {WINDOW} x {WINDOW}, {HEADS} x {WIDTH}, float32"
    return Result(title, rows, targets, _published())


def _arrays(extent: int) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), (1, extent, extent, HEADS, WIDTH)) for i in range(4)]


def _gradient(attend: Callable[..., Any]) -> Any:
    return jax.jit(jax.value_and_grad(lambda q, k, v, do: (attend(q, k, v) * do).sum(), (0, 1, 2)))


def _masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    flat = (x.reshape(1, -1, HEADS, WIDTH) for x in (q, k, v))
    return dot_product_attention(*flat, mask=mask, implementation="xla").reshape(q.shape)


def _published() -> list[str]:
    """What tiles make of NATTEN's problems, a line for each."""
    head = ("grid, window, stride, tile", "pairs of tiles", "of", "speedup", "bound", "useful")
    lines = ["{:<36}{:>16}{:>10}{:>10}{:>8}{:>8}".format(*head)]
    for grid, window, strides, tile in PUBLISHED:
        for stride in strides:
            s = tile_stats(grid, window, stride, q_tile=tile, kv_tile=tile)
            sizes = ", ".join(map(_times, (grid, window, stride, tile)))
            numbers = f"{s.visited:>16,}{s.dense:>10,}{s.tile_speedup:>10.2f}{s.flop_bound:>8.2f}{s.efficiency:>8.0%}"
            lines.append(f"{sizes:<36}{numbers}")
    return lines


def _times(sizes: int | tuple[int, ...]) -> str:
    return "x".join(map(str, sizes)) if isinstance(sizes, tuple) else str(sizes)
