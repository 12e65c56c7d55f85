"""The selective scan: Mamba's arguments, its state, its step, and the memory it needs."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.linear.selective_scan import selective_scan, selective_scan_step
from tests.linear.dsf_rows import (
    IDS,
    B,
    T,
    assert_close,
    float64,  # noqa: F401 - every test here uses it
    made,
    n,
    normal,
    p,
    s6_parts,
    scan,
    sigmoid,
    softplus,
)

selective = jax.jit(selective_scan, static_argnames=("delta_softplus", "return_state"))
selective_step = jax.jit(selective_scan_step, static_argnames="delta_softplus")


def test_is_the_system_of_s6():
    got, want = selective(**s6_parts(), return_state=True), scan(made("s6"), return_state=True)
    assert_close(got[0], want[0][:, :, 0])
    assert_close(got[1], np.swapaxes(want[1][:, 0], 1, 2))


def test_has_mambas_arguments():
    parts = s6_parts()
    z, bias, logits = normal(B, T, p, seed=8), normal(p, seed=9), normal(B, T, p, seed=10)
    given = {**parts, "delta": logits, "delta_bias": bias, "delta_softplus": True, "z": z}
    out, last = selective(**given, return_state=True)
    want, end = selective(**{**parts, "delta": softplus(logits + bias)}, return_state=True)
    assert_close(out, want * z * sigmoid(z))
    assert_close(last, end)
    state, tokens = np.zeros((B, p, n)), []
    for t in range(T):
        token = {name: given[name][:, t] for name in ("u", "delta", "B", "C", "z")}
        y, state = selective_step(**{**given, **token}, state=state)
        tokens.append(y)
    assert_close(np.stack(tokens, axis=1), out)
    assert_close(state, last)

    def of(cut):
        return {name: x[:, cut] if np.ndim(x) == 3 else x for name, x in given.items()}

    first, state = selective(**of(slice(0, 6)), return_state=True)
    second, _ = selective(**of(slice(6, T)), initial_state=state, return_state=True)
    assert_close(np.concatenate([first, second], axis=1), out)


def test_never_holds_all_states():
    channels, states, size = 24, 16, 16

    def shapes(length):
        token = jax.ShapeDtypeStruct((1, length, channels), jnp.float32)
        key = jax.ShapeDtypeStruct((1, length, states), jnp.float32)
        return token, token, jax.ShapeDtypeStruct((channels, states), jnp.float32), key, key

    def loss(*arrays):
        return jnp.sum(selective_scan(*arrays, chunk_size=size) ** 2)

    temp = {}
    for length in (1024, 4096):
        compiled = jax.jit(jax.grad(loss, argnums=range(5))).lower(*shapes(length)).compile()
        temp[length] = compiled.memory_analysis().temp_size_in_bytes
        found = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
        assert max(math.prod(map(int, size.split(","))) for size in found) < length * channels * states / 4
    assert temp[4096] <= 4.5 * temp[1024]


# Bad input

WRONG = [("state", None), ("state", normal(B, n, p)), ("u", normal(B, 4)), ("C", normal(B, 4)), ("z", normal(B, 4))]


@pytest.mark.parametrize(("name", "given"), WRONG)
def test_a_step_names_its_own_arguments(name, given):
    token = {name: x[:, 0] if x.ndim == 3 else x for name, x in s6_parts().items()} | {"state": np.zeros((B, p, n))}
    letters = {"state": "B, D, n", "u": "B, D", "C": "B, n", "z": "B, D"}[name]
    wrong = "delta" if name == "u" else name  # the first argument says what the others are to be
    with pytest.raises(TypeError if given is None else ValueError, match=rf"^{wrong}: expected .*\[{letters}\]"):
        selective_scan_step(**{**token, name: given})
    with pytest.raises(TypeError, match=r"^state: expected dtype float64, in which"):
        selective_scan_step(**{**token, "state": np.zeros((B, p, n), np.float32)})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: selective_scan(**{**s6_parts(), "D": normal(4)}), ValueError, r"D: expected \[D\] with D = 7"),
        (lambda: selective_scan(**s6_parts(), delta_softplus=1), TypeError, "delta_softplus: expected a static True"),
        (lambda: selective_scan(**{**s6_parts(), "B": IDS}), ValueError, "B: expected 3 dimensions"),
        (lambda: selective_scan(**{**s6_parts(), "B": None}), TypeError, "^B: expected an array, got NoneType"),
        (lambda: selective_scan(**{**s6_parts(), "delta": None}), TypeError, "^delta: expected an array, got NoneType"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
