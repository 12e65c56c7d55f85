"""Rows of the dynamical systems: each is its published formula, and what rows have in common is exact."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.dot_product import dot_product_attention
from jattn.linear.dsf import dsf_scan
from jattn.linear.dsf_systems import (
    delta_gating,
    elu_features,
    eta_gating,
    linear_attention_dsf,
    log_normalizer,
    lru_dsf,
    mamba2_dsf,
    normalized_attention_dsf,
    qlstm_dsf,
    rglru_dsf,
    s6_dsf,
    sigmoid_gating,
    softmax_dsf,
    softmax_log_eta,
    taylor_features,
)
from jattn.linear.gated import simple_gla
from jattn.linear.recurrence import linear_attention
from tests.linear.dsf_rows import (
    IDS,
    B,
    N,
    T,
    assert_close,
    eigenvalues,
    float64,  # noqa: F401 - every test here uses it
    gates,
    heads,
    lru_parts,
    made,
    n,
    normal,
    outputs,
    p,
    s6_parts,
    scan,
    sigmoid,
    softplus,
)

# The rows are their published formulas


def masked(scores, value):
    return np.einsum("bnij,bjnp->binp", scores * np.tril(np.ones((T, T))), value)


def elu(x):
    return np.where(x < 0, np.exp(x), x + 1)


def test_attention_rows():
    query, key, value = heads()
    q, k = elu(query), elu(key)
    assert_close(elu_features(query), q)
    weights = np.einsum("bind,bjnd->bnij", q, k) * np.tril(np.ones((T, T)))
    want = masked(weights / weights.sum(-1, keepdims=True), value)
    for where in ("state", "readout"):
        assert_close(scan(linear_attention_dsf(query, key, value, normalize_in=where), mode="scan"), want)
    assert_close(jax.jit(functools.partial(linear_attention, normalize=True, eps=0.0))(q, k, value), want)
    log_eta = normal(B, T, N)
    scores = np.einsum("bind,bjnd->bnij", query, key) / np.exp(log_eta).swapaxes(1, 2)[..., None]
    system = jax.jit(normalized_attention_dsf)(query, key, value, log_eta)
    assert_close(scan(system, mode="scan"), masked(scores, value))


def test_linear_attention_in_segments_divides_by_its_own_segment():
    query, key, value = heads()
    assert_close(outputs(linear_attention_dsf, query, key, np.ones_like(value), segment_ids=IDS), np.ones_like(value))


def test_s6_is_its_loop():
    parts = s6_parts()
    u, delta, A, b, c, D = parts.values()
    state, want = np.zeros((B, p, n)), []
    for t in range(T):
        state = np.exp(delta[:, t, :, None] * A) * state + (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
        want.append((state * c[:, t, None]).sum(-1) + D * u[:, t])
    out, last = scan(made("s6"), return_state=True)
    assert_close(out[:, :, 0], np.stack(want, 1))
    assert_close(last[:, 0], np.swapaxes(state, 1, 2))


def test_mamba_2_is_simple_gla_with_a_skip():
    x, delta, A, D = normal(B, T, N, p), softplus(normal(B, T, N)), -np.exp(normal(N)), normal(N, seed=1)
    b, c, _ = heads()
    gla = jax.jit(functools.partial(simple_gla, scale=1.0))
    assert_close(scan(made("mamba2")), gla(c, b, delta[..., None] * x, delta * A) + D[:, None] * x)
    shared = b[:, :, :1], c[:, :, :1]
    repeated = (np.repeat(y, N, axis=2) for y in shared)
    assert_close(*(outputs(mamba2_dsf, x, delta, A, *heads, D) for heads in (shared, repeated)))


def test_lru_is_its_loop_and_its_eigenvalues_lie_in_the_unit_circle():
    Bu, nu, theta, gamma = lru_parts()
    system = made("lru")
    lam = np.exp(-np.exp(nu) + 1j * np.exp(theta))
    assert_close(np.asarray(eigenvalues(system))[1, 3, 0, 0], lam)
    assert (np.abs(lam) < 1).all()
    state, want = 0, []
    for t in range(T):
        state = lam * state + np.exp(gamma) * Bu[:, t]
        want.append(state)
    assert_close(scan(system)[:, :, 0], np.stack(want, 1))


@pytest.mark.parametrize("alpha", [None, 1.7, 0.0, -2.0])
def test_qlstm_is_its_loop(alpha):
    x, forget, write, read = gates(4)
    lam = sigmoid(forget) if alpha is None else sigmoid(-forget) ** max(alpha, 0)
    state, want = 0, []
    for t in range(T):
        state = lam[:, t] * state + sigmoid(write[:, t]) * x[:, t]
        want.append(sigmoid(read[:, t]) * state)
    system = qlstm_dsf(*gates(4), None if alpha is None else np.asarray(alpha))
    assert_close(scan(system)[:, :, 0], np.stack(want, 1))
    if alpha is not None and alpha <= 0:
        assert (np.asarray(eigenvalues(system)) == 1).all(), "a pure integrator"


def test_rg_lru_is_its_loop_and_its_reset_splits_documents():
    x, recurrence, write = gates(3)
    decay, starts = normal(p), np.zeros((B, T), bool)
    starts[:, 0] = starts[1, 6] = True
    lam = np.exp(-8 * sigmoid(recurrence) * np.log1p(np.exp(decay)))
    lam, root = np.where(starts[..., None], 0, lam), np.where(starts[..., None], 1, np.sqrt(1 - lam**2))
    state, want = 0, []
    for t in range(T):
        state = lam[:, t] * state + root[:, t] * sigmoid(write[:, t]) * x[:, t]
        want.append(state)
    whole = np.asarray(outputs(rglru_dsf, *gates(3), decay, starts))
    assert_close(whole[:, :, 0], np.stack(want, 1))
    assert (np.asarray(eigenvalues(rglru_dsf(*gates(3), decay, starts)))[starts] == 0).all()
    # Nothing is left of a state from before the first token of a document.
    run = jax.jit(lambda state, *parts: dsf_scan(rglru_dsf(*parts), initial_state=state))
    state = np.ones((B, 1, 1, p))
    parts = [run(state, *(g[:, cut] for g in gates(3)), decay, starts[:, cut]) for cut in (slice(0, 6), slice(6, T))]
    assert_close(whole[1], np.concatenate(parts, axis=1)[1])
    # A gate that never opens keeps everything, and its root has a gradient.
    slope = jax.jit(jax.grad(lambda decay, starts: jnp.sum(dsf_scan(rglru_dsf(*gates(3), decay, starts)))))
    for begins in (None, starts):
        assert np.isfinite(slope(np.full(p, -800.0), begins)).all()
    slopes = jax.jit(jax.grad(lambda system: jnp.sum(dsf_scan(system))))(rglru_dsf(*gates(3), decay, starts))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


# What rows have in common


def test_s6_forgets_as_the_reversed_sigmoid_does():
    x = normal(B, T, p)
    s6 = delta_gating(jax.nn.softplus(x)[:, :, None], -1.7 * np.ones((1, 1, 1)))
    reversed_ = sigmoid_gating(x, x, np.asarray(1.7))
    assert_close(np.exp(s6.step * s6.rate), sigmoid(-x)[:, :, None, None] ** 1.7)
    np.testing.assert_array_equal(s6.step * s6.rate, reversed_.step * reversed_.rate)


def test_normalised_attention_is_a_state_space_model():
    query, key, value = heads()
    log_eta = 2 * normal(B, T, N)
    row = jax.jit(normalized_attention_dsf, static_argnames="normalize_in")
    system = row(query, key, value, log_eta)
    lam = np.asarray(eigenvalues(system))
    eta = np.exp(log_eta)
    assert_close(lam[:, 1:, :, 0, 0], eta[:, :-1] / eta[:, 1:])
    assert (lam[:, 0] == 1).all()
    assert lam.max() > 1, "a state may grow"
    plain, sums = scan(row(query, key, value, log_eta, normalize_in="readout"), return_state=True)
    out, state = scan(system, return_state=True)
    assert_close(out, plain, 1e-11)
    assert_close(state, sums / eta[:, -1, :, None, None], 1e-11)
    # Where eta falls by more than float32 holds, the plain sum divided at the end is still right.
    steep = np.where(np.arange(T) < 5, 60.0, -60.0)[:, None] * np.ones((B, T, N))
    narrow = [x.astype(np.float32) for x in (query, key, value, steep)]
    late = np.asarray(scan(row(*narrow, normalize_in="readout")))
    want, _ = scan(row(query, key, value, steep), return_state=True)
    assert_close(late[:, 5:], np.asarray(want)[:, 5:], 1e-5)


def test_normalised_attention_telescopes_in_bfloat16():
    query, key, value = heads()
    log_eta = jnp.asarray(2 * normal(B, T, N), jnp.bfloat16)
    got, want = (outputs(normalized_attention_dsf, query, key, value, x) for x in (log_eta, log_eta.astype(float)))
    assert_close(got, want, 1e-6)


def test_an_lru_of_bfloat16_is_that_of_its_numbers():
    Bu, *rates = lru_parts()
    rates = [jnp.asarray(x, jnp.bfloat16) for x in rates]
    assert_close(*(outputs(lru_dsf, Bu, *(x.astype(dtype) for x in rates)) for dtype in (jnp.bfloat16, float)), 1e-5)


def test_linear_attention_is_s6_with_eta_in_the_place_of_delta():
    """A scalar time step and a scalar A; keys and queries as B and C, one head of all channels."""
    query, key, value = (x[:, :, :1] for x in heads())
    attention = jax.jit(linear_attention_dsf)(query, key, value)
    q, k = elu(query), elu(key)
    as_s6 = jax.jit(lambda delta, A: s6_dsf(value[:, :, 0], delta, A, k[:, :, 0], q[:, :, 0]))
    eta = np.einsum("btnd,btnd->btn", q, np.cumsum(k, axis=1))
    with_eta = as_s6(np.ones((B, T, p)), np.asarray(-1.0))._replace(**eta_gating(np.log(eta))._asdict())
    assert_close(scan(with_eta), scan(attention))
    # And the other way: with S6's own gating attention is S6.
    delta = softplus(normal(B, T))[..., None]
    tied = delta_gating(delta[..., None], -0.7 * np.ones((1, 1, 1)))
    s6 = as_s6(np.repeat(delta, p, axis=2), np.asarray(-0.7))
    assert_close(scan(attention._replace(**tied._asdict())), scan(s6))


def test_softmax_needs_an_infinite_state():
    """The error of attention falls with the order of the polynomial, the state grows as n^order."""
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((1, 32, 1, 4)) for _ in range(2))
    query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    value = np.eye(32)[None, :, None]
    exact = jax.jit(functools.partial(dot_product_attention, is_causal=True, scale=1.0))(query, key, value)
    errors = []
    for order in range(1, 6):
        row = functools.partial(softmax_dsf, order=order, scale=1.0)
        assert jax.eval_shape(row, query, key, value).key.shape[3] == sum(4**i for i in range(order + 1))
        errors.append(np.abs(np.asarray(outputs(row, query, key, value)) - exact).max())
    np.testing.assert_allclose(errors, [5.3e-2, 2.5e-2, 3.2e-3, 8.3e-4, 1.05e-4], rtol=0.05)


def test_taylor_features_multiply_to_the_polynomial():
    x, y = normal(11, n), normal(11, n, seed=1)
    score = (x * y).sum(-1)
    for order in range(4):
        want = sum(score**i / math.factorial(i) for i in range(order + 1))
        features = jax.jit(functools.partial(taylor_features, order=order))
        assert_close((np.asarray(features(x)) * features(y)).sum(-1), want)


def test_eigenvalues_of_softmax_itself():
    query, key, _ = heads()
    scores = np.exp(np.einsum("bind,bjnd->bnij", query, key) * n**-0.5) * np.tril(np.ones((T, T)))
    eta = scores.sum(-1).swapaxes(1, 2)
    log_eta = np.asarray(softmax_log_eta(query, key))
    assert_close(np.exp(log_eta), eta)
    step, rate, _ = eta_gating(log_eta)
    assert_close(np.exp(step * rate)[:, 1:, :, 0, 0], eta[:, :-1] / eta[:, 1:])


def test_normalisers():
    x = np.linspace(-4, 4, 17)
    log_of = jax.jit(log_normalizer, static_argnums=1)
    functions = {"exp": np.exp, "elu": lambda x: np.where(x < 0, np.expm1(x), x),
                 "softplus": lambda x: np.log1p(np.exp(x)), "sigmoid": sigmoid}  # fmt: skip
    for name in ("exp", "softplus", "sigmoid"):
        assert_close(np.exp(log_of(x, name)), functions[name](x))
    for name, function in functions.items():
        assert_close(log_of(x, f"exp_of:{name}"), function(x))
    far = np.asarray([-1000.0, -60.0], np.float32)
    for name in ("softplus", "sigmoid"):
        np.testing.assert_allclose(log_of(far, name), far)
        assert np.isfinite(jax.jit(jax.grad(lambda x, name=name: jnp.sum(log_normalizer(x, name))))(far)).all()


# Bad input

GIVEN = {
    eta_gating: {"log_eta": normal(B, T, N)},
    normalized_attention_dsf: dict(zip(("query", "key", "value", "log_eta"), (*heads(), normal(B, T, N)), strict=True)),
    linear_attention_dsf: dict(zip(("query", "key", "value"), heads(), strict=True)),
    functools.partial(softmax_dsf, order=1): dict(zip(("query", "key", "value"), heads(), strict=True)),
    delta_gating: {"delta": normal(B, T, N, p), "A": normal(N, n, p)},
    functools.partial(s6_dsf, D=None): {name: x for name, x in s6_parts().items() if name != "D"},
    mamba2_dsf: {
        "x": normal(B, T, N, p), "delta": normal(B, T, N), "A": normal(N), "B": heads()[0], "C": heads()[1]
    },
    lru_dsf: dict(zip(("Bu", "nu_log", "theta_log", "gamma_log"), lru_parts(), strict=True)),
    qlstm_dsf: dict(zip(("x", "forget", "write", "read"), gates(4), strict=True)),
    rglru_dsf: dict(zip(("x", "recurrence", "write"), gates(3), strict=True)) | {"decay": normal(p)},
}  # fmt: skip


@pytest.mark.parametrize(("call", "name"), [(call, name) for call, given in GIVEN.items() for name in given])
def test_a_missing_argument_is_named(call, name):
    with pytest.raises(TypeError, match=f"^{name}: expected an array, got NoneType"):
        call(**GIVEN[call] | {name: None})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: log_normalizer(normal(3), "elu"), ValueError, "normalizer: expected one of 'exp', 'softplus'"),
        (lambda: softmax_dsf(*heads(), order=-1), ValueError, "order: expected at least 0, got -1"),
        (
            lambda: normalized_attention_dsf(*heads(), normal(B, T, N), normalize_in="value"),
            ValueError,
            "normalize_in: expected one of 'state', 'readout', got 'value'",
        ),
        (lambda: normalized_attention_dsf(*heads(), normal(B, T)), ValueError, "log_eta: expected 3 dimensions"),
        (lambda: s6_dsf(**{**s6_parts(), "A": -1.0}), TypeError, "A: expected an array, got float"),
        (lambda: s6_dsf(**{**s6_parts(), "A": normal(n, p)}), ValueError, r"A: expected \[p, n\] with p = 7 as in u"),
        (lambda: lru_dsf(lru_parts()[0], *[normal(p)] * 2, normal(4)), ValueError, "gamma_log: .* p = 7 as in nu_log"),
        (lambda: qlstm_dsf(*gates(4), normal(1)), ValueError, "alpha: expected 0 dimensions"),
        (lambda: qlstm_dsf(*gates(4), 1.0), TypeError, "alpha: expected an array, got float"),
        (lambda: rglru_dsf(*gates(3), normal(p), np.ones((B, 4), bool)), ValueError, "starts: .* with T = 13"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
