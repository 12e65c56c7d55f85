"""The band against dense attention under the same mask, in float64 with every gradient, and its cost in memory."""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.blockwise import Operands
from jattn.dot_product import dense_attention, dot_product_attention
from jattn.masks import Causal, Full, SlidingWindow
from jattn.softmax_tile import Score
from jattn.sparse.sliding_window import Band, banded_attention, sliding_window_attention, windowed_attention

B, N, K, H, V = 2, 6, 3, 5, 7
IMPLEMENTATIONS = ("reference", "xla")
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def operands(
    q_len: int, kv_len: int, dtype: Any = np.float64, *, sinks: bool = False, segments: bool = False
) -> Operands:
    rng = np.random.default_rng(q_len)
    query, key, value = (
        rng.standard_normal(shape).astype(dtype) for shape in ((B, q_len, N, H), (B, kv_len, K, H), (B, kv_len, K, V))
    )
    x = Operands(query, key, value, sinks=rng.standard_normal(N).astype(dtype) if sinks else None)
    if segments:
        # Some queries have an id that no key has.
        x = x._replace(q_segments=rng.integers(0, 4, (B, q_len)), kv_segments=rng.integers(0, 3, (B, kv_len)))
    return x


def seen(band: Band, q_len: int, kv_len: int) -> np.ndarray:
    """The window, pair by pair."""
    pairs = [[s - t - band.offset in range(-band.left, band.right + 1) for s in range(kv_len)] for t in range(q_len)]
    return np.array(pairs)[None, None]


def derivatives(attend: Any) -> Any:
    """A function of operands: the gradients of a loss that reads outputs and log-sum-exps, and both of these."""

    def run(x: Operands) -> Any:
        weights = np.random.default_rng(9).standard_normal((*x.query.shape[:3], x.value.shape[-1]))

        def loss(arrays: Any) -> Any:
            query, key, value, sinks = arrays
            out, lse = attend(x._replace(query=query, key=key, value=value, sinks=sinks))
            some = jnp.isfinite(lse)
            return jnp.sum(out * weights) + jnp.sum(jnp.where(some, jnp.sin(jnp.where(some, lse, 0)), 0)), (out, lse)

        return jax.grad(loss, has_aux=True)((x.query, x.key, x.value, x.sinks))

    return quick_jit(run)


# (queries, keys, band, block, blocks in a group): ragged, more than one group, offsets on both sides, out of reach.
CASES = {
    "causal, several groups": (29, 29, Band(7, 0, 0), 4, 3),
    "one group": (29, 29, Band(7, 0, 0), 8, 4),
    "two-sided": (29, 31, Band(3, 6, 0), 4, 2),
    "only itself": (13, 13, Band(0, 0, 0), 4, 2),
    "later queries": (13, 37, Band(11, 0, 24), 4, 2),
    "earlier queries": (31, 13, Band(3, 5, -9), 4, 3),
    "wider than the sequence": (13, 17, Band(40, 50, 2), 4, 1),
    "all keys out of reach": (11, 13, Band(3, 5, 40), 4, 2),
    "block of the whole": (5, 7, Band(2, 1, 1), 64, 9),
}


@pytest.mark.parametrize("name", CASES)
def test_band_is_dense_attention_with_every_gradient(name: str):
    q_len, kv_len, band, block, per_group = CASES[name]
    extras = {"sinks": True, "segments": True} if name in ("two-sided", "later queries") else {}
    score = Score(1.5, 2.0 if extras else None)
    with jax.enable_x64(True):
        x = operands(q_len, kv_len, **extras)
        dense = functools.partial(dense_attention, mask=Full(), score=score)
        wanted = derivatives(lambda x: dense(x._replace(mask=seen(band, q_len, kv_len))))(x)
        banded = functools.partial(banded_attention, band=band, score=score, block=block, per_group=per_group)
        got = derivatives(banded)(x)
    for (path, a), b in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-13, err_msg=jax.tree_util.keystr(path))
        assert b.dtype == np.float64


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("window", "mask"),
    [(1, SlidingWindow(0)), (6, Causal() & SlidingWindow(5)), ((2, 3), SlidingWindow(2, 3))],
    ids=str,
)
def test_the_reading_of_window(implementation: str, window: Any, mask: Any):
    x = operands(17, 17, np.float32)[:3]
    got = quick_jit(functools.partial(sliding_window_attention, window=window, implementation=implementation))(*x)
    wanted = quick_jit(functools.partial(dot_product_attention, mask=mask, implementation="reference"))(*x)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)
    if window == 1:
        np.testing.assert_allclose(got, x[2].repeat(N // K, axis=2), rtol=0, atol=1e-6)


def test_windows_agree_with_jax_nn_on_either_side_of_the_widest_band():
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((1, 700, n, H)).astype(np.float32) for n in (2, 1, 1)]
    for left, right in ((40, 0), (300, 90), (600, 30)):
        options = {"local_window_size": (left, right)}
        wanted = quick_jit(lambda *a, o=options: jax.nn.dot_product_attention(*a, **o))(*x)
        got = quick_jit(functools.partial(sliding_window_attention, window=(left, right)))(*x)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "interpret"])
def test_a_window_may_be_wider_than_positions_go(implementation: str):
    x = operands(13, 13, np.float32)[:3]
    attend = functools.partial(sliding_window_attention, implementation=implementation)
    for window, mask in ((sys.maxsize, Causal()), ((3, 2**31 - 1), ~Causal(-4)), ((2**31, sys.maxsize), Full())):
        np.testing.assert_allclose(
            quick_jit(functools.partial(attend, window=window))(*x), dot_product_attention(*x, mask=mask), atol=2e-6
        )


def test_a_wide_window_with_an_offset_goes_by_blocks():
    x = operands(13, 1000, np.float32)
    band, score = Band(700, 1, 960), Score(0.3, None)
    wanted = quick_jit(functools.partial(banded_attention, band=band, score=score))(x)
    got = quick_jit(functools.partial(windowed_attention, band=band, score=score))(x)
    for a, b in zip(wanted, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_sinks", [True, False])
def test_queries_that_see_nothing(implementation: str, with_sinks: bool):
    # Queries at positions 20 .. 48 over 31 keys: from position 31 + 4 on, there is no key within 4.
    x = operands(29, 31, np.float32, sinks=with_sinks)

    def attend(x: Operands) -> Any:
        return sliding_window_attention(
            *x[:3], window=5, offset=20, sinks=x.sinks, return_lse=True, implementation=implementation
        )

    (d_query, *rest), (out, lse) = derivatives(attend)(x)
    assert not any(np.isnan(a).any() for a in jax.tree.leaves((d_query, rest, out, lse)))
    assert (out[:, 15:] == 0).all()
    assert (d_query[:, 15:] == 0).all()
    wanted = x.sinks if with_sinks else np.float32(-np.inf)
    np.testing.assert_array_equal(lse[:, 15:], np.broadcast_to(wanted, lse[:, 15:].shape))
    assert np.abs(out[:, :15]).min() > 0


def test_packed_documents_are_separate_documents():
    x = operands(23, 23, np.float32)[:3]
    ids = np.repeat([[4, 9]], [10, 13], axis=1).repeat(B, axis=0)
    attend = functools.partial(sliding_window_attention, window=6, return_lse=True)
    packed = quick_jit(attend)(*x, segment_ids=ids)
    shifted = quick_jit(attend)(*x, segment_ids=ids - 100)
    apart = [quick_jit(attend)(*(a[:, piece] for a in x)) for piece in (slice(0, 10), slice(10, 23))]
    for a, b, c in zip(packed, shifted, zip(*apart, strict=True), strict=True):
        np.testing.assert_allclose(a, np.concatenate(c, axis=1), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(a, b)


def test_half_precision():
    x = [jnp.asarray(a, jnp.bfloat16) for a in operands(37, 37, np.float32)[:3]]
    out, lse = quick_jit(functools.partial(sliding_window_attention, window=9, return_lse=True))(*x)
    exact = quick_jit(
        functools.partial(sliding_window_attention, window=9, return_lse=True, implementation="reference")
    )
    wanted_out, wanted_lse = exact(*(a.astype(jnp.float32) for a in x))
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    # The weights and the output are each rounded once, by half a unit in the last place of at most |v|.
    tolerance = float(jnp.finfo(jnp.bfloat16).eps) * float(jnp.abs(x[2]).max())
    np.testing.assert_allclose(out.astype(jnp.float32), wanted_out, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=1e-5)


def test_transformations():
    x = operands(19, 19, np.float32)[:3]

    def loss(query, key, value):
        out, lse = sliding_window_attention(query, key, value, window=(3, 1), return_lse=True)
        return jnp.sum(out**2) + jnp.sum(lse)

    grad = jax.grad(loss, (0, 1, 2))
    wanted = quick_jit(grad)(*x)
    alone = quick_jit(jax.vmap(lambda *a: grad(*(array[None] for array in a))))(*x)
    scanned = quick_jit(lambda *a: jax.lax.scan(lambda c, array: (c, grad(*(y[None] for y in array))), 0, a)[1])(*x)
    remat = quick_jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*x)
    for a, b, c, d in zip(wanted, alone, scanned, remat, strict=True):
        np.testing.assert_allclose(b[:, 0], a, rtol=0, atol=1e-5)
        np.testing.assert_allclose(c[:, 0], a, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(d, a)


def test_memory_grows_with_the_length():
    def temporaries(length: int) -> int:
        arrays = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (2, 1, 1)]
        step = quick_jit(jax.grad(lambda *a: jnp.sum(sliding_window_attention(*a, window=128) ** 2), (0, 1, 2)))
        return step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    # From the length on where there is more than one group of blocks.
    short, long = temporaries(32_768), temporaries(65_536)
    assert long < 2.1 * short
    assert long < 4 * 65_536 * 128 * 2  # less than the logits of the window


def call(**changes: Any) -> Any:
    query, key, value = operands(13, 17, np.float32)[:3]
    return lambda: sliding_window_attention(**{"query": query, "key": key, "value": value, "window": 4, **changes})


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (call(), ValueError, "offset: with 13 queries and 17 keys .* offset=0 .* offset=4"),
        (call(offset=0.5), TypeError, "offset: expected a static integer"),
        (call(offset=0, window=0), ValueError, "window: expected at least 1, got 0"),
        (call(offset=0, window=-3), ValueError, "window: expected at least 1, got -3"),
        (call(offset=0, window=True), TypeError, "window: expected a static integer"),
        (call(offset=0, window=(3, -1)), ValueError, r"window\[1\]: expected at least 0, got -1"),
        (call(offset=0, window=(3,)), ValueError, r"window: expected an integer or \(left, right\)"),
        (call(offset=0, sinks=np.ones(K, np.float32)), ValueError, "sinks: expected .* N = 6"),
        (call(offset=0, segment_ids=np.ones((B, 13), int)), ValueError, r"segment_ids: .* \(query_ids"),
        (call(offset=0, logits_soft_cap=-1.0), ValueError, "logits_soft_cap: expected a positive number"),
        (call(offset=0, key=np.ones((B, 17, 4, H), np.float32)), ValueError, "value: expected .* K = 4 as in key"),
    ],
)  # fmt: skip
def test_bad_arguments(bad: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        bad()
