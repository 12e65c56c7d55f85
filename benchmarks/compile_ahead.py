"""Do the recipes fit the pods they are written for, and how long does it take to know? Needs libtpu, but no TPU.

python -m benchmarks.compile_ahead
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.measure import Result, show, write
from train.compile import Report, analyse
from train.topology import GIB, prepare

# A pod, its recipe, and what is compiled beside the recipe's own settings; each as for a run and by --quick.
PODS = (
    ("v5e:2x4", "lm_v5e_8", ""),
    ("v5p:8x8x8", "lm_1b", ""),
    ("v6e:16x16", "lm_1b", "--mesh.fsdp 16 --mesh.tensor 4 --mesh.context 4"),
    ("v5p:8x8x8", "lm_1b", "--data.context 131072 --data.batch 16"),
)


def run() -> Result:
    from train.config import load_recipe, parse_overrides

    rows, targets = [], []
    for topology, recipe, overrides in PODS:
        prepare(topology)
        config = parse_overrides(load_recipe(recipe), overrides.split())
        report = analyse(recipe, config, topology)
        quick = analyse(recipe, config, topology, quick=True)
        rows.append(_row(report, quick, config.data.context))
        name = f"{recipe} on {topology}, context {config.data.context}"
        targets.append((f"{name}: share of a device's memory", report.total / report.capacity, 1.0, "at most"))
        if report.devices == 512:
            targets.append((f"{name}: seconds to compile", report.seconds, 60.0, "at most"))
    return Result("Training steps compiled for pods that are not present", rows, targets)


def _row(report: Report, quick: Report, context: int) -> dict[str, Any]:
    gathered = sum(row.bytes for row in report.traffic if row.kind == "all-gather")
    return {
        "recipe": report.recipe,
        "topology": report.topology,
        "context": context,
        "mesh": " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1),
        "parameters": report.parameters,
        "state, GiB": report.memory.get("arguments", 0) / GIB,
        "temporaries, GiB": report.memory.get("temporaries", 0) / GIB,
        "total, GiB": report.total / GIB,
        "of, GiB": report.capacity / GIB,
        "gathered a step, GiB": gathered / GIB,
        "compile, s": report.seconds,
        "quick, s": quick.seconds,
        "quick, GiB": quick.total / GIB,
    }


if __name__ == "__main__":
    result = run()
    show(result, Console(width=160))
    write("compile", result)
