"""The figures of a held-out set: what its task adds up over batches, and what it makes of the sums."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from train.data.packing import eval_batches
from train.step import Program
from train.tasks import EvalSet

IN_FLIGHT = 2
"""Batches that are scored while the next is made; more would fill the device with batches of a large set."""


def score(program: Program, weights: Any, evaluated: EvalSet, batch: int) -> dict[str, float]:
    """The figures of one set, such as "bits_per_byte".

    Args:
      program: compiled for batches of `batch` rows.
      weights: of the model.
    """
    return program.task.figures(add_up(program, weights, evaluated, batch), evaluated)


def add_up(program: Program, weights: Any, evaluated: EvalSet, batch: int) -> dict[str, np.ndarray]:
    """The sums of `program.evaluate` over one set, in float64. Arguments as of `score`."""
    batches = eval_batches(
        evaluated.windows, batch, process_index=jax.process_index(), process_count=jax.process_count()
    )
    totals: dict[str, np.ndarray] = {}
    pending: list[dict[str, jax.Array]] = []

    def read() -> None:
        for name, value in pending.pop(0).items():
            totals[name] = totals.get(name, np.float64(0)) + np.asarray(value, np.float64)

    for rows in batches:
        pending.append(program.evaluate(weights, place(rows, program)))
        if len(pending) > IN_FLIGHT:
            read()
    while pending:
        read()
    return totals


def place(batch: dict[str, Any], program: Program) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays on the mesh."""
    return {name: jax.make_array_from_process_local_data(program.batch_sharding, rows) for name, rows in batch.items()}
