"""Softmax attention over the keys whose cells are kept, dense and gathered.

    a_ts = softmax over the kept s of scale <q_t, k_s>          0 in a row that keeps nothing

A row keeps few keys, in ranges: about k for each of its N heads together. The gathered form lists them, a block of rows
at a time, and reads those alone.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.linear.sea_selection import Reach, cell_counts, cell_starts, key_cells, thinned

ENTRIES = 1 << 15
"""Keys that are gathered at a time, for one example of a batch."""


def kept_keys(
    cells: Bool[Array, "B N T L"], reach: Reach, k_budget: float, k_oversample: float
) -> Bool[Array, "B N T S"]:
    """The keys that the cells stand for, thinned out where more cells were kept than `k_budget` asks for."""
    cell, allowed = key_cells(reach, cells.shape[-1])
    if k_oversample != 1:
        columns = jnp.arange(reach.number.shape[1])
        allowed &= thinned(columns, reach.start[..., None], reach.width[..., None], k_budget, k_oversample)
    shape = (*cells.shape[:3], cell.shape[-1])
    kept = jnp.take_along_axis(cells, jnp.broadcast_to(cell[:, None], shape), axis=-1)
    return kept & allowed[:, None]


def sparse_weights(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], kept: Bool[Array, "B N T S"], scale: float
) -> Float[Array, "B N T S"]:
    """a, with all pairs at once."""
    batch, length, _, width = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, width)
    accumulator = checks.accumulator_dtype(query.dtype)
    scores = scale * jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=accumulator)
    return _softmax(jnp.where(kept, scores.reshape(kept.shape), -jnp.inf), axis=-1)


def dense_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    cells: Bool[Array, "B N T L"],
    reach: Reach,
    *,
    scale: float,
    k_budget: float,
    k_oversample: float,
    **_: Any,
) -> Float[Array, "B T N V"]:
    """The definition: all weights, most of them 0."""
    weights = sparse_weights(query, key, kept_keys(cells, reach, k_budget, k_oversample), scale)
    batch, heads, length, keys = weights.shape
    grouped = weights.astype(value.dtype).reshape(batch, key.shape[2], -1, length, keys)
    out = jnp.einsum("bkgts,bskv->btkgv", grouped, value, preferred_element_type=weights.dtype)
    return out.reshape(batch, length, heads, -1)


def check_gathered(*_: Any, k_flatten_dim: str, **__: Any) -> None:
    if k_flatten_dim in ("head", "batch"):
        raise NotImplementedError(
            f"with k_flatten_dim={k_flatten_dim!r} rows compete for cells and one row may win all, so that no list of "
            f"its keys is long enough but one of them all"
        )


def gathered_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    cells: Bool[Array, "B N T L"],
    reach: Reach,
    *,
    scale: float,
    k_budget: float,
    k_oversample: float,
    k_flatten_dim: str,
    is_padded: bool,
) -> Float[Array, "B T N V"]:
    """The same from lists of keys; memory O(T (N L + V)) and `ENTRIES` keys beyond the arguments."""
    batch, heads, length, count = cells.shape
    budget = k_budget * k_oversample * count
    capacity = _capacity(budget, heads, key.shape[1], count, together=k_flatten_dim == "causal_batch")
    block = max(1, min(length, ENTRIES // capacity))
    row = functools.partial(_attend_row, scale=scale, k_budget=k_budget, k_oversample=k_oversample, capacity=capacity)
    of_batch: Any = jax.vmap(jax.vmap(row, in_axes=(0, 0, 0, None, None, None)))
    order = jnp.argsort(jnp.where(reach.number > 0, 0, 1), axis=1, stable=True) if is_padded else None

    @jax.checkpoint
    def attend(x: Any) -> Array:
        return of_batch(*x, key, value, order)

    per_row = (query, jnp.swapaxes(cells, 1, 2), jnp.stack([reach.first, reach.width, reach.start], axis=-1))
    whole = length // block * block

    def blocks(x: Array) -> Array:
        return jnp.moveaxis(x[:, :whole].reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    out = jnp.moveaxis(jax.lax.map(attend, jax.tree.map(blocks, per_row)), 0, 1).reshape(batch, whole, heads, -1)
    if whole < length:
        out = jnp.concatenate([out, attend(jax.tree.map(lambda x: x[:, whole:], per_row))], axis=1)
    return out


def _attend_row(
    query: Float[Array, "N H"],
    cells: Bool[Array, "N L"],
    reach: Int[Array, " 3"],
    key: Float[Array, "S K H"],
    value: Float[Array, "S K V"],
    order: Int[Array, " S"] | None,
    *,
    scale: float,
    k_budget: float,
    k_oversample: float,
    capacity: int,
) -> Float[Array, "N V"]:
    """One row: its list has a key in each entry, the keys of a cell together and the cells of a head together."""
    heads, count = cells.shape
    first, width, start = reach
    edges = cell_starts(width, count)
    sizes = jnp.where(cells, jnp.diff(edges), 0).reshape(-1)
    ends = jnp.cumsum(sizes)
    entry = jnp.arange(capacity, dtype=ends.dtype)
    own = jnp.minimum(jnp.searchsorted(ends, entry, side="right"), sizes.size - 1)
    head, cell = own // count, own % count
    number = first + edges[cell] + entry - (ends - sizes)[own]
    number = jnp.clip(number, 0, key.shape[0] - 1)
    column = number if order is None else order[number]
    live = entry < ends[-1]
    if k_oversample != 1:
        live &= thinned(column, start, width, k_budget, k_oversample)
    kv_head = head // (heads // key.shape[1])
    accumulator = checks.accumulator_dtype(query.dtype)
    scores = scale * jnp.einsum("ch,ch->c", query[head], key[column, kv_head], preferred_element_type=accumulator)
    is_own = live[:, None] & (head[:, None] == jnp.arange(heads))
    weights = _softmax(jnp.where(is_own, scores[:, None], -jnp.inf), axis=0)
    values = value[column, kv_head]
    return jnp.einsum("cn,cv->nv", weights.astype(value.dtype), values, preferred_element_type=accumulator)


def _capacity(budget: float, heads: int, keys: int, cells: int, *, together: bool) -> int:
    """The most keys that a row may keep: those of its cells, and no key more than once for each head."""
    width = np.arange(1, keys + 1, dtype=np.int64)
    counts = cell_counts(budget * heads, keys, heads * cells) if together else heads * cell_counts(budget, keys, cells)
    # Points L / w apart in an interval of length 1, for the first cell 1 + 1e-4.
    largest = width // cells + 1 + width // (5000 * cells)
    return int(np.max(np.minimum(heads * width, counts * largest)))


def _softmax(scores: Array, axis: int) -> Array:
    """Of logits of which some, or all of a row, are -inf: these weigh 0."""
    largest = jnp.max(scores, axis=axis, keepdims=True)
    largest = jax.lax.stop_gradient(jnp.where(largest == -jnp.inf, 0, largest))
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=axis, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)
