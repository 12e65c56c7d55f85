"""Every linear kernel compiles for every TPU and for H100; `make lab` installs the compilers."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_family_compiles(target):
    command = [sys.executable, "-m", "pallas_kernels.lab", "compile", "--family", "linear", "--targets", target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "delta-backward" in done.stdout
    assert "scalar-backward" in done.stdout


def test_kernels_for_h100_use_its_matrix_units_and_spill_nothing(tmp_path):
    found = tmp_path / "figures.json"
    command = [sys.executable, "-m", "pallas_kernels.lab", "report", "--family", "linear", "--targets", "h100"]
    done = subprocess.run([*command, "--json", found], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = [
        kernel
        for row in json.loads(found.read_text())["rows"]
        if row["case"].startswith("scalar") or re.fullmatch("(channel|delta)-(forward|backward)", row["case"])
        for kernel in row["kernels"]
    ]
    assert len(kernels) == 5 + 10 + 7
    for kernel in kernels:
        assert kernel["wgmma"] > 0 or kernel["name"].endswith("sums"), kernel
        assert kernel["mma_sync"] == kernel["spill_store_bytes"] == 0, kernel
