"""Neighborhood attention compiles for every TPU and for H100; `make lab` installs the compilers."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_family_compiles(target, lab):
    out = lab("compile", "--family", "neighborhood", "--targets", target)
    for case in ("image", "video", "nat-1", "nat-3"):
        assert case in out


def test_windows_are_free_on_v6e(tmp_path, lab):
    """A pair of tiles takes no more than a twentieth longer than where every query sees every key."""
    found = tmp_path / "figures.json"
    lab("report", "--family", "neighborhood", "--targets", "v6e", "--only", "image*", "--json", found)
    cases = {row["case"]: row["kernels"] for row in json.loads(found.read_text())["rows"]}
    assert set(cases) == {"image", "image-full"}
    for windows, full in zip(cases["image"], cases["image-full"], strict=True):
        assert windows["hot_bundles"] <= 1.05 * full["hot_bundles"]


def test_windows_without_a_channel_to_ride_in_take_little_longer_on_v5e(tmp_path, lab):
    """Heads of 128 in a video: the axes are compared, all at once."""
    found = tmp_path / "figures.json"
    lab("report", "--family", "neighborhood", "--targets", "v5e", "--only", "video", "--json", found)
    (row,) = json.loads(found.read_text())["rows"]
    assert len(row["kernels"]) == 3
    for kernel in row["kernels"]:
        full, windows = sorted(step["step_bundles"] for step in kernel["hot_regions"])
        assert full <= windows <= 1.1 * full


def test_a_bias_of_wide_windows_takes_little_longer_on_v5e(tmp_path, lab):
    """Windows of 25 x 25: a grid step forward and backward, with the gradients of the bias."""
    found = tmp_path / "figures.json"
    wide = "pallas_kernels.neighborhood.cases:wide"
    lab("report", "--module", wide, "--targets", "v5e", "--only", "image*", "--json", found)
    cases = {row["case"]: row["kernels"] for row in json.loads(found.read_text())["rows"]}
    assert set(cases) == {"image", "image-bias"}
    for plain, biased in zip(cases["image"], cases["image-bias"], strict=True):
        assert biased["step_bundles"] <= 1.05 * plain["step_bundles"]


def test_one_pass_takes_less_time_than_tiles_on_v6e(tmp_path, lab):
    """Forward and backward of the windows of NAT-Mini, which take a sixth of the time; little is moved twice."""
    found = tmp_path / "figures.json"
    lab("report", "--family", "neighborhood", "--targets", "v6e", "--only", "nat-*", "--json", found)
    rows = {row["case"]: row for row in json.loads(found.read_text())["rows"]}
    for name in ("nat-1", "nat-3"):
        row = rows[name]
        assert len(row["kernels"]) == 2
        assert row["seconds"] < rows[f"{name}-tiles"]["seconds"] / 4
        assert row["moved_over_minimum"] < 1.3


def test_kernels_for_h100_use_its_matrix_units_and_spill_nothing(tmp_path, lab):
    found = tmp_path / "figures.json"
    lab("report", "--family", "neighborhood", "--targets", "h100", "--json", found)
    cases = {row["case"]: row["kernels"] for row in json.loads(found.read_text())["rows"]}
    assert set(cases) == {"image", "video", "nat-1-bias", "video-bias"}
    for name, kernels in cases.items():
        assert len(kernels) == 3 + name.endswith("-bias")
        for kernel in kernels:
            assert kernel["mma_sync"] == kernel["spill_store_bytes"] == kernel["spill_load_bytes"] == 0, kernel
            assert kernel["wgmma"] > 0
