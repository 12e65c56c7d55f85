"""The training step: a pure function of (state, batch, factor), compiled once with explicit shardings.

loss = sum_t w_t loss_t / sum_t w_t;  update = factor * optimiser(gradient);  an update that is not finite is skipped
average = d average + (1 - d) weights, with d = min(decay, (1 + t) / (10 + t)) at update t

With accumulation the sums run over the parts of the batch, one after the other; the gradient is that of the whole.
Running statistics of BatchNorm, of the parts one after the other, count as weights for the average: it is scored with
the mean of the statistics that belong to the weights it is the mean of. The random key of update t is
fold_in(key(seed), t), so a run that goes on draws what it would have drawn.
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
from jaxtyping import Array

from jattn.nn.layout import Layout, use_layout
from train import sharding
from train.config import CommonConfig
from train.errors import UserError, user_errors
from train.optimizer import make_optimizer
from train.tasks import Task, task_of

Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes; all of it is in a checkpoint."""

    step: jax.Array
    parameters: Any
    optimizer: Any
    skipped: jax.Array
    average: Any = None
    """The running mean of the weights, where the run keeps one."""
    statistics: Any = None
    """What the forward pass itself changes in training, for models that have such."""

    @property
    def weights(self) -> Any:
        """What is scored, sampled and exported: parameters and statistics, averaged if the run does that."""
        return _joined(self.parameters, self.statistics) if self.average is None else self.average


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run and where its arrays live.

    Attributes:
      task: whose model, loss and figures these are.
      init: `init(seed) -> state`, made in place on the mesh.
      step: `step(state, batch, factor, request) -> (state, metrics)`; the state is donated. `metrics["request"]` is the
        largest request of any process, which is how all of them hear of a signal at the same step.
      request: this process's request, as an array for `step`.
      evaluate: `evaluate(weights, batch) -> sums over the batch`, the task's.
      model: `model(weights)` is the model.
      state_shape: the state as shapes with shardings, which is what a checkpoint is restored into.
      batch_sharding: of every array of a batch.
    """

    task: Task
    init: Callable[[int], TrainState]
    step: Any
    request: Callable[[int], jax.Array]
    evaluate: Any
    model: Callable[[Any], Any]
    state_shape: TrainState
    batch_sharding: NamedSharding


def resolve_precision[Config: CommonConfig](config: Config, platform: str | None = None) -> Config:
    """`config` with the model's compute dtype written out, for this machine's devices unless `platform` is given.

    Raises:
      UserError: the model has a compute dtype of its own, which is another.
    """
    dtype = config.precision
    if dtype == "auto":
        dtype = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    if config.model.dtype not in (type(config.model).dtype, dtype):  # the first is what nobody has given
        raise UserError(
            f"model.dtype: follows from precision, which makes it {dtype} here, got {config.model.dtype}; leave it out "
            "of the recipe and use precision (--precision float32 or bfloat16)"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def mean_gradient(
    weighted: Callable[..., Any], weights: Any, statistics: Any, batch: Batch, key: Array, parts: int
) -> tuple[Any, Any, Any]:
    """The weighted mean loss of a batch, the statistics after it, and its gradient; the batch is taken in `parts`.

    Args:
      weighted: (weights, statistics, batch, key) -> (sum of weighted losses, (sum of their weights, new statistics)).
      parts: divides the batch; part a is rows a, a + parts, ..., so every device keeps the rows it has.
    """
    gradient = jax.value_and_grad(weighted, has_aux=True)
    if parts == 1:
        (total, (count, statistics)), sums = gradient(weights, statistics, batch, key)
    else:
        rows = {name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}

        def add(carry: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            so_far, statistics = carry
            own, index = part
            (total, (count, statistics)), sums = gradient(weights, statistics, own, jax.random.fold_in(key, index))
            return (jax.tree.map(jnp.add, so_far, (total, count, sums)), statistics), None

        (total, (count, _)), sums = jax.eval_shape(gradient, weights, statistics, batch, key)
        first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (total, count, sums))
        carried, _ = jax.lax.scan(add, (first, statistics), (rows, jnp.arange(parts)))
        (total, count, sums), statistics = carried
    count = jnp.maximum(count, 1.0)
    return total / count, statistics, jax.tree.map(lambda x: (x / count).astype(x.dtype), sums)


def mesh_layout(mesh: Mesh) -> Layout:
    """Where activations live on a mesh of `sharding.make_mesh`."""
    return Layout(mesh, batch=sharding.ROWS, heads="tensor", context="context")


def make_program(config: CommonConfig, mesh: Mesh) -> Program:
    """Everything that is compiled for a run of `config` on `mesh`."""
    accumulate = config.data.accumulate
    task = task_of(config)
    task.check_batch(mesh)
    optimizer = make_optimizer(config.optimizer)

    def build(seed: jax.Array | int) -> Any:
        return task.build(nnx.Rngs(params=jax.random.key(seed)))

    # Every layer is built here first, without arrays: options that do not fit one another show.
    with user_errors("model"):
        parts: Any = nnx.split(nnx.eval_shape(lambda: build(0)), nnx.Param, nnx.BatchStat, ...)
    graph, parameters, statistics, constants = parts
    has_statistics = bool(jax.tree.leaves(statistics))
    # What is not trained (the decays of lightning attention) follows from the configuration and is made once.
    if jax.tree.leaves(constants):
        constants = jax.jit(lambda: nnx.state(build(0), nnx.Not(nnx.Any(nnx.Param, nnx.BatchStat))))()

    def init(seed: jax.Array) -> TrainState:
        weights, made = nnx.state(build(seed), nnx.Param, nnx.BatchStat)
        statistics = made if has_statistics else None
        zero = jnp.zeros((), jnp.int32)
        average = None if config.optimizer.ema is None else jax.tree.map(jnp.copy, _joined(weights, statistics))
        return TrainState(zero, weights, optimizer.init(weights), zero, average, statistics)

    shape = jax.eval_shape(init, 0)
    shardings = sharding.state_shardings(shape, parameters, mesh, task.rules)
    state_shape = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, shardings)
    replicated = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, task.batch_spec)
    layout = mesh_layout(mesh)
    by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def step(
        state: TrainState, batch: Batch, factor: jax.Array, request: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def weighted(weights: Any, statistics: Any, part: Batch, key: Array) -> tuple[Array, Any]:
            # A copy: variables that were made outside of the gradient cannot be changed inside of it.
            model = nnx.merge(graph, _joined(weights, statistics), constants, copy=True)
            with use_layout(layout):
                loss, count = task.loss(model, part, key)
            return loss, (count, nnx.state(model, nnx.BatchStat) if has_statistics else None)

        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss, statistics, gradients = mean_gradient(
            weighted, state.parameters, state.statistics, batch, key, accumulate
        )
        norm = optax.tree.norm(gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, state.parameters)
        updates = jax.tree.map(lambda update: (factor * update).astype(update.dtype), updates)
        weights = optax.apply_updates(state.parameters, updates)
        average = _averaged(state, _joined(weights, statistics), config.optimizer.ema)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        old = (state.parameters, state.optimizer, state.average, state.statistics)
        weights, moments, average, statistics = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (weights, moments, average, statistics), old
        )
        skipped = state.skipped + (~finite).astype(jnp.int32)
        metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped, "request": jnp.max(request)}
        return TrainState(state.step + 1, weights, moments, skipped, average, statistics), metrics

    def evaluate(weights: Any, batch: Batch) -> dict[str, jax.Array]:
        with use_layout(layout):
            return task.sums(nnx.merge(graph, weights, constants), batch)

    def request(value: int) -> jax.Array:
        local = np.full(len(mesh.local_devices), value, np.int32)
        return jax.make_array_from_process_local_data(by_device, local)

    return Program(
        task=task,
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step,
            in_shardings=(shardings, by_row, replicated, by_device),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        ),
        request=request,
        evaluate=jax.jit(evaluate, in_shardings=(shardings.weights, by_row), out_shardings=replicated),
        model=lambda weights: nnx.merge(graph, weights, constants),
        state_shape=state_shape,
        batch_sharding=by_row,
    )


def _joined(parameters: Any, statistics: Any) -> Any:
    """One tree of both, as `nnx.merge` takes it."""
    return parameters if statistics is None else nnx.merge_state(parameters, statistics)


def _averaged(state: TrainState, weights: Any, decay: float | None) -> Any:
    if decay is None:
        return None
    # A fixed decay would remember the initial weights for 1 / (1 - decay) steps.
    count = state.step.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(lambda mean, x: (d * mean + (1 - d) * x).astype(mean.dtype), state.average, weights)
