"""Hedgehog's feature maps, attention and distillation against their definitions."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.dot_product import dot_product_attention
from jattn.linear.arguments import LinearState
from jattn.linear.distillation import attention_distillation_loss
from jattn.linear.hedgehog import hedgehog_attention, hedgehog_attention_step, hedgehog_feature_map

B, T, N, K, H, V, F = 2, 13, 6, 3, 5, 7, 11
RNG = np.random.default_rng(0)
Q, KEY, VALUE = (RNG.standard_normal(shape).astype(np.float32) for shape in ((B, T, N, H), (B, T, K, H), (B, T, K, V)))
W_QUERY, W_KEY, W_KEYS = (RNG.standard_normal((heads, H, F)).astype(np.float32) for heads in (N, K, N))
B_QUERY, B_KEY = (RNG.standard_normal((heads, F)).astype(np.float32) for heads in (N, K))
SEGMENTS = np.repeat([[1, 1, 2], [4, 6, 9]], [5, 1, 7], axis=1).astype(np.int32)
ACTIVATIONS = ("exp", "softmax_dim", "exp_dim", "softmax_joint")
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
# One map of keys for every key head, or one for every query head.
every_map = pytest.mark.parametrize("key_weight", [W_KEY, W_KEYS], ids=["by-key-head", "by-query-head"])
# Compiled: operation by operation, most of the time would go into compiling.
attend = jax.jit(hedgehog_attention, static_argnames=("activation", "is_causal", "return_state"))
take_step = jax.jit(hedgehog_attention_step, static_argnames="activation")


def assert_close(got, want, tolerance=1e-5):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def phi(u, activation):
    if activation == "softmax_joint":
        return softmax(np.concatenate([2 * u, -2 * u], axis=-1))
    if activation == "exp":
        return np.exp(np.concatenate([u, -u], axis=-1))
    if activation == "softmax_dim":
        return np.concatenate([softmax(u), softmax(-u)], axis=-1)
    return np.concatenate([np.exp(u - u.max(-1, keepdims=True)), np.exp(u.min(-1, keepdims=True) - u)], axis=-1)


def student(key_weight=W_KEY, activation="softmax_dim", allowed=None, key_bias=None, query_bias=None):
    """The weights [B, N, T, T] in float64, all at once; rows that see nothing are 0."""
    key = np.repeat(KEY.astype(np.float64), len(key_weight) // K, axis=2)
    phi_q = phi(np.einsum("btnh,nhf->btnf", Q, W_QUERY) + (0 if query_bias is None else query_bias), activation)
    phi_k = phi(np.einsum("btnh,nhf->btnf", key, key_weight) + (0 if key_bias is None else key_bias), activation)
    scores = np.einsum("btnf,bsnf->bnts", phi_q, np.repeat(phi_k, N // phi_k.shape[2], axis=2))
    scores = np.where(np.tri(T, dtype=bool) if allowed is None else allowed, scores, 0)
    return scores / (scores.sum(axis=-1, keepdims=True) + 1e-12)


def read(weights):
    return np.einsum("bnts,bsnv->btnv", weights, np.repeat(VALUE, N // K, axis=2))


def same_segment():
    return (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])[:, None]


# The maps


@every_activation
@pytest.mark.parametrize("fullspace", [True, False])
def test_a_map_is_its_formula(activation, fullspace):
    got = hedgehog_feature_map(
        Q, W_QUERY, B_QUERY, activation=activation, fullspace=fullspace, temp=0.7, eps=0 if fullspace else 1e-12
    )
    want = phi(0.7 * (np.einsum("btnh,nhf->btnf", Q.astype(np.float64), W_QUERY) + B_QUERY), activation)
    assert_close(got, want if fullspace else want[..., :F], 1e-6)
    assert (np.asarray(got) > 0).all()


@every_activation
def test_two_maps_read_one_head_and_no_map_is_the_identity(activation):
    both = hedgehog_feature_map(KEY, W_KEYS, activation=activation)
    one = [hedgehog_feature_map(KEY, W_KEYS[first::2], activation=activation) for first in (0, 1)]
    assert_close(both, np.stack(one, axis=3).reshape(B, T, N, 2 * F), 1e-6)
    identity = np.broadcast_to(np.eye(H, dtype=np.float32), (K, H, H))
    plain = hedgehog_feature_map(KEY, activation=activation)
    assert_close(plain, hedgehog_feature_map(KEY, identity, activation=activation), 1e-6)
    assert_close(plain[:, 3], hedgehog_feature_map(KEY[:, 3], activation=activation), 1e-6)


def test_halves_of_softmax_dim_and_the_whole_of_softmax_joint_sum_to_one():
    halves = hedgehog_feature_map(Q, W_QUERY).reshape(B, T, N, 2, F)
    assert_close(halves.sum(axis=-1), np.ones((B, T, N, 2)), 1e-6)
    assert_close(hedgehog_feature_map(Q, W_QUERY, activation="softmax_joint").sum(axis=-1), np.ones((B, T, N)), 1e-6)
    halves = hedgehog_feature_map(Q, W_QUERY, activation="exp_dim").reshape(B, T, N, 2, F)
    np.testing.assert_array_equal(halves.max(axis=-1), 1)


@every_activation
def test_negation_swaps_the_halves(activation):
    there, back = (hedgehog_feature_map(sign * Q, W_QUERY, activation=activation) for sign in (1, -1))
    assert_close(jnp.roll(there, F, axis=-1), back, 1e-6)


@every_activation
def test_a_constant_added_to_all_channels_is_forgotten_by_the_maps_that_normalise_each_half(activation):
    there, shifted = (hedgehog_feature_map(Q, W_QUERY, B_QUERY + c, activation=activation) for c in (0, 1.5))
    if activation.endswith("_dim"):
        assert_close(shifted, there, 1e-5)
    else:
        assert np.abs(shifted - there).max() > 0.1


def test_the_least_feature():
    far = 100 * np.ones((1, 2), np.float32) * np.array([1, -1], np.float32)
    for activation in ("softmax_dim", "exp_dim"):
        assert hedgehog_feature_map(far, activation=activation).min() == np.float32(1e-12)
        assert hedgehog_feature_map(far, activation=activation, eps=1e-3).min() == np.float32(1e-3)
        assert hedgehog_feature_map(far.astype(np.float16), activation=activation).min() == 0
    assert hedgehog_feature_map(far, activation="softmax_joint").min() == 0
    assert np.isinf(hedgehog_feature_map(far, activation="exp").max())


# The attention


@every_map
@every_activation
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_attention_is_its_weights(key_weight, activation, is_causal):
    allowed = same_segment() & (np.tri(T, dtype=bool) | (not is_causal))
    run = functools.partial(attend, activation=activation, is_causal=is_causal, segment_ids=SEGMENTS)
    assert_close(run(Q, KEY, VALUE, W_QUERY, key_weight), read(student(key_weight, activation, allowed)))
    ones = run(Q, KEY, np.ones_like(VALUE), W_QUERY, key_weight)
    np.testing.assert_allclose(ones, 1, atol=1e-6)


@every_map
def test_padded_keys_have_no_features_and_a_row_of_them_gives_nothing(key_weight):
    real = np.arange(T) >= np.array([[2], [0]])
    mask = real[:, None, None, :]
    allowed = np.tri(T, dtype=bool) & mask

    def squares(value, weights):
        got = hedgehog_attention(Q, KEY, value, *weights, mask=mask, query_bias=B_QUERY)
        return jnp.sum(got**2), got

    run = jax.jit(jax.grad(squares, argnums=(0, 1), has_aux=True))
    gradient, got = run(VALUE, (W_QUERY, key_weight))
    assert_close(got, read(student(key_weight, allowed=allowed, query_bias=B_QUERY)))
    assert not np.any(got[0, :2])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not np.any(gradient[0][0, :2])


def test_one_token_is_its_value():
    first = (Q[:, :1], KEY[:, :1], VALUE[:, :1])
    np.testing.assert_allclose(attend(*first, W_QUERY, W_KEY), np.repeat(VALUE[:, :1], 2, 2), rtol=1e-6)


def test_keys_of_another_length():
    out = attend(Q[:, :4], KEY, VALUE, W_QUERY, W_KEY, is_causal=False)
    assert_close(out, read(student(allowed=np.ones((T, T), bool)))[:, :4])


@every_map
@every_activation
def test_a_split_and_single_steps_give_the_whole(key_weight, activation):
    options = {"query_bias": B_QUERY, "key_bias": np.resize(B_KEY, (len(key_weight), F)), "activation": activation}
    want = read(student(key_weight, activation, query_bias=B_QUERY, key_bias=options["key_bias"]))
    first, state = attend(Q[:, :6], KEY[:, :6], VALUE[:, :6], W_QUERY, key_weight, return_state=True, **options)
    assert state.S.shape == (B, len(key_weight), 2 * F, V)
    second, end = attend(
        Q[:, 6:], KEY[:, 6:], VALUE[:, 6:], W_QUERY, key_weight, initial_state=state, return_state=True, **options
    )
    assert_close(np.concatenate([first, second], axis=1), want)
    for t in range(6, T):
        out, state = take_step(Q[:, t], KEY[:, t], VALUE[:, t], state, W_QUERY, key_weight, **options)
        assert_close(out, want[:, t])
    jax.tree.map(assert_close, state, end)


def test_values_are_not_repeated_for_maps_of_query_heads():
    jaxpr = str(jax.make_jaxpr(functools.partial(hedgehog_attention, is_causal=False))(Q, KEY, VALUE, W_QUERY, W_KEYS))
    assert re.search(rf"f32\[{B},{T},{K},{V + 1}\]", jaxpr), "values beside the ones that sum the weights"
    assert not re.search(rf"f32\[{B},{T},({N}|{K},2|2,{K}),{V + 1}\] = (broadcast|concatenate)", jaxpr)


def test_bfloat16_maps_are_made_in_float32():
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (Q, KEY, VALUE)]
    wide = [x.astype(jnp.float32) for x in narrow]
    got = hedgehog_feature_map(narrow[0], W_QUERY)
    np.testing.assert_array_equal(got, hedgehog_feature_map(wide[0], W_QUERY).astype(jnp.bfloat16))
    out, want = (attend(*x, W_QUERY, W_KEY) for x in (narrow, wide))
    assert out.dtype == jnp.bfloat16
    assert np.sqrt(np.mean((out.astype(jnp.float32) - want) ** 2) / np.mean(want**2)) < 3 * 2**-8


# Closed forms


def test_exp_of_the_identity_is_a_sum_of_hyperbolic_cosines():
    query, key = (np.repeat(x, repeats, axis=2) for x, repeats in ((Q, 1), (KEY, N // K)))
    features = [hedgehog_feature_map(x, activation="exp") for x in (query, key)]
    products = jnp.einsum("btnf,bsnf->bnts", *features)
    total = np.moveaxis(query, 2, 1)[:, :, :, None] + np.moveaxis(key, 2, 1)[:, :, None]
    assert_close(products, 2 * np.cosh(total).sum(axis=-1), 1e-6)


def test_one_channel_is_monotone_and_spikier_than_elu():
    grid = np.linspace(-3, 3, 25, dtype=np.float32)[:, None, None]
    query = np.array([0.0, 1.0, 3.0], np.float32)[:, None, None]
    hedgehog = jnp.einsum("tnf,snf->ts", *(hedgehog_feature_map(x, activation="exp") for x in (query, grid)))
    elu = np.einsum("tnf,snf->ts", *(np.where(x > 0, x + 1, np.exp(x)) for x in (query, grid)))

    def entropy(scores):
        weights = np.asarray(scores) / np.asarray(scores).sum(axis=-1, keepdims=True)
        return -(weights * np.log(weights)).sum(axis=-1)

    for q, row in zip(query.ravel(), hedgehog, strict=True):
        assert (np.diff(row[grid.ravel() >= -q]) > 0).all()
    # At q = 0 keys of either sign look alike; the rest is spikier.
    assert (entropy(hedgehog) < entropy(elu))[1:].all()


# The distillation


def teacher(allowed):
    logits = np.einsum("btnh,bsnh->bnts", Q, np.repeat(KEY, N // K, axis=2)).astype(np.float64) * H**-0.5
    seen = allowed.any(axis=-1, keepdims=True)
    return np.where(seen, softmax(np.where(allowed | ~seen, logits, -np.inf)), 0)


# Every pair of two of the options.
@pytest.mark.parametrize(
    ("key_weight", "block_size", "is_causal"),
    [(W_KEY, 1, True), (W_KEYS, 1, False), (W_KEYS, 5, True), (W_KEY, 5, False), (W_KEY, 128, True),
     (W_KEYS, 128, False)],
    ids=lambda x: f"{len(x)}-maps" if isinstance(x, np.ndarray) else None,
)  # fmt: skip
def test_the_loss_is_the_mean_over_rows_that_see_something(key_weight, block_size, is_causal):
    mask = (np.arange(T) >= np.array([[6], [0]]))[:, None, None, :]
    allowed = np.broadcast_to(mask & same_segment() & (np.tri(T, dtype=bool) | (not is_causal)), (B, N, T, T))
    true, pred = teacher(allowed), student(key_weight, "exp_dim", allowed, query_bias=B_QUERY)
    rows = allowed.any(axis=-1).sum()
    assert rows < B * N * T
    xent = -(true * np.log(np.maximum(pred, 1e-12))).sum() / rows
    mse = ((read(pred) - read(true)) ** 2).sum() / rows / V
    loss = functools.partial(
        attention_distillation_loss,
        *(Q, KEY, VALUE, W_QUERY, key_weight, mask),
        query_bias=B_QUERY,
        activation="exp_dim",
        is_causal=is_causal,
        segment_ids=SEGMENTS,
        block_size=block_size,
    )
    factors = ({}, {"xent_factor": 0.0, "mse_factor": 1.0}, {"xent_factor": 0.5, "mse_factor": 30.0})
    got = jax.jit(lambda: [loss(**given) for given in factors])()
    for one, wanted in zip(got, (xent, mse, 0.5 * xent + 30 * mse), strict=True):
        assert_close(one, wanted)


def test_the_teacher_is_softmax_attention_with_its_own_scale():
    one_hot = np.broadcast_to(np.eye(T, dtype=np.float32)[:, None], (B, T, K, T))
    for scale in (None, 0.3):
        softmax_attention = jax.jit(functools.partial(dot_product_attention, is_causal=True, scale=scale))
        true = np.moveaxis(np.asarray(softmax_attention(Q, KEY, one_hot)), 1, 2)
        xent = -(true * np.log(np.maximum(student(), 1e-12))).sum(-1).mean()
        loss = jax.jit(functools.partial(attention_distillation_loss, scale=scale))
        assert_close(loss(Q, KEY, VALUE, W_QUERY, W_KEY), xent)


def test_gradients_reach_the_maps_alone_and_are_those_of_finite_differences():
    def loss(x):
        return attention_distillation_loss(
            *(x[name] for name in ("query", "key", "value", "query_weight", "key_weight")),
            query_bias=x["query_bias"],
            key_bias=x["key_bias"],
            mse_factor=3.0,
            block_size=5,
        )

    with jax.enable_x64(True):
        x = {"query": Q, "key": KEY, "value": VALUE, "query_weight": W_QUERY, "key_weight": W_KEY}
        x |= {"query_bias": B_QUERY, "key_bias": B_KEY}
        x = {name: jnp.asarray(array, jnp.float64) for name, array in x.items()}
        run = jax.jit(loss)
        gradient = jax.jit(jax.grad(loss))(x)
        for name in x:
            if name in ("query", "key", "value"):
                assert not np.any(gradient[name]), name
                continue
            direction = np.random.default_rng(1).standard_normal(x[name].shape)
            ends = [run({**x, name: x[name] + sign * 1e-6 * direction}) for sign in (1, -1)]
            got = np.sum(np.asarray(gradient[name]) * direction)
            assert abs(got - (ends[0] - ends[1]) / 2e-6) <= 1e-7 * np.linalg.norm(gradient[name]), name
            assert abs(got) > 1e-4


def test_the_loss_never_holds_all_weights():
    temp = {}
    for length in (1024, 4096):
        x = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (2, 1, 1)]
        maps = [jax.ShapeDtypeStruct((heads, 8, 8), jnp.float32) for heads in (2, 1)]
        loss = functools.partial(attention_distillation_loss, mse_factor=1.0, block_size=64)
        compiled = jax.jit(jax.grad(loss, argnums=(3, 4))).lower(*x, *maps).compile()
        temp[length] = compiled.memory_analysis().temp_size_in_bytes
        sizes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
        assert max(math.prod(map(int, size.split(","))) for size in sizes) <= 2 * 64 * length < length**2
    assert temp[4096] <= 4.5 * temp[1024]


# What is refused

GOOD: dict[str, Any] = {"query": Q, "key": KEY, "value": VALUE, "query_weight": W_QUERY, "key_weight": W_KEY}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_weight": W_KEY}, ValueError, r"query_weight: expected \[N, H, F\] with N = 6 .*, got \(3, 5, 11\)"),
        ({"query_weight": W_QUERY[:, :4]}, ValueError, r"query_weight: .* with H = 5"),
        (
            {"key_weight": W_KEY[:2]},
            ValueError,
            r"key_weight: .* M = 3, a map for every key head, or 6, .*, got \(2, 5",
        ),
        ({"key_weight": W_KEY[..., :7]}, ValueError, r"key_weight: .* with F = 11 as in query_weight, got \(3, 5, 7\)"),
        ({"key_weight": W_KEY[0]}, ValueError, r"key_weight: expected 3 dimensions \[M, H, F\]"),
        ({"query_weight": None}, ValueError, "key_weight: expected F = H = 5, as query_weight is left out"),
        ({"key_weight": None}, ValueError, "query_weight: expected F = H = 5, as key_weight is left out"),
        ({"key_bias": B_QUERY}, ValueError, r"key_bias: expected \[M, F\] with M = 3 as in key_weight, got \(6, 11\)"),
        ({"query_bias": B_QUERY.astype(int)}, TypeError, "query_bias: expected a floating dtype, got int64"),
        ({"query_weight": W_QUERY.tolist()}, TypeError, "query_weight: expected an array, got list"),
        ({"key_weight": W_KEY[..., :0], "query_weight": W_QUERY[..., :0]}, ValueError, "dimension F is 0"),
        ({"activation": "relu"}, ValueError, "activation: expected one of 'exp', 'softmax_dim', 'exp_dim', 'softmax_j"),
        ({"key": KEY.astype(np.float16)}, TypeError, "key: expected dtype float32 as in query"),
        ({"query": Q[:, :, :4]}, ValueError, "query: 4 heads cannot be shared by 3"),
        ({"eps": -1.0}, ValueError, "eps: expected at least 0"),
        ({"segment_ids": SEGMENTS[:, ::-1]}, ValueError, "segment_ids: expected numbers that never decrease"),
        ({"mask": np.ones((B, 1, T, T), bool)}, ValueError, r"mask: expected the shape \(2, 1, 1, 13\)"),
        ({"is_causal": "yes"}, TypeError, "is_causal: expected a static True or False"),
    ],
)
@pytest.mark.parametrize("op", [hedgehog_attention, attention_distillation_loss])
def test_errors_name_the_argument(op, change, error, message):
    with pytest.raises(error, match=message):
        op(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        (hedgehog_attention, {"initial_state": LinearState(jnp.zeros((B, K, H, V)), jnp.zeros((B, K, H)))}, ValueError,
         r"initial_state.S: .*, got \(2, 3, 5, 7\)"),
        (hedgehog_attention, {"initial_state": LinearState(jnp.zeros((B, K, 2 * F, V)), None)}, ValueError,
         "initial_state.z: normalize=True needs"),
        (hedgehog_attention, {"query": Q[:, :5]}, ValueError, "is_causal: .* got 5 queries and 13 keys"),
        (attention_distillation_loss, {"query": Q[:, :5]}, ValueError, "is_causal: with 5 queries and 13 keys"),
        (attention_distillation_loss, {"query": Q[:, :5], "is_causal": False, "segment_ids": SEGMENTS[:, :5]},
         ValueError, "segment_ids: needs a key for every query, got 5 queries and 13 keys"),
        (attention_distillation_loss, {"xent_factor": -1}, ValueError, "xent_factor: expected at least 0, got -1"),
        (attention_distillation_loss, {"mse_factor": "1"}, TypeError, "mse_factor: expected a Python number"),
        (attention_distillation_loss, {"block_size": 0}, ValueError, "block_size: expected at least 1, got 0"),
    ],
)  # fmt: skip
def test_more_errors(op, change, error, message):
    with pytest.raises(error, match=message):
        op(**{**GOOD, **change})


def test_map_errors():
    with pytest.raises(ValueError, match=r"x: expected at least the dimensions \[K, H\], got shape \(5,\)"):
        hedgehog_feature_map(Q[0, 0, 0])
    with pytest.raises(ValueError, match="weight: expected as many maps as the 6 heads of x or a multiple, got 3"):
        hedgehog_feature_map(Q, W_KEY)
    with pytest.raises(ValueError, match=r"bias: expected \[M, F\] with M = 6"):
        hedgehog_feature_map(Q, None, B_KEY[:, :H])
    with pytest.raises(TypeError, match="temp: expected a Python number"):
        hedgehog_feature_map(Q, temp=None)
    with pytest.raises(TypeError, match="fullspace: expected a static"):
        hedgehog_feature_map(Q, fullspace=1)
    with pytest.raises(TypeError, match="state: expected a LinearState, got None"):
        hedgehog_attention_step(Q[:, 0], KEY[:, 0], VALUE[:, 0], None, W_QUERY, W_KEY)
