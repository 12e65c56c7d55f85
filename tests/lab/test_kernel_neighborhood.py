"""Neighborhood attention compiles for every TPU and for H100; `make lab` installs the compilers."""

from __future__ import annotations

import pytest

MEASURED = ("v6e",)
"""TPUs of which most figures are read below; for the others to compile is enough."""


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_family_compiles(target, family):
    rows = family("neighborhood", target, figures=target in MEASURED).rows
    assert rows.keys() == {
        "image",
        "image-full",
        "video",
        *(f"nat-{i}{form}" for i in (1, 3) for form in ("", "-tiles")),
    }
    assert all(row["compile_seconds"] > 0 for row in rows.values())


def test_windows_are_free_on_v6e(family):
    """A pair of tiles takes no more than a twentieth longer than where every query sees every key."""
    rows = family("neighborhood", "v6e").rows
    for windows, full in zip(rows["image"]["kernels"], rows["image-full"]["kernels"], strict=True):
        assert windows["hot_bundles"] <= 1.05 * full["hot_bundles"]


def test_windows_without_a_channel_to_ride_in_take_little_longer_on_v5e(family):
    """Heads of 128 in a video: the axes are compared, all at once."""
    kernels = family("neighborhood", "v5e", only="video").rows["video"]["kernels"]
    assert len(kernels) == 3
    for kernel in kernels:
        full, windows = sorted(step["step_bundles"] for step in kernel["hot_regions"])
        assert full <= windows <= 1.1 * full


def test_a_bias_of_wide_windows_takes_little_longer_on_v5e(module):
    """Windows of 25 x 25: a grid step forward and backward, with the gradients of the bias."""
    rows = module("pallas_kernels.neighborhood.cases:wide", "v5e", "image*").rows
    assert set(rows) == {"image", "image-bias"}
    for plain, biased in zip(rows["image"]["kernels"], rows["image-bias"]["kernels"], strict=True):
        assert biased["step_bundles"] <= 1.05 * plain["step_bundles"]


def test_one_pass_takes_less_time_than_tiles_on_v6e(family):
    """Forward and backward of the windows of NAT-Mini, which take a sixth of the time; little is moved twice."""
    rows = family("neighborhood", "v6e").rows
    for name in ("nat-1", "nat-3"):
        row = rows[name]
        assert len(row["kernels"]) == 2
        assert row["seconds"] < rows[f"{name}-tiles"]["seconds"] / 4
        assert row["moved_over_minimum"] < 1.3


def test_kernels_for_h100_use_its_matrix_units_and_spill_nothing(family):
    rows = family("neighborhood", "h100").rows
    assert set(rows) == {"image", "video", "nat-1-bias", "video-bias"}
    for name, row in rows.items():
        assert len(row["kernels"]) == 3 + name.endswith("-bias")
        for kernel in row["kernels"]:
            assert kernel["mma_sync"] == kernel["spill_store_bytes"] == kernel["spill_load_bytes"] == 0, kernel
            assert kernel["wgmma"] > 0
