"""Runs as a person starts them, for the tests that kill them, break their files and compare their bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np

from train.checkpoint import HEADER, Checkpoints

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = tempfile.TemporaryDirectory(prefix="jattn-programs-")
"""Where runs leave what they compiled for the next ones."""
TEXT = tempfile.TemporaryDirectory(prefix="jattn-text-")
"""A fifteenth of what the recipe reads: every validation scores a part of it."""
for topic in sorted(topics)[:8]:
    Path(TEXT.name, f"{topic}.txt").write_text(topics[topic])
HYBRID = (
    f"--data.source {TEXT.name} --optimizer.name adamw --sample.prompts "
    "--model.width 16 --model.num-layers 2 --model.num-heads 2 --model.mlp-width 24 "
    "--model.mixer-options.sliding-window.window 8 --data.context 32 --data.batch 8 --sample.tokens 12 "
    "--log-every 5 --save-every-seconds 0"
)
"""The recipe's pattern, without what takes long to compile: Muon, which few files ask for, and sampling."""
TINY = HYBRID.replace("--model.mixer-options.sliding-window.window 8", "--model.pattern softmax")
"""The same with one mixer, which takes less time to trace: for what does not ask which it is."""
STEPS = "--schedule.seconds None --schedule.steps 32 --eval-every 15"


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "train", *(part for word in words for part in word.split())]


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Quick compilation as in all tests, and of a program only once."""
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    kept = {"JAX_COMPILATION_CACHE_DIR": PROGRAMS.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | kept | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | more


def start(*words: str, devices: int = 1, **more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command(*words),
        cwd=ROOT,
        env=environment(devices, **more),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if hasattr(os, "sched_setaffinity"):
        # On the one core that `tests.cores` leaves to this process several of a run would wait for one another.
        os.sched_setaffinity(process.pid, range(os.cpu_count() or 1))
    return process


def finish(*words: str, **options) -> str:
    process = start(*words, **options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def sealed(workdir: Path) -> list[Path]:
    return sorted((workdir / "checkpoints").glob("step_*/MANIFEST.json"))


def final_arrays(workdir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by default the newest, by path, whatever the code that would train on."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.latest() if step is None else step
        assert step is not None
        header = json.loads((workdir / "checkpoints" / f"step_{step:08d}" / HEADER).read_text())
        like = {}
        for path, described in header["arrays"].items():
            dtype, _, shape = described.rstrip("]").partition("[")
            like[path] = jax.ShapeDtypeStruct(tuple(map(int, filter(None, shape.split(",")))), dtype)
        return {path: np.asarray(array) for path, array in checkpoints.restore(step, like)[0].items()}


def rows(workdir: Path) -> list[dict[str, float]]:
    """The metrics without those that a clock made."""
    timed = ("seconds", "tokens_per_second", "images_per_second", "mfu")
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in timed} for row in lines]


def assert_same_bits(one: Path, two: Path) -> None:
    a, b = final_arrays(one), final_arrays(two)
    assert a.keys() == b.keys()
    assert len(a) > 20
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
