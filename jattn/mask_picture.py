"""Pictures of a mask: text for a terminal, SVG for a notebook. A row for each query, a column for each key.

As long as it fits, a cell is one (query, key) pair. Beyond, a cell is a block of pairs, drawn as empty, partial or full
from `block_kinds`, so a mask over a million positions is drawn as fast as one over thirty-two.
"""

from __future__ import annotations

import html
import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from jattn.checks import check_count

if TYPE_CHECKING:
    from jattn.masks import Mask

TEXT_CELLS, SVG_CELLS = 36, 64
_GLYPHS = np.array(["· ", "▒▒", "██"])


def picture(mask: Mask, q_len: int = 32, kv_len: int | None = None) -> str:
    """`mask` in block characters with labelled axes; `kv_len=None` is `q_len`."""
    kinds, block, caption = _cells(mask, q_len, kv_len, TEXT_CELLS)
    return draw_text(kinds, (block, block), caption)


def svg(mask: Mask, q_len: int = 32, kv_len: int | None = None) -> str:
    """`mask` as an SVG image."""
    kinds, _, caption = _cells(mask, q_len, kv_len, SVG_CELLS)
    return draw_svg(kinds, caption)


def coarse(kinds: Int[np.ndarray, "rows cols"], most: int) -> tuple[Int[np.ndarray, "cells columns"], int]:
    """The kinds of at most `most` by `most` cells, and how many of `kinds` a cell is high and wide."""
    size = math.ceil(max(kinds.shape) / most)
    if size == 1:
        return kinds, 1
    beyond = [(0, -n % size) for n in kinds.shape]

    def cells(filler: int) -> np.ndarray:
        padded = np.pad(kinds, beyond, constant_values=filler)
        return padded.reshape(padded.shape[0] // size, size, padded.shape[1] // size, size)

    return cells(0).any(axis=(1, 3)) * 1 + (cells(2) == 2).all(axis=(1, 3)), size


def draw_text(kinds: Int[np.ndarray, "rows cols"], cell: tuple[int, int], caption: str) -> str:
    """The kinds of cells of `cell = (queries, keys)` positions in block characters."""
    first, last = cell[0] * (len(kinds) - 1), cell[1] * (kinds.shape[1] - 1)
    width = max(len("queries"), len(str(first)))
    head = f"{0:<{max(2 * kinds.shape[1] - len(str(last)), 1)}}{last if last else ''}".rstrip()
    lines = [caption, f"{'':{width}}  keys", f"{'queries':>{width}}  {head}"]
    lines += [f"{row * cell[0]:>{width}}  {''.join(_GLYPHS[line]).rstrip()}" for row, line in enumerate(kinds)]
    return "\n".join(lines)


def draw_svg(kinds: Int[np.ndarray, "rows cols"], caption: str) -> str:
    """The kinds of cells in colours that read on light and on dark backgrounds."""
    rows, cols = kinds.shape
    cell, left, top = 10, 24, 40
    width, height = max(left + cols * cell + 6, 8 * len(caption)), top + rows * cell + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="monospace" font-size="12" fill="#888">',
        f"<title>{html.escape(caption)}</title>",
        f'<text x="2" y="14">{html.escape(caption)}</text>',
        f'<text x="{left}" y="{top - 6}">keys →</text>',
        f'<text transform="translate({left - 8},{top}) rotate(90)">queries →</text>',
        f'<rect x="{left}" y="{top}" width="{cols * cell}" height="{rows * cell}" fill="#888" fill-opacity="0.18"/>',
    ]
    for row, kinds_of_row in enumerate(kinds):
        edges = np.flatnonzero(np.diff(kinds_of_row, prepend=0, append=0))
        for start, stop in itertools.pairwise(edges):
            if kind := kinds_of_row[start]:
                parts.append(
                    f'<rect x="{left + start * cell}" y="{top + row * cell}" width="{(stop - start) * cell - 1}" '
                    f'height="{cell - 1}" fill="#3b8ff0" fill-opacity="{1 if kind == 2 else 0.45}"/>'
                )
    return "\n".join([*parts, "</svg>"])


def _cells(mask: Mask, q_len: int, kv_len: int | None, most: int) -> tuple[np.ndarray, int, str]:
    """The kind of every cell, the positions per cell and the caption."""
    kv_len = q_len if kv_len is None else kv_len
    longest = max(check_count("q_len", q_len), check_count("kv_len", kv_len))
    if longest <= most:
        return np.where(mask.dense(q_len, kv_len), 2, 0), 1, repr(mask)
    block = -(-longest // most)
    return mask.block_kinds(q_len, kv_len, block, block), block, f"{mask!r}   one cell is {block} x {block} positions"
