"""Block-sparse attention whose sequence is split over a mesh axis, with the work of the devices evened out.

Each of D devices holds T / D consecutive tokens and the lists of their blocks. Keys and values are gathered. A device's
queries are cut into P equal parts; the part with rows R costs what it lists,

    work = sum_{i in R} n_i        n_i blocks of row i, over all batch rows and heads that have lists of their own

and travels, with its lists, to the device that computes it, from where the output comes back. Every device computes P
parts, chosen so that the busiest has little more than the mean. For a causal mask P = 2, and the result is the zigzag
of ring attention; where the work is even as it is, as for a window, P = 1 and nothing travels. Of lists that are
traced nobody knows the work beforehand: they travel as a causal mask's.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jattn.dot_product import merge_attentions
from jattn.masks import EMPTY, FULL, PARTIAL, Full, Mask
from jattn.sparse.block_lists import AnyArray, Lists, kinds_of, spread
from jattn.sparse.block_mask import BlockMask
from jattn.sparse.block_sparse import ScoreMod, block_sparse_attention

LANES, LARGEST_BLOCK = 128, 512
"""A kernel's blocks are multiples of the one; a symbolic mask gets blocks of at most the other."""
PARTS = (1, 2, 4)
EVEN_ENOUGH = 1.05
"""What the busiest device may have, of the mean, for pieces not to be cut into smaller parts."""
WORTH_A_JOURNEY = 0.95
"""Queries travel if the busiest device then has at most this share of the blocks that it has without."""


class Turn(NamedTuple):
    """What travels at once: of every device one part of its queries, and where to. Each device gets one part."""

    part: tuple[int, ...]
    to: tuple[int, ...]


class Route(NamedTuple):
    """What is static about a split call.

    Attributes:
      mask: the element rule of partial blocks; `None` where a bank has it.
      widths: of the partial and of the full blocks, how many the longest list has.
    """

    block_q: int
    block_kv: int
    mask: Mask | None
    widths: dict[int, int]
    turns: tuple[Turn, ...]


class Rows(NamedTuple):
    """The lists of a device's blocks of queries, and the blocks of a bank."""

    lists: Lists
    bank: Bool[AnyArray, "P block_q block_kv"] | None


def route(block_mask: Mask | BlockMask, q_len: int, kv_len: int, devices: int) -> tuple[Rows, Route]:
    """The rows of all devices, and the way that they go; outside of the `shard_map`, with the lengths of the whole.

    Raises:
      ValueError: blocks of queries that reach from one device to the next.
    """
    length = q_len // devices
    if isinstance(block_mask, Mask):
        block_mask = BlockMask.from_expr(block_mask, q_len, kv_len, *[_block(length)] * 2)
    elif length % block_mask.block_q:
        fitting = _block(length, block_mask.block_q)
        raise ValueError(
            f"block_mask: with context, a device has whole blocks of queries, so block_q divides T / {devices} = "
            f"{length}, got block_q = {block_mask.block_q}; build it with block_q={fitting}, or pass a symbolic mask, "
            f"for which blocks are chosen"
        )
    lists = Lists(block_mask.kv_idx, block_mask.n_partial, block_mask.n_total, block_mask.kv_bank)
    width = lists.idx.shape[-1]
    widths = {PARTIAL: width, FULL: width}
    work: Any = np.arange(1, 1 + lists.idx.shape[2])
    if block_mask.is_static:
        widths = {PARTIAL: int(lists.n_partial.max()), FULL: int((lists.n_total - lists.n_partial).max())}
        work = lists.n_total.sum(axis=(0, 1))
    turns = tuple(_turns(work, devices))
    return Rows(lists, block_mask.bank), Route(block_mask.block_q, block_mask.block_kv, block_mask.mask, widths, turns)


def gathered_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B s K H"],
    value: Float[Array, "B s K V"],
    *,
    axis: str,
    rows: Rows,
    route: Route,
    segment_ids: Int[Array, "B t"] | None = None,
    kv_bias: Float[Array, "B K s"] | None = None,
    **options: Any,
) -> Float[Array, "B t N V"]:
    """The attention of this device's queries; called inside of a `shard_map` over `axis`.

    Args:
      rows, route: what the function `route` gives, `rows` split over `axis` as the queries are.
      options: of `block_sparse_attention`, for all devices alike.
    """
    length, parts = query.shape[1], len(route.turns)
    size, blocks = length // parts, rows.lists.idx.shape[2] // parts
    key, value = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (key, value))
    kv_ids = None if segment_ids is None else jax.lax.all_gather(segment_ids, axis, axis=1, tiled=True)
    if kv_bias is not None:
        options["kv_bias"] = jax.lax.all_gather(kv_bias, axis, axis=2, tiled=True)
    index = jax.lax.axis_index(axis)
    out = jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
    for turn in route.turns:
        if options.get("dropout_rate"):
            options["dropout_seed"] = own_seed(options["dropout_seed"], (axis,))
        back = tuple(np.argsort(turn.to).tolist())
        part, sender = jnp.asarray(turn.part), jnp.asarray(back)[index]
        first = sender * length + part[sender] * size
        q, ids = _arrived((query, segment_ids), 1, size, axis, turn)
        seen: Any = None if ids is None else (ids, kv_ids)
        own = rows._replace(lists=_arrived(rows.lists, 2, blocks, axis, turn))
        result = _attend(q, key, value, own, route, first, segment_ids=seen, **options)
        out = jax.lax.dynamic_update_slice_in_dim(out, _send(result, axis, back), part[index] * size, axis=1)
    return out


def _attend(
    query: Array,
    key: Array,
    value: Array,
    rows: Rows,
    route: Route,
    first: Array,
    *,
    score_mod: ScoreMod | None = None,
    captured: tuple[Any, ...] = (),
    sinks: Array | None = None,
    logits_soft_cap: float | None = None,
    **options: Any,
) -> Array:
    """The attention of queries from position `first` on.

    Where they begin nobody knows while tracing, and a rule is static: so it is asked as part of the scores, of the
    partial blocks alone. These have a walk of their own, after that over the full ones.
    """
    sizes = query.shape[1], key.shape[1], route.block_q, route.block_kv
    lists, count = rows.lists, -(-key.shape[1] // route.block_kv)
    kind = spread(lists.idx, kinds_of(lists.idx, lists.n_partial, lists.n_total), count)
    attend: Any = functools.partial(block_sparse_attention, query, key, value, return_lse=True, **options)
    shifted: Any = {} if score_mod is None else {"score_mod": _placed(score_mod), "captured": (first, *captured)}
    shifted["logits_soft_cap"] = logits_soft_cap
    if route.mask is None or route.mask == Full():
        bank: Any = {}
        if rows.bank is not None:  # a bank begins with a block for pairs that need none, and `from_map` adds it again
            bank = {"bank": rows.bank[1:], "bank_ids": spread(lists.idx, lists.bank, count) - 1}
        block_mask = BlockMask.from_map(kind, *sizes, max_blocks=lists.idx.shape[-1], **bank)
        return attend(block_mask, sinks=sinks, **shifted)[0]
    ruled = {"score_mod": _placed(score_mod, route.mask, logits_soft_cap), "captured": (first, *captured)}
    walks = [each for each in (FULL, PARTIAL) if route.widths[each]] or [FULL]
    outs: list[Array] = []
    lses: list[Array] = []
    for which in walks:
        listed = jnp.where(kind == which, FULL, EMPTY)
        block_mask = BlockMask.from_map(listed, *sizes, max_blocks=max(1, route.widths[which]))
        out, lse = attend(block_mask, sinks=None if outs else sinks, **(shifted if which == FULL else ruled))
        outs.append(out)
        lses.append(lse)
    return merge_attentions(outs, lses)[0] if len(outs) > 1 else outs[0]


def own_seed(seed: Any, axes: tuple[str, ...]) -> Array:
    """Of this device among those along `axes`: another one than `seed`, and than those of all others."""
    index = jax.lax.axis_index(axes) if axes else 0
    return jax.random.bits(jax.random.fold_in(jax.random.key(seed), index))


def _turns(work: np.ndarray, devices: int) -> list[Turn]:
    """Of `PARTS`, the first after which work is even, else those after which it is most even; `work` of all rows."""
    best: list[Turn] = []
    least = math.inf
    for parts in PARTS:
        if len(work) // devices % parts == 0 and least > EVEN_ENOUGH * work.sum() / devices:
            each = work.reshape(devices * parts, -1).sum(axis=1).tolist()
            turns = even_out(each, parts)
            most = max(loads(turns, each))
            if most <= WORTH_A_JOURNEY * least:
                best, least = turns, most
    return best


def even_out(work: Sequence[float], parts: int) -> list[Turn]:
    """As many turns as there are `parts` of each device, after which every device has as many, of nearly equal work.

    Device i holds the parts from i `parts` on. Largest first, each goes to the group with least work that has room:
    of two parts a device, no choice has a smaller maximum. A group is computed where most of its parts are.
    Devices that send and devices that receive are a graph in which everyone has `parts` edges, so it is a union of
    that many perfect matchings: the turns.
    """
    devices = len(work) // parts
    held = [list(range(i * parts, (i + 1) * parts)) for i in range(devices)]
    groups: list[list[int]] = [[] for _ in range(devices)]
    sums = [0.0] * devices
    for part in sorted(range(len(work)), key=lambda part: (-work[part], part)):
        least = min((i for i in range(devices) if len(groups[i]) < parts), key=lambda i: (sums[i], len(groups[i])))
        groups[least].append(part)
        sums[least] += work[part]
    if max(sums) > WORTH_A_JOURNEY * max(sum(work[part] for part in own) for own in held):
        groups = held
    to: dict[int, int] = {}
    free = dict.fromkeys(range(devices))
    for group in sorted(groups, key=lambda group: -max(collections.Counter(part // parts for part in group).values())):
        near = [place for place, _ in collections.Counter(part // parts for part in group).most_common()]
        place = next((place for place in near if place in free), next(iter(free)))
        del free[place]
        to |= dict.fromkeys(group, place)
    turns = []
    for _ in range(parts):
        turn = _matching(held, to)
        for device, part in enumerate(turn):
            held[device].remove(part)
        turns.append(Turn(tuple(part % parts for part in turn), tuple(to[part] for part in turn)))
    return turns


def loads(turns: Sequence[Turn], work: Sequence[float]) -> list[float]:
    """What every device computes; `work` of the parts of all devices in order."""
    found = [0.0] * len(turns[0].to)
    for turn in turns:
        for device, (part, to) in enumerate(zip(*turn, strict=True)):
            found[to] += work[device * len(turns) + part]
    return found


def _matching(held: Sequence[Sequence[int]], to: dict[int, int]) -> list[int]:
    """Of every device one part that it holds, so that each goes to another device (Kuhn's augmenting paths)."""
    taken: dict[int, tuple[int, int]] = {}  # by receiver: who sends, and what

    def sends(device: int, tried: set[int]) -> bool:
        for part in held[device]:
            receiver = to[part]
            if receiver not in tried:
                tried.add(receiver)
                if receiver not in taken or sends(taken[receiver][0], tried):
                    taken[receiver] = device, part
                    return True
        return False

    for device in range(len(held)):
        sends(device, set())
    return [part for _, part in sorted(taken.values())]


@functools.lru_cache(maxsize=64)
def _placed(score_mod: ScoreMod | None, mask: Mask | None = None, soft_cap: float | None = None) -> ScoreMod:
    """The scores of queries that begin at position `first`; with a mask capped here, for a cap bends -inf too."""

    def score(x: Array, b: Array, h: Array, q_pos: Array, kv_pos: Array, first: Array, *captured: Any) -> Array:
        q_pos = q_pos + first
        if score_mod is not None:
            x = score_mod(x, b, h, q_pos, kv_pos, *captured)
        if mask is None:
            return x
        if soft_cap is not None:
            x = soft_cap * jnp.tanh(x / soft_cap)
        return jnp.where(mask.elem(q_pos, kv_pos, h), x, -math.inf)

    return score


def _block(length: int, most: int = LARGEST_BLOCK) -> int:
    """The largest that divides half of a device's queries (all, of an odd number), best one that kernels do."""
    size = length if length % 2 else length // 2
    return max((n for n in range(1, min(size, most) + 1) if size % n == 0), key=lambda n: (n % LANES == 0, n))


def _arrived(x: Any, dimension: int, size: int, axis: str, turn: Turn) -> Any:
    """What this device gets in a turn of `x`, whose parts have `size` entries in a dimension."""
    start = jnp.asarray(turn.part)[jax.lax.axis_index(axis)] * size
    return jax.tree.map(lambda a: _send(jax.lax.dynamic_slice_in_dim(a, start, size, axis=dimension), axis, turn.to), x)


def _send(x: Array, axis: str, to: tuple[int, ...]) -> Array:
    if to == tuple(range(len(to))):
        return x
    return jax.lax.ppermute(x, axis, list(enumerate(to)))
