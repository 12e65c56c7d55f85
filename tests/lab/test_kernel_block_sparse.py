"""Every block-sparse kernel compiles for every TPU and for H100; `make lab` installs the compilers."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_family_compiles(target, family):
    rows = family("block_sparse", target, figures=False).rows
    assert rows.keys() == {"causal", "window-segments", "alibi", "relative", "soft-cap", "dropout"}
    assert all(row["compile_seconds"] > 0 for row in rows.values())


def test_blocks_in_which_intervals_end_take_little_longer_than_full_ones(family):
    row = family("block_sparse", "v6e", only="window-segments").rows["window-segments"]
    forward, backward = (
        [step["step_bundles"] for step in kernel["hot_regions"]] for kernel in sorted(row["kernels"], key=_bundles)
    )
    for full, one_end, both_ends, ids in (forward, backward):
        assert full < one_end < both_ends < ids, row["note"]
    full, one_end, both_ends, _ = forward
    assert one_end < 1.07 * full
    assert both_ends < 1.15 * full
    assert backward[-1] < 1.05 * backward[0]


def _bundles(kernel):
    return kernel["step_bundles"]


# Two loops, of partial and of full blocks, with 2, 3 and 4 products each; an instruction adds up 16 channels or tokens.
_64 = {"forward": 2 * 2 * (4 + 4), "queries": 2 * (4 + 4 + 4), "keys": 2 * (4 + 4 + 4 + 4)}
_128 = {"forward": 2 * (8 + 4), "queries": 2 * (8 + 8 + 4)}
WGMMA = {
    "causal-64": _64,
    "dropout": _64,
    "causal-128": _128 | {"keys": 2 * (8 + 8 + 4 + 4)},
    # Registers have room for numbers of distances where the program of the keys walks over half as many queries.
    "relative": _128 | {"keys": 2 * (8 + 8 + 2 + 2), "table": 2 * (8 + 8)},
}


def test_kernels_for_h100_use_its_matrix_units_and_spill_nothing(family):
    cases = {name: row["kernels"] for name, row in family("block_sparse", "h100").rows.items()}
    assert set(cases) == {*WGMMA, "everything"}
    for case, kernels in cases.items():
        for kernel in kernels:
            assert kernel["mma_sync"] == kernel["spill_store_bytes"] == kernel["spill_load_bytes"] == 0, kernel
        counts = {kernel["name"].rpartition("_")[2]: kernel["wgmma"] for kernel in kernels}
        assert counts.keys() == WGMMA.get(case, dict.fromkeys(("forward", "queries", "keys"))).keys()
        assert min(counts.values()) > 0
        assert counts == WGMMA.get(case, counts)
