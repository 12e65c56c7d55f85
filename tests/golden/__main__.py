"""`python -m tests.golden SYSTEM [FILE.npz] [--strict]`: run a system's adapter and say how far off it is.

Exit code 0 if all is right; 1 on a failed output, a circular array or no output, with `--strict` also on an array left
out without a reason; 2 if there is no such system or file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.golden.harness import run, systems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Compare with the authors' arrays.")
    parser.add_argument("system", metavar="SYSTEM", help="whose adapter to run")
    parser.add_argument("file", metavar="FILE.npz", nargs="?", type=Path, help="another file of the same system")
    parser.add_argument("--strict", action="store_true", help="every array must be covered, or excused with a reason")
    parser.add_argument("--implementation", help="which implementation of the ops to use, where there are several")
    options = parser.parse_args(arguments)
    known = systems()
    if options.system not in known:
        print(f"no system is called {options.system!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    if options.file is not None and not options.file.is_file():
        print(f"{options.file}: no such file", file=sys.stderr)
        return 2
    report = run(known[options.system], options.file, options.implementation)
    print(report)
    return 0 if report.passed(strict=options.strict) else 1


if __name__ == "__main__":
    sys.exit(main())
