"""k-means over directions: updates against loops in NumPy and the formulas, and split over devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn.sparse.kmeans import KMeansState, directions, kmeans_init, kmeans_init_lloyd, kmeans_update
from tests.sparse.test_routing import (
    MASK,
    B,
    C,
    H,
    N,
    T,
    assert_close,
    assert_same_bits,
    layer_norm,
    operands,
    planted,
)


def loops_of_sums(x: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts, totals = np.zeros(means.shape[:2]), np.zeros(means.shape)
    for b, t, n in np.ndindex(x.shape[0], x.shape[1], len(means)):
        token = x[b, t, n * x.shape[2] // len(means)]
        c = np.argmax(means[n] @ token)
        counts[n, c] += 1
        totals[n, c] += token
    return counts, totals


def test_google_update_is_the_formula():
    with jax.enable_x64(True):
        x, means = operands()["key"], operands()["means"]
        d, count, total = 0.7, np.zeros((N, C)), means
        state = KMeansState(means, count, total)
        for _ in range(3):
            new_count, new_total = loops_of_sums(layer_norm(x), means)
            count, total = d * count + (1 - d) * new_count, d * total + (1 - d) * new_total
            n = count.sum(-1, keepdims=True)
            means = total / ((count + 1e-5) / (n + C * 1e-5) * n)[..., None]
            state = kmeans_update(state, x, decay=d)
            assert_close(state, KMeansState(means, count, total), 1e-10)


def test_lucid_update_is_a_step_of_lloyd_and_empty_clusters_stay():
    with jax.enable_x64(True):
        x, means = operands()["key"], operands()["means"]
        means[:, 2] = -1e-3  # near no token, with the others as long as they are
        means[:, 1] = 10 * x[0, 0, 0]
        unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
        counts, totals = loops_of_sums(unit, means)
        assert np.any(counts == 0)
        norms = np.linalg.norm(totals, axis=-1, keepdims=True)
        new = np.where(counts[..., None] > 0, totals / np.where(norms > 0, norms, 1), means)
        got = kmeans_update(KMeansState(means), x, variant="lucid", decay=0.7)
        assert got.counts is None
        assert got.totals is None
        assert_close(got.means, 0.7 * means + 0.3 * new, 1e-12)
        assert_same_bits(np.asarray(got.means)[counts == 0], means[counts == 0])


def test_counts_after_equal_batches():
    x, state = operands(np.float32)["key"], kmeans_init(jax.random.key(0), N, C, H)
    frozen = state.means
    counts, _ = loops_of_sums(layer_norm(x), np.asarray(frozen))
    for n in range(1, 6):
        # Tokens are counted by the means they come with, here always the first.
        state = kmeans_update(KMeansState(frozen, state.counts, state.totals), x, decay=0.9)
        assert_close(state.counts, (1 - 0.9**n) * counts, 1e-5)


def test_what_is_summed_but_not_counted_pulls_the_first_means_away():
    d, c = 0.999, 512
    means = np.array([[[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]]], np.float32) * np.float32(np.sqrt(2))
    x = np.broadcast_to(means[0, 0], (1, c, 1, 4))
    faithful = kmeans_update(KMeansState(means, jnp.zeros((1, 2)), means), x, decay=d).means
    np.testing.assert_allclose(faithful[0, 0], (1 + d / ((1 - d) * c)) * means[0, 0], rtol=1e-3)
    assert np.max(np.abs(faithful[0, 1] / means[0, 1])[2:]) > 1e4
    counted = kmeans_update(KMeansState(means, jnp.ones((1, 2)), means), x, decay=d).means
    np.testing.assert_allclose(counted, means, rtol=1e-4)


def test_what_counts_in_an_update():
    x, state = operands(np.float32)["key"], kmeans_init(jax.random.key(0), N, C, H, init_count=1)
    spoilt = np.where(MASK[..., None, None], x, np.nan)
    want = kmeans_update(state, np.concatenate([x[:1, : T - 4], x[1:, :3]], axis=1))
    assert_close(kmeans_update(state, spoilt, mask=MASK), want, 1e-5)
    # Tokens of zeros are padding in "google", and tokens of equal entries have no direction either.
    zeros = np.where(MASK[..., None, None], x, np.arange(T)[:, None, None] % 2).astype(np.float32)
    assert_close(kmeans_update(state, zeros), want, 1e-5)
    nothing = kmeans_update(kmeans_init(jax.random.key(0), N, C, H), x, mask=np.zeros_like(MASK))
    assert_same_bits(nothing.means, state.means)
    assert not np.any(nothing.counts)
    lucid = KMeansState(state.means)
    assert_same_bits(kmeans_update(lucid, x, variant="lucid", mask=np.zeros_like(MASK)), lucid)


@pytest.mark.parametrize("variant", ["google", "lucid"])
def test_updates_of_a_split_batch_are_those_of_the_whole(variant):
    x = np.concatenate([operands(np.float32, seed=seed)["query"] for seed in range(2)])
    state = kmeans_init(jax.random.key(0), N, C, H, init_count=1)
    state = state if variant == "google" else KMeansState(state.means)
    update = functools.partial(kmeans_update, variant=variant, decay=0.5)
    want = update(state, x)
    assert not np.allclose(want.means, update(state, x[:2]).means, atol=1e-3)
    by_two = x.reshape(2, 2, *x.shape[1:])
    mapped = jax.vmap(functools.partial(update, axis_name="i"), in_axes=(None, 0), axis_name="i")(state, by_two)
    assert_close(jax.tree.map(lambda leaf: leaf[0], mapped), want, 1e-5)
    assert_close(jax.tree.map(lambda leaf: leaf[1], mapped), want, 1e-5)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharded = jax.shard_map(
        functools.partial(update, axis_name="data"), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    assert_close(jax.jit(sharded)(state, x), want, 1e-5)
    explicit = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    with jax.set_mesh(explicit):
        placed = jax.device_put(x, NamedSharding(explicit, P("data")))
        got = jax.device_get(jax.jit(update)(state, placed))
    assert_close(got, jax.device_get(want), 1e-5)


def test_no_gradient_passes_an_update():
    state = kmeans_init(jax.random.key(0), N, C, H, init_count=1)
    x = jnp.asarray(operands(np.float32)["query"])
    gradient = jax.grad(lambda x: jnp.sum(kmeans_update(state, x).means))(x)
    assert not np.any(gradient)


@pytest.mark.parametrize("variant", ["google", "lucid"])
def test_a_direction_has_a_length_and_a_finite_gradient_for_any_token(variant):
    x = operands(np.float32)["query"]
    want = directions(x, variant)
    assert_close(np.sum(want**2, axis=-1), np.full((B, T, N), H if variant == "google" else 1), 1e-4)
    for scale in (2.0**100, 2.0**30 if variant == "google" else 2.0**-30):
        assert_close(directions(x * np.float32(scale), variant), want, 1e-4)
    for tokens in (np.zeros_like(x), np.ones_like(x), x * np.float32(2.0**100), x * np.float32(2.0**-100)):
        gradient = jax.grad(lambda x: jnp.sum(directions(x, variant)))(tokens)
        assert np.all(np.isfinite(gradient))


def test_initial_means():
    state = kmeans_init(jax.random.key(0), 3, 5, 64)
    assert_close(np.mean(state.means, axis=-1), np.zeros((3, 5)), 1e-5)
    assert_close(np.var(state.means, axis=-1), np.ones((3, 5)), 1e-4)
    assert_same_bits(state.totals, state.means)
    assert not np.any(state.counts)
    assert np.all(kmeans_init(jax.random.key(0), 3, 5, 64, init_count=1).counts == 1)
    assert not np.array_equal(kmeans_init(jax.random.key(1), 3, 5, 64).means, state.means)
    tokens, _, centres = planted(40, 1, 8, noise=0.02)
    lloyd = jax.jit(functools.partial(kmeans_init_lloyd, num_clusters=1))(jax.random.key(0), tokens)
    assert np.max(np.abs(lloyd.means - centres)) < 1e-2
    x = operands(np.float32)["query"]
    first = kmeans_init_lloyd(jax.random.key(0), x, C, iterations=0)
    unit = np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True)).reshape(B * T, N, H)
    chosen = [int(np.argmin(np.abs(unit[:, 0] - mean).sum(-1))) for mean in np.asarray(first.means[0])]
    assert len(set(chosen)) == C
    assert_close(first.means, np.swapaxes(unit[chosen], 0, 1), 1e-6)
    assert_close(
        kmeans_init_lloyd(jax.random.key(0), x, C, iterations=2),
        functools.reduce(lambda s, _: kmeans_update(s, x, variant="lucid", decay=0.0), range(2), first), 1e-6,
    )  # fmt: skip


STATE = KMeansState(np.ones((N, C, H), np.float32))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: kmeans_update(STATE, x), ValueError, r"^state: does not fit variant='google'; begin with"),
        (
            lambda x: kmeans_update(kmeans_init(jax.random.key(0), N, C, H), x, variant="lucid"),
            ValueError, r"^state: does not fit variant='lucid'",
        ),
        (lambda x: kmeans_update(STATE, x, variant="lucid", decay=1.5), ValueError, r"^decay: expected a number"),
        (lambda x: kmeans_update(STATE, x, variant="lucid", decay="1"), TypeError, r"^decay: expected a static number"),
        (lambda x: kmeans_update(STATE, x[0], variant="lucid"), ValueError, r"^x: expected 4 dimensions"),
        (lambda x: kmeans_update(STATE, x[..., 1:], variant="lucid"), ValueError, r"^means: .* with H = 6"),
        (lambda x: kmeans_update(STATE, x[:, :, :4], variant="lucid"), ValueError, r"^means: expected a multiple of"),
        (lambda x: kmeans_update(STATE, x, variant="lucid", mask=MASK[:1]), ValueError, r"^mask: expected booleans"),
        (lambda x: kmeans_init(jax.random.key(0), N, 0, H), ValueError, r"^num_clusters: expected at least 1"),
        (lambda x: kmeans_init(jax.random.key(0), N, C, H, init_count=2), ValueError, r"^init_count: expected one of"),
        (lambda x: kmeans_init_lloyd(jax.random.key(0), x, 27), ValueError, r"^num_clusters: expected at most the 26"),
    ],
)  # fmt: skip
def test_bad_arguments_of_means(call, error, message):
    with pytest.raises(error, match=message):
        call(operands(np.float32)["query"])
