"""Bad batches and changing data: NaNs, spikes of the loss, and data files that change or go while a run does."""

from __future__ import annotations

import json
import random
import shutil
import signal

import numpy as np
import pytest

from tests.train.runs import (
    STEPS,
    TINY,
    final_arrays,
    rows,
    sealed,
    start,
    wait_for,
)
from train import loop, trainer
from train.__main__ import main
from train.config import load_recipe, parse_overrides
from train.data.sources import read_documents, split_by_document
from train.errors import UserError
from train.evaluate import place


def tiny(*words: str):
    """The configuration of such a run, in this process and on its eight devices."""
    return parse_overrides(load_recipe("pydoc_lm"), " ".join((TINY, STEPS, *words)).split())


def spoiled(monkeypatch, steps, spoil) -> list[int]:
    """Spoil the batches of these calls, the first being 1; returns the calls so far."""
    calls: list[int] = []

    def places(batch, program):
        if "weights" in batch and batch["tokens"].shape[0] == 8:
            calls.append(len(calls) + 1)
            if calls[-1] in steps:
                batch = spoil(batch)
        return place(batch, program)

    monkeypatch.setattr(trainer, "place", places)
    return calls


def not_finite(batch):
    return batch | {"weights": np.full_like(batch["weights"], np.nan)}


def noise(batch):
    return batch | {"targets": np.random.default_rng(0).integers(128, 256, batch["targets"].shape).astype(np.int32)}


def test_one_nan_is_skipped_and_counted(tmp_path, monkeypatch):
    spoiled(monkeypatch, {7, 12}, not_finite)
    summary = loop.run(tiny("--guard.max-nonfinite 2"), tmp_path)
    assert summary["skipped"] == 2
    assert summary["steps"] == 32
    assert summary["val_bits_per_byte"] < 6


def test_repeated_nans_stop_the_run_and_keep_the_batch(tmp_path, monkeypatch):
    spoiled(monkeypatch, set(range(9, 40)), not_finite)
    with pytest.raises(
        UserError,
        match=r"the last 3 updates were not finite \(at step 11 the loss was nan.*"
        "lower optimizer.learning_rate and optimizer.matrix_learning_rate, or",
    ) as e:
        loop.run(tiny("--guard.max-nonfinite 3 --optimizer.name muon"), tmp_path)
    kept = tmp_path / "bad_batch_step_00000011.npz"
    assert str(kept) in str(e.value)
    with np.load(kept) as batch:
        assert batch["tokens"].shape == (8, 32)
    newest = int(sealed(tmp_path)[-1].parent.name[5:])
    assert 0 < newest <= 11
    assert all(np.isfinite(x).all() for x in final_arrays(tmp_path).values() if x.dtype.kind == "f")


def test_a_spike_goes_back_and_leaves_the_batches_out(tmp_path, monkeypatch, capsys):
    calls = spoiled(monkeypatch, {20}, noise)
    words = "--guard.spike-z 6 --guard.spike-window 8 --log-every 1"
    summary = loop.run(tiny(words), tmp_path / "spiked")
    shown = capsys.readouterr().out
    assert "the loss spiked to" in shown
    back = int(shown.partition("back to step ")[2].partition(",")[0])
    assert 10 < back < 20
    assert summary["steps"] == 32
    assert len(calls) == 32 + 21 - back  # step 21 was under way when the spike was seen
    assert "spike_loss" in (tmp_path / "spiked" / "metrics.jsonl").read_text()
    assert [row["step"] for row in rows(tmp_path / "spiked") if "loss" in row] == list(range(1, 33))
    # The stream goes on behind the batch that spiked: what a run would see that never had those batches.
    header = json.loads((sealed(tmp_path / "spiked")[-1].parent / "checkpoint.json").read_text())
    assert header["extra"]["data"]["step"] == 32 + 20 - back


def test_a_spike_that_returns_stops_the_run(tmp_path, monkeypatch):
    spoiled(monkeypatch, set(range(20, 200)), noise)
    words = "--guard.spike-z 6 --guard.spike-window 8 --guard.max-rollbacks 2"
    with pytest.raises(UserError, match=r"after 2 times of going back to step 1\d; .*npz; .* or raise guard.spike_z"):
        loop.run(tiny(words), tmp_path)
    summary = loop.run(tiny(words, "--guard.spike-z 1000"), tmp_path)  # it stands by its advice
    assert summary["steps"] == 32
    assert json.loads((tmp_path / "config.json").read_text())["guard"]["spike_z"] == 1000


def test_a_run_that_ends_in_nan_says_so(tmp_path, monkeypatch):
    """And no figures of a model that is not finite are the best, whatever its headline is."""
    nan = float("nan")
    scores = (nan, 1.0), (3.0, 1.0), (2.0, nan), (nan, nan)
    found = iter({"bits_per_byte": bits, "loss": loss} for bits, loss in scores)
    monkeypatch.setattr(trainer, "score", lambda *_: next(found))
    config = tiny("--schedule.steps 8 --eval-every 2 --keep-checkpoints 1")
    for _ in range(2):  # and says it again
        with pytest.raises(UserError, match=r"the run diverged: no finite bits per byte, loss on held-out .*lower opt"):
            loop.run(config, tmp_path)

    def no_json(constant):
        raise AssertionError(constant)

    for path in (tmp_path / "summary.json", *(seal.parent / "checkpoint.json" for seal in sealed(tmp_path))):
        json.loads(path.read_text(), parse_constant=no_json)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["val_bits_per_byte"] is None
    assert summary["evaluation"] == {"held_out": {"bits_per_byte": None, "loss": None}}
    assert summary["best"] == {"step": 4, "val_bits_per_byte": 3.0}
    assert [seal.parent.name for seal in sealed(tmp_path)] == ["step_00000004", "step_00000008"]
    page = (tmp_path / "report.html").read_text()
    assert "The run diverged: no finite bits per byte, loss on held-out text after its last step." in page
    assert "<b>3.000</b>" not in page


@pytest.fixture
def texts(tmp_path):
    """A folder of texts, and the two sides of its split."""
    folder = tmp_path / "texts"
    folder.mkdir()
    chance = random.Random(0)
    for n in range(12):
        (folder / f"{n}.txt").write_text(" ".join(str(chance.random()) for _ in range(200)))
    training, held_out = split_by_document(read_documents(str(folder)), 0.1)
    return folder, *({path for path in folder.iterdir() if path.read_bytes() in side} for side in (training, held_out))


def test_a_data_file_that_changes_or_goes_while_the_run_does(texts, tmp_path, capsys):
    folder, training, _ = texts
    words = f"run pydoc_lm {TINY} {STEPS} --schedule.steps 100000 --data.source {folder} --workdir {tmp_path / 'run'}"
    process = start(words)
    wait_for(lambda: sealed(tmp_path / "run"), process)
    victim, other = sorted(training)[:2]
    kept = victim.read_bytes()
    victim.write_bytes(kept[: len(kept) // 2])
    other_text = other.read_bytes()
    other.unlink()
    before = sealed(tmp_path / "run")  # what was read is in memory, so the run goes on
    wait_for(lambda: sealed(tmp_path / "run") != before, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    words = words.replace("--data.batch 8", "--data.batch 8 --mesh.data -1")
    for change, message in (
        (lambda: None, "the data is not what the checkpoint was trained on (documents was"),
        (lambda: other.write_bytes(other_text), "the data is not what the checkpoint was trained on (documents was"),
        (lambda: victim.write_bytes(kept + b"more"), "the data is not what the checkpoint was trained on"),
        (lambda: shutil.rmtree(folder), "no such file or folder"),
    ):
        change()
        assert main(words.split()) == 2
        assert message in capsys.readouterr().err


def test_held_out_text_that_changes(texts, tmp_path, capsys):
    folder, _, held_out = texts
    config = tiny(f"--data.source {folder} --schedule.steps 3")
    loop.run(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    # Another held-out text, with the same training side.
    victim = sorted(held_out)[0]
    kept = victim.read_bytes()
    for n in range(200):
        victim.write_bytes(kept + str(n).encode())
        if kept + str(n).encode() in split_by_document(read_documents(str(folder)), 0.1)[1]:
            break
    with pytest.raises(UserError, match="the held-out documents are not those that this run was scored on"):
        loop.run(config, tmp_path / "run")
