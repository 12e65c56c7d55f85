"""The validation figure: bits per byte over the held-out documents, every byte of which is scored once."""

from __future__ import annotations

import bz2
import lzma
import math
from collections.abc import Sequence
from typing import Any

import jax

from train.config import DataConfig
from train.data.packing import eval_batches
from train.data.sources import Document
from train.step import Program

COMPRESSED_AT_MOST = 16 * 2**20
"""Bytes of text: `xz -9e` reads about 2 MB a second, and a run should not wait minutes for a yardstick."""


def bits_per_byte(program: Program, parameters: Any, documents: Sequence[Document], data: DataConfig) -> float:
    """Mean cross-entropy of `documents` in bits per token, a token being a byte; a context starts without a past."""
    batches = eval_batches(
        documents,
        data.context,
        data.batch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    totals = [program.evaluate(parameters, place(batch, program)) for batch in batches]
    loss, count = (sum(float(part) for part in parts) for parts in zip(*totals, strict=True))
    return loss / count / math.log(2)


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
