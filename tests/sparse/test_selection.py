"""Selections against loops that do what the papers say, and attention over what they select."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.masks import Causal
from jattn.sparse.block_mask import BlockMask
from jattn.sparse.block_sparse import block_sparse_attention
from jattn.sparse.selection import (
    block_topk_selection,
    moba_selection,
    nsa_selection,
    pool_blocks,
    select_topcdf,
    select_topk,
    sparge_selection,
    vertical_slash_selection,
)

B, T, N, K, H, V = 2, 43, 6, 3, 5, 7
G = N // K


def inputs(q_len: int = T, kv_len: int = T) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(q_len)
    return rng.standard_normal((B, q_len, N, H)), rng.standard_normal((B, kv_len, K, H))


def means(x: np.ndarray, block: int) -> np.ndarray:
    return np.stack([x[:, i : i + block].mean(axis=1) for i in range(0, x.shape[1], block)], axis=1)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def dense(listed: np.ndarray, block_q: int, block_kv: int, seen: Any = True, length: int = T) -> np.ndarray:
    return listed.repeat(block_q, 2).repeat(block_kv, 3)[..., :length, :length] & seen


CAUSAL = np.tri(T, dtype=bool)


def test_pooling_is_over_the_tokens_that_there_are():
    x = inputs()[0]
    with jax.enable_x64(True):
        np.testing.assert_allclose(pool_blocks(x, 8), means(x, 8), rtol=0, atol=1e-14)
    assert pool_blocks(jnp.ones((1, 5, 1, 2), jnp.bfloat16), 2).dtype == np.float32


@pytest.mark.parametrize("jit", [False, True])
def test_topk(jit: bool):
    scores = np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(np.float32)
    scores[0, 0, :3] = -np.inf
    scores[0, 0, 1, [2, 4]] = 0.5, 1.5
    run = jax.jit(lambda s: select_topk(s, 4)) if jit else lambda s: select_topk(s, 4)
    idx, num = run(scores)
    assert num[0, 0].tolist() == [0, 2, 0, 4, 4]
    assert idx[0, 0, 1, :2].tolist() == [4, 2]
    for at in np.ndindex(2, 3, 5):
        n = int(num[at])
        assert n == min(4, np.isfinite(scores[at]).sum())
        assert idx[at][:n].tolist() == np.argsort(-scores[at])[:n].tolist()


def test_topcdf():
    scores = np.random.default_rng(0).standard_normal((4, 6, 9)) * 2
    scores[0, 0] = -np.inf
    scores[0, 1, 3:] = -np.inf
    with jax.enable_x64(True):
        for tau in (0.0, 0.5, 0.9, 1.0):
            chosen = np.asarray(select_topcdf(scores, tau))
            assert not chosen[0, 0].any()
            for at in np.ndindex(4, 6):
                if at == (0, 0):
                    continue
                p = softmax(scores[at])
                order = np.argsort(-p)
                count = max(1, int(np.searchsorted(np.minimum(np.cumsum(p[order]), 1), tau, side="right")))
                wanted = np.isin(np.arange(9), order[:count]) & np.isfinite(scores[at])
                np.testing.assert_array_equal(chosen[at], wanted)


@pytest.mark.parametrize(("mask", "first_block"), [(None, False), (Causal(), True)])
def test_sparge(mask: Any, first_block: bool):
    query, key = inputs()
    key[:, :16] += 3  # blocks of keys that are like themselves, and of queries
    query[:, 8:32] -= 2
    block_q, block_kv, tau, similarity = 8, 4, 0.7, 0.3
    nq, nk = math.ceil(T / block_q), math.ceil(T / block_kv)

    def alike(x: np.ndarray) -> bool:
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return (x @ x.T).mean() > similarity

    listed = np.zeros((B, N, nq, nk), bool)
    kinds = {"self": 0, "not": 0}
    for b, n in np.ndindex(B, N):
        keys_alike = np.array([alike(key[b, j * block_kv : (j + 1) * block_kv, n // G]) for j in range(nk)])
        for i in range(nq):
            scores = means(key, block_kv)[b, :, n // G] @ means(query, block_q)[b, i, n] / math.sqrt(H)
            possible = np.arange(nk) < (nk if mask is None else (i + 1) * block_q / block_kv)
            scores[~keys_alike | ~possible] = -np.inf
            row = ~keys_alike
            if np.isfinite(scores).any():
                p = softmax(scores)
                order = np.argsort(-p, kind="stable")
                row[order[: max(1, int(np.searchsorted(np.cumsum(p[order]), tau, side="right")))]] = True
            own = alike(query[b, i * block_q : (i + 1) * block_q, n])
            kinds["self" if own else "not"] += 1
            row = row | (not own)
            row[0] |= first_block
            listed[b, n, i] = row & possible
    assert min(kinds.values()) > 0
    with jax.enable_x64(True):
        block_mask = jax.jit(
            lambda q, k: sparge_selection(
                q, k, tau=tau, similarity=similarity, mask=mask, first_block=first_block, block_q=8, block_kv=4
            )
        )(query, key)
    assert 0 < listed.mean() < 1
    np.testing.assert_array_equal(block_mask.to_map() > 0, listed)
    np.testing.assert_array_equal(block_mask.to_dense(), dense(listed, 8, 4, True if mask is None else CAUSAL))


def test_block_topk():
    query, key = inputs()
    with jax.enable_x64(True):
        block_mask = block_topk_selection(query, key, k=3, mask=Causal(), block_q=8, block_kv=8)
    for b, n, i in np.ndindex(B, N, 6):
        scores = means(key, 8)[b, : i + 1, n // G] @ means(query, 8)[b, i, n]
        assert set(np.flatnonzero(block_mask.to_map()[b, n, i])) == set(np.argsort(-scores)[:3])
    everything = block_topk_selection(query, key, k=6, mask=Causal(), block_q=8, block_kv=8)
    np.testing.assert_array_equal(everything.to_dense(), np.broadcast_to(CAUSAL, (B, N, T, T)))


def test_vertical_slash():
    query, key = inputs()
    columns, diagonals, last, block_q, block_kv = 2, 3, 10, 8, 4
    with jax.enable_x64(True):
        block_mask = vertical_slash_selection(
            query, key, columns=columns, diagonals=diagonals, last=last, block_q=block_q, block_kv=block_kv
        )
    for b, n in np.ndindex(B, N):
        by_key, by_distance = np.zeros(T), np.zeros(T)
        for t in range(T - last, T):
            p = softmax(key[b, : t + 1, n // G] @ query[b, t, n] / math.sqrt(H))
            by_key[: t + 1] += p
            by_distance[t - np.arange(t + 1)] += p
        strong, far = np.argsort(-by_key)[:columns], np.argsort(-by_distance)[:diagonals]
        t, s = np.arange(T)[:, None], np.arange(T)
        hit = (np.isin(s, strong) | np.isin(t - s, far)) & np.ones((T, 1), bool)
        listed = np.zeros((6, 11), bool)
        for i, j in np.ndindex(6, 11):
            area = slice(i * block_q, (i + 1) * block_q), slice(j * block_kv, (j + 1) * block_kv)
            # A diagonal counts where the block would meet it, even beyond the end of the sequence.
            distances = np.arange(i * block_q - (j + 1) * block_kv + 1, (i + 1) * block_q - j * block_kv)
            listed[i, j] = (hit[area].any() or np.isin(distances, far).any()) and CAUSAL[area].any()
        np.testing.assert_array_equal(block_mask.to_map()[b, n] > 0, listed)


def test_nsa():
    query, key = inputs()
    block, k = 4, 5
    with jax.enable_x64(True):
        block_mask = jax.jit(lambda q, x: nsa_selection(q, x, k=k, block=block))(query, key)
    assert block_mask.kv_idx.shape == (B, K, T, k)
    pooled = means(key, block)
    seen = np.zeros((B, K, T, T), bool)
    for b, g, t in np.ndindex(B, K, T):
        own, ended = t // block, (t + 1) // block
        importance = np.zeros(own + 1)
        for n in range(g * G, (g + 1) * G):
            if ended:
                importance[:ended] += softmax(pooled[b, :ended, g] @ query[b, t, n] / math.sqrt(H))
        importance[[0, max(own - 1, 0), own]] = G
        best = np.argsort(-importance, kind="stable")[:k]
        seen[b, g, t] = np.isin(np.arange(T) // block, best) & CAUSAL[t]
    np.testing.assert_array_equal(block_mask.to_dense(), seen)


def test_moba():
    query, key = inputs()
    block, k = 4, 2
    with jax.enable_x64(True):
        block_mask = moba_selection(query, key, k=k, block=block)
    pooled = means(key, block)
    seen = np.zeros((B, N, T, T), bool)
    for b, n, t in np.ndindex(B, N, T):
        own = t // block
        best = np.argsort(-(pooled[b, :own, n // G] @ query[b, t, n]))[:k]
        seen[b, n, t] = np.isin(np.arange(T) // block, [*best, own]) & CAUSAL[t]
    np.testing.assert_array_equal(block_mask.to_dense(), seen)
    local = moba_selection(query, key, k=0, block=block)
    same = np.arange(T)[:, None] // block == np.arange(T) // block
    np.testing.assert_array_equal(local.to_dense(), np.broadcast_to(CAUSAL & same, (B, N, T, T)))


SELECTIONS = {
    "sparge": lambda q, k: sparge_selection(q, k, tau=0.5, mask=Causal(), block_q=8, block_kv=8),
    "block_topk": lambda q, k: block_topk_selection(q, k, k=2, mask=Causal(), block_q=8, block_kv=8),
    "vertical_slash": lambda q, k: vertical_slash_selection(q, k, columns=2, diagonals=2, block_q=8, block_kv=8),
    "nsa": lambda q, k: nsa_selection(q, k, k=3, block=8),
    "moba": lambda q, k: moba_selection(q, k, k=1, block=8),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_attention_selects_and_attends_in_one_program(name: str):
    query, key = (np.float32(x) for x in inputs())
    value = np.random.default_rng(5).standard_normal((B, T, K, V)).astype(np.float32)
    chosen: list[BlockMask] = []

    def loss(x: Any, implementation: str) -> Any:
        chosen.append(SELECTIONS[name](*x[:2]))
        return jnp.sum(jnp.sin(block_sparse_attention(*x, chosen[-1], implementation=implementation)))

    got, wanted = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)((query, key, value), i) for i in ("xla", "reference")
    )
    assert not chosen[0].is_static
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


Q, X = (np.float32(x) for x in inputs())
BAD = {
    "k too large": (lambda: select_topk(np.ones((2, 3), np.float32), 4), ValueError, "k: expected at most the 3"),
    "no k": (lambda: select_topk(np.ones((2, 3), np.float32), 0), ValueError, "k: expected at least 1"),
    "integer scores": (lambda: select_topk(np.ones((2, 3), int), 1), TypeError, "scores: expected a floating dtype"),
    "tau above 1": (lambda: select_topcdf(np.ones((2, 3), np.float32), 1.5), ValueError, "tau: expected .* got 1.5"),
    "a block of nothing": (lambda: pool_blocks(Q, 0), ValueError, "block: expected at least 1"),
    "heads that do not divide": (lambda: moba_selection(Q[:, :, :5], X, k=1, block=4), ValueError, "query: 5 heads"),
    "fewer keys": (lambda: nsa_selection(Q, X[:, 1:], block=4), ValueError, "key: expected .* T = 43"),
    "columns beyond": (
        lambda: vertical_slash_selection(Q, X, columns=44, diagonals=1), ValueError, "columns: expected at most",
    ),
    "another dtype": (lambda: sparge_selection(Q, X.astype(np.float16)), TypeError, "key: expected dtype float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
