"""Synthetic recall: every answer stands earlier in its window, and a window is a function of (seed, index)."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from train.config import RecallConfig
from train.data.pipeline import TrainData
from train.data.recall import RecallWindows
from train.errors import UserError

MQAR, COPYING, INDUCTION = (
    RecallConfig("mqar", pairs=3),
    RecallConfig("copying", copy_length=3),
    RecallConfig("induction"),
)
TASKS = pytest.mark.parametrize("task", [MQAR, COPYING, INDUCTION], ids=lambda task: task.task)


def make(task: RecallConfig, vocab_size: int = 37, context: int = 24, seed: int = 5) -> RecallWindows:
    return RecallWindows(task, vocab_size, context, seed)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@TASKS
def test_a_window_has_the_form_of_every_batch(task):
    window = make(task)[3]
    assert {name: array.dtype.name for name, array in window.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "weights": "float32",
    }
    assert {array.shape for array in window.values()} == {(24,)}
    tokens = np.concatenate([make(task)[index]["tokens"] for index in range(300)])
    assert set(tokens) == set(range(37))
    for index in range(20):
        window = make(task)[index]
        assert set(window["weights"]) == {0, 1}
        assert not window["targets"][window["weights"] == 0].any()


@pytest.mark.parametrize(("vocab_size", "context", "pairs"), [(37, 24, 3), (8192, 64, 4), (8, 12, 3), (512, 128, 8)])
def test_mqar_asks_every_key_once_for_its_value(vocab_size, context, pairs):
    windows = make(RecallConfig("mqar", pairs=pairs), vocab_size, context)
    for index in range(50):
        window = windows[index]
        keys, values = window["tokens"][0 : 2 * pairs : 2], window["tokens"][1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert ((keys >= 1) & (keys < vocab_size // 2)).all()
        assert ((values >= vocab_size // 2) & (values < vocab_size)).all()
        (asked,) = np.nonzero(window["weights"])
        assert (asked >= 2 * pairs).all()
        assert not (asked % 2).any()
        assert dict(zip(window["tokens"][asked], window["targets"][asked], strict=True)) == dict(
            zip(keys, values, strict=True)
        )
        assert (window["segment_ids"] == 1).all()
        assert (window["positions"] == np.arange(context)).all()


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_mqar_draws_gaps_one_after_the_other_from_the_power_law(power):
    windows = make(RecallConfig("mqar", pairs=2, power=power), context=16)
    count, slots = 4000, 6
    gaps = np.empty((count, 2), int)
    for index in range(count):
        tokens, weights = windows[index]["tokens"], windows[index]["weights"]
        for pair in range(2):
            (place,) = np.nonzero((tokens == tokens[2 * pair]) & (weights == 1))[0]
            gaps[index, pair] = (place - 4) // 2
    p = np.arange(1, slots + 1) ** (power - 1)
    p /= p.sum()
    second = np.array([sum(p[i] * p[j] / (1 - p[i]) for i in range(slots) if i != j) for j in range(slots)])
    for column, wanted in enumerate((p, second)):
        seen = np.bincount(gaps[:, column], minlength=slots) / count
        np.testing.assert_array_less(abs(seen - wanted), 4 * np.sqrt(wanted * (1 - wanted) / count))


def test_copying_repeats_each_string_behind_the_separator():
    window = make(COPYING, vocab_size=11)[2]
    assert set(window["segment_ids"]) == {0, 1, 2, 3}
    for segment in (1, 2, 3):
        (row,) = np.nonzero(window["segment_ids"] == segment)
        tokens, targets, weights = (window[name][row] for name in ("tokens", "targets", "weights"))
        assert (window["positions"][row] == np.arange(7)).all()
        assert (tokens[0], tokens[4]) == (9, 10)
        assert (tokens[1:4] < 9).all()
        assert (weights == [0, 0, 0, 0, 1, 1, 1]).all()
        assert (targets[4:] == tokens[1:4]).all()
        assert (tokens[5:] == targets[4:-1]).all()
    padding = window["segment_ids"] == 0
    assert padding.sum() == 24 - 3 * 7
    assert not any(window[name][padding].any() for name in window)


def test_induction_asks_for_what_followed_the_trigger():
    windows = make(INDUCTION, vocab_size=16, context=9)
    places = set()
    for index in range(200):
        window = windows[index]
        (first, last) = np.nonzero(window["tokens"] == 15)[0]
        places.add(int(first))
        assert last == 8
        assert window["weights"].sum() == window["weights"][8] == 1
        assert window["targets"][8] == window["tokens"][first + 1]
    assert places == set(range(7))


@TASKS
def test_a_window_depends_on_seed_and_index_alone(task):
    windows = make(task)
    later = windows[2**61 + 7]
    assert_same(windows[0], make(task)[0])
    assert_same(windows[2**61 + 7], later)
    assert len(windows) == windows.per_epoch == 2**62
    rows = {windows[index]["tokens"].tobytes() for index in range(100)}
    assert len(rows) == 100
    assert windows[1]["tokens"].tobytes() not in {make(task, seed=1)[index]["tokens"].tobytes() for index in range(100)}


def test_windows_stay_what_they_are_through_upgrades():
    tokens = [make(task)[1]["tokens"][:12].tolist() for task in (MQAR, COPYING, INDUCTION)]
    assert tokens == [
        [11, 34, 8, 31, 5, 28, 8, 26, 5, 25, 11, 36],
        [35, 9, 23, 18, 36, 9, 23, 35, 24, 11, 30, 36],
        [9, 7, 8, 24, 17, 9, 29, 34, 4, 12, 26, 12],
    ]


@TASKS
def test_held_out_windows_are_others_than_all_that_are_trained_on(task):
    windows = make(task, vocab_size=64)
    held_out = windows.held_out(100)
    assert {array.shape for array in held_out.values()} == {(100, 24)}
    assert_same(held_out, make(task, vocab_size=64).held_out(100))
    trained = {windows[index]["tokens"].tobytes() for index in range(1000)}
    rows = {row.tobytes() for row in held_out["tokens"]}
    assert len(rows) == 100
    assert not rows & trained


@TASKS
def test_identity_tells_streams_apart(task):
    identity = make(task).identity()
    assert json.loads(json.dumps(identity)) == identity == make(task).identity()
    others = [
        make(task, vocab_size=38),
        make(task, context=26),
        make(task, seed=6),
        make(dataclasses.replace(task, pairs=2)),
    ]
    assert all(other.identity() != identity for other in others)


def test_training_reads_them_as_it_reads_text():
    windows = make(MQAR)
    with TrainData(windows, 4).iterator(start_step=2) as batches:
        batch = next(batches)
    for row in range(4):
        assert_same({name: array[row] for name, array in batch.items()}, windows[8 + row])


@pytest.mark.parametrize(
    ("task", "vocab_size", "context", "message"),
    [
        (RecallConfig("mqar", pairs=0), 64, 32, r"data\.recall\.pairs: expected at least 1, got 0"),
        (RecallConfig("mqar", power=0.0), 64, 32, r"data\.recall\.power: expected 0 < power <= 1 .*got 0\.0"),
        (
            RecallConfig("mqar", pairs=8),
            64,
            30,
            r"data\.context: .*pairs = 8 needs an even number of at least 32.*got 30",
        ),
        (RecallConfig("mqar", pairs=8), 64, 33, r"data\.context: .*even number .*got 33"),
        (RecallConfig("mqar", pairs=8), 17, 32, r"model\.vocab_size: .*expected at least 18, got 17"),
        (RecallConfig("copying", copy_length=0), 64, 32, r"data\.recall\.copy_length: expected at least 1, got 0"),
        (RecallConfig("copying", copy_length=16), 64, 32, r"data\.context: .*copy_length = 16 .*at least 33, got 32"),
        (RecallConfig("copying", copy_length=4), 3, 32, r"model\.vocab_size: copying .*at least 4, got 3"),
        (RecallConfig("induction"), 16, 2, r"data\.context: induction .*at least 3 tokens, got 2"),
        (RecallConfig("induction"), 2, 16, r"model\.vocab_size: induction .*at least 3, got 2"),
        (RecallConfig(None), 16, 16, r"data\.recall\.task: expected mqar, copying or induction, got None"),
    ],
)
def test_impossible_settings_are_refused(task, vocab_size, context, message):
    with pytest.raises(UserError, match=message) as caught:
        RecallWindows(task, vocab_size, context, 0)
    assert "\n" not in str(caught.value)


def test_the_smallest_settings_are_possible():
    for task, vocab_size, context in (
        (RecallConfig("mqar", pairs=8), 18, 32),
        (RecallConfig("copying", copy_length=16), 4, 33),
        (RecallConfig("induction"), 3, 3),
    ):
        assert RecallWindows(task, vocab_size, context, 0)[0]["weights"].sum() >= 1
    with pytest.raises(UserError, match=r"seed: expected 0 <= seed < 2\^64, got 18446744073709551616"):
        make(MQAR, seed=2**64)
