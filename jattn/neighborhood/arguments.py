"""The arrays of a neighborhood attention call, and the checks that they pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float

from jattn.checks import bind_shapes, check_array, check_floating, check_grouped_heads, check_no_empty, check_same_dtype
from jattn.dot_product import check_addend
from jattn.neighborhood.window import Neighborhood

GRID = {1: "X", 2: "X Y", 3: "X Y Z"}
"""The letters of a grid's axes in messages."""


class Operands(NamedTuple):
    """The arrays of a call; those after `value` may be `None`.

    Attributes:
      additional_keys, additional_values: tokens that every query sees beside its window.
      rel_pos_bias: one number for each distance j - i along the axes, from 1 - w to w - 1.
      key_mask: False hides a key from all queries.
    """

    query: Float[Array, "B ... N H"]
    key: Float[Array, "B ... K H"]
    value: Float[Array, "B ... K V"]
    additional_keys: Float[Array, "B M K H"] | None = None
    additional_values: Float[Array, "B M K V"] | None = None
    rel_pos_bias: Float[Array, "N ..."] | None = None
    key_mask: Bool[Array, "B ..."] | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self.query.shape[1:-2])

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


def check_grid(name: str, x: Any, *, after: int = 2) -> int:
    """How many grid axes `x` has before its last `after` ones."""
    check_array(name, x)
    rank = x.ndim - 1 - after
    if rank not in GRID:
        wanted = {0: "[B, *grid]", 2: "[B, *grid, heads, width]"}[after]
        raise ValueError(f"{name}: expected {wanted} with 1, 2 or 3 grid axes, got shape {tuple(x.shape)}")
    return rank


def check_operands(x: Operands) -> dict[str, int]:
    """The sizes of a call whose arrays fit together, but for the window."""
    grid = GRID[check_grid("query", x.query)]
    check_array("key", x.key)
    check_array("value", x.value)
    sizes = bind_shapes(
        ("query", x.query, f"B {grid} N H"),
        ("key", x.key, f"B {grid} K H"),
        ("value", x.value, f"B {grid} K V"),
        ("additional_keys", x.additional_keys, "B M K H"),
        ("additional_values", x.additional_values, "B M K V"),
        ("key_mask", x.key_mask, f"B {grid}"),
    )
    if (x.additional_keys is None) != (x.additional_values is None):
        missing = "additional_keys" if x.additional_keys is None else "additional_values"
        raise ValueError(f"{missing}: expected both of additional_keys and additional_values, or neither, got None")
    operands = {name: getattr(x, name) for name in ("key", "value", "additional_keys", "additional_values")}
    check_floating(query=x.query)
    check_same_dtype(query=x.query, **operands)
    check_no_empty(sizes, sizes)
    check_grouped_heads(sizes["N"], sizes["K"])
    if x.key_mask is not None and x.key_mask.dtype != np.bool_:
        raise TypeError(
            f"key_mask: expected booleans (True may be seen), got {x.key_mask.dtype}; pass key_mask.astype(bool)"
        )
    return sizes


def check_rel_pos_bias(x: Operands, neighborhood: Neighborhood) -> None:
    """The bias has a number for every distance in a window, and such distances are all that a query meets."""
    if x.rel_pos_bias is None:
        return
    check_addend("rel_pos_bias", x.rel_pos_bias, x.query)
    axes = neighborhood.axes(x.grid)
    wanted = (x.query.shape[-2], *(2 * axis.window - 1 for axis in axes))
    if tuple(x.rel_pos_bias.shape) != wanted:
        raise ValueError(
            f"rel_pos_bias: expected [N, 2 w - 1 for each axis] = {wanted}, got {tuple(x.rel_pos_bias.shape)}"
        )
    if any(axis.stride > 1 or axis.is_causal for axis in axes):
        raise ValueError(
            "rel_pos_bias: it is defined for windows of stride 1 that are not causal; rotate query and key by their "
            "positions instead (jattn.apply_rotary_axes)"
        )
