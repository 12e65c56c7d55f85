"""The visual attention network: its blocks, its sizes, and the paper's claim in miniature."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jattn.models.van import VANConfig
from jattn.models.vision import VARIANTS, build
from jattn.nn.large_kernel import LKA, VANBlock
from tests.models.test_vision import CONFIGS, structure, variables


def test_sizes_of_the_pyramid_are_those_of_the_convolutions():
    """floor((n - 1) / stride) + 1, whatever the size; a single pixel is enough."""
    config = dataclasses.replace(CONFIGS["van"], stem_stride=4)
    graph, state = structure(config)

    def sides(height, width):
        images = np.zeros((2, height, width, config.in_channels), np.float32)
        made = jax.eval_shape(lambda state, x: nnx.merge(graph, state).features(x), state, images)
        return [feature.shape[1:3] for feature in made]

    assert sides(29, 17) == [(8, 5), (4, 3)]
    assert sides(1, 5) == [(1, 2), (1, 1)]


def test_a_silent_attention_leaves_the_inner_shortcut():
    """A block with zero weights adds layer_scale * BN(x): the released code's shortcut within the attention."""
    block = VANBlock(5, 7, rngs=nnx.Rngs(0))
    for layer in (block.attention.proj_out, block.mlp.down):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 5))
    normal = x / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(block(x), x + 0.01 * normal, atol=1e-6)


def test_the_gate_is_an_option():
    given = jax.random.normal(jax.random.key(0), (1, 7, 5, 3))
    outs = [LKA(3, gate=gate, rngs=nnx.Rngs(0))(given) for gate in ("mul", "add", "none", "sigmoid")]
    np.testing.assert_allclose(outs[0], given * outs[2], atol=1e-6)
    np.testing.assert_allclose(outs[1], given + outs[2], atol=1e-6)
    np.testing.assert_allclose(outs[3], given * jax.nn.sigmoid(outs[2]), atol=1e-6)


def test_weights_start_as_the_authors_do():
    """Normal with variance 2 / fan out, a depthwise convolution's being its taps alone; dense 0.02; biases 0."""
    model = build(dataclasses.replace(VARIANTS["van_b0"], depths=(1, 1, 1, 1)), rngs=nnx.Rngs(0))
    block = model.stages[3].blocks[0]
    for layer, fan_out in (
        (block.attention.lka.far, 49), (block.attention.proj_in, 256), (block.mlp.up, 1024),
        (model.stages[3].embed, 9 * 256),
    ):  # fmt: skip
        np.testing.assert_allclose(np.std(layer.kernel[...]), np.sqrt(2 / fan_out), rtol=0.05)
        assert not np.any(layer.bias[...])
    np.testing.assert_allclose(np.std(model.head.kernel[...]), 0.02, rtol=0.05)


MARKS = VANConfig(num_classes=2, in_channels=1, widths=(8,), depths=(1,), mlp_ratios=(2,), stem_stride=1, drop_path=0.0)
APART = 14


def marks(key, rows):
    """9 x 29 images with two marks, 14 pixels apart in a row; the class is whether their signs agree."""
    keys = jax.random.split(key, 3)
    signs = jax.random.rademacher(keys[0], (rows, 2), jnp.float32)
    row = jax.random.randint(keys[1], (rows,), 0, 9)
    column = jax.random.randint(keys[2], (rows,), 0, 29 - APART)
    images = sum(
        signs[:, side, None, None] * jax.nn.one_hot(row, 9)[:, :, None] * jax.nn.one_hot(at, 29)[:, None]
        for side, at in enumerate((column, column + APART))
    )
    return 3 * images[..., None], (signs[:, 0] == signs[:, 1]).astype(int)


def share_right(config, steps=120, rows=32):
    """Of new images after training."""
    graph, weights, statistics = nnx.split(build(config, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    optimiser = optax.adam(optax.cosine_decay_schedule(2e-2, steps))

    @jax.jit
    def step(state, key):
        weights, statistics, moments = state

        def loss(weights):
            model = nnx.merge(graph, weights, statistics, copy=True)
            images, labels = marks(key, rows)
            logits = model(images, train=True)
            cost = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(cost), nnx.state(model, nnx.BatchStat)

        gradient, statistics = jax.grad(loss, has_aux=True)(weights)
        updates, moments = optimiser.update(gradient, moments)
        return optax.apply_updates(weights, updates), statistics, moments

    state = weights, statistics, optimiser.init(weights)
    for key in jax.random.split(jax.random.key(1), steps):
        state = step(state, key)
    images, labels = marks(jax.random.key(2), 512)
    logits = jax.jit(nnx.merge(graph, *state[:2]).__call__)(images)
    return float(np.mean(np.argmax(logits, -1) == labels))


def test_marks_far_apart_are_compared_by_large_kernels_only():
    """The paper's claim in miniature.

    Without the dilated convolution no place sees both marks. A mean of what each place says is then a sum over marks,
    and whether two signs agree is no sum of something about each.
    """
    assert share_right(MARKS) > 0.9
    # K = 3 at d = 3 leaves one tap to the dilated convolution, and 5 x 5 to the attention.
    assert share_right(dataclasses.replace(MARKS, kernel=3)) < 0.6


def test_what_one_place_sees():
    """The premise of the test above: how far a pixel reaches with and without the dilated convolution."""
    for kernel, reach in ((21, 3 + 11 + 1), (3, 3 + 2 + 1)):
        config = dataclasses.replace(MARKS, kernel=kernel)
        model = nnx.merge(structure(config)[0], variables(config))
        seen = functools.partial(lambda model, x: model.features(x)[0][0, 4, 20].sum(), model)
        gradient = np.abs(jax.grad(seen)(np.random.default_rng(0).standard_normal((1, 9, 41, 1)).astype(np.float32)))
        columns = np.flatnonzero(gradient[0].sum((0, 2)) > 0)
        assert (columns.min(), columns.max()) == (20 - reach, 20 + reach)
    assert 3 + 2 + 1 < APART / 2 < 3 + 11 + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": 23}, "kernel: 23 at dilation 3 needs 8 x 8 taps"),
        ({"gate": "max"}, "gate: expected one of 'mul', 'add', 'none', 'sigmoid', got 'max'"),
        ({"mlp_ratios": (8,)}, "mlp_ratios: expected one number for every stage, 4 as in widths, got 1"),
        ({"stem_stride": 0}, "stem_stride: expected at least 1, got 0"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        VANConfig(**change)
