"""Rows as tables for a person."""

from __future__ import annotations

import re
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_TPU_LEGEND = """\
hot: bundles of the innermost region that holds the matmuls, and how much of their slots is used; course: that share
from the first bundle to the last. step: the same for one grid step around it; "or": of one that takes another branch.
busiest: the unit that bounds the step.
µs: step x steps / clock, nothing waited for (> where turns of a loop are not known). xHBM: that of the longest step
against the least bytes at full bandwidth. moved: HBM bytes by the block specs (~: each operand and result once), and
against the least. temporaries: HBM beside arguments and results."""
_H100_LEGEND = """\
wgmma, mma.sync: instructions in the PTX. moved: each operand and result once, and against the least bytes; min µs: the
least bytes at full bandwidth. temporaries: HBM beside arguments and results."""
_HEIGHTS = "▁▂▃▄▅▆▇█"
_TELLING = re.compile(r"exceed|exhausted|ran out|limit|unsupported|not (?:yet )?(?:implemented|supported)", re.I)


def reason(error: str) -> str:
    """The line of an error that says why, without the trace that a compiler's message may carry."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    telling = next((line for line in lines if _TELLING.search(line)), lines[0] if lines else "no reason given")
    overflow = "VMEM overflow: " if "RESOURCE_EXHAUSTED" in error and re.search("vmem", error, re.I) else ""
    return overflow + telling[:300]


def show(rows: list[dict[str, Any]], console: Console, *, report: bool) -> None:
    """The verdicts of `compile`, or the figures of `report` in a table for each target; below, what failed and why."""
    if report:
        for target in dict.fromkeys(row["target"] for row in rows):
            measured = [row for row in rows if row["target"] == target and "error" not in row]
            if measured:
                console.print(_h100(measured) if target == "h100" else _tpu(target, measured))
        kinds = {row["target"] == "h100" for row in rows if "error" not in row}
        for of_h100, legend in ((False, _TPU_LEGEND), (True, _H100_LEGEND)):
            if of_h100 in kinds:
                console.print(Text(legend, "dim"))
    else:
        console.print(_verdicts(rows))
    for row in rows:
        where = f"{row['case']} on {row['target']}"
        if "error" in row:
            console.print(Text(f"{where}: {reason(row['error'])}", "red"))
        notes = [f"{kernel['name']}: {note}" for kernel in row.get("kernels", ()) for note in kernel["notes"]]
        for note in filter(None, [row["note"], *notes]):
            console.print(Text(f"{where}: {note}", "dim"))


def _verdicts(rows: list[dict[str, Any]]) -> Table:
    targets = list(dict.fromkeys(row["target"] for row in rows))
    table = _table("case", *targets)
    for name in dict.fromkeys(row["case"] for row in rows):
        of = {row["target"]: row for row in rows if row["case"] == name}
        cells = [
            "" if target not in of
            else Text("no", "bold red") if "error" in of[target]
            else Text(f"{of[target]['compile_seconds']:.1f} s", "green")
            for target in targets
        ]  # fmt: skip
        table.add_row(name, *cells)
    return table


def _tpu(target: str, rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "case", "kernel", "hot", "course", "step", "busiest", "spills", "steps", "µs", "xHBM", "moved", "temporaries"
    )
    table.title = target
    for row in rows:
        several = len(row["kernels"]) > 1
        for kernel in row["kernels"]:
            table.add_row(
                row["case"],
                kernel["name"] + (f" x{kernel['calls']}" if kernel["calls"] > 1 else ""),
                *_step(kernel, kernel),
                *(["", _moved(kernel), ""] if several else _sums(row)),
            )
            others = {step["step_bundles"]: step for step in kernel["hot_regions"]}
            for bundles in sorted(others.keys() - {kernel["step_bundles"]}, reverse=True):
                table.add_row("", "or", *_step(kernel, others[bundles]))
        if several:
            table.add_row(row["case"], "together", *[""] * 6, _micros(row["seconds"]), *_sums(row))
    return table


def _step(kernel: dict[str, Any], step: dict[str, Any]) -> list[str]:
    return [
        f"{step['hot_bundles']} {step['hot_matmul_percent']:3.0f}%",
        "".join(_HEIGHTS[min(int(share / 12.5), 7)] for share in step["course"]),
        f"{step['step_bundles']} {step['step_matmul_percent']:3.0f}%",
        f"{step['busiest_unit']} {step['busiest_percent']:3.0f}%",
        str(step["step_spill_stores"]),
        "?" if kernel["steps"] is None else str(kernel["steps"]),
        ("" if kernel["complete"] or not step["seconds"] else ">") + _micros(step["seconds"]),
    ]


def _sums(row: dict[str, Any]) -> list[str]:
    return [_number(row.get("times_minimum")), _moved(row), _bytes(row["temporary_bytes"])]


def _h100(rows: list[dict[str, Any]]) -> Table:
    figures = ("registers", "spill_store_bytes", "shared_bytes", "threads", "wgmma", "mma_sync")
    table = _table(
        "case", "kernel", "registers", "spill bytes", "shared bytes", "threads", "wgmma", "mma.sync", "moved", "min µs",
        "temporaries",
    )  # fmt: skip
    table.title = "h100"
    for row in rows:
        least = 1e6 * row["minimum_seconds"] if "minimum_seconds" in row else None
        for at, kernel in enumerate(row["kernels"]):
            sums = ["", "", ""] if at else [_moved(row), _number(least), _bytes(row["temporary_bytes"])]
            table.add_row(row["case"], kernel["name"], *(str(kernel[figure]) for figure in figures), *sums)
    return table


def _table(*columns: str) -> Table:
    table = Table(title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "kernel") else "right", overflow="fold")
    return table


def _moved(figures: dict[str, Any]) -> str:
    ratio = figures.get("moved_over_minimum")
    least = "~" if "operands" in figures["moved_from"] else ""
    return f"{least}{_bytes(figures['moved_bytes'])}" + ("" if ratio is None else f" {ratio:5.2f}x")


def _micros(seconds: float | None) -> str:
    return "?" if seconds is None else _number(1e6 * seconds)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: float) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"
