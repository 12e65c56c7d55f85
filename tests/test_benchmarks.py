"""How the benchmarks measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Pages that the system clears while 64 MiB are taken a second time, filled, and given back.
FAULTS = """\
import ctypes, resource
from benchmarks.measure import keep_memory
libc, size = ctypes.CDLL(None), 64 << 20
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
libc.free.argtypes = (ctypes.c_void_p,)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = libc.malloc(size)
    libc.memset(memory, 1, size)
    libc.free(memory)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
keep_memory()
faults()
print(faults() if hasattr(libc, "mallopt") else 0)
"""


def test_memory_that_is_kept_is_not_cleared_again():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=root, capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 8
