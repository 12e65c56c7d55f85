"""The lab as a user runs it."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Report(NamedTuple):
    """What is said of cases, by name, and the tables that were printed."""

    rows: dict[str, dict[str, Any]]
    shown: str


@functools.cache
def _report(verb: str, flag: str, source: str, target: str, only: str) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.json")
        arguments = [flag, source, "--targets", target, "--only", only, "--json", str(path)]
        # Without the tests' own compiler flags: they turn LLVM's optimiser off, and kernels would spill that do not.
        done = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.lab", verb, *arguments],
            capture_output=True,
            text=True,
            timeout=1800,
            env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return Report({row["case"]: row for row in json.loads(path.read_text())["rows"]}, done.stdout)


@pytest.fixture(scope="session")
def family() -> Callable[..., Report]:
    """`family(name, target)`: the report on a family of kernels, all of which have to compile; made once.

    Without `figures` they are compiled only, which takes half of the time; `only` some of them are another report.
    """

    def made(name: str, target: str, figures: bool = True, only: str = "*") -> Report:
        return _report("report" if figures else "compile", "--family", name, target, only)

    return made


@pytest.fixture(scope="session")
def module() -> Callable[[str, str, str], Report]:
    """`module(name, target, only)`: the report on cases of a module."""
    return functools.partial(_report, "report", "--module")
