"""The SEA mixer: the protocol where not all keys are kept, its estimator, and a softmax layer that becomes one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.catalog import get
from jattn.dot_product import dot_product_attention
from jattn.linear.sea import sea_attention
from jattn.linear.sea_loss import sea_distillation_loss
from jattn.models.lm import LM, LMConfig
from jattn.nn import LightningMixer, SEAMixer, SoftmaxMixer, convert_to_sea
from tests.nn import test_mixers as protocol
from tests.nn.test_mixers import x  # noqa: F401
from train.config import MeshConfig
from train.sharding import make_mesh, parameter_shardings, path_name

B, T, D = 2, 19, 12
X = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
SMALL = {"k_budget": 2, "predictor_length": 8, "max_length": 32}


def filled(mixer):
    """The mixer with weights of which none is where it starts: zeros would hide much, and equal cells compete."""
    rng = np.random.default_rng(1)
    state = nnx.state(mixer, nnx.Param)
    nnx.update(mixer, jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(leaf.dtype), state))
    return mixer


@pytest.fixture
def mixer():
    return filled(SEAMixer(D, **HEADS, **SMALL, layer_index=1, num_layers=3, rngs=nnx.Rngs(0)))


test_prefill_then_decode_is_the_parallel_forward = protocol.test_prefill_then_decode_is_the_parallel_forward
test_a_state_belongs_to_the_first_segment = protocol.test_a_state_belongs_to_the_first_segment_and_ends_in_the_last
test_flops_grow_as_the_entry_says = protocol.test_flops_grow_as_the_entry_says


def test_the_layer_of_the_entry_is_this_one():
    assert get("sea").load_layer() is SEAMixer
    with pytest.raises(ValueError, match="num_heads: a width of 12 does not divide by 5 heads"):
        SEAMixer(12, num_heads=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="k_budget: expected a positive number of keys, got 0"):
        SEAMixer(12, num_heads=2, k_budget=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="capacity: expected at most the 32 positions of params, got 33"):
        SEAMixer(D, **HEADS, **SMALL, rngs=nnx.Rngs(0)).init_state(1, 33, jnp.float32)


def test_a_mixer_is_the_op_of_its_heads_and_its_projection_is_no_parameter(mixer):
    attend = jax.jit(sea_attention, static_argnames="k_budget")
    out = attend(*mixer.heads(X, POSITIONS), mixer.params(), k_budget=2).reshape(B, T, -1)
    got, _ = protocol.apply(mixer, X, POSITIONS)
    np.testing.assert_allclose(got, out @ mixer.projections.out.kernel[...], atol=2e-6)
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.state(mixer, nnx.Param))}
    assert "estimator/positions" in names
    assert "estimator/cnn/last_norm/scale" in names
    assert "estimator/projection" not in names
    assert mixer.params().projection.shape == (10, 6)


def test_every_parameter_has_one_rule_and_a_scanned_model_trains():
    config = LMConfig(width=D, num_layers=2, pattern=("sea",), num_heads=2, mlp_width=16, mixer_options={"sea": SMALL})
    model = filled(LM(config, rngs=nnx.Rngs(0)))
    shapes = jax.eval_shape(lambda: nnx.state(LM(config, rngs=nnx.Rngs(0)), nnx.Param))
    parameter_shardings(shapes, make_mesh(MeshConfig(tensor=2, fsdp=2)))
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, 256)

    @nnx.jit
    def gradient(model):
        return nnx.grad(lambda model: model.loss(tokens[:, :-1], tokens[:, 1:]).mean())(model)

    found = nnx.state(gradient(model), nnx.Param)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.isfinite(leaf).all(), path
    estimator = found["units"]["blocks"][0]["mixer"]["estimator"]
    for name in ("encoder", "gates"):
        assert np.any(estimator[name]["kernel"][...], axis=(1, 2)).all()
    assert not np.any(estimator["cnn"]["first"]["kernel"][...])


def test_the_distillation_loss_is_that_of_the_layers_own_heads(mixer):
    ids = np.repeat([[1, 2]], [7, T - 7], axis=1).repeat(B, axis=0)
    query, key, value = mixer.heads(X, POSITIONS)
    logits = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, 2, axis=2)) / 6**0.5
    output = dot_product_attention(query, key, value, is_causal=True, segment_ids=ids)
    loss = jax.jit(functools.partial(sea_distillation_loss, k_budget=2, segment_ids=ids))
    want = loss(query, key, value, mixer.params(), logits, output)
    context = {"positions": POSITIONS, "segment_ids": ids}
    slope = nnx.jit(nnx.value_and_grad(lambda mixer: mixer.distillation_loss(X, **context)))
    got, gradient = slope(mixer)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(nnx.state(gradient.estimator, nnx.Param)))


@pytest.mark.parametrize("softmax", [{}, {"qk_norm": False, "rope_theta": None}, {"value_dim": 5, "use_bias": True}])
def test_conversion_copies_the_projections(softmax):
    mixer = filled(SoftmaxMixer(D, **HEADS, **softmax, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    converted = convert_to_sea(mixer, rngs=nnx.Rngs(1), **SMALL)
    assert converted.k_budget == 2
    for got, want in zip(converted.heads(X, POSITIONS), mixer.heads(X, POSITIONS), strict=True):
        np.testing.assert_array_equal(got, want)
    out = np.ones((B, T, 4, converted.projections.value_dim), np.float32)
    np.testing.assert_array_equal(converted.projections.merge(out), mixer.projections.merge(out))
    before = mixer(X, positions=POSITIONS)[0]
    kernel = converted.projections.query.kernel
    kernel[...] = 0 * kernel[...]
    np.testing.assert_array_equal(mixer(X, positions=POSITIONS)[0], before)
    with pytest.raises(TypeError, match="mixer: expected a SoftmaxMixer, got LightningMixer"):
        convert_to_sea(LightningMixer(D, num_heads=2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))


def test_a_distilled_layer_is_nearer_to_what_its_softmax_layer_said():
    mixer = filled(SoftmaxMixer(D, **HEADS, rngs=nnx.Rngs(0)))
    converted = convert_to_sea(mixer, rngs=nnx.Rngs(1), **{**SMALL, "k_budget": 4})
    wanted = mixer(X, positions=POSITIONS)[0]

    def distance():
        return float(jnp.sqrt(jnp.mean((protocol.apply(converted, X, POSITIONS)[0] - wanted) ** 2)))

    @nnx.jit
    def step(converted):
        loss, gradient = nnx.value_and_grad(lambda one: one.distillation_loss(X, positions=POSITIONS))(converted)
        weights, slopes = (nnx.state(part.estimator, nnx.Param) for part in (converted, gradient))
        nnx.update(converted.estimator, jax.tree.map(lambda a, b: a - 1.0 * b, weights, slopes))
        return loss

    before, first = distance(), step(converted)
    for _ in range(150):
        last = step(converted)
    assert last < 0.8 * first
    assert distance() < 0.8 * before
