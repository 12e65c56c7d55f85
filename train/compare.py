"""The same budget for several token mixers or image models: a table, a plot and JSON of what each reaches.

    python -m train compare pydoc_lm --mixers softmax lightning lightning+sliding_window --seeds 3
    python -m train compare digits_nat --models nat van ela_resnet vit --folds 5

Every mixer and seed (model and fold) is a run of its own in WORKDIR/MIXER/seed_K, which goes on by itself like any
other, so an interrupted comparison goes on too. All runs share the recipe and its schedule; mixers differ in
`model.pattern`, and models are those of the recipe's `models()`, which has about as many parameters in each. A figure
is the mean over the seeds (folds) and, where there are several, their standard deviation (n - 1).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from train import metrics
from train.config import (
    CommonConfig,
    RunConfig,
    as_json,
    load_models,
    load_recipe,
    parse_arguments,
    parse_overrides,
)
from train.errors import UserError, user_errors
from train.progress import clock, count
from train.tasks import HELD_OUT
from train.workdir import environment, make_folder, read_json, write_json

FIGURES = (
    "accuracy",
    "bits_per_byte",
    "bits_per_token",
    "loss",
    "params",
    "tokens_per_second",
    "images_per_second",
    "seconds",
    "steps",
)
"""What is averaged over the seeds."""

GRID = 60
"""Points of a curve."""

INK, MUTED, RULE = "#1c2024", "#6a7078", "#e7e5df"
COLOURS = ("#2f6db3", "#d2601a", "#2b8a62", "#8653a6", "#a8891c", "#b8336a", "#4c9fb0", "#6a7078")

type Runs = dict[str, list[dict[str, Any]]]
"""By mixer, one mapping for each finished seed: mixer, seed, workdir, `FIGURES` and the whole evaluation."""


class Plan(NamedTuple):
    """What is run.

    Attributes:
      what, repeat: what is compared, and what a run of it differs in from its others: "mixer" and "seed".
      runs: configurations by name, and of each by the number of the repeat.
    """

    what: str
    repeat: str
    runs: Mapping[str, Mapping[int, CommonConfig]]


@dataclasses.dataclass(frozen=True)
class _Options:
    """Train several mixers, or image models, alike. Other options are overrides: python -m train run RECIPE --help."""

    mixers: tuple[str, ...] = ()
    """Of text: catalog names; several joined by + take turns as layers, as in lightning+sliding_window."""
    seeds: int | None = None
    """Of text: runs of each mixer, 3 by default; their seeds count up from the recipe's."""
    models: tuple[str, ...] = ()
    """Of images: names of the recipe's models."""
    folds: int | None = None
    """Of images: runs of each model, 5 by default; each holds out other images."""
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
    config = load_recipe(recipe)
    on_text = isinstance(config, RunConfig)
    wrong = {"--models": options.models, "--folds": options.folds}
    if not on_text:
        wrong = {"--mixers": options.mixers, "--seeds": options.seeds}
    for flag, given in wrong.items():
        if given:
            raise UserError(
                f"{flag}: {recipe} trains on {config.task}; {'--mixers' if on_text else '--models'} is for it"
            )
    varied, flag = ("--model.pattern", "mixers") if on_text else ("--model.", "models")
    for override in overrides:
        if override.split("=")[0] == varied or (not on_text and override.startswith(varied)):
            raise UserError(f"{override.split('=')[0]}: is what a comparison varies; name the {flag} after --{flag}")
    config = parse_overrides(config, overrides)
    workdir = options.workdir or Path("runs") / f"compare_{Path(recipe).stem}"
    if isinstance(config, RunConfig):
        compare(recipe, config, options.mixers, 3 if options.seeds is None else options.seeds, workdir)
    else:
        folds = 5 if options.folds is None else options.folds
        carry_out(recipe, of_models(config, load_models(recipe), options.models, folds), workdir)


def compare(recipe: str, config: RunConfig, mixers: Sequence[str], seeds: int, workdir: Path) -> dict[str, Any] | None:
    """Run `config` with each of `mixers` and `seeds` seeds in `workdir`; see `carry_out`."""
    return carry_out(recipe, of_mixers(config, mixers, seeds), workdir)


def of_mixers(config: RunConfig, mixers: Sequence[str], seeds: int) -> Plan:
    """`config` with each of the mixers and seeds.

    Raises:
      UserError: a mixer that is unknown or fits not.
    """
    _check_names("mixer", mixers)
    _check_count("seed", seeds)
    variants = {mixer: with_mixer(config, mixer) for mixer in mixers}
    numbers = range(config.seed, config.seed + seeds)
    return Plan(
        "mixer",
        "seed",
        {
            mixer: {seed: dataclasses.replace(variant, seed=seed) for seed in numbers}
            for mixer, variant in variants.items()
        },
    )


def of_models(config: CommonConfig, known: Mapping[str, Any], models: Sequence[str], folds: int) -> Plan:
    """`config` with each of the models that it knows by these names, and with each fold held out.

    Raises:
      UserError: an unknown model, or more folds than there are.
    """
    _check_names("model", models)
    _check_count("fold", folds)
    for model in models:
        if model not in known:
            there = f"its models() has {', '.join(known)}" if known else "it has no function models()"
            raise UserError(f"--models: the recipe knows no {model!r}; {there}")
    variants = {model: dataclasses.replace(config, model=known[model]) for model in models}
    return Plan(
        "model",
        "fold",
        {
            model: {
                fold: dataclasses.replace(variant, data=dataclasses.replace(variant.data, fold=fold))
                for fold in range(folds)
            }
            for model, variant in variants.items()
        },
    )


def _check_names(what: str, names: Sequence[str]) -> None:
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if not names or twice:
        raise UserError(
            f"--{what}s: {twice[0]!r} is named twice" if twice else f"--{what}s: expected at least one {what}, got none"
        )


def _check_count(repeat: str, number: int) -> None:
    if number < 1:
        raise UserError(f"--{repeat}s: expected at least 1, got {number}")


def carry_out(recipe: str, plan: Plan, workdir: Path) -> dict[str, Any] | None:
    """Make the runs of `plan` in `workdir`, and return what `comparison.json` then holds.

    `None` when a signal stopped it; the same call goes on.

    Raises:
      UserError: runs that failed, after everything else.
    """
    from train import loop

    numbers = list(next(iter(plan.runs.values())))
    _check_nothing_left_out(plan, numbers, workdir)
    make_folder(workdir)
    runs: Runs = {name: [] for name in plan.runs}
    failed: dict[str, str] = {}
    # By seed first, so that a comparison that is stopped early has as much of one mixer as of another.
    for number in numbers:
        for name, configs in plan.runs.items():
            folder = _folder(plan, name, number)
            try:
                summary = loop.run(configs[number], workdir / folder)
            except UserError as error:
                failed[str(folder)] = str(error)
                print(f"{workdir / folder}: failed: {error}")
                continue
            if "stopped" in summary:
                print(f"{workdir}: the comparison stopped in {folder}; the same command goes on")
                return None
            runs[name].append({plan.what: name, plan.repeat: number, "workdir": str(folder)} | _figures(summary))
    result = {
        "recipe": recipe,
        f"{plan.repeat}s": numbers,
        "headline": headline(runs),
        f"{plan.what}s": {name: _over_repeats(finished) for name, finished in runs.items() if finished},
        "runs": [run for finished in runs.values() for run in finished],
        "failed": failed,
        "settings": {name: as_json(configs[numbers[0]]) for name, configs in plan.runs.items()},
        "environment": environment(),
    }
    write_json(workdir / "comparison.json", result)
    if result["runs"]:
        plot(runs, workdir)
        show(plan, result, Console(width=None if sys.stdout.isatty() else 120))
        print(f"{workdir}: comparison.json, comparison.png, comparison.svg")
    if failed:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(numbers) * len(runs)} runs failed ({reasons})")
    return result


def _folder(plan: Plan, name: str, number: int) -> Path:
    return Path(name) / f"{plan.repeat}_{number}"


def _check_nothing_left_out(plan: Plan, numbers: Sequence[int], workdir: Path) -> None:
    """Runs that `workdir` already compares must not vanish from its table, nor a run get others into its folder."""
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir}: holds a run; a comparison makes runs of its own, so choose another --workdir")
    with user_errors("--workdir"):
        before = read_json(workdir / "comparison.json") or {"runs": []}
    planned = {str(_folder(plan, name, number)) for name in plan.runs for number in numbers}
    left_out = [run["workdir"] for run in before["runs"] if run["workdir"] not in planned]
    if left_out:
        raise UserError(
            f"{workdir}: compares runs that this command leaves out ({', '.join(left_out)}); name their "
            f"{plan.what}s and {plan.repeat}s too, for finished runs are not made again, or choose another --workdir"
        )


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


def _figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison keeps of a run's summary."""
    own = summary["evaluation"][HELD_OUT]
    kept = {"evaluation": summary["evaluation"]} | {name: summary[name] for name in FIGURES if name in summary}
    return kept | {name: own[name] for name in FIGURES if name in own}


def _over_repeats(finished: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation of each figure; the latter is `None` for a single run."""
    table: dict[str, dict[str, float | None]] = {}
    for name in FIGURES:
        values = [run[name] for run in finished if run.get(name) is not None]
        if values:
            std = statistics.stdev(values) if len(values) > 1 else None
            table[name] = {"mean": statistics.fmean(values), "std": std}
    return table


# What a person sees


def show(plan: Plan, result: Mapping[str, Any], console: Console) -> None:
    """The table, best first."""
    name, found = result["headline"], result[f"{plan.what}s"]
    sign = -1 if name == "accuracy" else 1
    columns: dict[str, tuple[str, Any]] = {
        "params": ("parameters", count),
        "accuracy": ("accuracy", "{:.4f}".format),
        "bits_per_byte": ("bits per byte", "{:.4f}".format),
        "bits_per_token": ("bits per token", "{:.4f}".format),
        "loss": ("loss", "{:.4f}".format),
        "tokens_per_second": ("tokens/s", count),
        "images_per_second": ("images/s", count),
        "seconds": ("time", clock),
        "steps": ("steps", "{:.0f}".format),
    }
    shown = [key for key in columns if any(key in figures for figures in found.values())]
    repeats = f"{len(result[f'{plan.repeat}s'])} {plan.repeat}(s)"
    table = Table(title=f"{result['recipe']}, {repeats}, held-out figures", title_justify="left")
    table.add_column(plan.what, overflow="fold")
    for key in shown:
        table.add_column(columns[key][0], justify="right")

    def rank(figures: Mapping[str, Any]) -> float:
        value = figures.get(name, {}).get("mean")
        return math.inf if value is None else sign * value

    for variant, figures in sorted(found.items(), key=lambda item: rank(item[1])):
        cells = []
        for key in shown:
            value, form = figures.get(key), columns[key][1]
            if value is None or value["mean"] is None:
                cells.append("-")
            elif key in ("accuracy", "bits_per_byte", "bits_per_token", "loss") and value["std"] is not None:
                cells.append(f"{form(value['mean'])} ± {value['std']:.4f}")
            else:
                cells.append(form(value["mean"]))
        table.add_row(variant, *cells)
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
    logged = {key for one in rows for row in one for key in row}
    of_training = next((key for key in ("bits_per_byte", "bits_per_token") if key in logged), "loss")
    field = f"val_{name}" if validated else of_training
    with mpl.rc_context({"svg.hashsalt": "jattn", "font.size": 11, "axes.edgecolor": RULE, "text.color": INK}):
        figure = Figure(figsize=(11, 4.4), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        for index, (mixer, finished) in enumerate(shown.items()):
            colour = colours[mixer]
            steps, seeds = curves([workdir / run["workdir"] for run in finished], field)
            marker = "o" if len({*steps}) == 1 else None  # a single point has no line
            left.plot(steps, seeds.mean(0), marker=marker, color=colour, linewidth=1.8, label=mixer)
            left.fill_between(steps, seeds.min(0), seeds.max(0), color=colour, alpha=0.2, linewidth=0)
            values = [run[name] for run in finished if run.get(name) is not None]
            if values:
                right.plot(values, [index] * len(values), "o", color=colour, alpha=0.6, markersize=6)
                right.vlines(statistics.fmean(values), index - 0.25, index + 0.25, color=colour, linewidth=2.2)
        what = "held out" if validated else "in training"
        left.set(xlabel="step", ylabel=f"{field.removeprefix('val_').replace('_', ' ')}, {what}")
        left.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        left.legend(frameon=False)
        right.set(xlabel=f"{label}, held out, at the end", ylim=(len(shown) - 0.4, -0.6))
        right.set_yticks(range(len(shown)), [mixer.replace("+", " +\n") for mixer in shown])
        right.xaxis.set_major_locator(MaxNLocator(5))
        # From 0, models that are all nearly right could not be told apart.
        if name == "accuracy" and min(run[name] for finished in shown.values() for run in finished) < 0.9:
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
