"""Which backbone reads digits best, at equal parameters and steps? Recipe digits_nat, five folds of all 1,797 scans.

Half an hour of runs in runs/benchmark_digits, which go on where they were stopped; the curves are kept as a picture.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from benchmarks.measure import RESULTS, Result
from train.compare import carry_out, of_models
from train.recipes import digits_nat

FOLDS = 5
STEPS = 400
WORKDIR = Path("runs/benchmark_digits")


def run() -> Result:
    config, models = digits_nat.config(), digits_nat.models()
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, steps=STEPS))
    found = carry_out("digits_nat", of_models(config, models, tuple(models), FOLDS), WORKDIR)
    if found is None:
        raise KeyboardInterrupt
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(WORKDIR / "comparison.svg", RESULTS / "digits.svg")
    rows = []
    for model, figures in found["models"].items():
        means = {name: of_folds["mean"] for name, of_folds in figures.items()}
        rows.append(
            {
                "model": model,
                "parameters": round(means["params"]),
                "accuracy": means["accuracy"],
                "accuracy, std": figures["accuracy"]["std"],
                "images/s": means["images_per_second"],
                "seconds": means["seconds"],
            }
        )
    sizes = [row["parameters"] for row in rows]
    return Result(
        f"Accuracy on a held-out fifth, {FOLDS} folds, {STEPS} steps of 64 images",
        rows,
        [("parameters, largest over smallest", max(sizes) / min(sizes), 1.02, "at most")],
    )
