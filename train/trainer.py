"""The training loop itself.

The order of things in a step is chosen so that the device never waits for the host: the metrics of a step are read
after the next one was dispatched, and batches and checkpoints are read and written by other threads. What the metrics
ask for (a save, a stop, a way back) is therefore done one step later, on every process at the same step.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from train import distributed
from train.checkpoint import Checkpoints
from train.config import CommonConfig, as_json
from train.data.packing import Batch
from train.data.pipeline import BatchIterator, TrainData
from train.errors import UserError
from train.evaluate import place, score
from train.flops import peak_flops
from train.guard import Guard
from train.progress import Progress
from train.records import Records
from train.schedule import Clock, factor
from train.signals import Stop
from train.step import Program, TrainState
from train.tasks import HELD_OUT, RunData
from train.workdir import or_none

# What a process may ask of all of them; the largest counts.
NOTHING, SAVE, STOP = range(3)


class _Pending(NamedTuple):
    """A step that was dispatched: the number of updates with it, its factor, its batch, its metrics on the device."""

    step: int
    rate: float
    batch: Batch
    batch_index: int
    metrics: dict[str, jax.Array]


class _Spike(Exception):
    """The loss of a step that the run has to go back before."""

    def __init__(self, step: int, batch_index: int, loss: float, batch: Batch) -> None:
        super().__init__(step)
        self.step, self.batch_index, self.loss, self.batch = step, batch_index, loss, batch


class Speed:
    """Units per second between readings; the first step, which waits for compilation, and validations are left out."""

    def __init__(self, units_per_step: int):
        self.latest: float | None = None
        self._units_per_step = units_per_step
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
        self.latest = steps * self._units_per_step / seconds
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        self._since = None

    @property
    def overall(self) -> float | None:
        """Over all readings."""
        return self._steps * self._units_per_step / self._seconds if self._seconds else None


@dataclasses.dataclass
class Scores:
    """The figures of every set: those last taken, and the best headline of the held-out one."""

    step: int = -1
    sets: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    best_step: int | None = None
    best: float | None = None


class Trainer:
    """Takes a state from where it is to the end of the run, writing down what happens."""

    def __init__(
        self,
        config: CommonConfig,
        workdir: Path,
        program: Program,
        data: TrainData,
        loaded: RunData,
        clock: Clock,
        records: Records,
        progress: Progress,
        checkpoints: Checkpoints,
    ):
        self.config, self.workdir, self.program, self.data, self.loaded = config, workdir, program, data, loaded
        self.clock, self.records, self.progress, self.checkpoints = clock, records, progress, checkpoints
        self.task = program.task
        self.scores = Scores()
        self.speed = Speed(self.task.units)
        self._guard = Guard(config.guard)
        self._held_out = loaded.identity()
        self._skipped_batches = 0
        self._rollbacks: dict[int, int] = {}
        self._unlogged: tuple[_Pending, dict[str, float]] | None = None
        self._request = NOTHING
        self._asked_to_save = False
        self._saved_at = time.monotonic()
        peak = peak_flops(jax.devices()[0])
        forward = self.task.flops(program.model(program.state_shape.weights))
        self._flops_per_unit = 3 * forward / self.task.units
        self._peak = None if peak is None else peak * jax.device_count()

    def restore(self, step: int, batches: BatchIterator) -> TrainState:
        """The state of a checkpoint, and with it everything that goes with that step: the batches, the figures.

        Raises:
          UserError: the data is not what the checkpoint was trained and scored on.
        """
        state, extra = self.checkpoints.restore(step, self.program.state_shape)
        if extra["held_out"] != self._held_out:
            raise UserError(
                f"the held-out {self.task.scored} are not those that this run was scored on, so its figures would be "
                "no curve; restore the data and its options, or start in another folder"
            )
        batches.set_state(extra["data"])
        self._guard.set_state(extra["guard"])
        self._skipped_batches = extra["skipped_batches"]
        self._unlogged = None
        self.scores = Scores(**extra["scores"])
        self.records.truncate(after=step)
        return state

    def train(self, state: TrainState, batches: BatchIterator, stop: Stop) -> TrainState:
        """Steps until the clock says that the run is over or a signal asks to stop; validated and saved at the end."""
        begins = int(state.step) == 0
        if begins and (self.config.guard.spike_z is not None or self.task.begins_elsewhere):
            self._save(0, state)  # there must be something to go back to, and a conversion is not to be made twice
        while True:
            try:
                return self._train(state, batches, stop)
            except _Spike as spike:
                del state
                state = self._go_back(spike, batches)

    def _train(self, state: TrainState, batches: BatchIterator, stop: Stop) -> TrainState:
        step = int(state.step)
        pending: _Pending | None = None
        profiler = _Profiler(self.config.profile_steps, self.workdir / "profile")
        with profiler:
            while self._request != STOP and (fraction := self.clock.fraction(step)) < 1.0:
                profiler.before(step + 1)
                rate = factor(self.config.schedule, fraction)
                batch = next(batches)
                placed = place(batch, self.program)
                request = self.program.request(self._wish(stop))
                state, values = self.program.step(state, placed, np.float32(rate), request)
                done, pending = pending, _Pending(step + 1, rate, batch, step + self._skipped_batches, values)
                step += 1
                if done is not None:
                    self._report(done)
                every = self.config.eval_every
                validating = every is not None and step % every == 0
                saving = self._request == SAVE
                if validating or saving:
                    # Both wait for the device anyhow, and no row may be missing of a step that a checkpoint holds.
                    self._report(pending)
                    pending = None
                if validating:
                    saving = self._validate(step, state) or saving
                if saving:
                    self._save(step, state)
            if pending is not None:
                self._report(pending)
        if self._request != STOP:
            if self._unlogged is not None:
                self._log(*self._unlogged)
            self._validate(step, state)
        self._save(step, state, wait=True)
        return state

    @property
    def stopped(self) -> bool:
        """Whether some process was asked to stop."""
        return self._request == STOP

    def _wish(self, stop: Stop) -> int:
        """What this process asks of all of them with the next step."""
        if stop.requested:
            return STOP
        due = time.monotonic() - self._saved_at > self.config.save_every_seconds
        if due and distributed.is_main() and not self._asked_to_save:
            self._asked_to_save = True
            return SAVE
        return NOTHING

    def _report(self, done: _Pending) -> None:
        """Show a step that is over, and log it if it is its turn. Its successor is already under way.

        Raises:
          _Spike: the run has to go back.
          UserError: it cannot go on.
        """
        values = {name: float(value) for name, value in done.metrics.items()}
        self._request = max(self._request, int(values["request"]))
        verdict = self._guard.judge(values["loss"], values["grad_norm"])
        if verdict == "spike":
            raise _Spike(done.step, done.batch_index, values["loss"], done.batch)
        if verdict == "broken":
            raise UserError(
                f"the last {self.config.guard.max_nonfinite} updates were not finite (at step {done.step} the loss was "
                f"{values['loss']} and the gradient norm {values['grad_norm']}); {self._keep_batch(done)}; "
                f"lower {self.config.optimizer.rates}, or look at the batch"
            )
        self._unlogged = (done, values)
        if done.step % self.config.log_every == 0:
            self._log(done, values)
        self.speed.begin(done.step)
        shown = {
            "loss": values["loss"],
            **self.task.in_training(values["loss"], self.loaded),
            f"{self.task.unit}_per_second": self.speed.latest,
            "mfu": self._mfu(),
        }
        self.progress.update(step=done.step, seconds=self.clock.seconds, metrics=shown)

    def _log(self, done: _Pending, values: dict[str, float]) -> None:
        self._unlogged = None
        self.speed.read(done.step)
        self.records.write(
            step=done.step,
            seconds=self.clock.seconds,
            loss=values["loss"],
            **self.task.in_training(values["loss"], self.loaded),
            **{f"{self.task.unit}_per_second": self.speed.latest},
            mfu=self._mfu(),
            learning_rate=done.rate * self.config.optimizer.learning_rate,
            grad_norm=values["grad_norm"],
            skipped=int(values["skipped"]),
        )

    def _mfu(self) -> float | None:
        if self._peak is None or self.speed.latest is None:
            return None
        return self.speed.latest * self._flops_per_unit / self._peak

    def _validate(self, step: int, state: TrainState) -> bool:
        """Take all figures; whether the held-out one is the best so far, which takes all of that set to be finite."""
        if step == self.scores.step:
            return False
        self.speed.read(step)
        rows = self.config.data.batch // self.config.data.accumulate
        sets = {name: score(self.program, state.weights, one, rows) for name, one in self.loaded.evaluation.items()}
        value = sets[HELD_OUT][self.task.headline.name]
        finite = all(map(math.isfinite, sets[HELD_OUT].values()))  # where the loss is NaN, accuracy still is a number
        better = finite and self.task.headline.better(value, self.scores.best)
        best_step, best = (step, value) if better else (self.scores.best_step, self.scores.best)
        self.scores = Scores(step, sets, best_step, best)
        self.speed.pause()
        others = {f"{name}_{figure}": x for name, one in sets.items() for figure, x in one.items() if name != HELD_OUT}
        own = {f"val_{figure}": x for figure, x in sets[HELD_OUT].items()}
        self.records.write(step=step, seconds=self.clock.seconds, **own, **others)
        shown = "; ".join(f"{x:.3f} {figure.replace('_', ' ')}" for figure, x in sets[HELD_OUT].items())
        beside = "" if better or best is None else f", best {best:.3f}"
        self.progress.say(f"step {step}: {shown} on held-out data{beside}")
        return better

    def _save(self, step: int, state: TrainState, *, wait: bool = False) -> None:
        extra = {
            "data": {"step": step + self._skipped_batches, **self.data.identity},
            "config": as_json(self.config),
            "guard": self._guard.get_state(),
            "skipped_batches": self._skipped_batches,
            "held_out": self._held_out,
            "scores": or_none(dataclasses.asdict(self.scores)),
        }
        self.records.sync()
        self.checkpoints.save(step, state, extra, keep_also=self.scores.best_step, wait=wait)
        self._saved_at = time.monotonic()
        self._asked_to_save = False
        if self._request == SAVE:
            self._request = NOTHING

    def _go_back(self, spike: _Spike, batches: BatchIterator) -> TrainState:
        self.checkpoints.wait()
        step = self.checkpoints.latest()
        assert step is not None  # `train` saved one
        times = self._rollbacks[step] = self._rollbacks.get(step, 0) + 1
        if times > self.config.guard.max_rollbacks:
            raise UserError(
                f"the loss spiked to {spike.loss:.3f} at step {spike.step}, after {times - 1} times of going back to "
                f"step {step}; {self._keep_batch(spike)}; lower {self.config.optimizer.rates}, or raise guard.spike_z"
            )
        state = self.restore(step, batches)
        before = step + self._skipped_batches
        self._skipped_batches += spike.batch_index + 1 - before
        batches.set_state({"step": spike.batch_index + 1, **self.data.identity})
        self.speed.pause()
        self.records.write(step=step, seconds=self.clock.seconds, spike_step=spike.step, spike_loss=spike.loss)
        self.progress.say(
            f"the loss spiked to {spike.loss:.3f} at step {spike.step}: back to step {step}, without batches "
            f"{before} to {spike.batch_index}"
        )
        return state

    def _keep_batch(self, done: _Pending | _Spike) -> str:
        """Write a batch beside the run, and say where."""
        suffix = "" if jax.process_count() == 1 else f"_process_{jax.process_index()}"
        path = self.workdir / f"bad_batch_step_{done.step:08d}{suffix}.npz"
        np.savez(path, **done.batch)  # type: ignore[arg-type]  # the stub takes the names for its options
        return f"the batch is kept in {path}"


class _Profiler:
    """A trace from the first to the last of `steps`."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self._steps, self._folder, self._running = steps, folder, False

    def before(self, step: int) -> None:
        if self._steps is None:
            return
        if self._running and step > self._steps[1]:
            self._end()
        elif not self._running and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self._running = False

    def __enter__(self) -> _Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._end()
