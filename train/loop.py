"""A training run from beginning to end: find where it is, train on, save, and end in a report."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jattn.models.lm import count_parameters
from train import distributed, report
from train.checkpoint import Checkpoints
from train.config import CommonConfig, save_config
from train.data.pipeline import TrainData
from train.errors import UserError, writing
from train.export import write_safetensors
from train.lock import lock
from train.progress import Progress
from train.records import Records
from train.schedule import Clock
from train.sharding import make_mesh
from train.signals import stop_signals
from train.step import Program, TrainState, make_program, resolve_precision
from train.tasks import HELD_OUT, RunData, Task, task_of
from train.trainer import Trainer
from train.workdir import CHECKPOINTS, check_same_run, environment, finished, make_folder, write_json


def run(config: CommonConfig, workdir: Path, *, started: float | None = None) -> dict[str, Any]:
    """Train `config` in `workdir`, from its newest valid checkpoint if it has one, and return the summary.

    Leaves there what `train/workdir.py` lists. With many processes, all call this with the same arguments and a folder
    that they share.

    Args:
      config: as from a recipe.
      workdir: made if need be.
      started: on the clock of `time.monotonic`, where a run by seconds begins to count; now by default.

    Raises:
      UserError: options that do not fit one another, data that cannot be read, a folder that holds another run or where
        one is going on, or a run that cannot go on; the last checkpoint is then untouched. Also, when all is written, a
        run whose last held-out figures are not finite.
    """
    started = time.monotonic() if started is None else started
    if config.schedule.seconds is not None and jax.process_count() > 1:
        raise UserError(
            "schedule.seconds: each host has its own clock, so a run on many counts steps; give schedule.steps"
        )
    distributed.decide("same run", lambda: _check_run(config, workdir))
    summary = distributed.decide("finished", lambda: finished(workdir))
    if summary is not None:
        print(
            f"{workdir}: this run is finished; its report is {workdir / 'report.html'}. Another --workdir starts anew."
        )
        return _checked(summary, config, workdir)
    with ExitStack() as stack:
        distributed.decide("folder", lambda: _claim(stack, workdir))
        loaded = _load_data(task_of(config), workdir)
        program = make_program(resolve_precision(config), make_mesh(config.mesh))
        data = TrainData(loaded.windows, config.data.batch, jax.process_index(), jax.process_count())
        distributed.decide("configuration", lambda: _describe(config, workdir))
        schedule = config.schedule
        progress = stack.enter_context(Progress(schedule.steps, schedule.seconds, console=_console()))
        checkpoints = stack.enter_context(
            Checkpoints(workdir / CHECKPOINTS, keep=config.keep_checkpoints, say=progress.say)
        )
        clock = stack.enter_context(Clock(schedule, workdir / "clock.jsonl", started=started))
        records = stack.enter_context(Records(workdir))
        batches = stack.enter_context(data.iterator())
        stop = stack.enter_context(stop_signals())
        trainer = Trainer(config, workdir, program, data, loaded, clock, records, progress, checkpoints)
        latest = checkpoints.latest()
        checkpoints.clean()
        if latest is None:
            state = program.init(config.seed)
            begun = program.task.begin(workdir, program, state, loaded, data, stop, progress.say)
            if begun is None:
                return {"stopped": stop.requested or "another process", "steps": 0}
            state = begun
            records.truncate(after=0)
            size = count_parameters(program.model(program.state_shape.weights))
            progress.say(
                f"{workdir}: {size:,} parameters, {loaded.described}, {program.task.units:,} {program.task.unit} a "
                f"step on {jax.device_count()} {jax.default_backend()} device(s)"
            )
        else:
            state = trainer.restore(latest, batches)
            progress.say(f"{workdir}: goes on from step {latest}")
        state = trainer.train(state, batches, stop)
        step = int(state.step)
        if trainer.stopped:
            who = stop.requested or "another process"
            progress.say(f"stopped by {who} at step {step}, saved; the same command goes on")
            return {"stopped": who, "steps": step}
        summary = _finish(workdir, loaded, program, state, trainer, progress)
    return _checked(summary, config, workdir)


def _checked(summary: dict[str, Any], config: CommonConfig, workdir: Path) -> dict[str, Any]:
    """`summary`, or a `UserError` where the run diverged: it has come to its end, and to nothing else."""
    broken = report.not_finite(summary)
    if broken:
        raise UserError(
            f"{workdir}: the run diverged: no finite {', '.join(broken)} on held-out data after its last step; "
            f"lower {config.optimizer.rates}, and choose another --workdir"
        )
    return summary


def _check_run(config: CommonConfig, workdir: Path) -> None:
    check_same_run(config, workdir)
    if not (workdir / "config.json").exists():
        task_of(config).check()


def _claim(stack: ExitStack, workdir: Path) -> None:
    make_folder(workdir)
    stack.enter_context(lock(workdir))


def _load_data(task: Task, workdir: Path) -> RunData:
    """Process 0 reads first: it may train a tokenizer, which the others then find in the folder."""
    found: list[RunData] = []
    distributed.decide("data", lambda: found.append(task.load(workdir)))
    return found[0] if found else task.load(workdir)


def _describe(config: CommonConfig, workdir: Path) -> None:
    try:
        save_config(config, workdir / "config.json")
        write_json(workdir / "environment.json", environment())
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written to ({error.strerror}); choose another --workdir") from error


def _console() -> Console:
    """One process of a run speaks."""
    return Console() if distributed.is_main() else Console(quiet=True)


def _finish(
    workdir: Path, loaded: RunData, program: Program, state: TrainState, trainer: Trainer, progress: Progress
) -> dict[str, Any]:
    """Weights, summary, report and what is the task's own; the others stay until process 0 has written them."""
    task, step, model = program.task, int(state.step), program.model(state.weights)
    metadata = {"config": json.dumps(json.loads((workdir / "config.json").read_text())), "step": str(step)}
    write_safetensors(state.weights, workdir / "model.safetensors", metadata)
    scores, figure = trainer.scores, f"val_{task.headline.name}"
    found: dict[str, Any] = {
        figure: scores.sets.get(HELD_OUT, {}).get(task.headline.name),
        "evaluation": scores.sets,
        "best": {"step": scores.best_step, figure: scores.best},
        "seconds": trainer.clock.seconds,
        "steps": step,
        f"{task.unit}_per_second": trainer.speed.overall,
        "params": count_parameters(model),
        "skipped": int(state.skipped),
        **task.last_figures(program, state.weights, loaded),
    }

    def write() -> dict[str, Any]:
        with writing(workdir):
            summary = found | task.finish(workdir, model, loaded, step, progress.say)
            write_json(workdir / "summary.json", summary)
            path = report.write_report(workdir)
        progress.say(f"{task.result(summary)} after {step} steps in {found['seconds']:.0f} s; report: {path}")
        return summary

    return distributed.decide("report", write)
