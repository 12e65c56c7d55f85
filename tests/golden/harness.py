"""Hold the library to arrays that the original authors' code computed.

A golden file `SYSTEM.npz` has inputs, outputs and, under `meta`, a JSON text that explains them. An adapter computes
outputs from inputs with this library's functions; the harness compares. With e = output - reference,

    max abs error = max |e|          rms ratio = rms(e) / rms(reference)

and an output is right when max |e| <= tolerance * max |reference| and the rms ratio <= tolerance. The harness watches
what the adapter reads: an array neither read nor computed is uncovered, one that is both read and computed is circular,
and proves nothing.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import json
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

HERE = Path(__file__).parent

Outputs = Mapping[str, Any]


class Case(Mapping[str, np.ndarray]):
    """The arrays of one golden file, read-only, with a record of those that were read.

    Asking whether a name is there, and listing the names, reads nothing.

    Attributes:
      meta: the JSON under `meta`: where the arrays come from, `config`, and what each key means.
      implementation: the `implementation=` that the adapter is to pass on, or `None`.
      read: names of the arrays read so far.
    """

    def __init__(self, path: str | os.PathLike[str], implementation: str | None = None):
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        self.meta: Mapping[str, Any] = MappingProxyType(json.loads(str(arrays.pop("meta", "{}"))))
        self.implementation = implementation
        self.read: set[str] = set()
        for array in arrays.values():
            array.setflags(write=False)
        self._arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._arrays[name]
        self.read.add(name)
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def reference(self, name: str) -> np.ndarray:
        """For the harness: an array without a record. An adapter that calls this cheats."""
        return self._arrays[name]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The relative error allowed, and why it is that."""

    relative: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How one system's golden file is computed with this library.

    Attributes:
      system: the file's stem.
      compute: `compute(case) -> {output name: array}`, traced; every name must be in the file.
      tolerances: pattern of output names -> tolerance; the first that matches holds.
      uncovered: pattern of array names -> why they are neither read nor computed.
      implementations: what `case.implementation` may be, for the tests to go through.
    """

    system: str
    compute: Callable[[Case], Outputs]
    tolerances: Mapping[str, Tolerance]
    uncovered: Mapping[str, str]
    implementations: tuple[str | None, ...]

    def tolerance(self, name: str) -> Tolerance:
        for pattern, tolerance in self.tolerances.items():
            if fnmatch.fnmatchcase(name, pattern):
                return tolerance
        raise ValueError(f"{self.system}: output {name!r} has no tolerance; declare one with its reason")

    def excuse(self, name: str) -> str | None:
        """Why `name` need not be covered, or `None` if no reason was given."""
        reasons = (reason for pattern, reason in self.uncovered.items() if fnmatch.fnmatchcase(name, pattern))
        return next(reasons, None)


_ADAPTERS: dict[str, Adapter] = {}


def adapter(
    system: str,
    *,
    tolerances: Mapping[str, Tolerance],
    uncovered: Mapping[str, str] = MappingProxyType({}),
    implementations: tuple[str | None, ...] = (None,),
) -> Callable[[Callable[[Case], Outputs]], Callable[[Case], Outputs]]:
    """Register the decorated function as the adapter of `system`; the arguments are `Adapter`'s."""

    def register(compute: Callable[[Case], Outputs]) -> Callable[[Case], Outputs]:
        if system in _ADAPTERS:
            raise ValueError(f"{system}: there is an adapter already, {_ADAPTERS[system].compute.__module__}")
        _ADAPTERS[system] = Adapter(system, compute, tolerances, uncovered, implementations)
        return compute

    return register


def systems() -> Mapping[str, Adapter]:
    """Every adapter by its system, in alphabetical order."""
    package = importlib.import_module("tests.golden.adapters")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_ADAPTERS.items()))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One output against its reference; `problem` says what no number can, such as a wrong shape."""

    name: str
    max_abs: float
    rms_ratio: float
    tolerance: float
    ok: bool
    problem: str = ""


def compare(name: str, output: Any, reference: np.ndarray | None, tolerance: float) -> Comparison:
    """Compare an output with its reference in float64 (complex128 for complex arrays).

    Where the reference is infinite or NaN the output must be the same; integers and booleans must be equal. Errors
    are relative to 1 where the whole reference is 0.
    """

    def failed(problem: str) -> Comparison:
        return Comparison(name, np.nan, np.nan, tolerance, False, problem)

    if reference is None:
        return failed("the file has no such array")
    got = np.asarray(output)
    if got.shape != reference.shape:
        return failed(f"shape {got.shape}, the reference has {reference.shape}")
    if reference.dtype.kind not in "fc":
        tolerance = 0.0
    wide = np.complex128 if "c" in (got.dtype.kind, reference.dtype.kind) else np.float64
    got, wanted = got.astype(wide), reference.astype(wide)
    finite = np.isfinite(wanted)
    if not np.array_equal(got[~finite], wanted[~finite], equal_nan=True):
        return failed("differs where the reference is infinite or NaN")
    got, wanted = got[finite], wanted[finite]
    if wanted.size == 0:
        return Comparison(name, 0.0, 0.0, tolerance, True)
    error = np.abs(got - wanted)
    largest = np.max(np.abs(wanted)) or 1.0
    rms = np.sqrt(np.mean(np.abs(wanted) ** 2)) or 1.0
    max_abs, rms_ratio = float(np.max(error)), float(np.sqrt(np.mean(error**2)) / rms)
    ok = max_abs <= tolerance * largest and rms_ratio <= tolerance
    return Comparison(name, max_abs, rms_ratio, tolerance, bool(ok))


@dataclasses.dataclass(frozen=True)
class Report:
    """What one run of an adapter showed.

    Attributes:
      system: whose adapter ran.
      comparisons: one for each output.
      uncovered: name -> the adapter's reason, or `None`, of each array neither read nor computed.
      circular: arrays that were both.
    """

    system: str
    comparisons: tuple[Comparison, ...]
    uncovered: Mapping[str, str | None]
    circular: tuple[str, ...]

    def passed(self, *, strict: bool) -> bool:
        """Whether all that was computed is right and honest and, if `strict`, nothing is left out without a reason."""
        sound = bool(self.comparisons) and all(c.ok for c in self.comparisons) and not self.circular
        return sound and not (strict and None in self.uncovered.values())

    def __str__(self) -> str:
        names = (c.name for c in self.comparisons)
        width = max([len("output"), *map(len, names)])
        lines = [f"{'output':<{width}}  max abs error  rms ratio  tolerance  ok"] if self.comparisons else []
        for c in self.comparisons:
            verdict = "ok" if c.ok else "FAILED"
            numbers = f"{c.max_abs:>13.2e}  {c.rms_ratio:>9.2e}  {c.tolerance:>9.0e}"
            lines.append(f"{c.name:<{width}}  {numbers}  {verdict}{': ' + c.problem if c.problem else ''}")
        lines += [f"uncovered: {name} ({reason or 'no reason given'})" for name, reason in self.uncovered.items()]
        lines += [f"circular: {name} was read and returned" for name in self.circular]
        if not self.comparisons:
            lines.append("the adapter returned no output")
        ok = sum(c.ok for c in self.comparisons)
        lines.append(
            f"{self.system}: {ok} ok, {len(self.comparisons) - ok} failed, "
            f"{len(self.uncovered)} uncovered, {len(self.circular)} circular"
        )
        return "\n".join(lines)


def run(adapter: Adapter, path: str | os.PathLike[str] | None = None, implementation: str | None = None) -> Report:
    """Run an adapter on a file of its system, by default the one that is here, with float64 switched on.

    float64 leaves the reference's own rounding as the only error, so tolerances can be as small as that. What the
    adapter computes is one program: operation by operation, most of the time would go into compiling.
    """
    case = Case(path or HERE / f"{adapter.system}.npz", implementation)
    with jax.enable_x64(True):
        computed = jax.jit(lambda: dict(adapter.compute(case)))()
        outputs = {name: np.asarray(output) for name, output in computed.items()}
    read = frozenset(case.read)
    comparisons = tuple(
        compare(name, output, case.reference(name) if name in case else None, adapter.tolerance(name).relative)
        for name, output in outputs.items()
    )
    return Report(
        system=adapter.system,
        comparisons=comparisons,
        uncovered={name: adapter.excuse(name) for name in case if name not in read and name not in outputs},
        circular=tuple(name for name in outputs if name in read),
    )
