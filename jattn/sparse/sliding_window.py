"""Softmax attention over the nearest keys (Beltagy et al. 2020, section 3.1; Mistral's sliding window).

Query t stands at key position p = t + offset and sees the keys s with p - left <= s <= p + right:

    lse_t = log( sum_{s in window} exp(z_ts) + exp(sink_n) )      o_t = sum_{s in window} exp(z_ts - lse_t) v_s

The band is cut into blocks of b queries. With the keys shifted to begin at position offset - left, query block i sees
keys of the blocks i .. i + ceil((left + right) / b) and no others: its span. A few query blocks are worked on at once,
enough to fill the machine and few enough for its cache, and a scan goes over these groups, so time is
O(T (left + right + b)) and memory O(T). The backward pass makes the probabilities again from the log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jattn.blockwise import (
    Operands,
    Stacks,
    blockwise_attention,
    from_blocks,
    grouped,
    grouped_sinks,
    to_blocks,
)
from jattn.checks import check_count, check_flags
from jattn.dispatch import Choice, Implementation, dispatch
from jattn.dot_product import (
    SegmentIds,
    check_query_key_value,
    check_sinks,
    dense_attention,
    make_score,
    split_segment_ids,
    varying_alike,
)
from jattn.fused import check_fused_softmax, fused_softmax, kernels
from jattn.masks import FARTHEST, Causal, Mask
from jattn.softmax_tile import (
    Score,
    Tile,
    absorb,
    finish,
    gradients,
    initial_state,
    row_statistics,
    sink_gradient,
)
from pallas_kernels.entry import Platform


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
) -> Any:
    """Softmax attention in a window, in time proportional to T x window and memory proportional to T.

    Args:
      query, key, value: as in `dot_product_attention`.
      window: an integer W is the W most recent keys, the query's own among them (causal; the reading of Mistral and
        Hugging Face): the mask `SlidingWindow(W - 1)`. A pair (left, right) is that many keys before the query's own,
        the own and that many after it: the mask `SlidingWindow(left, right)`.
      offset: the position of the first query minus that of the first key; `None` is 0 and needs T = S.
      scale, logits_soft_cap, sinks, segment_ids, return_lse: as in `dot_product_attention`.
      implementation: "pallas_tpu", "pallas_gpu" (fused kernels), "xla" (a band of blocks) or "reference" (dense; the
        one that has forward-mode derivatives).

    Returns:
      `out [B, T, N, V]`, or `(out, lse [B, T, N])`; a query that sees nothing has 0 and -inf.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a window of 0; T != S without `offset`.
    """
    sizes = check_query_key_value(query, key, value)
    check_flags(return_lse=return_lse)
    left, right = _check_window(window)
    if offset is None and sizes["T"] != sizes["S"]:
        raise ValueError(
            f"offset: with {sizes['T']} queries and {sizes['S']} keys the window has two readings; pass offset=0 if "
            f"both start at position 0, or offset={sizes['S'] - sizes['T']} if both end together"
        )
    offset = 0 if offset is None else check_count("offset", offset, minimum=-FARTHEST, maximum=FARTHEST)
    # A window that reaches beyond the sequences is cut to them.
    left = min(left, max(0, sizes["T"] - 1 + offset))
    right = min(right, max(0, sizes["S"] - 1 - offset))
    check_sinks(sinks, query, sizes)
    q_segments, kv_segments = split_segment_ids(segment_ids, sizes)
    out, lse = dispatch(
        "sliding_window_attention",
        _IMPLEMENTATIONS,
        implementation,
        varying_alike(Operands(query, key, value, None, None, sinks, q_segments, kv_segments)),
        band=Band(left, right, offset),
        score=make_score(scale, logits_soft_cap, sizes["H"]),
    )
    return (out, lse) if return_lse else out


class Band(NamedTuple):
    """The keys of query t: positions `p - left .. p + right` with `p = t + offset`."""

    left: int
    right: int
    offset: int

    def mask(self) -> Mask:
        return Causal(self.offset + self.right) & ~Causal(self.offset - self.left - 1)


def _check_window(window: Any) -> tuple[int, int]:
    if not isinstance(window, tuple):
        return check_count("window", window) - 1, 0
    if len(window) != 2:
        raise ValueError(f"window: expected an integer or (left, right), got a tuple of {len(window)}")
    return check_count("window[0]", window[0], minimum=0), check_count("window[1]", window[1], minimum=0)


def _dense(operands: Operands, *, band: Band, score: Score) -> tuple[Array, Array]:
    return dense_attention(operands, mask=band.mask(), score=score)


def windowed_attention(operands: Operands, *, band: Band, score: Score) -> tuple[Array, Array]:
    """`(out, lse)` by the band, or by blocks when a band would be wider than a few of those. Arguments are checked.

    Measured on a CPU: the band is 1.0 to 1.5 times as fast up to 256 keys, the blocks 1.1 times at 1024.
    """
    if band.left + band.right > 512:
        return blockwise_attention(operands, mask=band.mask(), score=score)
    return banded_attention(operands, band=band, score=score)


def banded_attention(
    operands: Operands, *, band: Band, score: Score, block: int | None = None, per_group: int | None = None
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Output in the query's dtype and log-sum-exp in the accumulator dtype, with any sizes of blocks and groups."""
    batch, length, heads, _ = operands.query.shape
    reach = band.left + band.right
    # Short blocks waste little beyond the window, and the groups make up for their being short.
    block = min(block or (32 if reach < 64 else 64), length)
    span = math.ceil(reach / block) + 1
    blocks = math.ceil(length / block)
    # Four megabytes of float32 logits at a time (measured on a CPU: half and twice that are no faster).
    per_group = per_group or max(1, 2**20 // (batch * heads * block * block * span))
    groups = math.ceil(blocks / per_group)
    return _attention(_Plan(band, score, block, span, groups, math.ceil(blocks / groups)), operands)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call: `groups` of `per_group` query blocks, each of which sees `span` key blocks."""

    band: Band
    score: Score
    block: int
    span: int
    groups: int
    per_group: int

    @property
    def rows(self) -> int:
        return self.groups * self.per_group

    @property
    def columns(self) -> int:
        return self.rows + self.span - 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, x: Operands) -> tuple[Array, Array]:
    stacks = _stack(plan, x)

    def group(_: None, index: Array) -> tuple[None, tuple[Array, Array]]:
        tile = _cut(plan, x, stacks, index)
        state = initial_state(tile.query, tile.value.shape[-1], grouped_sinks(x))
        return None, finish(absorb(state, tile, plan.score))

    _, (out, lse) = jax.lax.scan(group, None, jnp.arange(plan.groups))
    shape = x.query.shape[:3]
    out = _ungrouped(out, shape[1]).reshape(*shape, -1)
    return out.astype(x.query.dtype), _ungrouped(lse[..., None], shape[1]).reshape(shape)


def _forward(plan: _Plan, x: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Array, Array]]:
    out, lse = _attention(plan, x)
    return (out, lse), (x, out, lse)


def _backward(
    plan: _Plan, residuals: tuple[Operands, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Operands]:
    x, out, lse = residuals
    d_out, d_lse = cotangents
    shift, delta = row_statistics(out, lse, d_out, d_lse)
    stacks = _stack(plan, x)
    rows = tuple(to_blocks(grouped(x, a), plan.block, plan.rows) for a in (shift[..., None], delta[..., None], d_out))

    def group(sums: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array]:
        shift, delta, d_out = (jax.lax.dynamic_slice_in_dim(a, index * plan.per_group, plan.per_group) for a in rows)
        tile = gradients(_cut(plan, x, stacks, index), shift[..., 0], delta[..., 0], d_out, plan.score)
        d_key, d_value = sums
        return (_add_spans(plan, d_key, tile.key, index), _add_spans(plan, d_value, tile.value, index)), tile.query

    zeros = jnp.zeros_like(stacks.key, lse.dtype), jnp.zeros_like(stacks.value, lse.dtype)
    (d_key, d_value), d_query = jax.lax.scan(group, zeros, jnp.arange(plan.groups))
    return (
        Operands(
            query=_ungrouped(d_query, x.query.shape[1]).reshape(x.query.shape).astype(x.query.dtype),
            key=_unshifted(plan, d_key, x.key.shape[1]).astype(x.key.dtype),
            value=_unshifted(plan, d_value, x.value.shape[1]).astype(x.value.dtype),
            sinks=None if x.sinks is None else sink_gradient(x.sinks, shift, delta, (0, 1)).astype(x.sinks.dtype),
        ),
    )


_attention.defvjp(_forward, _backward)


def _stack(plan: _Plan, x: Operands) -> Stacks:
    """Blocks of queries, `rows` of them, and shifted blocks of keys, `columns`."""
    if x.q_segments is None or x.kv_segments is None:
        q_segments = kv_segments = None
    else:
        q_segments = to_blocks(x.q_segments[..., None], plan.block, plan.rows)
        kv_segments = _shifted(plan, x.kv_segments[..., None])
    query = to_blocks(grouped(x, x.query), plan.block, plan.rows)
    return Stacks(query, _shifted(plan, x.key), _shifted(plan, x.value), q_segments, kv_segments)


def _cut(plan: _Plan, x: Operands, stacks: Stacks, index: Array) -> Tile:
    """A group's queries `[p, B, K, G, b, H]`, their spans of keys and values `[p, B, K, span b, .]`, who sees whom."""
    first = index * plan.per_group
    query = jax.lax.dynamic_slice_in_dim(stacks.query, first, plan.per_group)
    key, value = _spans(plan, stacks.key, first), _spans(plan, stacks.value, first)
    # Query i of a block sees keys i .. i + left + right of its span.
    i, j = jnp.arange(plan.block)[:, None], jnp.arange(plan.span * plan.block)
    band = (j >= i) & (j <= i + plan.band.left + plan.band.right)
    starts = (first + jnp.arange(plan.per_group)) * plan.block + plan.band.offset - plan.band.left
    position = starts.reshape(-1, 1, 1, 1, 1, 1) + j
    allowed = band & (position >= 0) & (position < x.key.shape[1])
    if stacks.q_segments is None or stacks.kv_segments is None:
        return Tile(query, key, value, allowed=allowed)
    q_ids = jax.lax.dynamic_slice_in_dim(stacks.q_segments, first, plan.per_group)
    kv_ids = _spans(plan, stacks.kv_segments, first)
    allowed = allowed & (q_ids == jnp.swapaxes(kv_ids, -1, -2))[:, :, None, None]
    return Tile(query, key, value, allowed=allowed)


def _spans(plan: _Plan, stack: Array, first: Array) -> Array:
    """`[p, ..., span b, D]`: the blocks that each of p query blocks from `first` on sees, side by side."""
    near = jax.lax.dynamic_slice_in_dim(stack, first, plan.per_group + plan.span - 1)
    return jnp.concatenate([near[j : j + plan.per_group] for j in range(plan.span)], axis=-2)


def _add_spans(plan: _Plan, total: Array, spans: Array, index: Array) -> Array:
    """The transpose of `_spans`, added to `total`."""
    first = index * plan.per_group
    near = jax.lax.dynamic_slice_in_dim(total, first, plan.per_group + plan.span - 1)
    for j, part in enumerate(jnp.split(spans, plan.span, axis=-2)):
        near = near.at[j : j + plan.per_group].add(part)
    return jax.lax.dynamic_update_slice_in_dim(total, near, first, axis=0)


def _shifted(plan: _Plan, x: Array) -> Array:
    """Keys `[B, S, ...]` as a stack of blocks that begins at position `offset - left`, zero where there is no key."""
    before = plan.band.left - plan.band.offset
    return to_blocks(_pad(x, before, plan.columns * plan.block - before - x.shape[1]), plan.block)


def _unshifted(plan: _Plan, stack: Array, length: int) -> Array:
    """The transpose of `_shifted`."""
    before = plan.band.left - plan.band.offset
    x = from_blocks(stack, plan.columns * plan.block)
    return _pad(x, -before, length + before - x.shape[1])


def _pad(x: Array, before: int, after: int) -> Array:
    """Zeros before and after axis 1; a negative number takes away."""
    widths = [(0, 0, 0), (before, after, 0), *[(0, 0, 0)] * (x.ndim - 2)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), widths)


def _ungrouped(x: Array, length: int) -> Array:
    """`[groups, p, B, K, G, b, D]` as `[B, T, K, G, D]`."""
    return from_blocks(x.reshape(-1, *x.shape[2:]), length)


def _walked(platform: Platform, operands: Operands, *, band: Band, score: Score) -> tuple[Array, Array]:
    return fused_softmax(platform, operands, mask=band.mask(), score=score)


def _check_walked(platform: Platform, operands: Operands, *, band: Band, score: Score) -> None:
    check_fused_softmax(platform, operands, mask=band.mask(), score=score)


_KERNELS = kernels(_walked, _check_walked)
_IMPLEMENTATIONS = (
    _KERNELS.tpu,
    _KERNELS.gpu,
    Implementation("xla", windowed_attention),
    Implementation("reference", _dense),
    _KERNELS.interpret,
)
