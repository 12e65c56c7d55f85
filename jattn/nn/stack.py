"""Blocks of the same structure one after another: compiled once, however many there are."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jattn.nn.drop_path import fold
from jattn.nn.layout import pin

SCANNED = 3
"""Repetitions from which a loop is worth its copies: a step stacks the parameters, and keeps what gradients need."""


def run_blocks(
    blocks: Sequence[Any],
    x: Float[Array, "B *grid D"],
    *,
    rates: Sequence[float],
    key: Array | None,
    first: int,
) -> Float[Array, "B *grid D"]:
    """`block(x, rate=, key=)` for every block in turn.

    Args:
      blocks: modules that hold nothing but parameters.
      rates: of stochastic depth.
      key: block i draws from `fold(key, first + i)`.
    """
    graphs, parameters = zip(*map(nnx.split, blocks), strict=True)
    period = next(p for p in range(1, len(blocks) + 1) if all(map(operator.eq, graphs, graphs[p:])))
    units = len(blocks) // period
    scanned = units * period if units >= SCANNED else 0
    if scanned:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *_by(period, parameters[:scanned]))

        def unit(x: Array, slice_: Any) -> tuple[Array, None]:
            parameters, rates, start = slice_
            for i, (graph, own) in enumerate(zip(graphs[:period], parameters, strict=True)):
                x = nnx.merge(graph, own)(pin(x), rate=rates[i], key=fold(key, start + i))
            return x, None

        starts = first + period * jnp.arange(units)
        x, _ = jax.lax.scan(unit, x, (stacked, jnp.array(_by(period, rates[:scanned]), jnp.float32), starts))
    for i in range(scanned, len(blocks)):
        x = blocks[i](pin(x), rate=rates[i], key=fold(key, first + i))
    return x


def _by(period: int, items: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [tuple(items[i : i + period]) for i in range(0, len(items), period)]
