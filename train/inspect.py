"""What a checkpoint holds, whether it is whole, and which run made it: `python -m train inspect PATH`.

PATH is a run's folder, its folder of checkpoints, or one step in it. Only files are read: no device, no model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from train.checkpoint import HEADER, MANIFEST, PREFIX, find_damage
from train.errors import UserError
from train.progress import clock, count
from train.workdir import CHECKPOINTS

VALID, UNFINISHED, DAMAGED = "valid", "unfinished", "damaged"


@dataclasses.dataclass(frozen=True)
class Step:
    """One folder of a checkpoint.

    Attributes:
      state: "valid"; "unfinished", not sealed yet or cut off before that; or "damaged".
      problem: what is wrong, if anything.
      bytes: of all its files.
      seconds: since it was sealed, or since its folder last changed.
    """

    step: int
    folder: Path
    state: str
    problem: str | None
    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Options:
    """What the checkpoints of a run hold, whether they are whole, and which run made them."""

    json: bool = False
    """Print everything as JSON."""


def main(arguments: list[str]) -> int:
    """`python -m train inspect PATH [--json]`: 0, or 1 when a checkpoint is damaged or none is valid."""
    from train.config import parse_arguments

    if {"-h", "--help"} & {*arguments}:
        arguments = ["PATH", "--help"]
    if not arguments or arguments[0].startswith("-"):
        raise UserError("inspect: expected the folder of a run first, as in python -m train inspect runs/pydoc_lm")
    options = parse_arguments(_Options, arguments[1:], "inspect PATH")
    found = inspect(Path(arguments[0]))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    states = [step["state"] for step in found["steps"]]
    return int(DAMAGED in states or VALID not in states)


def inspect(path: Path) -> dict[str, Any]:
    """Everything about the checkpoints at `path`, as JSON.

    Returns:
      "steps", a list of `Step`s, oldest first, and of the one shown (the step that `path` is, else the newest valid
      one) "step", "arrays" (by group), "files", "data", "config" and, if the run has written it, "environment".

    Raises:
      UserError: no checkpoint is there.
    """
    path = path.absolute()
    folders = _folders(path)
    steps = [step for folder in folders if (step := _examine(folder)) is not None]
    valid = [step for step in steps if step.state == VALID]
    shown = next(reversed(steps if folders == [path] else valid), None)
    found: dict[str, Any] = {
        "steps": [dataclasses.asdict(step) | {"folder": str(step.folder)} for step in steps],
        "step": None,
    }
    if shown is None or not (shown.folder / HEADER).is_file():
        return found
    try:
        header = json.loads((shown.folder / HEADER).read_text(encoding="utf-8"))
        arrays = [_array(name, described) for name, described in header["arrays"].items()]
        extra = header["extra"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return found
    groups = {str(array["name"]).partition("/")[0]: None for array in arrays}
    environment = shown.folder.parent.parent / "environment.json"
    return found | {
        "step": header["step"],
        "arrays": {
            group: [array for array in arrays if str(array["name"]).partition("/")[0] == group] for group in groups
        },
        "files": _files(shown.folder),
        "data": extra.get("data"),
        "config": extra.get("config"),
        "environment": json.loads(environment.read_text()) if environment.is_file() else None,
    }


def _folders(path: Path) -> list[Path]:
    """The folder of every step at `path`, oldest first."""
    if not path.is_dir():
        raise UserError(f"{path}: is no folder; give a run's folder, its {CHECKPOINTS} folder, or one step in it")
    if _step_of(path) is not None:
        return [path]
    inner = path / CHECKPOINTS
    folder = inner if inner.is_dir() else path
    found = {step: one for one in folder.iterdir() if one.is_dir() and (step := _step_of(one)) is not None}
    if not found:
        raise UserError(
            f"{path}: holds no checkpoint ({folder} has no {PREFIX}* folder); train first, or mend the path"
        )
    return [found[step] for step in sorted(found)]


def _step_of(folder: Path) -> int | None:
    number = folder.name.removeprefix(PREFIX)
    return int(number) if folder.name.startswith(PREFIX) and number.isdecimal() else None


def _examine(folder: Path) -> Step | None:
    """`None` if the folder is gone: a run that goes on here removes old ones."""
    sealed = folder / MANIFEST
    problem = find_damage(folder)
    state = VALID if problem is None else DAMAGED if sealed.exists() else UNFINISHED
    try:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        changed = (sealed if sealed.exists() else folder).stat().st_mtime
    except FileNotFoundError:
        return None
    return Step(_step_of(folder) or 0, folder, state, problem, size, max(0.0, time.time() - changed))


def _array(name: str, described: str) -> dict[str, Any]:
    """`described` is as in "float32[3,5]"; bytes are `None` for a random key, whose size depends on its kind."""
    parts = re.fullmatch(r"(.+)\[([\d,]*)\]", described)
    if parts is None:
        raise ValueError(f"{name}: {described!r} is no dtype with a shape")
    dtype, shape = parts[1], [int(size) for size in parts[2].split(",") if size]
    numbers = math.prod(shape)
    size = None if dtype.startswith("key<") else numbers * jnp.dtype(dtype).itemsize
    return {"name": name, "dtype": dtype, "shape": shape, "numbers": numbers, "bytes": size}


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksums of every file that the seal vouches for."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _print(found: Mapping[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    steps = _table("step", "size", "age", "state")
    for step in found["steps"]:
        state = step["state"] if step["problem"] is None else f"{step['state']}: {step['problem']}"
        steps.add_row(str(step["step"]), _size(step["bytes"]), clock(step["seconds"]), state)
    console.print(steps)
    if found["step"] is None:
        console.print("\nno valid checkpoint, so there is nothing to show of one")
        return
    console.print(f"\nStep {found['step']}\n", style="bold")
    everything = [array for arrays in found["arrays"].values() for array in arrays]
    totals = _table("group", "arrays", "numbers", "size")
    for group, arrays in (found["arrays"] | {"total": everything}).items():
        size = sum(array["bytes"] or 0 for array in arrays)
        totals.add_row(group, str(len(arrays)), count(sum(array["numbers"] for array in arrays)), _size(size))
    arrays_of = _table("array", "dtype and shape", "size")
    for array in everything:
        shape = ",".join(map(str, array["shape"]))
        arrays_of.add_row(array["name"], f"{array['dtype']}[{shape}]", _size(array["bytes"]))
    files = _table("file", "size", "CRC-32")
    for name, entry in found["files"].items():
        sums = entry["crc32"].split()
        files.add_row(name, _size(entry["bytes"]), sums[0] if len(sums) == 1 else f"{len(sums)} pieces")
    console.print(totals, "", arrays_of, "", files, sep="\n")
    for title in ("data", "environment", "config"):
        if found[title] is not None:
            table = _table(title, "")
            for name, value in _flat(found[title]):
                table.add_row(name, json.dumps(value, ensure_ascii=False))
            console.print("", table, sep="\n")


def _table(*columns: str) -> Table:
    """Names and reasons fold in a narrow window; numbers stay whole."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        number = column in ("size", "age", "step", "arrays", "numbers", "CRC-32")
        table.add_column(column, overflow="fold", no_wrap=number, justify="right" if number else "left")
    return table


def _size(number: float | None) -> str:
    """As in 934 B or 1.2 MB; "?" for `None`."""
    if number is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} B" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dictionary, as ("model.width", 64)."""
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, values
