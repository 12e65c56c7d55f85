"""Softmax attention tile by tile: exact, O(T) memory, and only over the pairs of blocks that the mask lists.

The mask's static work list is walked by `jax.lax.scan`: first the full pairs, which need no element mask, then the
partial ones. Online softmax does not mind the order. The backward pass walks the same pairs once, recomputes the
probabilities from the log-sum-exp, and adds into dq, dk and dv in a fixed order, so gradients are deterministic.

Inside, everything is a stack of blocks, so that a step reads and writes contiguous memory: queries
[nq, B, K, G, bq, H], keys [nk, B, K, bk, H]. A bias or mask array is never copied: each step slices its tile out of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jattn.masks import EMPTY, FULL, Full, Mask
from jattn.softmax_tile import (
    Score,
    State,
    absorb,
    finish,
    gradients,
    initial_state,
    row_statistics,
    sink_gradient,
)


class Operands(NamedTuple):
    """The arrays of a call; those after `value` may be `None`, `bias` and `mask` have 1 or the full size on an axis."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    bias: Float[Array, "#B #N #T #S"] | None = None
    mask: Bool[Array, "#B #N #T #S"] | None = None
    sinks: Float[Array, " N"] | None = None
    q_segments: Int[Array, "B T"] | None = None
    kv_segments: Int[Array, "B S"] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a call. Blocks are at most as long as the sequence."""

    mask: Mask
    score: Score
    block_q: int
    block_kv: int


def block_size(length: int) -> int:
    """About 128 up to 1024 and about 256 beyond, evened out so that the last block is nearly as long as the others.

    Measured on a CPU over 64..512 x 64..1024, 1 to 64 heads of 32 and 64: smaller tiles lose to the cost of a step,
    larger ones fall out of the cache, and a short causal sequence wastes less of small ones.
    """
    blocks = math.ceil(length / (128 if length <= 1024 else 256))
    return length if blocks == 1 else 8 * math.ceil(length / blocks / 8)


# Compiled as one even when it is called eagerly, which else would compile every operation by itself.
@functools.partial(jax.jit, static_argnames=("mask", "score", "block_sizes"))
def blockwise_attention(
    operands: Operands,
    *,
    mask: Mask,
    score: Score,
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Output in the query's dtype and log-sum-exp in the accumulator dtype; arguments are checked by the caller."""
    lengths = operands.query.shape[1], operands.key.shape[1]
    block_q, block_kv = block_sizes or map(block_size, lengths)
    plan = Plan(mask, score, min(block_q, lengths[0]), min(block_kv, lengths[1]))
    return _attention(plan, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, x: Operands) -> tuple[Array, Array]:
    stacks = _stack(plan, x)

    def step(state: State, row: Any, col: Any, partial: bool) -> State:
        query, key, value, bias, allowed = _cut(plan, x, stacks, row, col, partial)
        block = State(*(part[row] for part in state))
        block = absorb(block, query, key, value, bias, allowed, plan.score)
        return State(*(part.at[row].set(new) for part, new in zip(state, block, strict=True)))

    state = initial_state(stacks.query, x.value.shape[-1], grouped_sinks(x))
    out, lse = finish(_walk(plan, x, step, state))
    out = from_blocks(out, x.query.shape[1])
    lse = from_blocks(lse[..., None], x.query.shape[1])
    return out.reshape(*x.query.shape[:3], -1).astype(x.query.dtype), lse.reshape(x.query.shape[:3])


def _forward(plan: Plan, x: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Array, Array]]:
    out, lse = _attention(plan, x)
    return (out, lse), (x, out, lse)


class _Sums(NamedTuple):
    """The gradients while they are summed up, in the accumulator dtype."""

    query: Array
    key: Array
    value: Array
    bias: Array | None


def _backward(plan: Plan, residuals: tuple[Operands, Array, Array], cotangents: tuple[Array, Array]) -> tuple[Operands]:
    x, out, lse = residuals
    d_out, d_lse = cotangents
    stacks = _stack(plan, x)
    shift, delta = row_statistics(out, lse, d_out, d_lse)
    rows = tuple(to_blocks(grouped(x, a), plan.block_q) for a in (shift[..., None], delta[..., None], d_out))

    def step(sums: _Sums, row: Any, col: Any, partial: bool) -> _Sums:
        query, key, value, bias, allowed = _cut(plan, x, stacks, row, col, partial)
        shift, delta, d_out = (stack[row] for stack in rows)
        tile = gradients(query, key, value, bias, allowed, shift[..., 0], delta[..., 0], d_out, plan.score)
        return _Sums(
            query=sums.query.at[row].add(tile.query),
            key=sums.key.at[col].add(tile.key),
            value=sums.value.at[col].add(tile.value),
            bias=None if sums.bias is None else _add_to_bias(plan, sums.bias, tile.logits, row, col),
        )

    zeros = jax.tree.map(lambda a: jnp.zeros_like(a, lse.dtype), _Sums(*stacks[:3], x.bias))
    sums = _walk(plan, x, step, zeros)
    d_sinks = None if x.sinks is None else sink_gradient(x.sinks, shift, delta, axes=(0, 1)).astype(x.sinks.dtype)
    return (
        Operands(
            query=from_blocks(sums.query, x.query.shape[1]).reshape(x.query.shape).astype(x.query.dtype),
            key=from_blocks(sums.key, x.key.shape[1]).astype(x.key.dtype),
            value=from_blocks(sums.value, x.value.shape[1]).astype(x.value.dtype),
            bias=None if sums.bias is None or x.bias is None else sums.bias.astype(x.bias.dtype),
            sinks=d_sinks,
        ),
    )


_attention.defvjp(_forward, _backward)


def _walk(plan: Plan, x: Operands, step: Callable[..., Any], carry: Any) -> Any:
    """Run `step(carry, row, col, partial)` over the listed pairs: full ones, then partial ones."""
    q_len, kv_len = x.query.shape[1], x.key.shape[1]
    row, col, kind = plan.mask.block_lists(q_len, kv_len, plan.block_q, plan.block_kv).by_row
    # A tile that reaches beyond a sequence is partial, whatever the mask says.
    inside = ((row + 1) * plan.block_q <= q_len) & ((col + 1) * plan.block_kv <= kv_len)
    full = (kind == FULL) & inside
    carry = _loop(functools.partial(step, partial=False), carry, row[full], col[full])
    partial = (kind != EMPTY) & ~full
    return _loop(functools.partial(step, partial=True), carry, row[partial], col[partial])


def _loop(step: Callable[..., Any], carry: Any, row: np.ndarray, col: np.ndarray) -> Any:
    if len(row) > 1:
        return jax.lax.scan(lambda c, pair: (step(c, *pair), None), carry, (row, col))[0]
    for r, c in zip(row.tolist(), col.tolist(), strict=True):
        carry = step(carry, r, c)
    return carry


class Stacks(NamedTuple):
    """Operands in blocks: queries `[nq, B, K, G, bq, H]`, keys and values `[nk, B, K, bk, .]`, ids `[., B, b, 1]`."""

    query: Array
    key: Array
    value: Array
    q_segments: Array | None
    kv_segments: Array | None


def _stack(plan: Plan, x: Operands) -> Stacks:
    return Stacks(
        to_blocks(grouped(x, x.query), plan.block_q),
        to_blocks(x.key, plan.block_kv),
        to_blocks(x.value, plan.block_kv),
        None if x.q_segments is None else to_blocks(x.q_segments[..., None], plan.block_q),
        None if x.kv_segments is None else to_blocks(x.kv_segments[..., None], plan.block_kv),
    )


def _cut(
    plan: Plan, x: Operands, stacks: Stacks, row: Any, col: Any, partial: bool
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Query, key, value, bias of a tile and who sees whom there; the last two broadcast to [B, K, G, bq, bk]."""
    q_len, kv_len = x.query.shape[1], x.key.shape[1]
    conditions: list[Array] = []
    if partial:
        q_pos = row * plan.block_q + jnp.arange(plan.block_q)[:, None]
        kv_pos = col * plan.block_kv + jnp.arange(plan.block_kv)[None, :]
        if plan.mask != Full():
            conditions.append(plan.mask.elem(q_pos, kv_pos, jnp.arange(x.query.shape[2]).reshape(*_heads(x), 1, 1)))
        if q_len % plan.block_q:
            conditions.append(q_pos < q_len)
        if kv_len % plan.block_kv:
            conditions.append(kv_pos < kv_len)
    if x.mask is not None:
        conditions.append(_cut_pairs(plan, x, x.mask, row, col))
    if stacks.q_segments is not None and stacks.kv_segments is not None:
        same = stacks.q_segments[row] == jnp.swapaxes(stacks.kv_segments[col], 1, 2)
        conditions.append(same[:, None, None])
    bias = None if x.bias is None else _cut_pairs(plan, x, x.bias, row, col)
    allowed = functools.reduce(jnp.logical_and, conditions) if conditions else None
    return stacks.query[row], stacks.key[col], stacks.value[col], bias, allowed


def _cut_pairs(plan: Plan, x: Operands, array: Array, row: Any, col: Any) -> Array:
    """The tile [#B, #K, #G, #bq, #bk] of an array [#B, #N, #T, #S]; beyond the sequence it holds anything."""
    batch, heads, q_len, kv_len = array.shape
    starts, (down, right) = _places(plan, array, row, col)
    sizes = (batch, heads, min(q_len, plan.block_q), min(kv_len, plan.block_kv))
    tile = _roll(jax.lax.dynamic_slice(array, starts, sizes), -down, -right)
    return tile.reshape(batch, *(_heads(x) if heads > 1 else (1, 1)), *tile.shape[2:])


def _add_to_bias(plan: Plan, total: Array, tile: Array, row: Any, col: Any) -> Array:
    """Add a tile [B, K, G, bq, bk], which is 0 beyond the sequence, to the gradient of a bias."""
    starts, (down, right) = _places(plan, total, row, col)
    tile = tile.reshape(tile.shape[0], -1, *tile.shape[3:])
    tile = jnp.sum(tile, axis=[axis for axis in range(4) if total.shape[axis] == 1], keepdims=True)
    tile = _roll(tile, down, right)
    return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, starts, tile.shape) + tile, starts)


def _places(plan: Plan, array: Array, row: Any, col: Any) -> tuple[list[Array], list[Any]]:
    """Where to slice a tile out of an array of pairs, and by how much that is before the tile's own start.

    A slice must lie inside, so that of a ragged last block begins early. An axis of one block has one place.
    """
    starts, shifts = [jnp.int32(0), jnp.int32(0)], []
    for length, block, index in zip(array.shape[2:], (plan.block_q, plan.block_kv), (row, col), strict=True):
        start = index * block if length > block else 0
        early = jnp.maximum(start + block - length, 0) if length > block and length % block else 0
        starts.append(jnp.int32(start - early))
        shifts.append(early)
    return starts, shifts


def _roll(tile: Array, down: Any, right: Any) -> Array:
    """Roll the last two axes; a Python 0 costs nothing."""
    for axis, shift in ((2, down), (3, right)):
        if not isinstance(shift, int):
            tile = jnp.roll(tile, shift, axis)
    return tile


def _heads(x: Operands) -> tuple[int, int]:
    """K, and the G query heads that share each."""
    return x.key.shape[2], x.query.shape[2] // x.key.shape[2]


def grouped(x: Operands, array: Array) -> Array:
    """[B, T, N, ...] as [B, T, K, G, ...]."""
    return array.reshape(*array.shape[:2], *_heads(x), *array.shape[3:])


def grouped_sinks(x: Operands) -> Array | None:
    return None if x.sinks is None else x.sinks.reshape(_heads(x))


def to_blocks(x: Array, block: int, blocks: int | None = None) -> Array:
    """[B, T, *heads, D] as [n, B, *heads, block, D], filled up with zeros; n is `blocks` or as few as hold T."""
    batch, length, *rest = x.shape
    blocks = blocks or math.ceil(length / block)
    if blocks * block != length:
        x = jnp.pad(x, [(0, 0), (0, blocks * block - length), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(jnp.moveaxis(x.reshape(batch, blocks, block, *rest), 1, 0), 2, -2)


def from_blocks(x: Array, length: int) -> Array:
    """The inverse of `to_blocks`."""
    x = jnp.moveaxis(jnp.moveaxis(x, -2, 2), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
