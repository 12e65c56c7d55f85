"""Windows of coordinates: key s is at point c(s), and query t may attend to it if low(t) <= c(s) < high(t) on all axes.

Neighborhoods in grids are of this form. Windows belong to pairs in partial blocks, as an element rule does, and to a
group of batch rows: row b has those of group b mod G. The points of keys are the same for all.

All axes are asked at once where coordinates are small: a number has a field for each axis with a guard bit above it,
which a difference leaves as it is where it is not negative there. With all guards g,

    seen_ts = ((c(s) + g - low(t)) & (high(t) - 1 + g - c(s)) & g) == g
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class Windows(NamedTuple):
    """Of every query, on each of the axes, and where keys are.

    Attributes:
      low, high: where windows begin, and the first place beyond them.
      place: the coordinates of keys.
    """

    low: Int[Array | np.ndarray, "G axes T"]
    high: Int[Array | np.ndarray, "G axes T"]
    place: Int[Array | np.ndarray, "axes S"]


def check_windows(windows: Any, *, batch: int, q_len: int, kv_len: int) -> None:
    """Raises `ValueError` for windows that do not belong to the sizes."""
    groups, axes = windows.low.shape[0], windows.place.shape[0]
    shapes = tuple(tuple(x.shape) for x in windows)
    if shapes != ((groups, axes, q_len), (groups, axes, q_len), (axes, kv_len)) or not groups or batch % groups:
        raise ValueError(
            f"windows: expected low and high [G, axes, {q_len}] with G a divisor of {batch} batch rows, and place "
            f"[axes, {kv_len}], got {', '.join(str(list(shape)) for shape in shapes)}"
        )
    if not all(np.issubdtype(x.dtype, np.integer) for x in windows):
        raise ValueError(f"windows: expected integers, got {[str(x.dtype) for x in windows]}")


def whole_windows(windows: Any) -> Windows:
    """As arrays of 32-bit integers."""
    return Windows(*(jnp.asarray(x, np.int32) for x in windows))


def packed(windows: Windows) -> tuple[Windows, int]:
    """As windows of one axis: low, high - 1 + g and c above, and g; with a g of 0 as they were.

    They are as they were where they have one axis, are no arrays of NumPy, or too large for 31 bits.
    """
    axes = len(windows.place)
    if axes < 2 or not all(isinstance(x, np.ndarray) for x in windows):
        return windows, 0
    low, high, place = (np.asarray(x) for x in windows)
    if min(low.min(), high.min(), place.min()) < 0:
        return windows, 0
    bits = [max(int(x.max()).bit_length() for x in (low[:, a], high[:, a], place[a])) for a in range(axes)]
    if sum(bits) + axes > 31:
        return windows, 0
    above = np.cumsum([1 + each for each in bits]) - 1  # where the guards are
    shifts = above - np.array(bits)
    guards = sum(1 << bit for bit in above.tolist())

    def together(x: np.ndarray, axis: int) -> np.ndarray:
        shape = [axes if i == axis else 1 for i in range(x.ndim)]
        return (x.astype(np.int64) << shifts.reshape(shape)).sum(axis=axis, keepdims=True)

    last = together(high, 1) - sum(1 << shift for shift in shifts.tolist()) + guards
    return Windows(*(x.astype(np.int32) for x in (together(low, 1), last, together(place, 0)))), guards
