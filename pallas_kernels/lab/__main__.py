"""`python -m pallas_kernels.lab`: compile kernels for chips that are not here, and read their schedules.

    python -m pallas_kernels.lab compile --family linear
    python -m pallas_kernels.lab report --module my_kernels.py:cases --targets v5e,v6e --json figures.json
    python -m pallas_kernels.lab report --module pallas_kernels.lab.anchors --targets v5e      jax's splash attention

`cases(target)` returns {name: pallas_kernels.lab.Case}. Flags in LIBTPU_INIT_ARGS and XLA_FLAGS reach the compilers.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from pathlib import Path

from rich.console import Console

from pallas_kernels.lab import cases, chips, runner, table
from pallas_kernels.lab.cases import UsageError

_TARGETS = "v5e,v5p,v6e,tpu7x,h100"
_NARROWEST = 180  # columns of a table that goes to a file or a pipe


def main(arguments: list[str] | None = None) -> int:
    """0: all compiled. 1: a case did not, or its dump could not be read. 2: the command cannot be carried out."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "verb", choices=("compile", "report"), help="compile: does it compile. report: its schedule too"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--family", nargs="?", const="", help="a family of pallas_kernels; without a value, list them")
    where.add_argument("--module", help="FILE.py:FUNCTION or package.module:FUNCTION; FUNCTION is `cases` if not given")
    parser.add_argument("--targets", default=_TARGETS, help=f"some of {','.join(chips.CHIPS)}; {_TARGETS} if not given")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases whose names match, such as 'forward*'")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    options = parser.parse_args(arguments)
    if options.family == "":
        print("\n".join(cases.families()))
        return 0
    try:
        return _run(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    targets = list(dict.fromkeys(filter(None, options.targets.split(","))))
    if not targets or not set(targets) <= set(chips.CHIPS):
        raise UsageError(f"--targets {options.targets}: expected some of {','.join(chips.CHIPS)}")
    for target in targets:
        if missing := chips.missing_compiler(target):
            raise UsageError(
                f"--targets {target}: its compiler ({missing[0]}) is not installed; pip install {missing[1]}"
            )
    chips.prepare_environment()
    source = options.module or cases.family_source(options.family)
    every = {target: cases.load(source, target) for target in targets}
    chosen = {
        target: {name: case for name, case in named.items() if fnmatch.fnmatchcase(name, options.only)}
        for target, named in every.items()
    }
    order = [(target, name) for target, named in chosen.items() for name in named]
    if not order:
        names = dict.fromkeys(name for named in every.values() for name in named)
        raise UsageError(f"no case for {options.targets} matches --only {options.only}; there are {list(names)}")
    report = options.verb == "report"
    rows = []
    for row in runner.run(source, chosen, report=report):
        rows.append(row)
        verdict = "failed" if "error" in row else f"compiled in {row['compile_seconds']:.1f} s"
        print(f"[{len(rows)}/{len(order)}] {row['case']} on {row['target']}: {verdict}", file=sys.stderr)
    rows.sort(key=lambda row: order.index((row["target"], row["case"])))
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(_NARROWEST, console.width))
    table.show(rows, console, report=report)
    if options.json:
        options.json.write_text(json.dumps({"source": source, "rows": rows}, indent=1) + "\n")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
