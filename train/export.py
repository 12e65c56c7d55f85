"""Weights as safetensors, for other programs: `python -m train export WORKDIR`.

Names are the parameters' paths with dots, as in "units.blocks.0.mixer.projections.query.kernel"; the leading axis of
"units." is the repetition of the pattern. The run's configuration and step are in the file's metadata.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from train.errors import UserError
from train.sharding import path_name


def write_safetensors(weights: Any, path: Path, metadata: Mapping[str, str], dtype: Any = None) -> None:
    """Write a tree of arrays, whole or not at all.

    Every process calls this, for arrays that are spread over several are gathered here, one after the other; the first
    writes. It holds all weights in the host's memory, since the format is written in one piece.

    Args:
      weights: a tree of arrays.
      metadata: strings.
      dtype: to convert to; `None` keeps each array's own.

    Raises:
      UserError: the file cannot be written.
    """
    import safetensors.numpy

    main = jax.process_index() == 0
    arrays: dict[str, np.ndarray] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(weights):
        whole = _gather(leaf)
        if main:
            # Not ascontiguousarray, which makes a scalar a vector.
            arrays[_name(keys)] = np.asarray(whole if dtype is None else whole.astype(jnp.dtype(dtype)), order="C")
    if not main:
        return
    draft = path.with_name(path.name + ".tmp")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # that of any new file here; safetensors' own is for its owner alone
        safetensors.numpy.save_file(arrays, draft, dict(metadata))
        draft.chmod(mode)
        os.replace(draft, path)
    except (OSError, safetensors.SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise UserError(
            f"{path}: the weights cannot be written ({error}); free some space or mend the permissions of its folder"
        ) from error


def read_safetensors(path: Path, like: Any) -> Any:
    """The arrays of `path` in the tree of `like`, on its shardings.

    Args:
      like: a tree of arrays or of `jax.ShapeDtypeStruct`.

    Raises:
      UserError: no such file, a damaged one, or arrays missing, left over, or of another shape or dtype.
    """
    import safetensors.numpy

    try:
        found = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: is no readable safetensors file ({error})") from error
    wanted = {_name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(like)}
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is left over" for name in found if name not in wanted]
    problems += [
        f"{name} is {found[name].dtype}{list(found[name].shape)}, wanted {leaf.dtype}{list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in found and (found[name].shape != leaf.shape or found[name].dtype != leaf.dtype)
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{path} does not fit the model: {'; '.join(problems[:8])}{more}")
    leaves = [jax.device_put(found[name], getattr(leaf, "sharding", None)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Write the weights of a run's newest valid checkpoint as safetensors."""

    output: str | None = None
    """The file; WORKDIR/model.safetensors by default, with a dtype WORKDIR/model.DTYPE.safetensors."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the numbers are converted to; by default they stay as they are."""


def main(arguments: list[str]) -> None:
    """`python -m train export WORKDIR [--output F] [--dtype D]`."""
    from train.config import as_json, parse_arguments
    from train.workdir import load

    if {"-h", "--help"} & {*arguments}:
        arguments = ["WORKDIR", "--help"]
    if not arguments or arguments[0].startswith("-"):
        raise UserError("export: expected the folder of a run first, as in python -m train export runs/pydoc_lm")
    workdir = Path(arguments[0])
    options = parse_arguments(_Options, arguments[1:], "export WORKDIR")
    config, _, state = load(workdir)
    # The run's own weights must not be replaced by rounded ones.
    name = f"model.{options.dtype}.safetensors" if options.dtype else "model.safetensors"
    output = Path(options.output) if options.output else workdir / name
    metadata = {"config": json.dumps(as_json(config)), "step": str(int(state.step))}
    write_safetensors(state.weights, output, metadata, options.dtype)
    leaves = jax.tree.leaves(state.weights)
    print(f"{output}: {len(leaves)} arrays, {sum(x.size for x in leaves):,} numbers, step {int(state.step)}")


def _name(keys: Any) -> str:
    return path_name(keys).replace("/", ".")


def _gather(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
