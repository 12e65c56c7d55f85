"""The Hedgehog mixer: its maps, its distance from softmax, and a softmax layer that becomes one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.linear.distillation import attention_distillation_loss
from jattn.linear.hedgehog import hedgehog_attention
from jattn.nn import HedgehogMixer, LightningMixer, SoftmaxMixer, convert_attention
from jattn.positions import apply_rotary

B, T, D = 2, 11, 12
X = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T)) + 3
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}


def filled(mixer):
    """The mixer with an output projection that is not zero, and maps that are no identity."""
    kernel = mixer.projections.out.kernel
    kernel[...] = 0.3 * jax.random.normal(jax.random.key(1), kernel.shape)
    for leaf in (getattr(mixer, "query_map", None), getattr(mixer, "key_map", None)):
        if leaf is not None:
            leaf[...] += 0.5 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    return mixer


def rotated(mixer):
    """Query, key, value as the layer should make them."""
    query, key, value = mixer.projections.split(X)
    query, key = (x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) for x in (query, key))
    return apply_rotary(query, POSITIONS), apply_rotary(key, POSITIONS), value


@pytest.mark.parametrize("options", [{}, {"feature_dim": 5, "activation": "exp"}, {"tie_qk": True}])
def test_a_mixer_maps_what_is_rotated(options):
    mixer = filled(HedgehogMixer(D, **HEADS, **options, rngs=nnx.Rngs(0)))
    keys = mixer.key_map[...]
    queries = jnp.repeat(keys, 2, axis=0) if "tie_qk" in options else mixer.query_map[...]
    assert queries.shape == (4, 6, options.get("feature_dim", 6))
    activation = options.get("activation", "softmax_dim")
    out = hedgehog_attention(*rotated(mixer), queries, keys, activation=activation).reshape(B, T, -1)
    want = out @ mixer.projections.out.kernel[...]
    np.testing.assert_allclose(mixer(X, positions=POSITIONS)[0], want, atol=2e-6)
    state = mixer.init_state(B, 100, jnp.bfloat16)
    assert (state.S.shape, state.z.shape) == ((B, 2, 2 * queries.shape[-1], 6), (B, 2, 2 * queries.shape[-1]))
    assert state.S.dtype == state.z.dtype == jnp.float32


def test_maps_start_as_the_paper_or_lolcats_starts_them():
    mixer = HedgehogMixer(D, **HEADS, feature_dim=4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(mixer.query_map[...], np.broadcast_to(np.eye(6, 4), (4, 6, 4)))
    np.testing.assert_array_equal(mixer.key_map[...], np.broadcast_to(np.eye(6, 4), (2, 6, 4)))
    mixer = HedgehogMixer(D, num_heads=64, head_dim=6, init="kaiming", rngs=nnx.Rngs(0))
    for leaf in (mixer.query_map[...], mixer.key_map[...]):
        assert 0.95 * 6**-0.5 < jnp.abs(leaf).max() <= 6**-0.5
        np.testing.assert_allclose(leaf.std(), 6**-0.5 / 3**0.5, rtol=0.05)
    assert not np.array_equal(mixer.query_map[...], mixer.key_map[...])


def test_the_distillation_loss_is_that_of_the_layers_own_heads():
    mixer = filled(HedgehogMixer(D, **HEADS, activation="exp_dim", rngs=nnx.Rngs(0)))
    ids = np.repeat([[1, 2]], [4, 7], axis=1).repeat(B, axis=0)
    options = {"segment_ids": ids, "xent_factor": 0.5, "mse_factor": 2.0}
    maps = (mixer.query_map[...], mixer.key_map[...])
    want = attention_distillation_loss(*rotated(mixer), *maps, activation="exp_dim", **options)
    np.testing.assert_allclose(mixer.distillation_loss(X, positions=POSITIONS, **options), want, rtol=1e-6)
    gradient = nnx.grad(lambda mixer: mixer.distillation_loss(X, positions=POSITIONS))(mixer)
    assert np.any(gradient.query_map[...])
    assert np.any(gradient.key_map[...])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.projections))


@pytest.mark.parametrize("softmax", [{}, {"qk_norm": False, "rope_theta": None}, {"rope_theta": 100.0}])
def test_conversion_copies_the_projections(softmax):
    mixer = filled(SoftmaxMixer(D, **HEADS, **softmax, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    converted = convert_attention(mixer, rngs=nnx.Rngs(1), feature_dim=3, activation="exp", init="kaiming")
    assert (converted.feature_dim, converted.activation) == (3, "exp")
    for got, want in zip(converted.heads(X, POSITIONS), mixer.heads(X, POSITIONS), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(converted.projections.out.kernel[...], mixer.projections.out.kernel[...])
    before = mixer(X, positions=POSITIONS)[0]
    kernel = converted.projections.query.kernel
    kernel[...] = 0 * kernel[...]
    np.testing.assert_array_equal(mixer(X, positions=POSITIONS)[0], before)


def test_a_distilled_layer_says_what_its_softmax_layer_said():
    mixer = filled(SoftmaxMixer(D, **HEADS, rngs=nnx.Rngs(0)))
    converted = convert_attention(mixer, rngs=nnx.Rngs(1), activation="exp")
    wanted = mixer(X, positions=POSITIONS)[0]

    def distance():
        return float(jnp.sqrt(jnp.mean((converted(X, positions=POSITIONS)[0] - wanted) ** 2)))

    @nnx.jit
    def step(converted):
        gradient = nnx.grad(lambda one: one.distillation_loss(X, positions=POSITIONS))(converted)
        for name in ("query_map", "key_map"):
            leaf = getattr(converted, name)
            leaf[...] -= 2.0 * getattr(gradient, name)[...]

    before = distance()
    for _ in range(200):
        step(converted)
    assert distance() < 0.5 * before


def test_errors():
    for options, message in (
        ({"feature_dim": 0}, "feature_dim: expected at least 1, got 0"),
        ({"activation": "elu"}, "activation: expected one of 'exp', 'softmax_dim'"),
        ({"init": "zeros"}, "init: expected one of 'identity', 'kaiming', got 'zeros'"),
    ):
        with pytest.raises(ValueError, match=message):
            HedgehogMixer(D, **HEADS, **options, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="tie_qk: expected a static True or False"):
        HedgehogMixer(D, **HEADS, tie_qk=1, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="mixer: expected a SoftmaxMixer, got LightningMixer"):
        convert_attention(LightningMixer(D, num_heads=2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
