"""The training step: a pure function of (state, batch, factor), compiled once with explicit shardings.

loss = sum_t w_t loss_t / sum_t w_t;  update = factor * optimiser(gradient);  an update that is not finite is skipped
average = d average + (1 - d) weights, with d = min(decay, (1 + t) / (10 + t)) at update t

With accumulation the sums run over the parts of the batch, one after the other; the gradient is that of the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jattn.models.lm import LM
from jattn.nn.layout import Layout, use_layout
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
    average: Any = None
    """The running mean of the parameters, where the run keeps one."""

    @property
    def weights(self) -> Any:
        """What is scored, sampled and exported: the average if there is one."""
        return self.parameters if self.average is None else self.average


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run and where its arrays live.

    Attributes:
      init: `init(seed) -> state`, made in place on the mesh.
      step: `step(state, batch, factor, request) -> (state, metrics)`; the state is donated. `metrics["request"]` is the
        largest request of any process, which is how all of them hear of a signal at the same step.
      request: this process's request, as an array for `step`.
      evaluate: `evaluate(parameters, batch) -> sums over the batch`: "loss" (weighted, nats), "weight", and, for a
        recall task, "correct" (the weight of the targets that are the likeliest token).
      model: `model(parameters) -> LM`.
      state_shape: the state as shapes with shardings, which is what a checkpoint is restored into.
      batch_sharding: of every `[B, T]` array of a batch.
    """

    init: Callable[[int], TrainState]
    step: Any
    request: Callable[[int], jax.Array]
    evaluate: Any
    model: Callable[[Any], LM]
    state_shape: TrainState
    batch_sharding: NamedSharding


def resolve_precision(config: RunConfig, platform: str | None = None) -> RunConfig:
    """`config` with the model's compute dtype written out, for this machine's devices unless `platform` is given."""
    dtype = config.precision
    if dtype == "auto":
        dtype = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def weighted_loss(model: LM, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum of the weighted losses of a batch in nats, and the sum of the weights."""
    losses = model.loss(
        batch["tokens"], batch["targets"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])


def mean_gradient(weighted: Callable[[Any, Batch], Any], weights: Any, batch: Batch, parts: int) -> tuple[Any, Any]:
    """The weighted mean loss of a batch and its gradient, the batch taken in `parts`.

    Args:
      weighted: (weights, batch) -> (sum of weighted losses, sum of their weights).
      parts: divides the batch; part a is rows a, a + parts, ..., so every device keeps the rows it has.
    """
    gradient = jax.value_and_grad(weighted, has_aux=True)
    if parts == 1:
        (total, count), sums = gradient(weights, batch)
    else:
        rows = {name: x.reshape(-1, parts, x.shape[1]).swapaxes(0, 1) for name, x in batch.items()}

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, gradient(weights, part)), None

        first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, weights, batch))
        ((total, count), sums), _ = jax.lax.scan(add, first, rows)
    count = jnp.maximum(count, 1.0)
    return total / count, jax.tree.map(lambda x: (x / count).astype(x.dtype), sums)


def mesh_layout(mesh: Mesh) -> Layout:
    """Where activations live on a mesh of `sharding.make_mesh`."""
    return Layout(mesh, batch=sharding.ROWS, heads="tensor", context="context")


def make_program(config: RunConfig, mesh: Mesh) -> Program:
    """Everything that is compiled for a run of `config` on `mesh`."""
    accumulate = config.data.accumulate
    sharding.check_batch(mesh, config.data.batch // accumulate, config.data.context)
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
        zero = jnp.zeros((), jnp.int32)
        average = None if config.optimizer.ema is None else jax.tree.map(jnp.copy, weights)
        return TrainState(zero, weights, optimizer.init(weights), zero, average)

    shape = jax.eval_shape(init, 0)
    shardings = sharding.state_shardings(shape, parameters, mesh)
    state_shape = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, shardings)
    replicated = NamedSharding(mesh, PartitionSpec())
    by_token = NamedSharding(mesh, sharding.batch_spec())
    layout = mesh_layout(mesh)
    by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def step(
        state: TrainState, batch: Batch, factor: jax.Array, request: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def weighted(weights: Any, part: Batch) -> tuple[jax.Array, jax.Array]:
            with use_layout(layout):
                return weighted_loss(nnx.merge(graph, weights, constants), part)

        loss, gradients = mean_gradient(weighted, state.parameters, batch, accumulate)
        norm = optax.tree.norm(gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, state.parameters)
        updates = jax.tree.map(lambda update: (factor * update).astype(update.dtype), updates)
        weights = optax.apply_updates(state.parameters, updates)
        proposed = (weights, moments, _averaged(state, weights, config.optimizer.ema))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        old = (state.parameters, state.optimizer, state.average)
        weights, moments, average = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, old)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped, "request": jnp.max(request)}
        return TrainState(state.step + 1, weights, moments, skipped, average), metrics

    def evaluate(weights: Any, batch: Batch) -> dict[str, jax.Array]:
        model = nnx.merge(graph, weights, constants)
        with use_layout(layout):
            loss, weight = weighted_loss(model, batch)
        sums = {"loss": loss, "weight": weight}
        if config.data.recall.task is not None:
            with use_layout(layout):
                logits, _ = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
            sums["correct"] = jnp.sum((jnp.argmax(logits, -1) == batch["targets"]) * batch["weights"])
        return sums

    def request(value: int) -> jax.Array:
        local = np.full(len(mesh.local_devices), value, np.int32)
        return jax.make_array_from_process_local_data(by_device, local)

    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step,
            in_shardings=(shardings, by_token, replicated, by_device),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        ),
        request=request,
        evaluate=jax.jit(evaluate, in_shardings=(shardings.parameters, by_token), out_shardings=replicated),
        model=lambda weights: nnx.merge(graph, weights, constants),
        state_shape=state_shape,
        batch_sharding=by_token,
    )


def _averaged(state: TrainState, weights: Any, decay: float | None) -> Any:
    if decay is None:
        return None
    # A fixed decay would remember the initial weights for 1 / (1 - decay) steps.
    count = state.step.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(lambda mean, x: (d * mean + (1 - d) * x).astype(mean.dtype), state.average, weights)
