"""Neighborhoods of small windows by the kernels of one pass: dilation groups as images, large ones in bands.

The kernels attend within an image that the chip holds, every head with keys of its own. Here a dilation group is an
image, and one that is too large is cut along its axes: a band is a run of queries with an image of the keys that their
windows hold. What it reads beyond its own rows is a window: little, if bands are large. A mask of keys is one channel
more: 1 in a query, 0 or what makes a logit 2^17 less in a key.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jattn.neighborhood.arguments import Operands
from jattn.neighborhood.permute import token_permute, token_unpermute
from jattn.neighborhood.tiles import by_group
from jattn.neighborhood.window import Axis, Neighborhood, window_bounds
from pallas_kernels.block_sparse.attention import Platform
from pallas_kernels.neighborhood import attention as kernel
from pallas_kernels.neighborhood.tables import LANES, Bounds, Problem

MOST_KEYS = 512
"""Of a window; with more tables do not fit the chip, and to find that out takes long."""
MOST_BANDS = 4096
HIDDEN = 17
"""A logit of a hidden key is 2^17 less: far from all below 2^16, and yet such logits of a row differ as others do."""
# Of each axis: where its rows are in [B, groups, (bands,) groups, (bands,) rows, rows, ...], and where its bands go.
_AT = ((3, 2), (5, 4))


class Cut(NamedTuple):
    """An axis in bands.

    Attributes:
      first, start: where the queries of each band begin, and its keys.
      queries, keys: of a band.
      bounds: windows among the keys of a band, a row for each band of each dilation group.
    """

    first: tuple[int, ...]
    start: tuple[int, ...]
    queries: int
    keys: int
    bounds: Bounds

    @property
    def bands(self) -> int:
        return len(self.first)


@functools.lru_cache(maxsize=1024)
def cut(axis: Axis, count: int) -> Cut:
    """An axis in at most `count` bands of as many queries, those of all dilation groups alike."""
    length = math.ceil(axis.extent / axis.dilation)
    low, high = (by_group(axis, each, length) for each in window_bounds(*axis))
    queries = math.ceil(length / count)
    first = [min(each, length - queries) for each in range(0, length, queries)]
    runs = [slice(each, each + queries) for each in first]
    keys = max(int(high[:, run].max() - low[:, run].min()) for run in runs)
    start = [min(int(low[:, run].min()), length - keys) for run in runs]

    def by_band(table: np.ndarray) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple((row[run] - s).tolist()) for row in table for run, s in zip(runs, start, strict=True))

    places = tuple(f - s for f, s in zip(first, start, strict=True)) * axis.dilation
    return Cut(tuple(first), tuple(start), queries, keys, Bounds(by_band(low), by_band(high), keys, places))


class Plan(NamedTuple):
    """How a call is done: the axes as two, in bands, and what each image is to the kernels."""

    axes: tuple[Axis, Axis]
    cuts: tuple[Cut, Cut]
    problem: Problem

    @property
    def work(self) -> float:
        """The time of a batch row, in registers of logits of a head."""
        images = math.prod(axis.dilation * each.bands for axis, each in zip(self.axes, self.cuts, strict=True))
        return images * self.problem.programs * self.problem.work / self.problem.heads


def plan(
    platform: Platform, x: Operands, neighborhood: Neighborhood, scale: float, q_tile: Any, kv_tile: Any
) -> Plan:  # fmt: skip
    """In as few bands as fit the chip; raises `NotImplementedError` with the reason where the kernels do not do it."""
    if len(x.grid) > 2:
        raise NotImplementedError(f"a grid has two axes at most there, not {len(x.grid)}")
    plain = x.key_mask if x.rel_pos_bias is None or scale == 0 else None  # with a bias it is another channel
    for name, given in (("key_mask", plain), ("q_tile", q_tile), ("kv_tile", kv_tile)):
        if given is not None:
            raise NotImplementedError(f"{name}: there is none there")
    axes = neighborhood.axes(x.grid)
    window = math.prod(axis.window for axis in axes)
    if window > MOST_KEYS:
        raise NotImplementedError(f"a window has at most {MOST_KEYS} keys there, not {window}")
    # A line is the one row of an image.
    two = (axes[0], axes[1]) if len(axes) == 2 else (Axis(1, 1, 1, 1, False), axes[0])
    lengths = [math.ceil(axis.extent / axis.dilation) for axis in two]
    counts = [[1 << i for i in range((length - 1).bit_length() + 1)] for length in lengths]
    options: Any = {"biased": x.rel_pos_bias is not None, "scale": scale, "platform": platform}
    reason, total = None, 1
    while total <= MOST_BANDS:
        found = []
        for pair in itertools.product(*counts):
            if math.prod(pair) != total:
                continue
            cuts = cut(two[0], pair[0]), cut(two[1], pair[1])
            try:
                found.append(Plan(two, cuts, kernel.problem(*_images(x, two, cuts), **options, axes=_bounds(cuts))))
            except NotImplementedError as error:
                reason = error
        if found:
            return min(found, key=lambda each: (each.work, math.prod(c.bands * c.keys for c in each.cuts)))
        total *= 2
    assert reason is not None
    raise reason


def _bounds(cuts: tuple[Cut, Cut]) -> tuple[Bounds, Bounds]:
    return cuts[0].bounds, cuts[1].bounds


def _images(x: Operands, axes: tuple[Axis, Axis], cuts: tuple[Cut, Cut]) -> list[jax.ShapeDtypeStruct]:
    """The shapes of queries, keys and values as images."""
    images = x.query.shape[0] * math.prod(a.dilation * c.bands for a, c in zip(axes, cuts, strict=True))
    heads = x.query.shape[-2], _width(x)
    of_queries, of_keys = ((images, *grid, *heads) for grid in zip(*((c.queries, c.keys) for c in cuts), strict=True))
    shapes = (of_queries, x.query), (of_keys, x.key), (of_keys, x.value)
    return [jax.ShapeDtypeStruct(shape, a.dtype) for shape, a in shapes]


def _width(x: Operands) -> int:
    """Channels of a head: as many of queries as of values, and a part of the lanes if these hold several."""
    width, heads = max(x.query.shape[-1] + (x.key_mask is not None), x.value.shape[-1]), x.query.shape[-2]
    return width if heads * width <= LANES else 1 << (width - 1).bit_length()


def attend(p: Plan, x: Operands) -> tuple[Array, Array]:
    """`(out, lse)` of a call as planned."""
    if x.key_mask is None:
        return _attend(p, x)
    out, lse = _attend(p, _marked(x, p.problem.scale))
    seen = lse > -(2.0 ** (HIDDEN - 1))
    return jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, -jnp.inf)


def _marked(x: Operands, scale: float) -> Operands:
    """With the channel of a mask."""
    assert x.key_mask is not None
    less = -math.copysign(2.0 ** (HIDDEN + math.ceil(-math.log2(abs(scale)))), scale)
    mark = jnp.where(x.key_mask, 0.0, less).astype(x.key.dtype)[..., None, None]
    ones = jnp.ones((*x.query.shape[:-1], 1), x.query.dtype)
    marks = jnp.broadcast_to(mark, (*x.key.shape[:-1], 1))
    query, key = (jnp.concatenate(pair, axis=-1) for pair in ((x.query, ones), (x.key, marks)))
    return x._replace(query=query, key=key, key_mask=None)


def _attend(p: Plan, x: Operands) -> tuple[Array, Array]:
    group = tuple(math.ceil(axis.extent / axis.dilation) for axis in p.axes)
    dilation, extents = tuple(axis.dilation for axis in p.axes), tuple(axis.extent for axis in p.axes)
    batch, heads, width = x.query.shape[0], x.query.shape[-2], _width(x)

    def image(a: Array, of_keys: bool = True) -> Array:
        a = jnp.repeat(a, heads // a.shape[-2], axis=-2) if a.shape[-2] < heads else a
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])]) if a.shape[-1] < width else a
        a = token_permute(a.reshape(batch, *extents, heads, width), group, dilation)
        a = a.reshape(batch, *dilation, *group, heads, width)
        for (rows, at), c in zip(_AT, p.cuts, strict=True):
            starts, size = (c.start, c.keys) if of_keys else (c.first, c.queries)
            a = jnp.stack([jax.lax.slice_in_dim(a, start, start + size, axis=rows) for start in starts], axis=at)
        return a.reshape(-1, *a.shape[5:])

    def back(a: Array) -> Array:
        bands = (c.bands for c in p.cuts)
        a = a.reshape(batch, *itertools.chain(*zip(dilation, bands, strict=True)), *a.shape[1:])
        for (rows, at), c in reversed(list(zip(_AT, p.cuts, strict=True))):
            # The last band begins early, with queries that the one before it has too.
            again = (i * c.queries - first for i, first in enumerate(c.first))
            own = [
                jax.lax.slice_in_dim(run, begin, None, axis=rows)
                for run, begin in zip(jnp.unstack(a, axis=at), again, strict=True)
            ]
            a = jnp.concatenate(own, axis=rows)
        tokens = a.reshape(-1, math.prod(group), *a.shape[5:])
        return token_unpermute(tokens, extents, group, dilation).reshape(batch, *x.grid, *a.shape[5:])

    bias = x.rel_pos_bias
    if bias is not None:
        bias = bias.reshape(bias.shape[0], -1, bias.shape[-1])
    query, key, value = image(x.query, of_keys=False), image(x.key), image(x.value)
    options: Any = {"axes": _bounds(p.cuts), "scale": p.problem.scale}
    platform: Platform = "interpret" if p.problem.interpret else "tpu"
    out, lse = kernel.one_pass_attention(query, key, value, bias, **options, platform=platform)
    return back(out)[..., : x.value.shape[-1]], back(lse)
