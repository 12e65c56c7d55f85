"""What is measured: a function, the shapes it is compiled for, and the least it must move through device memory."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """What a person asked for cannot be done; the command line prints the message alone and exits with 2."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile.

    Args:
      function: what `jax.jit` compiles.
      arguments: its positional arguments, `jax.ShapeDtypeStruct` or pytrees of them, without shardings.
      minimum_bytes: the least that the operation must read from and write to device memory, each operand and result
        once; the time of a kernel is set against the time of these bytes.
      note: a remark shown beside the figures.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    minimum_bytes: int | None = None
    note: str = ""


def families() -> list[str]:
    """Kernel families that have cases: folders beside this one with a `cases.py`."""
    return sorted(
        path.parent.name for path in Path(__file__).parent.parent.glob("*/cases.py") if path.parent.name != "lab"
    )


def family_source(family: str) -> str:
    """Where the cases of `family` are, in the form `load` takes."""
    if family not in families():
        raise UsageError(f"--family {family}: has no cases; there are {', '.join(families()) or 'none yet'}")
    return f"pallas_kernels.{family}.cases:cases"


def load(source: str, target: str) -> dict[str, Case]:
    """The cases of `source` for `target`.

    Args:
      source: `my/file.py:function` or `package.module:function`; without `:function` it is `cases`. The function takes
        the name of a target and returns `{name: Case}`.

    Raises:
      UsageError: there is no such file, module or function, or what it returned is something else.
    """
    place, _, name = source.partition(":")
    name = name or "cases"
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"--module {source}: {place} has no function {name}(target)")
    found = function(target)
    if not isinstance(found, dict):
        raise UsageError(f"--module {source}: {name}({target!r}) gave {found!r:.80}, expected {{name: Case}}")
    for key, case in found.items():
        if not isinstance(case, Case) or not isinstance(case.arguments, tuple):
            raise UsageError(f"--module {source}: case {key!r} is {case!r:.80}, expected Case(function, (arguments,))")
    return found


def _file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"--module {path}: no such file")
    sys.path.insert(0, str(path.resolve().parent))  # so that it can import what lies beside it
    spec = importlib.util.spec_from_file_location(f"lab_cases_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> Any:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise UsageError(f"--module {name}: no such module, and no path that ends in .py")
    return importlib.import_module(name)
