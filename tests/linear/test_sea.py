"""SEA's estimate, selection, sparse attention and loss against their definitions, written out in NumPy."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import catalog
from jattn.linear import sea_sparse
from jattn.linear.gelu import gelu
from jattn.linear.sea import positions_in_segments, sea_attention, token_reach
from jattn.linear.sea_cnn import causal_cnn, two_way_cnn
from jattn.linear.sea_decode import init_sea_state, sea_continue, sea_step
from jattn.linear.sea_estimator import performer_context, two_way_positions
from jattn.linear.sea_loss import sea_distillation_loss
from jattn.linear.sea_params import init_sea_params, performer_projection
from jattn.linear.sea_selection import Reach, cell_starts, key_cells, sea_interpolate, sea_select
from jattn.linear.sea_sparse import dense_attention, gathered_attention, kept_keys

B, T, N, K, H, V, L = 2, 23, 6, 3, 5, 7, 8
RNG = np.random.default_rng(0)
Q, KEY, VALUE = (RNG.standard_normal(shape).astype(np.float32) for shape in ((B, T, N, H), (B, T, K, H), (B, T, K, V)))
SEGMENTS = np.repeat([[1, 1, 2], [4, 6, 9]], [9, 1, 13], axis=1).astype(np.int32)
REAL = np.arange(T) < np.array([[17], [T]])
MASK = REAL[:, None, None, :]
STATIC = ("k_budget", "k_flatten_dim", "k_oversample", "scale", "implementation")
attention = jax.jit(sea_attention, static_argnames=(*STATIC, "is_causal", "return_intermediates"))
carry_on = jax.jit(sea_continue, static_argnames=STATIC)
select = jax.jit(sea_select, static_argnames=("k_budget", "k_flatten_dim", "k_oversample"))
cells_of_keys, starts_of_cells = (jax.jit(run, static_argnames="cells") for run in (key_cells, cell_starts))
reach_of, keys_of_cells = jax.jit(token_reach, static_argnames="is_causal"), jax.jit(kept_keys, static_argnums=(2, 3))


def weights(*, is_causal=True, predictor_length=L, **options):
    """All random, so that no two cells are equal by construction."""
    sizes = {"num_heads": N, "head_dim": H, "value_dim": V, "predictor_length": predictor_length, "max_length": 64}
    start = functools.partial(init_sea_params, is_causal=is_causal, **{**sizes, **options})
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: 0.4 * rng.standard_normal(x.shape).astype(x.dtype), jax.eval_shape(start, jax.random.key(0))
    )


CAUSAL, TWO_WAY = weights(), weights(is_causal=False)
every_implementation = pytest.mark.parametrize("implementation", ["reference", "xla"])


def assert_close(got, want, tolerance=1e-5):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def softmax_rows(scores, kept):
    """Softmax over what is kept, 0 in rows of nothing."""
    e = np.where(kept, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def dense_scores(scale=H**-0.5):
    return scale * np.einsum("btnh,bsnh->bnts", Q.astype(np.float64), np.repeat(KEY, N // K, axis=2))


def read(attention_weights, value=VALUE):
    return np.einsum("bnts,bsnv->btnv", attention_weights, np.repeat(value, N // K, axis=2))


def mean_so_far(value=VALUE):
    mean = value.cumsum(axis=1) / np.arange(1, T + 1)[:, None, None]
    return np.repeat(mean, N // K, axis=2)


def cell_of(count, width, cells):
    """Spec formula in exact integers."""
    return min(max(((2 * count - 1) * cells * 10_000 - 2 * width) // (20_000 * width), 0), cells - 1)


# The parts of the estimate


def test_directions_are_orthogonal_in_blocks_and_as_long_as_normal_vectors():
    make = jax.jit(performer_projection, static_argnums=(1, 2))
    projection = np.asarray(make(jax.random.key(3), 4002, H), np.float64)
    for start in (0, 15, 3995):
        products = projection[start : start + H] @ projection[start : start + H].T
        np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-5)
    lengths = np.linalg.norm(projection, axis=1) ** 2
    np.testing.assert_allclose([lengths.mean(), lengths.var()], [H, 2 * H], rtol=0.1)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_context_is_the_average_that_features_weigh(is_causal):
    """Padded keys count where the order is not causal."""
    projection = RNG.standard_normal((11, H))
    d_query, d_key = (H**-0.25 * x.astype(np.float64) @ projection.T for x in (Q, KEY))
    if is_causal:
        phi_query, phi_key = np.maximum(d_query, 0) + 1e-3, np.maximum(d_key, 0) + 1e-3
        allowed = np.tri(T)[None, None] * MASK
    else:
        h_query, h_key = (np.sum(x.astype(np.float64) ** 2, axis=-1, keepdims=True) * H**-0.5 / 2 for x in (Q, KEY))
        phi_query = np.exp(d_query - h_query - d_query.max(axis=-1, keepdims=True)) + 1e-4
        phi_key = np.exp(d_key - h_key - d_key.max(axis=(1, 3), keepdims=True)) + 1e-4
        allowed = 1
    a = allowed * np.einsum("btnm,bsnm->bnts", phi_query, np.repeat(phi_key, N // K, axis=2))
    total = a.sum(axis=-1) + (1e-6 * phi_query.sum(axis=-1).swapaxes(1, 2) if is_causal else 0)
    context = jax.jit(functools.partial(performer_context, is_causal=is_causal))
    got, _ = context(Q, KEY, VALUE, projection.astype(np.float32), REAL)
    assert_close(got, read(a / total[..., None]))


@pytest.mark.parametrize("real", [T, 9, 1])
def test_positions_are_shared_by_two_channels(real):
    codes = np.asarray(two_way_positions(np.arange(T)[None] < real, 6))[0, :real]
    place = np.arange(real) / max(real - 1, 1) * 5
    assert_close(codes.sum(axis=1), np.ones(real))
    assert_close(codes @ np.arange(6), place)
    assert ((codes > 1e-6).sum(axis=1) <= 2).all()


def convolve(x, kernel, bias, rows, columns, step=1):
    """x [R, W, C]: a sum over taps, rows at offsets `rows` and columns at offsets `columns`."""
    out = np.zeros((len(range(0, len(x), step)), x.shape[1], kernel.shape[-1])) + bias
    for i, t in enumerate(range(0, len(x), step)):
        for c in range(x.shape[1]):
            for a, row in enumerate(rows):
                for b, column in enumerate(columns):
                    if 0 <= t + row < len(x) and 0 <= c + column < x.shape[1]:
                        out[i, c] += x[t + row, c + column] @ kernel[a, b]
    return out


def norm(x, layer):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * layer.scale + layer.bias


@pytest.mark.parametrize("rows", [1, 11])
def test_the_causal_network_is_its_layers(rows):
    narrow = weights(predictor_length=16).cnn
    cnn = jax.tree.map(lambda x: np.asarray(x, np.float64), narrow)
    image = np.random.default_rng(2).standard_normal((1, rows, 2 * N, 4)).astype(np.float32)
    x = norm(image[0].astype(np.float64), cnn.norm).swapaxes(1, 2)
    for layer in (cnn.first, cnn.second):
        x = np.maximum(convolve(x, *layer, (-4, -2, 0), (-2, 0, 2)), 0)
    x = np.pad(np.repeat(x, 4, axis=1) @ cnn.last.kernel[0, 0], ((0, 0), (1, 1), (0, 0))) + cnn.last.bias
    pooled = [x[:, i * 18 // 16 : -(-(i + 1) * 18 // 16)].mean(axis=1) for i in range(16)]
    want = norm(np.stack(pooled, axis=-1), cnn.last_norm)
    got, _ = jax.jit(causal_cnn)(image, narrow, np.arange(rows)[None])
    assert_close(got[0], want.swapaxes(0, 1))


def test_the_causal_network_does_not_look_over_the_edge_of_a_sequence():
    image = np.random.default_rng(2).standard_normal((1, 13, 2 * N, 2)).astype(np.float32)
    run = jax.jit(lambda image, position: causal_cnn(image, CAUSAL.cnn, position)[0])
    both = run(image, np.concatenate([np.arange(6), np.arange(7)])[None])
    alone = [run(part, np.arange(part.shape[1])[None]) for part in (image[:, :6], image[:, 6:])]
    assert_close(both, np.concatenate(alone, axis=2))


@pytest.mark.parametrize("rows", [1, 11, 12])
def test_the_two_way_network_is_its_layers(rows):
    image = np.random.default_rng(2).standard_normal((1, rows, 4 * N, 4)).astype(np.float32)
    cnn = jax.tree.map(lambda x: np.asarray(x, np.float64), TWO_WAY.cnn)
    near = (-1, 0, 1)
    x = np.maximum(convolve(image[0].swapaxes(1, 2).astype(np.float64), *cnn.first, near, near, step=2), 0)
    x = np.maximum(convolve(x, *cnn.second, near, near), 0)
    x = convolve(np.repeat(x, 2, axis=0), *cnn.last, near, near)

    def resized(x, size):
        place = np.clip((np.arange(size) + 0.5) * len(x) / size - 0.5, 0, len(x) - 1)
        low = np.floor(place).astype(int)
        share = (place - low)[:, None, None]
        return (1 - share) * x[low] + share * x[np.minimum(low + 1, len(x) - 1)]

    want = resized(resized(x, rows).swapaxes(0, 1), 8)
    assert_close(jax.jit(two_way_cnn)(image, TWO_WAY.cnn)[0], want.transpose(2, 1, 0))


def test_gelu_is_exact_inside_shard_map_too():
    x = np.linspace(-9, 9, 4000, dtype=np.float32)
    want = [a * 0.5 * math.erfc(-a / math.sqrt(2)) for a in x.astype(np.float64)]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("data")

    def with_slope(run):
        return jax.jit(lambda x: (run(x), jax.grad(lambda x: jnp.sum(run(x) * jnp.cos(x)))(x)))(x)

    out, slope = with_slope(gelu)
    out_inside, slope_inside = with_slope(jax.shard_map(gelu, mesh=mesh, in_specs=spec, out_specs=spec))
    for got in (out, out_inside):
        np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(slope_inside, slope, atol=4e-6)


# Selection


@pytest.mark.parametrize("cells", [1, 8, 12, 256])
@pytest.mark.parametrize("widths", [range(1, 40), (1000, 5000, 5001, 12_345, 200_003)], ids=["short", "long"])
def test_cells_are_the_formula_and_starts_are_their_inverse(widths, cells):
    """Where 2 w > 10^4 a remainder may be less than 1e-4 and not 0."""
    counts = sorted({w * i // 500 for w in widths for i in range(501)} | set(range(1, min(widths[-1], 100))))
    rows = np.array([widths], np.int32)
    reach = Reach(np.array([counts], np.int32), np.zeros_like(rows), rows, np.zeros_like(rows))
    cell, allowed = map(np.asarray, cells_of_keys(reach, cells=cells))
    starts = np.asarray(starts_of_cells(rows, cells=cells))[0]
    for row, width in enumerate(widths):
        seen = np.array([c for c in counts if 0 < c <= width])
        np.testing.assert_array_equal(allowed[0, row], np.isin(counts, seen))
        want = [cell_of(int(c), width, cells) for c in seen]
        np.testing.assert_array_equal(cell[0, row][allowed[0, row]], want)
        assert (starts[row][0], starts[row][-1]) == (0, width)
        np.testing.assert_array_equal(np.searchsorted(starts[row], seen, side="left") - 1, want)


def test_a_causal_cell_is_a_range_that_grows_and_padding_is_skipped():
    reach = reach_of(None, Q, is_causal=True)
    cell, allowed = cells_of_keys(reach, cells=L)
    np.testing.assert_array_equal(allowed[0], np.tri(T, dtype=bool))
    assert (np.diff(np.where(allowed, cell, 99)[0, -1]) >= 0).all()
    real = np.arange(T) % 3 != 1
    padded = reach_of(real[None], Q[:1], is_causal=True)
    cell, allowed = map(np.asarray, cells_of_keys(padded, cells=L))
    np.testing.assert_array_equal(allowed[0], np.tri(T, dtype=bool) & real)
    seen = np.flatnonzero(real[:20])
    want = [cell_of(c + 1, len(seen), L) for c in range(len(seen))]
    np.testing.assert_array_equal(cell[0, 19, seen], want)
    values = RNG.standard_normal((1, N, T, L))
    got = np.asarray(jax.jit(sea_interpolate)(values, padded, -9.0))
    np.testing.assert_array_equal(got[:, :, 19, seen], values[:, :, 19, want].astype(np.float32))
    assert (got[:, :, 19, ~np.isin(np.arange(T), seen)] == -9).all()


@pytest.mark.parametrize("k_flatten_dim", ["query", "head", "batch", "causal_batch"])
@pytest.mark.parametrize(("k_budget", "k_oversample"), [(2.5, 1.0), (3, 2.0), (1000, 1.0), (0.01, 1.0)])
def test_the_largest_cells_are_kept_the_first_of_equal_ones(k_flatten_dim, k_budget, k_oversample):
    # Few different numbers: nearly every choice is among equals.
    p = np.random.default_rng(3).integers(0, 5, (B, N, T, L)).astype(np.float32)
    lengths = np.random.default_rng(4).integers(1, T + 1, (B, T))
    options = {"k_budget": k_budget, "k_flatten_dim": k_flatten_dim, "k_oversample": k_oversample}
    got = np.asarray(select(p, lengths, REAL, **options))
    want = np.zeros_like(got)

    def choose(where, budget):
        flat = p[where].reshape(-1)
        count = min(max(int(np.rint(budget)), 1), flat.size)
        chosen = np.zeros(flat.size, bool)
        chosen[np.argsort(-flat, kind="stable")[:count]] = True
        want[where] = chosen.reshape(want[where].shape)

    budget = k_budget * k_oversample * L
    for b in range(B):
        if k_flatten_dim == "batch":
            choose((b,), N * budget)
        for n in range(N):
            if k_flatten_dim == "head":
                choose((b, n), budget)
            if k_flatten_dim == "query":
                for t in range(T):
                    choose((b, n, t), budget / lengths[b, t])
        if k_flatten_dim == "causal_batch":
            for t in range(T):
                choose((b, slice(None), t), N * budget / lengths[b, t])
    if k_flatten_dim in ("query", "causal_batch"):
        want &= REAL[:, None, :, None]
    np.testing.assert_array_equal(got, want)


def test_halves_are_rounded_to_even():
    p, options = np.zeros((1, 1, 4, 10), np.float32), {"k_flatten_dim": "query"}
    got = select(p, np.full((1, 4), 4), k_budget=1.0, **options)
    np.testing.assert_array_equal(got.sum(axis=-1)[0, 0], [2] * 4)
    got = select(p, np.full((1, 4), 4), k_budget=1.4, **options)
    np.testing.assert_array_equal(got.sum(axis=-1)[0, 0], [4] * 4)


def test_one_dominant_cell_keeps_its_range_of_columns():
    p = np.full((1, 1, T, L), 0.01, np.float32)
    planted = RNG.integers(0, L, T)
    p[0, 0, np.arange(T), planted] = 0.9
    reach = reach_of(None, Q[:1], is_causal=True)
    cells = select(p, np.arange(1, T + 1)[None], k_budget=0.1)
    kept = np.asarray(keys_of_cells(cells, reach, 0.1, 1.0))[0, 0]
    for t in range(T):
        want = [j <= t and cell_of(j + 1, t + 1, L) == planted[t] for j in range(T)]
        np.testing.assert_array_equal(kept[t], want)


def test_about_k_keys_are_kept():
    k, length = 4, 64
    query, key, value = (
        np.random.default_rng(i).standard_normal((1, length, 4, 8)).astype(np.float32) for i in range(3)
    )
    params = weights(num_heads=4, head_dim=8, value_dim=8, predictor_length=16)
    _, made = attention(query, key, value, params, k_budget=k, return_intermediates=True)
    kept = np.asarray(keys_of_cells(made.cells, reach_of(None, query, is_causal=True), k, 1.0))
    by_row = kept.sum(axis=(0, 1, 3)) / 4
    assert abs(by_row[2 * k :].mean() - k) < 0.35 * k
    np.testing.assert_array_equal(by_row[:3], [1, 2, 3])


# The op


@pytest.mark.parametrize(("implementation", "scale"), [("reference", 1.3), ("xla", 0.0)])
def test_with_room_for_all_keys_the_sparse_part_is_softmax_attention(implementation, scale):
    options = {"scale": scale, "implementation": implementation, "return_intermediates": True}
    out, made = attention(Q, KEY, VALUE, CAUSAL, k_budget=T, **options)
    of_sparse, whole = np.moveaxis(sigmoid(made.gates), -1, 0)[..., None]
    softmax = read(softmax_rows(dense_scores(scale), np.tri(T, dtype=bool)))
    assert_close(out, whole * of_sparse * softmax + (1 - whole) * mean_so_far())


@pytest.mark.parametrize(
    ("k_flatten_dim", "real"),
    [(None, REAL), ("head", REAL), ("causal_batch", REAL), ("query", np.arange(T) == np.array([[0], [3]]))],
    ids=["batch", "head", "causal_batch", "one-key"],
)
def test_the_two_way_op_is_its_definition(k_flatten_dim, real):
    options: dict[str, Any] = {"is_causal": False, "k_flatten_dim": k_flatten_dim, "return_intermediates": True}
    out, made = attention(Q, KEY, VALUE, TWO_WAY, real[:, None, None], k_budget=3, **options)
    p = np.asarray(jax.nn.softmax(made.estimate, axis=-1) * real[:, None, :, None], np.float64)
    kept = np.zeros((B, N, T, T), bool)
    average = np.zeros((B, 1, N, V))
    for b in range(B):
        columns = np.flatnonzero(real[b])
        cell = [cell_of(c + 1, len(columns), L) for c in range(len(columns))]
        kept[b][:, :, columns] = np.asarray(made.cells)[b][:, :, cell]
        average[b, 0] = np.einsum(
            "nc,cnv->nv", p[b].mean(axis=1)[:, cell], np.repeat(VALUE, N // K, axis=2)[b, columns]
        )
    of_sparse, whole = np.moveaxis(sigmoid(made.gates), -1, 0)[..., None]
    assert_close(out, whole * of_sparse * read(softmax_rows(dense_scores(), kept)) + (1 - whole) * average)


WAYS = {
    "plain": ({}, {}),
    "padded": ({"keep": np.arange(T) % 4 != np.array([[1], [2]])}, {}),
    "packed": ({"segment_ids": SEGMENTS}, {}),
    "oversample": ({}, {"k_oversample": 2.0}),
    "query": ({}, {"k_flatten_dim": "query"}),
}


@pytest.mark.parametrize(
    ("way", "cells", "entries"),
    [
        *((way, 8, 250) for way in WAYS),
        *((way, 1, None) for way in ("packed", "query")),
        *((way, 64, None) for way in ("padded", "oversample")),
    ],
)
def test_gathering_is_the_dense_form_in_one_block_of_rows_or_many(monkeypatch, way, cells, entries):
    seen, options = WAYS[way]
    selection = {"k_budget": 2, "k_flatten_dim": "causal_batch", "k_oversample": 1.0, **options}
    if entries is not None:
        monkeypatch.setattr(sea_sparse, "ENTRIES", entries)

    @jax.jit
    def every_form(p):
        reach = token_reach(seen.get("keep"), Q, is_causal=True, segment_ids=seen.get("segment_ids"))
        lengths = positions_in_segments(seen.get("segment_ids"), Q) + 1
        chosen = sea_select(p, lengths, seen.get("keep"), **selection)
        options = {"scale": 0.7, "is_padded": "keep" in seen, **selection}
        sparse = (run(Q, KEY, VALUE, chosen, reach, **options) for run in (gathered_attention, dense_attention))
        return *sparse, kept_keys(chosen, reach, 2, selection["k_oversample"])

    p = np.random.default_rng(6).random((B, N, T, cells), np.float32)
    got, want, kept = map(np.asarray, every_form(p))
    assert_close(got, want, 1e-6)
    assert_close(want, read(softmax_rows(dense_scores(0.7), kept)))
    assert cells == 1 or 0 < kept.sum() < 0.7 * N * B * T * (T + 1) / 2


@pytest.mark.parametrize(("keys", "cells", "k"), [(23, 8, 3), (300, 8, 1), (300, 64, 5), (40, 64, 2)])
@pytest.mark.parametrize("together", [True, False])
def test_no_row_keeps_more_keys_than_its_list_has_room_for(keys, cells, k, together):
    """The worst case of every width: the cells that stand for most keys are kept."""
    most, starts = 0, np.asarray(starts_of_cells(np.arange(1, keys + 1, dtype=np.int32), cells=cells))
    for width in range(1, keys + 1):
        sizes = np.sort(np.diff(starts[width - 1]))[::-1]
        heads = np.sort(np.tile(sizes, N))[::-1] if together else sizes
        count = min(max(int(np.rint((N if together else 1) * k * cells / width)), 1), heads.size)
        most = max(most, int(heads[:count].sum()) * (1 if together else N))
    room = sea_sparse._capacity(k * cells, N, keys, cells, together=together)
    assert most <= room < 3 * most + N


def test_a_row_that_keeps_nothing_reads_its_average():
    """With more cells than keys a cell may have none; with one cell kept it is likely that a row keeps no key."""
    params = weights(predictor_length=64)
    out, made = attention(Q, KEY, VALUE, params, k_budget=0.01, k_flatten_dim="query", return_intermediates=True)
    kept = np.asarray(keys_of_cells(made.cells, reach_of(None, Q, is_causal=True), 0.01, 1.0))
    nothing = ~kept.any(axis=-1).swapaxes(1, 2)
    assert 0.2 < nothing[:, 1:].mean() < 0.99
    want = ((1 - sigmoid(made.gates[..., 1:])) * mean_so_far())[nothing]
    assert_close(np.asarray(out)[nothing], want)


@every_implementation
def test_later_tokens_change_nothing(implementation):
    run = functools.partial(attention, k_budget=3, implementation=implementation)
    want = run(Q, KEY, VALUE, CAUSAL)
    for t in (0, 7, T - 2):
        spoilt = [np.where((np.arange(T) > t)[:, None, None], -7.0, x).astype(np.float32) for x in (Q, KEY, VALUE)]
        got = run(*spoilt, CAUSAL)
        np.testing.assert_allclose(got[:, : t + 1], want[:, : t + 1], atol=1e-6)
        assert not np.allclose(got[:, t + 1 :], want[:, t + 1 :], atol=1e-2)


@functools.cache
def slopes(implementation):
    """Of what real tokens read, by query, key, value and weights."""

    def of(query, key, value, params):
        out = sea_attention(query, key, value, params, MASK, k_budget=2, implementation=implementation)
        return jnp.sum(jnp.where(REAL[:, :, None, None], out, 0) ** 2)

    found = jax.jit(jax.grad(of, argnums=(0, 1, 2, 3)))(Q, KEY, VALUE, CAUSAL)
    return jax.tree.map(np.asarray, found)


def test_the_estimate_learns_by_gates_and_average_but_not_by_the_selection():
    *_, found = slopes("xla")
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((found.cnn, found.rows)))
    assert all(np.any(leaf) for leaf in jax.tree.leaves((found.gates, found.encoder, found.positions)))
    # Without an order the average is weighed by the estimate; whose last bias moves all logits of a head alike.
    op = functools.partial(sea_attention, k_budget=2, is_causal=False)
    found = jax.jit(jax.grad(lambda params: jnp.sum(op(Q, KEY, VALUE, params) ** 2)))(TWO_WAY)
    assert all(np.any(leaf) for leaf in jax.tree.leaves((found.cnn, found.rows, found.gates)))


@every_implementation
def test_no_gradient_of_a_padded_or_an_unread_token(implementation):
    for leaf in slopes(implementation)[:3]:
        assert np.isfinite(leaf).all()
        assert not np.any(leaf[~REAL])
        assert np.any(leaf[REAL], axis=(1, 2)).all()


# A few tokens at a time


def test_any_split_gives_the_whole_packed_and_with_other_options():
    options = {"k_budget": 2, "k_oversample": 2.0, "k_flatten_dim": "query", "scale": 0.7}
    want = attention(Q, KEY, VALUE, CAUSAL, segment_ids=SEGMENTS, **options)
    state, outs = init_sea_state(CAUSAL, B, T + 5, num_kv_heads=K), []
    for start, stop in ((0, 7), (7, 16), (16, T)):
        part = [x[:, start:stop] for x in (Q, KEY, VALUE)]
        out, state = carry_on(*part, CAUSAL, state, segment_ids=SEGMENTS[:, start:stop], **options)
        outs.append(out)
    assert_close(np.concatenate(outs, axis=1), want, 2e-6)


def test_single_steps_give_the_whole_and_a_state_of_bfloat16_keeps_its_dtypes():
    want = attention(Q, KEY, VALUE, CAUSAL, k_budget=2)
    step = jax.jit(functools.partial(sea_step, k_budget=2))
    state, outs = init_sea_state(CAUSAL, B, T, num_kv_heads=K), []
    for t in range(T):
        out, state = step(Q[:, t], KEY[:, t], VALUE[:, t], CAUSAL, state)
        outs.append(out)
    assert_close(np.stack(outs, axis=1), want, 2e-6)
    state = init_sea_state(CAUSAL, B, T, num_kv_heads=K, dtype=jnp.bfloat16)
    _, after = step(*(x[:, 0].astype(jnp.bfloat16) for x in (Q, KEY, VALUE)), CAUSAL, state)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == kinds
    assert {x.dtype for x in jax.tree.leaves(state.estimator)} == {jnp.dtype(jnp.float32)}


# The loss


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_loss_is_its_terms_and_moves_every_weight_but_not_the_teacher(is_causal):
    teacher, target = RNG.standard_normal((B, N, T, T)).astype(np.float32), np.repeat(VALUE, N // K, axis=2)
    params, mask = (CAUSAL, None) if is_causal else (TWO_WAY, MASK)
    options = {"k_budget": 3, "is_causal": is_causal}
    loss = functools.partial(sea_distillation_loss, **options)
    both = jax.jit(jax.value_and_grad(loss, argnums=(4, 3) if is_causal else (4,)))
    got, (of_teacher, *of_weights) = both(Q, KEY, VALUE, params, teacher, target, mask)
    out, made = attention(Q, KEY, VALUE, params, mask, return_intermediates=True, **options)
    allowed = np.broadcast_to(np.tri(T, dtype=bool) if is_causal else REAL[:, None, None, :], (B, N, T, T))
    est = np.zeros((B, N, T, T))
    for b, t in np.ndindex(B, T):
        columns = np.flatnonzero(allowed[b, 0, t])
        cell = [cell_of(c + 1, len(columns), L) for c in range(len(columns))]
        est[b][:, t, columns] = np.asarray(made.estimate)[b][:, t, cell]
    want = np.mean((out - target) ** 2)
    a = softmax_rows(teacher.astype(np.float64), allowed)
    for logits in (est, dense_scores()):
        student = softmax_rows(logits, allowed)
        pairs = allowed if is_causal else allowed & REAL[:, None, :, None]
        ratio = np.where(pairs, a / np.where(student == 0, 1, student), 1)
        divergence = np.sum(np.where(pairs, a * np.log(np.where(ratio == 0, 1, ratio)), 0))
        want += 0.1 * divergence / (B * N * T if is_causal else REAL.sum()) + np.mean((student - a) ** 2)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert not np.any(of_teacher)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_weights))


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": KEY[:, 1:]}, ValueError, r"key: expected \[B, T, K, H\] with T = 23 as in query"),
        (
            {"key": KEY[:, :, :1].repeat(4, 2), "value": VALUE[:, :, :1].repeat(4, 2)},
            ValueError,
            "query: 6 heads cannot",
        ),
        ({"value": VALUE.astype(np.float16)}, TypeError, "value: expected dtype float32 as in query, got float16"),
        ({"params": None}, TypeError, "params: expected SEAParams, got NoneType; see init_sea_params"),
        ({"params": TWO_WAY}, TypeError, "params.cnn: expected CausalCNN where is_causal=True, got TwoWayCNN"),
        ({"is_causal": False}, TypeError, "params.cnn: expected TwoWayCNN where is_causal=False, got CausalCNN"),
        ({"params": weights(value_dim=5)}, ValueError, r"params.encoder.kernel: expected \[E, D\] with E = 19"),
        ({"params": weights(num_heads=3)}, ValueError, r"params.cnn.first.kernel: expected \[3, 3, C, C\] with C = 12"),
        (
            {"params": weights(max_length=22)},
            ValueError,
            "params.positions: a table of 22 positions is too short for 23",
        ),
        ({"params": CAUSAL._replace(positions=None)}, ValueError, "params.positions: is_causal=True needs a table"),
        ({"params": TWO_WAY._replace(positions=CAUSAL.positions), "is_causal": False}, ValueError, "has no use for"),
        ({"mask": REAL}, ValueError, "mask: expected the shape"),
        ({"k_budget": 0}, ValueError, "k_budget: expected a positive number of keys, got 0"),
        ({"k_budget": "7"}, TypeError, "k_budget: expected a Python number, got str"),
        ({"k_flatten_dim": "token"}, ValueError, "k_flatten_dim: expected one of 'query', 'head', 'batch'"),
        ({"k_flatten_dim": "batch"}, ValueError, "k_flatten_dim: 'batch' lets a row compete with later ones"),
        ({"k_oversample": 0.5}, ValueError, "k_oversample: expected at least 1, got 0.5"),
        ({"segment_ids": SEGMENTS[:, ::-1]}, ValueError, "segment_ids: expected numbers that never decrease"),
        ({"is_causal": 1}, TypeError, "is_causal: expected a static True or False, got int"),
        (
            {"implementation": "pallas"},
            NotImplementedError,
            "implementation: pallas_tpu, pallas_gpu of linear_attention runs on",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_wrong_argument_is_named(change, error, message):
    good = {"query": Q, "key": KEY, "value": VALUE, "params": CAUSAL, "k_budget": 3}
    with pytest.raises(error, match=message):
        sea_attention(**(good | change))


def test_other_refusals():
    two_way = {"params": TWO_WAY, "k_budget": 3, "is_causal": False}
    run = functools.partial(sea_attention, implementation="xla", **two_way)
    with pytest.raises(ValueError, match="segment_ids: packed sequences need is_causal=True"):
        sea_attention(Q, KEY, VALUE, segment_ids=SEGMENTS, **two_way)
    with pytest.raises(NotImplementedError, match="xla: with k_flatten_dim='batch' rows compete for cells"):
        jax.eval_shape(run, Q, KEY, VALUE)
    with pytest.raises(TypeError, match="state: expected a SEAState, got NoneType; start from init_sea_state"):
        sea_continue(Q, KEY, VALUE, CAUSAL, None, k_budget=3)
    with pytest.raises(TypeError, match="params: expected SEAParams of a causal layer"):
        init_sea_state(TWO_WAY, 1, 3)
    for options, message in (
        ({"predictor_length": 6}, "predictor_length: expected a multiple of 4 where is_causal=True, got 6"),
        ({"feature_factor": 0}, "feature_factor: expected a positive number, got 0"),
        ({"num_heads": 0}, "num_heads: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            init_sea_params(jax.random.key(0), **{"num_heads": 2, "head_dim": 4, **options})
    with pytest.raises(ValueError, match=r"teacher_logits: expected \[B, N, T, T\] with T = 23"):
        # Before the attention is made, for which weights are missing here.
        sea_distillation_loss(Q, KEY, VALUE, None, np.zeros((B, N, T, T - 1), np.float32), VALUE, k_budget=3)


def test_weights_start_as_the_released_code_starts_them():
    start = functools.partial(init_sea_params, num_heads=8, head_dim=16, predictor_length=64, feature_factor=2)
    params = jax.tree.map(np.asarray, jax.jit(start)(jax.random.key(0)))
    assert params.projection.shape == (int(16 * math.log(16) / 2), 16)
    for layer, fan_in in ((params.encoder, 48), (params.cnn.first, 9 * 16), (params.cnn.last, 16), (params.rows, 32)):
        assert 0.9 * fan_in**-0.5 < np.abs(layer.kernel).max() <= fan_in**-0.5
        assert np.abs(layer.bias).max() <= fan_in**-0.5
    np.testing.assert_allclose(params.positions.std(), 1, rtol=0.05)
    np.testing.assert_array_equal(params.cnn.last_norm.scale, np.ones(64))


def test_the_entry_names_what_exists():
    entry = catalog.get("sea")
    assert entry in catalog.WEIGHTED
    assert entry.load_op() is jattn.sea_attention is sea_attention
    assert catalog.load(entry.step) is jattn.sea_step
