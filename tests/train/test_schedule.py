"""The learning rate's factor, and a clock that repeats itself after a kill."""

from __future__ import annotations

import json

import pytest

from train.config import ScheduleConfig
from train.schedule import Clock, factor


def schedule(**options):
    return ScheduleConfig(steps=100, **options)


def test_warm_up_rises_from_zero_to_one():
    wsd = schedule(warmup=0.2, decay="wsd", decay_fraction=0.5)
    assert [factor(wsd, f) for f in (0.0, 0.05, 0.1, 0.2, 0.5)] == pytest.approx([0, 0.25, 0.5, 1, 1])


def test_shapes_of_the_decay():
    assert factor(schedule(warmup=0.2, decay="linear"), 0.6) == pytest.approx(0.5)
    assert factor(schedule(warmup=0.2, decay="cosine"), 0.6) == pytest.approx(0.5)
    assert factor(schedule(warmup=0.2, decay="cosine"), 0.4) == pytest.approx(0.5 + 0.5 * 2**-0.5)
    wsd = schedule(warmup=0.0, decay="wsd", decay_fraction=0.4)
    assert [factor(wsd, f) for f in (0.0, 0.6, 0.8, 1.0)] == pytest.approx([1, 1, 0.5, 0])


@pytest.mark.parametrize("decay", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("decay_fraction", [0.0, 1.0])
def test_any_schedule_stays_between_zero_and_one_and_ends_at_final(decay, warmup, decay_fraction):
    config = schedule(warmup=warmup, decay=decay, decay_fraction=decay_fraction, final=0.1)
    values = [factor(config, i / 50) for i in range(51)]
    assert all(0 <= value <= 1 for value in values)
    falls = warmup < 1 and not (decay == "wsd" and decay_fraction == 0)
    assert values[-1] == pytest.approx(0.1 if falls else 1.0)
    assert factor(config, 7.0) == factor(config, 1.0)


class Time:
    now = 100.0

    def __call__(self):
        return self.now


def test_by_steps_needs_no_journal(tmp_path):
    with Clock(schedule(), tmp_path / "clock.jsonl") as clock:
        assert clock.fraction(25) == 0.25
    assert not (tmp_path / "clock.jsonl").exists()


def test_by_seconds_repeats_a_killed_stretch_and_goes_on(tmp_path):
    path, time = tmp_path / "clock.jsonl", Time()
    config = ScheduleConfig(seconds=40.0)
    first = Clock(config, path, started=95.0, now=time)
    seen = []
    for step in range(4):
        time.now += 2.5
        seen.append(first.fraction(step))
    assert seen == [7.5 / 40, 10 / 40, 12.5 / 40, 15 / 40]
    # Killed: the last line is torn.
    first.__exit__(None, None, None)
    with path.open("a") as file:
        file.write('{"step": 4, "sec')

    time.now = 5000.0
    with Clock(config, path, now=time) as second:
        time.now += 1.0
        assert [second.fraction(step) for step in (2, 3)] == seen[2:]
        time.now += 4.0
        assert second.fraction(4) == (15 + 5) / 40
        assert second.seconds == 20
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["seconds"] for line in lines] == [7.5, 10, 12.5, 15, 20]


def test_a_whole_run_can_be_repeated_from_its_journal(tmp_path):
    path, time = tmp_path / "clock.jsonl", Time()
    config = ScheduleConfig(seconds=10.0)
    with Clock(config, path, now=time) as clock:
        fractions = []
        for step in range(3):
            time.now += 4.0
            fractions.append(clock.fraction(step))
    assert fractions[-1] > 1
    with Clock(config, path, now=Time()) as again:
        assert [again.fraction(step) for step in range(3)] == fractions
