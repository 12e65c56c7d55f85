"""The plain vision transformer: its size, its patches and positions, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jattn.models.vision import VARIANTS, build
from jattn.models.vit import ViTConfig, sincos_positions
from tests.models.plain import gelu, layer_norm
from tests.models.test_vision import CONFIGS, inputs, structure, variables

CONFIG = CONFIGS["vit"]


@pytest.mark.parametrize(
    ("name", "published", "width"), [("tiny", 5_717_416, 192), ("small", 22_050_664, 384), ("base", 86_567_656, 768)]
)
def test_published_sizes(name, published, width):
    """DeiT's, without a class token and 197 learned positions."""
    _, state = structure(VARIANTS[f"vit_{name}"])
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == published - 198 * width


def test_is_the_definition():
    """In NumPy, patch by patch and head by head."""
    config = dataclasses.replace(CONFIG, dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        model = nnx.merge(structure(config)[0], variables(config))
        images = inputs().astype(np.float64)
        got = np.asarray(jax.jit(model.__call__)(images))
        w = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    rows, columns, side = 7, 11, config.patch
    x = np.stack(
        [
            images[:, side * i : side * (i + 1), side * j : side * (j + 1)].reshape(len(images), -1)
            for i, j in np.ndindex(rows, columns)
        ],
        axis=1,
    )
    x = x @ w["embed"]["kernel"] + w["embed"]["bias"] + slow_positions(rows, columns, config.width)
    for index in range(config.num_layers):
        block = jax.tree.map(lambda a, index=index: a[index], w["blocks"])
        z = layer_norm(x, block["attention_norm"]["scale"], block["attention_norm"]["bias"], eps=1e-6)
        p = block["attention"]["projections"]
        query, key, value = (
            (z @ p[name]["kernel"] + p[name]["bias"]).reshape(*z.shape[:2], config.num_heads, -1)
            for name in ("query", "key", "value")
        )
        logits = np.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("bnts,bsnh->btnh", weights, value).reshape(x.shape)
        x = x + (out @ p["out"]["kernel"] + p["out"]["bias"]) * block["attention_scale"]
        z = layer_norm(x, block["mlp_norm"]["scale"], block["mlp_norm"]["bias"], eps=1e-6)
        z = gelu(z @ block["mlp"]["up"]["kernel"] + block["mlp"]["up"]["bias"])
        x = x + (z @ block["mlp"]["down"]["kernel"] + block["mlp"]["down"]["bias"]) * block["mlp_scale"]
    x = layer_norm(x, w["norm"]["scale"], w["norm"]["bias"], eps=1e-6).mean(1)
    # Positions are made in float32 whatever the weights' dtype.
    np.testing.assert_allclose(got, x @ w["head"]["kernel"] + w["head"]["bias"], atol=1e-6)


def slow_positions(rows, columns, width):
    quarter = width // 4
    made = np.zeros((rows * columns, width))
    for index, (row, column) in enumerate(np.ndindex(rows, columns)):
        for k in range(quarter):
            rate = 10_000 ** (-k / (quarter - 1))
            made[index, k :: quarter] = (
                np.sin(column * rate), np.cos(column * rate), np.sin(row * rate), np.cos(row * rate)
            )  # fmt: skip
    return made


def test_positions_tell_every_patch_from_every_other():
    made = np.asarray(sincos_positions(7, 11, 24))
    np.testing.assert_allclose(made, slow_positions(7, 11, 24), atol=1e-5)
    distances = np.linalg.norm(made[:, None] - made[None], axis=-1) + np.eye(77)
    assert distances.min() > 0.1


def test_learns_where_a_mark_is():
    """The side of an image that a bright pixel is on: by place alone, for pixels look alike."""
    config = ViTConfig(
        num_classes=2, in_channels=1, patch=2, width=16, num_layers=2, num_heads=2, mlp_width=32, drop_path=0.1
    )
    graph, weights = nnx.split(build(config, rngs=nnx.Rngs(0)), nnx.Param)
    optimiser = optax.adam(1e-2)

    def data(key, rows=32):
        place = jax.random.randint(key, (rows,), 0, 48)
        return jax.nn.one_hot(place, 48).reshape(rows, 6, 8, 1) * 3, (place % 8 >= 4).astype(int)

    def loss(weights, key):
        images, labels = data(key)
        logits = nnx.merge(graph, weights)(images, train=True, key=key)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    @jax.jit
    def step(state, key):
        weights, moments = state
        value, gradient = jax.value_and_grad(loss)(weights, key)
        updates, moments = optimiser.update(gradient, moments)
        return (optax.apply_updates(weights, updates), moments), value

    state = weights, optimiser.init(weights)
    for key in jax.random.split(jax.random.key(0), 100):
        state, value = step(state, key)
    images, labels = data(jax.random.key(7), 256)
    right = jnp.argmax(nnx.merge(graph, state[0])(images), -1) == labels
    assert np.mean(right) > 0.95
    assert np.isfinite(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 18}, "width: rows and columns have sines and cosines each, so a multiple of 4 is needed, got 18"),
        ({"width": 4}, "width: expected at least 8, got 4"),
        ({"patch": 0}, "patch: expected at least 1, got 0"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_patches_must_fit():
    model = nnx.merge(structure(CONFIG)[0], variables(CONFIG))
    with pytest.raises(ValueError, match=r"images: height and width must be multiples .* 2, got 13 x 22; resize"):
        jax.eval_shape(model, inputs()[:, 1:])
