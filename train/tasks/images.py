"""Image classification.

loss = sum_b w_b (-sum_c t'_bc log p_c(image_b)) / sum_b w_b,    t' = (1 - s) t + s / classes, s label smoothing
accuracy = share of the held-out images whose likeliest class is theirs
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from jattn.models import vision
from train import sharding
from train.baselines import FITTED_AT_MOST, logistic_baseline
from train.data.image_folder import FolderImages
from train.data.image_rows import ImageData, ImageSet, as_float, load_images
from train.data.images import read_images
from train.data.pipeline import TrainData
from train.drawing import matrix
from train.errors import UserError, user_errors
from train.evaluate import add_up
from train.image_config import ImageRunConfig
from train.signals import Stop
from train.step import Program, TrainState
from train.tasks import HELD_OUT, Headline, Page, Panel, smaller_batches

HEADLINE = Headline("accuracy", larger_is_better=True)


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """See `train.tasks.Task`."""

    config: ImageRunConfig

    headline: ClassVar[Headline] = HEADLINE
    unit: ClassVar[str] = "images"
    scored: ClassVar[str] = "images"
    # These models are small beside what they compute: whole on every device.
    rules: ClassVar[Sequence[sharding.Rule]] = ((r".*", ()),)
    batch_spec: ClassVar[PartitionSpec] = PartitionSpec(sharding.ROWS)

    def build(self, rngs: nnx.Rngs) -> Any:
        return vision.build(self.config.model, rngs=rngs)

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        data, model = self.config.data, self.config.model
        shapes = {"images": (*data.size, model.in_channels), "targets": (model.num_classes,), "weights": ()}
        return {name: ((data.batch, *shape), jnp.float32) for name, shape in shapes.items()}

    def check_batch(self, mesh: Mesh) -> None:
        data = self.config.data
        for axis in ("fsdp", "tensor", "context"):
            if mesh.shape[axis] > 1:
                raise UserError(
                    f"mesh.{axis}: an image model is whole on every device, so expected 1, got {mesh.shape[axis]}; "
                    f"mesh.data spreads the images"
                )
        sharding.check_rows(mesh, data.batch // data.accumulate, self.config.rows)

    def loss(self, model: Any, batch: dict[str, Array], key: Array) -> tuple[Array, Array]:
        logits = model(batch["images"], train=True, key=key)
        targets = optax.smooth_labels(batch["targets"], self.config.label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])

    def sums(self, model: Any, batch: dict[str, Array]) -> dict[str, Array]:
        """ "loss" in nats, "weight", and "confusion" [classes, classes]: images of a class (row) by what they are
        taken for (column).
        """
        logits, weights = model(batch["images"]), batch["weights"]
        losses = optax.softmax_cross_entropy(logits, batch["targets"])
        taken_for = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1])
        confusion = jnp.einsum("b,bc,bd->cd", weights, batch["targets"], taken_for)
        return {"loss": jnp.sum(losses * weights), "weight": jnp.sum(weights), "confusion": confusion}

    def figures(self, sums: Mapping[str, np.ndarray], evaluated: ImageSet) -> dict[str, float]:
        return {
            "accuracy": float(np.trace(sums["confusion"]) / sums["weight"]),
            "loss": float(sums["loss"] / sums["weight"]),
        }

    def in_training(self, loss: float, loaded: ImageData) -> dict[str, float]:
        return {}

    @property
    def units(self) -> int:
        return self.config.data.batch

    def flops(self, model: Any) -> float:
        with user_errors("data.size"):
            return model.flops(self.config.data.batch, *self.config.data.size)

    def smaller(self, mesh: Mapping[str, int], allowed: Callable[..., bool]) -> Iterator[str]:
        yield from smaller_batches(self.config.data, mesh["data"], self.config.rows)

    @property
    def begins_elsewhere(self) -> bool:
        return False

    def check(self) -> None:
        """Nothing can be wrong that the data and the model do not show."""

    def load(self, workdir: Path) -> ImageData:
        return load_images(self.config)

    def given(self, loaded: ImageData, sources: Sequence[str], field: str) -> ImageSet:
        if len(sources) != 1:
            raise UserError(f"--data: expected one folder or .npz of images, got {len(sources)}")
        found = read_images(sources[0], self.config.data.size, self.config.model.in_channels)
        known = loaded.training.classes
        others = [name for name in found.classes if name not in known]
        if others:
            raise UserError(
                f"--data: {sources[0]} has classes that the run does not know ({', '.join(others[:5])}); it knows "
                f"{', '.join(known)}"
            )
        labels = np.array([known.index(name) for name in found.classes])[found.labels]
        return ImageSet(dataclasses.replace(found, labels=labels, classes=known), loaded.normalisation)

    def begin(
        self,
        workdir: Path,
        program: Program,
        state: TrainState,
        loaded: ImageData,
        data: TrainData,
        stop: Stop,
        say: Callable[[str], None],
    ) -> TrainState | None:
        return state

    def last_figures(self, program: Program, weights: Any, loaded: ImageData) -> dict[str, Any]:
        data = self.config.data
        sums = add_up(program, weights, loaded.evaluation[HELD_OUT], data.batch // data.accumulate)
        normalisation = loaded.normalisation
        return {
            "classes": list(loaded.training.classes),
            "confusion": np.rint(sums["confusion"]).astype(int).tolist(),
            "images": {"training": len(loaded.training), "held_out": len(loaded.held_out)},
            "skipped_files": list(loaded.training.skipped),
            "normalisation": {"mean": normalisation.mean.tolist(), "deviation": normalisation.deviation.tolist()},
        }

    def finish(
        self, workdir: Path, model: Any, loaded: ImageData, step: int, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """What a linear classifier makes of the pixels, where they are few."""
        images = loaded.training.images
        if isinstance(images, FolderImages) or images.size > FITTED_AT_MOST:
            return {"baselines": {}}
        training, held_out = (
            (loaded.normalisation(as_float(side.sample())).reshape(len(side), -1), side.labels)
            for side in (loaded.training, loaded.held_out)
        )
        return {"baselines": logistic_baseline(*training, *held_out)}

    def result(self, summary: Mapping[str, Any]) -> str:
        value = summary["val_accuracy"]
        beside = "".join(f", {name} {value:.2%}" for name, value in summary["baselines"].items())
        return f"{value:.2%} of {summary['images']['held_out']:,} held-out images are taken for what they are{beside};"


make = ImageTask


def _confusion(workdir: Path, summary: Mapping[str, Any]) -> str:
    """The confusion matrix of a summary, and its largest entries beside the diagonal."""
    counts, classes = np.array(summary.get("confusion") or []), [str(name) for name in summary.get("classes") or []]
    if counts.shape != (len(classes), len(classes)) or not counts.sum():
        return ""
    wrong = sorted(
        (
            (int(counts[row, column]), row, column)
            for row, column in zip(*np.nonzero(counts), strict=True)
            if row != column
        ),
        key=lambda entry: (-entry[0], entry[1:]),
    )
    lines = "".join(
        f'<tr><th>{escape(classes[row])} taken for {escape(classes[column])}</th><td class="number">{number}</td></tr>'
        for number, row, column in wrong[:10]
    )
    table = f"<table>{lines}</table>" if lines else '<p class="note">None.</p>'
    return (
        '<section><h2>What is taken for what</h2><p class="note">Held-out images: a row is what they are, a column '
        f'what the model takes them for.</p><div class="two"><figure>{matrix(counts, classes)}</figure>'
        f"<div><h2>Most frequent mistakes</h2>{table}</div></div></section>"
    )


_PAGE = Page(
    headline=HEADLINE,
    form="{:.2%}".format,
    of="accuracy",
    held_out="on held-out images",
    training=False,
    unit="images",
    title="Accuracy and loss",
    panels=(
        Panel("accuracy by step", "Accuracy by step", "step", None, "val_accuracy", baselines=True, log=False),
        Panel("loss by step, in nats; in training, of changed images", "Loss by step", "step", "loss", "val_loss"),
    ),
    sections=_confusion,
    baselines="Against a linear classifier",
    note="Accuracy on the same images; more is better.",
)


def page(config: Mapping[str, Any]) -> Page:
    return _PAGE
