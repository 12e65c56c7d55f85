"""One token at a time against the whole grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn


def arrays(grid):
    rng = np.random.default_rng(0)
    shapes = ((2, *grid, 4, 5), (2, *grid, 2, 5), (2, *grid, 2, 7))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((23,), {"kernel_size": 5, "dilation": 3, "is_causal": True}),
        ((7, 11), {"kernel_size": (3, 4), "stride": (2, 3), "is_causal": True}),
        ((7, 11), {"kernel_size": (4, 3), "dilation": (1, 2), "is_causal": (True, False)}),
        ((3, 5, 7), {"kernel_size": (2, 3, 3), "is_causal": False, "stride": (1, 2, 1)}),
    ],
)
def test_every_place_of_a_grid(grid, options):
    query, key, value = arrays(grid)
    want = jattn.neighborhood_attention(query, key, value, **options, scale=0.3, return_lse=True)
    step = jax.jit(lambda *args: jattn.neighborhood_attention_step(*args, **options, scale=0.3, return_lse=True))
    for place in np.ndindex(*grid):
        got = step(query[:, *place], key, value, jnp.asarray(place))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b[:, *place], atol=2e-6)


def test_an_image_is_written_token_by_token():
    """What is not yet written may be anything but infinite: no window reaches it."""
    query, key, value = arrays((5, 7))
    want = jattn.neighborhood_attention(query, key, value, kernel_size=3, is_causal=True)
    keys, values = jnp.full_like(key, 1e9), jnp.full_like(value, 1e9)
    for place in np.ndindex(5, 7):
        keys, values = keys.at[:, *place].set(key[:, *place]), values.at[:, *place].set(value[:, *place])
        got = jattn.neighborhood_attention_step(query[:, *place], keys, values, place, kernel_size=3)
        np.testing.assert_allclose(got, want[:, *place], atol=2e-6)


def test_positions_that_do_not_fit():
    query, key, value = arrays((5, 7))
    with pytest.raises(ValueError, match="position: expected 2 integers, one for each axis of the grid"):
        jattn.neighborhood_attention_step(query[:, 0, 0], key, value, (3,), kernel_size=3)
    for place in ((5, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"position: expected a place on the grid of \(5, 7\), got"):
            jattn.neighborhood_attention_step(query[:, 0, 0], key, value, place, kernel_size=3)
    with pytest.raises(TypeError, match="position: expected"):
        jattn.neighborhood_attention_step(query[:, 0, 0], key, value, (3.0, 1.0), kernel_size=3)
    with pytest.raises(ValueError, match="kernel_size: a window of 6"):
        jattn.neighborhood_attention_step(query[:, 0, 0], key, value, (3, 1), kernel_size=6)
