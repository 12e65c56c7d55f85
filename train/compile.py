"""`python -m train compile RECIPE --topology v5p:8x8x8`: does a configuration fit a pod, before a dollar is spent?

The training step itself is compiled for chips that are not present, and the compiler says what every device holds:

    total = arguments + outputs - aliased + temporaries   against   the memory of a device

Arguments are the training state and the batch; the state is donated, so new weights take the place (alias) of the old.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import UserError
from train.topology import GIB, MEMORY, devices_of, prepare

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from train.config import CommonConfig
    from train.hlo import Traffic

USAGE = """\
usage: python -m train compile RECIPE --topology NAME [--quick] [--json FILE] [overrides]

  --topology NAME   v5e:2x4, v5p:8x8x8, v6e:16x16, v4:4x4x4, tpu7x:2x2x1 and so on; v5e-8 and v6e-256 by chips; h100:8
  --quick           let the compiler try less: an answer in less than half of the time on TPUs, memory within some
                    percent, collectives not as a run would have them
  --json FILE       also write the figures there

Exit code 0 if the run fits, 1 if it does not, 2 for a mistake. Overrides: python -m train run RECIPE --help
Recipes: {recipes}"""


@dataclasses.dataclass(frozen=True)
class Report:
    """What compiling a step told. Bytes and FLOPs are those of one device unless they say otherwise.

    Attributes:
      tokens: units of work in a step, `unit`s.
      memory: bytes by what takes them; empty when the compiler ran out of memory.
      total: bytes in all, `capacity` of them available.
      model_flops: of a step on all devices, recomputation not counted.
      compiler_flops: as the compiler counts them, the body of a loop once.
      unit_weights: parameters of one unit of layers that are split over devices.
      unit_gathers: all-gathers that make such a weight whole, inside the scan.
      stack_gathers: all-gathers that make those of all units at once; 0 is what FSDP wants.
      changes: overrides that need less memory.
      quick: the compiler was told to try less than it does for a run.
    """

    recipe: str
    topology: str
    device: str
    devices: int
    mesh: dict[str, int]
    parameters: int
    tokens: int
    fits: bool
    total: int
    capacity: int
    memory: dict[str, int]
    model_flops: float
    compiler_flops: float
    traffic: list[Traffic]
    unit_weights: int
    unit_gathers: int
    stack_gathers: int
    seconds: float
    changes: list[str]
    unit: str = "tokens"
    quick: bool = False


def main(arguments: list[str]) -> None:
    """The verb.

    Raises:
      UserError: a recipe, topology, option or override that cannot be, or a compiler that is not installed.
      SystemExit: with code 1 when the run does not fit.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        from train.config import recipes

        print(USAGE.format(recipes=", ".join(recipes())))
        return
    recipe, arguments = arguments[0], arguments[1:]
    topology, arguments = _take(arguments, "--topology")
    path, arguments = _take(arguments, "--json")
    quick, arguments = "--quick" in arguments, [argument for argument in arguments if argument != "--quick"]
    if topology is None:
        raise UserError("compile: expected --topology NAME, as in --topology v5e:2x4")
    prepare(topology)
    from train.config import load_recipe, parse_overrides

    report = analyse(recipe, parse_overrides(load_recipe(recipe), arguments), topology, quick=quick)
    show(report)
    if path is not None:
        try:
            Path(path).write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json: {path} cannot be written ({error.strerror}); name another file") from error
    if not report.fits:
        raise SystemExit(1)


def _take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.removeprefix(f"{option}="), arguments[:index] + arguments[index + 1 :]
        if argument == option:
            if index + 1 == len(arguments):
                raise UserError(f"{option}: expected a value after it")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
    return None, arguments


def place(config: CommonConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of `config`.

    Raises:
      UserError: axes that the devices cannot be laid out in; with overrides that can.
    """
    from train.sharding import make_mesh

    try:
        return make_mesh(config.mesh, devices)
    except UserError as error:
        raise UserError(f"{error}; {' '.join(_fitting_mesh(config, len(devices)))} does") from None


def _fitting_mesh(config: CommonConfig, devices: int) -> list[str]:
    """Overrides for a mesh near the wanted one that has as many devices as there are."""
    sizes = {}
    for axis, wanted in (
        ("tensor", config.mesh.tensor),
        ("context", config.mesh.context),
        ("fsdp", config.data.batch // config.data.accumulate),
    ):
        sizes[axis] = math.gcd(max(wanted, 1), devices)
        devices //= sizes[axis]
    return [f"--mesh.data {devices}", *(f"--mesh.{axis} {size}" for axis, size in sizes.items())]


def analyse(recipe: str, config: CommonConfig, topology: str, *, quick: bool = False) -> Report:
    """Compile the training step of `config` for `topology`, without running anything; after `prepare`.

    `quick` asks less of the compiler (XLA's effort level O1).

    Raises:
      UserError: a topology that does not exist, or one that the configuration cannot be divided over.
    """
    import jax

    from jattn.models.lm import count_parameters
    from train import hlo
    from train.step import make_program, resolve_precision

    devices = devices_of(topology)
    config = resolve_precision(config, devices[0].platform)
    mesh = place(config, devices)
    program = make_program(config, mesh)
    start = time.perf_counter()
    shapes = _step_shapes(program, mesh)
    model = program.model(program.state_shape.weights)
    capacity = MEMORY[devices[0].device_kind]
    memory: dict[str, int] = {}
    text, compiler_flops = "", 0.0
    try:
        compiled = _lower(program.step, shapes, mesh).compile({"optimization_level": "O1"} if quick else None)
    except jax.errors.JaxRuntimeError as error:
        total = _ran_out(str(error))
        if total is None:
            raise
    else:
        stats = compiled.memory_analysis()
        memory = {
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes,
            "aliased": stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
        }
        total = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
        text, compiler_flops = compiled.as_text(), float((compiled.cost_analysis() or {}).get("flops", 0.0))
    seconds = time.perf_counter() - start
    found = hlo.collectives(text)
    stacked = list(_stacked(program.state_shape.parameters))
    of_unit, of_stack = hlo.weight_gathers(found, stacked)
    fits = bool(memory) and total <= capacity
    return Report(
        recipe=recipe,
        topology=topology,
        device=devices[0].device_kind,
        devices=len(devices),
        mesh=dict(mesh.shape),
        parameters=count_parameters(model),
        tokens=program.task.units,
        fits=fits,
        total=total,
        capacity=capacity,
        memory=memory,
        model_flops=3 * program.task.flops(model),
        compiler_flops=compiler_flops,
        traffic=hlo.traffic(found),
        unit_weights=sum(math.prod(split) > 1 for _, split in stacked),
        unit_gathers=len(of_unit),
        stack_gathers=len(of_stack),
        seconds=seconds,
        changes=[] if fits else list(changes(config, devices, model)),
        unit=program.task.unit,
        quick=quick,
    )


def _step_shapes(program: Any, mesh: Mesh) -> tuple[Any, ...]:
    """What `program.step` takes, as shapes that say where they live."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch = {
        name: array(shape, dtype, program.batch_sharding)
        for name, (shape, dtype) in program.task.batch_shapes().items()
    }
    factor = array((), jnp.float32, NamedSharding(mesh, PartitionSpec()))
    request = array((mesh.size,), jnp.int32, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    return program.state_shape, batch, factor, request


def _lower(step: Any, shapes: tuple[Any, ...], mesh: Mesh) -> Any:
    """`step` lowered for the mesh's platform."""
    import jax

    device = mesh.devices.flat[0]
    if device.platform in ("tpu", "cpu"):
        return step.lower(*shapes)
    abstract = jax.sharding.AbstractMesh(
        tuple(mesh.shape.values()),
        mesh.axis_names,
        axis_types=(jax.sharding.AxisType.Auto,) * len(mesh.axis_names),
        abstract_device=jax.sharding.AbstractDevice(device.device_kind, 132, "cuda"),
    )
    with jax.sharding.use_abstract_mesh(abstract):
        return step.trace(*shapes).lower(lowering_platforms=("cuda",))


def _ran_out(message: str) -> int | None:
    """Bytes that the compiler wanted, 0 if it does not say; `None` if its error is another one."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    # Either "Used 22.78G of 15.75G hbm" or "required for HLO temporaries (849.86G) exceeds available HBM".
    wanted = re.search(r"(?:Used |required for [\w ]+\()([\d.]+)([KMGT])", message)
    return round(float(wanted[1]) * 1024 ** ("KMGT".index(wanted[2]) + 1)) if wanted else 0


def _stacked(parameters: Any) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Shape of every parameter that is stacked by unit, and over how many devices each of its dimensions is split."""
    import jax

    from train.sharding import path_name

    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        if path_name(path).startswith("units/"):
            local = leaf.sharding.shard_shape(leaf.shape)
            yield leaf.shape, [whole // part for whole, part in zip(leaf.shape, local, strict=True)]


def changes(config: CommonConfig, devices: Sequence[jax.Device], model: Any) -> Iterator[str]:
    """Overrides that make every device hold less, each of them one that the configuration allows."""
    from train.tasks import task_of

    sizes = dict(place(config, devices).shape)
    return task_of(config).smaller(sizes, lambda **axes: _divides(config, devices, model, {**sizes, **axes}))


def _divides(config: CommonConfig, devices: Sequence[jax.Device], model: Any, sizes: dict[str, int]) -> bool:
    """Whether the parameters and the batch divide over a mesh of these sizes."""
    from flax import nnx

    from train import sharding
    from train.config import MeshConfig
    from train.tasks import task_of

    task = task_of(config)
    try:
        mesh = place(dataclasses.replace(config, mesh=MeshConfig(**sizes)), devices)
        task.check_batch(mesh)
        sharding.parameter_shardings(nnx.state(model, nnx.Param), mesh, task.rules)
    except UserError:
        return False
    return True


def show(report: Report) -> None:
    """The figures as a person reads them."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    axes = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    console.print(f"[bold]{report.recipe}[/bold] on {report.topology}: {report.devices} x {report.device} ({axes})")
    console.print(f"  {report.parameters:,} parameters, {report.tokens:,} {report.unit} a step")
    flops = f"  {report.model_flops:.3g} FLOPs a step"
    if report.compiler_flops:
        flops += f"; a device's share {report.model_flops / report.devices:.3g}, "
        flops += f"the compiler's count {report.compiler_flops:.3g} (bodies of loops once)"
    effort = "; without --quick the compiler tries harder, and figures differ by some percent" if report.quick else ""
    console.print(f"{flops}\n  compiled in {report.seconds:.0f} s{effort}\n")
    if report.memory:
        table = Table(title="Memory of a device", title_justify="left")
        for column in (*report.memory, "total"):
            table.add_column(column, justify="right")
        table.add_row(*(_size(value) for value in report.memory.values()), _size(report.total))
        console.print(table)
    if report.traffic:
        table = Table(title="Collectives of a step", title_justify="left")
        table.add_column("kind")
        for column in ("in loops", "outside", "executed", "bytes a device receives"):
            table.add_column(column, justify="right")
        for row in report.traffic:
            table.add_row(row.kind, f"{row.inside:,}", f"{row.outside:,}", f"{row.times:,}", _size(row.bytes))
        console.print(table)
    if report.mesh["fsdp"] > 1 and report.memory:
        console.print(
            f"  weights: {report.unit_gathers} all-gathers inside the scan for {report.unit_weights} split weights of "
            f"a unit, {report.stack_gathers or 'none'} of all units at once"
        )
        if report.unit_gathers < report.unit_weights:
            console.print("  not all weights are gathered: the compiler sends activations in their place")
    console.print(f"\n{verdict(report)}")
    for change in report.changes:
        console.print(f"  {change}")


def verdict(report: Report) -> str:
    """One line: does it fit?"""
    capacity = f"{report.capacity / GIB:.0f} GiB"
    if report.fits:
        line = f"fits, {report.total / report.capacity:.0%} of {capacity}"
        if report.device.startswith("NVIDIA") and report.total > 0.75 * report.capacity:
            line += "; JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION=.95"
        return line
    needed = f"needs {report.total / GIB:.1f} GiB" if report.total else "needs more memory than"
    end = "; any of these needs less:" if report.changes else "; choose more devices or a smaller model"
    return f"does not fit, {needed} {'of' if report.total else 'the'} {capacity} of a device{end}"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"
