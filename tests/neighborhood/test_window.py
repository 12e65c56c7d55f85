"""Windows against their definition, query by query; the description's checks and pictures."""

from __future__ import annotations

import dataclasses
import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from jattn.neighborhood.window import Neighborhood, inverse_window_bounds, window_bounds


def defined(length: int, window: int, stride: int, is_causal: bool) -> np.ndarray:
    """Who sees whom in a group: a window of w keys around the leader of a query's stride group, moved inward."""
    seen = np.zeros((length, length), bool)
    for i in range(length):
        shared = range(i // stride * stride, min((i // stride + 1) * stride, length))
        if is_causal:
            keys = range(max(shared[-1] - window + 1, 0), i + 1)
        else:
            leader = min(shared[0] + stride // 2, length - 1)
            keys = range(leader - window // 2, leader - window // 2 + window)
            while keys[0] < 0:
                keys = range(keys[0] + 1, keys[-1] + 2)
            while keys[-1] >= length:
                keys = range(keys[0] - 1, keys[-1])
        seen[i, list(keys)] = True
    return seen


def between(bounds: tuple[np.ndarray, np.ndarray], length: int) -> np.ndarray:
    return (bounds[0][:, None] <= np.arange(length)) & (np.arange(length) < bounds[1][:, None])


def test_bounds_and_their_inverses_are_the_definition_for_every_group_up_to_25():
    cases = 0
    for length in range(1, 26):
        for window, is_causal in itertools.product(range(1, length + 1), (False, True)):
            for stride in range(1, window + 1):
                arguments = (length, window, stride, 1, is_causal)
                bounds, inverse = window_bounds(*arguments), inverse_window_bounds(*arguments)
                seen = between(bounds, length)
                assert np.array_equal(seen, defined(length, window, stride, is_causal)), arguments
                assert np.array_equal(seen, between(inverse, length).T), arguments
                assert all(np.all(np.diff(bound) >= 0) for bound in (*bounds, *inverse)), arguments
                assert seen.diagonal().all(), arguments
                cases += 1
    assert cases == 5850
    assert {bound.dtype for bound in (*bounds, *inverse)} == {np.dtype(np.int32)}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("extent", "window", "stride", "dilation"), [(23, 3, 2, 7), (13, 4, 3, 3), (5, 1, 1, 5)])
def test_a_dilation_group_is_an_axis_of_its_own(extent, window, stride, dilation, is_causal):
    for bounds in (window_bounds, inverse_window_bounds):
        whole = bounds(extent, window, stride, dilation, is_causal)
        for group in range(dilation):
            alone = bounds(len(range(group, extent, dilation)), window, stride, 1, is_causal)
            for both in zip(whole, alone, strict=True):
                np.testing.assert_array_equal(both[0][group::dilation], both[1])


def test_on_a_grid_a_key_is_seen_if_it_is_seen_along_every_axis():
    neighborhood = Neighborhood((3, 2, 4), (2, 1, 3), (2, 1, 1), (True, False, True))
    grid = (7, 3, 5)
    seen = neighborhood.dense(grid).reshape(*grid, *grid)
    along = []
    for axis in neighborhood.axes(grid):
        one = np.zeros((axis.extent, axis.extent), bool)
        for g in range(axis.dilation):
            x = np.arange(g, axis.extent, axis.dilation)
            one[np.ix_(x, x)] = defined(len(x), axis.window, axis.stride, axis.is_causal)
        along.append(one)
    np.testing.assert_array_equal(seen, np.einsum("ax,by,cz->abcxyz", *along))


def test_without_a_causal_axis_every_query_sees_as_many_keys():
    for grid, neighborhood in (((13, 11), Neighborhood((4, 3), (3, 1), (2, 3))), ((7, 5, 3), Neighborhood(3, 2))):
        counts = neighborhood.dense(grid).sum(axis=1)
        assert set(counts) == {int(np.prod(neighborhood.on(grid).kernel_size))}


def test_strides_make_blocks_and_halos():
    blocks = Neighborhood(5, 5).dense((15,))
    np.testing.assert_array_equal(blocks, np.kron(np.eye(3), np.ones((5, 5))))
    # The last block is incomplete: it sees the last w tokens.
    np.testing.assert_array_equal(np.flatnonzero(Neighborhood(5, 5).dense((13,))[12]), np.arange(8, 13))
    # A window of s + 2 halo is HaloNet's, moved inward at the ends.
    halo = Neighborhood(4 + 2 * 3, 4).dense((32,))
    np.testing.assert_array_equal(np.flatnonzero(halo[13]), np.arange(9, 19))
    np.testing.assert_array_equal(np.flatnonzero(halo[0]), np.arange(10))


def test_clamping_takes_the_widest_window_that_fits():
    clamped = Neighborhood((7, 3), (5, 2), (2, 1)).on((9, 11), clamp_window=True)
    assert clamped == Neighborhood((4, 3), (4, 2), (2, 1), (False, False))
    assert Neighborhood(7, 2).on((11,), clamp_window=True) == Neighborhood(7, 2).on((11,))


def test_it_is_hashable_and_frozen():
    assert {Neighborhood(3, 2), Neighborhood(3, 2)} == {Neighborhood(3, 2)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        Neighborhood(3).kernel_size = 5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Neighborhood(0), ValueError, "kernel_size: expected at least 1, got 0"),
        (lambda: Neighborhood(2.0), TypeError, "kernel_size: expected a static integer, got float"),
        (lambda: Neighborhood([3, 3]), TypeError, r"kernel_size: .* a tuple .* got a list; pass tuple\(kernel_size\)"),
        (lambda: Neighborhood((3, True)), TypeError, r"kernel_size\[1\]: expected a static integer, got bool"),
        (lambda: Neighborhood(3, 4), ValueError, "stride: 4 on axis 0 is more than the window of 3"),
        (lambda: Neighborhood((5, 3), (1, 4)), ValueError, "stride: 4 on axis 1"),
        (lambda: Neighborhood((3, 3), 1, (1, 1, 1)), ValueError, "dilation: expected a number or a tuple of 2"),
        (lambda: Neighborhood(3, 1, 0), ValueError, "dilation: expected at least 1"),
        (lambda: Neighborhood(3, is_causal=1), TypeError, "is_causal: expected a static True or False"),
        (lambda: Neighborhood(3, is_causal=(True, 0)), TypeError, r"is_causal"),
        (lambda: Neighborhood((3, 3)).on((7,)), ValueError, "kernel_size: expected a number or a tuple of 1"),
        (lambda: Neighborhood(3, 1, 4).on((3,)), ValueError, "dilation: 4 on axis 0 of 3 tokens leaves groups without"),
        (
            lambda: Neighborhood(3, 1, (1, 3)).on((3, 8)),
            ValueError,
            "kernel_size: a window of 3 with dilation 3 reaches over 9 tokens, axis 1 has 8; pass at most 2, or clamp",
        ),
        (lambda: window_bounds(0, 1), ValueError, "extent: expected at least 1"),
        (lambda: window_bounds(5, 6), ValueError, "kernel_size: a window of 6"),
        (lambda: inverse_window_bounds(5, 2, 3), ValueError, "stride: 3"),
        (lambda: Neighborhood(3).show((5, 5), (1,)), ValueError, "query: expected 2 coordinates"),
        (lambda: Neighborhood(3).show((5, 5), (1, 5)), ValueError, "query: axis 1 has the tokens 0 to 4, got 5"),
        (lambda: Neighborhood(3).show((5,), (-1,)), ValueError, r"query\[0\]: expected at least 0"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_picture_shows_the_keys_of_a_query(capsys):
    Neighborhood((3, 5), dilation=(2, 1), is_causal=(False, True)).show((6, 7), (1, 5))
    caption, empty, *rows = capsys.readouterr().out.splitlines()
    assert caption.endswith("query (1, 5) of (6, 7)")
    assert "kernel_size=(3, 5)" in caption
    assert empty == ""
    unseen, seen = "· · · · · · ·", "· ██████████·"
    assert rows == [unseen, "· ████████◆ ·", unseen, seen, unseen, seen]


def test_a_picture_of_three_axes_has_a_plane_for_each_and_large_grids_have_coarse_cells():
    picture = Neighborhood((1, 3, 3)).picture((2, 4, 5), (1, 0, 4))
    planes = str(picture).split("\n\n")[1:]
    assert planes[0].splitlines() == ["· " * 4 + "·"] * 4
    assert planes[1].splitlines() == ["· · ████◆", "· · ██████", "· · ██████", "· · · · ·"]
    svg = ElementTree.fromstring(picture._repr_svg_())
    cells = svg.findall("{http://www.w3.org/2000/svg}rect")
    assert [sum(cell.get("fill") == fill for cell in cells) for fill in ("#888", "#3b8ff0", "#f08a3b")] == [31, 8, 1]
    large = str(Neighborhood(64).picture((1000,)))
    assert "one cell is 28 x 28 tokens" in large
    assert "▒▒" in large
    assert max(map(len, large.splitlines()[1:])) <= 72
