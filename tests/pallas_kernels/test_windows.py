"""Windows on several axes asked at once, against each axis by itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse.windows import Windows, packed


def drawn(extents, queries=101, keys=83, groups=2):
    """Some windows are empty, some reach over all there is."""
    rng, axes = np.random.default_rng(0), len(extents)
    size = np.array(extents)[:, None]
    low = rng.integers(0, size + 1, (groups, axes, queries))
    high = np.clip(low + rng.integers(-2, size + 1, low.shape), 0, size)
    low[:, :, 0], high[:, :, 0] = 0, size[:, 0]
    place = rng.integers(0, size, (axes, keys))
    place[:, 0], place[:, 1] = 0, size[:, 0] - 1
    return Windows(low, high, place)


@pytest.mark.parametrize("extents", [(7, 16), (1, 128), (30, 48, 80), (2, 3, 5, 7), (2**14, 2**13)])
def test_all_axes_at_once(extents):
    windows = drawn(extents)
    low, high, place = (x.astype(np.int64) for x in windows)
    each = (low[..., None] <= place[:, None]) & (place[:, None] < high[..., None])
    together, guards = packed(windows)
    assert [x.shape for x in together] == [(2, 1, 101), (2, 1, 101), (1, 83)]
    with np.errstate(over="raise"):
        after = together.place + np.int32(guards) - together.low[:, 0, :, None]
        before = together.high[:, 0, :, None] - together.place
    assert min(after.min(), before.min()) >= 0
    np.testing.assert_array_equal(after & before & guards == guards, each.all(axis=1))
    assert each.all(axis=1).any()
    assert guards.bit_count() == len(extents)


def test_what_stays_as_it_was():
    one, wide, found = drawn((9,)), drawn((2**15, 2**14)), drawn((9, 5))
    below = found._replace(high=found.high - 1)
    traced = found._replace(low=jnp.asarray(found.low))
    for windows in (one, wide, below, traced):
        same, guards = packed(windows)
        assert guards == 0
        assert same is windows
