"""A pytest plugin, `-p tests.cores`: every worker of pytest-xdist has a core of its own, where compiling comes first.

XLA compiles the kernels of a program in threads, and makes for each that waits a context, which takes as long as many a
kernel and serves the next kernels too. Where the threads go before the one that feeds them none waits, and few contexts
serve a whole program: tests that compile much take a fifth less time. Where cores are left over, nothing is done.
"""

import contextlib
import os


def pytest_configure() -> None:
    """After `conftest.py`, whose flags JAX reads when it starts."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
    if not workers or not hasattr(os, "SCHED_IDLE"):  # no worker, or no Linux
        return
    cores = sorted(os.sched_getaffinity(0))
    if workers < len(cores):
        return
    core = cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]
    with contextlib.suppress(OSError):  # a sandbox may refuse; tests pass there too, and take longer
        os.sched_setaffinity(0, {core})

        import jax

        jax.jit(jax.numpy.tanh)(1.0).block_until_ready()  # starts the threads
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
