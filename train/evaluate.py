"""The figures of a set of texts: bits per byte, every token but a document's first scored once, and accuracy."""

from __future__ import annotations

import bz2
import lzma
import math
from collections.abc import Sequence
from typing import Any

import jax

from train.data.load import EvalSet
from train.data.packing import eval_batches
from train.data.sources import Document
from train.step import Program

IN_FLIGHT = 2
"""Batches that are scored while the next is made; more would fill the device with batches of a large set."""

COMPRESSED_AT_MOST = 16 * 2**20
"""Bytes of text: `xz -9e` reads about 2 MB a second, and a run should not wait minutes for a yardstick."""


def score(program: Program, weights: Any, evaluated: EvalSet, batch: int) -> dict[str, float]:
    """The figures of one set.

    Args:
      program: compiled for batches of `batch` sequences.
      weights: of the model.

    Returns:
      "bits_per_byte", the cross-entropy of all tokens over the bytes of their text (over the tokens, where they stand
      for no text); for a recall task also "accuracy", the share of answers that are the likeliest token.
    """
    batches = eval_batches(
        evaluated.windows, batch, process_index=jax.process_index(), process_count=jax.process_count()
    )
    totals: dict[str, float] = {}
    pending: list[dict[str, jax.Array]] = []

    def read() -> None:
        for name, value in pending.pop(0).items():
            totals[name] = totals.get(name, 0.0) + float(value)

    for rows in batches:
        pending.append(program.evaluate(weights, place(rows, program)))
        if len(pending) > IN_FLIGHT:
            read()
    while pending:
        read()
    count = totals["weight"] if evaluated.bytes is None else evaluated.bytes
    figures = {"bits_per_byte": totals["loss"] / count / math.log(2)}
    if "correct" in totals:
        figures["accuracy"] = totals["correct"] / totals["weight"]
    return figures


def place(batch: dict[str, Any], program: Program) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays on the mesh."""
    return {name: jax.make_array_from_process_local_data(program.batch_sharding, rows) for name, rows in batch.items()}


def compressor_baselines(training: Sequence[Document], held_out: Sequence[Document]) -> dict[str, float]:
    """Bits per byte of general compressors on the held-out text, alone and after they have seen the training text.

    The second figure is the growth of the archive when the held-out text is put behind the training text, so it is
    what the compressor needs once it knows what the model knows. More than `COMPRESSED_AT_MOST` is not compressed.
    """
    known, text = b"\n".join(training), b"\n".join(held_out)
    if len(known) + len(text) > COMPRESSED_AT_MOST:
        return {}
    preset = 9 | lzma.PRESET_EXTREME
    alone = len(lzma.compress(text, preset=preset))
    growth = len(lzma.compress(known + b"\n" + text, preset=preset)) - len(lzma.compress(known, preset=preset))
    return {
        "xz -9e, held-out text alone": 8 * alone / len(text),
        "xz -9e, after the training text": 8 * growth / len(text),
        "bzip2 -9, held-out text alone": 8 * len(bz2.compress(text, 9)) / len(text),
    }
