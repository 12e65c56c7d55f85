"""PSA against its definition written out token by token, its limits and gradients, the paper's claim in miniature."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn.dot_product import dot_product_attention
from jattn.sparse.block_mask import BlockMask
from jattn.sparse.block_sparse import block_sparse_attention
from jattn.sparse.psa import _Pyramid, build_pyramid, psa_attention, pyramid_sparse_attention
from jattn.sparse.psa_importance import psa_importance_antidiagonal, psa_importance_sampling
from jattn.sparse.psa_levels import psa_levels, psa_similarity_cap

B, N, K, H, V = 2, 6, 3, 5, 7
IMPLEMENTATIONS = ("reference", "xla")
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def operands(q_len: int, kv_len: int, dtype: Any = np.float64, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (B, q_len, N, H), (B, kv_len, K, H), (B, kv_len, K, V)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def random_levels(q_len: int, kv_len: int, block_q: int, block_kv: int, *, is_causal: bool = False) -> np.ndarray:
    """Any level anywhere, a row of zeros among them; if causal, 1 where only some may see and anything above."""
    nq, nk = math.ceil(q_len / block_q), math.ceil(kv_len / block_kv)
    levels = np.random.default_rng(q_len).choice([0, 1, 2, 4, 8], (B, N, nq, nk)).astype(np.int32)
    if is_causal:
        first_q, first_k = np.arange(nq)[:, None] * block_q, np.arange(nk) * block_kv
        some = (first_k + block_kv - 1 > first_q) & (first_k <= first_q + block_q - 1)
        levels[..., some] = 1
    else:
        levels[0, 1, -1] = 0
    return levels


def means(x: np.ndarray, level: int, block_kv: int) -> np.ndarray:
    """[S, D] with its last row again up to whole blocks, as means of `level` consecutive ones."""
    x = np.concatenate([x, np.repeat(x[-1:], -len(x) % block_kv, axis=0)])
    return x.reshape(-1, level, x.shape[1]).mean(axis=1)


def defined(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, levels: np.ndarray, block_q: int, block_kv: int, *,
    is_causal: bool = False, scale: float = H**-0.5, log_r: bool = True,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Output and log-sum-exp, token by token."""
    out = np.zeros((*query.shape[:3], value.shape[3]))
    lse = np.full(query.shape[:3], -np.inf)
    for b, n, t in np.ndindex(query.shape[0], query.shape[2], query.shape[1]):
        head = n // (query.shape[2] // key.shape[2])
        logits: list[float] = []
        values: list[np.ndarray] = []
        for j, level in enumerate(levels[b, n, t // block_q]):
            if level == 0:
                continue
            keys, vals = (means(x[b, :, head], level, block_kv) for x in (key, value))
            for u in range(j * block_kv // level, (j + 1) * block_kv // level):
                if (level == 1 and u >= key.shape[1]) or (is_causal and (u + 1) * level - 1 > t):
                    continue
                logits.append(scale * keys[u] @ query[b, t, n] + (math.log(level) if log_r else 0.0))
                values.append(vals[u])
        if logits:
            z = np.array(logits)
            lse[b, t, n] = z.max() + math.log(np.exp(z - z.max()).sum())
            out[b, t, n] = np.exp(z - lse[b, t, n]) @ np.stack(values)
    return out, lse


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=tolerance), got, want)


def loss_of(op: Any) -> Any:
    """A number that output and log-sum-exp go into, and these two."""

    def loss(x: Any, *rest: Any) -> Any:
        out, lse = op(*x, *rest)
        weights = np.random.default_rng(1).standard_normal(out.shape).astype(out.dtype)
        some = jnp.isfinite(lse)
        return jnp.sum(out * weights) + jnp.sum(jnp.where(some, jnp.sin(jnp.where(some, lse, 0)), 0)), (out, lse)

    return loss


@functools.cache
def compiled(implementation: str, block_q: int, block_kv: int, **options: Any) -> Any:
    """`f(query, key, value, levels)`; tests share it."""
    sizes = {"block_q": block_q, "block_kv": block_kv}
    return quick_jit(
        functools.partial(psa_attention, **sizes, **options, return_lse=True, implementation=implementation)
    )


@functools.cache
def derivatives(implementation: str, block_q: int, block_kv: int, **options: Any) -> Any:
    """`f((query, key, value), levels)`: the gradients by the former, and output and log-sum-exp."""
    op = functools.partial(
        psa_attention, block_q=block_q, block_kv=block_kv, **options, return_lse=True, implementation=implementation
    )
    return quick_jit(jax.grad(loss_of(op), has_aux=True))


# Lengths that no block divides, unlike lengths and blocks, a block beyond all keys, tiles of one token.
CASES: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "ragged": (23, 43, 5, 16, {}),
    "longer-queries": (37, 19, 16, 8, {"scale": 0.7}),
    "one-block": (7, 3, 11, 24, {}),
    "causal-wide-keys": (41, 41, 8, 16, {"is_causal": True}),
    "causal-wide-queries": (37, 37, 16, 8, {"is_causal": True}),
}
RAGGED = {"block_q": 5, "block_kv": 16}


@functools.cache
def definition_of(case: str) -> tuple[list[np.ndarray], np.ndarray, dict[str, Any], Any]:
    q_len, kv_len, block_q, block_kv, options = CASES[case]
    x = operands(q_len, kv_len)
    levels = random_levels(q_len, kv_len, block_q, block_kv, is_causal=options.get("is_causal", False))
    want = defined(*x, levels, block_q, block_kv, **options)
    return x, levels, {"block_q": block_q, "block_kv": block_kv, **options}, want


@both
@pytest.mark.parametrize("case", CASES)
def test_is_the_definition(case, implementation):
    x, levels, options, want = definition_of(case)
    with jax.enable_x64(True):
        assert_close(compiled(implementation, **options)(*x, levels), want, 1e-13)


@pytest.mark.parametrize("case", ["ragged", "causal-wide-keys"])
def test_both_forms_have_the_same_gradients(case):
    x, levels, options, want = definition_of(case)
    with jax.enable_x64(True):
        (gradients, got), (dense_gradients, _) = (derivatives(i, **options)(x, levels) for i in IMPLEMENTATIONS)
        assert_close(got, want, 1e-13)
        assert_close(gradients, dense_gradients, 1e-12)


def test_gradients_in_float32():
    x, levels, options, _ = definition_of("ragged")
    got = derivatives("xla", **options)([a.astype(np.float32) for a in x], levels)
    with jax.enable_x64(True):
        want = jax.device_get(derivatives("reference", **options)(x, levels))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(got))
    assert_close(got, want, 1e-5)


def test_the_pyramid():
    x = np.arange(2 * 19 * 3.0).reshape(2, 19, 3, 1).astype(np.float32)
    got = build_pyramid(x, 8)
    want = [[means(x[b, :, n], r, 8) for r in (1, 2, 4, 8)] for b in range(2) for n in range(3)]
    want = np.stack([np.concatenate(levels) for levels in want]).reshape(2, 3, 45, 1)
    np.testing.assert_array_equal(got, np.moveaxis(want, 1, 2))
    assert build_pyramid(x.astype(jnp.bfloat16), 8).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"^block_kv: expected a multiple of 8.*got 12"):
        build_pyramid(x, 12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_rectangles_of_a_pyramid_are_classified_rightly(is_causal):
    """All and none are never wrong, and within one level nothing is partial that is all or none."""
    mask = _Pyramid(19, 24, is_causal)
    dense = mask.dense(19, mask.length)
    ends = (0, 24, 36, 42, 45)
    for q_lo, kv_lo in np.ndindex(19, mask.length):
        for q_hi, kv_hi in ((min(q_lo + 3, 18), kv_lo), (q_lo, min(kv_lo + 2, 44)), (18, 44), (q_lo, kv_lo)):
            part = dense[q_lo : q_hi + 1, kv_lo : kv_hi + 1]
            exact = 2 * part.all() + 1 * (part.any() and not part.all())
            kind = mask.classify(q_lo, q_hi, kv_lo, kv_hi)
            one_level = np.searchsorted(ends, kv_lo, side="right") == np.searchsorted(ends, kv_hi, side="right")
            assert kind == (exact if one_level else 1), (q_lo, q_hi, kv_lo, kv_hi)


@both
@pytest.mark.parametrize("is_causal", [False, True])
def test_level_1_everywhere_is_dense_attention(implementation, is_causal):
    x = operands(37, 37, np.float32)
    levels = np.ones((B, N, 5, 3), np.int32)
    got = compiled(implementation, 8, 16, is_causal=is_causal)(*x, levels)
    assert_close(got, dot_product_attention(*x, is_causal=is_causal, return_lse=True), 2e-6)


@both
def test_levels_0_and_1_are_full_blocks(implementation):
    x = operands(37, 37, np.float32)
    levels = random_levels(37, 37, 8, 16) % 2
    lists = BlockMask.from_map((2 * levels).astype(np.int8), 37, 37, 8, 16)
    got = compiled(implementation, 8, 16, is_causal=False)(*x, levels)
    assert_close(got, quick_jit(functools.partial(block_sparse_attention, return_lse=True))(*x, lists), 2e-6)


def test_pooling_tokens_that_are_the_same_changes_nothing():
    """What says that a mean of r tokens weighs as r; without that it weighs as one, and only equal levels agree."""
    query, *rest = operands(16, 6)
    key, value = (np.repeat(x, 8, axis=1) for x in rest)  # blocks of 16 that a length of 48 fills
    rng = np.random.default_rng(3)
    several = [rng.choice([1, 2, 4, 8], (B, N, 2, 3)) for _ in range(3)]
    several += [np.full((B, N, 2, 3), level) for level in (1, 2, 4, 8)]

    narrow = [x.astype(np.float32) for x in (query, key, value)]
    for implementation in IMPLEMENTATIONS:
        outs = [compiled(implementation, 8, 16)(*narrow, levels) for levels in several]
        for out in outs[1:]:
            assert_close(out, outs[0], 2e-6)

    light = [defined(query, key, value, levels, 8, 16, log_r=False)[0] for levels in several]
    assert all(np.max(np.abs(out - light[-1])) > 0.1 for out in light[:3])
    assert_close(light[3:], [light[3]] * 4, 1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_pooled_blocks_come_nearer_than_fewer_whole_ones(seed):
    """The paper's claim in miniature: 2 whole blocks and 8 of means by 8 cost as much as 3 whole ones."""
    length, width, block = 1024, 32, 64
    steps = np.random.default_rng(seed).standard_normal((3, length, width))
    walks = np.cumsum(steps, axis=1)
    walks = (walks - walks.mean(axis=1, keepdims=True)) / walks.std(axis=1, keepdims=True)
    query, key, value = (walk[None, :, None].astype(np.float32) for walk in walks)
    logits = walks[0] @ walks[1].T / math.sqrt(width)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    exact = weights @ walks[2]
    mass = weights.reshape(16, block, 16, block).sum(axis=(1, 3))
    rank = np.argsort(np.argsort(-mass, axis=1), axis=1)

    def error(levels: np.ndarray) -> float:
        out, _ = compiled("xla", block, block)(query, key, value, levels[None, None])
        return float(np.linalg.norm(out[0, :, 0] - exact) / np.linalg.norm(exact))

    pooled, whole = np.where(rank < 2, 1, np.where(rank < 10, 8, 0)), np.where(rank < 3, 1, 0)
    assert jattn.psa_density(pooled) == jattn.psa_density(whole) == 3 / 16
    assert 0.1 < 2 * error(pooled) <= error(whole)


@both
@pytest.mark.parametrize("case", ["causal-wide-keys", "causal-wide-queries"])
def test_no_output_before_a_token_changes_with_it(case, implementation):
    x, levels, options, _ = definition_of(case)
    query, key, value = (a.astype(np.float32) for a in x)
    # Traced, levels are as they come: means that straddle a query are not seen by it.
    coarse = np.where(levels == 0, 0, 8 // np.maximum(levels, 1))
    op = compiled(implementation, **options)
    for chosen in (levels, coarse):
        want, _ = op(query, key, value, chosen)
        for s in (0, 5, 15, 16, 23, query.shape[1] - 1):
            new = [np.copy(a) for a in (query, key, value)]
            for a in new:
                a[:, s] = 9 - 3 * a[:, s]
            got, _ = op(*new, chosen)
            np.testing.assert_array_equal(got[:, :s], want[:, :s])
            if chosen is levels:  # at level 1 a query sees itself
                assert not np.array_equal(got[:, s], want[:, s])


@both
@pytest.mark.parametrize("level", [2, 4, 8])
def test_the_gradient_of_a_mean_is_shared_by_its_tokens(implementation, level):
    query, key, value = operands(23, 43)
    levels = np.full((B, N, 5, 3), level, np.int32)
    pooled = [
        np.stack([[means(a[b, :, n], level, 16) for n in range(K)] for b in range(B)]).swapaxes(1, 2)
        for a in (key, value)
    ]

    def of_means(*x: Any) -> Any:
        out, lse = dot_product_attention(*x, return_lse=True, implementation="reference")
        return out, lse + math.log(level)

    with jax.enable_x64(True):
        (_, *got), _ = jax.device_get(derivatives(implementation, **RAGGED)([query, key, value], levels))
        (_, *want), _ = jax.device_get(quick_jit(jax.grad(loss_of(of_means), has_aux=True))([query, *pooled]))
    for member, mean in zip(got, want, strict=True):
        shares = np.repeat(mean, level, axis=1) / level
        shares[:, 42] += shares[:, 43:].sum(axis=1)  # the last token stands for those that are not there
        assert_close(member, shares[:, :43], 1e-12)


@both
def test_rows_that_read_nothing_give_nothing(implementation):
    x, levels, _, _ = definition_of("ragged")
    levels = np.copy(levels)
    levels[1, :3] = 0
    levels[0, :, 1] = 0
    with jax.enable_x64(True):
        (d_query, *others), (out, lse) = jax.device_get(derivatives(implementation, **RAGGED)(x, levels))
        nothing, _ = jax.device_get(derivatives(implementation, **RAGGED)(x, np.zeros_like(levels)))
    empty = np.moveaxis(np.repeat(~levels.any(axis=-1), 5, axis=2)[..., :23], 1, 2)
    assert np.array_equal(lse == -np.inf, empty)
    assert not np.any(out[empty])
    assert not np.any(d_query[empty])
    assert all(np.all(np.isfinite(d)) and np.any(d) for d in (out, d_query, *others))
    assert not any(np.any(d) for d in nothing)


@both
def test_logits_of_thousands(implementation):
    (query, key, value), levels, _, _ = definition_of("ragged")
    query = 3e3 * query
    with jax.enable_x64(True):
        gradients, got = derivatives(implementation, **RAGGED)([query, key, value], levels)
    assert all(np.all(np.isfinite(d)) for d in gradients)
    assert_close(got, defined(query, key, value, levels, 5, 16), 1e-9)


@both
def test_bfloat16_operands_have_float32_statistics(implementation):
    x = [a.astype(jnp.bfloat16) for a in operands(23, 43, np.float32)]
    levels = random_levels(23, 43, 5, 16)
    op = compiled(implementation, **RAGGED)
    out, lse = op(*x, levels)
    want, want_lse = defined(*[np.asarray(a, np.float64) for a in x], levels, 5, 16)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, np.float32)
    # Eight bits of mantissa: rounding of means, of weights and of the output.
    error = np.asarray(out, np.float32) - want
    assert np.sqrt(np.mean(error**2)) <= 3 * 2**-8 * np.sqrt(np.mean(want**2))
    some = np.isfinite(want_lse)
    assert_close(lse[some], want_lse[some], 2**-6)


def test_one_program_serves_all_levels():
    x = operands(23, 43, np.float32)
    count = 0

    @quick_jit
    def run(levels: Any) -> Any:
        nonlocal count
        count += 1
        return psa_attention(*x, levels, block_q=5, block_kv=16)

    levels = random_levels(23, 43, 5, 16)
    first = run(levels)
    np.testing.assert_array_equal(run(levels), first)
    assert not np.array_equal(run(np.roll(levels, 1, axis=-1)), first)
    assert count == 1


def test_no_array_has_an_entry_for_every_pair():
    length = 2048
    shape = jax.ShapeDtypeStruct((1, length, 1, 16), np.float32)
    gradient = jax.grad(lambda x: jnp.sum(pyramid_sparse_attention(*x, implementation="xla")))
    compiled = quick_jit(gradient).lower([shape] * 3).compile()
    sizes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    assert max(math.prod(map(int, size.split(","))) for size in sizes) < length**2 / 8
    assert compiled.memory_analysis().temp_size_in_bytes < length**2


def test_the_fused_kernel_walks_the_same_tiles():
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal(s).astype(np.float32) for s in ((1, 200, 2, 8), *[(1, 1100, 1, 8)] * 2))
    levels = np.array([[[4, 0], [2, 8]], [[1, 8], [0, 1]]])[None]
    op = functools.partial(psa_attention, query, key, value, levels, block_q=128, block_kv=1024, return_lse=True)
    assert_close(op(implementation="interpret"), op(implementation="reference"), 5e-5)
    (decision,) = jattn.explain(op)
    assert (decision.chosen["cpu"], decision.chosen["tpu"]) == ("xla", "pallas_tpu")


def test_on_a_mesh_of_explicit_axes_with_heads_that_are_split():
    x = [a[:, :, : 2 * (i == 0) + 2] for i, a in enumerate(operands(50, 50, np.float32))]
    run = functools.partial(
        pyramid_sparse_attention, block_q=16, block_kv=16, importance="sampling", rng=jax.random.key(0),
        similarity=(0.1, 0.2, 0.3), implementation="reference",
    )  # fmt: skip
    want = np.asarray(quick_jit(run)(*x))
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        out = quick_jit(run)(*[jax.device_put(a, NamedSharding(mesh, P(None, None, "model"))) for a in x])
        assert jax.typeof(out).sharding.spec == P(None, None, "model", None)
        assert_close(jax.device_get(out), want, 1e-6)


# The function that chooses levels by itself


@pytest.mark.parametrize("is_causal", [False, True])
def test_chooses_levels_and_attends(is_causal):
    x = operands(83, 83, np.float32)
    blocks = {"block_q": 16, "block_kv": 16}
    op = functools.partial(
        pyramid_sparse_attention, **blocks, is_causal=is_causal, stride=4, text_length=20, similarity=(0.2, 0.1, 0.0),
        scale=0.7, return_lse=True,
    )  # fmt: skip

    @quick_jit
    def choose(query: Any, key: Any) -> Any:
        scores = psa_importance_antidiagonal(query, key, **blocks, stride=4, is_causal=is_causal, scale=0.7)
        cap = psa_similarity_cap(key, 16, (0.2, 0.1, 0.0))
        return psa_levels(scores, **blocks, is_causal=is_causal, text_length=20), cap

    levels, cap = choose(*x[:2])
    cap = np.repeat(cap, N // K, axis=1)[:, :, None]
    assert 0 < np.sum(levels > cap) < np.sum(levels > 0)
    want = compiled("xla", 16, 16, is_causal=is_causal, scale=0.7)(*x, np.minimum(levels, cap))
    assert_close(quick_jit(op)(*x), want, 2e-6)


def test_samples_at_positions():
    query, key, value = operands(83, 83, np.float32)
    blocks = {"block_q": 16, "block_kv": 16}
    rng = np.random.default_rng(0)
    at = tuple(rng.permuted(np.tile(np.arange(16), (B, n, 1)), axis=-1)[..., :5] for n in (N, K))
    op = quick_jit(functools.partial(pyramid_sparse_attention, importance="sampling", **blocks))
    choose = quick_jit(lambda *x: psa_levels(psa_importance_sampling(*x, sampled=at, **blocks), **blocks))
    levels = choose(query, key)
    want, _ = compiled("xla", 16, 16, is_causal=False, scale=None)(query, key, value, levels)
    assert_close(op(query, key, value, sampled=at), want, 2e-6)
    other = tuple(15 - positions for positions in at)
    assert not np.array_equal(op(query, key, value, sampled=other), want)


def test_later_blocks_do_not_reach_an_output_by_the_choice_of_levels():
    x = operands(83, 83, np.float32)
    op = quick_jit(functools.partial(pyramid_sparse_attention, block_q=16, block_kv=16, is_causal=True, stride=4))
    want = op(*x)
    for s in (16, 33, 82):
        new = [np.copy(a) for a in x]
        for a in new:
            a[:, s] = 9 - 3 * a[:, s]
        before = s // 16 * 16
        np.testing.assert_array_equal(op(*new)[:, :before], want[:, :before])
        assert not np.array_equal(op(*new)[:, s], want[:, s])


LEVELS = np.ones((B, N, 3, 2), np.int32)


@pytest.mark.parametrize(
    ("levels", "options", "error", "message"),
    [
        (LEVELS[:, :, :2], {}, ValueError, r"^levels: expected \[B, N, nq, nk\] with nq = 3"),
        (LEVELS[:, :3], {}, ValueError, r"^levels: expected \[B, N, nq, nk\] with N = 6"),
        (LEVELS[0], {}, ValueError, r"^levels: expected 4 dimensions"),
        (LEVELS.astype(np.float32), {}, TypeError, r"^levels: expected an integer dtype, got float32"),
        (3 * LEVELS, {}, ValueError, r"^levels: expected 0 \(left out\), 1, 2, 4 or 8"),
        (-LEVELS, {}, ValueError, r"^levels: expected 0 \(left out\), 1, 2, 4 or 8"),
        (LEVELS.tolist(), {}, TypeError, r"^levels: expected an array, got list"),
        (2 * LEVELS, {"is_causal": True}, ValueError, r"^levels: expected 1 for blocks of keys that only some"),
        (0 * LEVELS, {"is_causal": True}, ValueError, r"^levels: expected 1 for blocks of keys that only some"),
        (LEVELS, {"block_kv": 12}, ValueError, r"^block_kv: expected a multiple of 8.*got 12"),
        (LEVELS, {"block_kv": 16.0}, TypeError, r"^block_kv: expected a static integer"),
        (LEVELS, {"block_q": 0}, ValueError, r"^block_q: expected at least 1"),
        (LEVELS, {"is_causal": 1}, TypeError, r"^is_causal: expected a static True or False"),
        (LEVELS, {"scale": float("nan")}, ValueError, r"^scale: expected a finite number"),
        (LEVELS, {"implementation": "fast"}, ValueError, r"^implementation: expected one of"),
    ],
)
def test_bad_arguments(levels, options, error, message):
    with pytest.raises(error, match=message):
        psa_attention(*operands(22, 22), levels, **{"block_q": 8, "block_kv": 16, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"importance": "mean"}, ValueError, r"^importance: expected one of 'antidiagonal', 'sampling'"),
        ({"importance": "sampling"}, ValueError, r"^rng: expected a jax.random.key to draw positions with"),
        ({"importance": "sampling", "rng": 3}, TypeError, r"^rng: expected a jax.random.key\(...\), got int"),
        ({"importance": "sampling", "is_causal": True}, ValueError, r"^importance: 'sampling' looks at later keys"),
        ({"rng": jax.random.key(0)}, ValueError, r"^rng: importance='antidiagonal' draws nothing"),
        ({"sampled": ()}, ValueError, r"^sampled: importance='antidiagonal' draws nothing"),
        ({"stride": 5}, ValueError, r"^stride: expected a divisor of block_q = 16, got 5"),
        ({"block_kv": 12}, ValueError, r"^block_kv: expected a multiple of 8"),
        ({"rule": "energybound"}, ValueError, r"^rule: expected one of 'topk', 'thresholdbound'"),
        ({"similarity": 0.5}, TypeError, r"^thresholds: expected three cosines"),
        ({"text_length": 33}, ValueError, r"^text_length: nq = 2 blocks have 32 tokens, got 33"),
    ],
)
def test_bad_choices(options, error, message):
    with pytest.raises(error, match=message):
        pyramid_sparse_attention(*operands(22, 22, np.float32), **{"block_q": 16, "block_kv": 16, **options})


def test_causal_lengths_must_agree():
    with pytest.raises(ValueError, match=r"^is_causal: "):
        psa_attention(*operands(21, 22), LEVELS, block_q=8, block_kv=16, is_causal=True)
