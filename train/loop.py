"""The training loop: find where the run is, train on, save, and end in a report.

The order of things in a step is chosen so that the device never waits for the host: the metrics of a step are read
after the next one was dispatched, and batches and checkpoints are read and written by other threads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jattn.models.generate import generate
from jattn.models.lm import count_parameters
from train import metrics, report
from train.checkpoint import Checkpoints
from train.config import RunConfig, read_config, save_config
from train.data.pipeline import TrainData
from train.data.sources import read_documents, split_by_document
from train.errors import UserError, user_errors
from train.evaluate import bits_per_byte, compressor_baselines, place
from train.flops import peak_flops
from train.metrics import MetricsLog
from train.progress import Progress
from train.schedule import Clock, factor
from train.sharding import make_mesh
from train.step import Program, TrainState, make_program, resolve_precision


def run(config: RunConfig, workdir: Path, *, started: float | None = None) -> dict[str, Any]:
    """Train `config` in `workdir`, from its newest valid checkpoint if it has one, and return the summary.

    Leaves config.json, environment.json, metrics.jsonl, checkpoints/, samples.json, summary.json and report.html there.

    Args:
      config: as from a recipe.
      workdir: made if need be.
      started: on the clock of `time.monotonic`, where a run by seconds begins to count; now by default.

    Raises:
      UserError: options that do not fit one another, data that cannot be read, or a folder that holds another run.
    """
    _check_same_run(config, workdir)
    summary_path = workdir / "summary.json"
    if summary_path.exists() and (workdir / "report.html").exists():
        print(
            f"{workdir}: this run is finished; its report is {workdir / 'report.html'}. Another --workdir starts anew."
        )
        return json.loads(summary_path.read_text())
    resolved = resolve_precision(config)
    documents = read_documents(config.data.source, config.data.field)
    training, held_out = split_by_document(documents, config.data.holdout)
    if max(map(len, held_out)) < 2:
        raise UserError(
            "data.holdout: no held-out document has a byte to score; give longer documents or hold out more"
        )
    data = TrainData(
        training,
        config.data.context,
        config.data.batch,
        config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    mesh = make_mesh(config.mesh)
    program = make_program(resolved, mesh)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir}: cannot be made ({error.strerror}); choose another --workdir") from error
    save_config(config, workdir / "config.json")
    (workdir / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")

    schedule = config.schedule
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(schedule.steps, schedule.seconds))
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, say=progress.say)
        )
        clock = stack.enter_context(Clock(schedule, workdir / "clock.jsonl", started=started))
        with user_errors("metrics"):
            log = stack.enter_context(MetricsLog(workdir / "metrics.jsonl"))
        batches = stack.enter_context(data.iterator())
        stop = stack.enter_context(_stop_signals())

        latest = checkpoints.latest()
        checkpoints.clean()
        if latest is None:
            state = program.init(config.seed)
            model = program.model(state.parameters)
            progress.say(
                f"{workdir}: {count_parameters(model):,} parameters, {len(training)} documents to train on "
                f"({sum(map(len, training)):,} bytes), {len(held_out)} held out, "
                f"{data.tokens_per_step:,} tokens a step on {mesh.size} {jax.default_backend()} device(s)"
            )
        else:
            state, extra = checkpoints.restore(latest, program.state_shape)
            batches.set_state(extra["data"])
            progress.say(f"{workdir}: goes on from step {latest}")
        log.truncate(after=int(state.step))
        trainer = _Trainer(resolved, program, data, held_out, clock, log, progress, checkpoints)
        state = trainer.train(state, batches, stop)
        if stop.requested:
            progress.say(f"stopped by {stop.requested} at step {int(state.step)}, saved; the same command goes on")
            return {"stopped": stop.requested, "steps": int(state.step)}

        model = program.model(state.parameters)
        progress.say("writing sample text")
        samples = [
            {"step": int(state.step), "prompt": prompt, "text": write_text(model, config, prompt)}
            for prompt in config.sample.prompts
        ]
        summary = {
            "val_bits_per_byte": _or_none(trainer.last_validation),
            "seconds": clock.seconds,
            "steps": int(state.step),
            "tokens_per_second": trainer.speed.overall,
            "params": count_parameters(model),
            "skipped": int(state.skipped),
            "baselines": compressor_baselines(training, held_out),
        }
        _write_json(workdir / "samples.json", samples)
        _write_json(summary_path, summary)
        path = report.write_report(workdir)
        for sample in samples:
            progress.say(f"\n{sample['prompt']}{sample['text']}\n")
        progress.say(
            f"{trainer.last_validation:.3f} bits per byte on held-out text after {summary['steps']} steps in "
            f"{summary['seconds']:.0f} s; report: {path}"
        )
    return summary


class _Pending(NamedTuple):
    """A step that was dispatched: the number of updates with it, its factor, and its metrics on the device."""

    step: int
    rate: float
    metrics: dict[str, jax.Array]


class _Speed:
    """Tokens per second between readings; the first step, which waits for compilation, and validations are left out."""

    def __init__(self, tokens_per_step: int):
        self.latest: float | None = None
        self._tokens_per_step = tokens_per_step
        self._since: tuple[int, float] | None = None
        self._steps, self._seconds = 0, 0.0

    def begin(self, step: int) -> None:
        """Start to measure after `step`, unless it has begun."""
        self._since = self._since or (step, time.monotonic())

    def pause(self) -> None:
        """Forget what has been measured since the last reading."""
        self._since = None

    def read(self, step: int) -> None:
        """Take the steps since the last reading, if there are any."""
        if self._since is None or step <= self._since[0]:
            return
        steps, seconds = step - self._since[0], time.monotonic() - self._since[1]
        self.latest = steps * self._tokens_per_step / seconds
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        self._since = None

    @property
    def overall(self) -> float | None:
        """Over all readings."""
        return self._steps * self._tokens_per_step / self._seconds if self._seconds else None


class _Trainer:
    """The loop itself, with what it writes to."""

    def __init__(
        self,
        config: RunConfig,
        program: Program,
        data: TrainData,
        held_out: tuple[bytes, ...],
        clock: Clock,
        log: MetricsLog,
        progress: Progress,
        checkpoints: Checkpoints,
    ):
        self.config, self.program, self.data, self.held_out = config, program, data, held_out
        self.clock, self.log, self.progress, self.checkpoints = clock, log, progress, checkpoints
        self.last_validation = math.nan
        self.speed = _Speed(data.tokens_per_step)
        self._validated_at = -1
        self._unlogged: tuple[_Pending, dict[str, float]] | None = None
        peak = peak_flops(jax.devices()[0])
        shape = (config.data.batch, config.data.context)
        forward = program.model(program.state_shape.parameters).flops(*shape)
        self._flops_per_token = 3 * forward / self.data.tokens_per_step
        self._peak = None if peak is None else peak * jax.device_count()

    def train(self, state: TrainState, batches: Iterator[dict[str, np.ndarray]], stop: _Stop) -> TrainState:
        """Steps until the clock says that the run is over or a signal asks to stop; validated and saved at the end."""
        step = int(state.step)
        for row in metrics.read(self.log.path):
            if row["step"] == step and row.get("val_bits_per_byte") is not None:
                self.last_validation, self._validated_at = row["val_bits_per_byte"], step
        pending: _Pending | None = None
        saved_at = time.monotonic()
        while not stop.requested and (fraction := self.clock.fraction(step)) < 1.0:
            rate = factor(self.config.schedule, fraction)
            state, values = self.program.step(state, place(next(batches), self.program), np.float32(rate))
            step += 1
            if pending is not None:
                self._report(pending)
            pending = _Pending(step, rate, values)
            every = self.config.eval_every
            validating = every is not None and step % every == 0
            saving = time.monotonic() - saved_at > self.config.save_every_seconds
            if validating or saving:
                # Both wait for the device anyhow, and no row may be missing of a step that a checkpoint holds.
                self._report(pending)
                pending = None
            if validating:
                self._validate(step, state)
            if saving:
                self._save(step, state)
                saved_at = time.monotonic()
        if pending is not None:
            self._report(pending)
        if not stop.requested:
            if self._unlogged is not None:
                self._log(*self._unlogged)
            self._validate(step, state)
        self._save(step, state, wait=True)
        return state

    def _report(self, done: _Pending) -> None:
        """Show a step that is over, and log it if it is its turn. Its successor is already under way."""
        values = {name: float(value) for name, value in done.metrics.items()}
        self._unlogged = (done, values)
        if done.step % self.config.log_every == 0:
            self._log(done, values)
        self.speed.begin(done.step)
        shown = {
            "loss": values["loss"],
            "bits_per_byte": values["loss"] / math.log(2),
            "tokens_per_second": self.speed.latest,
            "mfu": self._mfu(),
        }
        self.progress.update(step=done.step, seconds=self.clock.seconds, metrics=shown)

    def _log(self, done: _Pending, values: dict[str, float]) -> None:
        self._unlogged = None
        self.speed.read(done.step)
        self.log.write(
            step=done.step,
            seconds=self.clock.seconds,
            loss=values["loss"],
            bits_per_byte=values["loss"] / math.log(2),
            tokens_per_second=self.speed.latest,
            mfu=self._mfu(),
            learning_rate=done.rate * self.config.optimizer.learning_rate,
            grad_norm=values["grad_norm"],
            skipped=int(values["skipped"]),
        )

    def _mfu(self) -> float | None:
        if self._peak is None or self.speed.latest is None:
            return None
        return self.speed.latest * self._flops_per_token / self._peak

    def _validate(self, step: int, state: TrainState) -> None:
        if step == self._validated_at:
            return
        self.speed.read(step)
        self.last_validation = bits_per_byte(self.program, state.parameters, self.held_out, self.config.data)
        self._validated_at = step
        self.speed.pause()
        self.log.write(step=step, seconds=self.clock.seconds, val_bits_per_byte=self.last_validation)
        self.progress.say(f"step {step}: {self.last_validation:.3f} bits per byte on held-out text")

    def _save(self, step: int, state: TrainState, *, wait: bool = False) -> None:
        extra = {"data": {"step": step, **self.data.identity}, "config": dataclasses.asdict(self.config)}
        self.checkpoints.save(step, state, extra, wait=wait)


def write_text(model: Any, config: RunConfig, prompt: str, *, seed: int = 0, on_token: Any = None) -> str:
    """Text that continues `prompt`; bytes that are no UTF-8 show as the replacement character."""
    sample = config.sample
    (tokens,) = generate(
        model,
        [list(prompt.encode()) or [10]],
        max_new_tokens=sample.tokens,
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        min_p=sample.min_p,
        seed=seed,
        on_token=on_token,
    )
    return bytes(tokens).decode(errors="replace")


def load(workdir: Path) -> tuple[RunConfig, Program, TrainState]:
    """A run's configuration, its compiled functions on this machine's devices, and its newest valid state."""
    config = read_config(workdir / "config.json")
    program = make_program(resolve_precision(config), make_mesh(config.mesh))
    checkpoints = Checkpoints(workdir / "checkpoints", say=lambda text: print(text, file=sys.stderr))
    with checkpoints:
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


def _check_same_run(config: RunConfig, workdir: Path) -> None:
    """A workdir holds one run: other settings than those it was started with are refused by name."""
    path = workdir / "config.json"
    if not path.exists():
        return
    before, now = dataclasses.asdict(read_config(path)), json.loads(json.dumps(dataclasses.asdict(config)))
    before = json.loads(json.dumps(before))
    changed = [
        f"{name} was {old!r} and is now {new!r}"
        for name, old, new in _differences(before, now)
        if not name.startswith(("sample.", "mesh."))
        and name not in ("log_every", "save_every_seconds", "keep_checkpoints")
    ]
    if changed:
        raise UserError(f"{workdir}: holds a run with other settings ({'; '.join(changed)}); choose another --workdir")


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _differences(before.get(name), now.get(name), f"{prefix}.{name}" if prefix else name)
    elif before != now:
        yield prefix, before, now


def _or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _write_json(path: Path, content: Any) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(draft, path)


class _Stop:
    """Which signal asked the run to stop, if any."""

    requested: str | None = None


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGTERM and Ctrl-C end the run after the step in flight; a second one ends the process at once."""
    stop = _Stop()

    def handle(number: int, frame: Any) -> None:
        stop.requested = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
