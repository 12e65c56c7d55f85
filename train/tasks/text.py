"""Language models on text, and on synthetic recall.

loss = sum_t w_t (-log p(x_{t+1} | x_1 .. x_t)) / sum_t w_t;    bits per byte = all nats / ln 2 / bytes of the text

Recall has no bytes: bits per token = loss / ln 2, and accuracy = share of the answers that are the likeliest token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from jattn.models.generate import generate
from jattn.models.lm import LM
from train import convert, sharding
from train.baselines import compressor_baselines
from train.config import RunConfig
from train.data.load import EvalSet, RunData, load_data, text_set
from train.data.pipeline import TrainData
from train.data.sources import read_documents
from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.signals import Stop
from train.step import Program, TrainState
from train.tasks import Headline, Page, Panel, smaller_batches
from train.workdir import read_json, write_json

OF_TEXT = Headline("bits_per_byte", larger_is_better=False)
OF_RECALL = Headline("accuracy", larger_is_better=True)


@dataclasses.dataclass(frozen=True)
class TextTask:
    """See `train.tasks.Task`."""

    config: RunConfig

    unit: ClassVar[str] = "tokens"
    scored: ClassVar[str] = "documents"
    rules: ClassVar[Sequence[sharding.Rule]] = sharding.RULES
    batch_spec: ClassVar[PartitionSpec] = sharding.batch_spec()

    @property
    def recall(self) -> bool:
        return self.config.data.recall.task is not None

    @property
    def headline(self) -> Headline:
        return OF_RECALL if self.recall else OF_TEXT

    def build(self, rngs: nnx.Rngs) -> LM:
        return LM(self.config.model, rngs=rngs)

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        size: tuple[int, ...] = (self.config.data.batch, self.config.data.context)
        integers = ("tokens", "targets", "segment_ids", "positions")
        return {name: (size, jnp.int32) for name in integers} | {"weights": (size, jnp.float32)}  # noqa: C420

    def check_batch(self, mesh: Mesh) -> None:
        data = self.config.data
        sharding.check_batch(mesh, data.batch // data.accumulate, data.context)

    def loss(self, model: LM, batch: dict[str, Array], key: Array) -> tuple[Array, Array]:
        losses = model.loss(
            batch["tokens"], batch["targets"], positions=batch["positions"], segment_ids=batch["segment_ids"]
        )
        return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])

    def sums(self, model: LM, batch: dict[str, Array]) -> dict[str, Array]:
        """ "loss" in nats, "weight", and for recall "correct", the weight of the targets that are the likeliest."""
        loss, weight = self.loss(model, batch, jax.random.key(0))
        sums = {"loss": loss, "weight": weight}
        if self.recall:
            logits, _ = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
            sums["correct"] = jnp.sum((jnp.argmax(logits, -1) == batch["targets"]) * batch["weights"])
        return sums

    def figures(self, sums: Mapping[str, np.ndarray], evaluated: EvalSet) -> dict[str, float]:
        """Of text "bits_per_byte", the cross-entropy of all tokens over the bytes of their text; of recall "accuracy"
        and "bits_per_token".
        """
        bits = float(sums["loss"]) / math.log(2)
        if evaluated.bytes is not None:
            return {"bits_per_byte": bits / evaluated.bytes}
        weight = float(sums["weight"])
        return {"accuracy": float(sums["correct"]) / weight, "bits_per_token": bits / weight}

    def in_training(self, loss: float, loaded: RunData) -> dict[str, float]:
        bits = loss / math.log(2)
        return {"bits_per_token": bits} if self.recall else {"bits_per_byte": bits * loaded.tokens_per_byte}

    @property
    def units(self) -> int:
        return self.config.data.batch * self.config.data.context

    def flops(self, model: LM) -> float:
        return model.flops(self.config.data.batch, self.config.data.context)

    def smaller(self, mesh: Mapping[str, int], allowed: Callable[..., bool]) -> Iterator[str]:
        model, data = self.config.model, self.config.data
        rows = mesh["data"] * mesh["fsdp"]
        layers = f"{model.num_layers} layers"

        def flags(**axes: int) -> str:
            return " ".join(f"--mesh.{axis} {size}" for axis, size in axes.items())

        if model.remat == "none":
            yield f"--model.remat dots   keep only matmul results of {layers} for the backward pass"
        if model.remat != "full":
            yield f"--model.remat full   keep only the input of each unit of {layers}"
        if mesh["data"] > 1 and allowed(data=1, fsdp=rows):
            yield f"{flags(data=1, fsdp=rows)}   weights and optimiser over {rows} devices, not {mesh['fsdp']}"
        yield from smaller_batches(data, rows, self.config.rows)
        for axis, why in (("context", "tokens of a sequence"), ("tensor", "heads and channels of a layer")):
            for source in ("data", "fsdp"):
                moved = {source: mesh[source] // 2, axis: 2 * mesh[axis]}
                if mesh[source] % 2 == 0 and allowed(**moved):
                    yield f"{flags(**moved)}   {why} over {2 * mesh[axis]} devices"
                    break
        if data.context % (2 * mesh["context"]) == 0:
            yield f"--data.context {data.context // 2}   half of the tokens in a sequence"

    @property
    def begins_elsewhere(self) -> bool:
        return self.config.conversion.source is not None

    def check(self) -> None:
        if self.begins_elsewhere:
            convert.check_source(self.config)

    def load(self, workdir: Path) -> RunData:
        return load_data(self.config, workdir)

    def given(self, loaded: RunData, sources: Sequence[str], field: str) -> EvalSet:
        if loaded.tokenizer is None:
            raise UserError(f"--data: the run was trained on {self.config.data.recall.task}, which is no text")
        return text_set(read_documents(sources, field), loaded.tokenizer, self.config.data.context, "--data")

    def begin(
        self,
        workdir: Path,
        program: Program,
        state: TrainState,
        loaded: RunData,
        data: TrainData,
        stop: Stop,
        say: Callable[[str], None],
    ) -> TrainState | None:
        if not self.begins_elsewhere:
            return state
        return convert.converted(self.config, workdir, program, state, loaded, data, stop, say)

    def last_figures(self, program: Program, weights: Any, loaded: RunData) -> dict[str, Any]:
        return {}

    def finish(
        self, workdir: Path, model: LM, loaded: RunData, step: int, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Sample text, and what compressors make of the held-out text."""
        samples = []
        # Sampling is a program of one process; a model spread over many is sampled afterwards: `train sample`.
        if loaded.tokenizer is not None and jax.process_count() == 1:
            say("writing sample text")
            samples = [
                {"step": step, "prompt": prompt, "text": write_text(model, self.config, loaded.tokenizer, prompt)}
                for prompt in self.config.sample.prompts
            ]
        write_json(workdir / "samples.json", samples)
        for sample in samples:
            say(f"\n{sample['prompt']}{sample['text']}\n")
        return {"baselines": compressor_baselines(loaded.training, loaded.held_out) if loaded.training else {}}

    def result(self, summary: Mapping[str, Any]) -> str:
        if self.recall:
            return f"{summary['val_accuracy']:.2%} of the held-out answers are right"
        value = summary["val_bits_per_byte"]
        return f"{math.nan if value is None else value:.3f} bits per byte on held-out data"


make = TextTask


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


def _samples(workdir: Path, summary: Mapping[str, Any]) -> str:
    """The text of samples.json: [{"step", "prompt", "text"}, ...]."""
    samples = read_json(workdir / "samples.json") or []
    if not samples:
        return ""

    def block(sample: Mapping[str, Any]) -> str:
        prompt, text = str(sample.get("prompt") or ""), str(sample.get("text") or "")
        return f"<pre><b>{escape(prompt)}</b>{escape(text.removeprefix(prompt))}</pre>"

    by_step: dict[int, list[str]] = {}
    for sample in samples:
        by_step.setdefault(int(sample.get("step") or 0), []).append(block(sample))
    *earlier, newest = sorted(by_step)
    older = "".join(
        f"<details><summary>step {step:,}</summary>{''.join(by_step[step])}</details>" for step in reversed(earlier)
    )
    return (
        f'<section><h2>What it writes</h2><p class="note">After step {newest:,}. The prompt is in bold.</p>'
        f"{''.join(by_step[newest])}{older}</section>"
    )


def page(config: Mapping[str, Any]) -> Page:
    return _PAGE_OF_RECALL if config.get("data", {}).get("recall", {}).get("task") else _PAGE


def _panel(abscissa: str, caption: str) -> Panel:
    return Panel(caption, f"Bits per byte {caption}", abscissa, "bits_per_byte", "val_bits_per_byte", baselines=True)


_PAGE = Page(
    headline=OF_TEXT,
    form="{:.3f}".format,
    of="bits per byte",
    held_out="on held-out text",
    training=True,
    unit="tokens",
    title="Bits per byte",
    panels=(_panel("step", "by step"), _panel("seconds", "by time")),
    sections=_samples,
    baselines="Against other compressors",
    note="Bits per byte on the same text; fewer are better.",
)
_PAGE_OF_RECALL = _PAGE._replace(
    headline=OF_RECALL,
    form="{:.2%}".format,
    of="accuracy",
    held_out="on held-out answers",
    training=False,
    title="Accuracy and bits per token",
    panels=(
        Panel("accuracy by step", "Accuracy by step", "step", None, "val_accuracy", log=False),
        Panel("bits per token by step", "Bits per token by step", "step", "bits_per_token", "val_bits_per_token"),
    ),
)
