"""How far a run is, and the learning rate's factor there.

A run by steps is at step / steps. A run by seconds follows the clock, and writes the time of every step to
`clock.jsonl` before the step is taken: a run that was killed repeats its last steps at the times it took them before,
so it comes to the same bits, and whoever has the journal can repeat the whole run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from train.config import ScheduleConfig
from train.errors import UserError, writing


def factor(schedule: ScheduleConfig, fraction: float) -> float:
    """The factor of the learning rate at `fraction` of the run, both in [0, 1]."""
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < schedule.warmup:
        return fraction / schedule.warmup
    start = 1.0 - schedule.decay_fraction if schedule.decay == "wsd" else schedule.warmup
    start = max(start, schedule.warmup)
    if fraction <= start or start >= 1.0:
        return 1.0
    progress = (fraction - start) / (1.0 - start)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.decay == "cosine" else 1.0 - progress
    return schedule.final + (1.0 - schedule.final) * shape


class Clock:
    """The fraction of a run at each step.

    Args:
      schedule: by steps or by seconds.
      journal: the file with the times of a run by seconds.
      started: when this process began, in `now`'s seconds.
      now: the clock; tests bring their own.
    """

    def __init__(
        self,
        schedule: ScheduleConfig,
        journal: Path,
        *,
        started: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._schedule = schedule
        self._now = now
        self._started = now() if started is None else started
        self._recorded: dict[int, float] = {}
        self._before = 0.0
        self._file = None
        self._folder = journal.parent
        if schedule.seconds is not None:
            self._recorded = _read(journal)
            self._before = max(self._recorded.values(), default=0.0)
            self._file = journal.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with writing(self._folder):  # what could not be written is tried again
                self._file.close()

    @property
    def seconds(self) -> float:
        """Time spent on the run by this process and those before it."""
        return self._before + self._now() - self._started

    def fraction(self, step: int) -> float:
        """How far the run is when step `step` begins; 1 or more means that it is over."""
        if self._schedule.steps is not None:
            return step / self._schedule.steps
        assert self._schedule.seconds is not None
        if step not in self._recorded:
            # Milliseconds are plenty, and a short decimal reads back as the same float.
            self._recorded[step] = round(self.seconds, 3)
            assert self._file is not None
            with writing(self._folder):
                self._file.write(json.dumps({"step": step, "seconds": self._recorded[step]}) + "\n")
                self._file.flush()
        return self._recorded[step] / self._schedule.seconds


def _read(journal: Path) -> dict[int, float]:
    """The times in the journal; a last line that was cut off is removed from the file, since more will be appended."""
    if not journal.exists():
        return {}
    text = journal.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        journal.write_text(whole)
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        return {row["step"]: row["seconds"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{journal}: is damaged ({error}); remove it, and the run follows the clock anew") from None
