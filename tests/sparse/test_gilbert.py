"""The generalised Hilbert curve: it visits all, in steps to neighbours, and keeps what is near together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jattn.sparse.gilbert import gilbert_order


def points(width: int, height: int, depth: int) -> np.ndarray:
    """Column, row and frame of every token, in the order of the curve."""
    order = gilbert_order(width, height, depth)
    assert np.array_equal(np.sort(order), np.arange(width * height * depth))
    return np.stack([order % width, order // width % height, order // (width * height)], axis=1)


def test_the_curve_of_four():
    assert gilbert_order(2, 2).tolist() == [0, 2, 3, 1]
    assert gilbert_order(1, 5).tolist() == gilbert_order(5, 1).tolist() == gilbert_order(1, 1, 5).tolist()


@pytest.mark.parametrize("sizes", [*itertools.product((1, 2, 3, 5, 8, 13), (1, 4, 7), (1, 2, 3, 6)), (31, 18, 9)])
def test_every_token_comes_once_and_next_to_the_one_before(sizes):
    walk = points(*sizes)
    steps = np.abs(np.diff(walk, axis=0))
    assert not np.any(walk[0])
    assert steps.size == 0 or steps.max() == 1
    diagonal = np.count_nonzero(steps.sum(axis=1) > 1)
    assert diagonal <= (0 if all(size % 2 == 0 for size in sizes) else 1 if 1 in sizes else len(walk) / 8)


def test_the_walk_ends_beside_its_start_along_the_longest_edge():
    assert points(16, 8, 4)[-1].tolist() == [15, 0, 0]
    assert points(8, 16, 4)[-1].tolist() == [0, 15, 0]
    assert points(4, 8, 16)[-1].tolist() == [0, 0, 15]


def test_tokens_that_are_pooled_are_near():
    def spread(walk: np.ndarray) -> float:
        """The mean distance of the tokens of a group of 8 from its middle."""
        groups = walk.reshape(-1, 8, 3)
        return float(np.linalg.norm(groups - groups.mean(axis=1, keepdims=True), axis=-1).mean())

    walk = points(16, 12, 8)
    raster = walk[np.lexsort(walk.T)]
    assert np.array_equal(raster[:2], [[0, 0, 0], [1, 0, 0]])
    assert spread(walk) < 0.6 * spread(raster)


def test_the_order_is_shared_and_cannot_be_changed():
    order = gilbert_order(4, 3, 2)
    assert order is gilbert_order(4, 3, 2)
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 2), ValueError, r"^width: expected at least 1, got 0"),
        ((2, -1), ValueError, r"^height: expected at least 1"),
        ((2, 2, 1.0), TypeError, r"^depth: expected a static integer"),
    ],
)
def test_bad_sizes(sizes, error, message):
    with pytest.raises(error, match=message):
        gilbert_order(*sizes)
