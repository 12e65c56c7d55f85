"""Batches as a function of (seed, step), read ahead by threads.

Global batch s is windows s*B .. s*B + B - 1 of a sequence of windows, and process p of P reads the p-th contiguous B/P
of its rows. So the global batch is the same on any number of processes, and the whole state of the stream is the next
step.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from jattn.checks import check_count
from train.data.packing import Batch, Windows, rows_per_process
from train.errors import UserError

READ_THREADS = min(16, max(2, os.cpu_count() or 1))
READ_AHEAD, READ_AHEAD_BYTES = 16, 2**30
"""Batches in flight per process, as many as fit: a slow moment of the machine should not reach the device."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainData:
    """The training stream.

    Attributes:
      windows: the endless sequence that batches are cut from.
      global_batch: rows per step over all processes.
      process_index, process_count: which rows of the global batch this process reads.
    """

    windows: Windows
    global_batch: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        rows_per_process(self.global_batch, self.process_count)
        if check_count("process_index", self.process_index, minimum=0) >= self.process_count:
            raise ValueError(
                f"process_index: expected less than process_count = {self.process_count}, got {self.process_index}"
            )

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What fixes the order of the stream, as JSON: a step means the same batch only where all of this agrees."""
        return {**self.windows.identity(), "global_batch": self.global_batch}

    @property
    def steps_per_epoch(self) -> float:
        """Global batches in one pass over the data."""
        return self.windows.per_epoch / self.global_batch

    def iterator(self, start_step: int = 0) -> BatchIterator:
        """This process's batches [global_batch / process_count, ...] from `start_step` on, without end."""
        return BatchIterator(self, start_step)


class BatchIterator(Iterator[Batch]):
    """Reads ahead in threads; its state is the next step. Close it, or use it as a context manager."""

    def __init__(self, data: TrainData, start_step: int = 0) -> None:
        import grain  # takes as long to import as half of jax, and `--help` does not need it

        rows = _ProcessRows(data.windows, data.global_batch, data.process_index, data.process_count)
        dataset = grain.MapDataset.source(rows).batch(rows.per_step)
        size = rows.per_step * sum(array.nbytes for array in rows[0].values())
        ahead = max(1, min(READ_AHEAD, READ_AHEAD_BYTES // size))
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=ahead)
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
          UserError: the state belongs to other data or another order.
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

    def __init__(self, windows: Windows, global_batch: int, process_index: int, process_count: int) -> None:
        self.per_step = rows_per_process(global_batch, process_count)
        self._windows = windows
        self._global_batch = global_batch
        self._first = process_index * self.per_step

    def __len__(self) -> int:
        return len(self._windows) // self._global_batch * self.per_step

    def __getitem__(self, index: int) -> Batch:
        step, row = divmod(int(index), self.per_step)
        return self._windows[step * self._global_batch + self._first + row]


class MixedWindows:
    """Windows of several sources, drawn so that each makes up its share of the tokens at every moment of the run.

    The n-th window of a source comes as its share falls due, in an order fixed by the weights (grain's mixing), so a
    mixture too is a function of the index.

    Args:
      parts: at least one, all of one context.
      weights: positive, one for each part; they need not add up to 1.
    """

    def __init__(self, parts: Sequence[Windows], weights: Sequence[float]) -> None:
        import grain

        total = sum(weights)
        self._shares = [weight / total for weight in weights]
        self._parts = parts
        self._mixed = grain.MapDataset.mix([grain.MapDataset.source(part) for part in parts], self._shares)
        # As long as the first source to come round needs.
        self.per_epoch = min(int(part.per_epoch / share) for part, share in zip(parts, self._shares, strict=True))

    def __len__(self) -> int:
        return len(self._mixed)

    def __getitem__(self, index: int) -> Batch:
        return self._mixed[int(index)]

    def identity(self) -> dict[str, Any]:
        return {
            "sources": [part.identity() for part in self._parts],
            "shares": [round(share, 12) for share in self._shares],
        }


def rows_of(batch: Batch) -> Sequence[Batch]:
    """The windows of a batch [count, ...], as `eval_batches` reads them."""
    return [{name: array[row] for name, array in batch.items()} for row in range(len(batch["weights"]))]
