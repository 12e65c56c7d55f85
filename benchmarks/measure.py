"""What every benchmark shares: interleaved timing, tables, and results with versions and machine."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Result:
    """A question's answer: rows for the table, and the figures that have a target.

    Attributes:
      title: the question.
      rows: one mapping for each line, all with the same keys.
      targets: (what, figure, bound, "at most" or "at least").
      notes: lines under the table.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    targets: Sequence[tuple[str, float, float, str]] = ()
    notes: Sequence[str] = ()

    def met(self) -> bool:
        return all(value <= bound if way == "at most" else value >= bound for _, value, bound, way in self.targets)


def keep_memory() -> None:
    """Let glibc keep what is freed, as it does by itself with arrays below 32 MiB.

    Larger ones it gives back at once, and the next call waits while the system clears every page anew: a cost that
    begins at some length, and is not the op's. Elsewhere than on glibc nothing changes.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        # One arena: those of other threads hand back what is above 64 MiB however they are told.
        for option, value in ((arena_max, 1), (mmap_threshold, 2**31 - 1), (trim_threshold, 2**31 - 1)):
            adjust(option, value)


def interleaved(calls: Mapping[str, Callable[[], Any]], *, rounds: int = 7, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call in each round. The calls take turns, so a slow moment of the machine hits them alike."""
    for _ in range(warmup):
        for call in calls.values():
            jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    """The median over rounds of one call's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def median(seconds: Mapping[str, Sequence[float]], name: str) -> float:
    return statistics.median(seconds[name])


def rms_ratio(found: Any, wanted: Any) -> float:
    """The root of the mean square of the difference, over that of what is wanted."""
    x, y = (np.asarray(z, np.float64) for z in (found, wanted))
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))


def temporary_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Peak temporary memory of the compiled call, as the compiler states it."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "machine": f"{os.cpu_count()}-core {platform.machine()} {_cpu_name()}".strip(),
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(result: Result, console: Console) -> None:
    """The table, its targets and its notes."""
    table = Table(title=result.title, title_justify="left")
    for name in result.rows[0] if result.rows else ():
        table.add_column(name, justify="left" if isinstance(result.rows[0][name], str) else "right")
    for row in result.rows:
        table.add_row(*(_text(value) for value in row.values()))
    console.print(table)
    for what, value, bound, way in result.targets:
        good = value <= bound if way == "at most" else value >= bound
        console.print(f"  {'met ' if good else 'MISS'}  {what}: {_text(value)} ({way} {_text(bound)})")
    for note in result.notes:
        console.print(f"  {note}")
    console.print()


def _text(value: Any) -> str:
    """Numbers with four figures at least: 0.1234, 16,780."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write(name: str, result: Result) -> Path:
    """Keep `result` as JSON under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**machine(), **dataclasses.asdict(result)}, indent=1) + "\n")
    return path
