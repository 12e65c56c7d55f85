"""What a run keeps besides its newest checkpoints: curves, a trace, the best weights, and itself on another mesh."""

from __future__ import annotations

import json
import signal
import struct

import numpy as np
import pytest

from tests.train.runs import STEPS, TINY, final_arrays, finish, rows, sealed, start, wait_for

MUON = f"run pydoc_lm {TINY} {STEPS} --optimizer.name muon"


def step_of(seal):
    return int(seal.parent.name.removeprefix("step_"))


def newest(workdir):
    """The step of the newest checkpoint; -1 before there is one."""
    return max(map(step_of, sealed(workdir)), default=-1)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run whose learning rates undo what it learnt: its best figure is an early one."""
    workdir = tmp_path_factory.mktemp("kept") / "run"
    rates = "--optimizer.learning-rate 5.0 --schedule.warmup 1.0"
    words = "--schedule.seconds None --schedule.steps 24 --eval-every 4 --keep-checkpoints 1 --profile-steps 3 4"
    finish("run pydoc_lm", TINY, words, rates, f"--workdir {workdir}")
    return workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 32 steps of Muon on one device that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(MUON, f"--workdir {workdir}")
    return workdir


def test_events_have_the_curves(kept):
    from tensorboardX.proto import event_pb2

    seen: dict[str, list[int]] = {}
    for file in sorted((kept / "events").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                seen.setdefault(value.tag, []).append(event.step)
            data = data[16 + length :]
    losses = [row["step"] for row in rows(kept) if "loss" in row]
    assert losses
    assert losses in seen.values()


def test_the_trace_is_of_the_steps_that_were_asked_for(kept):
    (trace,) = (kept / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_the_best_weights_stay_beside_the_newest(kept):
    best = json.loads((kept / "summary.json").read_text())["best"]
    figures = {row["step"]: row["val_bits_per_byte"] for row in rows(kept) if "val_bits_per_byte" in row}
    assert best["val_bits_per_byte"] == min(figures.values())
    assert best["step"] == min(figures, key=lambda step: figures[step]) < 24
    assert {step_of(path) for path in sealed(kept)} == {best["step"], 24}


def test_a_run_moves_from_eight_devices_to_four_to_one(tmp_path, whole):
    """With other counts of accumulation: what is trained on stays the same, but for the order of sums."""
    workdir = tmp_path / "run"
    for devices, words in (
        (8, "--mesh.fsdp 4 --mesh.data 2"),
        (4, "--mesh.fsdp 2 --mesh.tensor 2 --data.accumulate 2"),
    ):
        before = newest(workdir)
        process = start(MUON, words, f"--workdir {workdir}", devices=devices)
        wait_for(lambda before=before: newest(workdir) > before, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    finish(MUON, "--data.accumulate 4", f"--workdir {workdir}")
    got, want = final_arrays(workdir), final_arrays(whole)
    assert got.keys() == want.keys()
    for path, array in want.items():
        if np.issubdtype(array.dtype, np.floating) and "parameters" in path:
            np.testing.assert_allclose(
                got[path], array, rtol=0, atol=2e-3 * max(1e-2, np.abs(array).max()), err_msg=path
            )
