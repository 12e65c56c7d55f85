"""The run's record: one JSON object a line in `metrics.jsonl`, one line for each logged step.

    {"step": 40, "seconds": 4.1, "loss": 2.31, "bits_per_byte": 3.33, "tokens_per_second": 9.8e3, "mfu": null, ...}

`step` counts the updates behind the row and `seconds` the training time, both over all restarts. A line is flushed
whole, so after `kill -9` at most the last one is torn, and a torn last line is dropped. After a restore at step s the
rows beyond s are dropped too: those steps are run again, and the curves must not be double.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Self, SupportsFloat, SupportsInt

Row = dict[str, Any]


def _parse(path: Path) -> tuple[list[Row], int]:
    """The rows of `path`, and the number of bytes they take; whatever is beyond is a torn last line."""
    rows: list[Row] = []
    size = 0
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("the line has no end")
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError('it is no JSON object with an integer "step"')
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error}; remove that line or move the file away") from error
        rows.append(row)
        size += len(line)
    return rows, size


def read(path: str | os.PathLike[str]) -> list[Row]:
    """All whole rows of a metrics file, in order; a file that does not exist has none.

    Raises:
      ValueError: a line before the last one is no row, so the file was damaged by something other than a crash.
    """
    return _parse(Path(path))[0]


def _plain(value: Any) -> int | float | None:
    """A JSON number; JSON has none for NaN and infinities, which become null."""
    if value is None or isinstance(value, int):
        return value
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None


class MetricsLog:
    """Appends rows to a metrics file, after what is already there.

    >>> with MetricsLog(workdir / "metrics.jsonl") as log:
    ...     log.truncate(after=restored_step)
    ...     log.write(step=step, seconds=elapsed, loss=loss, bits_per_byte=bits, learning_rate=rate)
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _, size = _parse(self.path)
        self._file = open(self.path, "ab")  # noqa: SIM115, open as long as the log is
        self._file.truncate(size)

    def write(self, *, step: SupportsInt, seconds: SupportsFloat, **values: Any) -> None:
        """Append one row.

        Args:
          step: updates done.
          seconds: training time over all restarts.
          values: loss (nats per token), bits_per_byte (of recall bits_per_token), tokens_per_second, mfu (a fraction,
            or None), learning_rate, grad_norm, skipped (updates left out so far), and val_bits_per_byte or other
            held-out figures where they were taken.
        """
        row = {"step": int(step), "seconds": float(seconds)} | {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def truncate(self, *, after: int) -> int:
        """Drop the rows with a step beyond `after`, in one atomic rewrite, and return how many they were."""
        rows, _ = _parse(self.path)
        kept = [row for row in rows if row["step"] <= after]
        if len(kept) == len(rows):
            return 0
        self._file.close()
        draft = self.path.with_suffix(".tmp")
        with open(draft, "wb") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.path)
        self._file = open(self.path, "ab")  # noqa: SIM115
        return len(rows) - len(kept)

    def sync(self) -> None:
        """What was written is on disk when this returns."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
