"""Every linear kernel compiles for every TPU and for H100; `make lab` installs the compilers."""

from __future__ import annotations

import re

import pytest


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_family_compiles(target, family):
    rows = family("linear", target, figures=False).rows
    forms = "constant", "scalar", "channel", "delta", "channel-delta", "channel-packed", "channel-delta-packed"
    assert rows.keys() >= {f"{form}-{way}" for form in forms for way in ("forward", "backward")}
    assert all(row["compile_seconds"] > 0 for row in rows.values())


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("form", ["channel", "channel-packed"])
def test_moderate_decays_of_channels_take_at_most_twice_the_time_of_scalar_ones(form, way, family):
    reports = [family("linear", "v5e", only=f"{name}-{way}") for name in ("scalar", form)]
    scalar, channel = (next(iter(report.rows.values()))["kernels"][0] for report in reports)
    # A step goes one of three ways, and the table has all.
    moderate, split, any_decay = sorted({step["seconds"] for step in channel["hot_regions"]})
    assert moderate < 2 * scalar["seconds"]
    assert moderate < split < 0.75 * any_decay
    assert any_decay == channel["seconds"]
    assert len(re.findall(r"^ +or +\d+ ", reports[1].shown, re.M)) == 2


def test_kernels_for_h100_use_its_matrix_units_and_spill_nothing(family):
    kernels = [
        kernel
        for name, row in family("linear", "h100").rows.items()
        if name.startswith("scalar") or re.fullmatch("(channel|delta|channel-delta)-(forward|backward)", name)
        for kernel in row["kernels"]
    ]
    assert len(kernels) == 5 + 10 + 7 + 9
    for kernel in kernels:
        # Sums of gates, and what is decayed by them, are no products of matrices.
        assert kernel["wgmma"] > 0 or kernel["name"].endswith(("sums", "decays")), kernel
        assert kernel["mma_sync"] == kernel["spill_store_bytes"] == 0, kernel
