"""The adapter of `sea` on other files: parts of the authors' arrays that stand by themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.golden.harness import HERE, run, systems

# Axes of queries and of keys, by name; the others have neither.
QUERIES = {"q": 1, "k": 1, "v": 1, "keep": 1, "performer_v": 1, "performer_context": 1, "enc": 1, "scales_logit": 1}
QUERIES |= {"context": 1, "dec_row": 2, "est_score": 2, "est_probs_m": 2}
PAIRS = ("est_probs_t", "mask_keep", "sparse_probs")
BY_LAYER = ("loss", "teacher_scores", "teacher_context")


def load():
    with np.load(HERE / "sea.npz") as file:
        return {name: file[name] for name in file.files if name != "meta"}, json.loads(str(file["meta"]))["config"]


def parts(arrays, prefix):
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def shortened(layer, length):
    """The first tokens of a causal layer, which do not know of the others."""
    made = {}
    for name, array in layer.items():
        if name in PAIRS:
            made[name] = array[:, :, :length, :length]
        elif name not in BY_LAYER:
            made[name] = np.take(array, np.arange(length), axis=QUERIES[name]) if name in QUERIES else array
    return made


def example(layer, index):
    """One example of a batch, in which examples do not compete."""
    kept = {name: array for name, array in layer.items() if name not in BY_LAYER}
    shared = [name for name in kept if name.startswith("param_") or name == "performer_projection"]
    return {name: array if name in shared else array[index : index + 1] for name, array in kept.items()}


@pytest.mark.parametrize("kept", [("first_", "opt_"), ("opt_", "second_"), ("bert_",)], ids=str)
@pytest.mark.parametrize("implementation", ["reference", None])
def test_sea_on_other_files(tmp_path, kept, implementation):
    arrays, config = load()
    bert, opt = parts(arrays, "bert_"), parts(arrays, "opt_")
    # A layer that the configuration does not name takes what it says of all.
    layers = {"first_": shortened(opt, 17), "opt_": opt, "second_": example(bert, 1), "bert_": bert}
    names = {"first_": "opt", "second_": "bert"}
    own = {name.rstrip("_"): config[names.get(name, name.rstrip("_"))] for name in kept}
    shared = own.pop("second", {}) if "second_" in kept else {}
    written = {prefix + name: array for prefix in kept for name, array in layers[prefix].items()}
    np.savez(tmp_path / "other.npz", meta=json.dumps({"config": {**shared, **own}}), **written)
    report = run(systems()["sea"], tmp_path / "other.npz", implementation)
    assert report.passed(strict=True), f"\n{report}"
    assert len(report.comparisons) == sum(12 if "loss" in layers[prefix] else 11 for prefix in kept)
