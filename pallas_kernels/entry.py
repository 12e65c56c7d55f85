"""What the entries of all kernel families share: which machine runs, and operands that vary alike."""

from __future__ import annotations

from typing import Literal

import jax
from jaxtyping import Array

Platform = Literal["tpu", "gpu", "interpret", "interpret_gpu"]
GPU = ("gpu", "interpret_gpu")


def alike(*operands: Array) -> list[Array]:
    """Inside `shard_map`: all of them varying along the mesh axes that any of them varies along."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    if not axes:
        return list(operands)
    missing = [axes - jax.typeof(x).manual_axis_type.varying for x in operands]
    return [
        jax.lax.pcast(x, tuple(lacks), to="varying") if lacks else x for x, lacks in zip(operands, missing, strict=True)
    ]
