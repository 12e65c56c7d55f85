"""Settings of every test: eight host devices, so that what is sharded runs in one process, and quick compilation.

Small shapes make LLVM's optimiser most of a test's time. XLA's own passes, which decide what is computed, all run.
Python looks for cycles less often: what JAX has traced and keeps is a large heap to search.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)

gc.set_threshold(50_000, 20, 50)

MAPS = Path("/proc/self/maps")
REGIONS = 45_000


@pytest.fixture(autouse=True)
def _few_programs() -> Iterator[None]:
    """Forgets compiled programs in time.

    Linux gives a process 65,530 mapped regions. Every program takes about nine, and a compiler that gets none crashes.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > REGIONS:
        import jax

        jax.clear_caches()
