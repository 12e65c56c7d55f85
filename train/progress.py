"""What a run shows while it goes: a live line on a terminal, a plain line now and then in a log.

The fraction done is seconds / total_seconds, or step / total_steps, or the larger where both end the run. A terminal
gets one line, redrawn in place; every part has a rank, and a narrow window keeps the first ranks:

    ━━━━━━━━━━╸─────────  42%  step 720/1700  loss 1.204  1.74 bits/byte  9.8k tokens/s  MFU 31.2%  1:15  1:45 left

Anything else (a pipe, a file, TERM=dumb) gets whole lines with the same parts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

LINE_SECONDS = 5.0  # between plain lines
REDRAW_SECONDS = 0.1  # between frames of the live line
NARROWEST_BAR = 6


def clock(seconds: float) -> str:
    """`seconds` as 0:07, 12:07, 3:12:07 or 2d 03:12."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def count(number: float) -> str:
    """`number` to three figures: 934, 9.81k, 1.20M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{letter}"
    return f"{number:.0f}"


class Progress:
    """Shows a run from `__enter__` to `__exit__`.

    >>> with Progress(total_steps=None, total_seconds=150.0) as progress:
    ...     progress.update(step=step, seconds=elapsed, metrics={"loss": loss, "bits_per_byte": bits})
    ...     progress.say("saved a checkpoint at step 400")

    Args:
      total_steps, total_seconds: where the run ends; `None` where that does not end it.
      console: where to write, standard output by default.
    """

    def __init__(self, total_steps: int | None, total_seconds: float | None, *, console: Console | None = None):
        self.total_steps = total_steps
        self.total_seconds = total_seconds
        self.console = console or Console()
        self._live: Live | None = None
        self._first: tuple[int, float] | None = None
        self._step, self._seconds, self._metrics = 0, 0.0, dict[str, float]()
        self._shown_at, self._shown_step = -math.inf, -1

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(self, console=self.console, auto_refresh=False)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._first is not None and self._step != self._shown_step:
            self._show()
        if self._live is not None:
            self._live.stop()

    def update(self, *, step: int, seconds: float, metrics: Mapping[str, Any]) -> None:
        """Take the newest figures and show them if it is time to.

        Args:
          step: updates done.
          seconds: training time over all restarts.
          metrics: any of loss, bits_per_byte or bits_per_token, val_bits_per_byte, tokens_per_second (or of another
            unit) and mfu (a fraction); what is left out or `None` keeps its last value.
        """
        self._step, self._seconds = int(step), float(seconds)
        self._metrics |= {name: float(value) for name, value in metrics.items() if value is not None}
        self._first = self._first or (self._step, self._seconds)
        if time.monotonic() - self._shown_at >= (REDRAW_SECONDS if self._live else LINE_SECONDS):
            self._show()

    def say(self, text: str) -> None:
        """Write `text` on lines of its own, above the live line if there is one."""
        self._write(self._printable(text))

    def fraction(self) -> float | None:
        """How much of the run is done, in 0..1, or `None` if it has no end."""
        parts = [self._step / self.total_steps] if self.total_steps else []
        parts += [self._seconds / self.total_seconds] if self.total_seconds else []
        return min(1.0, max(parts)) if parts else None

    def seconds_left(self) -> float | None:
        """Seconds to the end at the pace since the last start, or `None` before there is a pace."""
        first_step, first_seconds = self._first or (0, 0.0)
        ends = [self.total_seconds - self._seconds] if self.total_seconds else []
        if self.total_steps and self._step > first_step:
            pace = (self._seconds - first_seconds) / (self._step - first_step)
            ends.append(pace * (self.total_steps - self._step))
        return max(0.0, min(ends)) if ends else None

    def _parts(self) -> list[tuple[int, str, str]]:
        """(rank, style, text) of every part that has a value, from left to right."""
        metrics, fraction, left = self._metrics, self.fraction(), self.seconds_left()
        of = f"/{self.total_steps}" if self.total_steps else ""
        parts = [(0, "bold", f"{100 * fraction:3.0f}%")] if fraction is not None else []
        parts.append((4, "", f"step {self._step}{of}"))
        for name, rank, style, form in (
            ("loss", 3, "", "loss {:.3f}"),
            ("bits_per_byte", 1, "bold cyan", "{:.2f} bits/byte"),
            ("bits_per_token", 1, "bold cyan", "{:.2f} bits/token"),
            ("val_bits_per_byte", 5, "cyan", "held out {:.3f}"),
        ):
            if name in metrics:
                parts.append((rank, style, form.format(metrics[name])))
        speeds = {name.removesuffix("_per_second"): x for name, x in metrics.items() if name.endswith("_per_second")}
        parts += [(6, "", f"{count(speed)} {unit}/s") for unit, speed in speeds.items()]
        if "mfu" in metrics:
            parts.append((7, "", f"MFU {100 * metrics['mfu']:.1f}%"))
        parts.append((8, "", clock(self._seconds)))
        if left is not None and fraction != 1:
            parts.append((2, "dim", f"{clock(left)} left"))
        return parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The live line in the width there is."""
        parts = self._parts()
        room = options.max_width - (NARROWEST_BAR if self.fraction() is not None else 0)
        kept: set[int] = set()
        for index in sorted(range(len(parts)), key=lambda index: parts[index][0]):
            needed = len(parts[index][2]) + 2
            if needed > room:
                break
            kept.add(index)
            room -= needed
        fraction = self.fraction()
        if fraction is not None:
            width = min(NARROWEST_BAR + room, 40)
            bar = ProgressBar(total=1.0, completed=fraction, width=width, complete_style="cyan", finished_style="green")
            yield from (segment for segment in console.render(bar, options) if segment.text != "\n")
        line = Text(no_wrap=True, overflow="crop", end="")
        for index, (_, style, text) in enumerate(parts):
            if index in kept:
                line.append("  ").append(text, style)
        yield line
        yield Segment.line()

    def _show(self) -> None:
        self._shown_at, self._shown_step = time.monotonic(), self._step
        if self._live is not None:
            self._live.refresh()
        else:
            self._write("  ".join(text.strip() for _, _, text in self._parts()))

    def _write(self, text: str) -> None:
        if self._live is not None:
            self.console.print(Text(text))
        elif not self.console.quiet:  # not through rich, which would fold the line at 80 columns
            print(text, file=self.console.file, flush=True)

    def _printable(self, text: str) -> str:
        """`text` with what the output's encoding lacks replaced: a sample must not stop a run."""
        encoding = getattr(self.console.file, "encoding", None) or "utf-8"
        return text.encode(encoding, "replace").decode(encoding)
