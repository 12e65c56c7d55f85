"""Every block-sparse kernel compiles for every TPU; `make lab` installs the compilers."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_family_compiles(target):
    command = [sys.executable, "-m", "pallas_kernels.lab", "compile", "--family", "block_sparse", "--targets", target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    for case in ("causal", "window-segments", "alibi"):
        assert case in done.stdout
