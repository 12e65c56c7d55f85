"""What every op asks of the fused softmax kernels, interpreted, against dense attention in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import block_sparse_attention, dot_product_attention, fused, sliding_window_attention
from jattn.blockwise import Operands
from jattn.masks import Causal, Sink, SlidingWindow
from pallas_kernels.block_sparse import lists, tiling

B, T, S, N, K, H, V = 2, 149, 211, 4, 2, 24, 40
Q_IDS = np.sort(np.arange(B * T).reshape(B, T) * 7919 % 3, axis=1)
KV_IDS = np.sort(np.arange(B * S).reshape(B, S) * 104729 % 3, axis=1)


def arrays(dtype, length=T):
    rng = np.random.default_rng(0)
    shapes = (B, length, N, H), (B, S, K, H), (B, S, K, V), (N,)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def results(op, x, implementation, **options):
    """Outputs, log-sum-exps where they are finite, and the gradients of a function of both."""

    def run(query, key, value, sinks):
        out, lse = op(query, key, value, sinks=sinks, return_lse=True, implementation=implementation, **options)
        seen = jnp.isfinite(lse)
        lse = jnp.where(seen, lse, 0)
        return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.cos(lse)), (out, lse, seen)

    (_, aux), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2, 3), has_aux=True))(*x)
    return *aux, *gradients


@pytest.mark.parametrize(
    ("op", "options"),
    [
        (dot_product_attention, {"mask": Causal(offset=S - T), "logits_soft_cap": 5.0}),
        (
            dot_product_attention,
            {"mask": (Causal(20) | Sink(30)) & ~SlidingWindow(3, 2), "segment_ids": (Q_IDS, KV_IDS)},
        ),
        (sliding_window_attention, {"window": 50, "offset": S - T, "segment_ids": (Q_IDS, KV_IDS)}),
        (sliding_window_attention, {"window": (3, 170), "offset": -140, "scale": 0.3}),
    ],
    ids=["causal", "prefix-segments", "window-segments", "two-sided"],
)
def test_a_walk_of_the_kernel_is_dense_attention(op, options):
    got = results(op, arrays(np.float32), "interpret", **options)
    with jax.enable_x64(True):
        want = results(op, arrays(np.float64), "reference", **options)
    for a, b in zip(got, want, strict=True):
        b = np.asarray(b, np.float64)
        assert np.sqrt(np.mean((np.asarray(a, np.float64) - b) ** 2)) <= 1e-5 * np.sqrt(np.mean(b**2))


@pytest.mark.parametrize("resident", [None, 0], ids=["one-walk", "two-walks"])
def test_dropout_is_that_of_every_implementation(resident, monkeypatch):
    choose = tiling.choose
    if resident is not None:  # gradients of keys then have a walk of their own
        monkeypatch.setattr(tiling, "choose", lambda *a, **k: dataclasses.replace(choose(*a, **k), resident=resident))
    options = {"block_mask": Causal(offset=S - T), "dropout_rate": 0.3, "dropout_seed": 2**32 - 5}
    got = results(block_sparse_attention, arrays(np.float32), "interpret", **options)
    with jax.enable_x64(True):
        want = results(block_sparse_attention, arrays(np.float64), "reference", **options)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_the_kernel_is_what_a_tpu_runs_and_says_what_it_does_not():
    query, key, value, _ = (jnp.asarray(x) for x in arrays(np.float32))
    for op, options in (
        (dot_product_attention, {"mask": Causal()}),
        (sliding_window_attention, {"window": (5, 5), "offset": 0}),
    ):
        assert jattn.explain(op, query, key, value, **options)[0].chosen == {
            "cpu": "xla",
            "tpu": "pallas_tpu",
            "cuda": "pallas_gpu",
        }
    for options in ({"mask": np.ones((1, 1, T, S), bool)}, {"bias": np.ones((1, 1, T, S), np.float32)}):
        decision = jattn.explain(dot_product_attention, query, key, value, **options)[0]
        assert set(decision.chosen.values()) == {"xla"}
        for name in ("pallas_tpu", "pallas_gpu"):
            assert "an entry for every pair" in decision.refused[name]
    halves = [x.astype(np.float16) for x in (query, key, value)]
    assert jattn.explain(dot_product_attention, *halves)[0].chosen["tpu"] == "xla"


def operands(batch, length, segments=False):
    shape = jax.ShapeDtypeStruct((batch, length, 1, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32) if segments else None
    return Operands(shape, shape, shape, q_segments=ids, kv_segments=ids)


def test_blocks_are_of_the_size_that_takes_least_time():
    def chosen(mask, *args):
        found = fused._blocks(mask, operands(*args))
        return found, (found.block_q, found.block_kv)

    window = Causal() & SlidingWindow(1023)
    assert chosen(window, 1, 8192)[1] == (512, 512)
    assert chosen(Causal(), 1, 32768)[1] == (1024, 2048)
    assert chosen(Causal(), 1, 32768, True)[1] == (1024, 1024)
    # Small blocks would do, if the lists of so many rows of the batch did not have to fit scalar memory.
    narrow = Causal() & SlidingWindow(100)
    small, large = chosen(narrow, 2, 32768, True), chosen(narrow, 2048, 32768, True)
    assert small[1] == (512, 512)
    assert large[1] > small[1]
    assert 2048 * 4 * large[0].num_steps <= lists.BUDGET < 2048 * 4 * small[0].num_steps


@pytest.mark.parametrize("lengths", [(1, 1), (100, 131), (600, 600), (1100, 4096), (131072, 64)])
def test_candidates_cover_the_lengths_in_whole_lanes(lengths):
    sizes = tiling.candidates(*lengths, 128, 128, jnp.bfloat16)
    assert len(set(sizes)) == len(sizes)
    assert all(size % tiling.LANES == 0 for pair in sizes for size in pair)
    assert all(size < length + tiling.LANES for pair in sizes for size, length in zip(pair, lengths, strict=True))
    areas = [q * kv for q, kv in sizes]
    assert areas == sorted(areas, reverse=True)
