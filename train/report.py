"""The run as one page: `report.html`, written from the files of a workdir, which asks the network for nothing.

    metrics.jsonl     the curves (train.metrics)             summary.json      the final figures and baselines
    config.json, environment.json   tables

Any of them may be missing or short: the page shows what there is. What is a task's own, the names of its figures and
its samples or pictures, is the `page` of its module. Curves are drawn by `train.drawing`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from train import metrics
from train.drawing import HELD_OUT, TRAIN, draw, time_unit
from train.progress import clock, count
from train.tasks import HELD_OUT as OWN_SET
from train.tasks import Page, Panel, module_of
from train.workdir import or_none, read_json


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Write `report.html` into `workdir` and return its path.

    Raises:
      ValueError: a file is there but is damaged; the message names it.
    """
    workdir = Path(workdir)
    rows = metrics.read(workdir / "metrics.jsonl")
    summary = read_json(workdir / "summary.json") or {}
    config = read_json(workdir / "config.json") or {}
    environment = read_json(workdir / "environment.json") or {}
    own: Page = module_of(config.get("task", "text")).page(config)
    baselines = {name: float(value) for name, value in (summary.get("baselines") or {}).items()}
    name = str(config.get("name") or config.get("recipe") or workdir.resolve().name)
    figure, where = _final_figure(own, rows, summary)
    body = "\n".join(
        [
            _header(own, name, figure, where, rows, summary),
            _curves(own, rows, baselines),
            own.sections(workdir, summary),
            _baselines(own, baselines, figure, where),
            _tables({"Configuration": config, "Environment": environment}),
        ]
    )
    title = name if figure is None else f"{name}: {own.form(figure)} {own.of}"
    page = _PAGE.format(title=escape(title), style=_STYLE, body=body)
    path, draft = workdir / "report.html", workdir / "report.html.tmp"
    draft.write_bytes(page.encode("utf-8", "replace"))  # a sample may hold half a surrogate pair
    os.replace(draft, path)
    return path


def _column(rows: Sequence[metrics.Row], name: str) -> np.ndarray:
    """One field of all rows as float64, NaN where it is absent or null."""
    return np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)


def _last(rows: Sequence[metrics.Row], name: str) -> float | None:
    values = _column(rows, name)
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else None


def not_finite(summary: Mapping[str, Any]) -> list[str]:
    """Held-out figures that a finished run has no number for."""
    figures = summary.get("evaluation", {}).get(OWN_SET, {})
    return [name.replace("_", " ") for name, value in figures.items() if or_none(value) is None]


def _final_figure(own: Page, rows: Sequence[metrics.Row], summary: Mapping[str, Any]) -> tuple[float | None, str]:
    """The number of the run and what it was taken on: held-out data if that was measured."""
    if not_finite(summary):  # then an earlier one is not the run's
        return None, own.held_out
    name = own.headline.name
    held_out = summary.get(f"val_{name}")
    held_out = held_out if held_out is not None else _last(rows, f"val_{name}")
    if held_out is not None or not own.training:
        return None if held_out is None else float(held_out), own.held_out
    return _last(rows, name), "in training"


# The sections


def _header(
    own: Page,
    name: str,
    figure: float | None,
    where: str,
    rows: Sequence[metrics.Row],
    summary: Mapping[str, Any],
) -> str:
    def final(key: str, field: str) -> float | None:
        value = summary.get(key)
        return float(value) if value is not None else _last(rows, field)

    skipped = _last(rows, "skipped")
    facts = [
        ("steps", final("steps", "step"), lambda value: f"{value:,.0f}"),
        ("time", final("seconds", "seconds"), clock),
        (f"{own.unit} per second", final(f"{own.unit}_per_second", f"{own.unit}_per_second"), count),
        ("parameters", summary.get("params"), count),
        ("MFU", final("mfu", "mfu"), lambda value: f"{100 * value:.1f}%"),
        ("updates skipped", skipped if skipped else None, lambda value: f"{value:,.0f}"),
    ]
    cells = "".join(
        f"<div><dt>{title}</dt><dd>{escape(form(value))}</dd></div>"
        for title, value, form in facts
        if value is not None
    )
    if figure is not None:
        number = f"<b>{own.form(figure)}</b> <span>{own.of} {where}</span>"
    elif broken := not_finite(summary):
        number = f"<span>The run diverged: no finite {', '.join(broken)} {where} after its last step.</span>"
    else:
        number = f"<span>No steps were {'validated' if rows else 'logged'} yet.</span>"
    hero = f'<p class="figure">{number}</p>'
    return f'<header><p class="eyebrow">Training run</p><h1>{escape(name)}</h1>{hero}<dl>{cells}</dl></header>'


def _curves(own: Page, rows: Sequence[metrics.Row], baselines: Mapping[str, float]) -> str:
    steps, seconds = _column(rows, "step"), _column(rows, "seconds")
    unit, unit_name = time_unit(seconds)
    large, small = (536, 320), (348, 210)

    def drawn(panel: Panel) -> str:
        x, label = (steps, "step") if panel.abscissa == "step" else (seconds / unit, unit_name)
        learning = [(_column(rows, panel.training), TRAIN, False)] if panel.training else []
        learning.append((_column(rows, panel.held_out), HELD_OUT, True))
        shown = baselines if panel.baselines else {}
        svg = draw(x, learning, x_label=label, alt=panel.alt, baselines=shown, labels=True, log=panel.log, size=large)
        return f"<figure><figcaption>{panel.caption}</figcaption>{svg}</figure>" if svg else ""

    main = "".join(map(drawn, own.panels))
    if not main:
        return ""
    keys = [("train", "training")]
    if any(np.isfinite(_column(rows, panel.held_out)).any() for panel in own.panels):
        keys.append(("held-out", "held out"))
    legend = "".join(f'<span class="{kind}">{text}</span>' for kind, text in keys)
    others = ""
    for name, title, log in (
        ("learning_rate", "Learning rate", False),
        (f"{own.unit}_per_second", f"{own.unit.capitalize()} per second", False),
        ("grad_norm", "Gradient norm", True),
        ("mfu", "Model FLOP utilisation", False),
    ):
        svg = draw(
            steps,
            [(_column(rows, name), TRAIN, name == "learning_rate")],
            x_label="step",
            alt=f"{title} by step",
            baselines={},
            labels=False,
            log=log,
            size=small,
        )
        others += f"<figure><figcaption>{title}</figcaption>{svg}</figure>" if svg else ""
    return (
        f'<section><h2>{own.title}</h2><p class="legend">{legend}</p><div class="two">{main}</div></section>'
        f'<section><h2>The run itself</h2><div class="three">{others}</div></section>'
    )


def _baselines(own: Page, baselines: Mapping[str, float], figure: float | None, where: str) -> str:
    if not baselines:
        return ""
    entries = [(value, name, "") for name, value in baselines.items()]
    entries += [(figure, f"this model, {where}", "ours")] if figure is not None else []
    longest = max(value for value, *_ in entries) or 1.0
    lines = "".join(
        f'<tr class="{kind}"><th>{escape(name)}</th><td class="number">{own.form(value)}</td>'
        f'<td class="bar"><i style="width: {100 * value / longest:.1f}%"></i></td></tr>'
        for value, name, kind in sorted(entries, reverse=own.headline.larger_is_better)
    )
    return (
        f'<section><h2>{own.baselines}</h2><p class="note">{own.note}</p><table class="bars">{lines}</table></section>'
    )


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """A nested object as (dotted path, text) pairs."""
    if isinstance(value, Mapping) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and not any(isinstance(inner, (Mapping, list)) for inner in value):
        return [(path, ", ".join(map(str, value)))]
    return [(path, value if isinstance(value, str) else json.dumps(value))]


def _tables(tables: Mapping[str, Any]) -> str:
    sections = ""
    for title, value in tables.items():
        if value:
            lines = "".join(f"<tr><th>{escape(key)}</th><td>{escape(text)}</td></tr>" for key, text in _flat(value))
            sections += f"<section><h2>{title}</h2><table>{lines}</table></section>"
    return f'<div class="two">{sections}</div>' if sections else ""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf8; --card: #fff;
  --c1: #1c2024; --c2: #6a7078; --c3: #e7e5df; --c4: #2f6db3; --c5: #d2601a; --c6: #8d939b; }
@media (prefers-color-scheme: dark) { :root { --paper: #131519; --card: #1a1d22;
  --c1: #e9e6e0; --c2: #979ea8; --c3: #2c3037; --c4: #7db1ec; --c5: #f2955a; --c6: #757c86; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--c1); -webkit-font-smoothing: antialiased;
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1136px; margin: 0 auto; padding: 56px 24px 72px; }
h1 { margin: 0; font-size: 1.5rem; font-weight: 600; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 1.06rem; font-weight: 600; }
section { margin-top: 56px; min-width: 0; }
.eyebrow { margin: 0 0 4px; font-size: .75rem; letter-spacing: .1em; text-transform: uppercase; color: var(--c2); }
.figure { margin: 20px 0 28px -.2rem; display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 18px; }
.figure b { font-size: clamp(4rem, 11vw, 6.5rem); line-height: 1; font-weight: 650; letter-spacing: -0.045em;
  color: var(--c5); font-variant-numeric: tabular-nums; }
.figure span { font-size: 1.2rem; color: var(--c2); }
dl { display: flex; flex-wrap: wrap; margin: 0; padding-top: 18px; gap: 14px 48px; border-top: 1px solid var(--c3); }
dt { font-size: .82rem; color: var(--c2); }
dd { margin: 0; font-size: 1.22rem; font-weight: 550; font-variant-numeric: tabular-nums; }
.note, .legend, figcaption { margin: -6px 0 14px; font-size: .9rem; color: var(--c2); }
.legend span { margin-right: 20px; }
.legend span::before { content: ""; display: inline-block; width: 16px; height: 3px; margin: 0 8px 4px 0;
  border-radius: 2px; background: var(--c4); }
.legend .held-out::before { background: var(--c5); }
.two, .three { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); }
div.two > section { margin-top: 56px; }
figure { margin: 0; padding: 16px 16px 10px; min-width: 0; background: var(--card); border: 1px solid var(--c3);
  border-radius: 10px; }
figcaption { margin: 0 0 8px; }
svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; }
svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
pre { margin: 0 0 14px; padding: 20px 24px; max-height: 34rem; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .9rem/1.65 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace;
  background: var(--card); border: 1px solid var(--c3); border-left: 3px solid var(--c5); border-radius: 10px; }
details pre { margin-top: 10px; border-left-color: var(--c6); }
summary { padding: 5px 0; cursor: pointer; color: var(--c2); font-size: .9rem; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; }
th, td { padding: 6px 16px 6px 0; border-bottom: 1px solid var(--c3); text-align: left; vertical-align: top;
  font-weight: 400; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
th { width: 42%; color: var(--c2); }
.bars th { width: 30%; color: inherit; }
.bars .number { width: 5rem; text-align: right; padding-right: 24px; }
.bars td, .bars th { vertical-align: middle; padding-top: 9px; padding-bottom: 9px; }
.bars i { display: block; height: 10px; border-radius: 5px; background: var(--c6); opacity: .55; }
.bars .ours { font-weight: 600; } .bars .ours th, .bars .ours td { font-weight: 600; }
.bars .ours i { background: var(--c5); opacity: 1; }
@media (max-width: 560px) { main { padding: 32px 16px 48px; } section { margin-top: 40px; }
  .bars .bar { display: none; } }
@media print { figure, pre { break-inside: avoid; } }
"""
