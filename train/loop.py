"""A training run from beginning to end: find where it is, train on, save, and end in a report."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jattn.models.generate import generate
from jattn.models.lm import count_parameters
from train import convert, distributed, report
from train.checkpoint import Checkpoints
from train.config import RunConfig, save_config
from train.data.load import RunData, load_data
from train.data.pipeline import TrainData
from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.evaluate import compressor_baselines
from train.export import write_safetensors
from train.lock import lock
from train.progress import Progress
from train.records import Records
from train.schedule import Clock
from train.sharding import make_mesh
from train.signals import stop_signals
from train.step import TrainState, make_program, resolve_precision
from train.trainer import Trainer
from train.workdir import CHECKPOINTS, check_same_run, environment, finished, make_folder, or_none, write_json


def run(config: RunConfig, workdir: Path, *, started: float | None = None) -> dict[str, Any]:
    """Train `config` in `workdir`, from its newest valid checkpoint if it has one, and return the summary.

    Leaves there what `train/workdir.py` lists. With many processes, all call this with the same arguments and a folder
    that they share.

    Args:
      config: as from a recipe.
      workdir: made if need be.
      started: on the clock of `time.monotonic`, where a run by seconds begins to count; now by default.

    Raises:
      UserError: options that do not fit one another, data that cannot be read, a folder that holds another run or where
        one is going on, or a run that cannot go on; the last checkpoint is then untouched.
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
        return summary
    with ExitStack() as stack:
        distributed.decide("folder", lambda: _claim(stack, workdir))
        loaded = _load_data(config, workdir)
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
            if config.conversion.source is not None:
                begun = convert.converted(config, workdir, program, state, loaded, data, stop, progress.say)
                if begun is None:
                    return {"stopped": stop.requested or "another process", "steps": 0}
                state = begun
            records.truncate(after=0)
            size = count_parameters(program.model(program.state_shape.parameters))
            progress.say(
                f"{workdir}: {size:,} parameters, {loaded.described}, {data.tokens_per_step:,} tokens a step on "
                f"{jax.device_count()} {jax.default_backend()} device(s)"
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
        return _finish(config, workdir, loaded, program.model(state.weights), state, trainer, progress)


def _check_run(config: RunConfig, workdir: Path) -> None:
    check_same_run(config, workdir)
    if config.conversion.source is not None and not (workdir / "config.json").exists():
        convert.check_source(config)


def _claim(stack: ExitStack, workdir: Path) -> None:
    make_folder(workdir)
    stack.enter_context(lock(workdir))


def _load_data(config: RunConfig, workdir: Path) -> RunData:
    """Process 0 reads first: it may train a tokenizer, which the others then find in the folder."""
    found: list[RunData] = []
    distributed.decide("data", lambda: found.append(load_data(config, workdir)))
    return found[0] if found else load_data(config, workdir)


def _describe(config: RunConfig, workdir: Path) -> None:
    try:
        save_config(config, workdir / "config.json")
        write_json(workdir / "environment.json", environment())
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written to ({error.strerror}); choose another --workdir") from error


def _console() -> Console:
    """One process of a run speaks."""
    return Console() if distributed.is_main() else Console(quiet=True)


def _finish(
    config: RunConfig,
    workdir: Path,
    loaded: RunData,
    model: Any,
    state: TrainState,
    trainer: Trainer,
    progress: Progress,
) -> dict[str, Any]:
    """Weights, sample text, summary and report; the other processes stay until process 0 has written them."""
    step = int(state.step)
    metadata = {"config": json.dumps(json.loads((workdir / "config.json").read_text())), "step": str(step)}
    write_safetensors(state.weights, workdir / "model.safetensors", metadata)
    scores = trainer.scores
    summary: dict[str, Any] = {
        "val_bits_per_byte": or_none(scores.validation),
        "evaluation": scores.sets,
        "best": {"step": scores.best_step, "val_bits_per_byte": scores.best},
        "seconds": trainer.clock.seconds,
        "steps": step,
        "tokens_per_second": trainer.speed.overall,
        "params": count_parameters(model),
        "skipped": int(state.skipped),
    }

    def write() -> dict[str, Any]:
        samples = []
        # Sampling is a program of one process; a model spread over many is sampled afterwards: `train sample`.
        if loaded.tokenizer is not None and jax.process_count() == 1:
            progress.say("writing sample text")
            samples = [
                {"step": step, "prompt": prompt, "text": write_text(model, config, loaded.tokenizer, prompt)}
                for prompt in config.sample.prompts
            ]
        baselines = compressor_baselines(loaded.training, loaded.held_out) if loaded.training else {}
        write_json(workdir / "samples.json", samples)
        write_json(workdir / "summary.json", {**summary, "baselines": baselines})
        path = report.write_report(workdir)
        for sample in samples:
            progress.say(f"\n{sample['prompt']}{sample['text']}\n")
        progress.say(
            f"{scores.validation:.3f} bits per byte on held-out data after {step} steps in "
            f"{summary['seconds']:.0f} s; report: {path}"
        )
        return {**summary, "baselines": baselines}

    return distributed.decide("report", write)


def write_text(
    model: Any, config: RunConfig, tokenizer: Tokenizer, prompt: str, *, seed: int = 0, on_token: Any = None
) -> str:
    """Text that continues `prompt`; bytes that are no UTF-8 show as the replacement character."""
    sample = config.sample
    (tokens,) = generate(
        model,
        [tokenizer.encode(prompt.encode() or b"\n").tolist()],
        max_new_tokens=sample.tokens,
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        min_p=sample.min_p,
        seed=seed,
        on_token=on_token,
    )
    return tokenizer.decode(tokens).decode(errors="replace")
