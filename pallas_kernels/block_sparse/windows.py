"""Windows of coordinates: key s is at point c(s), and query t may attend to it if low(t) <= c(s) < high(t) on all axes.

Neighborhoods in grids are of this form. Windows belong to pairs in partial blocks, as an element rule does, and to a
group of batch rows: row b has those of group b mod G. The points of keys are the same for all.
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
