"""`python -m train run hedgehog_convert`: a softmax model becomes a linear one, and trains on like any run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.models.lm import LM
from tests.train.runs import assert_same_bits, final_arrays, rows, sealed
from train import convert
from train.__main__ import main
from train.config import load_recipe, read_config, save_config
from train.errors import UserError
from train.trainer import Trainer

MODEL = "--model.width 32 --model.num-layers 2 --model.num-heads 2 --model.mlp-width 48"
DATA = "--data.context 64 --data.batch 8 --sample.tokens 4 --schedule.seconds None --log-every 5"
LEARNING = "--conversion.steps 40 --schedule.steps 12"


def train(workdir: Path, *words: str) -> int:
    return main(["run", *(part for word in words for part in word.split()), "--workdir", str(workdir)])


def record(workdir: Path) -> dict:
    return json.loads((workdir / "conversion.json").read_text())


def weights(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint by path."""
    found = final_arrays(workdir, step)
    return {name.removeprefix("parameters/"): x for name, x in found.items() if name.startswith("parameters/")}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """Little of it, in which a count decides what follows: attention must find it."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(12):
        (folder / f"{index}.txt").write_text(f"{index} bottles of beer on the wall; take one down. " * 4)
    return f"--data.source {folder}"


@pytest.fixture(scope="module")
def softmax(text, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("softmax")
    assert train(workdir, f"softmax_lm {MODEL} {DATA} {text} --schedule.steps 150") == 0
    return workdir


@pytest.fixture(scope="module")
def words(text, softmax) -> str:
    return f"hedgehog_convert {MODEL} {DATA} {text} --conversion.source {softmax}"


@pytest.fixture(scope="module")
def linear(words, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("linear")
    assert train(workdir, words, LEARNING) == 0
    return workdir


def test_the_maps_learn_and_the_model_is_trained_on(linear, softmax):
    found = record(linear)
    assert (found["source"], found["step"]) == (str(softmax), 150)
    losses = found["losses"]
    assert len(losses) == 40
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.05
    summary = json.loads((linear / "summary.json").read_text())
    assert summary["steps"] == 12
    teacher = json.loads((softmax / "summary.json").read_text())["val_bits_per_byte"]
    assert found["held_out"]["softmax"]["bits_per_byte"] == pytest.approx(teacher, rel=1e-5)
    assert summary["val_bits_per_byte"] < found["held_out"]["converted"]["bits_per_byte"]


def test_distillation_brings_the_converted_model_nearer_to_the_softmax_model(linear, words, tmp_path):
    assert train(tmp_path / "d", words, "--conversion.steps 0 --schedule.steps 1") == 0
    without = record(tmp_path / "d")
    assert without["losses"] == []

    def lost(found: dict) -> float:
        return found["held_out"]["converted"]["bits_per_byte"] - found["held_out"]["softmax"]["bits_per_byte"]

    assert 0 < lost(record(linear)) < 0.8 * lost(without)


def test_everything_but_the_maps_is_copied_and_the_run_begins_there(linear, softmax):
    teacher, first = weights(softmax, 150), weights(linear, 0)
    maps = {name: x for name, x in first.items() if "_map" in name}
    assert len(maps) == 2
    for x in maps.values():
        assert not np.array_equal(x, np.broadcast_to(np.eye(*x.shape[-2:]), x.shape))
    assert first.keys() - maps.keys() == teacher.keys()
    for name, x in teacher.items():
        np.testing.assert_array_equal(first[name], x, err_msg=name)
    last = weights(linear, 12)
    assert all(not np.array_equal(x, last[name]) for name, x in first.items())


def test_softmax_becomes_sea(text, softmax, tmp_path):
    options = "--model.mixer-options.sea.predictor-length 16 --model.mixer-options.sea.k-budget 8"
    words = f"sea_convert {MODEL} {DATA} {text} {options} --conversion.source {softmax}"
    assert train(tmp_path / "d", words, "--conversion.steps 40 --schedule.steps 2") == 0
    found, teacher, first = record(tmp_path / "d"), weights(softmax, 150), weights(tmp_path / "d", 0)
    assert np.mean(found["losses"][-10:]) < 0.9 * np.mean(found["losses"][:5])
    assert all("/mixer/estimator/" in name for name in first.keys() - teacher.keys())
    for name, x in teacher.items():
        np.testing.assert_array_equal(first[name], x, err_msg=name)
    # A budget of all keys is softmax attention, so what is lost is lost by choosing few.
    before, after = (found["held_out"][name]["bits_per_byte"] for name in ("softmax", "converted"))
    assert before < after < before + 1


def test_a_run_that_was_cut_off_goes_on_without_another_conversion(linear, words, tmp_path, monkeypatch):
    workdir = tmp_path / "d"
    with monkeypatch.context() as cut:
        cut.setattr(Trainer, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train(workdir, words, LEARNING) == 130
    assert len(sealed(workdir)) == 1
    with monkeypatch.context() as gone:
        gone.setattr(convert, "converted", None)
        gone.setattr(convert, "check_source", None)
        assert train(workdir, words, LEARNING) == 0
    assert_same_bits(workdir, linear)
    assert rows(workdir) == rows(linear)


def test_a_signal_while_the_maps_learn_ends_the_run_and_it_begins_anew(words, tmp_path, monkeypatch, capsys):
    workdir, placed = tmp_path / "d", []

    def place(batch, program):
        placed.append(batch)
        if len(placed) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, program)

    original = convert.place
    with monkeypatch.context() as signalled:
        signalled.setattr(convert, "place", place)
        assert train(workdir, words, LEARNING) == 0
    assert len(placed) == 4
    assert "stopped while the new weights learnt; the same command begins anew" in capsys.readouterr().out
    assert sealed(workdir) == []

    def again(*_):
        raise UserError("began anew")

    with monkeypatch.context() as watched:
        watched.setattr(convert, "converted", again)
        assert train(workdir, words, LEARNING) == 2
    assert "began anew" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(words, tmp_path, capsys):
    assert train(tmp_path / "d", words, "--conversion.steps 9 --conversion.learning-rate 1e38 --schedule.steps 1") == 2
    assert "conversion: the new weights or their loss were not finite at batch 1; lower" in capsys.readouterr().err


def test_the_loss_of_a_model_is_the_mean_over_its_layers():
    config = dataclasses.replace(load_recipe("softmax_lm").model, width=16, num_layers=4, num_heads=2, mlp_width=24)
    student = dataclasses.replace(config, pattern=("hedgehog", "lightning"), mixer_options={})
    config = dataclasses.replace(config, pattern=("softmax", "lightning"))
    teacher, student = (LM(one, rngs=nnx.Rngs(0)) for one in (config, student))
    own = dict(nnx.to_flat_state(nnx.state(student, nnx.Param)))
    for path, leaf in nnx.to_flat_state(nnx.state(teacher, nnx.Param)):
        leaf[...] = leaf[...] + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
        own[path][...] = leaf[...]
    tokens = np.random.default_rng(0).integers(0, 256, (2, 13))
    positions = jnp.broadcast_to(jnp.arange(13), tokens.shape)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": jnp.where(positions < 5, 1, 2)}
    factors = {"xent_factor": 0.5, "mse_factor": 2.0}
    x, want = teacher.embed(tokens), []
    for index in range(2):
        before, after = (
            nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], state))
            for graph, state in (nnx.split(model.units) for model in (teacher, student))
        )
        context = {name: batch[name] for name in ("positions", "segment_ids")}
        h = before.blocks[0].mixer_norm(x)
        want.append(after.blocks[0].mixer.distillation_loss(h, **context, **factors))
        for block in before.blocks:
            x, _ = block(x, **context)
    got = convert.distillation_loss(teacher, student, batch, **factors)
    np.testing.assert_allclose(got, np.mean(want), rtol=1e-5)
    assert abs(want[0] - want[1]) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model.width 48", "is another model; add --model.width 32"),
        ("--model.tied --model.num-kv-heads 1", "add --model.num-kv-heads None --model.no-tied"),
        ("--model.pattern hedgehog lightning", "is another model; add --model.pattern hedgehog"),
        ("--model.mixer-options.hedgehog.rope-theta 500.0", "model.mixer-options: expected .*10000.0.*, got .*500.0"),
        ("--data.tokenizer train --model.vocab-size 256", "data.tokenizer: .* reads bytes; leave it out"),
        (
            "--conversion.source nowhere",
            "conversion.source: nowhere holds no run; start it with python -m train run softmax_lm --workdir nowhere",
        ),
        ("--conversion.steps -1", "conversion.steps: expected at least 0, got -1"),
    ],
)
def test_what_does_not_fit_is_said_before_the_run_begins(words, tmp_path, capsys, change, message):
    assert train(tmp_path / "d", words, "--schedule.steps 1", change) == 2
    assert not (tmp_path / "d" / "config.json").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


def test_a_source_without_softmax_or_with_tokens_of_its_own(words, softmax, linear, tmp_path, capsys):
    assert train(tmp_path / "d", words, f"--schedule.steps 1 --conversion.source {linear}") == 2
    assert "has no softmax layers to convert, its pattern is hedgehog" in capsys.readouterr().err
    config = read_config(softmax / "config.json")
    other = tmp_path / "other"
    other.mkdir()
    save_config(
        dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="train")), other / "config.json"
    )
    (other / "tokenizer.json").write_text("{}")
    assert train(tmp_path / "d", words, f"--schedule.steps 1 --conversion.source {other}") == 2
    assert f"add --data.tokenizer {other / 'tokenizer.json'}" in capsys.readouterr().err
