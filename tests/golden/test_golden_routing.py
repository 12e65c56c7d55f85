"""The adapter of `routing_transformer` on a file of the authors' definition, of other shapes, by loops in NumPy."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.golden.harness import run, systems
from tests.sparse.test_kmeans import loops_of_sums
from tests.sparse.test_routing import as_the_authors_do, layer_norm


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("is_shared", [True, False])
def test_routing_on_other_files(tmp_path, implementation, is_shared):
    rng = np.random.default_rng(3)
    batch, length, heads, width, clusters, window, decay = 3, 11, 2, 5, 3, 4, 0.8
    query, key, value = (rng.standard_normal((batch, length, heads, width)).astype(np.float32) for _ in range(3))
    means = rng.standard_normal((heads, clusters, width)).astype(np.float32)
    x = {"query": query, "key": None if is_shared else key, "value": value, "means": means}
    x = {name: None if a is None else a.astype(np.float64) for name, a in x.items()}

    moved, counts, totals = x["means"], np.zeros((heads, clusters)), x["means"]
    for tokens in (x["query"],) if is_shared else (x["query"], x["key"]):
        new_counts, new_totals = loops_of_sums(layer_norm(tokens), moved)
        counts, totals = decay * counts + (1 - decay) * new_counts, decay * totals + (1 - decay) * new_totals
        n = counts.sum(-1, keepdims=True)
        moved = totals / ((counts + 1e-5) / (n + clusters * 1e-5) * n)[..., None]
    config = {
        "case": "G", "variant": "google", "window_size": window, "causal": is_shared, "shared_qk": is_shared,
        "ema_decay": decay, "commitment": 0.1,
    }  # fmt: skip
    arrays = {"q": query, "k": query if is_shared else key, "v": value, "means": means}
    arrays |= {"out": as_the_authors_do(x, window, is_shared), "means_after_ema": moved}
    path = tmp_path / "other.npz"
    np.savez(path, meta=json.dumps({"cases": [config]}), **{f"G_{name}": array for name, array in arrays.items()})
    report = run(systems()["routing_transformer"], path, implementation)
    assert report.passed(strict=True), f"\n{report}"
    assert len(report.comparisons) == 2
