"""From a configuration to what a run reads: several sources, and sets by name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from train.config import DataConfig, load_recipe
from train.data.load import load_data

SOURCES = {"web": range(40), "books": range(10, 45)}
"""Numbers of the documents of each; most are in both."""


def load(folder, **data):
    for name, numbers in SOURCES.items():
        lines = [json.dumps({"text": f"{n} is the number of document {n}"}) for n in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    files = tuple(str(folder / f"{name}.jsonl") for name in SOURCES)
    data = DataConfig(source=files, context=16, holdout=0.3, **data)
    return load_data(dataclasses.replace(load_recipe("text_lm"), data=data), folder)


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_no_held_out_document_is_trained_on_whatever_source_it_is_in(weights, tmp_path):
    loaded = load(tmp_path, weights=weights)
    assert loaded.training
    assert not {*loaded.training} & {*loaded.held_out}
