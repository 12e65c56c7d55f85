"""`python -m train compare`: what is run, what is refused before that, and what comes of it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.train.runs import HYBRID
from train import loop, metrics
from train.__main__ import main
from train.compare import curves, plot, with_mixer
from train.config import load_recipe
from train.errors import UserError

STEPS = "--schedule.seconds None --schedule.steps 4"
FINAL = {"softmax": 2.0, "lightning": 3.0, "lightning+sliding_window": 1.5}


class Runs:
    """Stands in for `loop.run`: keeps what it was called with, writes metrics and returns a summary."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, int], object] = {}
        self.failing: set[str] = set()
        self.stopping: set[str] = set()
        self.accuracy = False

    def __call__(self, config, workdir: Path, **_):
        mixer = "+".join(config.model.pattern)
        self.calls[mixer, config.seed] = config
        assert workdir.parts[-2:] == (mixer, f"seed_{config.seed}")
        if mixer in self.stopping:
            return {"stopped": "SIGTERM", "steps": 1}
        if mixer in self.failing:
            raise UserError("the updates were not finite")
        bits = FINAL[mixer] + 0.1 * config.seed
        figures = {"bits_per_byte": bits} | ({"accuracy": bits / 4} if self.accuracy else {})
        workdir.mkdir(parents=True, exist_ok=True)
        with metrics.MetricsLog(workdir / "metrics.jsonl") as log:
            log.truncate(after=0)
            for step in (1, 2, 3, 4):
                values = {f"val_{name}": value * 4 / step for name, value in figures.items()}
                log.write(step=step, seconds=step, bits_per_byte=bits * 4 / step, **values)
        return {
            "val_bits_per_byte": bits,
            "evaluation": {"held_out": figures, "books": {"bits_per_byte": 7.0}},
            "seconds": 10.0 + config.seed,
            "steps": 4,
            "tokens_per_second": 1000.0,
            "params": 12345,
        }


@pytest.fixture
def runs(monkeypatch) -> Runs:
    stub = Runs()
    monkeypatch.setattr(loop, "run", stub)
    return stub


def compare(workdir: Path, *words: str) -> int:
    return main(["compare", *(part for word in words for part in word.split()), "--workdir", str(workdir)])


def test_every_mixer_and_seed_is_run_alike(runs, tmp_path):
    assert compare(tmp_path, f"pydoc_lm --mixers {' '.join(FINAL)} --seeds 2 --seed 3 {STEPS}") == 0
    # By seed first, so that what is stopped early has as much of each.
    assert list(runs.calls) == [(mixer, seed) for seed in (3, 4) for mixer in FINAL]
    plain = load_recipe("pydoc_lm")
    for (mixer, seed), config in runs.calls.items():
        assert config.model.pattern == tuple(mixer.split("+"))
        assert config.schedule == dataclasses.replace(plain.schedule, seconds=None, steps=4)
        alike = dataclasses.replace(config, model=plain.model, schedule=plain.schedule, seed=plain.seed)
        assert alike == plain
        assert dataclasses.replace(config.model, pattern=plain.model.pattern, mixer_options={}) == dataclasses.replace(
            plain.model, mixer_options={}
        )
        assert config.seed == seed


def test_the_results_are_means_over_seeds(runs, tmp_path, capsys):
    assert compare(tmp_path, f"pydoc_lm --mixers {' '.join(FINAL)} --seeds 3 {STEPS}") == 0
    result = json.loads((tmp_path / "comparison.json").read_text())
    assert result["headline"] == "bits_per_byte"
    assert result["seeds"] == [0, 1, 2]
    assert result["failed"] == {}
    assert len(result["runs"]) == 9
    assert result["runs"][0]["evaluation"]["books"] == {"bits_per_byte": 7.0}
    assert result["environment"]["jax"]
    for mixer, final in FINAL.items():
        figures = result["mixers"][mixer]
        assert figures["bits_per_byte"]["mean"] == pytest.approx(final + 0.1)
        assert figures["bits_per_byte"]["std"] == pytest.approx(0.1)
        assert figures["seconds"]["mean"] == 11
        assert figures["params"] == {"mean": 12345, "std": 0}
        assert "accuracy" not in figures
        assert result["settings"][mixer]["model"]["pattern"] == mixer.split("+")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "comparison.svg").read_text()
    table = capsys.readouterr().out
    # The best comes first.
    places = [table.index(f" {mixer} ") for mixer in ("lightning+sliding_window", "softmax", "lightning")]
    assert places == sorted(places)
    assert "1.6000 ± 0.1000" in table


def test_a_recall_task_is_compared_by_accuracy(runs, tmp_path, capsys):
    runs.accuracy = True
    assert compare(tmp_path, "mqar --mixers softmax lightning --seeds 2") == 0
    result = json.loads((tmp_path / "comparison.json").read_text())
    assert result["headline"] == "accuracy"
    assert result["mixers"]["lightning"]["accuracy"]["mean"] == pytest.approx(3.05 / 4)
    table = capsys.readouterr().out
    assert table.index(" lightning ") < table.index(" softmax ")
    assert "0.7625" in table


def test_one_seed_has_no_deviation(runs, tmp_path, capsys):
    assert compare(tmp_path, f"pydoc_lm --mixers softmax --seeds 1 {STEPS}") == 0
    assert json.loads((tmp_path / "comparison.json").read_text())["mixers"]["softmax"]["bits_per_byte"]["std"] is None
    assert "±" not in capsys.readouterr().out


def test_options_of_a_mixer_come_from_the_recipe_or_fit_the_context():
    pydoc, mqar = load_recipe("pydoc_lm"), load_recipe("mqar")
    assert with_mixer(pydoc, "softmax").model.mixer_options == {}
    narrow = dataclasses.replace(
        pydoc, model=dataclasses.replace(pydoc.model, mixer_options={"sliding_window": {"window": 7}})
    )
    both = with_mixer(narrow, "lightning+sliding_window").model
    assert both.pattern == ("lightning", "sliding_window")
    assert both.mixer_options == {"sliding_window": {"window": 7}}
    window = with_mixer(mqar, "sliding_window").model.mixer_options["sliding_window"]["window"]
    assert window == mqar.data.context // 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pydoc_lm --mixers softmax sofmax", "--mixers sofmax: .*did you mean 'softmax'"),
        ("pydoc_lm --mixers lightning+nothing", r"--mixers lightning\+nothing: no attention variant .*'nothing'"),
        ("pydoc_lm --mixers softmax lightning+lightning+softmax", "num_layers: 4 is no multiple .* 3; 6 would be"),
        ("pydoc_lm --mixers softmax lightning softmax", "--mixers: 'softmax' is named twice"),
        ("pydoc_lm --mixers", "--mixers: expected at least one mixer, got none"),
        ("pydoc_lm", "--mixers"),
        ("pydoc_lm --mixers softmax --seeds 0", "--seeds: expected at least 1, got 0"),
        ("pydoc_lm --mixers softmax --model.pattern lightning", "--model.pattern: .*--mixers"),
        ("pydoc_lm --mixers softmax --model.widht 3", "no field is called --model.widht; did you mean --model.width"),
        ("pydok_lm --mixers softmax", "no recipe is called 'pydok_lm'; did you mean pydoc_lm"),
        ("--mixers softmax", "compare: expected a recipe first"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(runs, tmp_path, capsys, words, message):
    assert compare(tmp_path / "d", words) == 2
    assert not runs.calls
    assert not (tmp_path / "d").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(UserError, match=message):
        raise UserError(error)


def test_runs_that_fail_are_named_and_the_rest_is_compared(runs, tmp_path, capsys):
    runs.failing = {"lightning"}
    assert compare(tmp_path, f"pydoc_lm --mixers {' '.join(FINAL)} --seeds 2 {STEPS}") == 2
    assert len(runs.calls) == 6
    result = json.loads((tmp_path / "comparison.json").read_text())
    assert result["failed"] == dict.fromkeys(("lightning/seed_0", "lightning/seed_1"), "the updates were not finite")
    assert result["mixers"].keys() == {"softmax", "lightning+sliding_window"}
    error = capsys.readouterr().err
    assert "error: 2 of 6 runs failed (lightning/seed_0: the updates were not finite; lightning/seed_1" in error
    assert error.count("\n") == 1
    assert (tmp_path / "comparison.png").exists()
    runs.failing = set(FINAL)
    assert compare(tmp_path / "all", f"pydoc_lm --mixers softmax --seeds 2 {STEPS}") == 2
    assert json.loads((tmp_path / "all" / "comparison.json").read_text())["runs"] == []


def test_a_stopped_comparison_goes_on(runs, tmp_path, capsys):
    runs.stopping = {"lightning"}
    words = f"pydoc_lm --mixers {' '.join(FINAL)} --seeds 2 {STEPS}"
    assert compare(tmp_path, words) == 0
    assert list(runs.calls) == [("softmax", 0), ("lightning", 0)]
    assert "stopped in lightning/seed_0; the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "comparison.json").exists()
    runs.stopping = set()
    assert compare(tmp_path, words) == 0
    assert len(json.loads((tmp_path / "comparison.json").read_text())["runs"]) == 6


def test_the_folder_of_a_run_is_not_taken(runs, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert compare(tmp_path, f"pydoc_lm --mixers softmax --seeds 1 {STEPS}") == 2
    assert f"{tmp_path}: holds a run" in capsys.readouterr().err
    assert not runs.calls


def test_runs_that_are_left_out_are_asked_for(runs, tmp_path, capsys):
    words = f"pydoc_lm {STEPS} --seeds"
    assert compare(tmp_path, f"{words} 2 --mixers softmax lightning") == 0
    before = (tmp_path / "comparison.json").read_text()
    runs.calls.clear()
    for other in ("2 --mixers lightning", "2 --mixers lightning+sliding_window", "1 --mixers softmax lightning"):
        assert compare(tmp_path, f"{words} {other}") == 2
        error = capsys.readouterr().err
        assert re.search(r"runs that this command leaves out \(.*/seed_1\); name their mixers and seeds too", error)
        assert not runs.calls
        assert (tmp_path / "comparison.json").read_text() == before
    assert compare(tmp_path, f"{words} 3 --mixers {' '.join(FINAL)}") == 0
    assert len(json.loads((tmp_path / "comparison.json").read_text())["runs"]) == 9


def test_a_single_point_is_drawn(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    with metrics.MetricsLog(tmp_path / "a" / "metrics.jsonl") as log:
        log.write(step=4, seconds=1.0, bits_per_byte=2.0)
    plot({"softmax": [{"workdir": "a", "bits_per_byte": 2.0}]}, tmp_path)
    left = drawn[0].axes[0]
    assert left.lines[0].get_marker() == "o"
    low, high = left.get_xlim()
    assert [tick for tick in left.get_xticks() if low <= tick <= high] == [4]


def test_curves_meet_at_common_steps(tmp_path):
    for name, last in (("a", 400), ("b", 300)):
        with metrics.MetricsLog(tmp_path / name / "metrics.jsonl") as log:
            for step in range(1, last + 1):
                log.write(step=step, seconds=step, loss=float(step), val=None if step % 100 else float(2 * step))
    steps, values = curves([tmp_path / "a", tmp_path / "b"], "loss")
    assert (steps[0], steps[-1]) == (1, 300)
    assert values.shape == (2, len(steps))
    # The mean of a straight line around a point is the line; at the ends only one side counts.
    np.testing.assert_allclose(values[:, 1:-1], np.stack([steps[1:-1]] * 2), atol=0.6)
    steps, values = curves([tmp_path / "a", tmp_path / "b"], "val")
    assert (steps[0], steps[-1]) == (100, 300)
    np.testing.assert_allclose(values, np.stack([2 * steps] * 2), atol=5)
    assert curves([tmp_path / "a"], "absent")[1].shape == (1, 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Little of it, so that the runs end soon."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(12):
        (folder / f"{index}.txt").write_text(f"{index} bottles of beer on the wall; take one down. " * 4)
    return folder


@pytest.fixture(scope="module")
def words(text) -> str:
    return f"pydoc_lm --mixers softmax lightning+sliding_window --seeds 1 {HYBRID} {STEPS} --data.source {text}"


@pytest.fixture(scope="module")
def real(words, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("compare")
    assert compare(workdir, words) == 0
    return workdir


def test_real_runs_are_compared(real):
    result = json.loads((real / "comparison.json").read_text())
    assert result["mixers"].keys() == {"softmax", "lightning+sliding_window"}
    for figures in result["mixers"].values():
        assert 2 < figures["bits_per_byte"]["mean"] < 9
        assert figures["steps"]["mean"] == 4
    for run in result["runs"]:
        summary = json.loads((real / run["workdir"] / "summary.json").read_text())
        assert summary["val_bits_per_byte"] == run["bits_per_byte"]
        settings = json.loads((real / run["workdir"] / "config.json").read_text())
        assert (settings["seed"], "+".join(settings["model"]["pattern"])) == (run["seed"], run["mixer"])


def test_a_run_that_is_missing_is_made_and_the_others_are_kept(real, words, capsys):
    before = json.loads((real / "comparison.json").read_text())
    shutil.rmtree(real / "softmax" / "seed_0")
    assert compare(real, words) == 0
    assert capsys.readouterr().out.count("this run is finished") == 1
    after = json.loads((real / "comparison.json").read_text())
    for mixer in before["mixers"]:
        assert after["mixers"][mixer]["bits_per_byte"] == before["mixers"][mixer]["bits_per_byte"]


def test_recall_is_trained_and_scored(tmp_path, capsys):
    """In bits per token, for there are no bytes, and first of all by accuracy."""
    small = "--model.vocab-size 64 --model.width 16 --model.mlp-width 24 --data.context 16 --data.batch 8"
    words = f"mqar --mixers softmax --seeds 1 {small} --data.recall.pairs 2 --schedule.steps 3 --eval-every 2"
    assert compare(tmp_path, words) == 0
    (run,) = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert 0 <= run["accuracy"] <= 1
    assert abs(run["bits_per_token"] - math.log2(64)) < 1
    summary = json.loads((tmp_path / run["workdir"] / "summary.json").read_text())
    assert summary["val_accuracy"] == run["accuracy"]
    assert summary["best"].keys() == {"step", "val_accuracy"}
    picture = (tmp_path / "comparison.svg").read_text()  # where each text is a comment beside its shape
    assert "bits per token, in training" in picture
    assert "accuracy, held out, at the end" in picture
    page = (tmp_path / run["workdir"] / "report.html").read_text()
    assert f"<b>{run['accuracy']:.2%}</b> <span>accuracy on held-out answers</span>" in page
    shown = capsys.readouterr().out
    assert "bits/token" in shown
    assert f"{run['accuracy']:.2%} of the held-out answers are right after 3 steps" in shown
    for text in (picture, page, shown):
        assert not re.search("bits per byte|bits/byte|held-out text", text, re.IGNORECASE)
