"""Images with their classes: where they are found, and the split that holds some of each class out.

The held-out part is a function of the set of contents alone: order the distinct images of a class by their hash; fold f
of a fraction h is those from place round(f h n) to round((f + 1) h n) of n. Hence neither names nor the order of files
matter, and two copies of an image in one class are always on the same side. The hash is that of the pixels, or of
images that stay on disk their marks (`train.data.image_folder`).

A byte for each channel of a pixel is held in memory (four where the source has floats), and of a folder that is larger
than `image_folder.IN_MEMORY` nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from train.data import image_folder
from train.data.image_folder import FolderImages, load_pillow, mode_of
from train.data.packing import permutation
from train.errors import UserError

BANDS = ("top", "middle", "bottom")
"""The regions of a photograph that are classes of "photos"."""
PATCH = 32
SAMPLE = 1024
"""Images that stand for all of a folder that stays on disk, where their statistics are wanted."""


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """All images of a source.

    Attributes:
      images: uint8, or float32 in [0, 1]; or on disk, where an image may turn out to be `None`.
      labels: indices into `classes`.
      skipped: files that are no readable images; of images on disk, those found so far.
    """

    images: Shaped[np.ndarray, "N H W C"] | FolderImages
    labels: Int64[np.ndarray, " N"]
    classes: tuple[str, ...]
    skipped: Collection[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: Any) -> LabelledImages:
        """Some of them."""
        return dataclasses.replace(self, images=self.images[which], labels=self.labels[which])

    def readable(self, which: int) -> tuple[Shaped[np.ndarray, "H W C"], int]:
        """An image and its place: `which`, or in place of an unreadable file the next one that is readable."""
        image = self.images[which]
        while image is None:  # not for ever: too many of them are an error
            which = (which + 1) % len(self)
            image = self.images[which]
        return image, which

    def sample(self) -> Shaped[np.ndarray, "n H W C"]:
        """All images, or on disk the readable ones of `SAMPLE`, always the same."""
        if isinstance(self.images, np.ndarray):
            return self.images
        chosen = permutation(len(self), 0)[:SAMPLE].tolist()
        read = image_folder.in_threads(self.images.__getitem__, chosen)
        images = image_folder.told(read, len(chosen), "images sampled for their mean and deviation")
        return np.stack([image for image in images if image is not None])

    def digest(self) -> str:
        """Of contents and classes, in their order."""
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=16)
        if isinstance(self.images, FolderImages):
            digest.update(self.images.digest())
        else:
            digest.update(np.ascontiguousarray(self.images).view(np.uint8))
        digest.update("\0".join(self.classes).encode())
        return digest.hexdigest()


def read_images(source: str, size: tuple[int, int], channels: int) -> LabelledImages:
    """All images that `source` names (see `train.image_config.ImageDataConfig`), in a fixed order.

    Args:
      size: height and width that they get.
      channels: 1 for grey, 3 for colour; files are converted, arrays must have as many.

    Raises:
      UserError: nothing is there, a class without images, too many files that are no images, or arrays that are not
        what is described there; the message names the file and the fix.
    """
    if source == "digits":
        found = _digits()
    elif source == "photos":
        found = _photos(channels)
    elif source.endswith(".npz"):
        found = _arrays(Path(source).expanduser())
    else:
        found = _folder(Path(source).expanduser(), size, channels)
    if found.images.shape[-1] != channels:
        raise UserError(
            f"model.in_channels: the images of {source} have {found.images.shape[-1]} channels, got {channels}; add "
            f"--model.in-channels {found.images.shape[-1]}"
        )
    if isinstance(found.images, FolderImages) or found.images.shape[1:3] == size:
        return found
    return dataclasses.replace(found, images=np.stack([_resized(image, size) for image in found.images]))


def split_by_class(found: LabelledImages, holdout: float, fold: int) -> tuple[LabelledImages, LabelledImages]:
    """The (training, held-out) images, each in the order of `found`; at least one distinct image of a class on each.

    Raises:
      UserError: a class has too few distinct images.
    """
    held_out = np.zeros(len(found), bool)
    if isinstance(found.images, FolderImages):
        contents = list(found.images.marks)
    else:
        contents = [hashlib.blake2b(np.ascontiguousarray(image).tobytes()).digest() for image in found.images]
    for label, name in enumerate(found.classes):
        own = np.flatnonzero(found.labels == label).tolist()
        distinct = sorted({contents[index] for index in own})
        first, last = (round((fold + step) * holdout * len(distinct)) for step in (0, 1))
        chosen = set(distinct[first:last])
        if not 0 < len(chosen) < len(distinct):
            raise UserError(
                f"data.holdout: class {name} has {len(distinct)} different images, of which fold {fold} of "
                f"{holdout} is {len(chosen)}; both sides need one, so add images or change data.holdout"
            )
        held_out[own] = [contents[index] in chosen for index in own]
    return found[~held_out], found[held_out]


def _digits() -> LabelledImages:
    """The 8 x 8 scans of ten digits by 43 people, test part of the UCI set (Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    return LabelledImages(images, digits.target.astype(np.int64), tuple(map(str, digits.target_names)))


def _photos(channels: int) -> LabelledImages:
    """Pieces of 32 x 32 pixels that do not overlap, of two photographs; a class is a photograph's third.

    Neighbouring pieces are alike, so a figure says how well a model knows these two photographs, and no more.
    """
    from sklearn.datasets import load_sample_images

    photos = load_sample_images()
    names = [Path(name).stem for name in photos.filenames]
    images, labels = [], []
    for number, photo in enumerate(photos.images):
        pixels = np.asarray(load_pillow().fromarray(photo).convert(mode_of(channels))).reshape(*photo.shape[:2], -1)
        per_band = photo.shape[0] // PATCH // len(BANDS)
        for row in range(per_band * len(BANDS)):
            for column in range(photo.shape[1] // PATCH):
                images.append(pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH])
                labels.append(len(BANDS) * number + row // per_band)
    classes = tuple(f"{name} {band}" for name in names for band in BANDS)
    return LabelledImages(np.stack(images), np.array(labels, np.int64), classes)


def _arrays(path: Path) -> LabelledImages:
    """`images` [N, H, W] or [N, H, W, C] of integers 0 .. 255 or floats in [0, 1], and `labels` [N] of any kind."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"images", "labels"} - {*file.files}
            if missing:
                raise UserError(
                    f"{path}: has no array {', '.join(sorted(missing))}; expected images and labels, found "
                    f"{', '.join(file.files) or 'none'}"
                )
            images, labels = file["images"], file["labels"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --data.source names digits, photos, a folder or an .npz") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is no readable .npz file of numbers ({error}); write it with numpy.savez") from error
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or labels.shape != images.shape[:1] or not images.size:
        raise UserError(
            f"{path}: expected images [N, H, W] or [N, H, W, C] and labels [N], got {images.shape} and {labels.shape}"
        )
    whole = np.issubdtype(images.dtype, np.integer)
    most = 255 if whole else 1
    if not whole and not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{path}: expected images of integers or floats, got {images.dtype}")
    if not (images.min() >= 0 and images.max() <= most):
        raise UserError(
            f"{path}: expected {'integers' if whole else 'floats'} from 0 to {most} in images, got "
            f"{images.min()} to {images.max()}"
        )
    names, indices = np.unique(labels, return_inverse=True)
    return LabelledImages(
        images.astype(np.uint8 if whole else np.float32), indices.astype(np.int64), tuple(map(str, names.tolist()))
    )


def _folder(root: Path, size: tuple[int, int], channels: int) -> LabelledImages:
    listing = image_folder.list_folder(root)
    files, total = listing.files, len(listing.files)
    if total * size[0] * size[1] * channels > image_folder.IN_MEMORY:
        on_disk = image_folder.on_disk(listing, size, channels)
        return LabelledImages(on_disk, listing.labels, listing.classes, on_disk.unreadable)
    decode = image_folder.in_threads(lambda name: image_folder.decoded(root / name, size, channels), files)
    read = list(image_folder.told(decode, total, f"{root}: files read"))
    whole = np.array([image is not None for image in read])
    for label, name in enumerate(listing.classes):
        if not whole[listing.labels == label].any():
            count = np.count_nonzero(listing.labels == label)
            raise UserError(f"{root / name}: none of its {count} files is a readable image; replace them")
    skipped = tuple(name for name, image in zip(files, read, strict=True) if image is None)
    if skipped:
        image_folder.say(f"{image_folder.check_skipped(root, skipped, total)}; they are skipped")
    images = [image for image in read if image is not None]
    return LabelledImages(np.stack(images), listing.labels[whole], listing.classes, skipped)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w, C] as [H, W, C] of the same dtype, cut to the new shape at the middle."""
    from PIL import ImageOps

    pillow = load_pillow()
    fit: Callable[[Any], np.ndarray] = lambda one: np.asarray(  # noqa: E731
        ImageOps.fit(pillow.fromarray(one), size[::-1], pillow.Resampling.BILINEAR)
    )
    return np.stack([fit(np.ascontiguousarray(image[..., channel])) for channel in range(image.shape[-1])], -1)
