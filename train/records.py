"""What a run writes down of itself as it goes: `metrics.jsonl`, and the same rows as TensorBoard events.

Only one process writes; on the others everything here does nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Self

from train import distributed
from train.errors import user_errors, writing
from train.metrics import MetricsLog


class Records:
    """Rows of metrics, to every place that wants them.

    Args:
      workdir: of the run.
    """

    def __init__(self, workdir: Path) -> None:
        self._log: MetricsLog | None = None
        self._events: Any = None
        self._workdir = workdir
        self._folder = workdir / "events"
        if distributed.is_main():
            with user_errors("metrics"), writing(workdir):
                self._log = MetricsLog(workdir / "metrics.jsonl")

    def truncate(self, *, after: int) -> None:
        """Forget the steps beyond `after`, which are taken again."""
        if self._log is None:
            return
        with writing(self._workdir):
            self._log.truncate(after=after)
            self._close_events()
            self._open_events(after + 1)

    def write(self, *, step: int, seconds: float, **values: Any) -> None:
        """One row; see `MetricsLog.write`."""
        if self._log is None:
            return
        with writing(self._workdir):
            self._log.write(step=step, seconds=seconds, **values)
            if self._events is None:
                self._open_events(None)
            self._write_events(step, values)

    def sync(self) -> None:
        """On disk, before a checkpoint says that these rows exist."""
        if self._log is not None:
            with writing(self._workdir):
                self._log.sync()

    def _open_events(self, first_step: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        # Its writer without the thread around it, which waits by the wall clock and so does not survive a jump of it.
        self._folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(self._folder / "events"))
        if first_step is not None:  # what is beyond was written by a process that is gone
            session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._events.write_event(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=session))

    def _write_events(self, step: int, values: dict[str, Any]) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        scalars = [
            summary_pb2.Summary.Value(tag=name, simple_value=float(value))
            for name, value in values.items()
            if value is not None
        ]
        summary = summary_pb2.Summary(value=scalars)
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self._workdir):  # what could not be written is tried again
            try:
                if self._log is not None:
                    self._log.close()
            finally:
                self._close_events()
