"""The products one by one against their definition and against the fused op, gradients of two orders included."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jattn.neighborhood.neighborhood import neighborhood_attention
from jattn.neighborhood.unfused import na_av, na_qk
from jattn.neighborhood.window import Neighborhood, window_bounds

B, N, K, H, V = 2, 6, 3, 5, 7
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((13,), {"kernel_size": 4, "dilation": 2}),
    ((7, 11), {"kernel_size": (3, 4), "stride": (2, 1), "dilation": (1, 2), "is_causal": (True, False)}),
    ((3, 5, 7), {"kernel_size": (2, 3, 3), "stride": (1, 2, 3), "is_causal": (False, True, True)}),
]
every_case = pytest.mark.parametrize(("grid", "options"), CASES, ids=["1-D", "2-D", "3-D"])


def inputs(grid: tuple[int, ...], dtype: Any = np.float64) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((B, *grid, n, h)), dtype) for n, h in ((N, H), (K, H), (K, V), (N, V)))


def slots(grid: tuple[int, ...], options: dict[str, Any]) -> list[tuple[tuple[int, ...], int, tuple[int, ...] | None]]:
    """Every (query, slot, key or none), slots in row-major order of the offsets from the first key of the window."""
    axes = Neighborhood(**options).axes(grid)
    bounds = [window_bounds(*axis) for axis in axes]
    found: list[Any] = []
    for query in np.ndindex(grid):
        for slot, offset in enumerate(np.ndindex(*(axis.window for axis in axes))):
            inner = [int(b[0][x]) + o for b, x, o in zip(bounds, query, offset, strict=True)]
            exists = all(j < b[1][x] for j, b, x in zip(inner, bounds, query, strict=True))
            key = tuple(j * a.dilation + x % a.dilation for j, a, x in zip(inner, axes, query, strict=True))
            found.append((query, slot, key if exists else None))
    return found


@every_case
def test_every_slot_is_a_product_or_a_weighted_value(grid, options):
    with jax.enable_x64(True):
        query, key, value, _ = (np.asarray(x) for x in inputs(grid))
        products = np.asarray(na_qk(query, key, **options))
        weights = np.random.default_rng(1).standard_normal(products.shape)
        # What stands in a slot without a key is not read.
        out = np.asarray(na_av(np.where(np.isneginf(products), np.nan, weights), value, **options))
        want, total = np.full(products.shape, -np.inf), np.zeros(out.shape)
        for i, slot, j in slots(grid, options):
            if j is None:
                continue
            at, to = (slice(None), *i), (slice(None), *j)
            want[(*at, slice(None), slot)] = np.einsum("bnh,bnh->bn", query[at], np.repeat(key[to], N // K, axis=1))
            total[at] += weights[(*at, slice(None), slot, None)] * np.repeat(value[to], N // K, axis=1)
        np.testing.assert_allclose(products, want, atol=1e-12)
        np.testing.assert_allclose(out, total, atol=1e-12)
        assert np.isneginf(want).any() == ("is_causal" in options)


@every_case
def test_with_a_softmax_between_them_they_are_the_op(grid, options):
    def unfused(q: Any, k: Any, v: Any) -> Any:
        return na_av(jax.nn.softmax(na_qk(H**-0.5 * q, k, **options), axis=-1), v, **options)

    with jax.enable_x64(True):
        *x, d_out = inputs(grid)
        fused = functools.partial(neighborhood_attention, **options, implementation="reference")

        def with_gradients(f: Any) -> Any:
            out, pull_back = jax.vjp(f, *x)
            return out, *pull_back(d_out)

        results = [quick_jit(functools.partial(with_gradients, f))() for f in (unfused, fused)]
        for got, want in zip(*results, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)


def test_gradients_of_two_orders_are_those_of_finite_differences():
    grid, options = CASES[1][0], CASES[1][1]
    with jax.enable_x64(True):
        query, key, value, _ = inputs(grid)
        products = functools.partial(na_qk, **options)

        def finite(q: Any, k: Any) -> Any:
            found = products(q, k)
            return jnp.where(found == -jnp.inf, 0, found) ** 2

        check_grads(jax.jit(finite), (query, key), order=2, modes=["rev"])
        weights = jnp.sin(jnp.arange(B * 77 * N * 12, dtype=float)).reshape(B, *grid, N, 12)
        check_grads(jax.jit(functools.partial(na_av, **options)), (weights, value), order=2, modes=["rev"])


def test_nothing_is_scattered_and_bits_repeat():
    query, key, value, _ = inputs((13,), np.float32)

    def loss(q: Any, k: Any, v: Any) -> Any:
        return na_av(jax.nn.softmax(na_qk(q, k, kernel_size=4), axis=-1), v, kernel_size=4).sum()

    compiled = quick_jit(jax.grad(loss, (0, 1, 2))).lower(query, key, value).compile()
    assert "scatter(" not in compiled.as_text()
    jax.tree.map(np.testing.assert_array_equal, compiled(query, key, value), compiled(query, key, value))


def test_short_floats_are_summed_in_long_ones():
    query, key, value, _ = inputs((13,), jnp.bfloat16)
    products = na_qk(query, key, kernel_size=4)
    assert products.dtype == jnp.bfloat16
    out = na_av(jnp.ones_like(products), 0 * value + 0.0078125, kernel_size=4)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, np.full(out.shape, 4 * 0.0078125, out.dtype))
    wide = na_qk(query.astype(jnp.float32), key.astype(jnp.float32), kernel_size=4)
    np.testing.assert_allclose(products.astype(jnp.float32), wide, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k, v: na_qk(q[:, 0], k[:, 0], kernel_size=3), ValueError, r"query: expected \[B, \*grid"),
        (lambda q, k, v: na_qk(q, k[:, :5], kernel_size=3), ValueError, "key: expected .* X = 13 as in query"),
        (lambda q, k, v: na_qk(q[:, :, :4], k, kernel_size=3), ValueError, "query: 4 heads cannot be shared by 3"),
        (lambda q, k, v: na_qk(q, k.astype(int), kernel_size=3), TypeError, "key: expected dtype"),
        (lambda q, k, v: na_qk(q, k, kernel_size=14), ValueError, "kernel_size: a window of 14"),
        (lambda q, k, v: na_av(q, v, kernel_size=3), ValueError, r"attention: expected .* W = 3, the keys of a window"),
        (lambda q, k, v: na_av(q, v[:, :5], kernel_size=5), ValueError, "value: expected .* X = 13 as in attention"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(*(np.asarray(x) for x in inputs((13,), np.float32)[:3]))
