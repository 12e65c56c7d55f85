"""Every linear kernel compiles for every TPU and for H100; `make lab` installs the compilers."""

from __future__ import annotations

import json
import re

import pytest


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_family_compiles(target, lab):
    out = lab("compile", "--family", "linear", "--targets", target)
    assert "channel-delta-backward" in out
    assert "scalar-backward" in out


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_moderate_decays_of_channels_take_at_most_twice_the_time_of_scalar_ones(way, tmp_path, lab):
    found = tmp_path / "figures.json"
    shown = lab("report", "--family", "linear", "--targets", "v5e", "--only", f"[sc][ch]a*[rl]-{way}", "--json", found)
    scalar, channel = (row["kernels"][0] for row in json.loads(found.read_text())["rows"])
    # A step goes one way or the other, and the table has both.
    moderate, any_decay = sorted({step["seconds"] for step in channel["hot_regions"]})
    assert moderate < 2 * scalar["seconds"] < any_decay == channel["seconds"]
    assert re.search(r"^ +or +\d+ ", shown, re.M)


def test_kernels_for_h100_use_its_matrix_units_and_spill_nothing(tmp_path, lab):
    found = tmp_path / "figures.json"
    lab("report", "--family", "linear", "--targets", "h100", "--json", found)
    kernels = [
        kernel
        for row in json.loads(found.read_text())["rows"]
        if row["case"].startswith("scalar")
        or re.fullmatch("(channel|delta|channel-delta)-(forward|backward)", row["case"])
        for kernel in row["kernels"]
    ]
    assert len(kernels) == 5 + 10 + 7 + 9
    for kernel in kernels:
        # Sums of gates, and what is decayed by them, are no products of matrices.
        assert kernel["wgmma"] > 0 or kernel["name"].endswith(("sums", "decays")), kernel
        assert kernel["mma_sync"] == kernel["spill_store_bytes"] == 0, kernel
