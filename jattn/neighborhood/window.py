"""Which keys a query sees in neighborhood attention (Hassani et al. 2024; strides as in their paper of 2025).

An axis of X tokens with dilation d is d groups that do not see each other: token x is of group g = x mod d, has the
coordinate i = x div d in it, and the group has L = (X - g + d - 1) div d tokens. With window w and stride s, query i
sees the keys start <= j < end of its group, found from the leader l of its s neighbors:

    not causal:  l = min(s (i div s) + s div 2, L - 1)   start = min(max(l - w div 2, 0), L - w)   end = start + w
    causal:      l = min(s (i div s) + s - 1, L - 1)     start = max(l - w + 1, 0)                 end = i + 1

so that a window is moved inward at a border and never cut. On a grid a key is seen if it is seen along every axis:
causality is one of axes, not of the order of tokens. Conversely key j is seen by the queries qstart <= i < qend:

    not causal:  qstart = 0 if j < w else s ((j - r + o) div s)          r = w div 2 + w mod 2 - 1
                 qend = L if j >= L - w else s ((j + w div 2 + o + 1) div s)     o = s - s div 2 - 1
    causal:      qstart = j     qend = min(s ((j + w) div s + (1 if j + w >= L else 0)), L)

Both bounds never decrease along a group, a query sees itself, and needs w d <= X and s <= w are checked here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jattn.checks import check_count, check_flags
from jattn.neighborhood.picture import Picture

Bounds = tuple[Int32[np.ndarray, " X"], Int32[np.ndarray, " X"]]


class Axis(NamedTuple):
    """One axis of a grid with its part of a neighborhood."""

    extent: int
    window: int
    stride: int
    dilation: int
    is_causal: bool


@dataclasses.dataclass(frozen=True)
class Neighborhood:
    """Who sees whom on a grid: a hashable description, for grids of any extents that it fits.

    Attributes:
      kernel_size: how many keys a query sees along an axis, w.
      stride: how many neighboring queries share a window, s; 1 is a window of each query's own, w is blocks.
      dilation: the distance between the keys of a window, d.
      is_causal: whether keys after the query along this axis are hidden.

    Each is a number for all axes, or a tuple with one for each.
    """

    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rank = next((len(value) for value in fields.values() if isinstance(value, tuple)), 1)
        windows, strides, *_ = (_per_axis(name, value, rank, _CHECKS[name]) for name, value in fields.items())
        for a, (window, stride) in enumerate(zip(windows, strides, strict=True)):
            if stride > window:
                raise ValueError(
                    f"stride: {stride} on axis {a} is more than the window of {window}, which would leave keys unseen; "
                    f"pass at most kernel_size, where windows become blocks"
                )

    def on(self, grid: tuple[int, ...], clamp_window: bool = False) -> Neighborhood:
        """The same with a tuple for every attribute, checked against the extents of a grid.

        Args:
          clamp_window: a window that is too wide is made X div d, and a stride beyond it that as well.

        Raises:
          ValueError: a tuple of another length than the grid has axes; more groups than tokens; a window that reaches
            beyond the grid.
        """
        rank = len(grid)
        sizes, strides, dilations, causal = (
            _per_axis(name, getattr(self, name), rank, check) for name, check in _CHECKS.items()
        )
        for a, (extent, window, dilation) in enumerate(zip(grid, sizes, dilations, strict=True)):
            if dilation > extent:
                raise ValueError(
                    f"dilation: {dilation} on axis {a} of {extent} tokens leaves groups without a token; "
                    f"pass at most {extent}"
                )
            if window * dilation > extent and not clamp_window:
                raise ValueError(
                    f"kernel_size: a window of {window} with dilation {dilation} reaches over {window * dilation} "
                    f"tokens, axis {a} has {extent}; pass at most {extent // dilation}, or clamp_window=True, which "
                    f"takes that where a window is too wide"
                )
        sizes = tuple(min(w, extent // d) for w, extent, d in zip(sizes, grid, dilations, strict=True))
        strides = tuple(min(s, w) for s, w in zip(strides, sizes, strict=True))
        return Neighborhood(sizes, strides, dilations, causal)

    def axes(self, grid: tuple[int, ...]) -> tuple[Axis, ...]:
        """The axes of a grid that it fits."""
        fitted = dataclasses.astuple(self.on(grid))
        return tuple(Axis(*axis) for axis in zip(grid, *fitted, strict=True))

    def dense(self, grid: tuple[int, ...]) -> Bool[np.ndarray, "T T"]:
        """Who sees whom, pair by pair, tokens in row-major order; for tests and small grids."""
        rank, tokens = len(grid), math.prod(grid)
        seen = np.ones((*grid, *grid), bool)
        for a, axis in enumerate(self.axes(grid)):
            shape = [1] * (2 * rank)
            shape[a] = shape[rank + a] = axis.extent
            seen &= visible(axis).reshape(shape)
        return seen.reshape(tokens, tokens)

    def picture(self, grid: tuple[int, ...], query: tuple[int, ...] | None = None) -> Picture:
        """The keys that a query sees on a grid, as text in a terminal and as SVG in a notebook.

        Args:
          query: where the query is; `None` is the middle of the grid.

        Raises:
          ValueError, TypeError: as `on`; a query that is not on the grid.
        """
        axes = self.axes(grid)
        query = tuple(extent // 2 for extent in grid) if query is None else query
        if not isinstance(query, tuple) or len(query) != len(grid):
            raise ValueError(f"query: expected {len(grid)} coordinates in a tuple, one for each axis, got {query}")
        for a, (x, extent) in enumerate(zip(query, grid, strict=True)):
            if check_count(f"query[{a}]", x, minimum=0) >= extent:
                raise ValueError(f"query: axis {a} has the tokens 0 to {extent - 1}, got {x}")
        seen = np.ones((), bool)
        for axis, x in zip(axes, query, strict=True):
            seen = seen[..., None] & visible(axis)[x]
        return Picture(f"{self!r}, query {query} of {grid}", seen, query)

    def show(self, grid: tuple[int, ...], query: tuple[int, ...] | None = None) -> None:
        """Print `picture(grid, query)`."""
        print(self.picture(grid, query))


def window_bounds(extent: int, window: int, stride: int = 1, dilation: int = 1, is_causal: bool = False) -> Bounds:
    """`(start, end)` of every token of an axis, `[X]` each, in the coordinates of the token's group.

    `start[g::d]` are those of group g.

    Raises:
      ValueError, TypeError: no static integers, a stride or a window that does not fit.
    """
    axis = _check_axis(extent, window, stride, dilation, is_causal)
    i, length = _coordinates(axis)
    block = i // stride * stride
    if is_causal:
        leader = np.minimum(block + stride - 1, length - 1)
        return np.maximum(leader - window + 1, 0), i + 1
    leader = np.minimum(block + stride // 2, length - 1)
    start = np.clip(leader - window // 2, 0, length - window)
    return start, start + np.int32(window)


def inverse_window_bounds(
    extent: int, window: int, stride: int = 1, dilation: int = 1, is_causal: bool = False
) -> Bounds:
    """`(qstart, qend)` of every token of an axis: the queries of its group that see it as a key.

    Raises:
      ValueError, TypeError: as `window_bounds`.
    """
    axis = _check_axis(extent, window, stride, dilation, is_causal)
    j, length = _coordinates(axis)
    if is_causal:
        return j, np.minimum(((j + window) // stride + (j + window >= length)) * np.int32(stride), length)
    offset = stride - stride // 2 - 1
    right = window // 2 + window % 2 - 1
    first = np.where(j < window, 0, (j - right + offset) // stride * stride)
    last = np.where(j >= length - window, length, (j + window // 2 + offset + 1) // stride * stride)
    return first.astype(np.int32), last.astype(np.int32)


def visible(axis: Axis) -> Bool[np.ndarray, "X X"]:
    """Who sees whom along one axis, groups included."""
    start, end = window_bounds(*axis)
    x = np.arange(axis.extent)
    group, coordinate = x % axis.dilation, x // axis.dilation
    return (group[:, None] == group) & (start[:, None] <= coordinate) & (coordinate < end[:, None])


def group_lengths(axis: Axis) -> Int32[np.ndarray, " d"]:
    """How many tokens each dilation group has."""
    group = np.arange(axis.dilation, dtype=np.int32)
    return (axis.extent - group + axis.dilation - 1) // axis.dilation


def _coordinates(axis: Axis) -> Bounds:
    """The coordinate of every token in its group, and how many tokens the group has."""
    x = np.arange(axis.extent, dtype=np.int32)
    return x // axis.dilation, group_lengths(axis)[x % axis.dilation]


def _check_axis(extent: Any, window: Any, stride: Any, dilation: Any, is_causal: Any) -> Axis:
    check_count("extent", extent)
    return Neighborhood((window,), (stride,), (dilation,), (is_causal,)).axes((extent,))[0]


def per_axis(name: str, value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    """A static number of at least 1 for each of `rank` axes; one number serves all of them."""
    return _per_axis(name, value, rank, check_count)


def _per_axis(name: str, value: Any, rank: int, check: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        if isinstance(value, list):
            raise TypeError(f"{name}: expected a number or a tuple of {rank}, got a list; pass tuple({name})")
        return (check(name, value),) * rank
    if len(value) != rank:
        raise ValueError(f"{name}: expected a number or a tuple of {rank}, one for each axis, got {value}")
    return tuple(check(f"{name}[{a}]", each) for a, each in enumerate(value))


def _check_flag(name: str, value: Any) -> bool:
    check_flags(**{name: value})
    return bool(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "kernel_size": check_count,
    "stride": check_count,
    "dilation": check_count,
    "is_causal": _check_flag,
}
