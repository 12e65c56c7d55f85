"""The trainer as a person uses it: commands typed, processes killed, files broken, bits compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.train.runs import (
    HYBRID,
    ROOT,
    STEPS,
    TINY,
    assert_same_bits,
    command,
    environment,
    finish,
    rows,
    sealed,
    start,
    wait_for,
)
from train import loop, trainer
from train.__main__ import main
from train.config import load_recipe, parse_overrides

RUN = f"run pydoc_lm {HYBRID} {STEPS} --data.source pydoc --optimizer.name muon --sample.prompts The"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of 32 steps that nothing interrupted, validated on the way."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    output = finish(RUN, f"--workdir {workdir}")
    assert "bits per byte on held-out data after 32 steps" in output
    return workdir


def test_a_run_leaves_what_it_promises(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert {"val_bits_per_byte", "seconds", "steps", "tokens_per_second", "params"} <= summary.keys()
    assert summary["steps"] == 32
    assert 2 < summary["val_bits_per_byte"] < 6
    assert all(1 < bits < 3 for bits in summary["baselines"].values())
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in lines if "loss" in row]
    # The last step is logged although it is no multiple of five.
    assert [row["step"] for row in logged] == [*range(5, 31, 5), 32]
    assert [row["step"] for row in lines if "val_bits_per_byte" in row] == [15, 30, 32]
    assert lines[-1]["val_bits_per_byte"] == summary["val_bits_per_byte"]
    assert logged[0]["loss"] > logged[-1]["loss"]
    # The start and the compilation, most of the first five steps' time, are in no reading.
    assert logged[0]["tokens_per_second"] > 2 * 5 * 256 / logged[0]["seconds"]
    speeds = [row["tokens_per_second"] for row in logged]
    assert min(speeds) <= summary["tokens_per_second"] <= max(speeds)
    (sample,) = json.loads((whole / "samples.json").read_text())
    assert sample["prompt"] == "The"
    assert len(sample["text"]) >= 1
    page = (whole / "report.html").read_text()
    assert "<svg" in page
    assert f"{summary['val_bits_per_byte']:.3f}" in page
    assert len(sealed(whole)) == 3


def test_a_finished_run_says_so_and_does_nothing(whole, capsys):
    def content():
        return {path: path.stat().st_mtime_ns for path in whole.rglob("*")}

    before = content()
    assert main([*RUN.split(), "--workdir", str(whole)]) == 0
    assert f"this run is finished; its report is {whole / 'report.html'}" in capsys.readouterr().out
    assert content() == before


def test_kill_and_sigterm_in_the_middle_end_with_the_same_bits(whole, tmp_path):
    words = (RUN, f"--workdir {tmp_path}")
    process = start(*words)
    wait_for(lambda: sealed(tmp_path), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "summary.json").exists()
    before = sealed(tmp_path)
    process = start(*words)
    wait_for(lambda: sealed(tmp_path) != before, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "goes on from step" in output
    assert "stopped by SIGTERM at step" in output
    assert not (tmp_path / "summary.json").exists()
    assert "goes on from step" in finish(*words)
    assert_same_bits(tmp_path, whole)
    assert rows(tmp_path) == rows(whole)


def test_a_run_by_the_clock_repeats_its_journal_through_a_kill(whole, tmp_path):
    """With the times of a run by steps, half a second each, in its journal, a run by seconds comes to the same bits."""
    journal = "".join(json.dumps({"step": step, "seconds": 0.5 * step}) + "\n" for step in range(33))
    (tmp_path / "clock.jsonl").write_text(journal)
    words = (RUN, f"--schedule.seconds 16 --schedule.steps None --workdir {tmp_path}")
    process = start(*words)
    wait_for(lambda: sealed(tmp_path), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "goes on from step" in finish(*words)
    assert (tmp_path / "clock.jsonl").read_text() == journal
    assert_same_bits(tmp_path, whole)
    assert rows(tmp_path) == rows(whole)


def test_an_error_in_a_step_ends_the_threads_and_leaves_a_run_that_goes_on(tmp_path, monkeypatch, capsys):
    config = parse_overrides(load_recipe("pydoc_lm"), [*TINY.split(), *STEPS.split(), "--schedule.steps", "3"])
    before = set(threading.enumerate())

    def fails(schedule, fraction):
        if fraction > 0.5:
            raise RuntimeError("no such luck")
        return 1.0

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "factor", fails)
        with pytest.raises(RuntimeError, match="no such luck"):
            loop.run(config, tmp_path)
    left = [thread.name for thread in set(threading.enumerate()) - before if not thread.daemon]
    assert not left
    handler = signal.getsignal(signal.SIGTERM)
    assert handler is signal.SIG_DFL
    summary = loop.run(config, tmp_path)
    assert summary["steps"] == 3
    assert loop.run(config, tmp_path) == json.loads((tmp_path / "summary.json").read_text())
    assert "3 steps" in capsys.readouterr().out


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
    assert json.loads(shown.out.splitlines()[-1])["step"] < 32


def test_sample_and_eval_read_the_run(whole, tmp_path, capsys):
    assert main(["sample", str(whole), "--tokens", "20", "--prompt", "def ", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("def ")
    assert main(["sample", str(whole), "--tokens", "20", "--prompt", "def ", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert main(["eval", str(whole)]) == 0
    result = json.loads(capsys.readouterr().out)
    summary = json.loads((whole / "summary.json").read_text())
    assert result["held_out"]["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-4)
    (tmp_path / "own.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    assert main(["eval", str(whole), "--data", str(tmp_path / "own.txt")]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored.keys() == {"step", "data"}
    assert 1 < scored["data"]["bits_per_byte"] < 9


def test_doctor_shows_versions_and_every_op(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "jax",
        "devices",
        "\nsoftmax: dot_product_attention(",
        "\nsliding_window: sliding_window_attention(",
        "\nlightning: linear_attention(",
        "\nretnet: linear_attention(",
        "runs xla",
    ):
        assert word in shown


@pytest.mark.parametrize("words", ["run pydoc_lm --help", "--help"], ids=["long", "buffered to the end"])
def test_a_reader_that_goes_away_is_no_error(words):
    """As with `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(words),
        cwd=ROOT,
        env=environment(PYTHONUNBUFFERED=""),
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_python_without_the_packages_is_told_where_they_are():
    words = [sys.executable, "-S", "-m", "train", "run", "pydoc_lm", "--data.source", "a b"]  # no site, no packages
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    wanted = "make setup, then .venv/bin/python -m train run pydoc_lm --data.source 'a b'\n"
    assert re.fullmatch(rf"error: \w+ is not installed here \(.*\); {wanted}", done.stderr)


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
        ("run text_lm --data.source {files}/nothing*", "no such file or folder, and no glob that matches a file"),
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
        ("run pydoc_lm --workdir --model.tied", "--workdir: expected a folder after it"),
        ("run pydoc_lm --workdir=", "--workdir: expected a folder after it"),
        (
            "runn pydoc_lm",
            "no verb is called 'runn'; there are run, compile, compare, sample, eval, export, inspect, launch, doctor",
        ),
        ("sample {files}/none", "holds no run (no config.json)"),
        ("sample --tokens 3", "sample: expected the folder of a run first"),
        ("eval {files} --date x", "Unrecognized options: --date"),
        ("doctor --fast", "doctor: takes no options, got --fast"),
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
    words = f"{RUN} --workdir {whole} --schedule.steps 61"
    assert main(words.split()) == 2
    assert "holds a run with other settings (schedule.steps was 32 and is now 61)" in capsys.readouterr().err
