"""Dynamical systems: every mode is Phi v, every row is its published formula, and what rows have in common is exact."""

from __future__ import annotations

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.dot_product import dot_product_attention
from jattn.linear.dsf import DSFSystem, dsf_eigenvalues, dsf_materialize, dsf_scan
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
from jattn.linear.selective_scan import selective_scan, selective_scan_step

B, T, N, n, p = 2, 13, 3, 5, 7
IDS = np.repeat([[1, 1, 2], [4, 6, 9]], [5, 1, 7], axis=1).astype(np.int32)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def heads(seed=0):
    return normal(B, T, N, n, seed=seed), normal(B, T, N, n, seed=seed + 1), normal(B, T, N, p, seed=seed + 2)


def s6_parts(seed=0):
    delta = softplus(normal(B, T, p, seed=seed))
    A = -np.exp(0.5 * normal(p, n, seed=seed + 1))
    return {
        "u": normal(B, T, p, seed=seed + 2), "delta": delta, "A": A, "B": normal(B, T, n, seed=seed + 3),
        "C": normal(B, T, n, seed=seed + 4), "D": normal(p, seed=seed + 5),
    }  # fmt: skip


def gates(count):
    return tuple(normal(B, T, p, seed=seed) for seed in range(count))


def lru_parts():
    magnitude = np.random.default_rng(0).uniform(0.3, 0.95, p)
    nu, gamma = np.log(-np.log(magnitude)), 0.5 * np.log(1 - magnitude**2)
    return normal(B, T, p) + 1j * normal(B, T, p, seed=1), nu, normal(p, seed=2), gamma


SYSTEMS = {
    "softmax": lambda: softmax_dsf(*heads(), order=2),
    "linear": lambda: linear_attention_dsf(*heads()),
    "normalized": lambda: normalized_attention_dsf(*heads(), 0.3 * normal(B, T, N)),
    "normalized_readout": lambda: normalized_attention_dsf(*heads(), normal(B, T, N), normalize_in="readout"),
    "s6": lambda: s6_dsf(**s6_parts()),
    "ssd": lambda: s6_dsf(**{**s6_parts(), "A": np.asarray(-0.7)}),
    "mamba2": lambda: mamba2_dsf(
        normal(B, T, N, p), softplus(normal(B, T, N)), -np.exp(normal(N)), *heads()[:2], normal(N, seed=1)
    ),
    "lru": lambda: lru_dsf(*lru_parts()),
    "qlstm": lambda: qlstm_dsf(*gates(4)),
    "qlstm_reversed": lambda: qlstm_dsf(*gates(4), np.asarray(1.7)),
    "rglru": lambda: rglru_dsf(*gates(3), normal(p), np.roll(IDS, 1, axis=1) != IDS),
    # A gate for every key channel, and both a beta and a read-out that vary in n and p: no published row has them.
    "by_key": lambda: SYSTEMS["linear"]()._replace(step=-np.exp(normal(B, T, N, n, 1)), beta=normal(B, T, N, n, 1)),
    "everything": lambda: DSFSystem(
        -np.exp(normal(B, T, N, n, p)), np.exp(normal(N, n, p)), *(normal(B, T, N, n, p, seed=i) for i in (1, 2)),
        normal(B, T, N, p), normal(B, T, N, n, p, seed=3), normal(N, p),
    ),
}  # fmt: skip
every_system = pytest.mark.parametrize("name", SYSTEMS)


# Compiled: operation by operation, most of the time would go into compiling.
STATIC = ("return_state", "mode", "chunk_size")
scan, eigenvalues = jax.jit(dsf_scan, static_argnames=STATIC), jax.jit(dsf_eigenvalues)


@functools.cache
def made(name):
    return jax.tree.map(np.asarray, jax.jit(SYSTEMS[name])())


def outputs(row, *parts, **options):
    """What the system of a row gives."""
    return jax.jit(lambda *parts: dsf_scan(row(*parts, **options)))(*parts)


def assert_close(got, want, tolerance=1e-12):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def by_hand(system, state=0.0):
    """The recurrence in NumPy: outputs and the last state."""
    wide = {name: None if x is None else np.asarray(x) for name, x in system._asdict().items()}
    batch, length, _, _ = wide["value"].shape
    starts = np.zeros((batch, length), bool)
    if wide["segment_ids"] is not None:
        starts[:, 1:] = wide["segment_ids"][:, 1:] != wide["segment_ids"][:, :-1]
    lam = np.exp(wide["step"] * wide["rate"])
    at = {name: np.broadcast_to(x, (x.shape[0], length, *x.shape[2:])) for name, x in wide.items() if np.ndim(x) == 5}
    lam = np.where(starts[..., None, None, None], 0, np.broadcast_to(lam, (batch, length, *lam.shape[2:])))
    outputs = []
    for t in range(length):
        state = lam[:, t] * state + at["beta"][:, t] * at["key"][:, t] * wide["value"][:, t, :, None]
        out = (at["query"][:, t] * state).sum(-2)
        outputs.append(out if wide["skip"] is None else out + wide["skip"] * wide["value"][:, t])
    return np.stack(outputs, 1), state


def piece(system, start, stop):
    """The system of some of the tokens."""
    length = system.value.shape[1]

    def cut(name, x):
        return x[:, start:stop] if name not in ("rate", "skip") and x is not None and x.shape[1] == length else x

    return DSFSystem(**{name: cut(name, x) for name, x in system._asdict().items()})


# What holds for any system

MODES = {"scan": {}, "associative": {}, "chunk": {"chunk_size": 4}}


def by_mode(system, mode):
    return dsf_scan(system, mode=mode, return_state=True, **MODES[mode])


def by_phi(system):
    phi = dsf_materialize(system)
    wide = phi[..., None] if phi.ndim == 4 else phi
    return jnp.sum(wide * jnp.swapaxes(system.value, 1, 2)[:, :, None], axis=3).swapaxes(1, 2), phi


@functools.cache
def differentiated(name, run, *options):
    """What `run` returns of a system, outputs first, and the gradients of their weighted sum: one program for both."""
    system = made(name)

    def loss(parts):
        out, other = run(system._replace(**parts), *options)
        weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return jnp.sum(weights * out.real + weights[::-1] * out.imag), (out, other)

    parts = {part: x for part, x in system._asdict().items() if x is not None and part != "segment_ids"}
    (_, returned), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parts)
    return returned, gradients


@every_system
def test_every_mode_is_the_recurrence_and_phi_times_v(name):
    system = made(name)
    want, last = by_hand(system)
    for out, state in (
        *(differentiated(name, by_mode, mode)[0] for mode in MODES),
        scan(system, mode="chunk", return_state=True),
    ):
        assert_close(out, want, 1e-11)
        assert_close(state, last, 1e-11)
    out, phi = differentiated(name, by_phi)[0]
    assert not np.any(np.triu(np.ones((T, T)), 1)[..., *[None] * (phi.ndim - 4)] * phi)
    assert_close(out, want, 1e-11)
    assert phi.ndim == (
        4 if name in ("softmax", "linear", "normalized", "normalized_readout", "mamba2", "by_key") else 5
    )


@every_system
def test_any_split_is_the_whole(name):
    """From the state of a first part, which scans return as the test above has it, the second goes on."""
    system = made(name)._replace(segment_ids=None)
    want, last = by_hand(system)
    _, state = by_hand(piece(system, 0, 6))
    second, end = scan(piece(system, 6, T), initial_state=state, return_state=True, chunk_size=4)
    assert_close(second, want[:, 6:], 1e-11)
    assert_close(end, last, 1e-11)


@every_system
def test_segments_are_separate_runs_and_the_first_has_the_state(name):
    system = made(name)._replace(segment_ids=IDS)
    state = by_hand(system)[1]
    got, last = scan(system, initial_state=state, chunk_size=4, return_state=True)
    for row, cuts in enumerate(([0, 6, T], [0, 5, 6, T])):
        for start, stop in itertools.pairwise(cuts):
            want, end = by_hand(piece(system._replace(segment_ids=None), start, stop), state * (start == 0))
            assert_close(got[row, start:stop], want[row], 1e-11)
        assert_close(last[row], end[row], 1e-11)
    lam = np.asarray(eigenvalues(system))
    assert (lam[0, 6] == 0).all()
    assert (lam[:, 0] != 0).all()


@every_system
def test_gradients_are_those_of_phi_times_v(name):
    _, want = differentiated(name, by_phi)
    for mode in MODES:
        _, got = differentiated(name, by_mode, mode)
        for part, b in want.items():
            assert np.any(b) or part == "rate", part  # a plain sum has a step of 0, and then no use for a rate
            assert_close(got[part], b, 1e-10)


def test_a_convolution_is_the_scan_of_what_no_token_changes():
    one, many = normal(1, 1, N, n, 1), normal(1, 1, N, n, p, seed=1)
    real = DSFSystem(one[:, :, :, :1] ** 2, -np.exp(normal(N, n, p)), many, one, normal(B, T, N, p), one, normal(N, p))
    for system in (made("lru"), real):
        assert_close(scan(system, mode="convolution"), by_hand(system)[0])


@every_system
def test_one_token_needs_no_eigenvalue(name):
    system = piece(made(name), 0, 1)
    assert_close(scan(system._replace(step=system.step - 3)), scan(system))


@pytest.mark.parametrize("name", ["normalized", "s6", "lru", "rglru"])
def test_a_padded_token_with_a_step_and_a_beta_of_0_changes_no_state(name):
    system = made(name)._replace(segment_ids=None)
    real = (np.arange(T) < 9)[:, None, None, None]
    padded = system._replace(step=np.where(real, system.step, 0), beta=np.where(real, system.beta, 0))
    assert_close(scan(padded, return_state=True)[1], by_hand(piece(system, 0, 9))[1])


@pytest.mark.parametrize("name", ["linear", "s6", "lru", "qlstm"])
def test_states_are_float32_under_bfloat16(name):
    def cast(x, dtype):
        return np.asarray(x, jnp.complex64 if np.iscomplexobj(x) else dtype)

    wide = jax.tree.map(lambda x: cast(x, np.float32), made(name))
    narrow = wide._replace(**{part: cast(getattr(wide, part), jnp.bfloat16) for part in ("key", "value", "query")})
    out, state = scan(narrow, return_state=True)
    assert out.dtype == (jnp.complex64 if name == "lru" else jnp.bfloat16)
    assert state.dtype == (jnp.complex64 if name == "lru" else jnp.float32)
    assert_close(np.asarray(out, state.dtype), by_hand(wide)[0], 2e-2)


@pytest.mark.parametrize("mode", ["scan", "associative", "chunk"])
def test_strong_decays_are_finite_and_right(mode):
    system = made("s6")
    strong = system._replace(step=np.where(np.arange(p) < 3, 2000.0, system.step))
    run = jax.jit(jax.value_and_grad(lambda system: jnp.sum(dsf_scan(system, mode=mode))))
    value, gradient = run(strong)
    assert np.isclose(value, by_hand(strong)[0].sum())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_parts_of_any_row_go_with_those_of_any_other():
    """The gating of one row, keys and queries of another: one head for all, or as many as there are."""
    gatings = {name: made(name)[:3] for name in ("linear", "normalized", "ssd", "lru", "qlstm_reversed", "rglru")}
    for step, rate, beta in gatings.values():
        for name in ("linear", "s6", "mamba2", "qlstm"):
            other = made(name)
            wide = other.value if step.shape[2] == 1 else np.broadcast_to(other.value, (B, T, N, p))
            mixed = other._replace(step=step, rate=rate, beta=beta, value=wide)
            assert_close(scan(mixed), by_hand(mixed)[0], 1e-11)


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
    assert_close(scan(made("s6"))[:, :, 0], np.stack(want, 1))
    out, last = selective(**parts, return_state=True)
    assert_close(out, np.stack(want, 1))
    assert_close(last, state)


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
    parts = [
        outputs(rglru_dsf, *(g[:, cut] for g in gates(3)), decay, starts[:, cut]) for cut in (slice(0, 6), slice(6, T))
    ]
    assert_close(whole[1], np.concatenate(parts, axis=1)[1])
    # A gate that never opens keeps everything, and its root has a gradient.
    slope = jax.jit(jax.grad(lambda decay: jnp.sum(dsf_scan(rglru_dsf(*gates(3), decay)))))
    assert np.isfinite(slope(np.full(p, -800.0))).all()


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


# The selective scan

selective = jax.jit(selective_scan, static_argnames=("delta_softplus", "return_state"))
selective_step = jax.jit(selective_scan_step, static_argnames="delta_softplus")


def test_selective_scan_has_mambas_arguments():
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


def test_selective_scan_never_holds_all_states():
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


def broken(**parts):
    return made("s6")._replace(**parts)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dsf_scan((1, 2)), TypeError, "system: expected a DSFSystem, got tuple"),
        (lambda: dsf_scan(broken(step=1.0)), TypeError, "system.step: expected an array, got float"),
        (lambda: dsf_scan(broken(step=np.ones((B, T, 1, 1, 1), int))), TypeError, "system.step: expected a floating"),
        (
            lambda: dsf_scan(broken(beta=np.ones((B, T, 1, 1, 1), complex))),
            TypeError,
            "system.beta: .* floating dtype",
        ),
        (lambda: dsf_scan(broken(step=normal(B, T, 1))), ValueError, r"system.step: expected \[B, T, N, n, p\]"),
        (lambda: dsf_scan(broken(key=normal(B, T, 1, 4, 1))), ValueError, r"system.key: .*2, 13, 1, 5, 7.*got"),
        (
            lambda: dsf_scan(broken(rate=normal(1, n, 6))),
            ValueError,
            r"system.rate: expected \[N, n, p\] = \(1, 5, 7\)",
        ),
        (lambda: dsf_scan(broken(skip=normal(2, p))), ValueError, r"system.skip: expected \[N, p\] = \(1, 7\)"),
        (lambda: dsf_scan(broken(value=normal(B, T, p))), ValueError, "system.value: expected 4 dimensions"),
        (lambda: dsf_scan(broken(segment_ids=IDS[:, ::-1])), ValueError, "segment_ids: .* never decrease"),
        (lambda: dsf_scan(broken(), mode="parallel"), ValueError, "mode: expected one of 'scan', 'associative'"),
        (lambda: dsf_scan(broken(), chunk_size=12), ValueError, "chunk_size: expected a power of two, got 12"),
        (lambda: dsf_scan(broken(), return_state=1), TypeError, "return_state: expected a static True or False"),
        (lambda: dsf_scan(broken(), initial_state=normal(B, 1, n, 2)), ValueError, "initial_state: .* with p = 7"),
        (
            lambda: dsf_scan(broken(), initial_state=normal(B, 1, n, p).astype(np.float32)),
            TypeError,
            "initial_state: expected dtype float64, in which states are kept, got float32",
        ),
        (lambda: dsf_scan(broken(), mode="convolution"), ValueError, "system.step: mode 'convolution' needs a part"),
        (
            lambda: dsf_scan(made("lru"), mode="convolution", return_state=True),
            ValueError,
            "initial_state, return_state: mode 'convolution' has no state",
        ),
        (
            lambda: dsf_scan(made("lru")._replace(segment_ids=IDS), mode="convolution"),
            ValueError,
            "system.segment_ids: mode 'convolution' sees across segments",
        ),
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
        (lambda: selective_scan(**{**s6_parts(), "D": normal(4)}), ValueError, r"D: expected \[D\] with D = 7"),
        (lambda: selective_scan(**s6_parts(), delta_softplus=1), TypeError, "delta_softplus: expected a static True"),
        (lambda: selective_scan(**{**s6_parts(), "B": IDS}), ValueError, "B: expected 3 dimensions"),
        (lambda: lru_dsf(lru_parts()[0], *[normal(p)] * 2, normal(4)), ValueError, "gamma_log: .* p = 7 as in nu_log"),
        (lambda: qlstm_dsf(*gates(4), normal(1)), ValueError, "alpha: expected 0 dimensions"),
        (lambda: rglru_dsf(*gates(3), normal(p), np.ones((B, 4), bool)), ValueError, "starts: .* with T = 13"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
