"""Settings of every test: eight host devices, so that what is sharded runs in one process, and quick compilation.

Small shapes make LLVM's optimiser most of a test's time. XLA's own passes, which decide what is computed, all run.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)
