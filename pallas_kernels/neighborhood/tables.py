"""Tiles of queries on a grid of two axes, the keys around each, and one table of who sees whom for all that are alike.

Along an axis, tile t of T queries i0 .. i0 + T - 1 reads the keys start(t) .. start(t) + reach - 1: all that its
windows low(i) <= j < high(i) hold, and what fills up the last of the registers. Query i is in the place of key f + i,
where f is 0 for a whole axis. Away from borders all tiles are alike:

    seen_c(r, p)      low(i0 + p) <= start + r < high(i0 + p)
    distance_c(r, p)  start + r - (f + i0 + p)                   for every tile of kind c along the axis

and there are few kinds, found by comparing tiles: whatever moves windows inward, strides and causal axes are in them.
On the grid a kind is a pair of them, and the logits of a tile get, for heads n, keys r r' and queries p p',

    table[c c'][r r', n p p'] = bias_n[distance_c(r, p) + w - 1, distance_c'(r', p') + w' - 1]      if seen, else -inf

A relative position bias is looked up by products with indicators of distances, whose gradient is such products too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

LANES, SUBLANES = 128, 8
BUDGET = 48 * 2**20
"""On-chip memory that arrays may take: of 64 MiB, the least that there is, less what products take in between."""
MOST_X, MOST_Y, MOST_COLUMNS = 16, 128, 256
"""Queries of a tile along the axes, and of all heads together."""
MOST_TILES = 16
"""Along Y, for these are written out one by one."""
STEP = 16
"""What a tile takes beside its logits, in registers of 8 x 128 of them."""


class Bounds(NamedTuple):
    """Along an axis: query i sees the keys low .. high - 1; a row for each group of batch rows.

    Attributes:
      keys: how many there are; queries may be fewer.
      first: the key in the place of query 0, of each group.
    """

    low: tuple[tuple[int, ...], ...]
    high: tuple[tuple[int, ...], ...]
    keys: int
    first: tuple[int, ...]


class Along(NamedTuple):
    """Tiles along an axis.

    Attributes:
      tile, reach: queries of a tile, and keys that it reads.
      held: keys of the axis and what fills them up, so that every tile can read `reach`.
      start, kind: of each group's tiles.
      seen, distance: of every kind.
    """

    tile: int
    reach: int
    held: int
    start: Int[np.ndarray, "groups tiles"]
    kind: Int[np.ndarray, "groups tiles"]
    seen: Bool[np.ndarray, "kinds reach tile"]
    distance: Int[np.ndarray, "kinds reach tile"]

    @property
    def tiles(self) -> int:
        return self.start.shape[1]

    @property
    def kinds(self) -> int:
        return len(self.seen)


@functools.lru_cache(maxsize=1024)
def along(bounds: Bounds, tile: int, unit: int) -> Along:
    """Tiles of `tile` queries, which read a multiple of `unit` keys."""
    low, high = (np.array(each, np.int32) for each in bounds[:2])
    groups, extent = low.shape
    tiles = math.ceil(extent / tile)
    # A query beyond the axis sees what the last one sees: none may see nothing.
    beyond = [(0, 0), (0, tiles * tile - extent)]
    low, high = (np.pad(x, beyond, mode="edge").reshape(groups, tiles, tile) for x in (low, high))
    first = low.min(axis=2)
    reach, held = (_whole(size, unit) for size in (int((high.max(axis=2) - first).max()), bounds.keys))
    start = np.minimum(first, held - reach)
    key = (start[..., None] + np.arange(reach))[..., None]
    seen = (low[:, :, None] <= key) & (key < high[:, :, None])
    place = np.array(bounds.first)[:, None] + np.arange(tiles * tile)
    distance = key - place.reshape(groups, tiles, 1, tile)
    patterns = np.where(seen, distance, bounds.keys).reshape(groups * tiles, -1)
    numbers: dict[bytes, int] = {}
    kind = np.array([numbers.setdefault(pattern.tobytes(), len(numbers)) for pattern in patterns], np.int32)
    _, example = np.unique(kind, return_index=True)
    of_kinds = (x.reshape(-1, reach, tile)[example] for x in (seen, distance))
    return Along(tile, reach, held, start, kind.reshape(groups, tiles), *of_kinds)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is fixed while tracing.

    Attributes:
      heads, width: of heads; `together` of them stand side by side in the lanes of a program.
      axes: windows along both axes. Batch row b has those of group b mod G, row-major over the groups of the axes.
      tile: queries along both axes.
      biased: whether the table is one for each head.
    """

    batch: int
    heads: int
    width: int
    axes: tuple[Bounds, Bounds]
    tile: tuple[int, int]
    biased: bool
    scale: float
    dtype: Any
    interpret: bool

    @property
    def x(self) -> Along:
        return along(self.axes[0], self.tile[0], 1)

    @property
    def y(self) -> Along:
        return along(self.axes[1], self.tile[1], SUBLANES)

    @property
    def grid(self) -> tuple[int, int]:
        """Of queries."""
        return len(self.axes[0].low[0]), len(self.axes[1].low[0])

    @property
    def key_grid(self) -> tuple[int, int]:
        return self.axes[0].keys, self.axes[1].keys

    @property
    def together(self) -> int:
        return min(self.heads, LANES // self.width)

    @property
    def programs(self) -> int:
        """Groups of heads."""
        return math.ceil(self.heads / self.together)

    @property
    def lanes(self) -> int:
        return self.together * self.width

    @property
    def queries(self) -> int:
        """Of a tile."""
        return math.prod(self.tile)

    @property
    def columns(self) -> int:
        """Queries of a tile for each of the heads together."""
        return self.together * self.queries

    @property
    def keys(self) -> int:
        """That a tile reads."""
        return self.x.reach * self.y.reach

    @property
    def kinds(self) -> int:
        return self.x.kinds * self.y.kinds

    @property
    def image(self) -> int:
        """Numbers of an image of keys that is held in whole registers, in the lanes of a program."""
        return self.key_grid[0] * self.y.held * LANES

    @property
    def table_bytes(self) -> int:
        return self.kinds * self.keys * _whole(self.columns, LANES) * 4

    @property
    def taken(self) -> int:
        """Bytes of on-chip memory that the backward pass takes, which takes more than the forward pass."""
        blocks = 2 * 7 * self.image * jnp.dtype(self.dtype).itemsize
        return blocks + 4 * 4 * self.image + 2 * (1 + self.biased) * self.table_bytes

    @property
    def work(self) -> float:
        """The time of an image and a group of heads, in registers of logits."""
        tiles = self.x.tiles * self.y.tiles
        return tiles * (self.keys / SUBLANES * math.ceil(self.columns / LANES) + STEP)


@functools.lru_cache(maxsize=256)
def choose(p: Problem) -> Problem | None:
    """With the tile that takes least time; `None` where none fits the chip."""
    x, y = p.key_grid
    if 14 * x * _whole(y, SUBLANES) * LANES * jnp.dtype(p.dtype).itemsize > BUDGET:
        return None  # the blocks of an image alone; making tables of a large one takes long
    x, y = p.grid
    along_y = range(SUBLANES, _whole(min(y, MOST_Y), SUBLANES) + 1, SUBLANES)
    tiles = itertools.product(range(1, min(x, MOST_X) + 1), (t for t in along_y if math.ceil(y / t) <= MOST_TILES))
    found = [dataclasses.replace(p, tile=tile) for tile in tiles if math.prod(tile) * p.together <= MOST_COLUMNS]
    return min((each for each in found if each.taken <= BUDGET), key=lambda each: each.work, default=None)


def table(p: Problem, bias: Float[Array, "N dx dy"] | None) -> Float[Array, "programs kinds keys columns"]:
    """What is added to logits, in float32; without a bias one for all programs."""
    x, y = p.x, p.y
    shape = (-1, p.kinds, p.keys, p.columns)
    seen = x.seen[:, None, :, None, None, :, None] & y.seen[None, :, None, :, None, None, :]
    if bias is None:
        heads = (*seen.shape[:4], p.together, *seen.shape[5:])
        return jnp.where(np.broadcast_to(seen, heads), jnp.float32(0), -jnp.inf).reshape(shape)
    by_head = jnp.pad(bias.astype(jnp.float32), [(0, p.programs * p.together - p.heads), (0, 0), (0, 0)])
    by_head = by_head.reshape(p.programs, p.together, *bias.shape[1:])
    along_x, along_y = (_indicator(axis.distance, size) for axis, size in zip((x, y), bias.shape[1:], strict=True))
    # Products with ones and zeros are exact where operands are not rounded.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    entries = product("gnab,drqb->gnadrq", by_head, along_y)
    entries = product("gnadrq,cspa->gcdsrnpq", entries, along_x)
    return jnp.where(seen, entries, -jnp.inf).reshape(shape)


def _indicator(distance: Int[np.ndarray, "kinds reach tile"], size: int) -> Float[np.ndarray, "kinds reach tile size"]:
    return (distance[..., None] + size // 2 == np.arange(size)).astype(np.float32)


def untiled(p: Problem, x: Float[Array, "programs B tx ty columns"]) -> Float[Array, "B X Y N"]:
    """Numbers of queries in the order of the grid."""
    x = x.reshape(p.programs, p.batch, p.x.tiles, p.y.tiles, p.together, *p.tile).transpose(1, 2, 5, 3, 6, 0, 4)
    x = x.reshape(p.batch, p.x.tiles * p.tile[0], p.y.tiles * p.tile[1], p.programs * p.together)
    return x[:, : p.grid[0], : p.grid[1], : p.heads]


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit
