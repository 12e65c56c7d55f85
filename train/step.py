"""The training step: a pure function of (state, batch, factor), compiled once with explicit shardings.

loss = sum_t w_t loss_t / sum_t w_t;  update = factor * optimiser(gradient);  an update that is not finite is skipped
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jattn.models.lm import LM
from train import sharding
from train.config import RunConfig
from train.errors import user_errors
from train.optimizer import make_optimizer

Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes; all of it is in a checkpoint."""

    step: jax.Array
    parameters: Any
    optimizer: Any
    skipped: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run and where its arrays live.

    Attributes:
      init: `init(seed) -> state`, made in place on the mesh.
      step: `step(state, batch, factor) -> (state, metrics)`; the state is donated.
      evaluate: `evaluate(parameters, batch) -> (sum of weighted losses in nats, sum of weights)`.
      model: `model(parameters) -> LM`.
      state_shape: the state as shapes with shardings, which is what a checkpoint is restored into.
      batch_sharding: of every `[B, T]` array of a batch.
    """

    init: Callable[[int], TrainState]
    step: Any
    evaluate: Any
    model: Callable[[Any], LM]
    state_shape: TrainState
    batch_sharding: NamedSharding


def resolve_precision(config: RunConfig) -> RunConfig:
    """`config` with the model's compute dtype written out."""
    dtype = config.precision
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def weighted_loss(model: LM, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum of the weighted losses of a batch in nats, and the sum of the weights."""
    losses = model.loss(
        batch["tokens"], batch["targets"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])


def make_program(config: RunConfig, mesh: Mesh) -> Program:
    """Everything that is compiled for a run of `config` on `mesh`."""
    sharding.check_batch(mesh, config.data.batch, config.data.context)
    optimizer = make_optimizer(config.optimizer)

    def build(seed: jax.Array | int) -> LM:
        return LM(config.model, rngs=nnx.Rngs(params=jax.random.key(seed)))

    # Every layer is built here first, without arrays: options that do not fit one another show.
    with user_errors("model"):
        parts: Any = nnx.split(nnx.eval_shape(lambda: build(0)), nnx.Param, ...)
    graph, parameters, constants = parts
    # What is not trained (the decays of lightning attention) follows from the configuration and is made once.
    if jax.tree.leaves(constants):
        constants = jax.jit(lambda: nnx.state(build(0), nnx.Not(nnx.Param)))()

    def init(seed: jax.Array) -> TrainState:
        weights = nnx.state(build(seed), nnx.Param)
        return TrainState(jnp.zeros((), jnp.int32), weights, optimizer.init(weights), jnp.zeros((), jnp.int32))

    shape = jax.eval_shape(init, 0)
    shardings = sharding.state_shardings(shape, parameters, mesh)
    state_shape = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, shardings)
    replicated = NamedSharding(mesh, PartitionSpec())
    by_token = NamedSharding(mesh, sharding.batch_spec())

    def step(state: TrainState, batch: Batch, factor: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss_fn(weights: Any) -> jax.Array:
            total, count = weighted_loss(nnx.merge(graph, weights, constants), batch)
            return total / jnp.maximum(count, 1.0)

        loss, gradients = jax.value_and_grad(loss_fn)(state.parameters)
        norm = optax.tree.norm(gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, state.parameters)
        updates = jax.tree.map(lambda update: (factor * update).astype(update.dtype), updates)
        proposed = (optax.apply_updates(state.parameters, updates), moments)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, (state.parameters, state.optimizer))
        skipped = state.skipped + (~finite).astype(jnp.int32)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped}
        return TrainState(state.step + 1, kept[0], kept[1], skipped), metrics

    def evaluate(weights: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return weighted_loss(nnx.merge(graph, weights, constants), batch)

    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step,
            in_shardings=(shardings, by_token, replicated),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        ),
        evaluate=jax.jit(evaluate, in_shardings=(shardings.parameters, by_token), out_shardings=replicated),
        model=lambda weights: nnx.merge(graph, weights, constants),
        state_shape=state_shape,
        batch_sharding=by_token,
    )
