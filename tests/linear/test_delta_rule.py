"""`delta_rule` in chunks against the recurrence in NumPy, and what a memory that overwrites must do."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.linear import wy
from jattn.linear.arguments import LinearState
from jattn.linear.delta_rule import delta_rule, delta_rule_step

B, H, V = 2, 5, 7
FORMS = ("none", "constant", "token", "channel")
HEADS = {"grouped": (6, 3, 3), "values": (3, 3, 6), "both": (6, 1, 3)}  # N, K, Kv
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def run(op, *args):
    """`op(*args)`, compiled quickly; arguments may be `None`."""
    return quick_jit(op)(*args)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(length: int, form: str = "token", heads: str = "grouped", dtype: Any = np.float32, batch: int = B):
    """query, key, value, beta, log_decay, S by name; queries and keys of length 1."""
    rng = np.random.default_rng(length)
    N, K, Kv = HEADS[heads]
    gate = {"none": None, "constant": (Kv,), "token": (batch, length, Kv), "channel": (batch, length, Kv, H)}[form]
    x = {
        "query": unit(rng.standard_normal((batch, length, N, H))),
        "key": unit(rng.standard_normal((batch, length, K, H))),
        "value": rng.standard_normal((batch, length, Kv, V)),
        "beta": rng.uniform(0, 2, (batch, length, Kv)),
        "log_decay": None if gate is None else -rng.exponential(0.3, gate),
        "S": rng.standard_normal((batch, Kv, H, V)),
    }
    return {name: array.astype(dtype) for name, array in x.items() if array is not None}


def recurrence(query, key, value, beta, log_decay=None, S=None, segment_ids=None, scale=H**-0.5):
    """Every head on its own, token after token, in float64: the definition written once more."""
    value, beta = np.asarray(value, np.float64), np.asarray(beta, np.float64)
    heads = max(query.shape[2], value.shape[2])
    states = value.shape[2]
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    gates = np.zeros((states,)) if log_decay is None else np.asarray(log_decay, np.float64)
    gates = gates if gates.ndim == 4 else np.broadcast_to(gates, beta.shape)[..., None]
    out = np.zeros((*query.shape[:2], heads, value.shape[3]))
    ends = np.zeros((len(query), states, query.shape[3], value.shape[3]))
    for b in range(len(query)):
        for n in range(heads):
            h = n * states // heads
            state = ends[b, h] if S is None else np.array(S[b, h], np.float64)
            for t in range(query.shape[1]):
                if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                    state = np.zeros_like(state)
                k, q = key[b, t, h * key.shape[2] // states], query[b, t, n * query.shape[2] // heads]
                state = np.exp(gates[b, t, h])[:, None] * state
                state = state + beta[b, t, h] * np.outer(k, value[b, t, h] - state.T @ k)
                out[b, t, n] = scale * state.T @ q
            ends[b, h] = state
    return out, ends


def op(x, **options):
    """`delta_rule` on the arrays of `make`: the output and the state's S."""
    x = dict(x)
    S = x.pop("S", None)
    state = None if S is None else LinearState(S, None)
    out, state = delta_rule(**x, initial_state=state, return_state=True, **options)
    return out, state.S


def value_and_gradients(x, **options):
    """Outputs of `op` and the gradients of every array, for one random cotangent, the same in any dtype."""

    def both(x):
        out, vjp = jax.vjp(functools.partial(op, **options), x)
        rng = np.random.default_rng(3)
        cotangent = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(jnp.bfloat16).astype(x.dtype), out)
        return out, vjp(cotangent)

    return run(both, x)


def assert_close(got, want, tolerance: float) -> None:
    """Root mean square of the difference over that of `want`, for every leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.shape == y.shape
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.isfinite(x).all()
        assert np.sqrt(np.mean((x - y) ** 2)) <= tolerance * (np.sqrt(np.mean(y**2)) + 1e-8)


LENGTHS = [(1, 8), (15, 16), (16, 16), (17, 16), (63, 32), (64, 32), (65, 64), (130, 32), (149, 8)]


# Gates by channel at every length; of the others, which share their way through chunks, one at each.
@pytest.mark.parametrize(
    ("form", "length", "chunk"),
    [
        (form, *sizes)
        for sizes, scalar in zip(LENGTHS, itertools.cycle(("none", "token", "constant")), strict=False)
        for form in (scalar, "channel")
    ],
)
def test_agrees_with_the_recurrence(form, length, chunk):
    x = make(length, form)
    got = run(functools.partial(op, chunk_size=chunk, implementation="xla"), x)
    assert_close(got, recurrence(**x), 1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("form", ["none", "channel"])
def test_heads_scale_and_segments_agree_with_the_recurrence(form, heads, implementation):
    x = make(37, form, heads)
    ids = np.array([[0] * 5 + [2] * 11 + [3] * 1 + [4] * 20, [1] * 16 + [2] * 16 + [6] * 5])
    chunk = {"chunk_size": 8} if implementation == "xla" else {}
    got = run(functools.partial(op, scale=0.7, segment_ids=ids, implementation=implementation, **chunk), x)
    assert_close(got, recurrence(**x, segment_ids=ids, scale=0.7), 1e-6)


@pytest.mark.parametrize(("form", "heads"), [("none", "both"), ("constant", "values"), ("token", "grouped")])
def test_gradients_are_those_of_the_recurrence(form, heads):
    """Exactly so in float64; in float32 within the rounding that the recurrence itself has."""
    with jax.enable_x64(True):
        want = value_and_gradients(make(67, form, heads, np.float64), implementation="reference")
        got = value_and_gradients(make(67, form, heads, np.float64), chunk_size=16, implementation="xla")
    assert_close(got, want, 1e-12)
    assert_close(value_and_gradients(make(67, form, heads), chunk_size=16, implementation="xla"), want, 2e-6)


def rounded(x, dtype):
    """The operands as `dtype` has them; beta, gates and state stay as they are."""
    return {name: a.astype(dtype) if name in ("query", "key", "value") else a for name, a in x.items()}


@pytest.mark.parametrize("form", ["none", "channel"])
def test_bfloat16_operands_cost_the_rounding_of_results_only(form):
    x = rounded(make(130, form, batch=1), jnp.bfloat16)
    wide = {name: array.astype(np.float32) for name, array in x.items()}
    want = value_and_gradients(wide, implementation="reference")
    assert_close(value_and_gradients(x, chunk_size=64), want, 2**-9)


def test_gates_of_minus_twenty_a_step_are_exact():
    x = make(67, "channel", dtype=np.float64)
    x["log_decay"][..., ::2] = -20
    x["log_decay"][0, 30] = -1e5
    x["beta"][:, ::3] = 0
    narrow = {name: array.astype(np.float32) for name, array in x.items()}
    with jax.enable_x64(True):
        want = value_and_gradients(x, implementation="reference")
    assert_close(value_and_gradients(narrow, chunk_size=32), want, 2e-6)


@pytest.mark.parametrize(("beta", "condition"), [(1.0, 64 * 2), (2.0, 127 * 127)])
def test_a_key_that_never_changes(beta, condition):
    """L is then full of `beta`: its powers grow to 1e18, the inverse of I + L does not.

    Its rows are (.., -1, 1), or for a beta of 2 (.., 2, -2, 1). What is lost of the digits that the condition number of
    a chunk puts at risk depends on the order of sums, and so on the processor: a fifth of them may be.
    """
    x = make(130, "none")
    x["key"] = np.broadcast_to(x["key"][:, :1], x["key"].shape).copy()
    x["beta"] = np.full_like(x["beta"], beta)
    assert_close(run(functools.partial(op, chunk_size=64), x), recurrence(**x), condition * 2.0**-24 / 5)


def test_chunk_size_changes_nothing():
    x = make(67, "channel", "values")
    want = recurrence(**x)
    for chunk in (1, 32, 256, None):
        assert_close(run(functools.partial(op, chunk_size=chunk, implementation="xla"), x), want, 2e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_any_split_and_single_steps_give_what_the_whole_gives(implementation):
    x = make(26, "channel", "values")
    compiled = quick_jit(functools.partial(op, implementation=implementation))
    whole = compiled(x)
    part = lambda s: {name: array[:, s] for name, array in x.items() if name != "S"}  # noqa: E731
    first, S = compiled(part(slice(0, 13)) | {"S": x["S"]})
    second, S = compiled(part(slice(13, None)) | {"S": S})
    assert_close((np.concatenate([first, second], axis=1), S), whole, 1e-6)

    def step(state, token):
        out, state = delta_rule_step(**token, state=state)
        return state, out

    tokens = {name: np.moveaxis(array, 1, 0) for name, array in part(slice(None)).items()}
    state, out = run(functools.partial(jax.lax.scan, step), LinearState(x["S"], None), tokens)
    assert_close((np.moveaxis(out, 0, 1), state.S), whole, 1e-6)


@pytest.mark.parametrize("form", ["none", "constant", "token"])
def test_steps_take_gates_of_every_shape_and_a_beta_of_one(form):
    x = make(1, form)
    del x["beta"]
    want = recurrence(**x, beta=np.ones((B, 1, 3)))
    token = {name: array if name == "log_decay" and form == "constant" else array[:, 0] for name, array in x.items()}
    out, state = delta_rule_step(**{n: a for n, a in token.items() if n != "S"}, state=LinearState(x["S"], None))
    assert_close((out[:, None], state.S), want, 1e-6)
    assert_close(op(x), want, 1e-6)


def test_a_padded_token_is_as_if_it_were_not_there():
    x = make(19, "token")
    real = np.arange(19) % 3 != 1
    short = {name: array if name == "S" else array[:, real] for name, array in x.items()}
    x["key"][:, ~real], x["value"][:, ~real], x["beta"][:, ~real] = np.nan, np.inf, 2.0
    got, S = run(functools.partial(op, mask=np.broadcast_to(real, (B, 1, 1, 19)), chunk_size=8), x)
    want, want_S = run(functools.partial(op, chunk_size=8), short)
    assert_close((np.asarray(got)[:, real], S), (want, want_S), 1e-6)


@pytest.mark.parametrize("form", ["constant", "channel"])
def test_reverse_is_flip_of_everything(form):
    x = make(37, form)
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (B, 37)))
    flip = lambda a: a[:, ::-1] if a.ndim > 1 else a  # noqa: E731
    flipped = {name: array if name == "S" else flip(array) for name, array in x.items()}
    out, S = run(functools.partial(op, segment_ids=3 - flip(ids), chunk_size=8), flipped)
    assert_close(run(functools.partial(op, segment_ids=ids, reverse=True, chunk_size=8), x), (flip(out), S), 1e-6)


# What the rule is for


def test_orthonormal_keys_are_recalled_and_a_key_written_again_reads_its_last_value():
    rng = np.random.default_rng(0)
    keys = np.linalg.qr(rng.standard_normal((H, H)))[0].astype(np.float32)
    order = np.array([0, 1, 2, 3, 4, 1, 3])
    value = rng.standard_normal((1, len(order), 1, V)).astype(np.float32)
    key = keys[order][None, :, None]
    out, state = delta_rule(key, key, value, scale=1.0, return_state=True, chunk_size=4)
    np.testing.assert_allclose(out, value, atol=1e-6)
    last = np.array([np.flatnonzero(order == i)[-1] for i in range(H)])
    np.testing.assert_allclose(keys @ state.S[0, 0], value[0, last, 0], atol=1e-6)


def test_a_beta_of_zero_only_decays():
    x = make(23, "token")
    x["beta"] = np.zeros_like(x["beta"])
    out, S = run(op, x)
    left = np.exp(np.cumsum(x["log_decay"], axis=1))
    query = x["query"].reshape(B, 23, 3, 2, H)
    want = H**-0.5 * np.einsum("btkgh,btk,bkhv->btkgv", query, left, x["S"]).reshape(out.shape)
    assert_close((out, S), (want, left[:, -1, :, None, None] * x["S"]), 1e-6)


# Derivatives of the triangle, and of the op in the other directions


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_inverse_of_a_triangle_and_its_derivative(size):
    with jax.enable_x64(True):
        rng = np.random.default_rng(size)
        lower, tangent = (np.tril(rng.standard_normal((3, size, size)), -1) / size**0.5 for _ in range(2))
        got = run(functools.partial(jax.jvp, wy.unit_lower_inverse), (lower,), (tangent,))
        want = np.linalg.inv(np.eye(size) + lower)
        scale = np.abs(want).max()
        np.testing.assert_allclose(got[0], want, atol=1e-12 * scale)
        np.testing.assert_allclose(got[1], -want @ tangent @ want, atol=1e-11 * scale**2)


def test_forward_mode_and_second_derivatives():
    with jax.enable_x64(True):
        x = make(11, "channel", dtype=np.float64)
        tangent = {name: np.random.default_rng(2).standard_normal(a.shape) for name, a in x.items()}
        loss = lambda x: sum(jnp.sum(jnp.sin(part)) for part in op(x, chunk_size=4))  # noqa: E731
        gradient, forward_of_reverse = run(lambda x: jax.jvp(jax.grad(loss), (x,), (tangent,)), x)
        along = lambda x: jax.jvp(loss, (x,), (tangent,))[1]  # noqa: E731
        derivative, reverse_of_forward = run(jax.value_and_grad(along), x)
        products = jax.tree.map(np.vdot, gradient, tangent)
        np.testing.assert_allclose(derivative, sum(jax.tree.leaves(products)), rtol=1e-10)
        assert_close(forward_of_reverse, reverse_of_forward, 1e-10)


X = make(5, "token")
STATE = LinearState(X["S"], None)
BAD = [
    ({"beta": X["beta"] + 1.5}, ValueError, "beta: expected numbers from 0 to 2"),
    ({"beta": -X["beta"]}, ValueError, "beta: expected numbers from 0 to 2"),
    ({"beta": X["beta"][:, :4]}, ValueError, r"beta: expected \[B, T, Kv\] with T = 5"),
    ({"beta": X["beta"].astype(int)}, TypeError, "beta: expected a floating dtype"),
    ({"beta": 1.0}, TypeError, "beta: expected an array, got float"),
    ({"value": X["value"][:, :, :2]}, ValueError, "value: 2 heads cannot share 3 key heads"),
    ({"query": X["query"][:, :, :2]}, ValueError, "query: 2 heads cannot be shared by 3 value heads and 3 key heads"),
    ({"query": X["query"][:, :4]}, ValueError, r"key: .* with T = 4 as in query"),
    ({"key": X["key"].astype(np.float16)}, TypeError, "key: expected dtype float32"),
    ({"log_decay": -X["log_decay"]}, ValueError, "log_decay: .* at most 0, got positive"),
    ({"log_decay": X["log_decay"][:, :4]}, ValueError, r"log_decay: expected \[Kv\] = \(3,\) or \[B, T, Kv\] ="),
    ({"mask": np.ones((B, 1, 5, 5), bool)}, ValueError, "mask: .* honours key padding"),
    ({"segment_ids": np.array([[0, 1, 1, 0, 0]] * B)}, ValueError, "segment_ids: .* never decrease"),
    ({"initial_state": X["S"]}, TypeError, "initial_state: expected a LinearState"),
    ({"initial_state": LinearState(X["S"][:, :2], None)}, ValueError, r"initial_state\.S: .* with Kv = 3"),
    ({"initial_state": LinearState(X["S"], X["S"][..., 0])}, ValueError, r"initial_state\.z: normalize=False has no"),
    ({"chunk_size": 24}, ValueError, "chunk_size: expected a power of two"),
    ({"scale": "1"}, TypeError, "scale: expected a Python number"),
    ({"reverse": 1}, TypeError, "reverse: expected a static True or False"),
    ({"implementation": "pallas_tpu"}, NotImplementedError, "delta_rule runs on tpu, and this is cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_errors_name_the_argument(changes, error, message):
    args = {name: array for name, array in X.items() if name != "S"} | changes
    with pytest.raises(error, match=message):
        delta_rule(**args)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state": None}, TypeError, "state: expected a LinearState, got None"),
        ({"state": LinearState(STATE.S[:1], None)}, ValueError, r"state\.S: .* with B = 2"),
        ({"log_decay": X["log_decay"]}, ValueError, r"log_decay: expected \[Kv\] = \(3,\) or \[B, Kv\] = \(2, 3\)"),
        ({"beta": X["beta"]}, ValueError, "beta: expected 2 dimensions"),
        ({"query": X["query"]}, ValueError, "query: expected 3 dimensions"),
    ],
)
def test_errors_of_a_step_name_the_argument(changes, error, message):
    args = {name: array[:, 0] for name, array in X.items() if name != "S"} | {"state": STATE} | changes
    with pytest.raises(error, match=message):
        delta_rule_step(**args)
