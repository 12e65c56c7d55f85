"""What the trainer adds to the bare training step of recipe pydoc_lm: loop, saves, checksums, data."""

from __future__ import annotations

import dataclasses
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.measure import Result
from train.checkpoint import Checkpoints, manifest
from train.data.load import load_data
from train.data.pipeline import BatchIterator, TrainData
from train.evaluate import place
from train.progress import Progress
from train.recipes import pydoc_lm
from train.records import Records
from train.schedule import Clock
from train.sharding import make_mesh
from train.signals import Stop
from train.step import make_program, resolve_precision
from train.trainer import Trainer

BLOCK = 50
ROUNDS = 8
CHECKSUM_BYTES = 2**30
SAVE_PARAMETERS = 25_000_000


def run() -> Result:
    steps, rows = _loop()
    blocked, size = _save()
    with tempfile.TemporaryDirectory() as folder:
        speed = _checksums(Path(folder))
    ratio, resume = _data(rows["bare step, ms"] / 1e3)
    return Result(
        f"The trainer beside the bare step of pydoc_lm ({ROUNDS} blocks of {BLOCK} steps each, taking turns)",
        [
            *({"what": name, "figure": value} for name, value in rows.items()),
            {"what": f"a save of {size / 2**20:.0f} MiB blocks the step for, ms", "figure": blocked * 1e3},
            {"what": "checksums, GB/s", "figure": speed},
            {"what": "batches per second over steps per second", "figure": ratio},
            {"what": "first batch after a restart at step 100,000, s", "figure": resume},
        ],
        [
            ("step in the loop over bare step, with a save every 50 steps", steps, 1.05, "at most"),
            ("share of a minute that a save blocks", blocked / 60, 0.02, "at most"),
            ("checksums, GB/s", speed, 1.0, "at least"),
            ("data over what training takes", ratio, 5.0, "at least"),
            ("resume of the data at step 100,000, s", resume, 1.0, "at most"),
        ],
    )


class _Alternating(BatchIterator):
    """Batches that, before every block of the loop, let the bare step run for a block, and take the time of both."""

    def __init__(self, data: TrainData, program: Any, state: Any) -> None:
        super().__init__(data)
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.last: Any = None
        self._program, self._state = program, state
        self._count = 0
        self._since: float | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        if self._count % BLOCK == 0 and self._count:
            jax.block_until_ready(self.last)
            now = time.perf_counter()
            if self._since is not None:  # the first block compiles
                self.loop.append((now - self._since) / BLOCK)
            placed, request = place(batch, self._program), self._program.request(0)
            begin = time.perf_counter()
            for _ in range(BLOCK):
                self._state, _ = self._program.step(self._state, placed, np.float32(1), request)
            jax.block_until_ready(self._state)
            self._since = time.perf_counter()
            if self.loop:
                self.bare.append((self._since - begin) / BLOCK)
        self._count += 1
        return batch


def _loop() -> tuple[float, dict[str, float]]:
    """The median ratio of step times, and the medians."""
    config = pydoc_lm.config()
    total = BLOCK * (ROUNDS + 2) + 1
    config = resolve_precision(
        dataclasses.replace(
            config, schedule=dataclasses.replace(config.schedule, seconds=None, steps=total), save_every_seconds=7.0
        )
    )
    program = make_program(config, make_mesh(config.mesh, jax.devices()[:1]))
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        loaded = load_data(config, workdir)
        data = TrainData(loaded.windows, config.data.batch)
        batches = _Alternating(data, program, program.init(1))

        def step(*arguments: Any) -> Any:
            state, metrics = program.step(*arguments)
            batches.last = metrics
            return state, metrics

        with (
            batches,
            Progress(total, None, console=Console(file=io.StringIO(), force_terminal=True)) as progress,
            Records(workdir) as records,
            Clock(config.schedule, workdir / "clock.jsonl") as clock,
            Checkpoints(workdir / "checkpoints", say=lambda _: None) as checkpoints,
        ):
            recording = dataclasses.replace(program, step=step)
            trainer = Trainer(config, workdir, recording, data, loaded, clock, records, progress, checkpoints)
            trainer.train(program.init(config.seed), batches, Stop())
    ratios = [loop / bare for loop, bare in zip(batches.loop, batches.bare, strict=False)]
    rows = {
        "bare step, ms": statistics.median(batches.bare) * 1e3,
        "step in the loop, ms": statistics.median(batches.loop) * 1e3,
        "ratio, least": min(ratios),
        "ratio, median": statistics.median(ratios),
        "ratio, largest": max(ratios),
    }
    return statistics.median(ratios), rows


def _save() -> tuple[float, int]:
    """Seconds until `save` returns, the one before being sealed, and the bytes that are saved."""
    state = {f"w{n}": jnp.full((SAVE_PARAMETERS // 8,), n, jnp.float32) for n in range(8)}
    seconds = []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, say=lambda _: None) as checkpoints:
        for step in range(6):
            begin = time.perf_counter()
            checkpoints.save(step, state, {})
            seconds.append(time.perf_counter() - begin)
            checkpoints.wait()
    return statistics.median(seconds[1:]), sum(x.nbytes for x in state.values())


def _checksums(folder: Path) -> float:
    """GB/s over a file that the system holds in memory."""
    (folder / "file").write_bytes(np.random.default_rng(0).bytes(CHECKSUM_BYTES))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        manifest(folder, ["file"])
        seconds.append(time.perf_counter() - begin)
    return CHECKSUM_BYTES / 1e9 / min(seconds)


def _data(step_seconds: float) -> tuple[float, float]:
    """Batches per second of one process over steps per second, and seconds to a first batch far into a run."""
    config = pydoc_lm.config()
    with tempfile.TemporaryDirectory() as folder:
        data = TrainData(load_data(config, Path(folder)).windows, config.data.batch)
    count = 2000
    with data.iterator() as batches:
        next(batches)
        begin = time.perf_counter()
        for _ in range(count):
            next(batches)
        each = (time.perf_counter() - begin) / count
    begin = time.perf_counter()
    with data.iterator(100_000) as batches:
        next(batches)
    return step_seconds / each, time.perf_counter() - begin
