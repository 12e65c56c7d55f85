"""A libtpu dump as figures: what one grid step of every Pallas kernel costs.

The hot regions are the smallest that hold the MATMULs (a kernel with a masked and an unmasked tile has two). A step is
one turn of the grid's loop that runs one hot region, or all of a kernel without a grid. Loops count by their trips;
what a branch may skip is left out if it holds no MATMUL or is another hot region. (In a kernel without MATMULs all of
it runs.) The longest step makes the time of a kernel, and
every other stands beside it,

    seconds = step bundles · steps / clock

at which the core issues everything and waits for nothing: no DMA, no bank conflict is in it, and every step of the grid
runs the longest. Where a chip's two cores share a grid (v4, v5p), steps are those of one core.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pallas_kernels.lab import schedule, traffic
from pallas_kernels.lab.chips import Chip
from pallas_kernels.lab.program import calls as program_calls
from pallas_kernels.lab.schedule import UNITS, DumpError, Region, Schedule

_BUNDLES = "packed-bundles-post-ra"
_BEFORE = "pre-delay_hlo-static-per-bundle-utilization"
_TWINS = "deduplication-map"
_MATMUL = 1 + UNITS.index("MATMUL")
_PARTS = 16


def environment(folder: Path) -> dict[str, str]:
    """What makes libtpu write its schedules to `folder`, from the moment it loads.

    What follows each of its other hundred passes is left out: to write that takes longer than to compile.
    """
    passes = f"^({_BUNDLES}|pre-delay.*|{_TWINS})$"
    return {
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex={passes}"
    }


def kernels(folder: Path, program: str, jaxpr: Any, chip: Chip) -> list[dict[str, Any]]:
    """Figures of every Pallas kernel that a program calls; of equal ones once.

    Args:
      folder: libtpu's dump.
      program: text of the compiled module.
      jaxpr: what it was traced to, whose BlockSpecs say what a kernel moves.

    Raises:
      DumpError: the program calls no kernel, or the dump lacks one or is not what this reader knows.
    """
    calls = program_calls(program, "tpu_custom_call")
    if not calls:
        raise DumpError("the program calls no Pallas kernel")
    files = sorted(path.name for path in folder.iterdir())
    twins = _twins(folder)
    found: dict[str, dict[str, Any]] = {}
    for call in calls:
        source = next((twin for twin in (call.name, *twins.get(call.name, ())) if _newest(files, twin, _BUNDLES)), None)
        if source is None:
            raise DumpError(f"kernel {call.name}: no {_BUNDLES} among the {len(files)} files of the dump")
        if source in found:
            found[source]["calls"] += 1
            continue
        kernel = _kernel(folder, files, source, chip)
        notes = kernel["notes"] + call.notes()
        grids = traffic.grid_steps(jaxpr, call.name)
        if (
            grids
            and kernel["steps"]
            and not any(kernel["steps"] <= grid <= kernel["steps"] * chip.cores for grid in grids)
        ):
            notes.append(f"its grid has {sorted(grids)} steps, the schedule {kernel['steps']}: do not trust the time")
        moved = traffic.of_kernel(jaxpr, call.name)
        found[source] = {
            "name": call.name,
            "calls": 1,
            **kernel,
            "notes": notes,
            "moved_bytes": call.bytes if moved is None else moved,
            "moved_from": traffic.OPERANDS if moved is None else traffic.BLOCKS,
        }
    return list(found.values())


def _newest(files: list[str], kernel: str, kind: str) -> str | None:
    matching = [name for name in files if re.fullmatch(rf"\d+-{re.escape(kernel)}-\d+-{kind}\.txt", name)]
    return max(matching, key=lambda name: int(name.partition("-")[0]), default=None)


def _twins(folder: Path) -> dict[str, list[str]]:
    """libtpu schedules equal kernels once and lists which stand for which."""
    found: dict[str, list[str]] = {}
    for path in folder.glob(f"*{_TWINS}*.txt"):
        for block in re.split(r"^key:", path.read_text(errors="replace"), flags=re.M)[1:]:
            key, *lines = block.splitlines()
            group = [key.strip(), *(line.strip() for line in lines if line.startswith("  "))]
            for name in group:
                found.setdefault(name, []).extend(group)
    return found


def _kernel(folder: Path, files: list[str], name: str, chip: Chip) -> dict[str, Any]:
    texts = []
    for kind in (_BUNDLES, _BEFORE):
        file = _newest(files, name, kind)
        if file is None:
            raise DumpError(f"kernel {name}: no {kind} among the {len(files)} files of the dump")
        texts.append((folder / file).read_text(errors="replace"))
    try:
        read = schedule.read(texts[0], texts[1], chip.branch_delay)
    except DumpError as error:
        raise DumpError(f"kernel {name}: {error}") from None
    return figures(read, chip)


def figures(read: Schedule, chip: Chip) -> dict[str, Any]:
    """What a schedule says: the longest step, its hot region, the number of steps and the time they take.

    Of every step that runs another hot region the same stands in `hot_regions`, in the order of the code.
    """
    found = []
    for path in _hot(read):
        turn = next((region for region in path if region.of_grid), read.root)
        runs = _runs(read, path)
        step = _step(read, chip, read.cost(turn, runs), read.cost(path[-1], runs), turn)
        found.append((step | {"course": _course(read, path[-1], runs)}, turn))
    longest, turn = max(found, key=lambda one: one[0]["step_bundles"])
    return {
        "steps": turn.trips if turn.counted else None,
        **longest,
        "step_all_bundles": int(read.cost(turn)[0]),
        "hot_regions": [step for step, _ in found],
        "bundles": len(read.used),
        "complete": not read.notes,
        "notes": list(read.notes),
    }


def _step(read: Schedule, chip: Chip, step: np.ndarray, hot: np.ndarray, turn: Region) -> dict[str, Any]:
    bounds = {unit: step[1 + UNITS.index(unit)] / read.capacity[unit] for unit in UNITS if ":" not in unit}
    busiest = max(bounds, key=lambda unit: bounds[unit])
    return {
        "step_bundles": int(step[0]),
        "step_matmul_slots": int(step[_MATMUL]),
        "step_matmul_percent": 100 * bounds["MATMUL"] / step[0],
        "step_spill_stores": int(step[1 + UNITS.index("VSTORE:SPILL")]),
        "step_spill_loads": int(step[1 + UNITS.index("VLOAD:FILL")]),
        "busiest_unit": busiest,
        "busiest_percent": 100 * bounds[busiest] / step[0],
        "units": {unit: float(100 * bound / step[0]) for unit, bound in bounds.items()},
        "hot_bundles": int(hot[0]),
        "hot_matmul_percent": 100 * hot[_MATMUL] / read.capacity["MATMUL"] / hot[0],
        "seconds": float(step[0]) * turn.trips / chip.clock_hz if turn.counted else None,
    }


def _course(read: Schedule, region: Region, runs: Callable[[Region], bool]) -> list[float]:
    """MATMUL slots in use, in percent, over equal parts of a hot region: where it waits, and for how long."""
    ran = np.zeros(len(read.used), bool)

    def mark(region: Region) -> None:
        ran[region.first : region.last + 1] = True
        for child in region.children:
            ran[child.first : child.last + 1] = False
            if runs(child):
                mark(child)

    mark(region)
    parts = np.array_split(read.used[ran][:, _MATMUL], min(_PARTS, int(ran.sum())))
    return [float(100 * part.mean() / read.capacity["MATMUL"]) for part in parts]


def _runs(read: Schedule, path: list[Region]) -> Callable[[Region], bool]:
    """Which regions a step through the hot region at the end of `path` runs."""

    def runs(child: Region) -> bool:
        if child.loop or any(child is region for region in path) or not read.cost(read.root)[_MATMUL]:
            return True
        hot = path[-1]
        return bool(read.cost(child)[_MATMUL]) and hot.first <= child.first and child.last <= hot.last

    return runs


def _hot(read: Schedule) -> list[list[Region]]:
    """Ways from the root to each hot region; without MATMULs, to the smallest that holds nearly all bundles."""
    column = _MATMUL if read.cost(read.root)[_MATMUL] else 0
    found = []

    def descend(region: Region, path: list[Region]) -> None:
        path = [*path, region]
        here = read.cost(region)[column]
        weights = [child.trips * read.cost(child)[column] for child in region.children]
        if column:
            inner = [child for child, weight in zip(region.children, weights, strict=True) if weight]
        else:
            inner = [child for child, weight in zip(region.children, weights, strict=True) if weight >= 0.9 * here]
        if inner and np.sum(weights) >= 0.9 * here:
            for child in inner:
                descend(child, path)
        else:
            found.append(path)

    descend(read.root, [])
    return found
