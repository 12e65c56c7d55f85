"""Neighborhood attention by kernels: in one pass where windows are small, else over tiles of a grid.

On TPU small windows are attended in one pass (`one_pass`), with a relative position bias in three dimensions plane by
plane (`planes`), where that takes less time.
What else there is goes to the block-sparse kernels, with tiles of a permuted grid as blocks, neighborhoods as windows.
There a bias is one by the distance of coordinates.

After `token_permute` a tile of the grid is a block of consecutive tokens, the plan of `jattn.neighborhood.tiles` lists
which blocks meet, and a key is seen where its coordinates lie in the query's window. Group g of batch row b is the row
b G + g of the kernel, with the lists of g. Tiles are those that take least time: every pair of tiles costs its products
and a step, so small ones cut off more of what no query sees, and large ones take fewer steps.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jattn.neighborhood import one_pass, planes
from jattn.neighborhood.arguments import Operands
from jattn.neighborhood.permute import token_permute, token_unpermute
from jattn.neighborhood.tiles import Ranges, TilePlan, tile_plan
from jattn.neighborhood.window import Axis, Neighborhood
from jattn.softmax_tile import Score
from pallas_kernels.block_sparse import BlockLists, Relative, Windows, WorkList, block_sparse_attention, tiling
from pallas_kernels.block_sparse import attention as kernel
from pallas_kernels.block_sparse import lists as kernel_lists
from pallas_kernels.block_sparse.relative import check_size
from pallas_kernels.block_sparse.strips import Strip

TPU_PLACES, GPU_PLACES = (128, 256, 512, 1024), (64, 128)
"""Tokens of tiles that are tried."""
MOST_TRIED = 4096
"""Pairs of tiles, from the best on, of which one has to have room for a bias on TPU."""
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
    given = platform, x, neighborhood, score, q_tile, kv_tile
    attend = None if platform in kernel.GPU else _in_one_pass(*given)
    if attend is not None:
        return attend()
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
    try:
        _check_general(platform, x, neighborhood, q_tile, kv_tile)
    except NotImplementedError as reason:
        if x.rel_pos_bias is None or platform in kernel.GPU:
            raise
        try:
            _one_pass(platform, x, neighborhood, score, q_tile, kv_tile)
        except NotImplementedError as other:
            raise NotImplementedError(f"{reason}; and in one pass: {other}") from None


def _check_general(
    platform: kernel.Platform, x: Operands, neighborhood: Neighborhood, q_tile: Any, kv_tile: Any
) -> None:  # fmt: skip
    least = tiling.LEAST if platform in kernel.GPU else tiling.LANES
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if tile is not None and math.prod(tile) % least:
            raise NotImplementedError(f"{name}: the kernel has tiles of a multiple of {least} tokens, not {tile}")
    shapes = ((a.shape[0], math.prod(x.grid), *a.shape[-2:]) for a in (x.query, x.key, x.value))
    flat: Any = (jax.ShapeDtypeStruct(shape, x.query.dtype) for shape in shapes)
    functions: Any = {"element": None, "score_mod": None, "captured": ()}
    kernel.check(*flat, **functions, block_q=least, block_kv=least, platform=platform)
    if x.rel_pos_bias is not None:
        try:
            plan = _plan(platform, x, neighborhood, q_tile, kv_tile)
            if platform in kernel.GPU:
                check_size(x.rel_pos_bias.shape, (plan.q_tile, plan.kv_tile))
            else:
                _strip(plan.axes, plan.q_tile, plan.kv_tile).check(tiling.room())
        except NotImplementedError as reason:
            raise NotImplementedError(f"rel_pos_bias: {reason}") from None


def _in_one_pass(
    platform: kernel.Platform, x: Operands, neighborhood: Neighborhood, score: Score, q_tile: Any, kv_tile: Any
) -> Callable[[], tuple[Array, Array]] | None:
    """What attends in one pass, where that is possible and takes less time."""
    try:
        found, times = _one_pass(platform, x, neighborhood, score, q_tile, kv_tile)
    except NotImplementedError:
        return None
    if ONE_PASS * found.work * times >= _work(platform, x, neighborhood, q_tile, kv_tile):
        return None
    if _is_by_planes(x):
        return functools.partial(planes.attend, platform, x, neighborhood, score.scale)
    return functools.partial(one_pass.attend, found, x)


def _one_pass(
    platform: kernel.Platform, x: Operands, neighborhood: Neighborhood, score: Score, q_tile: Any, kv_tile: Any
) -> tuple[one_pass.Plan, int]:
    """How the grid, or one plane of it, is done, and how often."""
    given = platform, x, neighborhood, score.scale, q_tile, kv_tile
    if _is_by_planes(x):
        return planes.plan(*given), planes.pairs(neighborhood.axes(x.grid)[0])
    return one_pass.plan(*given), 1


def _is_by_planes(x: Operands) -> bool:
    return x.rel_pos_bias is not None and len(x.grid) == 3


def _work(platform: kernel.Platform, x: Operands, neighborhood: Neighborhood, q_tile: Any, kv_tile: Any) -> float:
    """The time that tiles take for a batch row, in registers of logits of a head."""
    try:
        _check_general(platform, x, neighborhood, q_tile, kv_tile)
    except NotImplementedError:
        return math.inf
    plan = _plan(platform, x, neighborhood, q_tile, kv_tile)
    pairs = math.prod(int(np.sum(ranges.last - ranges.first + 1)) for ranges in plan.kv_ranges)
    cost = float(tiling.cost(pairs, plan.q_places, plan.kv_places))
    if x.rel_pos_bias is not None:
        cost += _cost(_strip(plan.axes, plan.q_tile, plan.kv_tile))
    return REGISTERS * cost


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
        options["biased"] = x.rel_pos_bias is not None
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
    biased: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tiles of queries and of keys for the chip that is compiled for, of powers of two along each axis.

    Args:
      q_tile, kv_tile: those that are fixed.
      width: of a head; on TPU the channels that it leaves empty are where windows cost least.
      biased: with a relative bias, whose numbers on TPU have to fit the chip.

    Raises:
      NotImplementedError: with no tiles do they fit.
    """
    axes = neighborhood.axes(grid)
    extents = [math.ceil(axis.extent / axis.dilation) for axis in axes]
    shapes = _shapes(extents, GPU_PLACES if on_gpu else TPU_PLACES)
    of_queries, of_keys = ([tile] if tile else shapes for tile in (q_tile, kv_tile))
    pairs = functools.reduce(
        np.multiply,
        (
            _pairs(axis, tuple(tile[a] for tile in of_queries), tuple(tile[a] for tile in of_keys))
            for a, axis in enumerate(axes)
        ),
    )
    places = [np.array([math.prod(tile) for tile in tiles]) for tiles in (of_queries, of_keys)]
    if on_gpu:
        cost = pairs * (places[0][:, None] * places[1] + GPU_STEP)
    else:
        fits = np.array([sum(tile) <= -width % tiling.LANES for tile in of_keys])
        cost = tiling.cost(pairs, places[0][:, None], places[1] * np.where(fits, 1, COMPARED))
        cost = np.where(4 * pairs > kernel_lists.BUDGET, np.inf, cost)
    if not biased or on_gpu:
        i, j = np.unravel_index(np.argmin(cost), cost.shape)
        return of_queries[int(i)], of_keys[int(j)]
    found, least, reason = None, math.inf, None
    for at in np.argsort(cost, axis=None, kind="stable")[:MOST_TRIED]:
        i, j = np.unravel_index(at, cost.shape)
        if cost[i, j] >= least:
            break
        strip = _strip(axes, of_queries[int(i)], of_keys[int(j)])
        try:
            strip.check(tiling.room())
        except NotImplementedError as error:
            reason = reason or error
            continue
        if (taken := float(cost[i, j]) + _cost(strip)) < least:
            found, least = (of_queries[int(i)], of_keys[int(j)]), taken
    if found is None:
        assert reason is not None
        raise reason
    return found


def _strip(axes: tuple[Axis, ...], q_tile: tuple[int, ...], kv_tile: tuple[int, ...]) -> Strip:
    """Where the numbers of a bias are."""
    least, most = zip(*map(_apart, axes, q_tile, kv_tile), strict=True)
    return Strip(q_tile, kv_tile, least, most)


def _cost(strip: Strip) -> float:
    """Of making a strip for a head, and of its gradients, in 512 x 512 pairs; read off schedules too."""
    return (1 + strip.patterns / 2) * strip.size / (4 * 512**2)


def _shapes(extents: list[int], places: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Tiles no longer than an axis needs; if that is too few tokens, along the last axis beyond it."""
    longest = [1 << (extent - 1).bit_length() for extent in extents]
    longest[-1] = max(longest[-1], min(places) // math.prod(longest[:-1]))
    powers = [[1 << i for i in range(size.bit_length())] for size in longest]
    return [tile for tile in itertools.product(*powers) if math.prod(tile) in places]


def _along(axis: Axis, q: int, kv: int) -> Ranges:
    neighborhood: Any = ((each,) for each in axis[1:])
    return tile_plan((axis.extent,), *neighborhood, q_tile=(q,), kv_tile=(kv,)).kv_ranges[0]


@functools.lru_cache(maxsize=1024)
def _apart(axis: Axis, q: int, kv: int) -> tuple[int, int]:
    """The least and the largest distance from the first query of a tile to the first key of one that it meets."""
    ranges = _along(axis, q, kv)
    own, meet = q * np.arange(ranges.first.shape[1]), ranges.first <= ranges.last
    first, last = (kv * x - own for x in (ranges.first, ranges.last))
    return int(first[meet].min()), int(last[meet].max())


@functools.lru_cache(maxsize=256)
def _pairs(axis: Axis, q_tiles: tuple[int, ...], kv_tiles: tuple[int, ...]) -> np.ndarray:
    """How many pairs of tiles meet along an axis, over its groups, for each two of the sizes."""

    @functools.cache
    def meet(q: int, kv: int) -> int:
        ranges = _along(axis, q, kv)
        return int(np.sum(ranges.last - ranges.first + 1))

    return np.array([[meet(q, kv) for kv in kv_tiles] for q in q_tiles])
