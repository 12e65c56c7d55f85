"""The models that several benchmarks compare: the main job's hybrid, and softmax models of the same size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.models.lm import LM, LMConfig
from jattn.nn.softmax import SoftmaxMixer
from train.recipes import pydoc_lm

HYBRID = pydoc_lm.config().model
SOFTMAX = dataclasses.replace(HYBRID, pattern=("softmax",), mixer_options={})


class PlainSoftmaxMixer(SoftmaxMixer):
    """Softmax attention as XLA does it by itself: `jax.nn.dot_product_attention`."""

    def __call__(self, x, *, positions, segment_ids=None, state=None):
        query, key, value = self.heads(x, positions)
        assert segment_ids is None
        assert state is None
        out = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.projections.merge(out), None


def loss_and_gradient(config: LMConfig, *, plain: bool = False) -> tuple[Callable[..., Any], Any]:
    """`f(weights, tokens) -> (loss, gradient)` and the weights of a model of `config`."""
    model = LM(config, rngs=nnx.Rngs(0))
    if plain:
        for block in model.units.blocks:
            block.mixer.__class__ = PlainSoftmaxMixer
    graph, weights, rest = nnx.split(model, nnx.Param, ...)

    def loss(weights: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, weights, rest).loss(tokens[:, :-1], tokens[:, 1:]).mean()

    return jax.value_and_grad(loss), weights


def random_tokens(length: int, batch: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, length + 1)))
