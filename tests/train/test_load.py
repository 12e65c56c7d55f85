"""From a configuration to what a run reads: several sources, and sets by name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from train.config import DataConfig, load_recipe
from train.data.load import load_data
from train.errors import UserError

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


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("books",), r"expected name=files, as in books=books/\*.jsonl, got 'books'"),
        (("held_out=a.txt",), r"got 'held_out=a.txt' \(held_out is a name of the run's own\)"),
        (("val=a.txt",), r"got 'val=a.txt' \(val is a name of the run's own\)"),  # val_bits_per_byte is the run's
        (("books=a.txt", "books=b.txt"), "two are called books; give one all files, separated by commas"),
    ],
)
def test_sets_without_a_name_of_their_own(sets, message, tmp_path):
    with pytest.raises(UserError, match=f"data.eval_sets: .*{message}"):
        load(tmp_path, eval_sets=sets)


def test_a_further_set_is_a_part_of_what_a_run_is_scored_on(tmp_path):
    (tmp_path / "more.txt").write_text("one text")
    more = str(tmp_path / "more.txt")
    before = [load(tmp_path).identity(), load(tmp_path, eval_sets=(f"more={more}",)).identity()]
    assert before == [load(tmp_path).identity(), load(tmp_path, eval_sets=(f"more={more}",)).identity()]
    (tmp_path / "more.txt").write_text("another text")
    after = load(tmp_path, eval_sets=(f"more={more}",)).identity()
    assert len({*before, after}) == 3
