"""PSA's choice of levels: importances against their sums written out, rules against loops over ranks, and limits."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.sparse.psa_importance import psa_importance_antidiagonal, psa_importance_sampling, psa_similarity
from jattn.sparse.psa_levels import BOUND_RATIOS, TOPK_RATIOS, psa_density, psa_levels, psa_similarity_cap

B, N, K, H = 2, 6, 3, 5
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def operands(q_len: int, kv_len: int, dtype: Any = np.float64) -> list[np.ndarray]:
    rng = np.random.default_rng(q_len)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((B, q_len, N, H), (B, kv_len, K, H))]


def scores_of(nq: int, nk: int) -> np.ndarray:
    """Of two heads, as unequal as attention is."""
    return np.exp(2.0 * np.random.default_rng(nq).standard_normal((2, nq, nk)))


# Importance


@pytest.mark.parametrize(("q_len", "kv_len", "block_q", "block_kv"), [(37, 43, 8, 16), (5, 7, 11, 8), (23, 16, 5, 4)])
def test_sampled_importance_is_its_definition(q_len, kv_len, block_q, block_kv):
    query, key = operands(q_len, kv_len)
    rng = np.random.default_rng(0)
    at = [rng.permuted(np.tile(np.arange(b), (B, n, 1)), axis=-1)[..., :3] for n, b in ((N, block_q), (K, block_kv))]
    nq, nk = math.ceil(q_len / block_q), math.ceil(kv_len / block_kv)
    want = np.zeros((B, N, nq, nk))
    for b, n, i in np.ndindex(B, N, nq):
        best = np.zeros((3, nk))
        for m, j in np.ndindex(3, nk):
            t = min(i * block_q + at[0][b, n, m], q_len - 1)
            s = np.minimum(j * block_kv + at[1][b, n // 2], kv_len - 1)
            best[m, j] = np.max(0.7 * key[b, s, n // 2] @ query[b, t, n])
        weights = np.exp(best - best.max(axis=1, keepdims=True)).max(axis=0)
        want[b, n, i] = weights / weights.sum()
    with jax.enable_x64(True):
        got = psa_importance_sampling(query, key, sampled=at, block_q=block_q, block_kv=block_kv, scale=0.7)
        np.testing.assert_allclose(got, want, atol=1e-13)


def test_positions_are_drawn_without_replacement_and_alike_for_all_blocks():
    heads = 3000
    query = np.ones((1, 4, heads, 1), np.float32)
    place = np.concatenate([np.arange(8), np.zeros(8), np.arange(8), np.zeros(8)])  # logits of the keys of four blocks
    key = np.broadcast_to(place[:, None, None], (1, 32, heads, 1)).astype(np.float32)
    run = functools.partial(psa_importance_sampling, query, key, block_q=4, block_kv=8)
    scores = np.asarray(run(rng=jax.random.key(0)))[0, :, 0]
    np.testing.assert_array_equal(scores[:, 2:], scores[:, :2])
    largest = np.rint(np.log(scores[:, 0] / scores[:, 1])).astype(int)  # of the two places that were drawn
    counts = np.bincount(largest, minlength=8)
    assert counts[0] == 0
    expected = heads * np.arange(1, 8) / 28
    assert np.all(np.abs(counts[1:] - expected) < 4 * np.sqrt(expected))
    assert not np.array_equal(run(rng=jax.random.key(1))[0, :, 0], scores)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "block_q", "block_kv", "stride"), [(37, 8, 8, 4), (43, 12, 6, 3), (5, 8, 16, 8)])
def test_antidiagonal_importance_is_its_definition(length, block_q, block_kv, stride, is_causal):
    query, key = operands(length, length)
    strides, nq, nk = math.ceil(length / stride), math.ceil(length / block_q), math.ceil(length / block_kv)
    more = [np.pad(x, [(0, 0), (0, strides * stride - length), (0, 0), (0, 0)]) for x in (query, key)]
    want = np.zeros((B, N, nq, nk))
    for b, n, u in np.ndindex(B, N, strides):
        logits = np.full(strides, -np.inf)
        for v in range(u + 1 if is_causal else strides):
            pairs = [(u * stride + stride - 1 - a, v * stride + a) for a in range(stride)]
            logits[v] = 0.7 * sum(more[0][b, t, n] @ more[1][b, s, n // 2] for t, s in pairs) / stride
        weights = np.exp(logits - logits.max())
        for v in range(strides):
            want[b, n, u * stride // block_q, v * stride // block_kv] += weights[v] / weights.sum()
    with jax.enable_x64(True):
        options = {"block_q": block_q, "block_kv": block_kv, "stride": stride, "is_causal": is_causal, "scale": 0.7}
        got = psa_importance_antidiagonal(query, key, **options)
        np.testing.assert_allclose(got, want, atol=1e-13)


def test_importances_and_levels_are_constants():
    query, key = operands(37, 43, np.float32)

    def total(x: Any) -> Any:
        blocks = {"block_q": 8, "block_kv": 16}
        scores = psa_importance_antidiagonal(*x, stride=4, **blocks)
        scores = scores + psa_importance_sampling(*x, rng=jax.random.key(0), **blocks)
        similar = psa_similarity(x[1], 16)
        levels = psa_levels(scores * jnp.sum(x[0]) ** 2, **blocks)
        return jnp.sum(scores) + jnp.sum(similar) + jnp.sum(levels * 1.0) + 2 * jnp.sum(x[0])

    d_query, d_key = jax.grad(total)((query, key))
    assert np.all(np.asarray(d_query) == 2)
    assert not np.any(d_key)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32, np.float64])
def test_importance_is_at_least_float32(dtype):
    with jax.enable_x64(dtype == np.float64):
        query, key = operands(37, 43, dtype)
        wide = jnp.promote_types(dtype, np.float32)
        antidiagonal = psa_importance_antidiagonal(query, key, block_q=16, block_kv=16)
        sampled = psa_importance_sampling(query, key, rng=jax.random.key(0), block_q=16, block_kv=16)
        assert antidiagonal.dtype == sampled.dtype == psa_similarity(key, 16).dtype == wide
        np.testing.assert_allclose(sampled.sum(axis=-1), 1, atol=1e-6)
        np.testing.assert_allclose(antidiagonal.sum(axis=-1), np.broadcast_to([1, 1, 1], (B, N, 3)), atol=1e-6)


# Levels


def by_ranks(row: np.ndarray, rule: str, ratios: Any, merged: Any, min_full_ratio: float) -> np.ndarray:
    """The levels of one row that is not causal, rank by rank."""
    nk = len(row)
    order = sorted(range(nk), key=lambda j: (-row[j], j))
    share = np.cumsum(row[order] / row.sum())
    levels = np.zeros(nk, int)
    start = 0
    items = ratios.items() if rule == "topk" else sorted(ratios.items(), key=lambda item: item[1][1])
    for level, (_, high) in items:
        if rule == "topk":
            end = min(nk, int(nk * high))
        else:
            within = int(np.sum(share <= high + 1e-6))
            end = min(within + 1, nk) if within else start
            if level == 1:
                end = max(end, int(min_full_ratio * nk) + 1)
        count = max(end - start, 0)
        while count % merged(level):
            count += 1
        while start + count > nk:
            count -= merged(level)
        for rank in range(start, start + count):
            levels[order[rank]] = level
        start += count
    return levels


OTHER_RATIOS = {8: (0.0, 0.3), 1: (0.3, 0.45), 0: (0.45, 0.5), 4: (0.5, 0.93)}


@pytest.mark.parametrize("rule", ["topk", "thresholdbound"])
@pytest.mark.parametrize(("block_kv", "tile"), [(64, 32), (32, 32), (128, 32), (48, 20)])
def test_levels_are_given_by_rank(rule, block_kv, tile):
    for nk in (1, 2, 5, 23):
        for ratios in (TOPK_RATIOS, BOUND_RATIOS, OTHER_RATIOS):
            scores = scores_of(7, nk)
            with jax.enable_x64(True):
                options: dict[str, Any] = {"rule": rule, "mask_ratios": ratios, "block_kv": block_kv, "tile": tile}
                got = np.asarray(psa_levels(scores, **options, min_full_ratio=0.2))

            def merged(level: int) -> int:
                return math.ceil(level / (block_kv // tile)) or 1

            want = [[by_ranks(row, rule, ratios, merged, 0.2) for row in head] for head in scores]
            np.testing.assert_array_equal(got, want)
            for level in (2, 4, 8):  # counts obey the alignment
                assert not np.any(np.sum(got == level, axis=-1) % merged(level))


@pytest.mark.parametrize("rule", ["topk", "energybound"])
@pytest.mark.parametrize(("nq", "nk", "block_q", "block_kv"), [(11, 11, 8, 8), (12, 6, 8, 16), (5, 10, 16, 8)])
def test_causal_levels(rule, nq, nk, block_q, block_kv):
    scores, text = scores_of(nq, nk), 13
    for ratios in (TOPK_RATIOS, BOUND_RATIOS, OTHER_RATIOS):
        with jax.enable_x64(True):
            got = psa_levels(
                scores, rule=rule, mask_ratios=ratios, is_causal=True, block_q=block_q, block_kv=block_kv,
                text_length=text,
            )  # fmt: skip
        want = np.zeros(scores.shape, int)
        for h, i in np.ndindex(*scores.shape[:2]):
            queries = range(i * block_q, (i + 1) * block_q)
            candidates = [j for j in range(nk) if j * block_kv <= queries[-1]]
            order = sorted(candidates, key=lambda j: -scores[h, i, j])
            share = np.cumsum(scores[h, i, order]) / scores[h, i, candidates].sum()
            for rank, j in enumerate(order):
                for level, (low, high) in ratios.items():
                    if rule == "topk":
                        holds = int(len(order) * low) <= rank < int(len(order) * high)
                    else:
                        holds = low < share[rank] <= high
                    want[h, i, j] = level if holds else want[h, i, j]
                straddles = (j + 1) * block_kv - 1 > queries[0]
                is_text = i >= nq - math.ceil(text / block_q) or j >= nk - math.ceil(text / block_kv)
                if straddles or is_text or j == 0:
                    want[h, i, j] = 1
        np.testing.assert_array_equal(got, want)


def test_text_is_read_whole():
    levels = np.asarray(psa_levels(scores_of(4, 9), block_kv=64, text_length=65))
    assert np.all(levels[..., -2:] == 1)
    without = np.asarray(psa_levels(scores_of(4, 9), block_kv=64))
    np.testing.assert_array_equal(levels[..., :-2], without[..., :-2])
    assert np.any(without[..., -2:] != 1)


def test_equal_scores_rank_in_their_order():
    levels = psa_levels(np.ones((1, 20), np.float32), rule="topk")
    assert levels[0].tolist() == [1, 1, 2, *[8] * 4, *[0] * 13]


def test_the_default_rule_leaves_no_row_empty_and_topk_may():
    for nk in (1, 2, 3, 7):
        for is_causal in (False, True):
            assert np.all(np.any(psa_levels(scores_of(nk, nk), is_causal=is_causal) > 0, axis=-1))
    assert not np.any(psa_levels(scores_of(3, 2), rule="topk"))


def test_defaults_are_the_presets():
    scores = scores_of(5, 23)
    for rule, ratios in (("topk", TOPK_RATIOS), ("thresholdbound", BOUND_RATIOS)):
        np.testing.assert_array_equal(psa_levels(scores, rule=rule), psa_levels(scores, rule=rule, mask_ratios=ratios))
    np.testing.assert_array_equal(psa_levels(scores), psa_levels(scores, rule="thresholdbound"))
    np.testing.assert_array_equal(psa_levels(scores, block_kv=16), psa_levels(scores, block_kv=16, tile=16))
    square = scores_of(9, 9)
    causal = functools.partial(psa_levels, square, is_causal=True)
    np.testing.assert_array_equal(causal(), causal(rule="energybound", mask_ratios=BOUND_RATIOS))
    assert np.any(causal() != causal(rule="topk"))


def test_levels_are_int32_under_jit_too():
    scores = scores_of(5, 23).astype(np.float32)
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            eager = psa_levels(scores.astype(dtype))
            assert eager.dtype == np.int32
            np.testing.assert_array_equal(quick_jit(psa_levels)(scores.astype(dtype)), eager)


# Similarity and density


def test_similarity_is_the_mean_of_cosines():
    _, key = operands(3, 43)
    more = np.concatenate([key, np.repeat(key[:, -1:], 5, axis=1)], axis=1)
    unit = more / np.linalg.norm(more, axis=-1, keepdims=True)
    want = np.zeros((B, K, 3, 3))
    for b, k, j in np.ndindex(B, K, 3):
        for i, level in enumerate((2, 4, 8)):
            first = range(16 * j, 16 * j + 16, level)
            want[b, k, j, i] = np.mean([unit[b, s, k] @ unit[b, s + level - 1, k] for s in first])
    with jax.enable_x64(True):
        np.testing.assert_allclose(psa_similarity(key, 16), want, atol=1e-13)
    assert not np.any(psa_similarity(np.zeros((1, 8, 1, 3), np.float32), 8))


def test_the_cap_is_the_coarsest_level_above_its_threshold():
    turn = np.array([0, 0.1, 0.2, 0.3, 0, 0.1, 0.2, 0.3])  # cosines of 0.995, 0.955 and 0.955
    angles = {
        8: 0 * turn,
        2: np.pi * (np.arange(8) // 2),
        1: np.pi * np.arange(8),
        4: turn + np.pi * (np.arange(8) > 3),
    }
    key = np.stack([np.stack([np.cos(angle), np.sin(angle)], axis=-1) for angle in angles.values()])
    cap = psa_similarity_cap(key.reshape(1, 32, 1, 2).astype(np.float32), 8)
    assert cap[0, 0].tolist() == list(angles)
    assert cap.dtype == np.int32
    strict = psa_similarity_cap(key.reshape(1, 32, 1, 2).astype(np.float32), 8, (0.99, 0.96, 0.999))
    assert strict[0, 0].tolist() == [8, 2, 1, 2]


def test_density_is_the_mean_of_one_over_the_level():
    assert psa_density(np.array([[[1, 2, 4], [8, 0, 0]]])) == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 8) / 6)
    assert psa_density(np.zeros((2, 3), np.int32)) == 0


# Bad arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rng": None}, ValueError, r"^rng: expected a jax.random.key to draw positions with, or"),
        ({"rng": jax.random.key(0), "sampled": ()}, ValueError, r"^rng: .* not both"),
        ({"rng": jax.random.split(jax.random.key(0))}, ValueError, r"^rng: expected one key, got shape \(2,\)"),
        ({"rng": 0.5}, TypeError, r"^rng: expected a jax.random.key\(...\), got float"),
        ({"sampled": np.zeros((B, N, 3), int)}, TypeError, r"^sampled: expected \(query positions"),
        ({"sampled": (np.zeros((B, K, 3), int),) * 2}, ValueError, r"^sampled\[0\]: expected \[B, N, m\] with N = 6"),
        ({"sampled": (np.zeros((B, N, 3), int),) * 2}, ValueError, r"^sampled\[1\]: expected \[B, K, m\] with K = 3"),
        ({"sampled": (np.zeros((B, N, 0), int),) * 2}, ValueError, r"^sampled\[0\]: expected at least one position"),
        ({"sampled": (np.full((B, N, 3), 8),) * 2}, ValueError, r"^sampled\[0\]: expected positions within a block, 0"),
        ({"sampled": (np.zeros((B, N, 3)),) * 2}, TypeError, r"^sampled\[0\]: expected an integer dtype"),
        ({"rng": jax.random.key(0), "block_q": 0}, ValueError, r"^block_q: expected at least 1"),
    ],
)
def test_bad_samples(options, error, message):
    with pytest.raises(error, match=message):
        psa_importance_sampling(*operands(22, 22, np.float32), **{"block_q": 8, "block_kv": 8, **options})


def test_bad_strides_and_heads():
    query, key = operands(22, 21, np.float32)
    with pytest.raises(ValueError, match=r"^stride: expected a divisor of block_kv = 12, got 8"):
        psa_importance_antidiagonal(query, key, stride=8, block_q=8, block_kv=12)
    with pytest.raises(ValueError, match=r"^is_causal: "):
        psa_importance_antidiagonal(query, key, is_causal=True)
    with pytest.raises(ValueError, match=r"^query: 5 heads cannot be shared by 3"):
        psa_importance_antidiagonal(query[:, :, :5], key)
    with pytest.raises(ValueError, match=r"^block_kv: expected a multiple of 8"):
        psa_similarity(key, 12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "energybound"}, ValueError, r"^rule: expected one of 'topk', 'thresholdbound', got 'energybound'"),
        ({"rule": "thresholdbound", "is_causal": True}, ValueError, r"^rule: expected one of 'topk', 'energybound'"),
        ({"mask_ratios": [0.1]}, TypeError, r"^mask_ratios: expected a mapping of levels"),
        ({"mask_ratios": {3: (0, 1)}}, ValueError, r"^mask_ratios: expected levels 0, 1, 2, 4 and 8, got 3"),
        ({"mask_ratios": {2: 0.5}}, TypeError, r"^mask_ratios\[2\]: expected \(low, high\), got 0.5"),
        ({"mask_ratios": {2: (0.5, 0.4)}}, ValueError, r"^mask_ratios\[2\]: expected low <= high"),
        ({"mask_ratios": {2: (0.5, 1.5)}}, ValueError, r"^mask_ratios\[2\]: expected a share from 0 to 1, got 1.5"),
        ({"tile": 129}, ValueError, r"^tile: expected at most block_kv = 128, got 129"),
        ({"text_length": -1}, ValueError, r"^text_length: expected at least 0"),
        ({"text_length": 1000}, ValueError, r"^text_length: nq = 3 blocks have 384 tokens, got 1000"),
        ({"min_full_ratio": 2}, ValueError, r"^min_full_ratio: expected a share from 0 to 1"),
        ({"min_full_ratio": "0.1"}, TypeError, r"^min_full_ratio: expected a static number"),
        ({"scores": -np.ones((3, 5))}, ValueError, r"^scores: expected an importance of at least 0"),
        ({"scores": np.ones((3, 0))}, ValueError, r"^scores: expected \[..., nq, nk\], got \(3, 0\)"),
        ({"scores": np.ones((3, 5), int)}, TypeError, r"^scores: expected a floating dtype"),
        ({"scores": [[1.0]]}, TypeError, r"^scores: expected an array, got list"),
    ],
)
def test_bad_levels(options, error, message):
    options = {"scores": np.ones((3, 5), np.float32), **options}
    with pytest.raises(error, match=message):
        psa_levels(options.pop("scores"), **options)


@pytest.mark.parametrize(
    ("thresholds", "error", "message"),
    [
        (0.5, TypeError, r"^thresholds: expected three cosines"),
        ((0.5, 0.5), TypeError, r"^thresholds: expected three cosines"),
        ((0.5, 0.5, 2), ValueError, r"^thresholds: expected cosines from -1 to 1, got 2"),
        ((0.5, 0.5, True), TypeError, r"^thresholds: expected static numbers, got bool"),
    ],
)
def test_bad_thresholds(thresholds, error, message):
    with pytest.raises(error, match=message):
        psa_similarity_cap(np.ones((1, 16, 1, 3), np.float32), 16, thresholds)
