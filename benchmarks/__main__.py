"""`python -m benchmarks [NAME ...] [--write]`: run benchmarks by name, all of them without a name."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time

from rich.console import Console

import benchmarks
from benchmarks import measure

# The fourth needs libtpu: make lab.
SHARED = ("measure", "models", "fla_peer", "compile_ahead", "__main__")


def main(arguments: list[str]) -> int:
    """1 when a target was missed, 2 for an unknown name or where one that is named cannot be measured."""
    known = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in SHARED)
    names = [argument for argument in arguments if argument != "--write"] or known
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"error: no benchmark is called {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120)
    met = True
    for name in names:
        start = time.perf_counter()
        benchmark = importlib.import_module(f"benchmarks.{name}")
        reason = benchmark.missing() if hasattr(benchmark, "missing") else None
        if reason and name in arguments:
            print(f"error: {name}: {reason}", file=sys.stderr)
            return 2
        if reason:
            console.print(f"{name}: left out, {reason}\n")
            continue
        result = benchmark.run()
        measure.show(result, console)
        met &= result.met()
        if "--write" in arguments:
            console.print(f"  {measure.write(name, result)}, {time.perf_counter() - start:.0f} s\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
