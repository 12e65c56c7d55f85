"""Every check raises the right kind of error, and its message names the argument, what came and what was wanted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import checks


def test_bind_shapes_returns_sizes():
    sizes = checks.bind_shapes(
        ("query", np.ones((2, 3)), "B T"), ("bias", None, "B Q"), ("key", np.ones((2, 5)), "B S")
    )
    assert sizes == {"B": 2, "T": 3, "S": 5}


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ([("query", [1, 2], "B T")], TypeError, "query: expected an array, got list"),
        ([("query", np.ones(3), "B T")], ValueError, "query: expected 2 dimensions .B, T., got shape .3,."),
        (
            [("query", np.ones((2, 7)), "B H"), ("key", np.ones((2, 5)), "B H")],
            ValueError,
            r"key: expected \[B, H\] with H = 7 as in query, got \(2, 5\)",
        ),
        ([("query", np.ones((2, 7)), "B 1")], ValueError, r"query: expected \[B, 1\] with 1 = 1, got \(2, 7\)"),
    ],
)
def test_bind_shapes_errors(specs, error, message):
    with pytest.raises(error, match=message):
        checks.bind_shapes(*specs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: checks.check_floating(key=jnp.ones(3, int)), TypeError, "key: expected a floating dtype, got int32"),
        (lambda: checks.check_integer(ids=jnp.ones(3)), TypeError, "ids: expected an integer dtype, got float32"),
        (
            lambda: checks.check_same_dtype(query=jnp.ones(3), key=jnp.ones(3, jnp.bfloat16)),
            TypeError,
            "key: expected dtype float32 as in query, got bfloat16",
        ),
        (lambda: checks.check_grouped_heads(7, 3), ValueError, "query: 7 heads cannot be shared by 3"),
        (lambda: checks.check_grouped_heads(7, 0), ValueError, "query: 7 heads cannot be shared by 0"),
        (lambda: checks.check_no_empty({"S": 0}, "S"), ValueError, "dimension S is 0"),
        (
            lambda: checks.check_choice("mode", "fast", ("slow",)),
            ValueError,
            "mode: expected one of 'slow', got 'fast'",
        ),
        (lambda: checks.check_count("window", 0), ValueError, "window: expected at least 1, got 0"),
        (lambda: checks.check_count("window", 5, maximum=4), ValueError, "window: expected at most 4, got 5"),
        (lambda: checks.check_count("window", True), TypeError, "window: expected a static integer, got bool"),
        (lambda: checks.check_count("window", 2.0), TypeError, "window: expected a static integer, got float"),
        (lambda: checks.check_causal_lengths(3, 5), ValueError, r"mask=Causal\(\).*mask=Causal\(offset=2\)"),
        (
            lambda: checks.check_broadcastable("bias", np.ones((2, 3)), (2, 5), "B T"),
            ValueError,
            r"bias: expected \[B, T\] = \(2, 5\), each size may be 1, got \(2, 3\)",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_accumulator_dtype_never_narrows():
    assert checks.accumulator_dtype(jnp.bfloat16) == jnp.float32
    with jax.enable_x64(True):
        assert checks.accumulator_dtype(np.float64) == np.float64
