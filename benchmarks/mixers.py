"""What do mixers learn in the same number of steps? Text (recipe pydoc_lm) and recall (recipe mqar), over seeds.

Half an hour of runs in runs/benchmark_mixers, which go on where they were stopped; the curves are kept as pictures.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, Result
from train.compare import compare
from train.config import RunConfig, ScheduleConfig
from train.recipes import mqar, pydoc_lm

MIXERS = ("softmax", "sliding_window", "lightning", "lightning+sliding_window")
SEEDS = 3
TEXT_STEPS = 250
WORKDIR = Path("runs/benchmark_mixers")


def run() -> Result:
    text = dataclasses.replace(pydoc_lm.config(), schedule=ScheduleConfig(steps=TEXT_STEPS))
    on_text, on_recall = (
        compared(recipe, config, MIXERS, SEEDS, WORKDIR, f"mixers_{recipe}")
        for recipe, config in (("pydoc_lm", text), ("mqar", mqar.config()))
    )
    bits = {mixer: figures["bits_per_byte"]["mean"] for mixer, figures in on_text["mixers"].items()}
    accuracy = {mixer: figures["accuracy"]["mean"] for mixer, figures in on_recall["mixers"].items()}
    return Result(
        f"{SEEDS} seeds each, held-out figures; pydoc_lm for {TEXT_STEPS} steps, mqar as it is",
        [row(result, mixer) for result in (on_text, on_recall) for mixer in MIXERS],
        [
            ("bits per byte of the hybrid over softmax", bits[MIXERS[-1]] / bits["softmax"], 1.02, "at most"),
            ("accuracy of softmax on mqar", accuracy["softmax"], 0.99, "at least"),
        ],
    )


def compared(
    recipe: str, config: RunConfig, mixers: Sequence[str], seeds: int, workdir: Path, picture: str
) -> dict[str, Any]:
    """What `compare` found; its curves are kept as `picture`.svg beside the results."""
    result = compare(recipe, config, mixers, seeds, workdir / recipe)
    if result is None:
        raise KeyboardInterrupt
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(workdir / recipe / "comparison.svg", RESULTS / f"{picture}.svg")
    return result


def row(result: dict[str, Any], mixer: str) -> dict[str, Any]:
    figures = result["mixers"][mixer]
    found: dict[str, Any] = {"recipe": result["recipe"], "mixer": mixer, "parameters": round(figures["params"]["mean"])}
    for title, name in (
        ("bits per byte", "bits_per_byte"),
        ("accuracy", "accuracy"),
        ("tokens/s", "tokens_per_second"),
    ):
        of_seeds = figures.get(name)
        found[title] = of_seeds["mean"] if of_seeds else "-"
        if name != "tokens_per_second":
            found[f"{title}, std"] = of_seeds["std"] if of_seeds else "-"
    return found
