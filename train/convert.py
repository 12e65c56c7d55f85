"""A run that begins with another run's softmax language model, whose attention becomes another (`TARGETS`).

    L(new) = mean over softmax layers l of the new layer's distillation_loss(q_l, k_l, v_l; new_l)

q_l, k_l and v_l are the softmax model's, whose layers run as they are: what a layer reads does not depend on what is
new in those before it, so all layers learn side by side and each by itself (Zhang et al. 2024, section 4.2). Everything
that is not new is copied. From there the run goes on as any other, and trains all weights.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jattn.models.lm import LM, LMConfig
from jattn.nn.layout import pin, use_layout
from jattn.nn.softmax import RotaryBlock, SoftmaxMixer
from train import distributed
from train.checkpoint import Checkpoints
from train.config import MIXER_FIELDS, RunConfig, read_config
from train.data.load import RunData
from train.data.pipeline import TrainData
from train.errors import UserError
from train.evaluate import place, score
from train.sharding import make_mesh, path_name
from train.signals import Stop
from train.step import Batch, Program, TrainState, make_program, mesh_layout, resolve_precision
from train.tasks import HELD_OUT
from train.workdir import CHECKPOINTS, write_json

# The mixers that softmax can become, and the weights that only they have.
TARGETS = {"hedgehog": r".*/mixer/(query|key)_map", "sea": r".*/mixer/estimator/.*"}
# What is converted is compared by itself; the other two change how numbers are computed, and not what they mean.
FREE = ("pattern", "mixer_options", "dtype", "remat")


def converted(
    config: RunConfig,
    workdir: Path,
    program: Program,
    state: TrainState,
    loaded: RunData,
    data: TrainData,
    stop: Stop,
    say: Callable[[str], None],
) -> TrainState | None:
    """`state`, that of a fresh run, with the weights of `config.conversion.source`; `None` when a signal stopped it.

    Leaves `conversion.json` in `workdir`: the loss of every batch, and what the held-out figures were before and after.

    Raises:
      UserError: a run without checkpoint, or a loss that is not finite.
    """
    conversion = config.conversion
    teacher_program, teacher, step = _load_teacher(config, say)
    weights = _transplanted(state.parameters, teacher)
    weights, losses = _distil(config, program, teacher_program, teacher, weights, data, stop)
    if losses is None:
        say("stopped while the new weights learnt; the same command begins anew")
        return None
    rows = config.data.batch // config.data.accumulate
    held_out = loaded.evaluation[HELD_OUT]
    figures = {
        "softmax": score(teacher_program, teacher, held_out, rows),
        "converted": score(program, weights, held_out, rows),
    }
    record = {"source": conversion.source, "step": step, "losses": losses, "held_out": figures}
    distributed.decide("conversion", lambda: write_json(workdir / "conversion.json", record))
    if losses:
        say(f"distillation loss {losses[0]:.4f} at the first batch, {losses[-1]:.4f} at the last of {len(losses)}")
    figure = program.task.headline.name
    before, after = (figures[name][figure] for name in ("softmax", "converted"))
    say(f"{figure.replace('_', ' ')} on held-out data: {before:.3f} with softmax, {after:.3f} converted")
    average = None if state.average is None else jax.tree.map(jnp.copy, weights)
    return state._replace(parameters=weights, average=average)


def distillation_loss(teacher: LM, student: LM, batch: Batch, **factors: float) -> Float[Array, ""]:
    """L of a batch: each converted layer of `student` against its layer of `teacher`, whose inputs both read."""
    (old_graph, old), (new_graph, new) = nnx.split(teacher.units), nnx.split(student.units)
    context = {name: batch[name] for name in ("positions", "segment_ids")}

    def unit(x: Array, slices: tuple[Any, Any]) -> tuple[Array, Array]:
        before, after = nnx.merge(old_graph, slices[0]), nnx.merge(new_graph, slices[1])
        losses = []
        for softmax, linear in zip(before.blocks, after.blocks, strict=True):
            if isinstance(softmax.mixer, SoftmaxMixer):
                losses.append(linear.mixer.distillation_loss(softmax.mixer_norm(pin(x)), **context, **factors))
            x, _ = softmax(pin(x), **context)
        return x, jnp.stack(losses)

    _, losses = jax.lax.scan(unit, teacher.embed(batch["tokens"]), (old, new))
    return jnp.mean(losses)


def _distil(
    config: RunConfig,
    program: Program,
    teacher_program: Program,
    teacher: Any,
    weights: Any,
    data: TrainData,
    stop: Stop,
) -> tuple[Any, list[float] | None]:
    """`weights` with new ones that have learnt, and the loss of every batch; `None` for these when it was stopped."""
    conversion = config.conversion
    optimizer = optax.adam(optax.cosine_decay_schedule(conversion.learning_rate, max(conversion.steps, 1)))
    target = _target(config.model)
    factors = {"xent_factor": conversion.xent_factor, "mse_factor": conversion.mse_factor}
    if target != "hedgehog":  # whose paper fixes its own
        factors = {}
    layout = mesh_layout(make_mesh(config.mesh))

    def loss(maps: dict[str, Array], weights: Any, teacher: Any, batch: Batch) -> Array:
        student = program.model(_with_maps(weights, maps))
        with use_layout(layout):
            return distillation_loss(teacher_program.model(teacher), student, batch, **factors)

    @jax.jit
    def step(
        maps: dict[str, Array], moments: Any, weights: Any, teacher: Any, batch: Batch, request: Array
    ) -> tuple[dict[str, Array], Any, tuple[Array, Array]]:
        value, gradient = jax.value_and_grad(loss)(maps, weights, teacher, batch)
        updates, moments = optimizer.update(gradient, moments)
        maps = optax.apply_updates(maps, updates)
        value = jnp.where(jnp.isfinite(optax.tree.norm(maps)), value, jnp.nan)
        return maps, moments, (value, jnp.max(request))

    maps = {name: x for name, x in _named(weights).items() if re.fullmatch(TARGETS[target], name)}
    moments = optimizer.init(maps)
    losses: list[float] = []
    with data.iterator() as batches:
        for _, batch in zip(range(conversion.steps), batches, strict=False):
            # As many rows as a step of training takes at a time.
            rows = {name: x[:: config.data.accumulate] for name, x in batch.items()}
            request = program.request(int(stop.requested is not None))
            maps, moments, (value, stopped) = step(maps, moments, weights, teacher, place(rows, program), request)
            if int(stopped):
                return weights, None
            losses.append(float(value))
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"conversion: the new weights or their loss were not finite at batch {len(losses)}; lower "
                    f"conversion.learning_rate, or choose another activation of Hedgehog's maps"
                )
    return _with_maps(weights, maps), losses


def _load_teacher(config: RunConfig, say: Callable[[str], None]) -> tuple[Program, Any, int]:
    """The softmax run's functions on this run's devices, its weights, and the step they are of."""
    source = Path(config.conversion.source or "")
    own = _read_source(source)
    teacher = dataclasses.replace(own, data=config.data, mesh=config.mesh, precision=config.precision)
    teacher_program = make_program(resolve_precision(teacher), make_mesh(config.mesh))
    with Checkpoints(source / CHECKPOINTS, say=say) as checkpoints:
        latest = checkpoints.latest()
        if latest is None:
            raise UserError(f"conversion.source: {source} has no checkpoint yet; train it first")
        state, _ = checkpoints.restore(latest, teacher_program.state_shape)
    return teacher_program, state.weights, latest


def check_source(config: RunConfig) -> None:
    """A run with a conversion fits the run that it begins with; before it begins, for its folder keeps its settings.

    Raises:
      UserError: there is no such run, it has no softmax layers, or it reads other tokens or is another model beyond
        them; the message has the overrides that make the two one.
    """
    source = Path(config.conversion.source or "")
    own = _read_source(source)
    teacher, student = own.model, config.model
    if "softmax" not in teacher.pattern:
        raise UserError(
            f"conversion.source: {source} has no softmax layers to convert, its pattern is {' '.join(teacher.pattern)}"
        )
    wanted = {field.name: getattr(teacher, field.name) for field in dataclasses.fields(teacher)}
    wanted = {name: value for name, value in wanted.items() if name not in FREE}
    target = _target(student)
    wanted["pattern"] = tuple(target if name == "softmax" else name for name in teacher.pattern)
    flags = [_flag(name, value) for name, value in wanted.items() if getattr(student, name) != value]
    if flags:
        raise UserError(f"conversion.source: {source} is another model; add {' '.join(flags)}")
    before, now = _mixers(teacher, "softmax"), _mixers(student, target)
    if before != now:
        raise UserError(f"model.mixer-options: expected {before}, as {source} has them, got {now}")
    _check_tokenizer(source, own.data.tokenizer, config.data.tokenizer)


def _read_source(source: Path) -> RunConfig:
    if not (source / "config.json").exists():
        raise UserError(
            f"conversion.source: {source} holds no run; start it with "
            f"python -m train run softmax_lm --workdir {source}, or give another --conversion.source"
        )
    own = read_config(source / "config.json")
    if not isinstance(own, RunConfig):
        raise UserError(f"conversion.source: {source} was trained on {own.task} and has no language model")
    return own


def _target(model: LMConfig) -> str:
    """What softmax becomes: the first of `TARGETS` that the model has."""
    return next((name for name in model.pattern if name in TARGETS), next(iter(TARGETS)))


def _flag(name: str, value: Any) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--model.{name}" if value else f"--model.no-{name}"
    return f"--model.{name} {' '.join(value) if isinstance(value, tuple) else value}"


def _mixers(model: LMConfig, rotary: str) -> dict[str, dict[str, Any]]:
    """Options of the mixers; of `rotary`, softmax in one model and its target in the other, those that both have."""
    options = {name: dict(own) for name, own in model.mixer_options.items()}
    given = options.pop(rotary, {})
    parameters = inspect.signature(RotaryBlock.__init__).parameters
    shared = {name: parameters[name].default for name in parameters if name not in MIXER_FIELDS}
    return {**options, "rotary": {name: given.get(name, default) for name, default in shared.items()}}


def _check_tokenizer(source: Path, before: str | None, now: str | None) -> None:
    if before is None:
        if now is not None:
            raise UserError(f"data.tokenizer: {source} reads bytes; leave it out")
        return
    kept = source / "tokenizer.json"
    same = now is not None and Path(now).expanduser().is_file() and Path(now).expanduser().read_bytes()
    if not same or same != kept.read_bytes():
        raise UserError(f"data.tokenizer: {source} has one of its own; add --data.tokenizer {kept}")


def _named(weights: Any) -> dict[str, Array]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}


def _with_maps(weights: Any, maps: dict[str, Array]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: maps.get(path_name(path), leaf), weights)


def _transplanted(weights: Any, teacher: Any) -> Any:
    """`weights` with all that `teacher` has under the same names."""
    return _with_maps(weights, _named(teacher))
