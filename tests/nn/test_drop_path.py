"""Stochastic depth: whole rows, right on average, more often the deeper the block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.nn.drop_path import check_drop_path, drop_path, drop_path_rates, training_key


def test_rows_are_left_out_whole_and_right_on_average():
    x = np.random.default_rng(0).standard_normal((2003, 3, 5)).astype(np.float32)
    y = np.asarray(drop_path(x, 0.3, jax.random.key(0)))
    gone = np.all(y == 0, axis=(1, 2))
    np.testing.assert_allclose(y[~gone], x[~gone] / 0.7, rtol=1e-6)
    # Five standard deviations of a share of 2003 draws.
    assert abs(gone.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 2003)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_key_or_a_chance_nothing_changes(dtype):
    x = jax.random.normal(jax.random.key(0), (7, 3), dtype)
    assert drop_path(x, 0.3, None) is x
    y = drop_path(x, 0.0, jax.random.key(1))
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y.astype("float32"), x.astype("float32"))


def test_kept_rows_of_short_floats_are_divided_by_the_rate_itself():
    """0.9 is 0.8984375 in bfloat16, and 3 divided by that another number than by 0.9."""
    x = jnp.full((64, 1), 3.0, jnp.bfloat16)
    y = drop_path(x, 0.1, jax.random.key(0))
    assert set(np.unique(y.astype("float32"))) == {0, float(jnp.asarray(3.0 / 0.9, jnp.bfloat16))}


def test_rates_grow_over_all_blocks():
    assert drop_path_rates(0.5, (2, 1, 3)) == ((0, 0.1), (0.2,), (pytest.approx(0.3), 0.4, 0.5))
    assert drop_path_rates(0.5, (1,)) == ((0.0,),)


def test_a_key_is_needed_only_where_something_is_random():
    key = jax.random.key(0)
    assert training_key(key, 0.1, train=True) is key
    assert training_key(key, 0.1, train=False) is None
    assert training_key(None, 0.0, train=True) is None
    with pytest.raises(ValueError, match=r"key: in training .* \(drop_path = 0.1\); pass a jax.random.key, or make"):
        training_key(None, 0.1, train=True)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_chance_is_below_one(rate):
    with pytest.raises(ValueError, match="drop_path: expected a chance from 0 up to, not including, 1, got"):
        check_drop_path(rate)
