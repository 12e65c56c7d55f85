"""Documents, packing and batches: what is read, what is refused, and that a batch is a function of (seed, step)."""

from __future__ import annotations

import collections
import itertools
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.packing import PackedWindows, eval_batches, eval_windows, permutation
from train.data.pipeline import TrainData
from train.data.sources import embedded, read_documents, split_by_document
from train.errors import UserError

FIELDS = ("tokens", "targets", "segment_ids", "positions", "weights")


def make_documents(count: int = 11, seed: int = 0) -> tuple[bytes, ...]:
    """Documents whose bytes are all different from the neighbours' (document d uses byte values of its own)."""
    lengths = np.random.default_rng(seed).integers(1, 40, count)
    return tuple(bytes((10 * d + i % 10) % 256 for i in range(n)) for d, n in enumerate(lengths))


def assert_same(a, b):
    assert sorted(a) == sorted(FIELDS)
    for name in FIELDS:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# Sources


def test_embedded_text_is_in_every_python():
    pairs = embedded()
    assert [name for name, _ in pairs] == sorted(name for name, _ in pairs)
    assert sum(len(text) for _, text in pairs) > 400_000
    assert read_documents("pydoc") == tuple(text for _, text in pairs)


def test_folder_is_walked_in_order_and_takes_text_only(tmp_path):
    for name in ("b.md", "a.txt", "sub/c.PY", "sub/.hidden.txt", ".git/d.txt", "image.png", "e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n\n" if name == "e.jsonl" else name)
    wanted = (b"a.txt", b"b.md", b"e.jsonl", b"sub/c.PY")
    assert read_documents(str(tmp_path)) == wanted
    assert read_documents(str(tmp_path / "**" / "*.[tmP]*")) == (b"a.txt", b"b.md", b"sub/c.PY")
    assert read_documents(str(tmp_path / "image.png")) == (b"image.png",)
    # A file that two entries name is one document.
    assert read_documents((str(tmp_path / "b.md"), str(tmp_path))) == (b"b.md", b"a.txt", b"e.jsonl", b"sub/c.PY")


def test_jsonl_keeps_unusual_line_separators_inside_a_document(tmp_path):
    text = "one\u2028still one\x85"
    path = tmp_path / "x.jsonl"
    path.write_text(
        json.dumps({"body": text}, ensure_ascii=False) + "\n" + json.dumps({"body": "two"}), encoding="utf-8"
    )
    assert read_documents(str(path), field="body") == (text.encode(), b"two")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: the file is empty; remove it"),
        ("a.txt", b" \n\t\n", r"a\.txt: the file is empty"),
        ("a.txt", b"good \xff bad", r"a\.txt: byte 5 \(0xff\) is not UTF-8; convert"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text" "y"}\n',
            r"a\.jsonl, line 2: is not JSON .*column 9.*one JSON object per line",
        ),
        ("a.jsonl", b'{"title": "x", "body": "y"}\n', r"line 1: has no field 'text' \(its fields: 'title', 'body'\)"),
        ("a.jsonl", b'\n["text"]\n', r"line 2: expected a JSON object with field 'text', got a list"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: field 'text' holds a int; a string is wanted"),
        ("a.jsonl", b'{"text": ""}\n', r"line 1: field 'text' is empty; remove the line"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: field 'text' holds half a surrogate pair"),
        ("a.png", b"x", r"the folder holds no file ending in \.txt, .*glob"),
    ],
)
def test_bad_input_is_one_line_naming_file_line_and_fix(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_documents(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("nowhere/*.txt", "nowhere/.*no such file"), ((), "no data is named"), (("pydoc", "x.txt"), "write ./pydoc")],
)
def test_data_that_does_not_exist(spec, message):
    with pytest.raises(UserError, match=message):
        read_documents(spec)


@given(st.lists(st.binary(min_size=1, max_size=3), min_size=2, max_size=20), st.floats(0.01, 0.99), st.randoms())
@settings(max_examples=100, derandomize=True, deadline=None)
def test_split_is_by_content_whatever_the_order(documents, holdout, random):
    if len(set(documents)) < 2:
        documents.append(documents[0] + b"!")
    train, held = split_by_document(documents, holdout)
    assert train
    assert held
    assert not set(train) & set(held)
    assert collections.Counter(train + held) == collections.Counter(documents)
    shuffled = random.sample(documents, len(documents))
    assert [set(side) for side in split_by_document(shuffled, holdout)] == [set(train), set(held)]
    count = len(set(documents))
    assert len(set(held)) == min(int(np.ceil(holdout * count)), count - 1)


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(UserError, match=r"1 distinct document cannot be split.*give more files"):
        split_by_document([b"same", b"same"])
    with pytest.raises(UserError, match=r"holdout: expected a fraction between 0 and 1, got 1"):
        split_by_document([b"a", b"b"], 1)


# Packing


def reference_window(documents, context, seed, index):
    """The definition, naively: permute, concatenate, cut, walk through token by token."""
    total = sum(map(len, documents))
    epoch, k = divmod(index, (total - 1) // context)
    stream = [
        (d, i, documents[d][i]) for d in permutation(len(documents), seed, epoch, 0) for i in range(len(documents[d]))
    ]
    start = permutation((total - 1) // context, seed, epoch, 1)[k] * context
    window = stream[start : start + context + 1]
    rows, segment, position = [], 1, 0
    for (d, _, token), (target_d, _, target) in itertools.pairwise(window):
        rows.append((token, target, segment, position, float(d == target_d)))
        segment, position = (segment, position + 1) if d == target_d else (segment + 1, 0)
    return {name: np.array(column) for name, column in zip(FIELDS, zip(*rows, strict=True), strict=True)}


def test_windows_are_what_the_definition_says():
    documents = make_documents()
    windows = PackedWindows(documents, 13, seed=3)
    for index in (*range(2 * windows.per_epoch + 1), 10**12):
        got, wanted = windows[index], reference_window(documents, 13, 3, index)
        for name in FIELDS:
            assert got[name].dtype == (np.float32 if name == "weights" else np.int32)
            np.testing.assert_array_equal(got[name], wanted[name], err_msg=f"{name} of window {index}")


def test_every_token_is_a_target_once_per_epoch():
    documents = tuple(bytes([d]) * n for d, n in enumerate((5, 1, 7, 19, 2, 3)))  # 37 tokens
    windows = PackedWindows(documents, 6, seed=0)
    assert windows.per_epoch == 6  # 36 targets, no tail
    for epoch in range(3):
        batch = [windows[epoch * 6 + k] for k in range(6)]
        targets = collections.Counter(int(t) for w in batch for t in w["targets"])
        first = next(d for d in range(len(documents)) if targets[d] != len(documents[d]))
        # The one token that is no target is the very first of the epoch.
        assert targets == collections.Counter({d: len(x) - (d == first) for d, x in enumerate(documents)})
        weighted = collections.Counter(int(t) for w in batch for t in w["targets"][w["weights"] > 0])
        assert weighted == collections.Counter({d: len(x) - 1 for d, x in enumerate(documents) if len(x) > 1})


def test_epochs_and_seeds_differ_and_windows_are_shuffled():
    documents = make_documents()
    windows = PackedWindows(documents, 13, seed=3)
    epochs = [
        np.stack([windows[e * windows.per_epoch + k]["tokens"] for k in range(windows.per_epoch)]) for e in (0, 1)
    ]
    assert not np.array_equal(epochs[0], epochs[1])
    other = PackedWindows(documents, 13, seed=4)
    assert not np.array_equal(epochs[0], np.stack([other[k]["tokens"] for k in range(other.per_epoch)]))
    assert sorted(permutation(101, 1, 2)) == list(range(101))
    assert not np.array_equal(permutation(101, 1, 2), np.arange(101))


def test_permutation_never_changes():
    # Written down once: a run that is resumed after an upgrade of NumPy must find the same order.
    assert permutation(7, 1, 2, 0).tolist() == [1, 3, 0, 4, 2, 6, 5]


def test_text_shorter_than_a_context_is_refused():
    PackedWindows((b"123", b"4567"), 6, seed=0)
    with pytest.raises(UserError, match=r"7 tokens, and one context of 7 needs 8; give more text or choose a shorter"):
        PackedWindows((b"123", b"4567"), 7, seed=0)


def stacked(windows):
    rows = list(windows)
    return {name: np.stack([row[name] for row in rows]) for name in FIELDS}


def test_evaluation_scores_every_byte_but_the_first_once():
    documents = (*make_documents(), b"x", b"0123456789abc" * 2 + b"!")  # the last: exactly two windows of 13
    windows = stacked(eval_windows(documents, 13))
    scored = [
        (segment, target)
        for segment, target in zip(windows["weights"].ravel(), windows["targets"].ravel(), strict=True)
        if segment
    ]
    assert bytes(int(t) for _, t in scored) == b"".join(d[1:] for d in documents)
    padding = windows["segment_ids"] == 0
    assert padding.any()
    for name in FIELDS:
        assert not windows[name][padding].any()
    rows = windows["weights"].sum(1)
    assert rows.min() >= 1
    assert len(rows) == sum(-(-(len(d) - 1) // 13) for d in documents)
    for row, n in enumerate(rows.astype(int)):
        np.testing.assert_array_equal(windows["positions"][row, :n], np.arange(n))
        np.testing.assert_array_equal(windows["tokens"][row, 1:n], windows["targets"][row, : n - 1])
    with pytest.raises(UserError, match="no token to score"):
        eval_windows((b"x",), 13)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_batches_cover_the_windows(processes):
    documents = make_documents()
    made = eval_windows(documents, 7)
    windows = stacked(made)
    parts = [list(eval_batches(made, 6, process_index=p, process_count=processes)) for p in range(processes)]
    whole = {n: np.concatenate([b[n] for step in zip(*parts, strict=True) for b in step]) for n in FIELDS}
    count = len(windows["tokens"])
    assert len(whole["tokens"]) == -(-count // 6) * 6 > count
    assert_same({n: x[:count] for n, x in whole.items()}, windows)
    for name in FIELDS:
        assert not whole[name][count:].any()


# Pipeline


def stream(documents, context, global_batch, seed=0, process_index=0, process_count=1) -> TrainData:
    return TrainData(PackedWindows(documents, context, seed), global_batch, process_index, process_count)


def read(data: TrainData, steps: int, start: int = 0):
    with data.iterator(start) as batches:
        return [next(batches) for _ in range(steps)]


def test_batches_are_consecutive_windows():
    data = stream(make_documents(), context=13, global_batch=6, seed=3)
    for step, batch in enumerate(read(data, 5)):
        rows = [data.windows[step * 6 + row] for row in range(6)]
        assert_same(batch, {name: np.stack([row[name] for row in rows]) for name in FIELDS})


def test_same_global_batch_on_any_number_of_processes():
    documents = make_documents()
    whole = read(stream(documents, 13, 6, seed=3), 5)
    for processes in (2, 3):
        parts = [read(stream(documents, 13, 6, 3, p, processes), 5) for p in range(processes)]
        for step, batch in enumerate(whole):
            assert_same(batch, {n: np.concatenate([part[step][n] for part in parts]) for n in FIELDS})
    with pytest.raises(UserError, match=r"a global batch of 6 rows cannot be shared by 4 processes"):
        stream(documents, 13, 6, 3, 0, 4)
    with pytest.raises(ValueError, match="process_index: expected less than process_count = 2, got 2"):
        stream(documents, 13, 6, 3, 2, 2)


def test_resume_is_exact_and_its_state_is_the_step():
    documents = make_documents()
    data = stream(documents, context=13, global_batch=6, seed=3)
    batches = read(data, 9)
    with data.iterator() as running:
        for _ in range(4):
            next(running)
        state = json.loads(json.dumps(running.get_state()))
        assert state["step"] == 4
        next(running)
        with stream(documents, 13, 6, 3, 1, 2).iterator() as elastic:
            elastic.set_state(state)
            second_half = [next(elastic) for _ in range(5)]
        running.set_state(state)  # back, past what is already read ahead
        for wanted, half in zip(batches[4:], second_half, strict=True):
            assert_same(next(running), wanted)
            assert_same(half, {name: array[3:] for name, array in wanted.items()})
    for wanted, got in zip(batches[4:], read(data, 5, start=4), strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"global_batch": 3}, "global_batch was 6, is 3"),
        ({"context": 11}, "context was 13, is 11"),
        ({"documents": make_documents()[::-1]}, "documents was"),
        ({"documents": make_documents(12)}, "documents was"),
    ],
)
def test_state_of_another_stream_is_refused(changed, message):
    settings = {"documents": make_documents(), "context": 13, "global_batch": 6, "seed": 3}
    with stream(**settings).iterator() as batches:
        state = batches.get_state()
    with stream(**(settings | changed)).iterator() as batches, pytest.raises(UserError, match=message):
        batches.set_state(state)


def test_resume_at_step_100_000_takes_less_than_a_second():
    data = stream(read_documents("pydoc"), context=512, global_batch=2, seed=1)
    read(data, 1)  # imports
    start = time.perf_counter()
    batch = read(stream(read_documents("pydoc"), context=512, global_batch=2, seed=1), 1, start=100_000)[0]
    assert time.perf_counter() - start < 1
    assert_same(batch, {n: np.stack([data.windows[200_000 + row][n] for row in (0, 1)]) for n in FIELDS})


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    data = stream(make_documents(), context=13, global_batch=6)
    batches = data.iterator()
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    batches.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
    with pytest.raises(ValueError, match="closed"):
        next(batches)
