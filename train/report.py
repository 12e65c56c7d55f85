"""The run as one page: `report.html`, written from the files of a workdir, which asks the network for nothing.

    metrics.jsonl     the curves (train.metrics)             summary.json      the final figures and baselines
    samples.json      [{"step", "prompt", "text"}, ...]      config.json, environment.json   tables

Any of them may be missing or short: the page shows what there is. Curves are drawn by matplotlib with six placeholder
colours that become CSS variables, so the one drawing follows the reader's light or dark setting.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from train import metrics
from train.progress import clock, count

# Placeholders: `#0N0N0N` in the drawing is `var(--cN)` in the page.
INK, MUTED, RULE, TRAIN, HELD_OUT, BASELINE = (f"#0{n}0{n}0{n}" for n in range(1, 7))

BINS = 400  # points of a smoothed curve
DOTS = 500  # raw points drawn, evenly taken from all
LEFT, RIGHT, BOTTOM, TOP = 44, 16, 40, 10  # margins of a drawing, in CSS pixels
LABELS, FIGURES = 112, 52  # the right margin where it holds names, or only numbers


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Write `report.html` into `workdir` and return its path.

    Raises:
      ValueError: a file is there but is damaged; the message names it.
    """
    workdir = Path(workdir)
    rows = metrics.read(workdir / "metrics.jsonl")
    summary = _load(workdir / "summary.json") or {}
    config = _load(workdir / "config.json") or {}
    environment = _load(workdir / "environment.json") or {}
    samples = _load(workdir / "samples.json") or []
    baselines = {name: float(value) for name, value in (summary.get("baselines") or {}).items()}
    name = str(config.get("name") or config.get("recipe") or workdir.resolve().name)
    figure, label = _final_figure(rows, summary)
    body = "\n".join(
        [
            _header(name, figure, label, rows, summary),
            _curves(rows, baselines),
            _samples(samples),
            _baselines(baselines, figure, label),
            _tables({"Configuration": config, "Environment": environment}),
        ]
    )
    title = name if figure is None else f"{name}: {figure:.3f} bits per byte"
    page = _PAGE.format(title=escape(title), style=_STYLE, body=body)
    path, draft = workdir / "report.html", workdir / "report.html.tmp"
    draft.write_bytes(page.encode("utf-8", "replace"))  # a sample may hold half a surrogate pair
    os.replace(draft, path)
    return path


def _load(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON ({error}); remove it or write it again") from error


def _column(rows: Sequence[metrics.Row], name: str) -> np.ndarray:
    """One field of all rows as float64, NaN where it is absent or null."""
    return np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)


def _last(rows: Sequence[metrics.Row], name: str) -> float | None:
    values = _column(rows, name)
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else None


def _final_figure(rows: Sequence[metrics.Row], summary: Mapping[str, Any]) -> tuple[float | None, str]:
    """The number of the run and what it is: on held-out text if that was measured."""
    held_out = summary.get("val_bits_per_byte")
    held_out = held_out if held_out is not None else _last(rows, "val_bits_per_byte")
    if held_out is not None:
        return float(held_out), "bits per byte on held-out text"
    return _last(rows, "bits_per_byte"), "bits per byte in training"


# The drawings


def _smooth(values: np.ndarray) -> np.ndarray:
    """`values` under a Gaussian window of a sixtieth of the curve; NaNs have no weight."""
    sigma = max(1.0, len(values) / 60)
    reach = min(int(3 * sigma), (len(values) - 1) // 2)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    known = np.isfinite(values)
    weight = np.convolve(known, window, mode="same")
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def _binned(values: np.ndarray) -> np.ndarray:
    """`values` averaged down to at most `BINS` points, without NaNs where a bin has any number."""
    edges = np.linspace(0, len(values), min(BINS, len(values)) + 1).astype(int)
    known = np.isfinite(values)
    number = np.add.reduceat(known, edges[:-1], dtype=np.float64)
    total = np.add.reduceat(np.where(known, values, 0.0), edges[:-1])
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def _log_ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers in [low, high], the densest set that keeps to that; high > 1.6 low."""
    for steps in (
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3),
        (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
        (1, 1.5, 2, 3, 4, 6),
        (1, 2, 3, 5),
        (1, 3),
        (1,),
    ):
        decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 7:
            return ticks
    return ticks[:: len(ticks) // 6]


def _time_unit(seconds: np.ndarray) -> tuple[float, str]:
    longest = np.nanmax(seconds, initial=0.0)
    return next(
        (size, name)
        for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        if longest >= 2 * size or size == 1.0
    )


def _draw(
    x: np.ndarray,
    series: Sequence[tuple[np.ndarray, str, bool]],
    *,
    x_label: str,
    alt: str,
    baselines: Mapping[str, float],
    labels: bool,
    log: bool,
    size: tuple[int, int],
) -> str:
    """One drawing as inline SVG, or "" if no series has a number.

    Args:
      x: [rows], the abscissa of all series.
      series: (values [rows], colour, whether the values are exact: then joined by a line, not smoothed).
      x_label, alt: text under the axis; text for those who cannot see it.
      baselines: name -> height of a dashed line.
      labels: write the last value of each curve, and the baselines, at the right margin.
      log: a logarithmic ordinate, for positive values.
      size: width and height in CSS pixels.
    """
    if log:
        series = [(np.where(values > 0, values, np.nan), colour, exact) for values, colour, exact in series]
    series = [curve for curve in series if np.isfinite(curve[0] * x).any()]
    if not series:
        return ""
    import matplotlib as mpl  # here, not above: it takes half a second, and a run needs it once
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    width, height = size
    right = (LABELS if baselines else FIGURES) if labels else RIGHT
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jattn", "font.size": 11}):
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes((LEFT / width, BOTTOM / height, 1 - (LEFT + right) / width, 1 - (BOTTOM + TOP) / height))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for values, colour, exact in series:
            known = np.flatnonzero(np.isfinite(values * x))
            dots = known[:: -(-len(known) // DOTS)]
            if exact or len(known) < 8:
                size_of_dot = 3.6 if len(known) <= 50 else 0
                axes.plot(
                    x[dots], values[dots], "o-", color=colour, linewidth=1.6, markersize=size_of_dot, clip_on=False
                )
                continue
            axes.plot(x[dots], values[dots], "o", color=colour, alpha=0.35, markersize=2.2, markeredgewidth=0)
            curve = _smooth(_binned(np.log(values) if log else values))
            axes.plot(_binned(x), np.exp(curve) if log else curve, color=colour, linewidth=1.8)
        heights = np.concatenate([values[np.isfinite(values * x)] for values, *_ in series])
        low, high = heights.min(), heights.max()
        shown = {name: value for name, value in baselines.items() if 0 < value <= 1.05 * high}
        low = min([low, *shown.values()])
        if log:
            axes.set_yscale("log")
            margin = max((high / low) ** 0.05, 1.02)
            low, high = low / margin, high * margin
            axes.set_ylim(low, high)
            axes.yaxis.set_major_locator(FixedLocator(_log_ticks(low, high)) if high > 1.6 * low else MaxNLocator(5))
        else:
            axes.set_ylim(0 if low >= 0 else 1.08 * low, 1.08 * high if high > 0 else 1.0)
            axes.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        longest = float(np.nanmax(x))
        axes.set_xlim(0, 1.02 * longest if longest > 0 else 1)
        axes.xaxis.set_major_locator(MaxNLocator(5 if width < 400 else 7, integer=x_label == "step"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.set_xlabel(x_label, color=MUTED, labelpad=6)
        axes.grid(axis="y", color=RULE, linewidth=1)
        axes.tick_params(length=0, pad=7, colors=MUTED)
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=RULE)
        for value in shown.values():
            axes.axhline(value, color=BASELINE, linewidth=1.2, linestyle=(0, (4, 3)))
        if labels:
            ends = [(float(values[np.isfinite(values * x)][-1]), colour) for values, colour, _ in series]
            texts = [(value, f"{value:.3f}", colour) for value, colour in ends]
            # Names go in afterwards: matplotlib would look for their letters in its own fonts.
            texts += [(value, f"@{index}@", BASELINE) for index, value in enumerate(shown.values())]
            _label_right(axes, texts)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    names = list(shown)
    svg = re.sub("@([0-9]+)@", lambda match: escape(_short(names[int(match[1])])), buffer.getvalue())
    return _inline(svg, alt)


def _label_right(axes: Any, texts: Sequence[tuple[float, str, str]]) -> None:
    """Write (height, text, colour) beside the axes, moved apart where they would touch."""
    to_fraction = axes.transData + axes.transAxes.inverted()
    texts = sorted(texts)
    places = [float(to_fraction.transform((0.0, value))[1]) for value, *_ in texts]
    gap = 15 / (axes.bbox.height / axes.figure.dpi * 72)
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + gap)
    for place, (_, text, colour) in zip(places, texts, strict=True):
        axes.text(1.015, place, text, color=colour, transform=axes.transAxes, verticalalignment="center_baseline")


def _tick(value: float) -> str:
    return count(value) if abs(value) >= 100_000 else f"{value:.4g}"


def _short(name: str) -> str:
    return name if len(name) <= 17 else name[:16] + "…"


def _inline(svg: str, alt: str) -> str:
    """matplotlib's SVG file as an element of a page: no prologue, no addresses, no clashing ids, CSS colours."""
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    drawing = svg[svg.index(">", svg.index("<svg")) + 1 :]
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", drawing, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", alt.lower())
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", drawing)
    drawing = re.sub(r"#0([1-6])(?:0\1){2}", r"var(--c\1)", drawing)
    return f'<svg role="img" aria-label="{escape(alt)}" {box.group()}>{drawing}'


# The sections


def _header(
    name: str, figure: float | None, label: str, rows: Sequence[metrics.Row], summary: Mapping[str, Any]
) -> str:
    def final(key: str, field: str) -> float | None:
        value = summary.get(key)
        return float(value) if value is not None else _last(rows, field)

    skipped = _last(rows, "skipped")
    facts = [
        ("steps", final("steps", "step"), lambda value: f"{value:,.0f}"),
        ("time", final("seconds", "seconds"), clock),
        ("tokens per second", final("tokens_per_second", "tokens_per_second"), count),
        ("parameters", summary.get("params"), count),
        ("MFU", final("mfu", "mfu"), lambda value: f"{100 * value:.1f}%"),
        ("updates skipped", skipped if skipped else None, lambda value: f"{value:,.0f}"),
    ]
    cells = "".join(
        f"<div><dt>{title}</dt><dd>{escape(form(value))}</dd></div>"
        for title, value, form in facts
        if value is not None
    )
    hero = (
        f'<p class="figure"><b>{figure:.3f}</b> <span>{label}</span></p>'
        if figure is not None
        else '<p class="figure"><span>No steps were logged yet.</span></p>'
    )
    return f'<header><p class="eyebrow">Training run</p><h1>{escape(name)}</h1>{hero}<dl>{cells}</dl></header>'


def _curves(rows: Sequence[metrics.Row], baselines: Mapping[str, float]) -> str:
    steps, seconds = _column(rows, "step"), _column(rows, "seconds")
    unit, unit_name = _time_unit(seconds)
    learning = [
        (_column(rows, "bits_per_byte"), TRAIN, False),
        (_column(rows, "val_bits_per_byte"), HELD_OUT, True),
    ]
    large, small = (536, 320), (348, 210)
    main = ""
    for x, label, caption in ((steps, "step", "by step"), (seconds / unit, unit_name, "by time")):
        alt = f"Bits per byte {caption}"
        svg = _draw(x, learning, x_label=label, alt=alt, baselines=baselines, labels=True, log=True, size=large)
        main += f"<figure><figcaption>{caption}</figcaption>{svg}</figure>" if svg else ""
    if not main:
        return ""
    keys = (
        [("train", "training"), ("held-out", "held out")]
        if np.isfinite(learning[1][0]).any()
        else [("train", "training")]
    )
    legend = "".join(f'<span class="{kind}">{text}</span>' for kind, text in keys)
    others = ""
    for name, title, log in (
        ("learning_rate", "Learning rate", False),
        ("tokens_per_second", "Tokens per second", False),
        ("grad_norm", "Gradient norm", True),
        ("mfu", "Model FLOP utilisation", False),
    ):
        svg = _draw(
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
        f'<section><h2>Bits per byte</h2><p class="legend">{legend}</p><div class="two">{main}</div></section>'
        f'<section><h2>The run itself</h2><div class="three">{others}</div></section>'
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
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


def _baselines(baselines: Mapping[str, float], figure: float | None, label: str) -> str:
    if not baselines:
        return ""
    entries = [(value, name, "") for name, value in baselines.items()]
    entries += [(figure, f"this model, {label.removeprefix('bits per byte ')}", "ours")] if figure is not None else []
    longest = max(value for value, *_ in entries) or 1.0
    lines = "".join(
        f'<tr class="{kind}"><th>{escape(name)}</th><td class="number">{value:.3f}</td>'
        f'<td class="bar"><i style="width: {100 * value / longest:.1f}%"></i></td></tr>'
        for value, name, kind in sorted(entries)
    )
    return (
        "<section><h2>Against other compressors</h2>"
        '<p class="note">Bits per byte on the same text; fewer are better.</p>'
        f'<table class="bars">{lines}</table></section>'
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
