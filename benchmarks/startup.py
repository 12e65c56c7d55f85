"""How long until something happens: imports, and compilation of the first step."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.measure import Result
from train.evaluate import place
from train.recipes import pydoc_lm
from train.sharding import make_mesh
from train.step import make_program, resolve_precision

ROOT = Path(__file__).parent.parent


def import_seconds(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, cwd=ROOT)
    return time.perf_counter() - start


def compile_seconds(layers: int) -> float:
    """Trace, lower and compile one training step of the main job with `layers` layers."""
    config = resolve_precision(pydoc_lm.config())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers))
    start = time.perf_counter()
    program = make_program(config, make_mesh(config.mesh, jax.devices()[:1]))
    shape = (config.data.batch, config.data.context)
    integers = np.zeros(shape, np.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), integers)
    batch = place({**batch, "weights": np.ones(shape, np.float32)}, program)
    program.step.lower(program.state_shape, batch, np.float32(1), program.request(0)).compile()
    return time.perf_counter() - start


def run() -> Result:
    names = ("jax", "jattn", "jattn.dot_product")
    times = {name: [] for name in names}
    for name in names:
        import_seconds(name)
    for _ in range(7):
        for name in names:
            times[name].append(import_seconds(name))
    rows = [{"what": f"import {name}", "seconds": statistics.median(times[name])} for name in names]
    over = statistics.median(a / b for a, b in zip(times["jattn"], times["jax"], strict=True))
    compile_seconds(2)
    compiled = {layers: [] for layers in (4, 6, 24)}
    for _ in range(3):
        for layers in compiled:
            compiled[layers].append(compile_seconds(layers))
    rows += [
        {"what": f"compile a training step, {layers} layers", "seconds": statistics.median(seconds)}
        for layers, seconds in compiled.items()
    ]
    deep = statistics.median(a / b for a, b in zip(compiled[24], compiled[6], strict=True))
    return Result(
        "Start-up",
        rows,
        [
            ("import jattn over import jax", over, 1.15, "at most"),
            ("first step of pydoc_lm compiled, s", max(compiled[4]), 20.0, "at most"),
            ("compile time of 24 layers over 6", deep, 1.5, "at most"),
        ],
        ["`import jattn` loads nothing but itself; with its first op it has loaded jax too (third line)."],
    )
