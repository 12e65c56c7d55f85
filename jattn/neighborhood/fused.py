"""Neighborhood attention by kernels: in one pass where windows are small, else over tiles of a grid.

On TPU small windows are attended in one pass (`one_pass`), and a relative position bias only so, in three dimensions
plane by plane (`planes`).
What else there is goes to the block-sparse kernels, with tiles of a permuted grid as blocks, neighborhoods as windows.
There a bias is one by the distance of coordinates, on GPU.

After `token_permute` a tile of the grid is a block of consecutive tokens, the plan of `jattn.neighborhood.tiles` lists
which blocks meet, and a key is seen where its coordinates lie in the query's window. Group g of batch row b is the row
b G + g of the kernel, with the lists of g. Tiles are those that take least time: every pair of tiles costs its products
and a step, so small ones cut off more of what no query sees, and large ones take fewer steps.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jattn.neighborhood import one_pass, planes
from jattn.neighborhood.arguments import Operands
from jattn.neighborhood.permute import token_permute, token_unpermute
from jattn.neighborhood.tiles import TilePlan, tile_plan
from jattn.neighborhood.window import Neighborhood
from jattn.softmax_tile import Score
from pallas_kernels.block_sparse import BlockLists, Relative, Windows, WorkList, block_sparse_attention, tiling
from pallas_kernels.block_sparse import attention as kernel
from pallas_kernels.block_sparse import lists as kernel_lists
from pallas_kernels.block_sparse.relative import check_size

TPU_PLACES, GPU_PLACES = (128, 256, 512, 1024), (64, 128)
"""Tokens of tiles that are tried."""
COMPARED = 1.3
"""What a pair of tiles costs where windows are compared, on TPU; read off the schedules of `pallas_kernels.lab`."""
REGISTERS = 256
"""Of 8 x 128 logits in 512 x 512 pairs, to weigh one pass against pairs of tiles."""
ONE_PASS = 2.4
"""What a register of logits costs in one pass, in those of pairs of tiles: 0.9 for 56 x 56 tokens on v5e, 2.4 for
14 x 14 on v6e."""
GPU_STEP = 2048
"""A turn of a program's loop on a GPU, in pairs of tokens."""


def fused_neighborhood(
    platform: kernel.Platform, x: Operands, *, neighborhood: Neighborhood, score: Score, q_tile: Any, kv_tile: Any
) -> tuple[Array, Array]:
    """`(out, lse)` of the windows, without additional tokens."""
    if _is_by_planes(platform, x):
        return planes.attend(platform, x, neighborhood, score.scale)
    found = _in_one_pass(platform, x, neighborhood, score, q_tile, kv_tile)
    if found is not None:
        return one_pass.attend(found, x)
    return general(platform, x, neighborhood=neighborhood, score=score, q_tile=q_tile, kv_tile=kv_tile)


def general(
    platform: kernel.Platform, x: Operands, *, neighborhood: Neighborhood, score: Score, q_tile: Any, kv_tile: Any
) -> tuple[Array, Array]:
    """The same by the block-sparse kernels."""
    plan = _plan(platform, x, neighborhood, q_tile, kv_tile)
    options: Any = {"tile": plan.kv_tile, "dilation": plan.dilation}
    kv_bias = None
    if x.key_mask is not None:
        seen = token_permute(x.key_mask, **options)[:, None]
        kv_bias = jnp.broadcast_to(jnp.where(seen, 0.0, -jnp.inf), (len(seen), x.key.shape[-2], seen.shape[2]))
    out, lse = block_sparse_attention(
        token_permute(x.query, plan.q_tile, plan.dilation),
        token_permute(x.key, **options),
        token_permute(x.value, **options),
        *(_lists(platform, plan, transposed) for transposed in (False, True)),
        windows=Windows(plan.lo, plan.hi, plan.key_coordinates),
        rel_bias=None if x.rel_pos_bias is None else Relative(x.rel_pos_bias, plan.query_coordinates),
        kv_bias=kv_bias,
        scale=score.scale,
        block_q=plan.q_places,
        block_kv=plan.kv_places,
        platform=platform,
    )
    back = functools.partial(token_unpermute, grid=plan.grid, tile=plan.q_tile, dilation=plan.dilation)
    return back(out), back(lse)


def check_fused_neighborhood(
    platform: kernel.Platform, x: Operands, *, neighborhood: Neighborhood, score: Score, q_tile: Any, kv_tile: Any
) -> None:
    """Raises `NotImplementedError` with the reason where the kernels do not do a call."""
    if x.rel_pos_bias is not None and platform not in kernel.GPU:
        try:
            possible = planes.check if _is_by_planes(platform, x) else one_pass.plan
            possible(platform, x, neighborhood, score.scale, q_tile, kv_tile)
        except NotImplementedError as reason:
            raise NotImplementedError(f"rel_pos_bias: the kernels take one in one pass alone; {reason}") from None
        return
    least = tiling.LEAST if platform in kernel.GPU else tiling.LANES
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if tile is not None and math.prod(tile) % least:
            raise NotImplementedError(f"{name}: the kernel has tiles of a multiple of {least} tokens, not {tile}")
    if x.rel_pos_bias is not None:
        plan = _plan(platform, x, neighborhood, q_tile, kv_tile)
        try:
            check_size(x.rel_pos_bias.shape, (plan.q_tile, plan.kv_tile))
        except NotImplementedError as reason:
            raise NotImplementedError(f"rel_pos_bias: {reason}") from None
    flat = (a.reshape(a.shape[0], -1, *a.shape[-2:]) for a in (x.query, x.key, x.value))
    functions: Any = {"element": None, "score_mod": None, "captured": ()}
    kernel.check(*flat, **functions, block_q=least, block_kv=least, platform=platform)


def _is_by_planes(platform: kernel.Platform, x: Operands) -> bool:
    return x.rel_pos_bias is not None and platform not in kernel.GPU and len(x.grid) == 3


def _in_one_pass(
    platform: kernel.Platform, x: Operands, neighborhood: Neighborhood, score: Score, q_tile: Any, kv_tile: Any
) -> one_pass.Plan | None:
    """How a call is done in one pass: with a bias it must be, else it is where that takes less time."""
    try:
        found = one_pass.plan(platform, x, neighborhood, score.scale, q_tile, kv_tile)
    except NotImplementedError:
        return None
    if x.rel_pos_bias is not None:
        return found
    tiles = _plan(platform, x, neighborhood, q_tile, kv_tile)
    pairs = math.prod(int(np.sum(ranges.last - ranges.first + 1)) for ranges in tiles.kv_ranges)
    general = REGISTERS * float(tiling.cost(pairs, tiles.q_places, tiles.kv_places))
    return found if ONE_PASS * found.work < general else None


def _lists(platform: kernel.Platform, plan: TilePlan, transposed: bool) -> Any:
    """Of each group, shared by all heads."""
    if platform in kernel.GPU:
        found = plan.lists(transposed)
        return BlockLists(found.idx[:, None], found.n_partial[:, None], found.n_total[:, None])
    steps = plan.steps(transposed)
    return WorkList(steps.row, steps.col, steps.kind)


def _plan(platform: kernel.Platform, x: Operands, neighborhood: Neighborhood, q_tile: Any, kv_tile: Any) -> TilePlan:
    if q_tile is None or kv_tile is None:
        options: Any = {"width": x.query.shape[-1], "on_gpu": platform in kernel.GPU}
        q_tile, kv_tile = choose_tiles(x.grid, neighborhood, q_tile, kv_tile, **options)
    n = neighborhood
    return tile_plan(x.grid, n.kernel_size, n.stride, n.dilation, n.is_causal, q_tile=q_tile, kv_tile=kv_tile)


def choose_tiles(
    grid: tuple[int, ...],
    neighborhood: Neighborhood,
    q_tile: tuple[int, ...] | None = None,
    kv_tile: tuple[int, ...] | None = None,
    *,
    width: int,
    on_gpu: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tiles of queries and of keys for the chip that is compiled for, of powers of two along each axis.

    Args:
      q_tile, kv_tile: those that are fixed.
      width: of a head; on TPU the channels that it leaves empty are where windows cost least.
    """
    extents = [math.ceil(axis.extent / axis.dilation) for axis in neighborhood.axes(grid)]
    shapes = _shapes(extents, GPU_PLACES if on_gpu else TPU_PLACES)
    of_queries, of_keys = ([tile] if tile else shapes for tile in (q_tile, kv_tile))
    pairs = functools.reduce(
        np.multiply,
        (
            _pairs(axis, tuple(tile[a] for tile in of_queries), tuple(tile[a] for tile in of_keys))
            for a, axis in enumerate(neighborhood.axes(grid))
        ),
    )
    places = [np.array([math.prod(tile) for tile in tiles]) for tiles in (of_queries, of_keys)]
    if on_gpu:
        cost = pairs * (places[0][:, None] * places[1] + GPU_STEP)
    else:
        fits = np.array([sum(tile) <= -width % tiling.LANES for tile in of_keys])
        cost = tiling.cost(pairs, places[0][:, None], places[1] * np.where(fits, 1, COMPARED))
        cost = np.where(4 * pairs > kernel_lists.BUDGET, np.inf, cost)
    best = np.unravel_index(np.argmin(cost), cost.shape)
    return of_queries[int(best[0])], of_keys[int(best[1])]


def _shapes(extents: list[int], places: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Tiles no longer than an axis needs; if that is too few tokens, along the last axis beyond it."""
    longest = [1 << (extent - 1).bit_length() for extent in extents]
    longest[-1] = max(longest[-1], min(places) // math.prod(longest[:-1]))
    powers = [[1 << i for i in range(size.bit_length())] for size in longest]
    return [tile for tile in itertools.product(*powers) if math.prod(tile) in places]


@functools.lru_cache(maxsize=256)
def _pairs(axis: Any, q_tiles: tuple[int, ...], kv_tiles: tuple[int, ...]) -> np.ndarray:
    """How many pairs of tiles meet along an axis, over its groups, for each two of the sizes."""

    @functools.cache
    def meet(q: int, kv: int) -> int:
        extent, *neighborhood = axis
        plan = tile_plan((extent,), *((each,) for each in neighborhood), q_tile=(q,), kv_tile=(kv,))
        (ranges,) = plan.kv_ranges
        return int(np.sum(ranges.last - ranges.first + 1))

    return np.array([[meet(q, kv) for kv in kv_tiles] for q in q_tiles])
