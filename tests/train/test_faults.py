"""What a run survives: kills at any moment, signals, broken files, full and read-only disks, two runs at once."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import (
    ROOT,
    STEPS,
    TINY,
    assert_same_bits,
    command,
    environment,
    final_arrays,
    finish,
    rows,
    sealed,
    start,
    wait_for,
)
from train import loop, trainer
from train.__main__ import main
from train.checkpoint import Checkpoints
from train.config import load_recipe, parse_overrides, read_config
from train.errors import UserError
from train.evaluate import place


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of 32 steps that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    finish("run pydoc_lm", TINY, STEPS, f"--workdir {workdir}")
    return workdir


def tiny(*words: str):
    """The configuration of such a run, in this process and on its eight devices."""
    return parse_overrides(load_recipe("pydoc_lm"), " ".join((TINY, STEPS, *words)).split())


def test_twenty_kills_at_random_moments_end_with_the_same_bits(tmp_path):
    """From the start of the interpreter to well within the steps, where a save is nearly always under way."""
    long = "--schedule.seconds None --schedule.steps 400 --eval-every 150 --save-every-seconds 0.3"
    finish("run pydoc_lm", TINY, long, f"--workdir {tmp_path / 'whole'}")
    words = ("run pydoc_lm", TINY, long, f"--workdir {tmp_path / 'killed'}")
    chance = random.Random(20)
    reached: list[int] = []
    for number in range(20):
        process = start(*words)
        begin, before = time.monotonic(), sealed(tmp_path / "killed")
        # Every fourth gets a little beyond its first save, the others die when they die.
        while process.poll() is None and time.monotonic() < begin + 100:
            if number % 4 == 3 and sealed(tmp_path / "killed") != before:
                time.sleep(chance.uniform(0.0, 0.5))
                break
            if number % 4 != 3 and time.monotonic() > begin + chance.uniform(0.0, 7.0):
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
        reached.append(max((int(path.parent.name[5:]) for path in sealed(tmp_path / "killed")), default=0))
    assert reached == sorted(reached)
    assert 0 < reached[-1] < 400
    finish(*words)
    assert_same_bits(tmp_path / "killed", tmp_path / "whole")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_kill_while_restoring(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name in ("summary.json", "report.html"):
        (tmp_path / name).unlink()
    shutil.rmtree(sealed(tmp_path)[-1].parent)
    words = ("run pydoc_lm", TINY, STEPS, f"--workdir {tmp_path}")
    # A process that stops within the restore itself, and is killed there.
    code = (
        "import os, signal, sys\n"
        "from train import checkpoint\n"
        "read = checkpoint._read_arrays\n"
        "def reads(*arguments):\n"
        "    arrays = read(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint._read_arrays = reads\n"
        "from train.__main__ import main\n"
        "main(sys.argv[1:])\n"
    )
    before = final_arrays(tmp_path)
    process = subprocess.run([sys.executable, "-c", code, *command(*words)[3:]], cwd=ROOT, env=environment())
    assert process.returncode == -signal.SIGKILL
    after = final_arrays(tmp_path)
    assert all(np.array_equal(before[path], after[path]) for path in before)
    finish(*words)
    assert_same_bits(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_zero(number, tmp_path):
    words = ("run pydoc_lm", TINY, STEPS, "--schedule.steps 100000", f"--workdir {tmp_path}")
    process = start(*words)
    wait_for(lambda: sealed(tmp_path), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    step = int(output.rpartition("at step ")[2].partition(",")[0])
    assert f"stopped by {number.name} at step {step}, saved" in output
    assert sealed(tmp_path)[-1].parent.name == f"step_{step:08d}"


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = start("run pydoc_lm", TINY, STEPS, "--schedule.steps 100000", f"--workdir {tmp_path}")
    wait_for(lambda: sealed(tmp_path), process)
    # Stopped, the process takes both signals before it can do anything about the first.
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    process.communicate(timeout=20)
    assert process.returncode in (-signal.SIGINT, 0)  # 0 where the run was saved within 50 ms
    assert time.monotonic() - begin < 5


def broken(folder: Path, damage: str, chance: random.Random) -> None:
    """Break one file of a checkpoint, chosen at random."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    victim = chance.choice(files)
    data = bytearray(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        victim.write_bytes(data)
    elif damage == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        (folder / "MANIFEST.json").unlink()
        shutil.rmtree(folder / "state" / "d", ignore_errors=True)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "half-written"])
def test_a_broken_checkpoint_is_skipped_and_the_run_comes_to_the_same_bits(damage, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name in ("summary.json", "report.html"):
        (tmp_path / name).unlink()
    newest = sealed(tmp_path)[-1].parent
    broken(newest, damage, random.Random(damage))
    output = finish("run pydoc_lm", TINY, STEPS, f"--workdir {tmp_path}")
    assert f"skipped {newest}: " in output
    goes_on = int(output.partition("goes on from step ")[2].split()[0])
    assert f"step_{goes_on:08d}" in {path.parent.name for path in sealed(whole)[:-1]}
    assert_same_bits(tmp_path, whole)


def test_nothing_valid_is_an_error_and_no_new_start(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    for manifest in sealed(tmp_path):
        manifest.write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    assert main(["run", "pydoc_lm", *f"{TINY} {STEPS} --workdir {tmp_path}".split()]) == 2
    shown = capsys.readouterr().err
    assert "none of its 3 checkpoints is valid; bring one back from a backup" in shown
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")} == before


def test_checkpoints_without_their_configuration_are_no_new_run(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").unlink()
    (tmp_path / "summary.json").unlink()
    assert main(["run", "pydoc_lm", *f"{TINY} {STEPS} --workdir {tmp_path}".split()]) == 2
    assert "has checkpoints and no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model.width 32", "model.width was 16 and is now 32"),
        ("--model.param-dtype bfloat16", "model.param_dtype was 'float32' and is now 'bfloat16'"),
        ("--optimizer.name muon", "optimizer.name was 'adamw' and is now 'muon'"),
        ("--optimizer.ema 0.9", "optimizer.ema was None and is now 0.9"),
    ],
)
def test_another_configuration_is_refused_by_name(words, message, whole, tmp_path, capsys):
    assert main(["run", "pydoc_lm", *f"{TINY} {STEPS} {words} --workdir {whole}".split()]) == 2
    assert message in capsys.readouterr().err
    # With the record of the configuration bent to agree, the arrays themselves are compared.
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    group, name = message.split()[0].split(".")
    value = message.rpartition(" ")[2].strip("'")
    config[group][name] = (
        float(value) if value[0].isdigit() and name == "ema" else int(value) if value.isdigit() else value
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["run", "pydoc_lm", *f"{TINY} {STEPS} {words} --workdir {tmp_path}".split()]) == 2
    shown = capsys.readouterr().err
    assert "does not fit this model and optimiser" in shown
    if "param-dtype" in words:
        assert "parameters/embed/embedding/value is float32[256,16], wanted bfloat16[256,16]" in shown
    if "ema" in words:
        assert "average/embed/embedding/value is missing" in shown


def test_two_runs_in_one_workdir(tmp_path):
    words = ("run pydoc_lm", TINY, STEPS, "--schedule.steps 100000", f"--workdir {tmp_path}")
    first = start(*words)
    wait_for(lambda: sealed(tmp_path), first)
    second = start(*words)
    output, _ = second.communicate(timeout=100)
    assert second.returncode == 2
    assert f"a run is going on there (process {first.pid} on " in output
    first.send_signal(signal.SIGKILL)
    first.communicate()
    third = start(*words)  # a dead process holds no lock
    before = sealed(tmp_path)
    wait_for(lambda: sealed(tmp_path) != before, third)
    third.send_signal(signal.SIGTERM)
    output, _ = third.communicate(timeout=60)
    assert third.returncode == 0
    assert "goes on from step" in output


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(tmp_path):
    """The disk is a quota on what a file may hold: as on a full disk, a write comes back short."""
    words = ("run pydoc_lm", TINY, STEPS, "--schedule.steps 100000", f"--workdir {tmp_path}")
    process = start(*words)
    wait_for(lambda: len(sealed(tmp_path)) >= 2, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2, output
    assert "could not be written" in output
    assert "the last sealed checkpoint is step" in output
    assert "Traceback" not in output
    step = int(output.rpartition("the last sealed checkpoint is step ")[2].partition(";")[0])
    assert sealed(tmp_path)[-1].parent.name == f"step_{step:08d}"
    assert final_arrays(tmp_path)


@pytest.mark.parametrize(
    ("written", "options"),
    [
        ("metrics.jsonl", "--schedule.steps 100000 --log-every 1"),
        ("clock.jsonl", "--schedule.steps None --schedule.seconds 600 --log-every 100000"),
    ],
)
def test_a_disk_that_is_full_between_two_checkpoints(written, options, tmp_path):
    words = ("run pydoc_lm", TINY, STEPS, "--save-every-seconds inf --eval-every None", options)
    process = start(*words, f"--workdir {tmp_path}")
    file = tmp_path / written
    wait_for(lambda: file.exists() and file.stat().st_size > 2**12, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**12, 2**12))
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2, output
    assert f"error: {tmp_path}: cannot be written to (File too large); free some space" in output
    assert "Traceback" not in output


def test_a_disk_that_is_full_when_the_report_is_written(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()

    def disk_full(workdir):
        raise OSError(28, "No space left on device")

    config = read_config(tmp_path / "config.json")
    with monkeypatch.context() as patch:
        patch.setattr(loop.report, "write_report", disk_full)
        with pytest.raises(UserError, match=r"cannot be written to \(No space left on device"):
            loop.run(config, tmp_path)
    (tmp_path / "summary.json").unlink()
    assert loop.run(config, tmp_path)["steps"] == json.loads((whole / "summary.json").read_text())["steps"]


def test_a_folder_that_becomes_read_only(tmp_path, monkeypatch):
    """Root may write anywhere, so the folder of the checkpoints is replaced by a file, which no one can write into."""
    done, saves = [], []

    class Known(Checkpoints):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            saves.append(self)

    def places(batch, program):
        done.append(1)
        if len(done) == 12:
            saves[0].wait()  # or the save under way would make the folder anew
            (tmp_path / "checkpoints").rename(tmp_path / "moved")
            (tmp_path / "checkpoints").write_text("")
        return place(batch, program)

    monkeypatch.setattr(trainer, "place", places)
    monkeypatch.setattr(loop, "Checkpoints", Known)
    with pytest.raises(UserError, match=r"could not be written .*; free some space or mend the permissions"):
        loop.run(tiny(), tmp_path)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "moved").rename(tmp_path / "checkpoints")
    assert final_arrays(tmp_path)


def test_a_jump_of_the_wall_clock_changes_nothing(whole, tmp_path):
    code = (
        "import sys, time\n"
        "real, calls = time.time, [0]\n"
        "def jumps():\n"
        "    calls[0] += 1\n"
        "    return real() + (-3600 if calls[0] % 2 else 3600)\n"
        "time.time = jumps\n"
        "from train.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = command("run pydoc_lm", TINY, STEPS, f"--workdir {tmp_path}")[3:]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path, whole)
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)
    assert seconds[-1] < 300


@pytest.mark.parametrize("home", ["none", "read-only"])
def test_no_home_and_a_home_that_cannot_be_written(home, tmp_path):
    where = environment()
    if home == "none":
        where.pop("HOME", None)
    else:
        (tmp_path / "home").write_text("")  # not even root can make a folder in a file
        where["HOME"] = str(tmp_path / "home")
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
        where.pop(name, None)
    words = command("run pydoc_lm", TINY, STEPS, f"--schedule.steps 3 --workdir {tmp_path / 'run'}")
    done = subprocess.run(words, cwd=ROOT, env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_a_terminal_of_40_columns(tmp_path):
    parent, child = pty.openpty()

    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    where = environment() | {"TERM": "xterm"}
    where.pop("COLUMNS", None)
    words = command("run pydoc_lm", TINY, STEPS, f"--schedule.steps 6 --workdir {tmp_path / 'run'}")
    process = subprocess.Popen(words, cwd=ROOT, env=where, stdout=child, stderr=subprocess.STDOUT, close_fds=True)
    os.close(child)
    shown = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(parent)
    assert process.wait() == 0, shown
    text = shown.decode()
    assert "bits/byte" in text
    bars = [line for line in text.replace("\r", "\n").split("\n") if "━" in line]
    assert bars

    plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in bars]
    assert max(map(len, plain)) <= 40
