"""Several processes as one run: the same curve as one process, kills, and another number of hosts after a restart."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import (
    HYBRID,
    ROOT,
    TINY,
    assert_same_bits,
    environment,
    final_arrays,
    finish,
    sealed,
    start,
    wait_for,
)
from train.distributed import Processes, take_flags
from train.errors import UserError

STEPS = (
    "--schedule.seconds None --schedule.steps 24 --eval-every 10 --log-every 1 --save-every-seconds 1 "
    "--mesh.fsdp 2 --mesh.tensor 2 --optimizer.name muon"
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_all(count: int, *words: str, devices: int, **more: str) -> list[subprocess.Popen[str]]:
    coordinator = f"--coordinator 127.0.0.1:{free_port()}"
    return [
        start(
            *words,
            f"{coordinator} --num-processes {count} --process-id {index}",
            devices=devices,
            **more,
        )
        for index in range(count)
    ]


def ends(processes: list[subprocess.Popen[str]], seconds: float = 200.0) -> list[str]:
    return [process.communicate(timeout=seconds)[0] for process in processes]


def losses(workdir: Path) -> np.ndarray:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return np.array([[row["step"], row["loss"], row["grad_norm"]] for row in lines if "loss" in row])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """Eight devices of one process."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish("run pydoc_lm", HYBRID, STEPS, f"--workdir {workdir}", devices=8)
    return workdir


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Four devices of each of two processes."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    processes = start_all(2, "run pydoc_lm", HYBRID, STEPS, f"--workdir {workdir}", devices=4)
    first, second = ends(processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert "after 24 steps" in first
    assert "bits per byte" not in second  # one of them speaks
    return workdir


def test_two_processes_have_the_curve_of_one(one_process, two_processes):
    one, two = losses(one_process), losses(two_processes)
    assert one.shape == (24, 3)
    np.testing.assert_allclose(two, one, rtol=1e-6, atol=1e-6)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one_process, two_processes)]
    assert summaries[1]["val_bits_per_byte"] == pytest.approx(summaries[0]["val_bits_per_byte"], rel=1e-6)
    assert json.loads((two_processes / "environment.json").read_text())["processes"] == 2
    from safetensors.numpy import load_file

    weights = [load_file(run / "model.safetensors") for run in (one_process, two_processes)]
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        np.testing.assert_allclose(weights[1][name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_one_of_two_is_killed_and_the_run_goes_on_with_another_number_of_hosts(two_processes, tmp_path):
    words = ("run pydoc_lm", HYBRID, STEPS, f"--workdir {tmp_path}")
    processes = start_all(2, *words, devices=4)
    wait_for(lambda: sealed(tmp_path), processes[0])
    processes[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    output, _ = processes[0].communicate(timeout=120)
    assert time.monotonic() - begin < 60
    processes[1].communicate()
    assert processes[0].returncode not in (0, None), output
    # Where it waits inside of the runtime that ends it: by the heartbeat, or on CPU by Gloo, which meets the half of
    # another collective.
    reasons = ("cannot go on without the others", "heartbeat", "gloo::enforcenotmet")
    assert any(reason in output.lower() for reason in reasons), output
    newest = final_arrays(tmp_path)  # what was sealed is whole
    assert len(newest) > 20
    # One host for a while, ended by a signal, then two again: the same steps on the same data.
    alone = start(*words, devices=8)
    before = sealed(tmp_path)
    wait_for(lambda: sealed(tmp_path) != before, alone)
    alone.send_signal(signal.SIGTERM)
    output, _ = alone.communicate(timeout=100)
    assert alone.returncode == 0, output
    assert "goes on from step" in output
    processes = start_all(2, *words, devices=4)
    first, second = ends(processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    if "this run is finished" not in first:
        assert "goes on from step" in first
    np.testing.assert_allclose(losses(tmp_path), losses(two_processes), rtol=1e-5, atol=1e-5)


def test_a_signal_to_one_of_two_stops_both_at_the_same_step(two_processes, tmp_path):
    words = ("run pydoc_lm", HYBRID, STEPS, f"--workdir {tmp_path}")
    processes = start_all(2, *words, devices=4)
    wait_for(lambda: sealed(tmp_path), processes[0])
    processes[1].send_signal(signal.SIGTERM)
    first, second = ends(processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert "stopped by another process at step" in first
    processes = start_all(2, *words, devices=4)
    first, second = ends(processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert_same_bits(tmp_path, two_processes)


def test_an_error_of_one_process_ends_all_with_the_message(tmp_path):
    (tmp_path / "text.txt").write_text("too short")
    words = ("run pydoc_lm", TINY, STEPS, f"--data.source {tmp_path / 'text.txt'} --workdir {tmp_path / 'run'}")
    processes = start_all(2, *words, devices=4)
    begin = time.monotonic()
    outputs = ends(processes, 60)
    assert time.monotonic() - begin < 60
    assert [process.returncode for process in processes] == [2, 2]
    for output in outputs:
        assert "cannot be split into training and held-out" in output


LATE = """
import sys, time
from train import distributed
from train.errors import UserError

def refuse():
    raise UserError("the folder is none")

index = int(sys.argv[2])
distributed.initialise(distributed.Processes(False, f"127.0.0.1:{sys.argv[1]}", 2, index))
with distributed.together():
    time.sleep(3 * index)
    distributed.decide("folder", refuse)
"""


def test_a_process_that_comes_late_hears_the_message_too():
    """Process 0 holds what the others read the message from."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, port, str(index)],
            env=environment(),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for index in range(2)
    ]
    for process, output in zip(processes, ends(processes, 60), strict=True):
        assert process.returncode == 2, output
        assert "error: the folder is none" in output


def test_a_run_by_seconds_is_for_one_host(tmp_path):
    words = ("run pydoc_lm", TINY, f"--workdir {tmp_path / 'run'}")
    for output in ends(start_all(2, *words, devices=4), 60):
        assert "schedule.seconds: each host has its own clock" in output


def test_flags_of_the_processes():
    assert take_flags(["--model.width", "3"]) == (Processes(), ["--model.width", "3"])
    assert take_flags(["--distributed", "auto", "x"]) == (Processes(automatic=True), ["x"])
    words = ["--seed", "1", "--coordinator=h0:1234", "--num-processes", "4", "--process-id", "3"]
    assert take_flags(words) == (Processes(False, "h0:1234", 4, 3), ["--seed", "1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--distributed slurm", "--distributed: expected auto or off, got 'slurm'"),
        ("--coordinator h:1", "all of --coordinator, --num-processes and --process-id, got --coordinator"),
        ("--coordinator h:1 --num-processes 2 --process-id 2", "--process-id: expected 0 to 1 for 2 processes, got 2"),
        ("--coordinator h --num-processes 2 --process-id 0", "--coordinator: expected HOST:PORT, got 'h'"),
        ("--coordinator h:1 --num-processes two --process-id 0", "expected integers, got 'two', '0'"),
        ("--coordinator", "--coordinator: expected a value after it"),
    ],
)
def test_flags_that_do_not_fit(words, message):
    with pytest.raises(UserError, match=message):
        take_flags(words.split())
