"""Kronecker attention, exact and by polynomials; the properties are those of the specification."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn import (
    dot_product_attention,
    khatri_rao,
    kronecker_attention,
    kronecker_attention_poly,
    poly_degree,
)
from jattn.sparse import kronecker
from jattn.sparse.kronecker_poly import monomials, multi_indices

B, T, N, K, H, V = 2, 11, 4, 2, 5, 3
SEGMENTS = np.repeat([[1, 1, 2], [4, 6, 9]], [4, 1, 6], axis=1).astype(np.int32)
MASKS = tuple(np.random.default_rng(3).random((B, s)) > 0.4 for s in (7, 13))
EMPTY = np.zeros((B, 7), bool)


def arrays(*lengths, dtype=np.float64, width=H, heads=(N, K), limit=None, q_len=T, value_width=V):
    rng = np.random.default_rng(sum(lengths))

    def draw(*shape):
        return (rng.standard_normal(shape) if limit is None else rng.uniform(-limit, limit, shape)).astype(dtype)

    keys = tuple(draw(B, s, heads[1], width) for s in lengths)
    return draw(B, q_len, heads[0], width), keys, tuple(draw(B, s, heads[1], value_width) for s in lengths)


def results(x, **options):
    """Output, log-sum-exp and the gradients through both."""

    def run(query, keys, values):
        out, lse = kronecker_attention(query, keys, values, return_lse=True, **options)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.where(jnp.isfinite(lse), lse, 0))), (out, lse)

    (_, aux), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*x)
    return aux, gradients


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def brute(query, keys, values, scale, allowed):
    """The definition, tuple by tuple."""
    out = np.zeros((B, query.shape[1], N, values[0].shape[3]))
    for b, t, n in itertools.product(range(B), range(query.shape[1]), range(N)):
        logits, products = [], []
        for chosen in itertools.product(*(range(k.shape[1]) for k in keys)):
            if allowed(t, chosen):
                parts = [k[b, j, n // (N // K)] for k, j in zip(keys, chosen, strict=True)]
                logits.append(scale * np.sum(query[b, t, n] * math.prod(parts)))
                products.append(math.prod(v[b, j, n // (N // K)] for v, j in zip(values, chosen, strict=True)))
        if logits:
            weights = np.exp(np.array(logits) - max(logits))
            out[b, t, n] = weights @ np.array(products) / weights.sum()
    return out


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_is_the_definition(implementation):
    with jax.enable_x64(True):
        x = arrays(4, 5, 3, q_len=3)
        got = kronecker_attention(*x, implementation=implementation)
        np.testing.assert_allclose(got, brute(*x, 1 / H, lambda t, chosen: True), rtol=0, atol=1e-12)
        x = arrays(6, 6, q_len=6)
        got = kronecker_attention(*x, is_causal=True, windows=(None, 2), scale=0.7, implementation=implementation)
        want = brute(*x, 0.7, lambda t, chosen: max(chosen) <= t and t - chosen[1] < 2)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


CASES = {
    "causal": ((T, T), {"is_causal": True}),
    "lengths": ((7, 13), {}),
    "order-4": ((7, 5, 6), {}),
    "order-4-windows": ((T, T, T), {"is_causal": True, "windows": (4, None, 2)}),
    "segments": ((T, T), {"is_causal": True, "segment_ids": SEGMENTS}),
    "masked": ((7, 13), {"key_masks": MASKS}),
    "masked-second": ((7, 13), {"key_masks": (None, MASKS[1])}),
    "all-masked": ((7, 13), {"key_masks": (EMPTY, None)}),
    "one-factor": ((13,), {"key_masks": MASKS[1:]}),
}


@pytest.mark.parametrize("at_once", [4096, 24], ids=["whole", "chunks"])
@pytest.mark.parametrize(("lengths", "options"), CASES.values(), ids=CASES)
def test_the_fast_form_is_the_reference(lengths, options, at_once, monkeypatch):
    monkeypatch.setattr(kronecker, "QUERIES_AT_ONCE", at_once)
    jax.clear_caches()
    with jax.enable_x64(True):
        x = arrays(*lengths)
        got, want = (results(x, implementation=name, scale=1.0, **options) for name in ("xla", "reference"))
        assert_close(got, want, 1e-11)


def test_no_key_gives_zero_and_minus_infinity():
    (out, lse), gradients = results(arrays(7, 13, dtype=np.float32), key_masks=(EMPTY, None))
    assert not np.any(out)
    assert np.all(np.isneginf(lse))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_a_factor_of_ones_is_ordinary_attention():
    query, keys, values = arrays(13, dtype=np.float32)
    ones = [np.ones((B, 1, K, size), np.float32) for size in (H, V)]
    got = kronecker_attention(query, (ones[0], *keys), (ones[1], *values), scale=0.3)
    want = dot_product_attention(query, keys[0], values[0], scale=0.3)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(kronecker_attention(query, keys[0], values[0], scale=0.3), want, rtol=0, atol=1e-6)


def test_the_order_of_factors_and_of_keys_does_not_matter():
    query, keys, values = arrays(7, 13, dtype=np.float32)
    want = kronecker_attention(query, keys, values)
    np.testing.assert_allclose(kronecker_attention(query, keys[::-1], values[::-1]), want, rtol=0, atol=1e-6)
    order = np.random.default_rng(0).permutation(7)
    moved = kronecker_attention(query, (keys[0][:, order], keys[1]), (values[0][:, order], values[1]))
    np.testing.assert_allclose(moved, want, rtol=0, atol=1e-6)


def test_logits_beyond_exp():
    query, keys, values = arrays(7, 13, dtype=np.float32)
    (out, lse), gradients = results((100 * query, keys, values), scale=10.0)
    assert np.max(lse) > 1000
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((out, gradients)))
    want = kronecker_attention(100 * query, keys, values, scale=10.0, implementation="reference")
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-4)


def test_bfloat16_operands():
    x = arrays(T, T, dtype=np.float32)
    want = kronecker_attention(*x, is_causal=True, implementation="reference")
    got = kronecker_attention(*jax.tree.map(lambda a: a.astype(jnp.bfloat16), x), is_causal=True)
    assert got.dtype == jnp.bfloat16
    assert np.sqrt(np.mean((got.astype(np.float32) - want) ** 2) / np.mean(want**2)) < 0.02


def test_matching_triples():
    """The claim of the paper: which pairs of numbers complete x to 0 modulo p, no softmax over single keys can say."""
    p, f = 37, np.arange(1, 19)
    x = np.arange(p)
    c, s = np.cos(2 * np.pi * f * x[:, None] / p), np.sin(2 * np.pi * f * x[:, None] / p)
    parts = [c, c, s, s], [c, s, c, s], [c, -s, -s, -c]
    query, *keys = (np.concatenate(part, axis=1)[None, :, None].astype(np.float32) for part in parts)
    query, keys = np.swapaxes(query, 0, 1), [np.repeat(key, p, axis=0) for key in keys]  # a batch row for each query
    # Channel c of a product is 1 for the pair of c and the number that completes x and c: channels add up to matches.
    own = np.repeat(np.eye(p, dtype=np.float32)[None, :, None], p, axis=0)
    completing = np.eye(p, dtype=np.float32)[(-x[:, None] - x) % p][:, :, None]
    on_matches = jnp.sum(kronecker_attention(query, keys, (own, completing), scale=1.0), axis=-1)
    assert np.all(on_matches > 0.99999)


def test_products_of_sums_are_sums_of_products():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        a, b, c, d = (rng.standard_normal(shape) for shape in ((7, 4), (5, 4), (7, 3), (5, 3)))
        whole = khatri_rao(a, b).T @ khatri_rao(c, d)
        np.testing.assert_allclose(whole, (a.T @ c) * (b.T @ d), rtol=0, atol=1e-13)
        np.testing.assert_allclose(khatri_rao(a, b)[2 * 5 + 3], a[2] * b[3])
    with pytest.raises(ValueError, match="b: expected 4 columns as in a, got 3"):
        khatri_rao(a, d)


def polynomial(x, degree, is_causal=False, scale=0.25):
    """The definition with P in place of exp."""
    query, keys, values = x
    group = query.shape[2] // keys[0].shape[2]
    keys, values = (tuple(np.repeat(a, group, axis=2) for a in each) for each in (keys, values))
    logits = scale * np.einsum("binh,bjnh,blnh->bnijl", query, *keys)
    weights = sum(logits**a / math.factorial(a) for a in range(degree + 1))
    if is_causal:
        t = np.arange(query.shape[1])
        weights = weights * (np.maximum(t[:, None], t) <= t[:, None, None])
    return np.einsum("bnijl,bjnv,blnv->binv", weights, *values) / weights.sum((3, 4)).transpose(0, 2, 1)[..., None]


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_polynomial_form_is_exact_algebra(is_causal, monkeypatch):
    monkeypatch.setattr("jattn.sparse.kronecker_poly.NUMBERS_AT_ONCE", 4000)
    with jax.enable_x64(True):
        x = arrays(T, T, width=4)
        got = kronecker_attention_poly(*x, degree=4, scale=0.25, is_causal=is_causal)
        np.testing.assert_allclose(got, polynomial(x, 4, is_causal), rtol=0, atol=1e-10)


def test_two_degrees_more_are_ten_times_as_near():
    with jax.enable_x64(True):
        x = arrays(T, T, width=4, limit=0.8)
        exact = kronecker_attention(*x, scale=0.25, implementation="reference")
        errors = [np.abs(kronecker_attention_poly(*x, degree=g, scale=0.25) - exact).max() for g in (0, 2, 4, 6)]
    assert all(10 * after < before for before, after in itertools.pairwise(errors))
    assert errors[2] < 1e-6


def test_gradients_of_the_polynomial_form():
    with jax.enable_x64(True):
        x = arrays(6, 6, width=3, q_len=6, heads=(2, 1))

        def loss(*x):
            return jnp.sum(jnp.sin(kronecker_attention_poly(*x, degree=4, is_causal=True)))

        gradients = jax.grad(loss, (0, 1, 2))(*x)
        rng = np.random.default_rng(0)
        way = jax.tree.map(lambda a: rng.standard_normal(a.shape), x)
        ahead, back = (loss(*jax.tree.map(lambda a, d, e=e: a + e * d, x, way)) for e in (1e-6, -1e-6))
        along = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(way), strict=True))
        assert float(ahead - back) / 2e-6 == pytest.approx(float(along), rel=1e-6)


def test_multi_indices():
    indices = multi_indices(3, 4)
    assert len(indices) == len(set(indices)) == math.comb(7, 4)
    assert max(map(sum, indices)) == 4
    x = np.random.default_rng(0).standard_normal((2, 3))
    want = [[math.prod(row**index) for index in map(np.array, indices)] for row in x]
    np.testing.assert_allclose(monomials(jnp.asarray(x), indices), want, rtol=1e-5)


@pytest.mark.parametrize(("bound", "eps"), [(0.5, 1e-3), (1.0, 1e-2), (1.2, 1e-4)])
def test_the_degree_that_a_bound_needs(bound, eps):
    degree = poly_degree(bound, eps, 4)
    R = bound**3

    def remainder(g):
        return R ** (g + 1) * math.exp(2 * R) / math.factorial(g + 1)

    assert degree % 2 == 0
    assert remainder(degree) <= eps
    assert degree == 0 or remainder(degree - 2) > eps


@pytest.mark.parametrize("form", ["exact", "polynomial"])
def test_rows_and_heads_on_a_mesh_of_explicit_axes(form):
    x = arrays(T, T, dtype=np.float32)
    op = kronecker_attention if form == "exact" else functools.partial(kronecker_attention_poly, degree=2)
    gradient = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(op(*x, is_causal=True))), (0, 1, 2)))
    want = jax.device_get(gradient(*x))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data", None, "tensor")))
        assert jax.eval_shape(op, *placed).sharding.spec == P("data", None, "tensor", None)
        assert_close(jax.device_get(gradient(*placed)), want, 1e-5)


def flops(f, *x):
    return jax.jit(f).lower(*x).compile().cost_analysis()["flops"]


def test_cost_of_doubled_lengths():
    def cost(f, length):
        shapes = [jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)] * 5
        return flops(lambda q, a, b, c, d: f(q, (a, b), (c, d)), *shapes)

    poly = functools.partial(kronecker_attention_poly, degree=4)
    reference = functools.partial(kronecker_attention, implementation="reference")
    assert cost(poly, 256) / cost(poly, 128) == pytest.approx(2, rel=0.1)
    assert cost(reference, 64) / cost(reference, 32) == pytest.approx(8, rel=0.1)


def test_memory_is_that_of_a_few_keys():
    def temporary(length):
        shapes = [jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)] * 5

        def loss(q, a, b, c, d):
            return jnp.sum(kronecker_attention(q, (a, b), (c, d), is_causal=True))

        compiled = jax.jit(jax.grad(loss, tuple(range(5)))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(1024) < 1.5 * temporary(512) < 4 * 1024**2 * 8


GOOD = dict(zip(("query", "key", "value"), arrays(T, T, dtype=np.float32), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": ()}, ValueError, "key: expected at least one factor, got none"),
        ({"value": GOOD["value"][:1]}, ValueError, "value: expected 2 factors as in key, got 1"),
        ({"key": (GOOD["key"][0], GOOD["key"][1][..., :4])}, ValueError, r"key\[1\]: expected"),
        ({"value": (GOOD["value"][0], GOOD["value"][1][..., :2])}, ValueError, r"value\[1\]: expected"),
        ({"windows": (3, 3)}, ValueError, "windows: they look back from a query, so they need is_causal=True"),
        ({"windows": (3,), "is_causal": True}, ValueError, "for each of 2 factors"),
        ({"windows": (3, 0), "is_causal": True}, ValueError, r"windows\[1\]: expected at least 1, got 0"),
        ({"key_masks": (None,)}, ValueError, "key_masks: expected an array or None for each of 2 factors"),
        ({"key_masks": (np.ones((B, T)), None)}, TypeError, r"key_masks\[0\]: expected booleans"),
        ({"is_causal": True, "query": GOOD["query"][:, 1:]}, ValueError, "is_causal: with 10 queries and 11 keys"),
        ({"segment_ids": SEGMENTS[:, 1:]}, ValueError, "segment_ids: expected"),
    ],
)
def test_what_is_wrong_is_named(change, error, message):
    with pytest.raises(error, match=message):
        kronecker_attention(**(GOOD | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 3}, "degree: expected an even number, got 3"),
        ({"degree": 2, "coefficients": (1.0, 1.0)}, "coefficients: expected 3 for a polynomial of degree 2, got 2"),
    ],
)
def test_a_polynomial_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        kronecker_attention_poly(**GOOD, **options)
    with pytest.raises(ValueError, match="bound: expected a positive, finite number, got 0"):
        poly_degree(0, 1e-3, 4)
