"""Windows through the matrix units of a TPU: no element of a tile of scores is compared with anything.

The keys of a block stand on a little grid: c_a(s) = o_a + r_a(s) on axis a, where o_a is the coordinate of the block's
first key, and the offsets r_a are the same in all blocks. In channels that a head leaves empty, a key has a one at its
offset on each axis, and a query the penalty of that offset in this block,

    k_s[a, r] = 1 if r_a(s) = r else 0          q_t[a, r] = 0 if low_a(t) <= o_a + r < high_a(t) else -2^120

so that <q_t, k_s> is what it was for a key inside of the window, and for any other so low that its weight is 0. For a
block of 512 queries and 16 x 32 keys that takes 512 x 48 comparisons. A row whose maximum is that low saw nothing.
Until it sees a key, such a row has weights of 1 for what is hidden, which the first key then multiplies by 0. So logits
must not be rounded in two ways, or one of two that are alike is 2^90 above the other and its weight no number.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse.tiling import LANES

PENALTY = -(2.0**120)
NOTHING = -(2.0**100)
"""A logit that only a key outside of its window has."""
LEAST_SCALE = 2.0**-18


@dataclasses.dataclass(frozen=True)
class Marks:
    """Where marks are.

    Attributes:
      offsets: of the keys of a block, on each axis.
      first: the channel of the first mark; all are in one tile of lanes.
    """

    offsets: tuple[tuple[int, ...], ...]
    first: int

    @property
    def sizes(self) -> list[int]:
        """Offsets there are on each axis."""
        return [max(axis) + 1 for axis in self.offsets]

    @property
    def end(self) -> int:
        return self.first + sum(self.sizes)

    def lanes(self) -> list[tuple[int, int]]:
        """Of each axis the first lane, in its tile, and the one after its last."""
        ends = np.cumsum([self.first % LANES, *self.sizes]).tolist()
        return list(itertools.pairwise(ends))


def choose_marks(place: Any, block_kv: int, width: int, *, may_widen: bool) -> Marks | None:
    """Marks for keys at `place [axes, S]`; `None` where blocks are no little grids, or where there is no room.

    Args:
      may_widen: a head without room gets another tile of lanes.
    """
    if not isinstance(place, np.ndarray) or place.shape[1] % block_kv:
        return None
    blocks = place.reshape(len(place), -1, block_kv)
    offsets = blocks - blocks[..., :1]
    if (offsets != offsets[:, :1]).any() or offsets.min() < 0:
        return None
    marks = Marks(tuple(tuple(axis) for axis in offsets[:, 0].tolist()), width)
    if math.ceil(marks.end / LANES) == math.ceil(width / LANES):
        return marks
    marks = dataclasses.replace(marks, first=math.ceil(width / LANES) * LANES)
    return marks if may_widen and sum(marks.sizes) <= LANES else None


def marked_keys(marks: Marks, key: jax.Array) -> jax.Array:
    """Keys `[B, S, K, H]` with the marks of their places, `[B, S, K, marks.end]`."""
    found = np.zeros((len(marks.offsets[0]), marks.end), np.float32)
    ends = np.cumsum([marks.first, *marks.sizes])
    for begin, offsets in zip(ends, marks.offsets, strict=False):
        found[np.arange(len(offsets)), begin + np.array(offsets)] = 1
    blocks = key.shape[1] // len(found)
    ones = jnp.tile(jnp.asarray(found, key.dtype), (blocks, 1))[None, :, None]
    padding = marks.end - key.shape[3]
    return jnp.pad(key, [(0, 0)] * 3 + [(0, padding)]) + ones


def begin_queries(marks: Marks, low: jax.Array, high: jax.Array, refs: Any, upright: Any) -> None:
    """Windows less the offset of each lane, so that a block's place alone is compared with them.

    Args:
      low, high: `[axes, t]`; `upright` makes columns of a row that are all alike.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    far = jnp.int32(2**30)
    begin, end = -far, far
    for axis, (first, last) in enumerate(marks.lanes()):
        inside, offset = (lane >= first) & (lane < last), lane - first
        begin = jnp.where(inside, upright(low[axis : axis + 1]) - offset, begin)
        end = jnp.where(inside, upright(high[axis : axis + 1]) - offset, end)
    refs.low_marks[...], refs.high_marks[...] = begin, end


def mark(marks: Marks, queries: Any, refs: Any) -> None:
    """Queries with the penalties of a block of keys, into `refs.marked`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    place = jnp.zeros((1, LANES), jnp.int32)
    for axis, (first, last) in enumerate(marks.lanes()):
        place = jnp.where((lane >= first) & (lane < last), refs.place[axis : axis + 1, :1], place)
    inside = (refs.low_marks[...] <= place) & (place < refs.high_marks[...])
    penalty = jnp.where(inside, 0.0, PENALTY).astype(refs.marked.dtype)
    at = marks.first // LANES * LANES
    for tile in range(0, refs.marked.shape[1], LANES):
        x = queries[:, tile : tile + LANES]
        refs.marked[:, tile : tile + LANES] = x + penalty if tile == at else x
