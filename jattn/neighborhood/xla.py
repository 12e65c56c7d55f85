"""Neighborhood attention by XLA: tiles of queries against the keys of their windows, gathered.

In a dilation group a tile of queries i0 .. i1 along an axis sees the keys start(i0) .. end(i1) - 1 and no others, at
most `reach` of them; on a grid the reaches multiply. A scan works on a few tiles at a time,

    S = scale q k'[start(i0) ...] + bias where seen        o, lse = softmax of S, over the reach

with O(tokens x reach / tile) gathered keys but O(tokens) memory. The gradients are of the same form: dq of a tile of
queries from the keys of its windows; dk and dv of a tile of keys j0 .. j1 from the queries qstart(j0) .. qend(j1) - 1,
the only ones that see it. They gather too and scatter nothing, so their bits repeat. For the bias table,

    d bias_r = sum_ij dS_ij [j - i + w - 1 = r]

is a product with that indicator along each axis.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jattn.dispatch import over_mesh
from jattn.neighborhood.arguments import Operands
from jattn.neighborhood.permute import token_permute, token_unpermute
from jattn.neighborhood.tiles import by_group
from jattn.neighborhood.window import Axis, Neighborhood, inverse_window_bounds, window_bounds
from jattn.softmax_tile import Score, Tile, absorb, finish, gradients, initial_state, row_statistics

LOGITS = 2**18
"""Of all tiles that are worked on at a time, about; measured on a CPU: a quarter and four times that are no faster."""


class _Along(NamedTuple):
    """One axis of a side: what its tiles and its tokens see of the other side.

    Attributes:
      first: the first token that a tile sees.
      reach: how many from there on a tile sees at most.
      low, high: a token sees the tokens low .. high - 1.
    """

    first: Int[np.ndarray, "d n"]
    reach: int
    low: Int[np.ndarray, "d nt"]
    high: Int[np.ndarray, "d nt"]


@dataclasses.dataclass(frozen=True)
class _Side:
    """The queries, which see keys, or the keys, which are seen by queries: in tiles, `per_step` of them at a time."""

    axes: tuple[Axis, ...]
    tile: tuple[int, ...]
    is_keys: bool
    per_step: int = 1

    @functools.cached_property
    def dilation(self) -> tuple[int, ...]:
        return tuple(axis.dilation for axis in self.axes)

    @functools.cached_property
    def tiles(self) -> tuple[int, ...]:
        """Tiles along every axis, in each group."""
        return tuple(math.ceil(a.extent / (a.dilation * t)) for a, t in zip(self.axes, self.tile, strict=True))

    @property
    def rows(self) -> int:
        """Tiles of all groups."""
        return math.prod(self.dilation) * math.prod(self.tiles)

    @property
    def steps(self) -> int:
        return math.ceil(self.rows / self.per_step)

    @functools.cached_property
    def along(self) -> tuple[_Along, ...]:
        found = []
        for axis, t, n in zip(self.axes, self.tile, self.tiles, strict=True):
            bounds = inverse_window_bounds(*axis) if self.is_keys else window_bounds(*axis)
            low, high = (by_group(axis, each, n * t) for each in bounds)
            first, stop = low[:, ::t], high[:, t - 1 :: t]
            found.append(_Along(first, int((stop - first).max()), low, high))
        return tuple(found)

    @property
    def pairs(self) -> int:
        """Logits of a tile, for one batch row and head."""
        return math.prod(self.tile) * math.prod(along.reach for along in self.along)


class _Seen(NamedTuple):
    """What p tiles of one side see of the other side.

    Attributes:
      tokens: those in reach, as row-major indices of the grid; one beyond a group is any token, and not seen.
      pairs: which token of the tile sees which of these.
      distances: from the tokens of the tile to these, in tokens of a group, along every axis.
    """

    tokens: Int[Array, "p S"]
    pairs: Bool[Array, "p P S"]
    distances: tuple[Int[Array, "p t s"], ...]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call."""

    queries: _Side
    keys: _Side
    score: Score


def windowed_attention(
    operands: Operands,
    *,
    neighborhood: Neighborhood,
    score: Score,
    q_tile: tuple[int, ...] | None = None,
    kv_tile: tuple[int, ...] | None = None,
) -> tuple[Float[Array, "B ... N V"], Float[Array, "B ... N"]]:
    """Output in the query's dtype and log-sum-exp in the accumulator dtype, over windows alone; arguments are checked.

    Args:
      q_tile: tokens of a tile of queries along every axis; `None` is what is fast.
      kv_tile: of a tile of keys, in the backward pass.
    """
    axes = neighborhood.axes(operands.grid)
    heads = operands.query.shape[0] * operands.query.shape[-2]

    def side(tile: tuple[int, ...] | None, is_keys: bool) -> _Side:
        whole = _Side(axes, tile or _default_tile(axes, is_keys), is_keys)
        steps = math.ceil(whole.rows / max(1, LOGITS // (heads * whole.pairs)))
        return dataclasses.replace(whole, per_step=math.ceil(whole.rows / steps))

    plan = _Plan(side(q_tile, False), side(kv_tile, True), score)
    return _compiled(plan, operands._replace(additional_keys=None, additional_values=None))


def _default_tile(axes: tuple[Axis, ...], is_keys: bool) -> tuple[int, ...]:
    """Edges of at least half a window, or what a machine multiplies well, and such that strides and extents fit in.

    A tile of t tokens is work of (t + c) x reach: products, and the gathering and masking that does not become less for
    small tiles. Measured on a CPU for windows of 3 to 255 over 1 to 3 axes.
    """
    least, most = {1: (16, 128), 2: (4, 8), 3: (2, 4)}[len(axes)]

    def edge(axis: Axis) -> int:
        usual = min(max(least, axis.window // 2), most)

        def cost(t: int) -> float:
            side = _Side((axis,), (t,), is_keys)
            return side.tiles[0] * (t + usual / 4) * side.along[0].reach

        return min(range(usual, 2 * usual + 1), key=cost)

    return tuple(edge(axis) for axis in axes)


# Compiled as one even when it is called eagerly, which else would compile every operation by itself.
@functools.partial(jax.jit, static_argnums=0)
def _compiled(plan: _Plan, operands: Operands) -> tuple[Array, Array]:
    rows = P(*jax.typeof(operands.query).sharding.spec[:-1])
    return over_mesh(functools.partial(_attention, plan), (rows, rows), operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, x: Operands) -> tuple[Array, Array]:
    flat = _flat_keys(x)

    def step(_: None, own: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        index, query = own
        tile = _over_keys(plan, x, flat, query, _seen(plan.queries, index))
        out, lse = finish(absorb(initial_state(query, x.value.shape[-1], None), tile, plan.score))
        return None, (out, lse[..., None])

    stack = _stack(plan.queries, _by_head(x, x.query))
    _, (out, lse) = jax.lax.scan(step, None, (_indices(plan.queries), stack))
    out, lse = (_unstack(plan.queries, x.grid, a) for a in (out, lse))
    return out.astype(x.query.dtype), lse[..., 0]


def _forward(plan: _Plan, x: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Array, Array]]:
    out, lse = _attention(plan, x)
    return (out, lse), (x, out, lse)


def _backward(
    plan: _Plan, residuals: tuple[Operands, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Operands]:
    x, out, lse = residuals
    d_out, d_lse = cotangents
    shift, delta = row_statistics(out, lse, d_out, d_lse)
    per_query = tuple(_by_head(x, a) for a in (x.query, shift[..., None], delta[..., None], d_out))
    flat, flat_queries = _flat_keys(x), tuple(_flat(a) for a in per_query)

    def of_queries(d_bias: Array | None, own: tuple[Array, ...]) -> tuple[Array | None, Array]:
        index, query, shift, delta, d_out = own
        seen = _seen(plan.queries, index)
        tile = gradients(_over_keys(plan, x, flat, query, seen), shift[..., 0], delta[..., 0], d_out, plan.score)
        return None if d_bias is None else d_bias + _bias_gradient(plan, tile.logits, seen), tile.query

    def of_keys(_: None, own: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        index, key, value, mask = own
        seen = _seen(plan.keys, index)
        query, shift, delta, d_out = (_taken(a, seen) for a in flat_queries)
        allowed = jnp.swapaxes(seen.pairs, -1, -2)[:, None]
        if mask is not None:
            allowed = allowed & jnp.swapaxes(mask, -1, -2)
        tile = Tile(query, key[..., 0, :, :], value[..., 0, :, :], _bias(plan, x, seen, plan.keys), allowed)
        found = gradients(tile, shift[..., 0], delta[..., 0], d_out, plan.score)
        return None, (found.key[..., None, :, :], found.value[..., None, :, :])

    zero = None if x.rel_pos_bias is None else jnp.zeros_like(x.rel_pos_bias, lse.dtype)
    own = (_indices(plan.queries), *(_stack(plan.queries, a) for a in per_query))
    d_bias, d_query = jax.lax.scan(of_queries, zero, own)
    per_key = (*(_by_head(x, a) for a in (x.key, x.value)), _mask_by_head(x))
    stacks: Any = (None if a is None else _stack(plan.keys, a) for a in per_key)
    _, (d_key, d_value) = jax.lax.scan(of_keys, None, (_indices(plan.keys), *stacks))
    return (
        Operands(
            query=_unstack(plan.queries, x.grid, d_query).astype(x.query.dtype),
            key=_unstack(plan.keys, x.grid, d_key).astype(x.key.dtype),
            value=_unstack(plan.keys, x.grid, d_value).astype(x.value.dtype),
            rel_pos_bias=None if d_bias is None or x.rel_pos_bias is None else d_bias.astype(x.rel_pos_bias.dtype),
        ),
    )


_attention.defvjp(_forward, _backward)


def _seen(side: _Side, index: Int[Array, " p"]) -> _Seen:
    """What the tiles of these indices see."""
    rank, p = len(side.axes), index.shape[0]
    where = jnp.unravel_index(index, (*side.dilation, *side.tiles))
    tokens, pairs = jnp.zeros((p,) + (1,) * rank, index.dtype), jnp.ones((p,) + (1,) * (2 * rank), bool)
    distances = []
    for a, (axis, t, along) in enumerate(zip(side.axes, side.tile, side.along, strict=True)):
        group, tile = where[a][:, None], where[rank + a][:, None]
        own = tile * t + jnp.arange(t)
        other = jnp.asarray(along.first)[group, tile] + jnp.arange(along.reach)
        low, high = (jnp.asarray(bound)[group, own][..., None] for bound in (along.low, along.high))
        seen = (low <= other[:, None]) & (other[:, None] < high)
        token = jnp.minimum(other * axis.dilation + group, axis.extent - 1)
        tokens = tokens * axis.extent + _at(token, (a,), rank)
        pairs = pairs & _at(seen, (a, rank + a), 2 * rank)
        distances.append(other[:, None] - own[..., None])
    return _Seen(tokens.reshape(p, -1), pairs.reshape(p, math.prod(side.tile), -1), tuple(distances))


def _at(x: Array, axes: tuple[int, ...], rank: int) -> Array:
    """`[p, ...]` with its axes after the first at `axes` of `rank`."""
    shape = [1] * rank
    for a, size in zip(axes, x.shape[1:], strict=True):
        shape[a] = size
    return x.reshape(x.shape[0], *shape)


def _over_keys(plan: _Plan, x: Operands, flat: Any, query: Array, seen: _Seen) -> Tile:
    """Tiles of queries `[B, K, p, G, P, H]` and what is in their reach, `[B, K, p, S, .]`."""
    taken: Any = (None if a is None else _taken(a, seen)[..., 0, :, :] for a in flat)
    key, value, mask = taken
    allowed = seen.pairs[:, None]
    if mask is not None:
        allowed = allowed & jnp.swapaxes(mask, -1, -2)[..., None, :, :]
    return Tile(query, key, value, _bias(plan, x, seen, plan.queries), allowed)


def _bias(plan: _Plan, x: Operands, seen: _Seen, side: _Side) -> Float[Array, "K p G P S"] | None:
    """The entry of the table for every pair in reach; that of a pair which is not seen is any."""
    table = x.rel_pos_bias
    if table is None:
        return None
    rank, kv_heads = len(side.axes), x.key.shape[-2]
    index = jnp.zeros((), np.int32)
    for a, (size, distance) in enumerate(zip(table.shape[1:], seen.distances, strict=True)):
        entry = jnp.clip((-distance if side.is_keys else distance) + size // 2, 0, size - 1)
        index = index * size + _at(entry, (a, rank + a), 2 * rank)
    index = index.reshape(seen.pairs.shape)
    entries = table.reshape(kv_heads, -1, math.prod(table.shape[1:]))[:, :, index]
    entries = jnp.moveaxis(entries, 1, 2)
    return jnp.swapaxes(entries, -1, -2) if side.is_keys else entries


def _bias_gradient(plan: _Plan, logits: Float[Array, "B K p G P S"], seen: _Seen) -> Float[Array, "N ..."]:
    """The sum of the gradients of all logits that read an entry of the table."""
    rank = len(seen.distances)
    sizes = [2 * axis.window - 1 for axis in plan.queries.axes]
    logits = jnp.moveaxis(logits.sum(axis=0), 1, 0)
    own, other, entries = ("abc"[:rank], "def"[:rank], "xyz"[:rank])
    hits = [d[..., None] + size // 2 == jnp.arange(size) for d, size in zip(seen.distances, sizes, strict=True)]
    reach = (d.shape[-1] for d in seen.distances)
    logits = logits.reshape(logits.shape[0], -1, *plan.queries.tile, *reach)
    spec = ",".join([f"pn{own}{other}", *(f"p{t}{s}{r}" for t, s, r in zip(own, other, entries, strict=True))])
    return jnp.einsum(f"{spec}->n{entries}", logits, *(hit.astype(logits.dtype) for hit in hits))


def _by_head(x: Operands, a: Float[Array, "B ... N D"]) -> Float[Array, "B ... K G D"]:
    """With the heads that share a key head beside it; keys and values have one of them."""
    return a.reshape(*a.shape[:-2], x.key.shape[-2], -1, a.shape[-1])


def _mask_by_head(x: Operands) -> Bool[Array, "B ... 1 1 1"] | None:
    return None if x.key_mask is None else x.key_mask[..., None, None, None]


def _flat_keys(x: Operands) -> tuple[Array | None, ...]:
    """Keys, values and their mask, for `_taken`."""
    mask = _mask_by_head(x)
    return _flat(_by_head(x, x.key)), _flat(_by_head(x, x.value)), None if mask is None else _flat(mask)


def _flat(a: Float[Array, "B ... K G D"]) -> Float[Array, "B K G T D"]:
    return jnp.moveaxis(a.reshape(a.shape[0], -1, *a.shape[-3:]), 1, 3)


def _taken(flat: Float[Array, "B K G T D"], seen: _Seen) -> Float[Array, "B K p G S D"]:
    """The tokens in reach of p tiles."""
    return jnp.moveaxis(flat.at[:, :, :, seen.tokens].get(mode="promise_in_bounds"), 2, 3)


def _indices(side: _Side) -> Int[Array, "steps p"]:
    """The tiles of every step; those that fill up the last one are the last tile."""
    return jnp.minimum(jnp.arange(side.steps * side.per_step, dtype=np.int32), side.rows - 1).reshape(side.steps, -1)


def _stack(side: _Side, a: Float[Array, "B ... K G D"]) -> Float[Array, "steps B K p G P D"]:
    """The tiles of every step."""
    batch = a.shape[0]
    tiles = token_permute(a, side.tile, side.dilation).reshape(batch, side.rows, -1, *a.shape[-3:])
    tiles = jnp.pad(tiles, [(0, 0), (0, side.steps * side.per_step - side.rows)] + [(0, 0)] * 4)
    return tiles.reshape(batch, side.steps, side.per_step, *tiles.shape[2:]).transpose(1, 0, 4, 2, 5, 3, 6)


def _unstack(side: _Side, grid: tuple[int, ...], stack: Float[Array, "steps B K p G P D"]) -> Float[Array, "B ... N D"]:
    """The tokens of a grid in their order."""
    tiles = stack.transpose(1, 0, 3, 5, 2, 4, 6)
    batch, heads, width = tiles.shape[0], tiles.shape[4] * tiles.shape[5], tiles.shape[6]
    tiles = tiles.reshape(batch, -1, tiles.shape[3], heads, width)[:, : side.rows]
    groups = math.prod(side.dilation)
    return token_unpermute(tiles.reshape(batch * groups, -1, heads, width), grid, side.tile, side.dilation)
