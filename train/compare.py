"""The same budget for several token mixers: a table, a plot and JSON of what each reaches, over seeds.

    python -m train compare pydoc_lm --mixers softmax lightning lightning+sliding_window --seeds 3

Every mixer and seed is a run of its own in WORKDIR/MIXER/seed_K, which goes on by itself like any other, so an
interrupted comparison goes on too. All runs share the recipe, its schedule and its data; only `model.pattern` differs.
A figure is the mean over the seeds and, where there are several, their standard deviation (n - 1).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from train import metrics
from train.config import RunConfig, load_recipe, parse_arguments, parse_overrides
from train.data.load import HELD_OUT
from train.errors import UserError, user_errors
from train.progress import clock, count
from train.workdir import environment, make_folder, or_none, write_json

FIGURES = ("bits_per_byte", "accuracy", "params", "tokens_per_second", "seconds", "steps")
"""What is averaged over the seeds."""

GRID = 60
"""Points of a curve."""

INK, MUTED, RULE = "#1c2024", "#6a7078", "#e7e5df"
COLOURS = ("#2f6db3", "#d2601a", "#2b8a62", "#8653a6", "#a8891c", "#b8336a", "#4c9fb0", "#6a7078")

type Runs = dict[str, list[dict[str, Any]]]
"""By mixer, one mapping for each finished seed: mixer, seed, workdir, `FIGURES` and the whole evaluation."""


@dataclasses.dataclass(frozen=True)
class _Options:
    """Train several mixers alike. Other options are overrides of the recipe: python -m train run RECIPE --help."""

    mixers: tuple[str, ...]
    """Catalog names; several joined by + take turns as layers, as in lightning+sliding_window."""
    seeds: int = 3
    """Runs of each mixer; their seeds count up from the recipe's."""
    workdir: Path | None = None
    """Where runs and results go; runs/compare_RECIPE by default."""


def main(arguments: list[str]) -> None:
    """`python -m train compare`: run what is not finished, then write and print the comparison.

    Raises:
      UserError: options that fit no run, or, after everything else is done, runs that failed.
    """
    if {"-h", "--help"} & {*arguments}:
        arguments = ["RECIPE", "--help"]
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            "compare: expected a recipe first, as in python -m train compare pydoc_lm --mixers softmax lightning"
        )
    recipe, arguments = arguments[0], arguments[1:]
    options, overrides = parse_arguments(_Options, arguments, "compare RECIPE", return_unknown_args=True)
    if any(override.split("=")[0] == "--model.pattern" for override in overrides):
        raise UserError("--model.pattern: is what a comparison varies; name the patterns after --mixers")
    config = parse_overrides(load_recipe(recipe), overrides)
    compare(
        recipe, config, options.mixers, options.seeds, options.workdir or Path("runs") / f"compare_{Path(recipe).stem}"
    )


def compare(recipe: str, config: RunConfig, mixers: Sequence[str], seeds: int, workdir: Path) -> dict[str, Any] | None:
    """Run `config` with each of `mixers` and `seeds` seeds in `workdir`, and return what `comparison.json` then holds.

    `None` when a signal stopped it; the same call goes on.

    Raises:
      UserError: a mixer that is unknown or fits not, before anything runs; runs that failed, after everything else.
    """
    from train import loop

    if seeds < 1:
        raise UserError(f"--seeds: expected at least 1, got {seeds}")
    twice = [mixer for index, mixer in enumerate(mixers) if mixer in mixers[:index]]
    if not mixers or twice:
        raise UserError(
            f"--mixers: {twice[0]!r} is named twice" if twice else "--mixers: expected at least one mixer, got none"
        )
    variants = {mixer: with_mixer(config, mixer) for mixer in mixers}
    make_folder(workdir)
    runs: Runs = {mixer: [] for mixer in mixers}
    failed: dict[str, str] = {}
    # By seed first, so that a comparison that is stopped early has as much of one mixer as of another.
    for seed in range(config.seed, config.seed + seeds):
        for mixer, variant in variants.items():
            folder = Path(mixer) / f"seed_{seed}"
            try:
                summary = loop.run(dataclasses.replace(variant, seed=seed), workdir / folder)
            except UserError as error:
                failed[str(folder)] = str(error)
                print(f"{workdir / folder}: failed: {error}")
                continue
            if "stopped" in summary:
                print(f"{workdir}: the comparison stopped in {folder}; the same command goes on")
                return None
            runs[mixer].append(_figures(summary, mixer, seed, folder))
    result = {
        "recipe": recipe,
        "seeds": list(range(config.seed, config.seed + seeds)),
        "headline": headline(runs),
        "mixers": {mixer: _over_seeds(finished) for mixer, finished in runs.items() if finished},
        "runs": [run for finished in runs.values() for run in finished],
        "failed": failed,
        "settings": {mixer: dataclasses.asdict(variant) for mixer, variant in variants.items()},
        "environment": environment(),
    }
    write_json(workdir / "comparison.json", result)
    if result["runs"]:
        plot(runs, workdir)
        show(result, Console(width=None if sys.stdout.isatty() else 120))
        print(f"{workdir}: comparison.json, comparison.png, comparison.svg")
    if failed:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in failed.items())
        raise UserError(f"{len(failed)} of {seeds * len(mixers)} runs failed ({reasons})")
    return result


def with_mixer(config: RunConfig, mixer: str) -> RunConfig:
    """`config` with the layers that `mixer` names.

    Options that the recipe gives a mixer go with it. A window that no recipe sets is a quarter of the context, as in
    the recipes: the layer's own default may be longer than the context, and would then be full attention.

    Raises:
      UserError: an unknown mixer, or more of them than the layers are a multiple of.
    """
    pattern = tuple(mixer.split("+"))
    defaults: dict[str, Mapping[str, Any]] = {"sliding_window": {"window": max(1, config.data.context // 4)}}
    given = {**defaults, **config.model.mixer_options}
    with user_errors(f"--mixers {mixer}"):
        mixer_options = {name: given[name] for name in pattern if name in given}
        model = dataclasses.replace(config.model, pattern=pattern, mixer_options=mixer_options)
    return dataclasses.replace(config, model=model)


def headline(runs: Runs) -> Literal["accuracy", "bits_per_byte"]:
    """The figure that mixers are compared by: accuracy where the task has one."""
    return "accuracy" if any("accuracy" in run for finished in runs.values() for run in finished) else "bits_per_byte"


def _figures(summary: Mapping[str, Any], mixer: str, seed: int, folder: Path) -> dict[str, Any]:
    """What a comparison keeps of a run's summary."""
    own = summary["evaluation"][HELD_OUT]
    kept = {"mixer": mixer, "seed": seed, "workdir": str(folder), "evaluation": summary["evaluation"]}
    kept |= {name: summary[name] for name in FIGURES if name in summary}
    return kept | {name: own[name] for name in FIGURES if name in own}


def _over_seeds(finished: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation of each figure; the latter is `None` for a single run."""
    table: dict[str, dict[str, float | None]] = {}
    for name in FIGURES:
        values = [run[name] for run in finished if run.get(name) is not None]
        if values:
            std = statistics.stdev(values) if len(values) > 1 else None
            table[name] = {"mean": or_none(statistics.fmean(values)), "std": or_none(std)}
    return table


# What a person sees


def show(result: Mapping[str, Any], console: Console) -> None:
    """The table, best mixer first."""
    name = result["headline"]
    sign = -1 if name == "accuracy" else 1
    columns: dict[str, tuple[str, Any]] = {
        "params": ("parameters", count),
        "bits_per_byte": ("bits per byte", "{:.4f}".format),
        "accuracy": ("accuracy", "{:.4f}".format),
        "tokens_per_second": ("tokens/s", count),
        "seconds": ("time", clock),
        "steps": ("steps", "{:.0f}".format),
    }
    shown = [key for key in columns if any(key in figures for figures in result["mixers"].values())]
    table = Table(title=f"{result['recipe']}, {len(result['seeds'])} seed(s), held-out figures", title_justify="left")
    table.add_column("mixer", overflow="fold")
    for key in shown:
        table.add_column(columns[key][0], justify="right")

    def rank(figures: Mapping[str, Any]) -> float:
        value = figures.get(name, {}).get("mean")
        return math.inf if value is None else sign * value

    for mixer, figures in sorted(result["mixers"].items(), key=lambda item: rank(item[1])):
        cells = []
        for key in shown:
            value, form = figures.get(key), columns[key][1]
            if value is None or value["mean"] is None:
                cells.append("-")
            elif key in ("bits_per_byte", "accuracy") and value["std"] is not None:
                cells.append(f"{form(value['mean'])} ± {value['std']:.4f}")
            else:
                cells.append(form(value["mean"]))
        table.add_row(mixer, *cells)
    console.print(table)


def plot(runs: Runs, workdir: Path) -> None:
    """Write `comparison.png` and `comparison.svg`: curves with the seeds as a band, and the final figures as points."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    name = headline(runs)
    label = name.replace("_", " ")
    shown = {mixer: finished for mixer, finished in runs.items() if finished}
    colours = {mixer: COLOURS[index % len(COLOURS)] for index, mixer in enumerate(runs)}
    rows = [metrics.read(workdir / run["workdir"] / "metrics.jsonl") for finished in shown.values() for run in finished]
    validated = min(sum(f"val_{name}" in row for row in one) for one in rows) > 2
    field = f"val_{name}" if validated else "bits_per_byte"
    with mpl.rc_context({"svg.hashsalt": "jattn", "font.size": 11, "axes.edgecolor": RULE, "text.color": INK}):
        figure = Figure(figsize=(11, 4.4), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        for index, (mixer, finished) in enumerate(shown.items()):
            colour = colours[mixer]
            steps, seeds = curves([workdir / run["workdir"] for run in finished], field)
            left.plot(steps, seeds.mean(0), color=colour, linewidth=1.8, label=mixer)
            left.fill_between(steps, seeds.min(0), seeds.max(0), color=colour, alpha=0.2, linewidth=0)
            values = [run[name] for run in finished if run.get(name) is not None]
            if values:
                right.plot(values, [index] * len(values), "o", color=colour, alpha=0.6, markersize=6)
                right.vlines(statistics.fmean(values), index - 0.25, index + 0.25, color=colour, linewidth=2.2)
        what = "held out" if validated else "in training"
        left.set(xlabel="step", ylabel=f"{field.removeprefix('val_').replace('_', ' ')}, {what}")
        left.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        left.legend(frameon=False)
        right.set(xlabel=f"{label}, held out, at the end", ylim=(len(shown) - 0.4, -0.6))
        right.set_yticks(range(len(shown)), [mixer.replace("+", " +\n") for mixer in shown])
        right.xaxis.set_major_locator(MaxNLocator(5))
        if name == "accuracy":
            right.set_xlim(-0.03, 1.03)
        for axes, along in ((left, "y"), (right, "x")):
            axes.grid(axis=along, color=RULE, linewidth=1)
            axes.set_axisbelow(True)
            axes.tick_params(length=0, colors=MUTED)
            axes.xaxis.label.set_color(MUTED)
            axes.yaxis.label.set_color(MUTED)
            axes.spines[["top", "left", "right"]].set_visible(False)
        figure.savefig(workdir / "comparison.png", dpi=160)
        figure.savefig(workdir / "comparison.svg", metadata={"Date": None})


def curves(workdirs: Sequence[Path], field: str) -> tuple[np.ndarray, np.ndarray]:
    """A field of several runs' metrics at common steps: [points] steps and [runs, points] values.

    A point of a curve that is logged more often than the grid is the mean of the rows around it; between rows that are
    further apart it is interpolated. The grid ends where the shortest run does.
    """
    logged = []
    for workdir in workdirs:
        rows = metrics.read(workdir / "metrics.jsonl")
        pairs = [(row["step"], row[field]) for row in rows if row.get(field) is not None]
        logged.append(np.array(pairs, dtype=np.float64).reshape(-1, 2).T)
    known = [one for one in logged if one.size]
    if not known:
        return np.zeros(0), np.zeros((len(workdirs), 0))
    grid = np.linspace(max(one[0, 0] for one in known), min(one[0, -1] for one in known), GRID)
    width = (grid[-1] - grid[0]) / (GRID - 1)
    values = []
    for steps, one in known:
        near = np.abs(steps[None] - grid[:, None]) <= width / 2
        total = near.sum(1)
        mean = (near * one).sum(1) / np.maximum(total, 1)
        values.append(np.where(total > 0, mean, np.interp(grid, steps, one)))
    return grid, np.array(values)
