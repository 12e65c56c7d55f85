"""An order of the tokens of a picture or a video in which neighbours stay near: the generalised Hilbert curve.

A cuboid with a corner p and edges a, b, c (vectors along the axes) is walked from p to the other end of a. It is one
straight line where two edges have length 1. Else it is cut, with a = a1 + a2 and so on, into

    2 along a:                      a much longer than b and c
    3, two of them across a:        b much longer than c, or c than b, which is not cut then
    5, like a Hilbert curve's turn: edges of a kind

each of which is walked likewise, from where the last one ended. Halves are made even where they can be, so that steps
are to an adjacent token; sizes that are odd may cost single diagonal steps. (The curve of Cerveny's gilbert.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jattn.checks import check_count


def gilbert_order(width: int, height: int, depth: int = 1) -> Int[np.ndarray, " tokens"]:
    """Which token comes first, second, ... along the curve; PSA's order of video tokens (Li et al. 2025).

    >>> order = gilbert_order(width, height, frames)
    >>> x, back = x[:, order], np.argsort(order)  # and out[:, back] when attention is done

    Args:
      width, height, depth: of a grid whose token at column x, row y and frame z is number `(z height + y) width + x`.
        Tokens of no grid, such as those of a text, go behind: `np.append(order, np.arange(order.size, length))`.

    Returns:
      A read-only permutation of `width height depth` numbers, the same array for the same sizes.

    Raises:
      ValueError, TypeError: a size that is not a static integer of at least 1.
    """
    sizes = (check_count("width", width), check_count("height", height), check_count("depth", depth))
    return _order(*sizes)


@functools.lru_cache(maxsize=64)
def _order(width: int, height: int, depth: int) -> np.ndarray:
    sizes = (width, height, depth)
    axes = sorted(range(3), key=lambda axis: -sizes[axis])  # the curve runs along the longest edge
    edges = [_Edge(axis, sizes[axis]) for axis in axes]
    tokens = np.array([point for line in _lines((0, 0, 0), *edges) for point in line])
    order = (tokens[:, 2] * height + tokens[:, 1]) * width + tokens[:, 0]
    order.flags.writeable = False
    return order


Point = tuple[int, int, int]


class _Edge(NamedTuple):
    """An edge of a cuboid: `length` tokens along an axis, backwards if negative."""

    axis: int
    length: int

    def __abs__(self) -> int:
        return abs(self.length)

    def __neg__(self) -> _Edge:
        return _Edge(self.axis, -self.length)

    @property
    def sign(self) -> int:
        return 1 if self.length > 0 else -1

    def cut(self) -> tuple[_Edge, _Edge]:
        """Two parts; the first is even unless the edge has two tokens."""
        half = abs(self) // 2
        half += half % 2 and abs(self) > 2
        return _Edge(self.axis, self.sign * half), _Edge(self.axis, self.length - self.sign * half)


def _after(point: Point, *edges: _Edge) -> Point:
    """One token beyond the ends of these edges."""
    moved = list(point)
    for edge in edges:
        moved[edge.axis] += edge.length
    return moved[0], moved[1], moved[2]


def _end(point: Point, *edges: _Edge) -> Point:
    """The last token of these edges."""
    return _after(point, *(_Edge(edge.axis, edge.length - edge.sign) for edge in edges))


def _lines(p: Point, a: _Edge, b: _Edge, c: _Edge) -> Iterator[list[Point]]:
    """The straight lines that the walk through a cuboid consists of, from p to `_end(p, a)`."""
    long = [edge for edge in (a, b, c) if abs(edge) > 1]
    if len(long) <= 1:
        axis, length = long[0] if long else a
        sign = 1 if length > 0 else -1
        yield [_after(p, _Edge(axis, sign * i)) for i in range(abs(length))]
        return
    (a1, a2), (b1, b2), (c1, c2) = a.cut(), b.cut(), c.cut()
    if 2 * abs(a) > 3 * abs(b) and 2 * abs(a) > 3 * abs(c):
        yield from _lines(p, a1, b, c)
        yield from _lines(_after(p, a1), a2, b, c)
    elif 3 * abs(b) > 4 * abs(c):
        yield from _lines(p, b1, c, a1)
        yield from _lines(_after(p, b1), a, b2, c)
        yield from _lines(_end(p, a, b1), -b1, c, -a2)
    elif 3 * abs(c) > 4 * abs(b):
        yield from _lines(p, c1, a1, b)
        yield from _lines(_after(p, c1), a, b, c2)
        yield from _lines(_end(p, a, c1), -c1, -a2, b)
    else:
        yield from _lines(p, b1, c1, a1)
        yield from _lines(_after(p, b1), c, a1, b2)
        yield from _lines(_end(p, b1, c), a, -b1, -c2)
        yield from _lines(_after(_end(p, a, c), b1), -c, -a2, b2)
        yield from _lines(_end(p, a, b1), -b1, c1, -a2)
