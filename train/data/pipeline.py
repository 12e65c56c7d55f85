"""Batches as a function of (seed, step), read ahead by threads.

Global batch s is windows s*B .. s*B + B - 1 of `PackedWindows`, and process p of P reads the p-th contiguous B/P of its
rows. So the global batch is the same on any number of processes, and the whole state of the stream is the next step.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from jattn.checks import check_count
from train.data.packing import Batch, PackedWindows, rows_per_process
from train.data.sources import Document
from train.errors import UserError

READ_THREADS = 2
READ_AHEAD = 16
"""Batches in flight per process; a batch is small, and a slow moment of the machine should not reach the device."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainData:
    """The training stream.

    Attributes:
      documents: the training side of the split.
      context: tokens per sequence.
      global_batch: sequences per step over all processes.
      seed: of the order of documents and windows.
      process_index, process_count: which rows of the global batch this process reads.
    """

    documents: Sequence[Document]
    context: int
    global_batch: int
    seed: int = 0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        rows_per_process(self.global_batch, self.process_count)
        if check_count("process_index", self.process_index, minimum=0) >= self.process_count:
            raise ValueError(
                f"process_index: expected less than process_count = {self.process_count}, got {self.process_index}"
            )
        _ = self._windows  # a text shorter than one context is found here, not at the first step

    @functools.cached_property
    def _windows(self) -> PackedWindows:
        return PackedWindows(self.documents, self.context, self.seed)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What fixes the order of the stream, as JSON: a step means the same batch only where all of this agrees."""
        digest = hashlib.blake2b(digest_size=16)
        for document in self.documents:
            digest.update(len(document).to_bytes(8, "little"))
            digest.update(document)
        return {
            "documents": digest.hexdigest(),
            "context": self.context,
            "global_batch": self.global_batch,
            "seed": self.seed,
        }

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.global_batch * self.context

    @property
    def steps_per_epoch(self) -> float:
        """Global batches in one pass over the text."""
        return self._windows.per_epoch / self.global_batch

    def iterator(self, start_step: int = 0) -> BatchIterator:
        """This process's batches [global_batch / process_count, context] from `start_step` on, without end."""
        return BatchIterator(self, start_step)


class BatchIterator(Iterator[Batch]):
    """Reads ahead in threads; its state is the next step. Close it, or use it as a context manager."""

    def __init__(self, data: TrainData, start_step: int = 0) -> None:
        import grain  # takes as long to import as half of jax, and `--help` does not need it

        rows = _ProcessRows(data._windows, data.global_batch, data.process_index, data.process_count)
        dataset = grain.MapDataset.source(rows).batch(rows.per_step)
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
        self._identity = data.identity
        self._batches = iter(dataset.to_iter_dataset(options))
        self._seek(start_step)

    def __next__(self) -> Batch:
        return next(self._batches)

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_state(self) -> dict[str, Any]:
        """JSON: the next step, and what gives that step its meaning. It is the same on every process."""
        return {"step": self._batches.get_state()["next_index"], **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on at the step that `state` names; nothing is replayed.

        Raises:
          UserError: the state belongs to other documents or another order.
        """
        changed = [name for name in self._identity if state.get(name) != self._identity[name]]
        if changed:
            found = "; ".join(f"{name} was {state.get(name)}, is {self._identity[name]}" for name in changed)
            raise UserError(
                f"the data is not what the checkpoint was trained on ({found}), so the run cannot go on where it was; "
                f"restore the data and its options, or start in another folder"
            )
        self._seek(state["step"])

    def _seek(self, step: int) -> None:
        self._batches.set_state({"next_index": check_count("step", step, minimum=0)})

    def close(self) -> None:
        """Stop reading ahead; idempotent."""
        self._batches.close()


class _ProcessRows:
    """The windows that one process reads, in order: its rows of batch 0, then its rows of batch 1, ..."""

    def __init__(self, windows: PackedWindows, global_batch: int, process_index: int, process_count: int) -> None:
        self.per_step = rows_per_process(global_batch, process_count)
        self._windows = windows
        self._global_batch = global_batch
        self._first = process_index * self.per_step

    def __len__(self) -> int:
        return len(self._windows) // self._global_batch * self.per_step

    def __getitem__(self, index: int) -> Batch:
        step, row = divmod(int(index), self.per_step)
        return self._windows[step * self._global_batch + self._first + row]
