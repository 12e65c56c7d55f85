"""Dynamical systems: every mode is Phi v, for systems of any row."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.linear.dsf import DSFSystem, dsf_materialize, dsf_scan
from tests.linear.dsf_rows import (
    IDS,
    B,
    N,
    T,
    assert_close,
    eigenvalues,
    every_system,
    float64,  # noqa: F401 - every test here uses it
    made,
    n,
    normal,
    p,
    scan,
)


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


def test_a_convolution_counts_further_than_its_step_can():
    """No 257 is a bfloat16."""
    one, value = jnp.ones((1, 1, 1, 1, 1), jnp.bfloat16), normal(1, 521, 1, 2).astype(np.float32)
    system = DSFSystem(-one / 128, one[0, 0], one, one, value, one)
    assert_close(scan(system, mode="convolution"), scan(system), 1e-5)


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
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
