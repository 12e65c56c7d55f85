"""Softmax attention tile by tile: exact, O(T) memory, and only over the pairs of blocks that are listed.

A walk goes over the list of the full pairs, which need no element mask, then over that of the partial ones. Online
softmax does not mind the order. The backward pass walks the same pairs once, recomputes the probabilities from the
log-sum-exp, and adds into dq, dk and dv in a fixed order, so gradients are deterministic. Lists may be known before the
program runs or not; the loop over traced lists ends where the longest of them does.

Inside, everything is a stack of blocks, so that a step reads and writes contiguous memory: queries
[nq, B, K, G, bq, H], keys [nk, B, K, bk, H]. A bias or mask array is never copied: each step slices its tile out of it.
Batch rows or heads with lists of their own are mapped over: each then is a batch of one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jattn.checks import accumulator_dtype
from jattn.masks import EMPTY, FULL, Full, Mask
from jattn.softmax_tile import (
    Score,
    State,
    Tile,
    absorb,
    finish,
    gradients,
    initial_state,
    row_statistics,
    sink_gradient,
)
from pallas_kernels.block_sparse import dropout


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
    captured: tuple[Any, ...] | None = None
    """What a score function reads beside positions."""
    seed: UInt32[Array, ""] | None = None
    """Of the dropout."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a call. Blocks are at most as long as the sequence.

    Attributes:
      mask: who sees whom in a partial pair.
      score_mod: `f(score, b, h, q_pos, kv_pos, *captured) -> score` on arrays that broadcast against the score.
    """

    mask: Mask
    score: Score
    block_q: int
    block_kv: int
    score_mod: Callable[..., Array] | None = None
    dropout_rate: float = 0.0


class Pairs(NamedTuple):
    """Pairs of blocks in the order in which they are visited: one list for all or for each batch row, head or both.

    Attributes:
      row, col: the blocks of queries and of keys.
      bank: which block of the walk's bank says who sees whom, or `None`.
      used: how many are to be visited, the first ones of a list; `None` is all.
      bound: the largest of them, where only the running program knows it.
    """

    row: Int[Array, "#B #N A"]
    col: Int[Array, "#B #N A"]
    bank: Int[Array, "#B #N A"] | None = None
    used: Int[Array, "#B #N"] | None = None
    bound: Int[Array, ""] | None = None


class Walk(NamedTuple):
    """What is visited: full pairs, then partial ones, with a bank of boolean blocks if they have one."""

    full: Pairs
    partial: Pairs
    bank: Bool[Array, "P bq bk"] | None = None


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
    q_len, kv_len = operands.query.shape[1], operands.key.shape[1]
    block_q, block_kv = block_sizes or map(block_size, (q_len, kv_len))
    plan = Plan(mask, score, min(block_q, q_len), min(block_kv, kv_len))
    row, col, kind = mask.block_lists(q_len, kv_len, plan.block_q, plan.block_kv).by_row
    # A tile that reaches beyond a sequence is partial, whatever the mask says.
    inside = ((row + 1) * plan.block_q <= q_len) & ((col + 1) * plan.block_kv <= kv_len)
    full = (kind == FULL) & inside
    partial = (kind != EMPTY) & ~full
    lists = [Pairs(row[chosen][None, None], col[chosen][None, None]) for chosen in (full, partial)]
    return walk_blocks(plan, operands, Walk(full=lists[0], partial=lists[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def walk_blocks(plan: Plan, x: Operands, walk: Walk) -> tuple[Array, Array]:
    """Output in the query's dtype and log-sum-exp in the accumulator dtype."""
    out, lse = _for_each_list(functools.partial(_attend, plan), _ROWS, x, walk, None)
    return out.astype(x.query.dtype), lse


def _forward(plan: Plan, x: Operands, walk: Walk) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, lse = walk_blocks(plan, x, walk)
    return (out, lse), (x, walk, out, lse)


def _backward(plan: Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Operands, None]:
    x, walk, out, lse = residuals
    d_out, d_lse = cotangents
    rows = (*row_statistics(out, lse, d_out, d_lse), d_out)
    sums = _for_each_list(functools.partial(_pull_back, plan), _OPERANDS, x, walk, rows)
    sums = sums._replace(captured=jax.tree.unflatten(jax.tree.structure(x.captured), sums.captured))

    def cast(total: Array | None, a: Array) -> Array | None:
        return None if total is None else total.astype(a.dtype)

    return jax.tree.map(cast, sums, x, is_leaf=lambda total: total is None), None


walk_blocks.defvjp(_forward, _backward)


class _Places(NamedTuple):
    """Which rows of the batch and which heads the operands are."""

    batch: Int[Array, " B"]
    head: Int[Array, " N"]


def _attend(plan: Plan, x: Operands, walk: Walk, places: _Places, _: None) -> tuple[Array, Array]:
    """Output and log-sum-exp in the accumulator dtype, with one list for all."""
    stacks = _stack(plan, x)

    def step(state: State, at: _Visit, partial: bool) -> State:
        block = State(*(part[at.row] for part in state))
        block = absorb(block, _cut(plan, x, walk, places, stacks, at, partial), plan.score)
        return State(*(part.at[at.row].set(new) for part, new in zip(state, block, strict=True)))

    state = initial_state(stacks.query, x.value.shape[-1], grouped_sinks(x))
    out, lse = finish(_visit(walk, step, state))
    out = from_blocks(out, x.query.shape[1])
    lse = from_blocks(lse[..., None], x.query.shape[1])
    return out.reshape(*x.query.shape[:3], -1), lse.reshape(x.query.shape[:3])


class _Sums(NamedTuple):
    """The gradients while they are summed up, in the accumulator dtype."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    captured: list[Array | None]


def _pull_back(plan: Plan, x: Operands, walk: Walk, places: _Places, rows: tuple[Array, Array, Array]) -> Operands:
    """The gradients in the accumulator dtype, with one list for all, from `(shift, delta, d_out)` of the rows."""
    stacks = _stack(plan, x)
    shift, delta, d_out = rows
    blocks = tuple(to_blocks(grouped(x, a), plan.block_q) for a in (shift[..., None], delta[..., None], d_out))

    def step(sums: _Sums, at: _Visit, partial: bool) -> _Sums:
        shift, delta, d_out = (stack[at.row] for stack in blocks)
        tile = _cut(plan, x, walk, places, stacks, at, partial)
        new = gradients(tile, shift[..., 0], delta[..., 0], d_out, plan.score)
        return _Sums(
            query=sums.query.at[at.row].add(new.query),
            key=sums.key.at[at.col].add(new.key),
            value=sums.value.at[at.col].add(new.value),
            bias=None if sums.bias is None else _add_to_bias(plan, sums.bias, new.logits, at.row, at.col),
            captured=_added(sums.captured, new.parameters),
        )

    wide = functools.partial(jnp.zeros_like, dtype=shift.dtype)
    captured = [None if a is None else jnp.zeros_like(a, accumulator_dtype(a.dtype)) for a in _floating(x.captured)]
    bias = None if x.bias is None else wide(x.bias)
    zeros = _Sums(wide(stacks.query), wide(stacks.key), wide(stacks.value), bias, captured)
    sums = _visit(walk, step, zeros)
    return Operands(
        query=from_blocks(sums.query, x.query.shape[1]).reshape(x.query.shape),
        key=from_blocks(sums.key, x.key.shape[1]),
        value=from_blocks(sums.value, x.value.shape[1]),
        bias=sums.bias,
        sinks=None if x.sinks is None else sink_gradient(x.sinks, shift, delta, axes=(0, 1)),
        captured=tuple(sums.captured),
    )


# Which axis the parts of a call are cut along: batch rows with lists of their own, key heads, the query heads of a key
# head. `None`: each part gets the whole, and its gradients are summed.
_BATCH, _HEADS, _GROUPS = range(3)
_AXES: Any = (  # of rows, keys, pairs, heads, batch, lists
    (0, 0, 0, None, 0, 0),
    (2, 2, 1, 0, None, 1),
    (2, None, 1, 0, None, 1),
)
_ROWS = tuple(rows for rows, *_ in _AXES)
_OPERANDS = tuple(
    Operands(
        query=rows, key=keys, value=keys, bias=pairs, mask=pairs, sinks=heads,
        q_segments=batch, kv_segments=batch, captured=None, seed=None,
    )
    for rows, keys, pairs, heads, batch, _ in _AXES
)  # fmt: skip
_LISTS = tuple(Pairs(lists, lists, lists, lists, None) for *_, lists in _AXES)
_PLACES = tuple(_Places(batch, heads) for *_, heads, batch, _ in _AXES)


def _for_each_list(f: Callable[..., Any], out_axes: Any, x: Operands, walk: Walk, rows: Any) -> Any:
    """`f(x, walk, places, rows)` of every part of the call that has a list of its own, put together again."""
    kv_heads, groups = _heads(x)
    batch_lists, head_lists = walk.partial.row.shape[:2]
    levels = (
        (_GROUPS, groups if head_lists > kv_heads else 1),
        (_HEADS, kv_heads if head_lists > 1 else 1),
        (_BATCH, batch_lists),
    )
    for level, count in levels:
        if count > 1:
            in_axes = (_OPERANDS[level], Walk(_LISTS[level], _LISTS[level], bank=None), _PLACES[level], _ROWS[level])
            f = _in_parts(f, count, in_axes, out_axes[level])
    return f(x, walk, _Places(jnp.arange(x.query.shape[0]), jnp.arange(x.query.shape[2])), rows)


def _in_parts(f: Callable[..., Any], count: int, in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """`f` mapped over `count` consecutive parts of its arguments, each with all axes that the arguments have."""

    def split(axis: int | None, tree: Any) -> Any:
        return tree if axis is None else jax.tree.map(
            lambda a: a.reshape(*a.shape[:axis], count, a.shape[axis] // count, *a.shape[axis + 1 :]), tree
        )  # fmt: skip

    def join(axis: int | None, tree: Any) -> Any:
        if axis is None:
            return jax.tree.map(lambda a: jnp.sum(a, axis=0), tree)
        return jax.tree.map(lambda a: a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :]), tree)

    def whole(axis: int | None) -> bool:
        return axis is None

    def mapped(*args: Any) -> Any:
        parts = jax.tree.map(split, in_axes, args, is_leaf=whole)
        summed = jax.tree.map(lambda axis: 0 if axis is None else axis, out_axes, is_leaf=whole)
        return jax.tree.map(join, out_axes, jax.vmap(f, in_axes, summed)(*parts), is_leaf=whole)

    return mapped


class _Visit(NamedTuple):
    """One pair of blocks; `live` is false where a list is over before the longest."""

    row: Array
    col: Array
    bank: Array | None
    live: Array | None


def _visit(walk: Walk, step: Callable[..., Any], carry: Any) -> Any:
    """Run `step(carry, visit, partial)` over the pairs of one list."""
    carry = _loop(functools.partial(step, partial=False), carry, walk.full)
    return _loop(functools.partial(step, partial=True), carry, walk.partial)


def _loop(step: Callable[..., Any], carry: Any, pairs: Pairs) -> Any:
    row, col, bank, used = jax.tree.map(lambda a: jnp.asarray(a)[0, 0], pairs[:4])
    visits = _Visit(row, col, bank, None if used is None else jnp.arange(len(row)) < used)

    def visit(i: Any) -> _Visit:
        return jax.tree.map(lambda a: a[i], visits)

    if pairs.bound is not None:
        return jax.lax.fori_loop(0, pairs.bound, lambda i, carry: step(carry, visit(i)), carry)
    if len(row) > 1:
        return jax.lax.scan(lambda carry, at: (step(carry, at), None), carry, visits)[0]
    return step(carry, visit(0)) if len(row) else carry


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


def _cut(plan: Plan, x: Operands, walk: Walk, places: _Places, stacks: Stacks, at: _Visit, partial: bool) -> Tile:
    """The tile of a pair of blocks; what it has beside query, key and value broadcasts to [B, K, G, bq, bk]."""
    q_len, kv_len = x.query.shape[1], x.key.shape[1]
    q_pos = at.row * plan.block_q + jnp.arange(plan.block_q)[:, None]
    kv_pos = at.col * plan.block_kv + jnp.arange(plan.block_kv)[None, :]
    batch, head = places.batch.reshape(-1, 1, 1, 1, 1), places.head.reshape(*_heads(x), 1, 1)
    conditions: list[Array] = [] if at.live is None else [at.live]
    if partial:
        if plan.mask != Full():
            conditions.append(plan.mask.elem(q_pos, kv_pos, head))
        if walk.bank is not None and at.bank is not None:
            conditions.append(walk.bank[at.bank, : plan.block_q, : plan.block_kv])
        if q_len % plan.block_q:
            conditions.append(q_pos < q_len)
        if kv_len % plan.block_kv:
            conditions.append(kv_pos < kv_len)
    if x.mask is not None:
        conditions.append(_cut_pairs(plan, x, x.mask, at.row, at.col))
    if stacks.q_segments is not None and stacks.kv_segments is not None:
        same = stacks.q_segments[at.row] == jnp.swapaxes(stacks.kv_segments[at.col], 1, 2)
        conditions.append(same[:, None, None])
    tile = Tile(
        stacks.query[at.row],
        stacks.key[at.col],
        stacks.value[at.col],
        bias=None if x.bias is None else _cut_pairs(plan, x, x.bias, at.row, at.col),
        allowed=functools.reduce(jnp.logical_and, conditions) if conditions else None,
    )
    if plan.score_mod is not None:
        modify = functools.partial(_modify, plan.score_mod, x.captured, (batch, head, q_pos, kv_pos))
        tile = tile._replace(modify=modify, parameters=_floating(x.captured))
    if x.seed is not None:
        dtype = accumulator_dtype(x.query.dtype)
        keep = dropout.factors(x.seed, batch, head, q_pos, kv_pos, plan.dropout_rate, dtype)
        tile = tile._replace(keep=keep)
    return tile


def _added(totals: list[Array | None], new: list[Array | None] | None) -> list[Array | None]:
    return totals if new is None else jax.tree.map(lambda total, a: total + a.astype(total.dtype), totals, new)


def _floating(captured: Any) -> list[Array | None]:
    """The leaves that a derivative is taken by, and `None` for the others."""
    return [a if jnp.issubdtype(a.dtype, jnp.floating) else None for a in jax.tree.leaves(captured)]


def _modify(
    score_mod: Callable[..., Array], captured: Any, where: tuple[Array, ...], score: Array, floating: list[Array | None]
) -> Array:
    """`score_mod` as a function of the score and of what `_floating` gives."""
    leaves, structure = jax.tree.flatten(captured)
    leaves = [old if new is None else new for old, new in zip(leaves, floating, strict=True)]
    return score_mod(score, *where, *jax.tree.unflatten(structure, leaves)).astype(score.dtype)


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
