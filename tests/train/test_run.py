"""The trainer as a person uses it: commands typed, processes killed, files broken, bits compared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from train.__main__ import main
from train.checkpoint import HEADER, Checkpoints

ROOT = Path(__file__).parent.parent.parent
TINY = (
    "--model.width 16 --model.num-layers 2 --model.num-heads 2 --model.mlp-width 24 "
    "--model.mixer-options.sliding-window.window 8 --data.context 32 --data.batch 8 --sample.tokens 12 "
    "--log-every 5 --save-every-seconds 0.2"
)
STEPS = "--schedule.seconds None --schedule.steps"


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "train", *(part for word in words for part in word.split())]


def environment() -> dict[str, str]:
    """One device, and nothing of what the tests set for themselves."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*words), cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(*words: str) -> str:
    process = start(*words)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(condition, process, seconds=200.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def sealed(workdir: Path) -> list[Path]:
    return sorted((workdir / "checkpoints").glob("step_*/MANIFEST.json"))


def final_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint by path, read without the training code."""
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.latest()
    folder = workdir / "checkpoints" / f"step_{step:08d}"
    with ocp.PyTreeCheckpointer() as reader:
        stored = reader.restore(folder / "state")
    assert set(stored) == set(json.loads((folder / HEADER).read_text())["arrays"])
    return {path: np.asarray(array) for path, array in stored.items()}


def assert_same_bits(one: Path, two: Path) -> None:
    a, b = final_arrays(one), final_arrays(two)
    assert a.keys() == b.keys()
    assert len(a) > 20
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of 60 steps that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    output = finish("run pydoc_lm", TINY, STEPS, "60", f"--workdir {workdir}")
    assert "bits per byte on held-out text after 60 steps" in output
    return workdir


def test_a_run_leaves_what_it_promises(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert {"val_bits_per_byte", "seconds", "steps", "tokens_per_second", "params"} <= summary.keys()
    assert summary["steps"] == 60
    assert 2 < summary["val_bits_per_byte"] < 5
    assert summary["tokens_per_second"] > 0
    assert all(1 < bits < 3 for bits in summary["baselines"].values())
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [*range(5, 61, 5)]
    assert rows[-1]["val_bits_per_byte"] == summary["val_bits_per_byte"]
    assert rows[0]["loss"] > rows[-2]["loss"]
    (sample,) = json.loads((whole / "samples.json").read_text())
    assert sample["prompt"] == "The "
    assert len(sample["text"]) >= 1
    page = (whole / "report.html").read_text()
    assert "<svg" in page
    assert f"{summary['val_bits_per_byte']:.3f}" in page
    assert len(sealed(whole)) <= 3


def test_a_finished_run_says_so_and_does_nothing(whole):
    before = final_arrays(whole)
    assert "this run is finished" in finish("run pydoc_lm", TINY, STEPS, "60", f"--workdir {whole}")
    assert before.keys() == final_arrays(whole).keys()


def test_kill_in_the_middle_ends_with_the_same_bits(whole, tmp_path):
    words = ("run pydoc_lm", TINY, STEPS, "60", f"--workdir {tmp_path}")
    process = start(*words)
    wait_for(lambda: sealed(tmp_path), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "summary.json").exists()
    assert "goes on from step" in finish(*words)
    assert_same_bits(tmp_path, whole)
    a, b = (
        [(r["step"], r["loss"]) for r in map(json.loads, (d / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
        for d in (tmp_path, whole)
    )
    assert a == b


def test_sigterm_saves_and_the_same_command_goes_on(whole, tmp_path):
    words = ("run pydoc_lm", TINY, STEPS, "60", f"--workdir {tmp_path}")
    process = start(*words)
    wait_for(lambda: sealed(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM at step" in output
    finish(*words)
    assert_same_bits(tmp_path, whole)


def test_a_run_by_the_clock_repeats_from_its_journal(tmp_path):
    """The journal of a run by seconds fixes its bits: another workdir with the journal, killed on the way, agrees."""
    first, second = tmp_path / "first", tmp_path / "second"
    words = ("run pydoc_lm", TINY, "--schedule.seconds 22")
    finish(*words, f"--workdir {first}")
    steps = len((first / "clock.jsonl").read_text().splitlines())
    assert steps > 10
    second.mkdir()
    shutil.copy(first / "clock.jsonl", second)
    process = start(*words, f"--workdir {second}")
    wait_for(lambda: sealed(second), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(*words, f"--workdir {second}")
    assert (second / "clock.jsonl").read_text() == (first / "clock.jsonl").read_text()
    assert_same_bits(first, second)


def test_a_flipped_bit_costs_one_checkpoint_and_is_named(whole, tmp_path, capsys):
    workdir = tmp_path / "flipped"
    shutil.copytree(whole, workdir)
    newest = sealed(workdir)[-1].parent
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert main(["eval", str(workdir)]) == 0
    shown = capsys.readouterr()
    assert "has another checksum than when it was sealed" in shown.err
    assert json.loads(shown.out.splitlines()[-1])["step"] < 60


def test_sample_and_eval_read_the_run(whole, tmp_path, capsys):
    assert main(["sample", str(whole), "--tokens", "20", "--prompt", "def ", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("def ")
    assert main(["sample", str(whole), "--tokens", "20", "--prompt", "def ", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert main(["eval", str(whole)]) == 0
    result = json.loads(capsys.readouterr().out)
    summary = json.loads((whole / "summary.json").read_text())
    assert result["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-4)
    (tmp_path / "own.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    assert main(["eval", str(whole), "--data", str(tmp_path / "own.txt")]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 1


def test_doctor_shows_versions_and_every_op(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "jax",
        "devices",
        "dot_product_attention(",
        "sliding_window_attention(",
        "linear_attention(",
        "runs xla",
    ):
        assert word in shown


@pytest.fixture
def files(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for name in ("short", "other"):
        (tmp_path / f"{name}.txt").write_text(f"tiny {name}")
    (tmp_path / "no_field.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run text_lm", "no data is named; give files, folders, globs"),
        ("run text_lm --data.source {files}/empty.txt", "empty.txt: the file is empty"),
        ("run text_lm --data.source {files}/latin.txt", "latin.txt: byte 3 (0xe9) is not UTF-8"),
        ("run text_lm --data.source {files}/nothing*", "matches no file"),
        ("run text_lm --data.source {files}/no_field.jsonl", "no_field.jsonl, line 2: has no field 'text'"),
        ("run text_lm --data.source {files}/short.txt {files}/other.txt", "one context of 1024 needs 1025"),
        ("run text_lm --data.source {files}/short.txt", "cannot be split into training and held-out"),
        ("run pydoc_llm", "no recipe is called 'pydoc_llm'; did you mean pydoc_lm?"),
        ("run pydoc_lm --model.widht 3", "no field is called --model.widht; did you mean --model.width?"),
        ("run pydoc_lm --mesh.tensor 3", "mesh: data -1 x fsdp 1 x tensor 3 x context 1 does not fit 8 devices"),
        ("run pydoc_lm", "data.batch: 2 sequences do not divide over data x fsdp = 8 devices"),
        ("run pydoc_lm --model.mixer-options.sliding-window.window 0", "window: expected at least 1, got 0"),
        ("run pydoc_lm --model.num-heads 3", "a width of 128 does not divide by 3 heads"),
        ("run pydoc_lm --workdir", "--workdir: expected a folder after it"),
        ("runn pydoc_lm", "no verb is called 'runn'; there are run, sample, eval, doctor"),
        ("sample {files}/none", "holds no run (no config.json)"),
    ],
)
def test_bad_input_is_one_line_and_code_2(words, message, files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    words = words.format(files=files)
    if words.startswith("run ") and "--workdir" not in words:
        words += f" --workdir {files / 'run'}"
    if "sliding-window.window 0" in words or "num-heads" in words:
        words += " --data.batch 8"
    assert main(words.split()) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1


def test_a_workdir_holds_one_run(whole, capsys):
    words = f"run pydoc_lm {TINY} {STEPS} 61 --workdir {whole}"
    assert main(words.split()) == 2
    assert "holds a run with other settings (schedule.steps was 60 and is now 61)" in capsys.readouterr().err
