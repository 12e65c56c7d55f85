"""Softmax attention over the nearest keys (Beltagy et al. 2020, section 3.1; Mistral's sliding window).

Query t stands at key position p = t + offset and sees the keys s with p - left <= s <= p + right:

    lse_t = log( sum_{s in window} exp(z_ts) + exp(sink_n) )      o_t = sum_{s in window} exp(z_ts - lse_t) v_s

The band is cut into blocks of queries. Queries i b .. i b + b - 1 see keys within `m = ceil((left + right) / b) + 1`
consecutive blocks, so with the keys shifted to begin at -left, query block i attends to key blocks i .. i + m - 1 and
to nothing else. Time is O(T (left + right + b)). A few query blocks are worked on at once, enough to fill the machine
and few enough for its cache; a scan goes over these groups. The backward pass makes the probabilities again from the
log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jattn import checks
from jattn.blockwise import Operands
from jattn.dispatch import Choice, Implementation, dispatch
from jattn.dot_product import (
    SegmentIds,
    check_query_key_value,
    check_sinks,
    dense_attention,
    make_score,
    split_segment_ids,
)
from jattn.masks import Full
from jattn.softmax_tile import (
    Score,
    absorb,
    allowed_pairs,
    finish,
    gradients,
    initial_state,
    row_statistics,
    sink_gradient,
)

# Logits of the query blocks that are worked on at once.
_GROUP_LOGITS = 1 << 20


class Band(NamedTuple):
    """Which keys a query sees: positions `p - left .. p + right` with `p = t + offset`."""

    left: int
    right: int
    offset: int


def sliding_window_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    window: int | tuple[int, int],
    offset: int | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    segment_ids: SegmentIds = None,
    return_lse: bool = False,
    implementation: Choice = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Softmax attention in a window, in time and memory proportional to T x window and T.

    Args:
      query, key, value: as in `dot_product_attention`.
      window: an integer W sees the W most recent keys, the query's own included (so it is causal; Mistral's reading):
      the
        mask `Causal() & SlidingWindow(W - 1)`. A pair (left, right) sees so many keys before and after the own one: the
        mask `SlidingWindow(left, right)`.
      offset: position of the first query minus that of the first key; may be left out when T = S, and is then 0.
      scale, logits_soft_cap, sinks, segment_ids, return_lse: as in `dot_product_attention`.
      implementation: "xla" (a band of blocks) or "reference" (dense; the one that has forward-mode derivatives).

    Returns:
      `out [B, T, N, V]`, or `(out, lse [B, T, N])`; a query that sees nothing has 0 and -inf.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a window of 0; T != S without `offset`.
    """
    sizes = check_query_key_value(query, key, value)
    left, right = _check_window(window)
    if offset is None:
        if sizes["T"] != sizes["S"]:
            raise ValueError(
                f"offset: with {sizes['T']} queries and {sizes['S']} keys the window has two readings; pass offset=0 if "
                f"both start at position 0, or offset={sizes['S'] - sizes['T']} if both end together"
            )
        offset = 0
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"offset: expected a static integer, got {type(offset).__name__}")
    check_sinks(sinks, query, sizes)
    q_segments, kv_segments = split_segment_ids(segment_ids, sizes)
    operands = Operands(query, key, value, None, None, sinks, q_segments, kv_segments)
    out, lse = dispatch(
        "sliding_window_attention",
        _IMPLEMENTATIONS,
        implementation,
        operands,
        band=Band(left, right, offset),
        score=make_score(scale, logits_soft_cap, sizes["H"]),
    )
    return (out, lse) if return_lse else out


def _check_window(window: Any) -> tuple[int, int]:
    if not isinstance(window, tuple):
        return checks.check_count("window", window) - 1, 0
    if len(window) != 2:
        raise ValueError(f"window: expected an integer or (left, right), got {len(window)} numbers")
    return checks.check_count("window (left)", window[0], minimum=0), checks.check_count(
        "window (right)", window[1], minimum=0
    )


def _dense(operands: Operands, *, band: Band, score: Score) -> tuple[Array, Array]:
    """The definition: dense attention under the band as an array."""
    position = jnp.arange(operands.query.shape[1])[:, None] + band.offset
    key_position = jnp.arange(operands.key.shape[1])
    seen = (key_position >= position - band.left) & (key_position <= position + band.right)
    return dense_attention(operands._replace(mask=seen[None, None]), mask=Full(), score=score)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call: `groups * per_group` query blocks of `block`, each seeing `span` key blocks."""

    band: Band
    score: Score
    block: int
    span: int
    groups: int
    per_group: int


@functools.partial(jax.jit, static_argnames=("band", "score", "block", "per_group"))
def banded_attention(
    operands: Operands, *, band: Band, score: Score, block: int | None = None, per_group: int | None = None
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Output in the query's dtype and log-sum-exp in the accumulator dtype; arguments are checked by the caller."""
    batch, q_len, heads, _ = operands.query.shape
    # A window that reaches beyond the sequences is cut to them.
    left = min(band.left, max(0, q_len - 1 + band.offset))
    band = Band(left, min(band.right, max(0, operands.key.shape[1] - 1 - band.offset)), band.offset)
    reach = band.left + band.right
    block = min(block or _block_size(reach), q_len)
    span = math.ceil(reach / block) + 1
    blocks = math.ceil(q_len / block)
    if per_group is None:
        per_group = max(1, _GROUP_LOGITS // (batch * heads * block * block * span))
    groups = math.ceil(blocks / per_group)
    # Groups of one size, with as few blocks beyond the end as that allows.
    return _attention(_Plan(band, score, block, span, groups, math.ceil(blocks / groups)), operands)


def _block_size(reach: int) -> int:
    """Half the window: the band of a block is then three blocks, half again as wide as what each query needs."""
    return max(32, min(256, 1 << max(0, math.ceil(math.log2(max(reach, 1))) - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, x: Operands) -> tuple[Array, Array]:
    def group(carry: None, index: Array) -> tuple[None, tuple[Array, Array]]:
        query, key, value, allowed = _group(plan, x, tiles, index)
        state = initial_state(query, value.shape[-1], _grouped_sinks(x))
        return carry, finish(absorb(state, query, key, value, None, allowed, plan.score))

    tiles = _tiles(plan, x)
    _, (out, lse) = jax.lax.scan(group, None, jnp.arange(plan.groups))
    batch, length, heads, _ = x.query.shape
    out = _from_blocks(out.reshape(-1, *out.shape[2:]), length).reshape(batch, length, heads, -1)
    lse = _from_blocks(lse.reshape(-1, *lse.shape[2:])[..., None], length).reshape(batch, length, heads)
    return out.astype(x.query.dtype), lse


def _forward(plan: _Plan, x: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Array, Array]]:
    out, lse = _attention(plan, x)
    return (out, lse), (x, out, lse)


def _backward(
    plan: _Plan, residuals: tuple[Operands, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Operands]:
    x, out, lse = residuals
    d_out, d_lse = cotangents
    shift, delta = row_statistics(out, lse, d_out, d_lse)
    rows = plan.groups * plan.per_group
    d_out_blocks, shift_blocks, delta_blocks = (
        _to_blocks(_grouped(x, part), plan.block, rows).reshape(plan.groups, plan.per_group, *rest)
        for part, rest in (
            (d_out, (x.query.shape[0], *_heads(x), plan.block, d_out.shape[-1])),
            (shift[..., None], (x.query.shape[0], *_heads(x), plan.block, 1)),
            (delta[..., None], (x.query.shape[0], *_heads(x), plan.block, 1)),
        )
    )
    tiles = _tiles(plan, x)

    def group(sums: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        index, d_out, shift, delta = xs
        query, key, value, allowed = _group(plan, x, tiles, index)
        part = gradients(query, key, value, None, allowed, shift[..., 0], delta[..., 0], d_out, plan.score)
        added = tuple(
            _add_spans(plan, total, tile, index) for total, tile in zip(sums, (part.key, part.value), strict=True)
        )
        return added, part.query

    zeros = tuple(jnp.zeros_like(blocks, lse.dtype) for blocks in (tiles.key, tiles.value))
    xs = (jnp.arange(plan.groups), d_out_blocks, shift_blocks, delta_blocks)
    (d_key, d_value), d_query = jax.lax.scan(group, zeros, xs)
    d_query = _from_blocks(d_query.reshape(-1, *d_query.shape[2:]), x.query.shape[1]).reshape(x.query.shape)
    d_sinks = None if x.sinks is None else sink_gradient(x.sinks, shift, delta, axes=(0, 1)).astype(x.sinks.dtype)
    return (
        Operands(
            query=d_query.astype(x.query.dtype),
            key=_unshifted(plan, d_key, x.key.shape[1]).astype(x.key.dtype),
            value=_unshifted(plan, d_value, x.value.shape[1]).astype(x.value.dtype),
            sinks=d_sinks,
        ),
    )


_attention.defvjp(_forward, _backward)


class _Tiles(NamedTuple):
    """Operands as stacks of blocks: queries `[rows, B, K, G, b, H]`, keys, shifted by `left`, `[rows + span - 1, B, K,
    b, H]`."""

    query: Array
    key: Array
    value: Array
    q_segments: Array | None
    kv_segments: Array | None


def _tiles(plan: _Plan, x: Operands) -> _Tiles:
    rows = plan.groups * plan.per_group
    key_blocks = rows + plan.span - 1
    key, value = (_to_blocks(_shifted(plan, part, key_blocks), plan.block, key_blocks) for part in (x.key, x.value))
    query = _to_blocks(_grouped(x, x.query), plan.block, rows)
    if x.q_segments is None or x.kv_segments is None:
        return _Tiles(query, key, value, None, None)
    kv_segments = _shifted(plan, x.kv_segments[..., None], key_blocks)
    return _Tiles(
        query,
        key,
        value,
        _to_blocks(x.q_segments[..., None], plan.block, rows),
        _to_blocks(kv_segments, plan.block, key_blocks),
    )


def _group(plan: _Plan, x: Operands, tiles: _Tiles, index: Array) -> tuple[Array, Array, Array, Bool[Array, ...]]:
    """Queries `[p, B, K, G, b, H]`, their spans of keys and values `[p, B, K, span * b, .]`, and who sees whom."""
    first = index * plan.per_group
    query = jax.lax.dynamic_slice_in_dim(tiles.query, first, plan.per_group)
    key, value = (_spans(plan, blocks, first) for blocks in (tiles.key, tiles.value))
    row = jnp.arange(plan.block)[:, None]
    # In the coordinates of a span, key `column` stands at position `column - left` relative to the block's first query.
    column = jnp.arange(plan.span * plan.block)
    band = (column >= row) & (column <= row + plan.band.left + plan.band.right)
    start = (first + jnp.arange(plan.per_group)) * plan.block + plan.band.offset - plan.band.left
    position = start[:, None] + column
    exists = (position >= 0) & (position < x.key.shape[1])
    allowed = band & exists[:, None, None, None, None, :]
    if tiles.q_segments is None or tiles.kv_segments is None:
        return query, key, value, allowed
    q_ids = jax.lax.dynamic_slice_in_dim(tiles.q_segments, first, plan.per_group)
    kv_ids = _spans(plan, tiles.kv_segments[:, :, None], first)[:, :, 0]
    same = (q_ids == jnp.swapaxes(kv_ids, -1, -2))[:, :, None, None]
    return query, key, value, allowed_pairs(allowed, same)  # type: ignore[return-value]


def _spans(plan: _Plan, blocks: Array, first: Array) -> Array:
    """`[p, B, K, span * b, D]`: for each of p query blocks from `first` on, the key blocks it sees, side by side."""
    here = jax.lax.dynamic_slice_in_dim(blocks, first, plan.per_group + plan.span - 1)
    return jnp.concatenate([here[j : j + plan.per_group] for j in range(plan.span)], axis=-2)


def _add_spans(plan: _Plan, total: Array, spans: Array, index: Array) -> Array:
    """The transpose of `_spans`."""
    first = index * plan.per_group
    here = jax.lax.dynamic_slice_in_dim(total, first, plan.per_group + plan.span - 1)
    for j, part in enumerate(jnp.split(spans, plan.span, axis=-2)):
        here = here.at[j : j + plan.per_group].add(part)
    return jax.lax.dynamic_update_slice_in_dim(total, here, first, 0)


def _shifted(plan: _Plan, x: Array, key_blocks: int) -> Array:
    """`[B, key_blocks * b, ...]`: the keys from position `offset - left` on, zeros where there is none."""
    begin = plan.band.offset - plan.band.left
    before, x = max(0, -begin), x[:, max(0, begin) :]
    after = max(0, key_blocks * plan.block - before - x.shape[1])
    return jnp.pad(x, [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)])[:, : key_blocks * plan.block]


def _unshifted(plan: _Plan, blocks: Array, length: int) -> Array:
    """The transpose of `_shifted`, from blocks."""
    begin = plan.band.offset - plan.band.left
    x = _from_blocks(blocks, blocks.shape[0] * plan.block)[:, max(0, -begin) :]
    x = jnp.pad(x, [(0, 0), (max(0, begin), 0), *[(0, 0)] * (x.ndim - 2)])[:, :length]
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


def _heads(x: Operands) -> tuple[int, int]:
    """K, and the G query heads that share each."""
    return x.key.shape[2], x.query.shape[2] // x.key.shape[2]


def _grouped(x: Operands, array: Array) -> Array:
    """[B, T, N, ...] as [B, T, K, G, ...]."""
    return array.reshape(*array.shape[:2], *_heads(x), *array.shape[3:])


def _grouped_sinks(x: Operands) -> Array | None:
    return None if x.sinks is None else x.sinks.reshape(_heads(x))


def _to_blocks(x: Array, block: int, blocks: int) -> Array:
    """[B, T, *heads, D] as [blocks, B, *heads, block, D], filled up with zeros."""
    batch, length, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, blocks * block - length), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(jnp.moveaxis(x.reshape(batch, blocks, block, *rest), 1, 0), 2, -2)


def _from_blocks(x: Array, length: int) -> Array:
    """The inverse of `_to_blocks`."""
    x = jnp.moveaxis(jnp.moveaxis(x, -2, 2), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


_IMPLEMENTATIONS = (
    Implementation("xla", banded_attention),
    Implementation("reference", _dense),
)
