"""Images: sources, split, augmentation and training rows, each a function of contents, seed and index."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import shift

from train.data import augment as augmentation
from train.data.augment import Draws
from train.data.image_rows import ImageWindows, Normalisation, as_float, load_images
from train.data.images import LabelledImages, read_images, split_by_class
from train.data.pipeline import TrainData
from train.errors import UserError
from train.image_config import AugmentConfig
from train.recipes import digits_nat

EVERYTHING = AugmentConfig(crop=1, flip=True, operations=3, magnitude=0.7, mixup=0.4, cutmix=1.0)


def write_folder(root, counts, size=(7, 11), seed=0):
    """A folder of classes with so many random images each."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:03}.png")
    return root


def some(counts=(13, 17), size=(5, 7, 3)):
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.random.default_rng(1).random((len(labels), *size)).astype(np.float32)
    return LabelledImages(images, labels, tuple("ab"[: len(counts)]))


def windows(settings=EVERYTHING, seed=3):
    config = digits_nat.config()
    config = dataclasses.replace(config, seed=seed, data=dataclasses.replace(config.data, augment=settings))
    return load_images(config).windows


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


# Sources


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    found = read_images("digits", (8, 8), 1)
    assert found.images.shape == (1797, 8, 8, 1)
    np.testing.assert_allclose(found.images[..., 0] * 16, load_digits().images, atol=1e-6)
    np.testing.assert_array_equal(found.labels, load_digits().target)


@pytest.mark.parametrize("channels", [1, 3])
def test_photos_are_pieces_that_do_not_overlap(channels):
    from sklearn.datasets import load_sample_images

    found = read_images("photos", (32, 32), channels)
    assert found.images.shape == (480, 32, 32, channels)
    assert found.images.dtype == np.uint8
    assert np.bincount(found.labels).tolist() == [80] * 6
    assert found.classes[1] == "china middle"
    if channels == 3:
        china = load_sample_images().images[0]
        rows = found.images[:20].transpose(1, 0, 2, 3).reshape(32, 640, 3)
        np.testing.assert_array_equal(rows, china[:32])
        np.testing.assert_array_equal(found.images[80][:, :, 1], china[128:160, :32, 1])


def test_a_folder_of_classes(tmp_path):
    write_folder(tmp_path, {"wolf": 3, "cat": 2})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_text("no image either")
    (tmp_path / ".git").mkdir()
    found = read_images(str(tmp_path), (7, 11), 3)
    assert found.classes == ("cat", "wolf")
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_array_equal(found.images[3], np.asarray(Image.open(tmp_path / "wolf" / "001.png")))
    grey = read_images(str(tmp_path), (7, 11), 1).images
    np.testing.assert_allclose(grey[..., 0], found.images @ [0.299, 0.587, 0.114], atol=1)
    # The middle square of 7 x 7, not the whole squeezed.
    np.testing.assert_array_equal(read_images(str(tmp_path), (7, 7), 3).images, found.images[:, :, 2:9])


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64])
def test_arrays_of_any_kind(tmp_path, dtype):
    rng = np.random.default_rng(0)
    images = rng.random((5, 3, 7)) if np.issubdtype(dtype, np.floating) else rng.integers(0, 256, (5, 3, 7))
    np.savez(tmp_path / "a.npz", images=images.astype(dtype), labels=np.array(["b", "a", "b", "c", "a"]))
    found = read_images(str(tmp_path / "a.npz"), (3, 7), 1)
    assert found.classes == ("a", "b", "c")
    assert found.labels.tolist() == [1, 0, 1, 2, 0]
    np.testing.assert_allclose(found.images[..., 0], images, atol=1e-7)
    scaled = as_float(found.images)
    assert scaled.dtype == np.float32
    assert 0 <= scaled.min() < scaled.max() <= 1


def test_broken_files_are_named_and_skipped(tmp_path, capsys):
    root = write_folder(tmp_path / "few", {"a": 120, "b": 90})
    whole = read_images(str(root), (7, 11), 3)
    (root / "a" / "cut.png").write_bytes((root / "a" / "000.png").read_bytes()[:60])
    (root / "b" / "empty.jpg").write_bytes(b"")
    found = read_images(str(root), (7, 11), 3)
    assert found.skipped == ("a/cut.png", "b/empty.jpg")
    assert (
        "few: 2 of 212 files are no readable images (a/cut.png, b/empty.jpg); they are skipped"
        in capsys.readouterr().err
    )
    np.testing.assert_array_equal(found.images, whole.images)
    (root / "b" / "text.bmp").write_text("hello")
    with pytest.raises(
        UserError, match=r"3 of 213 files are no readable .*b/empty.jpg, b/text.bmp\), more than 1%; repair"
    ):
        read_images(str(root), (7, 11), 3)


def _npz(path, **arrays):
    np.savez(path / "a.npz", **arrays)
    return str(path / "a.npz")


GOOD = np.zeros((4, 3, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: str(path / "none"), r"none: no such folder; --data.source names digits, photos"),
        (lambda path: str(path / "none.npz"), r"none.npz: no such file"),
        (lambda path: str(write_folder(path / "a", {"b": 2})), "at least two classes, found 1 folders"),
        (lambda path: str(write_folder(path / "a", {"b": 2, "c": 0})), r"/c: holds no image \(.png"),
        (lambda path: _npz(path, images=GOOD), r"has no array labels; expected .* found images"),
        (lambda path: _npz(path, images=GOOD, labels=np.zeros(5)), r"got \(4, 3, 3, 1\) and \(5,\)"),
        (lambda path: _npz(path, images=GOOD - 1, labels=np.zeros(4)), "expected floats from 0 to 1 in images, got -1"),
        (lambda path: _npz(path, images=GOOD * np.nan, labels=np.zeros(4)), "got nan to nan"),
        (lambda path: _npz(path, images=GOOD.astype(int) + 256, labels=np.zeros(4)), "integers from 0 to 255 .* 256"),
        (lambda path: _npz(path, images=GOOD.astype(bool), labels=np.zeros(4)), "integers or floats, got bool"),
        (lambda path: _npz(path, images=np.zeros((4, 3, 3, 2)), labels=np.zeros(4)), "have 2 channels, got 3"),
        (lambda path: _npz(path, images=np.array([None]), labels=np.zeros(4)), "no readable .npz"),
        (lambda path: "digits", "model.in_channels: the images of digits have 1 channels, got 3; add --model.in-ch"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as caught:
        read_images(make(tmp_path), (3, 3), 3)
    assert "\n" not in str(caught.value)


# Split


def test_folds_hold_every_image_out_once_in_equal_shares():
    found = some((37, 23))
    held_out = []
    for fold in range(5):
        training, out = split_by_class(found, 0.2, fold)
        assert len(training) + len(out) == 60
        assert all(abs(n - m / 5) < 1 for n, m in zip(np.bincount(out.labels), (37, 23), strict=True))
        held_out += [image.tobytes() for image in out.images]
    assert sorted(held_out) == sorted(image.tobytes() for image in found.images)


def test_the_split_is_of_contents_and_not_of_their_order_and_copies_stay_together():
    found = some((37, 23))
    found = found[np.concatenate([np.arange(60), np.arange(60)])]
    sides = split_by_class(found, 0.2, 1)
    contents = [{image.tobytes() for image in side.images} for side in sides]
    assert not contents[0] & contents[1]
    order = np.random.default_rng(0).permutation(120)
    again = split_by_class(found[order], 0.2, 1)
    assert [{image.tobytes() for image in side.images} for side in again] == contents


def test_the_split_is_the_same_in_every_process():
    """Pinned: figures of one machine must be those of another."""
    found = read_images("digits", (8, 8), 1)
    places = {image.tobytes(): place for place, image in enumerate(found.images)}
    held_out = split_by_class(found, 0.2, 0)[1]
    assert [places[image.tobytes()] for image in held_out.images[:8]] == [2, 14, 15, 19, 21, 27, 30, 37]


def test_a_class_that_cannot_be_split_is_named():
    with pytest.raises(UserError, match=r"class a has 1 different images, of which fold 0 of 0.2 is 0"):
        split_by_class(some((1, 17)), 0.2, 0)


# Augmentation


def test_draws_are_those_of_their_key():
    """Pinned: a run must find its draws again after an upgrade."""
    draws = Draws(3, 5)
    assert [draws.below(1000) for _ in range(4)] == [739, 616, 846, 303]
    assert Draws(3, 5).uniform() != Draws(5, 3).uniform()
    values = np.array([Draws(0, index).uniform(-1, 3) for index in range(2000)])
    assert abs(values.mean() - 1) < 0.1
    assert -1 < values.min() < -0.9
    assert 2.9 < values.max() < 3
    shares = np.array([Draws(1, index).beta(0.5) for index in range(2000)])
    assert abs(shares.mean() - 0.5) < 0.03
    assert abs(shares.var() - 0.125) < 0.01  # of Beta(a, a): 1 / (4 (2 a + 1))


def test_strength_zero_changes_nothing():
    image = some().images[0]
    for name, operation in augmentation.OPERATIONS.items():
        np.testing.assert_allclose(operation(image, 0.0, Draws(0, 0)), image, atol=1e-6, err_msg=name)


def test_geometry_is_what_it_says():
    """Three times 30 degrees are a quarter turn; shifts as of scipy's own; shear keeps the middle row."""
    square = np.random.default_rng(0).random((7, 7, 2)).astype(np.float32)
    np.testing.assert_allclose(augmentation.rotate(square, 3.0, Draws(0, 0)), np.rot90(square, -1), atol=1e-5)
    image = some().images[0]
    seen = set()
    for index in range(8):
        moved = augmentation.translate(image, 0.5, Draws(0, index))
        axis = int(not np.allclose(moved, shift(image, (0.15 * 5, 0, 0), order=1, mode="grid-constant"), atol=1e-5))
        wanted = shift(image, (0.15 * 5, 0, 0) if axis == 0 else (0, 0.15 * 7, 0), order=1, mode="grid-constant")
        np.testing.assert_allclose(moved, wanted, atol=1e-5)
        seen.add(axis)
        sheared = augmentation.shear(image, 0.8, Draws(0, index))
        middle = np.s_[2] if np.allclose(sheared[2], image[2], atol=1e-5) else np.s_[:, 3]
        np.testing.assert_allclose(sheared[middle], image[middle], atol=1e-5)
        assert not np.allclose(sheared, image, atol=1e-2)
    assert seen == {0, 1}


def test_colours_and_holes():
    image = 0.5 * some().images[0]
    np.testing.assert_allclose(augmentation.brightness(image, 0.5, Draws(0, 0)), np.minimum(1.45 * image, 1), atol=1e-6)
    flatter = augmentation.contrast(image, -0.5, Draws(0, 0))
    assert flatter.std() == pytest.approx(0.55 * image.std(), rel=1e-4)
    assert flatter.mean() == pytest.approx(image.mean(), rel=1e-4)
    holed = augmentation.cutout(image, -1.0, Draws(0, 0)) != image
    assert holed.sum() == 2 * 3 * 3  # 0.4 of 5 x 7, in every channel


def test_a_crop_is_a_piece_of_the_padded_image():
    image = some().images[0]
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    pieces = {padded[a : a + 5, b : b + 7].tobytes() for a in range(5) for b in range(5)}
    cropped = [augmentation.crop(image, 2, Draws(0, index)).tobytes() for index in range(600)]
    assert set(cropped) == pieces


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_label_is_mixed_as_the_image_is(kind):
    one, other = np.zeros((5, 7, 1), np.float32), np.ones((5, 7, 1), np.float32)
    shares = []
    for index in range(300):
        mixed, share = augmentation.mix(one, other, AugmentConfig(**{kind: 1.0}), Draws(2, index))
        assert mixed.mean() == pytest.approx(1 - share, abs=1e-6)
        assert (kind == "mixup") == (len(np.unique(mixed)) == 1 and 0 < share < 1) or share in (0, 1)
        shares.append(share)
    assert abs(np.mean(shares) - 0.5) < 0.06
    np.testing.assert_array_equal(one, 0)


# Rows


def test_a_row_is_a_function_of_seed_and_index():
    first, again = windows(), windows()
    for index in (2000, 0, 7, 10**12):
        assert_same(first[index], again[index])
    assert not np.array_equal(first[7]["images"], windows(seed=4)[7]["images"])
    assert first.identity() == again.identity()
    assert first.identity() != windows(dataclasses.replace(EVERYTHING, crop=2)).identity()
    row = first[5]
    assert (row["images"].shape, row["targets"].shape, row["weights"].shape) == ((8, 8, 1), (10,), ())
    assert row["targets"].sum() == pytest.approx(1, abs=1e-6)
    assert {array.dtype for array in row.values()} == {np.dtype(np.float32)}


def test_an_image_is_changed_in_another_way_in_every_epoch():
    same = LabelledImages(np.repeat(some().images[:1], 3, 0), np.zeros(3, np.int64), ("a",))
    made = ImageWindows(same, EVERYTHING, Normalisation(np.zeros(3), np.ones(3)), seed=0)
    rows = [made[index]["images"].tobytes() for index in range(12)]
    assert len(set(rows)) == 12


def test_every_image_comes_once_in_an_epoch_in_another_order():
    data = load_images(dataclasses.replace(digits_nat.config(), data=dataclasses.replace(
        digits_nat.config().data, augment=AugmentConfig())))  # fmt: skip
    count = len(data.training)
    epochs = [[data.windows[epoch * count + k]["images"].tobytes() for k in range(count)] for epoch in (0, 1)]
    wanted = data.normalisation(data.training.images)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(image.tobytes() for image in wanted)
    assert epochs[0] != epochs[1]
    assert abs(wanted.mean()) < 1e-5
    assert wanted.std() == pytest.approx(1, abs=1e-5)


def test_batches_go_on_where_they_were_and_are_shared_by_processes():
    made = windows()
    data = TrainData(made, 6)
    with data.iterator() as batches:
        read = [next(batches) for _ in range(5)]
        state = batches.get_state()
        after = next(batches)
    with TrainData(windows(), 6).iterator() as batches:
        batches.set_state(state)
        assert_same(next(batches), after)
    for process in range(3):
        with TrainData(made, 6, process, 3).iterator() as batches:
            for whole in read:
                assert_same(next(batches), {name: x[2 * process : 2 * process + 2] for name, x in whole.items()})


def test_a_model_of_another_size_is_named():
    config = digits_nat.config()
    model = dataclasses.replace(config.model, num_classes=7)
    with pytest.raises(UserError, match=r"model.num_classes: digits has 10 classes, got 7; add --model.num-classes 10"):
        load_images(dataclasses.replace(config, model=model))
