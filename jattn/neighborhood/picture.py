"""Pictures of a neighborhood on a grid: the keys that one query sees. Text for a terminal, SVG for a notebook.

One axis is drawn from left to right, two as rows and columns, three as one plane below the other. On a grid with more
tokens along an axis than fit, a cell is a square of tokens, drawn as unseen, partly seen or seen.
"""

from __future__ import annotations

import dataclasses
import html

import numpy as np
from jaxtyping import Int

from jattn.mask_picture import SVG_CELLS, TEXT_CELLS, coarse

_GLYPHS = np.array(["· ", "▒▒", "██", "◆ "])
_OWN = 3


@dataclasses.dataclass(frozen=True)
class Picture:
    """The keys `seen [*grid]` that the query at `query` sees: itself as text, and as SVG where a notebook shows it."""

    caption: str
    seen: np.ndarray
    query: tuple[int, ...]

    def __str__(self) -> str:
        planes, cell = self._planes(TEXT_CELLS)
        lines = [self._caption(cell)]
        for plane in planes:
            lines += ["", *("".join(_GLYPHS[row]).rstrip() for row in plane)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_svg_(self) -> str:
        planes, cell = self._planes(SVG_CELLS)
        caption, size, top = html.escape(self._caption(cell)), 10, 24
        rows, cols = sum(len(plane) + 1 for plane in planes), planes[0].shape[1]
        fills = ["#888", "#3b8ff0", "#3b8ff0", "#f08a3b"]
        opacities = [0.18, 0.45, 1, 1]
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(cols * size, 8 * len(caption))}" '
            f'height="{top + rows * size}" font-family="monospace" font-size="12" fill="#888">',
            f"<title>{caption}</title>",
            f'<text x="0" y="14">{caption}</text>',
        ]
        for plane in planes:
            for (row, col), kind in np.ndenumerate(plane):
                parts.append(
                    f'<rect x="{col * size}" y="{top + row * size}" width="{size - 1}" height="{size - 1}" '
                    f'fill="{fills[kind]}" fill-opacity="{opacities[kind]}"/>'
                )
            top += (len(plane) + 1) * size
        return "\n".join([*parts, "</svg>"])

    def _planes(self, most: int) -> tuple[list[Int[np.ndarray, "rows cols"]], int]:
        """The kind of every cell, plane by plane, and how many tokens a cell is high and wide."""
        grid = (1,) * (3 - self.seen.ndim) + self.seen.shape
        own = (0,) * (3 - self.seen.ndim) + self.query
        drawn = []
        for at, plane in enumerate(self.seen.reshape(grid)):
            kinds, cell = coarse(np.where(plane, 2, 0), most)
            if at == own[0]:
                kinds[own[1] // cell, own[2] // cell] = _OWN
            drawn.append(kinds)
        return drawn, cell

    def _caption(self, cell: int) -> str:
        return self.caption if cell == 1 else f"{self.caption}   one cell is {cell} x {cell} tokens"
