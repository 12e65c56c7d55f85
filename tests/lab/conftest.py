"""The lab as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def lab() -> Callable[..., str]:
    """`python -m pallas_kernels.lab ...`, which has to succeed; returns what it prints.

    Without the tests' own compiler flags: they turn LLVM's optimiser off, and kernels would spill that do not.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

    def run(*arguments: Any, timeout: float = 1800) -> str:
        command = [sys.executable, "-m", "pallas_kernels.lab", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
