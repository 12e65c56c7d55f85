"""Which cells of SEA's estimate are kept, and which keys a cell stands for.

Row t may see w keys, the c-th of which (c = 1 .. w) lies in the cell

    cell(c) = floor((c - 1/2) L / w - 1e-4)      clipped to 0 .. L - 1

so that a cell is a range of neighbours. Of all cells that compete, those of the largest probability are kept, as many
as stand for k keys per row and head. Cells are counted in integers, so that two programs never disagree about one.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.linear import arguments

FlattenDim = Literal["query", "head", "batch", "causal_batch"]


class Reach(NamedTuple):
    """Which keys every row sees: those with numbers from `first + 1` to `first + width`.

    Attributes:
      number: of a key among the real ones, from 1; 0 is a key that nobody sees.
      first: real keys before the row's sequence.
      width: w, how many keys the row sees.
      start: the column at which the row's sequence begins.
    """

    number: Int[Array, "B S"]
    first: Int[Array, "B T"]
    width: Int[Array, "B T"]
    start: Int[Array, "B T"]


def causal_reach(keep: Bool[Array, "B T"] | None, position: Int[Array, "B T"]) -> Reach:
    """Every token of a sequence up to the row's own; `position` is that in the row's sequence."""
    index = jnp.arange(position.shape[1], dtype=jnp.int32)
    start = index - position
    if keep is None:
        return Reach(jnp.broadcast_to(index + 1, position.shape), start, position + 1, start)
    count = jnp.cumsum(keep, axis=1, dtype=jnp.int32)
    before = jnp.pad(count, ((0, 0), (1, 0)))
    first = jnp.take_along_axis(before, start, axis=1)
    return Reach(jnp.where(keep, count, 0), first, count - first, start)


def two_way_reach(keep: Bool[Array, "B T"]) -> Reach:
    """All real tokens."""
    count = jnp.cumsum(keep, axis=1, dtype=jnp.int32)
    zeros = jnp.zeros_like(count)
    return Reach(jnp.where(keep, count, 0), zeros, jnp.broadcast_to(count[:, -1:], count.shape), zeros)


def sea_select(
    probabilities: Float[Array, "B N T L"],
    lengths: Int[Array, "B T"],
    keep: Bool[Array, "B T"] | None = None,
    *,
    k_budget: float,
    k_flatten_dim: FlattenDim = "causal_batch",
    k_oversample: float = 1.0,
    longest: int | None = None,
) -> Bool[Array, "B N T L"]:
    """The cells with the largest probabilities; of equal ones, the first in the order that is flattened.

    With n the row's `lengths` and k = `k_budget * k_oversample`, halves rounded to even, at least 1 are kept:

        "query"         round(k L / n)      of the L cells of each row and head
        "causal_batch"  round(N k L / n)    of the N L cells of each row
        "head"          round(k L)          of the T L cells of each head
        "batch"         round(N k L)        of all N T L cells

    Args:
      probabilities: 0 in padded rows.
      lengths: how many tokens a row sees, in causal order padded ones too; from 1 to `longest`.
      keep: rows that are no padding; "query" and "causal_batch" keep nothing in the others.
      k_budget: keys per row and head, on average.
      k_flatten_dim, k_oversample: see above.
      longest: `None` means T.

    Raises:
      TypeError, ValueError: a wrong shape, dtype or option.
    """
    sizes = checks.bind_shapes(
        ("probabilities", probabilities, "B N T L"), ("lengths", lengths, "B T"), ("keep", keep, "B T")
    )
    checks.check_floating(probabilities=probabilities)
    checks.check_integer(lengths=lengths)
    checks.check_no_empty(sizes, "BNTL")
    check_selection(k_budget, k_flatten_dim, k_oversample)
    batch, heads, rows, cells = (sizes[letter] for letter in "BNTL")
    by_row = k_flatten_dim in ("query", "causal_batch")
    x = jax.lax.stop_gradient(probabilities)
    if k_flatten_dim == "causal_batch":
        x = jnp.swapaxes(x, 1, 2).reshape(batch, rows, heads * cells)
    elif k_flatten_dim == "head":
        x = x.reshape(batch, heads, rows * cells)
    elif k_flatten_dim == "batch":
        x = x.reshape(batch, heads * rows * cells)
    together = heads if k_flatten_dim in ("batch", "causal_batch") else 1
    longest = rows if longest is None else checks.check_count("longest", longest)
    table = cell_counts(together * k_budget * k_oversample * cells, longest if by_row else 1, x.shape[-1])
    if by_row:
        count = rows_of(jnp.asarray(table), lengths - 1)
        count = count[:, None, :, None] if k_flatten_dim == "query" else count[..., None]
    else:
        count = jnp.full((*x.shape[:-1], 1), table[0], jnp.int32)
    kept = _largest(x, count, int(table.max()))
    if k_flatten_dim == "causal_batch":
        kept = jnp.swapaxes(kept.reshape(batch, rows, heads, cells), 1, 2)
    kept = kept.reshape(batch, heads, rows, cells)
    return kept if keep is None or not by_row else kept & keep[:, None, :, None]


def rows_of(table: Array, index: Int[Array, "B T"]) -> Array:
    """`table[index]`, which on a mesh of explicit axes lies where `index` does."""
    sharding = jax.typeof(index).sharding
    if not sharding.mesh.explicit_axes:
        return table[index]
    spec = PartitionSpec(*sharding.spec, *[None] * (table.ndim - 1))
    return table.at[index].get(out_sharding=NamedSharding(sharding.mesh, spec))


def cell_counts(budget: float, longest: int, available: int) -> np.ndarray:
    """How many cells are kept where rows see 1, 2, ... `longest` tokens."""
    return np.clip(np.rint(budget / np.arange(1, longest + 1)), 1, available).astype(np.int32)


def sea_interpolate(
    cells: Float[Array, "B N #T L"] | Bool[Array, "B N #T L"], reach: Reach, off: Any
) -> Float[Array, "B N T S"] | Bool[Array, "B N T S"]:
    """The number of its cell for every key that a row sees, `off` for the others."""
    cell, allowed = key_cells(reach, cells.shape[-1])
    shape = (*cells.shape[:2], *cell.shape[1:])
    found = jnp.take_along_axis(
        jnp.broadcast_to(cells, (*shape[:3], cells.shape[-1])), jnp.broadcast_to(cell[:, None], shape), axis=-1
    )
    return jnp.where(allowed[:, None], found, off)


def key_cells(reach: Reach, cells: int) -> tuple[Int[Array, "B T S"], Bool[Array, "B T S"]]:
    """The cell of every key in every row, and which keys the row sees."""
    count = reach.number[:, None, :] - reach.first[:, :, None]
    width = reach.width[:, :, None]
    allowed = (reach.number > 0)[:, None, :] & (count > 0) & (count <= width)
    width = jnp.maximum(width, 1)
    whole, rest = jnp.divmod((2 * count - 1) * cells, 2 * width)
    # Less 1e-4: where what is left of the quotient is less than that, the cell before.
    cell = whole - (rest <= (2 * width - 1) // 10_000)
    return jnp.clip(cell, 0, cells - 1), allowed


def cell_starts(width: Int[Array, "*batch"], cells: int) -> Int[Array, "*batch edges"]:
    """How many of a row's keys lie before each cell, and at last all `width` of them: the inverse of `key_cells`."""
    width = width[..., None]
    edges = jnp.arange(cells + 1, dtype=width.dtype)
    # cell(c) >= b where (2 c - 1) L >= 2 w b + w / 5000
    least = -(-(2 * width * edges - (-width // 5000)) // cells)
    return jnp.where(edges == 0, 0, jnp.where(edges == cells, width, least // 2))


def thinned(
    column: Int[Array, "*batch"],
    start: Int[Array, "*batch"],
    width: Int[Array, "*batch"],
    k_budget: float,
    k_oversample: float,
) -> Bool[Array, "*batch"]:
    """Which columns stay where `k_oversample` times too many were kept: about one out of so many, evenly spread."""
    kept = jnp.maximum(jnp.round(width / k_oversample), 1)
    scaled = (column - start + 1) / jnp.maximum(width, 1) * kept
    spacing = jnp.clip(width, round(k_budget), round(k_budget * k_oversample)) / k_budget
    return jnp.abs(scaled - jnp.round(scaled)) <= 0.5 / spacing + 1e-4


def check_selection(k_budget: Any, k_flatten_dim: Any, k_oversample: Any) -> None:
    checks.check_choice("k_flatten_dim", k_flatten_dim, get_args(FlattenDim))
    if arguments.number("k_budget", k_budget) <= 0:
        raise ValueError(f"k_budget: expected a positive number of keys, got {k_budget}")
    if arguments.number("k_oversample", k_oversample) < 1:
        raise ValueError(f"k_oversample: expected at least 1, got {k_oversample}")


def _largest(x: Float[Array, "*batch C"], count: Int[Array, "*batch 1"], most: int) -> Bool[Array, "*batch C"]:
    """True at the `count` largest; of those that are equal to the last of them, the first ones."""
    values, _ = jax.lax.top_k(x, most)
    last = jnp.take_along_axis(values, jnp.broadcast_to(count, (*x.shape[:-1], 1)) - 1, axis=-1)
    above, equal = x > last, x == last
    room = count - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room))
