"""The adapter of `psa` on a file of other shapes, options and cases, computed token by token."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.golden.harness import run, systems
from tests.sparse.test_psa import defined, random_levels
from tests.sparse.test_psa_levels import by_ranks, scores_of


def write(path: Any, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    np.savez(path, meta=json.dumps({"info": meta}), **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_psa_on_another_file(tmp_path, implementation):
    rng = np.random.default_rng(5)
    x = [rng.standard_normal(shape) for shape in ((2, 29, 6, 5), (2, 29, 3, 5), (2, 29, 3, 7))]
    arrays = dict(zip(("att_q", "att_k", "att_v"), x, strict=True))
    arrays["att_levels"] = random_levels(29, 29, 8, 8)
    arrays["att_levels_causal"] = random_levels(29, 29, 8, 8, is_causal=True)
    arrays["att_out"], _ = defined(*x, arrays["att_levels"], 8, 8, scale=0.3)
    arrays["att_out_causal"], _ = defined(*x, arrays["att_levels_causal"], 8, 8, is_causal=True, scale=0.3)
    ratios = {1: (0.0, 0.2), 4: (0.2, 0.7), 8: (0.7, 0.9)}
    arrays["lvl_scores"] = scores_of(7, 13)
    configs = []
    for number, rule in enumerate(("thresholdbound", "topk")):
        rows = [[by_ranks(row, rule, ratios, lambda r: -(-r // 2), 0.1) for row in head] for head in scores_of(7, 13)]
        arrays[f"lvl_{number}"] = np.array(rows)
        configs.append(
            {"key": f"lvl_{number}", "mode": rule, "block_n": 64, "tile_n": 32, "text_length": 0, "min_full_ratio": 0.1}
            | {"mask_ratios": {str(level): bounds for level, bounds in ratios.items()}}
        )
    meta = {"att": {"block": 8, "scale": 0.3}, "levels": configs}
    report = run(systems()["psa"], write(tmp_path / "other.npz", meta, arrays), implementation)
    assert report.passed(strict=True), f"\n{report}"
    assert len(report.comparisons) == 4
