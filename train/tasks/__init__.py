"""What a run on text and a run on images do each in their own way: one `Task` a module; all else in `train` is shared.

    text    next-token prediction; bits per byte           train.tasks.text
    images  classification; accuracy                       train.tasks.images

A run's configuration names its task. Another one is a module here and a configuration in `train.config.CONFIGS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

if TYPE_CHECKING:
    from train.config import CommonConfig
    from train.data.packing import Batch, Windows
    from train.data.pipeline import TrainData
    from train.sharding import Rule
    from train.signals import Stop
    from train.step import Program, TrainState

HELD_OUT = "held_out"
"""The name of a run's own evaluation set, whose headline figure is the run's."""


class EvalSet(Protocol):
    """Rows to score, in a fixed order."""

    @property
    def windows(self) -> Sequence[Batch]: ...


class RunData(Protocol):
    """Everything a run reads."""

    @property
    def windows(self) -> Windows:
        """To train on, without end."""

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """`EvalSet`s by name, `HELD_OUT` first."""

    @property
    def described(self) -> str:
        """For the first line of a run."""

    def identity(self) -> str:
        """What a run is scored on: figures of different sets must not be one curve."""


class Headline(NamedTuple):
    """The figure of a held-out set that a run is known by."""

    name: str
    larger_is_better: bool

    def better(self, value: float, than: float | None) -> bool:
        return than is None or (value > than if self.larger_is_better else value < than)


class Task(Protocol):
    """Made of a configuration: `task_of(config)`."""

    unit: ClassVar[str]
    """Of work, as in "tokens per second"."""
    scored: ClassVar[str]
    """What is held out, as in "the held-out documents"."""
    rules: ClassVar[Sequence[Rule]]
    """Shardings of parameters."""
    batch_spec: ClassVar[PartitionSpec]
    """Of every array of a batch."""

    @property
    def headline(self) -> Headline:
        """What its runs are known by."""

    # The model and its step

    def build(self, rngs: nnx.Rngs) -> Any:
        """The model."""

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of every array of a batch."""

    def check_batch(self, mesh: Mesh) -> None:
        """A part of the batch splits evenly over the mesh, or a `UserError` says why not."""

    def loss(self, model: Any, batch: dict[str, Array], key: Array) -> tuple[Array, Array]:
        """Sum of the weighted losses in nats and sum of the weights; `key` is another one at each step."""

    def sums(self, model: Any, batch: dict[str, Array]) -> dict[str, Array]:
        """What an evaluation adds up over batches; "weight" is among it."""

    def figures(self, sums: Mapping[str, np.ndarray], evaluated: Any) -> dict[str, float]:
        """The figures of a set, from its `sums`."""

    def in_training(self, loss: float, loaded: Any) -> dict[str, float]:
        """What is shown and logged of a step beside its loss."""

    @property
    def units(self) -> int:
        """Units of work in a step."""

    def flops(self, model: Any) -> float:
        """Of the forward pass of a step."""

    def smaller(self, mesh: Mapping[str, int], allowed: Callable[..., bool]) -> Iterator[str]:
        """Overrides that make every device hold less, with reasons; `allowed(axis=size)` tells which meshes fit."""

    # The run

    @property
    def begins_elsewhere(self) -> bool:
        """Whether the first state is made of another run's, and is therefore saved before the first step."""

    def check(self) -> None:
        """Whether a run can begin at all, or a `UserError`."""

    def load(self, workdir: Path) -> Any:
        """A `RunData`."""

    def given(self, loaded: Any, sources: Sequence[str], field: str) -> Any:
        """An `EvalSet` of what `python -m train eval --data` names."""

    def begin(
        self,
        workdir: Path,
        program: Program,
        state: TrainState,
        loaded: Any,
        data: TrainData,
        stop: Stop,
        say: Callable[[str], None],
    ) -> TrainState | None:
        """The state to train on from a fresh one; `None` when a signal stopped it."""

    def last_figures(self, program: Program, weights: Any, loaded: Any) -> dict[str, Any]:
        """Of the summary, what takes all processes to find."""

    def finish(self, workdir: Path, model: Any, loaded: Any, step: int, say: Callable[[str], None]) -> dict[str, Any]:
        """Leave in `workdir` what is the task's own; of the summary, the last fields, "baselines" among them."""

    def result(self, summary: Mapping[str, Any]) -> str:
        """The figure of a finished run in words."""


class Panel(NamedTuple):
    """Curves in the report: columns of metrics.jsonl over another.

    Attributes:
      caption, alt: above the drawing, and for those who cannot see it.
      abscissa: "step" or "seconds".
      training: column of the training curve, or `None`.
      held_out: column of the held-out curve.
      baselines: whether those are drawn too.
      log: a logarithmic ordinate.
    """

    caption: str
    alt: str
    abscissa: str
    training: str | None
    held_out: str
    baselines: bool = False
    log: bool = True


class Page(NamedTuple):
    """What is a task's own in the report of a run: `page(config)` of its module, of a config.json.

    Attributes:
      headline: its held-out value is the number of the page.
      form: that number as text.
      of: what the number is, before "on held-out text" or "in training".
      held_out: "on held-out text".
      training: whether the headline is also a column of training, for a run that has not been validated.
      title, panels: of the curves.
      sections: (workdir, summary) -> HTML between the curves and the baselines.
      baselines, note: their title, and what their numbers are.
    """

    headline: Headline
    form: Callable[[float], str]
    of: str
    held_out: str
    training: bool
    unit: str
    title: str
    panels: tuple[Panel, ...]
    sections: Callable[[Path, Mapping[str, Any]], str]
    baselines: str
    note: str


def smaller_batches(data: Any, devices: int, rows: str) -> Iterator[str]:
    """Overrides that halve what a device takes of a batch at a time, which is spread over `devices`."""
    each = data.batch // data.accumulate // devices
    if each % 2 == 0:
        yield f"--data.accumulate {2 * data.accumulate}   the batch in parts, {each // 2} {rows} a device"
        yield f"--data.batch {data.batch // 2}   half of the {rows}"


def task_of(config: CommonConfig) -> Task:
    """The task of a run of `config`."""
    return module_of(config.task).make(config)


def module_of(name: str) -> Any:
    return importlib.import_module(f"train.tasks.{name}")
