"""Do the recipes fit the pods they are written for, and how long does it take to know? Needs libtpu, but no TPU.

python -m benchmarks.compile_ahead
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.measure import Result, show, write
from train.compile import Report, analyse
from train.topology import GIB, prepare

# What each pod is compiled with beside the recipe's own settings.
PODS = {
    "v5e:2x4": ("lm_v5e_8", ""),
    "v5p:8x8x8": ("lm_1b", ""),
    "v6e:16x16": ("lm_1b", "--mesh.fsdp 16 --mesh.tensor 4 --mesh.context 4"),
}


def run() -> Result:
    from train.config import load_recipe, parse_overrides

    reports = {}
    for topology, (recipe, overrides) in PODS.items():
        prepare(topology)
        reports[topology] = analyse(recipe, parse_overrides(load_recipe(recipe), overrides.split()), topology)
    targets = []
    for topology, report in reports.items():
        share = report.total / report.capacity
        targets.append((f"{report.recipe} on {topology}: share of a device's memory", share, 1.0, "at most"))
        if report.devices == 512:
            targets.append((f"{report.recipe} on {topology}: seconds to compile", report.seconds, 60.0, "at most"))
    return Result("Training steps compiled for pods that are not present", [_row(r) for r in reports.values()], targets)


def _row(report: Report) -> dict[str, Any]:
    gathered = sum(row.bytes for row in report.traffic if row.kind == "all-gather")
    return {
        "recipe": report.recipe,
        "topology": report.topology,
        "mesh": " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1),
        "parameters": report.parameters,
        "state, GiB": report.memory.get("arguments", 0) / GIB,
        "temporaries, GiB": report.memory.get("temporaries", 0) / GIB,
        "total, GiB": report.total / GIB,
        "of, GiB": report.capacity / GIB,
        "gathered a step, GiB": gathered / GIB,
        "compile, s": report.seconds,
    }


if __name__ == "__main__":
    result = run()
    show(result, Console(width=160))
    write("compile", result)
