"""Signals: the first SIGTERM or Ctrl-C asks a run to save and end, a second one ends the process at once.

SIGUSR1 prints where every thread is, for a run that seems to hang.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Which signal asked the run to stop, if any."""

    requested: str | None = None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """A `Stop` that signals set; outside the context they do what they did before."""
    stop = Stop()

    def handle(number: int, frame: Any) -> None:
        stop.requested = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    # Not `sys.stderr`, which in a notebook is no file.
    dumps = hasattr(signal, "SIGUSR1")
    if dumps and sys.__stderr__ is not None:
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    try:
        yield stop
    finally:
        if dumps:
            faulthandler.unregister(signal.SIGUSR1)
        for number, handler in before.items():
            signal.signal(number, handler)
