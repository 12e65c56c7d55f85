"""HyperAttention: both forms of it against each other, where it is exact, and its errors as the paper states them."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.dot_product import dot_product_attention
from jattn.sparse.hyper import angular_lsh_hash, hyper_attention

B, N, K, H, V = 2, 4, 2, 5, 7
IMPLEMENTATIONS = ("reference", "xla")
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SMALL = {"rng": 3, "lsh_num_projs": 4, "block_size": 4, "sample_size": 6, "min_seq_len": 8}


def operands(q_len: int, kv_len: int, dtype: Any = np.float64, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (B, q_len, N, H), (B, kv_len, K, H), (B, kv_len, K, V)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def planted(length: int = 512, width: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Queries that are the keys in another order and a little noise, for one head; and that order."""
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 1, length, 1, width)).astype(np.float32)
    order = rng.permutation(length)
    query = key[:, order] + 0.15 * rng.standard_normal(key.shape).astype(np.float32)
    return query, key, value, order


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=tolerance), got, want)


# Lengths that no block divides, unlike lengths, no samples, more samples than keys, odd lengths at two levels.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ragged": (22, 22, {}),
    "cross": (13, 31, {"bucket_order": "inverse_gray"}),
    "longer-queries": (31, 13, {"ragged": "zero_pad"}),
    "twice": (22, 22, {"exclude_block": False, "ragged": "zero_pad", "scale": 0.7}),
    "blocks-only": (22, 22, {"sample_size": 0}),
    "many": (22, 22, {"sample_size": 40}),
    "causal": (37, 37, {"is_causal": True, "min_seq_len": 18}),
    "causal-padded": (37, 37, {"is_causal": True, "min_seq_len": 10, "exclude_block": False, "ragged": "zero_pad"}),
}


@pytest.mark.parametrize(("case", "masked"), [*((case, False) for case in CASES), ("twice", True), ("causal", True)])
def test_sorting_is_the_dense_definition_with_gradients(case, masked):
    q_len, kv_len, options = CASES[case]
    mask = np.arange(kv_len) < np.array([kv_len - 3, 6])[:, None] if masked else np.ones((B, kv_len), bool)
    weights = np.random.default_rng(1).standard_normal((B, q_len, N, V))

    def derivatives(implementation: str) -> Any:
        def loss(x: Any) -> Any:
            out, lse = hyper_attention(
                *x, **{**SMALL, **options}, mask=mask[:, None, None] if masked else None, return_lse=True,
                implementation=implementation,
            )  # fmt: skip
            some = jnp.isfinite(lse)
            return jnp.sum(out * weights) + jnp.sum(jnp.where(some, jnp.sin(jnp.where(some, lse, 0)), 0)), (out, lse)

        return quick_jit(jax.grad(loss, has_aux=True))

    with jax.enable_x64(True):
        x = operands(q_len, kv_len)
        assert_close(derivatives("xla")(x), derivatives("reference")(x), 1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("q_len", "options"),
    [
        (19, {"min_seq_len": 20}),
        (19, {"min_seq_len": 1, "block_size": 19}),
        (19, {"min_seq_len": 19, "is_causal": True}),
        (19, {"min_seq_len": 2, "block_size": 19, "is_causal": True}),
    ],
    ids=["short", "one-block", "causal-short", "causal-one-block"],
)
def test_short_sequences_are_exact(q_len, options, implementation):
    x = operands(q_len, 19, np.float32)
    got = hyper_attention(*x, **{**SMALL, **options}, return_lse=True, implementation=implementation)
    want = dot_product_attention(*x, is_causal=options.get("is_causal", False), return_lse=True)
    assert_close(got, want, 1e-5)


def test_the_thresholds_are_strict_and_not():
    x = operands(16, 16, np.float32)
    exact = functools.partial(dot_product_attention, *x)
    at = functools.partial(hyper_attention, *x, **{**SMALL, "min_seq_len": 16})
    assert np.max(np.abs(at() - exact())) > 1e-2
    assert_close(at(is_causal=True), exact(is_causal=True), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_every_key_sampled_once_is_exact(implementation, masked):
    x, real = operands(22, 22, np.float32), 15 if masked else 22
    mask = (np.arange(22) < real)[None, None, None] if masked else None
    rng = np.random.default_rng(2)
    # Sorted keys: those that are not real come last.
    samples = rng.permuted(np.broadcast_to(np.arange(real, dtype=np.int32), (B, N, real)), axis=-1)
    options = {**SMALL, "sample_size": real, "sampled": (samples,)}
    got = hyper_attention(*x, **options, mask=mask, return_lse=True, implementation=implementation)
    assert_close(got, dot_product_attention(*x, mask=mask, return_lse=True), 1e-5)


def test_the_denominator_is_unbiased_unless_samples_of_the_own_block_count_twice():
    x = [x[:1] for x in operands(64, 64, np.float32)]
    options = {"lsh_num_projs": 4, "block_size": 8, "min_seq_len": 8, "return_lse": True}
    options["proj_dir"] = np.random.default_rng(3).standard_normal((H, 4)).astype(np.float32)
    _, exact = dot_product_attention(*x, return_lse=True)
    _, near = hyper_attention(*x, **options, sample_size=0)

    def ratios(exclude_block: bool) -> np.ndarray:
        def one(rng: Any) -> Any:
            drawn = {"rng": rng, "sample_size": 16, "exclude_block": exclude_block, "implementation": "reference"}
            return jnp.exp(hyper_attention(*x, **options, **drawn)[1] - exact)[0, :, 0]

        return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 400)))

    # What is counted twice is the query's own block.
    for exclude_block, want in ((True, 1), (False, 1 + np.exp(near - exact)[0, :, 0])):
        drawn = ratios(exclude_block)
        assert np.all(np.abs(drawn.mean(axis=0) - want) < 3 * drawn.std(axis=0, ddof=1) / 20)
    assert np.mean(want) > 1.1


def test_the_error_falls_as_the_square_root_of_the_samples():
    query, key, value, _ = planted()
    directions = np.random.default_rng(1).standard_normal((16, 7)).astype(np.float32)
    exact = dot_product_attention(query, key, value, scale=0.125)

    def error(samples: int) -> float:
        def one(rng: Any) -> Any:
            out = hyper_attention(
                query, key, value, rng=rng, proj_dir=directions, block_size=32, sample_size=samples, min_seq_len=1,
                scale=0.125, implementation="reference",
            )  # fmt: skip
            return jnp.sum((out - exact) ** 2)

        draws = jax.random.split(jax.random.key(samples), 16)
        return float(jnp.sqrt(jnp.mean(jax.jit(lambda draws: jax.lax.map(one, draws))(draws))))

    errors = [error(samples) for samples in (16, 64, 256, 1024)]
    for fewer, more in itertools.pairwise(errors):
        assert abs(2 * more / fewer - 1) < 0.15, errors


def test_alike_vectors_fall_into_the_same_block():
    query, key, _, order = planted()
    directions = np.random.default_rng(1).standard_normal((16, 7)).astype(np.float32)

    def blocks(x: Any) -> np.ndarray:
        return np.argsort(np.argsort(angular_lsh_hash(x, directions)[0, :, 0], stable=True)) // 32

    assert np.mean(blocks(query) == blocks(key)[order]) > 0.6
    assert np.mean(blocks(query) == blocks(key)) < 0.12


def test_the_order_of_keys_does_not_matter_where_no_ranks_tie():
    rng = np.random.default_rng(5)
    query, key, value = (rng.standard_normal((1, 16, 1, 8)).astype(np.float32) for _ in range(3))
    directions = rng.standard_normal((8, 16)).astype(np.float32)
    assert len(np.unique(angular_lsh_hash(key, directions))) == 16
    op = functools.partial(hyper_attention, query, proj_dir=directions, block_size=4, sample_size=0, min_seq_len=1)
    order = rng.permutation(16)
    assert_close(op(key[:, order], value[:, order]), op(key, value), 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_output_before_a_token_changes_with_it(implementation):
    length = 41
    query, key, value = operands(length, length, np.float32)
    op = quick_jit(functools.partial(hyper_attention, **SMALL, is_causal=True, implementation=implementation))
    want = op(query, key, value)
    for j in (3, 20, 21, 30, 40):
        new_key, new_value, new_query = (np.copy(x) for x in (key, value, query))
        new_key[:, j], new_value[:, j] = -3 * new_key[:, j], 7.0
        # A query of another bin would move others of its half to other blocks; see the docstring.
        new_query[:, j] *= 3
        got = op(new_query, new_key, new_value)
        np.testing.assert_array_equal(got[:, :j], want[:, :j])
        assert not np.array_equal(got[:, j], want[:, j])


def test_ranks_of_bins():
    directions = np.eye(5, 7, dtype=np.float32)
    x = np.where(np.arange(32)[:, None] >> np.arange(5) & 1, 1, -1).astype(np.float32)
    gray, inverse = (np.asarray(angular_lsh_hash(x, directions, order)) for order in ("gray", "inverse_gray"))
    assert gray.tolist() == [i ^ (i >> 1) for i in range(32)]
    neighbours = np.argsort(inverse)
    assert all(int(a ^ b).bit_count() == 1 for a, b in itertools.pairwise(neighbours))
    assert angular_lsh_hash(np.zeros((3, 5), np.float32), directions).tolist() == [0, 0, 0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_that_are_not_real_are_not_read(implementation):
    x = operands(23, 23, np.float32)
    mask = np.arange(23) < np.array([18, 0])[:, None]
    spoilt = [x[0], *(np.where(mask[..., None, None], a, -77).astype(np.float32) for a in x[1:])]

    def loss(x: Any) -> Any:
        options = {**SMALL, "min_seq_len": 12, "is_causal": True, "implementation": implementation}
        out, lse = hyper_attention(*x, **options, mask=mask[:, None, None], return_lse=True)
        return jnp.sum(jnp.sin(out)), (out, lse)

    run = quick_jit(jax.grad(loss, has_aux=True))
    gradient, (out, lse) = run(x)
    jax.tree.map(np.testing.assert_array_equal, run(spoilt)[1], (out, lse))
    assert not np.any(out[1])
    assert np.all(lse[1] == -np.inf)
    assert all(np.all(np.isfinite(g)) for g in gradient)
    assert not np.any(gradient[2][~mask])
    assert np.any(gradient[2][mask])


def test_draws_repeat_and_differ():
    x = operands(22, 22, np.float32)
    op = functools.partial(hyper_attention, *x, **{name: SMALL[name] for name in SMALL if name != "rng"})
    np.testing.assert_array_equal(op(rng=3), op(rng=jax.random.key(3)))
    assert not np.array_equal(op(rng=3), op(rng=4))


SAMPLES = np.zeros((B, N, 6), np.int32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rng": None}, ValueError, r"^rng: nothing to draw directions with"),
        ({"rng": None, "proj_dir": np.ones((H, 3), np.float32)}, ValueError, r"^rng: nothing to draw samples with"),
        ({"rng": -1}, ValueError, r"^rng: expected a seed of 32 bits"),
        ({"rng": 0.5}, TypeError, r"^rng: expected a seed or a jax.random.key"),
        ({"proj_dir": np.ones((H, 31), np.float32)}, ValueError, r"^proj_dir: expected 1 to 30 directions, got 31"),
        ({"proj_dir": np.ones((H + 1, 3), np.float32)}, ValueError, r"^proj_dir: expected \[H, R\] with H = 5"),
        ({"lsh_num_projs": 31}, ValueError, r"^lsh_num_projs: expected at most 30"),
        ({"bucket_order": "binary"}, ValueError, r"^bucket_order: expected one of"),
        ({"ragged": "drop"}, ValueError, r"^ragged: expected one of"),
        ({"sampled": SAMPLES}, TypeError, r"^sampled: expected a tuple of arrays"),
        ({"sampled": ()}, ValueError, r"^sampled: this call makes 1 estimates, got samples for 0"),
        ({"sampled": (SAMPLES[:, 1:],)}, ValueError, r"^sampled\[0\]: expected \[B, heads, m\] with heads = 4"),
        ({"sampled": (SAMPLES + 22,)}, ValueError, r"^sampled\[0\]: expected indices of sorted keys, 0 to 21"),
        ({"mask": np.ones((B, 1, 22, 22), bool)}, ValueError, r"^mask: expected booleans \[B, 1, 1, S\]"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        hyper_attention(*operands(22, 22, np.float32), **{**SMALL, **options})


def test_causal_lengths_must_agree():
    with pytest.raises(ValueError, match=r"^is_causal: "):
        hyper_attention(*operands(21, 22, np.float32), **SMALL, is_causal=True)
