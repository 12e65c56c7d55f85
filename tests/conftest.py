"""Settings of every test: eight host devices, so that what is sharded runs in one process, and quick compilation.

Small shapes make compilation most of a test's time: LLVM does not optimise, and operations do not carry the stack of
Python calls that made them. XLA's own passes, which decide what is computed, all run. Python looks for cycles less
often: what JAX has traced and keeps is a large heap to search.
"""

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)

gc.set_threshold(50_000, 20, 50)

MAPS = Path("/proc/self/maps")
REGIONS, TESTS_BETWEEN_LOOKS = 40_000, 8
tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def _few_programs() -> Iterator[None]:
    """Forgets compiled programs in time.

    Linux gives a process 65,530 mapped regions. Every program takes about nine, and a compiler that gets none crashes.
    To count them takes as long as many a test.
    """
    yield
    if next(tests_run) % TESTS_BETWEEN_LOOKS == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > REGIONS:
        import jax

        jax.clear_caches()
