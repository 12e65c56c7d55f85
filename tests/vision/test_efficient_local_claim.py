"""The claim of efficient local attention in miniature: strips of means find what single pixels do not show."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jattn import ela
from jattn.nn.efficient_local import ELA

ROWS, H, W, C = 32, 13, 17, 16


def crossings(key):
    """Noise of unit variance with one row and one column brighter by 1.2, and the place where they cross."""
    keys = jax.random.split(key, 3)
    row, column = (jax.random.randint(k, (ROWS,), 0, n) for k, n in zip(keys, (H, W), strict=False))
    bright = jax.nn.one_hot(row, H)[:, :, None] + jax.nn.one_hot(column, W)[:, None]
    noise = jax.random.normal(keys[2], (ROWS, H, W, C))
    return 1.2 * bright[..., None] + noise, row * W + column


def found(scores, place):
    return float(np.mean(np.argmax(scores.reshape(ROWS, -1), -1) == place))


def test_the_gate_learns_to_peak_at_the_crossing():
    """One channel's pixels find 1 crossing in 8; one channel's gate, once trained, nearly all of them."""
    graph, weights = nnx.split(ELA(C, "S", rngs=nnx.Rngs(0)))
    optimiser = optax.adam(0.1)

    def gates(weights, x):
        """Of every channel at every place."""
        layer = nnx.merge(graph, weights)
        options = {"feature_groups": layer.feature_groups, "num_groups": layer.num_groups}
        return ela(x, layer.kernel[...], layer.scale[...], layer.bias[...], **options) / x

    def loss(weights, key):
        x, place = crossings(key)
        logits = jnp.log(gates(weights, x)[..., 0]).reshape(ROWS, -1)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, place))

    @jax.jit
    def step(state, key):
        weights, moments = state
        updates, moments = optimiser.update(jax.grad(loss)(weights, key), moments)
        return optax.apply_updates(weights, updates), moments

    state = weights, optimiser.init(weights)
    for key in jax.random.split(jax.random.key(0), 60):
        state = step(state, key)
    x, place = crossings(jax.random.key(1))
    assert found(x[..., 0], place) < 0.3
    assert found(gates(weights, x)[..., 0], place) < 0.3
    assert found(gates(state[0], x)[..., 0], place) > 0.9
