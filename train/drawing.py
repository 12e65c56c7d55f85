"""Curves and matrices as inline SVG.

Curves, raw points and over them the curve under a Gaussian window, are drawn by matplotlib with six placeholder colours
that become CSS variables, so the one drawing follows the reader's light or dark setting.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from train.progress import count

# Placeholders: `#0N0N0N` in the drawing is `var(--cN)` in the page.
INK, MUTED, RULE, TRAIN, HELD_OUT, BASELINE = (f"#0{n}0{n}0{n}" for n in range(1, 7))

BINS = 400  # points of a smoothed curve
DOTS = 500  # raw points drawn, evenly taken from all
LEFT, RIGHT, BOTTOM, TOP = 44, 16, 40, 10  # margins of a drawing, in CSS pixels
MOST_NAMES = 20  # rows of a matrix that have room for names and numbers
LABELS, FIGURES = 112, 52  # the right margin where it holds names, or only numbers


def _smooth(values: np.ndarray) -> np.ndarray:
    """`values` under a Gaussian window of a sixtieth of the curve."""
    sigma = max(1.0, len(values) / 60)
    reach = min(int(3 * sigma), (len(values) - 1) // 2)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(values, window, mode="same") / np.convolve(np.ones_like(values), window, mode="same")


def _binned(values: np.ndarray) -> np.ndarray:
    """`values` averaged down to at most `BINS` points."""
    edges = np.linspace(0, len(values), min(BINS, len(values)) + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def _log_ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers in [low, high], the densest set that keeps to that; high > 1.6 low."""
    for steps in (
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9),
        (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
        (1, 1.5, 2, 3, 4, 6, 8),
        (1, 2, 3, 5),
        (1, 3),
        (1,),
    ):
        decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 7:
            return ticks
    return ticks[:: -(-len(ticks) // 7)]


def time_unit(seconds: np.ndarray) -> tuple[float, str]:
    longest = np.nanmax(seconds, initial=0.0)
    return next(
        (size, name)
        for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        if longest >= 2 * size or size == 1.0
    )


def draw(
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
      labels: write where each curve ends, and the baselines, at the right margin.
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
        ends = []
        for values, colour, exact in series:
            # A row may have been of something else: a validation at the same step has no loss of training.
            known = np.isfinite(values * x)
            at, values = x[known], values[known]
            dots = slice(None, None, -(-len(at) // DOTS))
            if exact or len(at) < 8:
                size_of_dot = 3.6 if len(at) <= 50 else 0
                axes.plot(
                    at[dots], values[dots], "o-", color=colour, linewidth=1.6, markersize=size_of_dot, clip_on=False
                )
                ends.append((values[-1], colour))
                continue
            axes.plot(at[dots], values[dots], "o", color=colour, alpha=0.35, markersize=2.2, markeredgewidth=0)
            curve = _smooth(_binned(np.log(values) if log else values))
            curve = np.exp(curve) if log else curve
            axes.plot(_binned(at), curve, color=colour, linewidth=1.8)
            ends.append((curve[-1], colour))
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
            texts = [(float(value), f"{value:.3f}", colour) for value, colour in ends]
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
    """As `count`, without zeros at the end: 0.05, 40k, 1.2M."""
    if abs(value) < 1000:
        return f"{value:.4g}"
    text = count(value)
    return f"{float(text[:-1]):g}{text[-1]}"


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


def matrix(counts: np.ndarray, names: Sequence[str]) -> str:
    """Counts [rows, columns] as squares whose strength is their share of the row; both axes have the same names.

    The diagonal has another colour than the rest. Numbers are written where there is room for them.
    """
    size, cell, longest = len(names), max(2.0, min(40.0, 640 / len(names))), max(map(len, names))
    named = size <= MOST_NAMES
    upright = 7 * longest > cell  # then names are written upwards
    left, top = (14 + 7 * longest, 14 + 7 * longest if upright else 24) if named else (8, 8)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    parts = []
    for row, column in zip(*np.nonzero(counts), strict=True):
        x, y, share = left + column * cell, top + row * cell, float(shares[row, column])
        colour = "--c4" if row == column else "--c5"
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
            f'fill="var({colour})" fill-opacity="{0.15 + 0.85 * share:.2f}"/>'
        )
        if named:
            ink = "--card" if share > 0.5 else "--c1"
            middle = f'x="{x + cell / 2:.1f}" y="{y + cell / 2:.1f}" text-anchor="middle" dominant-baseline="central"'
            parts.append(f'<text {middle} font-size="11" fill="var({ink})">{counts[row, column]}</text>')
    if named:
        for index, name in enumerate(names):
            place = (index + 0.5) * cell
            text = f'font-size="12" fill="var(--c2)">{escape(name)}</text>'
            parts.append(
                f'<text x="{left - 6}" y="{top + place:.1f}" text-anchor="end" dominant-baseline="central" {text}'
            )
            x, y = f"{left + place:.1f}", f"{top - 8}"
            turned = f'text-anchor="start" transform="rotate(-90 {x} {y})" dominant-baseline="central"'
            parts.append(f'<text x="{x}" y="{y}" {turned if upright else 'text-anchor="middle"'} {text}')
    side = size * cell
    frame = f'<rect x="{left}" y="{top}" width="{side:.1f}" height="{side:.1f}" fill="none" stroke="var(--c3)"/>'
    box = f'viewBox="0 0 {left + side + 8:.0f} {top + side + 8:.0f}"'
    return f'<svg role="img" aria-label="Confusion matrix" {box}>{frame}{"".join(parts)}</svg>'
