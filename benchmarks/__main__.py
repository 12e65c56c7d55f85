"""`python -m benchmarks NAME ... [--write]`: run benchmarks by name."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
import time
from pathlib import Path

from rich.console import Console

import benchmarks
from benchmarks import measure

# The fourth needs libtpu: make lab.
SHARED = ("measure", "models", "fla_peer", "compile_ahead", "__main__")
USAGE = """\
python -m benchmarks NAME ... [--write]

Each prints a table, its targets and whether they were met.

{names}

  all      every one of them, which takes hours; those that this machine has no device for are left out
  --write  also keep the result in benchmarks/results/NAME.json, with machine and versions
"""


def main(arguments: list[str]) -> int:
    """1 when a target was missed, 2 without a name, for an unknown one, or where a named one cannot be measured."""
    known = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in SHARED)
    names = [argument for argument in arguments if argument != "--write"]
    if not names or {"-h", "--help"} & {*names}:
        width = max(map(len, known))
        print(USAGE.format(names="\n".join(f"  {name:<{width}}  {_question(name)}" for name in known)), end="")
        return 0 if names else 2
    if "all" in names:
        names = known
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


def _question(name: str) -> str:
    """The first line of a benchmark's docstring, without what importing it takes."""
    text = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text())) or ""
    return text.partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
