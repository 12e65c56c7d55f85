"""A run's folder: what it holds, which run it belongs to, and how a run is read back from it.

config.json  environment.json  tokenizer.json   what the run is
checkpoints/  clock.jsonl  lock                 where it is
metrics.jsonl  events/  profile/                what it measured
samples.json  summary.json  report.html  model.safetensors   what came of it
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from train.checkpoint import Checkpoints
from train.config import CommonConfig, MeshConfig, as_json, read_config
from train.errors import UserError
from train.sharding import make_mesh
from train.step import Program, TrainState, make_program, resolve_precision

CHECKPOINTS = "checkpoints"

# What may change from one start to the next without making it another run: how it is spread over devices, what it keeps
# and shows, and when it stops or goes back, which a run that has stopped for good must be able to have changed. The
# global batch and its order are not among them.
_FREE = (
    "sample.",
    "mesh.",
    "guard.",
    "data.accumulate",
    "log_every",
    "save_every_seconds",
    "keep_checkpoints",
    "profile_steps",
)


def make_folder(workdir: Path) -> None:
    """The folder, where it is not there yet."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir}: cannot be made ({error.strerror}); choose another --workdir") from error


def check_same_run(config: CommonConfig, workdir: Path) -> None:
    """A workdir holds one run: other settings than those it was started with are refused by name."""
    path = workdir / "config.json"
    if not path.exists():
        if any((workdir / CHECKPOINTS).glob("step_*")):
            raise UserError(
                f"{workdir}: has checkpoints and no config.json, so it cannot be told which run they belong to; bring "
                "config.json back (each checkpoint.json holds it under extra/config), or choose another --workdir"
            )
        return
    before, now = (json.loads(json.dumps(as_json(c))) for c in (read_config(path), config))
    changed = [
        f"{name} was {old!r} and is now {new!r}"
        for name, old, new in _differences(before, now)
        if not name.startswith(_FREE)
    ]
    if changed:
        raise UserError(f"{workdir}: holds a run with other settings ({'; '.join(changed)}); choose another --workdir")


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _differences(before.get(name), now.get(name), f"{prefix}.{name}" if prefix else name)
    elif before != now:
        yield prefix, before, now


def finished(workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that has come to its end."""
    path = workdir / "summary.json"
    return json.loads(path.read_text()) if path.exists() and (workdir / "report.html").exists() else None


def load(workdir: Path) -> tuple[CommonConfig, Program, TrainState]:
    """A run's configuration, its compiled functions on this machine's devices, and its newest valid state.

    The run's mesh is used where this machine has it, and a single device where it has not.
    """
    config = read_config(workdir / "config.json")
    try:
        program = make_program(resolve_precision(config), make_mesh(config.mesh))
    except UserError:
        program = make_program(resolve_precision(config), make_mesh(MeshConfig(), jax.devices()[:1]))
    with Checkpoints(workdir / CHECKPOINTS, say=lambda text: print(text, file=sys.stderr)) as checkpoints:
        latest = checkpoints.latest()
        if latest is None:
            raise UserError(f"{workdir}: has no checkpoint yet; train first with python -m train run")
        return config, program, checkpoints.restore(latest, program.state_shape)[0]


def environment() -> dict[str, Any]:
    """Versions and devices, for the report."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "jattn")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(or_none(content), indent=2, allow_nan=False) + "\n")
    os.replace(draft, path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; `None` if there is no such file.

    Raises:
      ValueError: a damaged file; the message names it.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON ({error}); remove it or write it again") from error


def or_none(content: Any) -> Any:
    """`content` with `None` for every number in it that is not finite: JSON has no NaN and no infinity."""
    if isinstance(content, dict):
        return {name: or_none(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [or_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
