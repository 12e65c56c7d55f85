"""Folders of images that do not fit memory: the same images, order and batches, and what is broken on the way."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.data import image_folder, images, pipeline
from train.data.image_rows import ImageWindows, load_images
from train.data.images import read_images, split_by_class
from train.data.packing import eval_batches
from train.data.pipeline import TrainData
from train.errors import UserError
from train.image_config import AugmentConfig
from train.loop import task_of
from train.recipes import digits_nat

SIZE = (5, 7)
EVERYTHING = AugmentConfig(crop=1, flip=True, operations=2, mixup=0.4)
PLAIN = AugmentConfig()


@pytest.fixture
def root(tmp_path):
    """113 images of two classes, one of them three times."""
    rng = np.random.default_rng(0)
    for name, count in (("ape", 61), ("bee", 52)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (9, 13, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / ("deep" if index % 3 else ".") / f"{index:03}.png")
    for copy in ("a.png", "z.png"):
        (tmp_path / "ape" / copy).write_bytes((tmp_path / "ape" / "003.png").read_bytes())
    return tmp_path


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(image_folder, "IN_MEMORY", 115 * 5 * 7 * 3 - 1)


def config(root: Any, augment: AugmentConfig = EVERYTHING) -> Any:
    made = digits_nat.config()
    model = dataclasses.replace(made.model, num_classes=2, in_channels=3)
    data = dataclasses.replace(made.data, source=str(root), size=SIZE, augment=augment)
    return dataclasses.replace(made, model=model, data=data, seed=3)


def spoil(path: Any) -> None:
    path.write_bytes(path.read_bytes()[:70])


def assert_same(one: Any, two: Any) -> None:
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_what_is_on_disk_is_what_would_be_in_memory(root, monkeypatch):
    whole = read_images(str(root), SIZE, 3)
    assert isinstance(whole.images, np.ndarray)
    monkeypatch.setattr(image_folder, "IN_MEMORY", whole.images.size)
    assert isinstance(read_images(str(root), SIZE, 3).images, np.ndarray)
    monkeypatch.setattr(image_folder, "IN_MEMORY", whole.images.size - 1)
    found = read_images(str(root), SIZE, 3)
    assert isinstance(found.images, image_folder.FolderImages)
    assert (found.images.shape, found.classes) == (whole.images.shape, whole.classes)
    np.testing.assert_array_equal(found.labels, whole.labels)
    np.testing.assert_array_equal(np.stack([found.images[i] for i in range(115)]), whole.images)
    np.testing.assert_array_equal(found[np.array([7, 3])].images[1], whole.images[3])
    assert found.digest() == read_images(str(root), SIZE, 3).digest()
    monkeypatch.setattr(image_folder, "IN_MEMORY", 0)
    assert found.digest() != read_images(str(root), SIZE, 1).digest()


def test_folds_hold_every_image_out_once_and_copies_together(root, no_memory):
    found = read_images(str(root), SIZE, 3)
    held_out = []
    for fold in range(5):
        training, out = split_by_class(found, 0.2, fold)
        sides = [{side.images[i].tobytes() for i in range(len(side))} for side in (training, out)]
        assert not sides[0] & sides[1]
        assert all(abs(n - m / 5) < 4 for n, m in zip(np.bincount(out.labels), (63, 52), strict=True))
        held_out += [out.images[i].tobytes() for i in range(len(out))]
    assert sorted(held_out) == sorted(found.images[i].tobytes() for i in range(115))


def test_a_run_goes_on_in_the_middle_of_an_epoch_with_the_same_batches(root, no_memory):
    """Nothing is carried over but the state: the data is loaded anew, as after a kill."""
    data = TrainData(load_images(config(root)).windows, 6)
    assert 1 < data.steps_per_epoch < 20
    with data.iterator() as batches:
        for _ in range(5):
            next(batches)
        state = batches.get_state()
        after = [next(batches) for _ in range(13)]  # into the next epoch
    with TrainData(load_images(config(root)).windows, 6).iterator() as batches:
        batches.set_state(state)
        for batch in after:
            assert_same(next(batches), batch)


def test_an_epoch_has_every_image_once_shared_by_two_processes(root, no_memory):
    loaded = load_images(config(root, PLAIN))
    steps = len(loaded.training) // 6
    seen: list[list[bytes]] = []
    for process in range(2):
        with TrainData(loaded.windows, 6, process, 2).iterator() as batches:
            rows = [image for _ in range(steps) for image in next(batches)["images"]]
        seen.append([image.tobytes() for image in rows])
    every = [loaded.normalisation(loaded.training.images[i] / np.float32(255)) for i in range(len(loaded.training))]
    assert len(seen[0]) == len(seen[1]) == 3 * steps
    remaining = [image.tobytes() for image in every]
    for image in seen[0] + seen[1]:
        remaining.remove(image)  # fails for what came before
    assert len(remaining) == len(every) % 6


def test_a_broken_file_is_named_once_and_the_next_one_stands_in(root, no_memory, capsys):
    whole = load_images(config(root, PLAIN))
    training = whole.training
    broken = np.flatnonzero(training.labels == 0)[-1]  # so that the next one has another label
    name = training.images._files[broken]
    rows = [whole.windows[i] for i in range(len(training))]
    place = next(i for i in range(len(rows)) if np.array_equal(rows[i]["images"], whole.normalisation(
        training.images[int(broken)] / np.float32(255))))  # fmt: skip
    successor = next(i for i in range(len(rows)) if np.array_equal(rows[i]["images"], whole.normalisation(
        training.images[int(broken) + 1] / np.float32(255))))  # fmt: skip
    assert rows[place]["targets"].tolist() == [1, 0]
    assert whole.described.endswith("held out, read from disk as they are wanted")
    spoil(root / name)
    capsys.readouterr()
    with TrainData(whole.windows, 2).iterator() as batches:
        read = [next(batches) for _ in range(len(rows))]  # two epochs
    assert_same({key: array[place % 2] for key, array in read[place // 2].items()}, rows[successor])
    for i in {*range(len(rows))} - {place}:
        assert_same({key: array[i % 2] for key, array in read[i // 2].items()}, rows[i])
    assert capsys.readouterr().err == f"{root}: {name} is no readable image, left out (1 of 115 files so far)\n"
    assert list(training.skipped) == list(whole.held_out.skipped) == [name]
    assert "1 files skipped" in whole.described


def test_a_broken_file_that_is_held_out_is_not_scored(root, no_memory):
    loaded = load_images(config(root))
    spoil(root / loaded.held_out.images._files[4])
    weights = np.concatenate([batch["weights"] for batch in eval_batches(loaded.evaluation["held_out"], 8)])
    assert weights.tolist() == [float(i != 4 and i < len(loaded.held_out)) for i in range(len(weights))]


def test_too_many_broken_files_stop_the_run(root, no_memory):
    loaded = load_images(config(root, PLAIN))
    names = sorted(loaded.training.images._files[5:7])
    for name in names:
        spoil(root / name)
    message = (
        rf"^{root}: 2 of 115 files are no readable images \({names[0]}, {names[1]}\), more than 1%; repair or remo"
    )
    with TrainData(loaded.windows, 2).iterator() as batches, pytest.raises(UserError, match=message):
        collections.deque(itertools.islice(batches, 60), maxlen=0)


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_file_that_is_gone_is_not_replaced_in_silence(root, no_memory, monkeypatch, when):
    loaded = load_images(config(root, PLAIN))
    name = loaded.training.images._files[0]
    if when == "before":
        listing = image_folder.list_folder(root)
        (root / name).unlink()
        monkeypatch.setattr(image_folder, "list_folder", lambda root: listing)
        with pytest.raises(
            UserError, match=rf"{name}: cannot be read \(No such file or directory\); repair or remove it"
        ):
            load_images(config(root))
        return
    (root / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(No such file or directory\)"):
        _ = [loaded.windows[i] for i in range(len(loaded.training))]


def test_few_decoded_images_are_alive_at_once(root, no_memory, monkeypatch):
    """Of two threads the rows of one batch and an image each, and as many batches as are read ahead, however long one
    waits for them.
    """
    loaded = load_images(config(root, PLAIN))
    size = sum(array.nbytes for array in loaded.windows[0].values())
    monkeypatch.setattr(pipeline, "READ_AHEAD_BYTES", 3 * 4 * size)
    monkeypatch.setattr(pipeline, "READ_THREADS", 2)
    alive, most, made, lock = 0, 0, 0, threading.Lock()

    def gone() -> None:
        nonlocal alive
        with lock:
            alive -= 1

    def counted(image: Any) -> Any:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        weakref.finalize(image, gone)
        return image

    def counted_row(windows: Any, index: int, read: Any = ImageWindows.__getitem__) -> Any:
        nonlocal made
        row = read(windows, index)
        counted(row["images"])
        with lock:
            made += 1
        return row

    decode = image_folder.decoded
    monkeypatch.setattr(image_folder, "decoded", lambda *args: counted(decode(*args)))
    monkeypatch.setattr(ImageWindows, "__getitem__", counted_row)
    with TrainData(loaded.windows, 4).iterator() as batches:
        for _ in range(3):
            next(batches)
        ahead, deadline = 1 + 4 * (3 + 3), time.monotonic() + 20  # a row was made to see how large they are
        while made < ahead and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert made == ahead
        for _ in range(60):  # more than two epochs
            next(batches)
    assert 4 <= most <= 2 * (4 + 1)


def test_mean_and_deviation_are_of_a_fixed_sample(root, no_memory, monkeypatch):
    training = load_images(config(root)).training
    pixels = np.stack([training.images[i] for i in range(len(training))]) / 255
    found = load_images(config(root)).normalisation  # more are wanted than there are
    np.testing.assert_allclose(found.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.deviation, pixels.std((0, 1, 2)), rtol=1e-12)
    monkeypatch.setattr(images, "SAMPLE", 31)
    sample = training.sample()
    assert len(sample) == 31
    assert len({image.tobytes() for image in sample}) >= 29  # one is there three times
    np.testing.assert_array_equal(sample, training.sample())
    found = load_images(config(root)).normalisation
    np.testing.assert_allclose(found.mean, sample.mean((0, 1, 2)) / 255, rtol=1e-12)


def test_long_looks_at_a_folder_are_told(root, no_memory, monkeypatch, capsys):
    monkeypatch.setattr(image_folder, "SAY_SECONDS", 0.0)
    load_images(config(root))
    said = capsys.readouterr().err.splitlines()
    assert f"{root}: classes listed: 1 of 2" in said
    assert f"{root}: files looked at: 77 of 115" in said
    assert any(line.startswith("images sampled for their mean and deviation: 50 of ") for line in said)
    monkeypatch.setattr(image_folder, "IN_MEMORY", 2**30)
    read_images(str(root), SIZE, 3)
    assert f"{root}: files read: 9 of 115" in capsys.readouterr().err.splitlines()


def test_no_yardstick_needs_all_pixels(root, no_memory):
    task = task_of(config(root))
    assert task.finish(root, None, task.load(root), 0, print) == {"baselines": {}}
