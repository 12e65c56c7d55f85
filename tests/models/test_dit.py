"""The diffusion transformer: conditions, their cache, masks from step to step, and the paper's claim in miniature."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jattn.models.dit import Conditions, DiT, DiTConfig, SubjectImage
from jattn.models.flow_matching import csas_timesteps, flow_matching_loss
from jattn.sparse.pka import pka_pairs
from tests.counting import products

B, H, W, C, M, F = 2, 6, 10, 3, 5, 7
CONFIG = DiTConfig(
    channels=C, patch=2, text_width=F, spatial=2, subjects=1, width=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, mlp_width=20, lora_rank=2, combine="joint",
)  # fmt: skip
LENGTH = 15
FIRST = np.ones((2, B, 1, LENGTH), bool)
MASKS = np.random.default_rng(0).random(FIRST.shape) < 0.3


@functools.cache
def split(config):
    """The model's structure, and the shapes of its weights."""
    graph, weights = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))), nnx.Param)
    return graph, weights


def make(config=CONFIG, seed=0):
    """A model whose weights are all random, so that every part of it matters."""
    graph, weights = split(config)
    rng = np.random.default_rng(seed)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), weights))


def inputs(seed=0, height=H, width=W):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal((B, *shape)).astype(np.float32)

    ids, valid = np.array([[1, 2], [3, 0]]), np.array([[True, True], [True, False]])
    subject = SubjectImage(draw(4, 6, C), ids, valid)
    spatial = draw(height, width, C), draw(height, width, C)
    return draw(height, width, C), np.array([0.3, 0.8], np.float32), draw(M, F), Conditions(spatial, (subject,))


@functools.cache
def program(config, name, **static):
    def run(weights, *x, **options):
        model = nnx.merge(split(config)[0], weights)
        return (model if name == "__call__" else getattr(model, name))(*x, **options, **static)

    return jax.jit(run)


def call(model, *x, name="__call__", **options):
    static = {key: options.pop(key) for key in ("steps",) if key in options}
    return program(model.config, name, **static)(nnx.state(model, nnx.Param), *x, **options)


@pytest.fixture(scope="module")
def model():
    return make()


def test_starts_as_no_velocity_and_every_weight_then_learns():
    """A gate and an output layer that both start at zero would never move."""
    graph, weights = nnx.split(DiT(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)
    x = inputs()

    @jax.jit
    def step(weights):
        def loss(weights):
            velocity, masks = nnx.merge(graph, weights)(*x)
            return jnp.mean((velocity - x[0]) ** 2), (velocity, masks)

        gradients, (velocity, masks) = jax.grad(loss, has_aux=True)(weights)
        return jax.tree.map(lambda w, g: w - 0.05 * jnp.sign(g), weights, gradients), gradients, velocity, masks

    weights, _, velocity, masks = step(weights)
    assert velocity.shape == x[0].shape
    assert not np.any(velocity)
    assert masks.shape == FIRST.shape
    for _ in range(5):
        weights, gradients, velocity, _ = step(weights)
    assert np.any(velocity)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf), jax.tree_util.keystr(path)


def test_the_cache_gives_what_making_them_again_gives(model):
    """At three steps, each with the masks of the one before."""
    x, _, text, conditions = inputs()
    cache = call(model, conditions, name="cache_conditions")
    assert cache.keys.spatial[0][0].shape == (2, B, LENGTH, 2, 8)
    masks = again = FIRST
    for t in (0.9, 0.6, 0.2):
        time = np.full(B, t, np.float32)
        fresh, masks = call(model, x, time, text, conditions, masks=masks)
        cached, again = call(model, x, time, text, cache, masks=again)
        assert np.abs(fresh).max() > 0.1
        np.testing.assert_allclose(cached, fresh, atol=2e-5)
        np.testing.assert_array_equal(again, masks)
        assert 0 < np.sum(masks) < masks.size
        x = x - 0.3 * np.asarray(fresh)
    other = call(model, inputs(1)[3], name="cache_conditions")
    assert np.abs(call(model, x, time, text, other, masks=masks)[0] - cached).max() > 0.01


def test_sampling_hands_masks_on(model):
    noise, _, text, conditions = inputs()
    got = call(model, noise, text, conditions, name="sample", steps=3)
    same, handed, masks = noise, noise, FIRST
    for t in (1.0, 2 / 3, 1 / 3):
        time = np.full(B, t, np.float32)
        velocity, masks = call(model, handed, time, text, conditions, masks=masks)
        handed = handed - np.asarray(velocity) / 3
        same = same - np.asarray(call(model, same, time, text, conditions, masks=FIRST)[0]) / 3
    np.testing.assert_allclose(got, handed, atol=1e-4)
    assert np.abs(got - same).max() > 1e-3


def test_places_bound_the_cost_and_not_the_result(model):
    x, t, text, conditions = inputs()
    gathered = make(dataclasses.replace(CONFIG, max_tokens=8))
    want, _ = call(model, x, t, text, conditions, masks=MASKS)
    np.testing.assert_allclose(call(gathered, x, t, text, conditions, masks=MASKS)[0], want, atol=2e-5)
    assert np.abs(call(model, x, t, text, conditions, masks=FIRST)[0] - want).max() > 1e-3


def test_rows_are_independent(model):
    x, other = inputs(), inputs(1)
    both, masks = call(model, *x, masks=MASKS)
    mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), x, other)
    got, again = call(model, *mixed, masks=MASKS)
    np.testing.assert_allclose(got[0], both[0], atol=2e-5)
    np.testing.assert_array_equal(again[:, 0], masks[:, 0])
    assert np.abs(got[1] - both[1]).max() > 0.1


def test_each_condition_matters_and_has_its_own_adapter(model):
    x, t, text, conditions = inputs()
    (first, second), subjects = conditions
    every, masks = call(model, x, t, text, conditions, masks=FIRST)
    swapped, _ = call(model, x, t, text, Conditions((second, first), subjects), masks=FIRST)
    without_first, _ = call(model, x, t, text, Conditions((None, second), (None,)))
    without_second, _ = call(model, x, t, text, Conditions((second, None), (None,)))
    none, no_masks = call(model, x, t, text, None)
    outs = [every, swapped, without_first, without_second, none]
    for i, out in enumerate(outs):
        assert all(np.abs(out - other).max() > 1e-3 for other in outs[:i])
    assert masks.shape == FIRST.shape
    assert no_masks.shape == (2, B, 0, LENGTH)
    cache = call(model, Conditions((None, second)), name="cache_conditions")
    np.testing.assert_allclose(call(model, x, t, text, cache)[0], without_first, atol=2e-5)
    assert not jax.tree.leaves(model.cache_conditions(Conditions()))


def test_patches_are_put_back_where_they_came_from():
    config = dataclasses.replace(CONFIG, channels=4, width=16, head_dim=8)
    model = DiT(config, rngs=nnx.Rngs(0))
    model.patch_in.kernel[...] = jnp.eye(16)
    image = jnp.asarray(np.random.default_rng(0).standard_normal((B, 6, 10, 4)), jnp.float32)
    tokens, grid = model._patches("image", image)
    assert grid == (3, 5)
    np.testing.assert_allclose(tokens[0, 7].reshape(2, 2, 4), image[0, 2:4, 4:6], atol=1e-6)
    np.testing.assert_allclose(model._unpatch(tokens, grid), image, atol=1e-6)


def test_no_place_is_taken_twice():
    spatial, (subject,) = inputs()[3]
    model = make(dataclasses.replace(CONFIG, subjects=2))
    given = model._embed(Conditions(spatial, (subject, SubjectImage(subject.image[:, :2, :4].repeat(2, axis=2)))), B)
    places = np.concatenate([given.places.spatial[0], *given.places.subjects])
    assert len(np.unique(places, axis=0)) == len(places) == 15 + 6 + 4
    np.testing.assert_array_equal(given.places.spatial[0], given.places.spatial[1])
    np.testing.assert_array_equal(given.places.spatial[0][7], [1, 2])


def test_bfloat16_computation_keeps_float32_weights(model):
    half = make(dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype("float32")}
    want, got = (call(m, *inputs(), masks=MASKS)[0] for m in (model, half))
    assert got.dtype == jnp.float32
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 0.05


def test_flops_are_those_of_the_program():
    """The count leaves out time, modulation and masks: a few products per row and not per token."""
    config = dataclasses.replace(CONFIG, width=32, mlp_width=128, num_heads=4, num_kv_heads=None)
    for attention in ("pka", "full"):
        model = make(dataclasses.replace(config, attention=attention))
        x = jax.tree.map(lambda a: a[:1], inputs(height=16, width=16))
        traced = products(lambda *x, model=model: model(*x)[0], *x)
        counted = model.flops(1, text=M, image=64, subjects=(6,))
        assert counted < traced < 1.05 * counted
        if attention == "pka":
            cache = model.cache_conditions(x[3])
            traced = products(lambda *x, model=model: model(*x)[0], *x[:3], cache)
            counted = model.flops(1, text=M, image=64, subjects=(6,), cached=True)
            assert counted < traced < 1.1 * counted


def test_flops_are_linear_in_the_number_of_conditions():
    def cost(attention, conditions, **options):
        config = dataclasses.replace(CONFIG, spatial=conditions, subjects=0, attention=attention)
        model = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
        return model.flops(1, text=32, image=1024, **options)

    pka = [cost("pka", c) for c in (0, 4, 8, 16)]
    assert pka[2] - pka[0] == pytest.approx(2 * (pka[1] - pka[0]))
    assert pka[3] - pka[0] == pytest.approx(4 * (pka[1] - pka[0]))
    cached = [cost("pka", c, cached=True) for c in (0, 16)]
    assert cached[1] < 1.02 * cached[0]
    full = [cost("full", c) for c in (4, 16)]
    assert full[1] / full[0] > 9
    assert full[1] / pka[3] > 10


def toy(key, count):
    """8 x 8 images of a square, whose place one condition shows, on a pattern that the other shows."""
    keys = jax.random.split(key, 3)
    row, column = (jax.random.randint(k, (count, 1, 1), 0, 5) for k in keys[:2])
    at = jnp.arange(8)
    square = (at[:, None] >= row) & (at[:, None] < row + 4) & (at >= column) & (at < column + 4)
    pattern = jax.random.rademacher(keys[2], (count, 8, 8), jnp.float32)
    return tuple(a.astype(jnp.float32)[..., None] for a in (pattern + 2 * square, square, pattern))


STEPS, RATE = 100, 1e-2
TOY = DiTConfig(
    channels=1, patch=2, text_width=3, spatial=2, subjects=0, width=32, num_layers=1, num_heads=2, mlp_width=64,
    lora_rank=4, combine="joint",
)  # fmt: skip


def train(config, *, steps=STEPS, batch=16, conditioned=True):
    """Mean loss over the first ten and the last thirty steps, always on new data."""
    graph, weights = nnx.split(DiT(config, rngs=nnx.Rngs(0)), nnx.Param)
    optimiser = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    text = jnp.ones((batch, 2, 3))

    def loss(weights, key):
        data, noise, times = jax.random.split(key, 3)
        image, square, pattern = toy(data, batch)
        model = nnx.merge(graph, weights)
        given = Conditions((square, pattern)) if conditioned else None
        noise = jax.random.normal(noise, image.shape)
        t = csas_timesteps(times, (batch,))
        return jnp.mean(flow_matching_loss(lambda x, t: model(x, t, text, given)[0], image, noise, t))

    @jax.jit
    def step(state, key):
        weights, moments = state
        value, gradients = jax.value_and_grad(loss)(weights, key)
        updates, moments = optimiser.update(gradients, moments)
        return (optax.apply_updates(weights, updates), moments), value

    state, losses = (weights, jax.jit(optimiser.init)(weights)), []
    for key in jax.random.split(jax.random.key(1), steps):
        state, value = step(state, key)
        losses.append(value)
    losses = np.asarray(losses)
    return losses[:10].mean(), losses[-30:].mean()


def test_pka_learns_what_joint_attention_learns_for_less():
    """The paper's claim in miniature, where what a token needs is at its own place in the conditions.

    Without conditions the same model stays above 2 here; full attention has yet to learn which tokens are aligned.
    """
    first, pka = train(TOY)
    _, full = train(dataclasses.replace(TOY, attention="full"))
    assert first > 2
    assert pka < 0.5
    assert pka < full < first
    pairs = {"text": 2, "image": 16, "spatial": 2}
    assert pka_pairs(**pairs) < 0.4 * (2 + 16 * 3) ** 2
    assert pka_pairs(**pairs, cached=True) < 0.15 * (2 + 16 * 3) ** 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 6}, "head_dim: rows and columns turn pairs of channels, so a multiple of 4 is needed, got 6"),
        ({"head_dim": None, "width": 25}, "head_dim: .* got 6.25"),
        ({"head_dim": 8, "width": 25}, "width: .* even, got 25"),
        ({"patch": 0}, "patch: expected at least 1, got 0"),
        ({"spatial": -1}, "spatial: expected at least 0, got -1"),
        ({"combine": "sum"}, "combine: expected one of 'add', 'joint', got 'sum'"),
        ({"attention": "some"}, "attention: expected one of 'pka', 'full', got 'some'"),
        ({"normalization": "max"}, "normalization: expected one of 'minmax', 'softmax', got 'max'"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_input_errors(model):
    x, t, text, conditions = inputs()
    spatial, subjects = conditions

    def refuse(message, *args, error=ValueError, **options):
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda: model(*args, **options))

    refuse("image: height and width must be multiples of the patch 2, got 5 x 10", x[:, 1:], t, text)
    refuse(r"t: expected \[B\] with B = 2", x, t[:1], text)
    refuse("text: expected .* with F = 7", x, t, text[..., 1:])
    refuse(r"conditions.spatial: expected 2, None for one that is absent, got 1", x, t, text, Conditions(spatial[:1]))
    refuse("conditions: expected Conditions", x, t, text, spatial, error=TypeError)
    refuse(r"subjects\[0\]: expected a SubjectImage", x, t, text, Conditions((), (spatial[0],)), error=TypeError)
    refuse(r"masks: expected .* with J = 1", x, t, text, conditions, masks=np.ones((2, B, 2, LENGTH), bool))
    flat = x.reshape(B, 10, 6, C)
    message = r"conditions.spatial\[1\]: \(5, 3\) patches, and the image has \(3, 5\); resize it to the image's size"
    refuse(message, x, t, text, Conditions((None, flat)))
    refuse(message, x, t, text, jax.eval_shape(model.cache_conditions, Conditions((None, flat))))
    outside = subjects[0]._replace(keyword_ids=np.full((B, 1), M), keyword_valid=None)
    full = make(dataclasses.replace(CONFIG, attention="full"))
    with pytest.raises(ValueError, match="conditions: under full attention they depend on the image"):
        full.cache_conditions(conditions)
    with pytest.raises(ValueError, match="keyword_ids: expected positions of the 5 text tokens"):
        model(x, t, text, Conditions((), (outside,)))


def test_full_attention_samples_without_a_cache():
    model = make(dataclasses.replace(CONFIG, attention="full"))
    noise, _, text, conditions = inputs()
    got, masks = call(model, noise, np.full(B, 1.0, np.float32), text, conditions)
    assert np.all(masks)
    image = call(model, noise, text, conditions, name="sample", steps=1)
    np.testing.assert_allclose(image, noise - got, atol=2e-5)
