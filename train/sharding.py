"""Where every array of a training state lives on the mesh.

Parameters get their sharding from a short list of (path regex, axes) rules. Every parameter must match exactly one, and
every sharded dimension must divide: anything else is an error that says so, never a silent replication.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import MeshConfig
from train.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
ROWS = ("data", "fsdp")
"""The axes that split the rows of a batch."""

# The trailing axes of a parameter; leading ones (the stack of scanned units) stay whole.
Rule = tuple[str, tuple[str | None, ...]]
RULES: tuple[Rule, ...] = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"head/kernel", ("fsdp", "tensor")),
    (r".*/projections/(query|key|value)/kernel", ("fsdp", "tensor")),
    (r".*/projections/out/kernel", ("tensor", "fsdp")),
    (r".*/projections/(query|key|value)/bias", ("tensor",)),
    (r".*/mixer/second_(key|value)/kernel", ("fsdp", "tensor")),
    (r".*/mixer/second_(key|value)/bias", ("tensor",)),
    (r".*/projections/out/bias", (None,)),
    (r".*/mixer/eta/kernel", ("fsdp", None)),
    (r".*/mixer/eta/bias", (None,)),
    (r".*/mixer/gate/down/kernel", ("fsdp", None)),
    (r".*/mixer/gate/up/kernel", (None, "tensor")),
    (r".*/mixer/gate/up/bias", ("tensor",)),
    (r".*/mixer/convolutions/(query|key|value)/kernel", (None, "tensor")),
    (r".*/mixer/convolutions/(query|key|value)/bias", ("tensor",)),
    (r".*/mixer/beta/kernel", ("fsdp", "tensor")),
    (r".*/mixer/decay/down/kernel", ("fsdp", None)),
    (r".*/mixer/decay/up/kernel", (None, "tensor")),
    (r".*/mixer/decay/(up/bias|log_rate)", ("tensor",)),
    (r".*/mixer/decay_down/kernel", ("fsdp", None)),
    (r".*/mixer/decay_up/kernel", (None, "tensor")),
    (r".*/mixer/decay_up/bias", ("tensor",)),
    (r".*/mixer/(in_proj|gate_proj|gates)/kernel", ("fsdp", "tensor")),
    (r".*/mixer/(in_proj|gate_proj|gates)/bias", ("tensor",)),
    (r".*/mixer/x_proj/kernel", ("fsdp", None)),
    (r".*/mixer/dt_proj/kernel", (None, "tensor")),
    (r".*/mixer/(dt_bias|D|norm_scale|alpha|A_log|(nu|theta|gamma)_log)", ()),
    (r".*/mixer/B_(re|im)", ("fsdp", "tensor")),
    (r".*/mixer/C_(re|im)", ("tensor", "fsdp")),
    (r".*/mixer/convolution/kernel", (None, "tensor")),
    (r".*/mixer/convolution/bias", ("tensor",)),
    (r".*/mixer/rglru/(write|recurrence)_gate/(kernel|bias)|.*/mixer/rglru/decay", ()),
    (r".*/mixer/out_proj/kernel", ("tensor", "fsdp")),
    (r".*/mixer/out_proj/bias", (None,)),
    (r".*/mixer/score_parameters/\d+", ()),
    # Small, and read by heads, which may be fewer than the devices of an axis.
    (r".*/mixer/(query|key)_map", (None, None, None)),
    (r".*/mixer/estimator/(positions|(cnn/)?(encoder|rows|gates|first|second|last)/(kernel|bias))", ()),
    (r".*/mlp/(gate|up)/kernel", ("fsdp", "tensor")),
    (r".*/mlp/down/kernel", ("tensor", "fsdp")),
    (r"(.*/)?\w*norm/(scale|bias)", (None,)),
)


def path_name(path: Sequence[Any]) -> str:
    """A key path as "units/blocks/0/mixer/..."; the wrapper that Flax puts around a value is left out."""
    wrapper = jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(tuple(key for key in path if key != wrapper), simple=True, separator="/")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices; on TPUs, neighbours in it are neighbours on the chips' torus.

    Raises:
      UserError: axes whose product is not the number of devices, or that the torus cannot be cut into.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and not (axis == "data" and size == -1):
            raise UserError(f"mesh.{axis}: expected at least 1, got {size}")
    rest = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % rest or (sizes["data"] != -1 and rest != len(devices)):
        wanted = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(f"mesh: {wanted} does not fit {len(devices)} devices; their product must be that number")
    if sizes["data"] == -1:
        sizes["data"] = len(devices) // rest
    shape = tuple(sizes.values())
    if devices[0].platform != "tpu":
        return Mesh(np.array(devices).reshape(shape), AXES)
    for split in (False, True):
        with suppress(NotImplementedError, ValueError):
            return Mesh(mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=split), AXES)
    torus = " x ".join(str(1 + max(axis)) for axis in zip(*(device.coords for device in devices), strict=True))
    raise UserError(
        f"mesh: {' x '.join(map(str, shape))} cannot be laid on a torus of {torus} chips; every axis must be a product "
        "of divisors of these sides"
    )


def batch_spec() -> PartitionSpec:
    """Rows of a `[B, T]` batch over data and fsdp, tokens over context."""
    return PartitionSpec(ROWS, "context")


def check_batch(mesh: Mesh, batch: int, context: int) -> None:
    """A global batch of `batch` sequences of `context` tokens splits evenly over the mesh."""
    check_rows(mesh, batch, "sequences")
    if context % mesh.shape["context"]:
        raise UserError(f"data.context: {context} tokens do not divide over context = {mesh.shape['context']} devices")


def check_rows(mesh: Mesh, batch: int, rows: str) -> None:
    """A global batch of `batch` rows, which messages call `rows`, splits evenly over the mesh."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % devices:
        raise UserError(f"data.batch: {batch} {rows} do not divide over data x fsdp = {devices} devices")


def parameter_shardings(parameters: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """A tree of `NamedSharding`s for a tree of arrays or shapes.

    Raises:
      UserError: a parameter that no rule or more than one rule matches, or a dimension that does not divide.
    """

    def sharding(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_name(path)
        matching = [axes for pattern, axes in rules if re.fullmatch(pattern, name)]
        if len(matching) != 1:
            raise UserError(
                f"sharding: parameter {name} is matched by {len(matching)} rules; train/sharding.py must have one"
            )
        axes = (None,) * (len(leaf.shape) - len(matching[0])) + matching[0]
        for size, axis in zip(leaf.shape, axes, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis}: {mesh.shape[axis]} devices do not divide a dimension of {size} of parameter {name} "
                    f"{tuple(leaf.shape)}; change the mesh or the model's width"
                )
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, parameters)


def state_shardings(state: Any, parameters: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """Shardings for a whole training state: an array whose path ends as a parameter's does lives where that parameter
    does (moments of an optimiser), everything else is replicated.
    """
    by_name = {
        path_name(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(parameters),
            jax.tree.leaves(parameter_shardings(parameters, mesh, rules)),
            strict=True,
        )
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(path: Sequence[Any], leaf: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            shape, found = by_name.get("/".join(parts[start:]), (None, replicated))
            if shape == leaf.shape:
                return found
        return replicated

    return jax.tree_util.tree_map_with_path(sharding, state)
