"""Tables of tiles against all pairs of tokens; the order of tokens; the published counts of tiles."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.neighborhood.permute import token_permute, token_unpermute
from jattn.neighborhood.tiles import TilePlan, tile_plan, tile_stats
from jattn.neighborhood.window import Neighborhood


def drawn(seed: int) -> TilePlan:
    """Any problem of one to three axes; extents, tiles and strides rarely divide each other."""
    rng = np.random.default_rng(seed)
    rank = 1 + seed % 3
    grid = tuple(int(rng.integers(1, (30, 11, 6)[rank - 1])) for _ in range(rank))
    dilation = tuple(int(rng.integers(1, min(x, 3) + 1)) for x in grid)
    window = tuple(int(rng.integers(1, x // d + 1)) for x, d in zip(grid, dilation, strict=True))
    stride = tuple(int(rng.integers(1, w + 1)) for w in window)
    is_causal = tuple(bool(rng.integers(2)) for _ in grid)
    q_tile, kv_tile = (tuple(int(rng.integers(1, 6)) for _ in grid) for _ in range(2))
    return tile_plan(grid, window, stride, dilation, is_causal, q_tile=q_tile, kv_tile=kv_tile)


@functools.cache
def pairs(plan: TilePlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who sees whom in each group, with padding, `[G, R_q, P_q, R_k, P_k]`; the token at each place, 0 for none."""
    ids = np.arange(1, np.prod(plan.grid) + 1).reshape(1, *plan.grid)
    q_ids, k_ids = (np.asarray(token_permute(ids, tile, plan.dilation)) for tile in (plan.q_tile, plan.kv_tile))
    low, high, keys = plan.lo[..., None], plan.hi[..., None], plan.key_coordinates[:, None]
    seen = np.all((low <= keys) & (keys < high), axis=1)
    shape = (plan.groups, plan.q_tiles, plan.q_places, plan.kv_tiles, plan.kv_places)
    return seen.reshape(shape), q_ids.reshape(shape[:3]), k_ids.reshape(shape[0], *shape[3:])


def kinds(plan: TilePlan) -> np.ndarray:
    """0, 1 or 2 for every pair of tiles; a tile of padding alone sees nothing."""
    seen, q_ids, _ = pairs(plan)
    return (seen.any((2, 4)) * 1 + seen.all((2, 4))) * (q_ids > 0).any(-1)[:, :, None]


every_plan = pytest.mark.parametrize("seed", range(60))


@every_plan
def test_the_bounds_of_queries_and_the_coordinates_of_keys_are_the_mask(seed):
    plan = drawn(seed)
    dense = plan.neighborhood.dense(plan.grid)
    seen, q_ids, k_ids = pairs(plan)
    for g in range(plan.groups):
        real_q, real_k = q_ids[g] > 0, k_ids[g] > 0
        found = seen[g][real_q][:, real_k]
        np.testing.assert_array_equal(found, dense[q_ids[g][real_q] - 1][:, k_ids[g][real_k] - 1])
        assert not seen[g][:, :, ~real_k].any(), "padding is seen"
    assert sorted(q_ids[q_ids > 0]) == sorted(k_ids[k_ids > 0]) == list(range(1, dense.shape[0] + 1))


@every_plan
@pytest.mark.parametrize("transposed", [False, True])
def test_lists_and_steps_have_the_pairs_of_tiles_that_see_each_other(seed, transposed):
    plan = drawn(seed)
    kind = kinds(plan).swapaxes(1, 2) if transposed else kinds(plan)
    lists, steps = plan.lists(transposed), plan.steps(transposed)
    own, other = (steps.col, steps.row) if transposed else (steps.row, steps.col)
    for g in range(plan.groups):
        for row, of_row in enumerate(kind[g]):
            listed = [*np.flatnonzero(of_row == 1), *np.flatnonzero(of_row == 2)]
            assert (lists.n_partial[g, row], lists.n_total[g, row]) == ((of_row == 1).sum(), len(listed))
            repeated = [listed[-1] if listed else 0] * (lists.idx.shape[2] - len(listed))
            assert list(lists.idx[g, row]) == listed + repeated
        assert np.all(np.diff(own[g, 0]) >= 0)
        assert set(own[g, 0]) == set(range(kind.shape[1]))
        triples = list(zip(own[g, 0], other[g, 0], steps.kind[g, 0], strict=True))
        real = [(row, col, which) for row, col, which in triples if which]
        assert len(real) == len(set(real))
        assert set(real) == {(r, c, kind[g, r, c]) for r, c in zip(*np.nonzero(kind[g]), strict=True)}
        # Partial ones come first in a row, and what fills up a group repeats its last step.
        by_row = [[which for r, _, which in real if r == row] for row in range(kind.shape[1])]
        assert by_row == [sorted(row) for row in by_row]
        filled = triples[sum(max(len(row), 1) for row in by_row) :]
        assert all(t[:2] == triples[-1][:2] and t[2] == 0 for t in filled)
    longest = max(np.maximum(lists.n_total, 1).sum(axis=1))
    assert own.shape == (plan.groups, 1, longest)
    assert {x.dtype for x in (*lists[:3], *steps[:3], plan.lo, plan.hi)} == {np.dtype(np.int32)}


@every_plan
def test_ranges_along_an_axis_and_counts_are_those_of_the_pairs(seed):
    plan = drawn(seed)
    kind = kinds(plan)
    for ranges, of_axis in ((plan.kv_ranges, kind), (plan.q_ranges, kind.swapaxes(1, 2))):
        count, full = (
            np.stack(np.broadcast_arrays(*[_outer(x, a, len(plan.grid)) for a, x in enumerate(each)])).prod(axis=0)
            for each in (
                [r.last - r.first + 1 for r in ranges],
                [r.full_last - r.full_first + 1 for r in ranges],
            )
        )
        np.testing.assert_array_equal(count.reshape(plan.groups, -1), (of_axis > 0).sum(axis=2))
        np.testing.assert_array_equal(full.reshape(plan.groups, -1), (of_axis == 2).sum(axis=2))
    n = plan.neighborhood
    options = (n.kernel_size, n.stride, n.dilation, n.is_causal)
    stats = tile_stats(plan.grid, *options, q_tile=plan.q_tile, kv_tile=plan.kv_tile)
    assert stats.visited == np.count_nonzero(kind)
    assert stats.max_per_q == np.count_nonzero(kind, axis=2).max()
    dense = n.dense(plan.grid)
    assert stats.flop_bound == pytest.approx(dense.size / dense.sum())
    assert stats.efficiency == pytest.approx(dense.sum() / (stats.visited * plan.q_places * plan.kv_places))


def _outer(table: np.ndarray, a: int, rank: int) -> np.ndarray:
    shape = [1] * (2 * rank)
    shape[a], shape[rank + a] = table.shape
    return table.reshape(shape)


@pytest.mark.parametrize(
    ("grid", "window", "stride", "tile", "visited", "dense", "speedup", "bound"),
    [
        ((32768,), 2048, 1, 128, 4336, 65536, 15.1, 16.0),
        ((32768,), 2048, 256, 128, 4096, 65536, 16.0, 16.0),
        ((32768,), 2048, 2048, 128, 4096, 65536, 16.0, 16.0),
        ((256, 256), 80, 1, (16, 8), 34884, 262144, 7.51, 10.24),
        ((256, 256), 80, 16, (16, 8), 25600, 262144, 10.24, 10.24),
        ((30, 48, 80), (18, 24, 24), 1, (2, 8, 8), 148896, 810000, 5.44, 11.11),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), 72900, 810000, 11.11, 11.11),
    ],
)
def test_the_published_problems_have_the_published_counts(grid, window, stride, tile, visited, dense, speedup, bound):
    stats = tile_stats(grid, window, stride, q_tile=tile, kv_tile=tile)
    assert (stats.visited, stats.dense) == (visited, dense)
    assert stats.tile_speedup == pytest.approx(speedup, abs=0.02)
    assert stats.flop_bound == pytest.approx(bound, abs=0.005)
    plan = tile_plan(grid, window, stride, q_tile=tile, kv_tile=tile)
    assert plan.lists().n_total.sum() == plan.lists(True).n_total.sum() == visited
    assert plan.lists().idx.shape[2] == stats.max_per_q


def test_a_tile_beside_which_natten_says_full_is_partial():
    plan = tile_plan((6,), 4, q_tile=1, kv_tile=2)
    assert plan.lists().n_partial.sum() > 0
    np.testing.assert_array_equal(plan.lists().n_partial, (kinds(plan) == 1).sum(axis=2))


def test_equal_problems_share_a_plan_whose_tables_cannot_be_changed():
    plan = tile_plan((13,), 5, q_tile=4, kv_tile=2)
    assert tile_plan((13,), (5,), (1,), is_causal=(False,), q_tile=(4,), kv_tile=(2,)) is plan
    assert hash(plan) == hash(TilePlan((13,), Neighborhood(5).on((13,)), (4,), (2,)))
    with pytest.raises(ValueError, match="read-only"):
        plan.lists().idx[0, 0, 0] = 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_tile": (4, 4), "kv_tile": 4}, "q_tile: expected a number or a tuple of 1"),
        ({"q_tile": 4, "kv_tile": 0}, "kv_tile: expected at least 1"),
    ],
)
def test_a_wrong_tile_is_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tile_plan((13,), 5, **options)


@pytest.mark.parametrize(
    ("grid", "tile", "dilation"), [((13,), (5,), 3), ((7, 11), (2, 3), (3, 2)), ((3, 5, 7), (2, 1, 3), (1, 2, 3))]
)
def test_tokens_are_put_in_tiles_and_back(grid, tile, dilation):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *grid, 3, 5)).astype(np.float32)
    rank = len(grid)
    steps = (dilation,) * rank if isinstance(dilation, int) else dilation
    y = np.asarray(token_permute(x, tile, dilation))
    tiles = [-(-n // (t * d)) for n, t, d in zip(grid, tile, steps, strict=True)]
    want = np.zeros((2, *steps, *tiles, *tile, 3, 5), np.float32)
    for at in np.ndindex(grid):
        group = tuple(i % d for i, d in zip(at, steps, strict=True))
        inner = [i // d for i, d in zip(at, steps, strict=True)]
        row = tuple(i // t for i, t in zip(inner, tile, strict=True))
        place = tuple(i % t for i, t in zip(inner, tile, strict=True))
        want[(slice(None), *group, *row, *place)] = x[(slice(None), *at)]
    np.testing.assert_array_equal(y, want.reshape(2 * np.prod(steps), np.prod(tiles) * np.prod(tile), 3, 5))
    np.testing.assert_array_equal(token_unpermute(y, grid, tile, dilation), x)
    # Any axes may follow the grid, and any dtype: a log-sum-exp, a mask.
    np.testing.assert_array_equal(token_permute(x[..., 0, 0], tile, dilation), y[..., 0, 0])
    mask = np.asarray(token_permute(x[..., 0] > 0, tile, dilation))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, y[..., 0] > 0)
    # The transposes are each other: the gradient of a weighted sum is the weights in the other order.
    weights = rng.standard_normal(y.shape).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.vdot(token_permute(x, tile, dilation), weights))(x)
    np.testing.assert_array_equal(gradient, token_unpermute(weights, grid, tile, dilation))


def test_without_dilation_and_padding_the_tokens_of_an_axis_keep_their_order():
    x = np.arange(2 * 12 * 3).reshape(2, 12, 3)
    np.testing.assert_array_equal(token_permute(x, (4,)), x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: token_permute(x, (2, 2, 2, 2, 2)), ValueError, r"x: expected \[B, \*grid, ...\] with a grid of 5"),
        (lambda x: token_permute(x, (0,)), ValueError, r"tile\[0\]: expected at least 1"),
        (lambda x: token_permute([1.0], (2,)), TypeError, "x: expected an array"),
        (lambda x: token_unpermute(x, (5,), (2,)), ValueError, r"y: expected \[B \* 1, 6, ...\]"),
        (lambda x: token_unpermute(x, (6,), (2,), 5), ValueError, r"y: expected \[B \* 5, 2, ...\]"),
        (lambda x: token_unpermute(x, (7,), (7,), (1, 2)), ValueError, "dilation: expected a number or a tuple of 1"),
    ],
)
def test_wrong_tiles_and_shapes_are_named(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(np.zeros((3, 7, 2, 1)))
