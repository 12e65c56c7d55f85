"""Dynamical systems with random parts, one of every row and two that no row is, for the tests of them."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jattn.linear.dsf import DSFSystem, dsf_eigenvalues, dsf_scan
from jattn.linear.dsf_systems import (
    linear_attention_dsf,
    lru_dsf,
    mamba2_dsf,
    normalized_attention_dsf,
    qlstm_dsf,
    rglru_dsf,
    s6_dsf,
    softmax_dsf,
)

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
    "rglru": lambda: rglru_dsf(*gates(3), normal(p), np.diff(IDS, axis=1, prepend=IDS[:, :1]) > 0),
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
