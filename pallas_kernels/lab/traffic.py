"""Bytes that a Pallas TPU kernel moves between HBM and VMEM, from its BlockSpecs.

A block is copied on the first grid step and whenever the index map gives another block than on the step before,

    bytes = sum over blocks b: itemsize · sum over steps s with index_b(s) != index_b(s - 1): elements of that block

with blocks cut at the edges of the array. Scalars that are prefetched are not counted. An index map that
reads them, which are known only on the device, or a kernel that copies for itself does not say what it moves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

# Where a number of bytes is from; without BlockSpecs that say, each operand and result is counted once.
BLOCKS, OPERANDS = "block specs", "operands and results"
_LARGEST_GRID = 1 << 22


def of_kernel(jaxpr: Any, name: str) -> int | None:
    """Bytes that one call of a kernel moves, or `None` where its BlockSpecs do not say.

    Args:
      jaxpr: what was traced.
      name: the kernel's name in the compiled program: that of its `pallas_call` and a number that XLA appends. Calls
        of one name that move different amounts cannot be told apart.
    """
    found = {of_call(call) for call in _named(jaxpr, name)}
    return found.pop() if len(found) == 1 else None


def grid_steps(jaxpr: Any, name: str) -> set[int]:
    """How many steps the grids of a kernel's `pallas_call`s have; empty where one is only known on the device."""
    grids = [call.params["grid_mapping"].grid for call in _named(jaxpr, name)]
    static = all(isinstance(size, int) for grid in grids for size in grid)
    return {math.prod(grid) for grid in grids} if static else set()


def _named(jaxpr: Any, name: str) -> list[Any]:
    plain = re.sub(r"(\.\d+)+$", "", name)
    return [call for call in _calls(jaxpr) if call.params["name"] == plain]


def _calls(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            # One function may hold a kernel for each platform, under one name.
            if not re.search("triton|mosaic_gpu", type(equation.params["compiler_params"]).__module__):
                yield equation
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from _calls(inner)


def of_call(call: Any) -> int | None:
    """Bytes that a `pallas_call` equation moves by its BlockSpecs; `None` where they do not say."""
    mapping = call.params["grid_mapping"]
    grid = mapping.grid
    if not all(isinstance(size, int) for size in grid) or math.prod(grid) > _LARGEST_GRID:
        return None
    steps = np.indices(grid, np.int32).reshape(len(grid), math.prod(grid))
    total = 0
    for block in mapping.block_mappings:
        moved = _of_block(block, steps)
        if moved is None:
            return None
        total += moved
    return total


def _of_block(block: Any, steps: np.ndarray) -> int | None:
    array = block.array_aval
    space = str(getattr(block.transformed_block_aval, "memory_space", None)).lower()
    if any(own in space for own in ("any", "hbm", "semaphore")):
        return None
    index_map = block.index_map_jaxpr
    prefetched = index_map.jaxpr.invars[len(steps) :]
    if any(var in prefetched for equation in index_map.jaxpr.eqns for var in equation.invars):
        return None

    def index(position):
        return tuple(jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *position, *[0] * len(prefetched)))

    indices = jax.vmap(index, out_axes=0)(tuple(steps)) if len(steps) else index(())
    indices = np.stack([np.broadcast_to(np.asarray(value), steps.shape[1]) for value in indices])
    changed = np.ones(steps.shape[1], bool)
    changed[1:] = (indices[:, 1:] != indices[:, :-1]).any(axis=0)
    elements = np.ones(steps.shape[1], np.int64)
    for dim, size, at in zip(block.block_shape, array.shape, indices, strict=True):
        kind = type(dim).__name__
        if kind == "Squeezed":
            continue
        if kind not in ("Blocked", "Element"):
            return None
        first = at * dim.block_size if kind == "Blocked" else at
        elements *= np.clip(np.minimum(first + dim.block_size, size) - np.maximum(first, 0), 0, None)
    return int((elements * changed).sum()) * array.dtype.itemsize
