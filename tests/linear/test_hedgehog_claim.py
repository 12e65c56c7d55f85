"""Hedgehog's claim in miniature: maps that are trained to mimic softmax do, and fixed ones do not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jattn.linear.distillation import attention_distillation_loss
from jattn.linear.hedgehog import hedgehog_feature_map


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("activation", ["softmax_dim", "exp"])
def test_learnt_maps_mimic_softmax_where_fixed_ones_cannot(activation):
    """Tokens are noisy copies of 24 points of R^16, to which softmax attends sharply."""
    length, width, batch = 48, 16, 8
    rng = np.random.default_rng(0)
    centres = 1.25 * rng.standard_normal((24, width))

    def tokens(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        picked = centres[rng.integers(0, 24, (batch, length))]
        query, key = (picked + 0.3 * rng.standard_normal(picked.shape) for _ in range(2))
        return jnp.asarray(query[:, :, None], jnp.float32), jnp.asarray(key[:, :, None], jnp.float32)

    causal = np.tri(length, dtype=bool)

    def teacher_weights(query, key):
        logits = np.einsum("btnh,bsnh->bnts", query, key) * width**-0.5
        return softmax(np.where(causal, logits, -np.inf))

    def student_weights(phi_q, phi_k):
        scores = np.where(causal, np.einsum("btnf,bsnf->bnts", phi_q, phi_k), 0)
        return scores / scores.sum(axis=-1, keepdims=True)

    def entropy(weights):
        return -(weights * np.log(np.maximum(weights, 1e-30))).sum(axis=-1).mean()

    query, key = tokens(1000)
    true = teacher_weights(query, key)

    def divergence(weights):
        return (true * (np.log(np.maximum(true, 1e-30)) - np.log(np.maximum(weights, 1e-12)))).sum(axis=-1).mean()

    def of_maps(maps):
        return student_weights(
            *(
                np.asarray(hedgehog_feature_map(x, w, activation=activation), np.float64)
                for x, w in zip((query, key), maps, strict=True)
            )
        )

    elu = student_weights(*(np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (query, key)))
    maps = (jnp.eye(width)[None], jnp.eye(width)[None])
    optimizer = optax.adam(1e-2)
    batches = jax.tree.map(lambda *x: jnp.stack(x), *(tokens(seed) for seed in range(20)))

    @jax.jit
    def train(maps):
        def step(carry, index):
            maps, moments = carry
            one = jax.tree.map(lambda x: x[index % 20], batches)
            gradient = jax.grad(lambda maps: attention_distillation_loss(*one, one[1], *maps, activation=activation))(
                maps
            )
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(maps, updates), moments), None

        return jax.lax.scan(step, (maps, optimizer.init(maps)), jnp.arange(400))[0][0]

    before = of_maps(maps)
    after = of_maps(train(maps))
    assert divergence(before) < divergence(elu)
    assert divergence(after) < 0.35 * divergence(elu)
    assert abs(entropy(after) - entropy(true)) < 0.4 * (entropy(before) - entropy(true))
