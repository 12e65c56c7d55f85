"""From a configuration to what a run on images reads: the endless training images, and the held-out ones.

Epoch e permutes the images with a generator keyed by (seed, e); training row i is image i mod N of epoch i // N,
changed by draws keyed by (seed, i). So any row is found without its predecessors.

    x = (image - mean) / deviation of each channel, over all pixels of the training images (on disk: of a sample)
    target = one-hot class, or l one-hot + (1 - l) one-hot of the other image where two are mixed
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Shaped

from train.data.augment import Draws, augment, mix
from train.data.image_folder import FolderImages
from train.data.images import LabelledImages, read_images, split_by_class
from train.data.packing import Batch, permutation
from train.errors import UserError
from train.image_config import AugmentConfig, ImageRunConfig
from train.tasks import HELD_OUT

BLOCK = 64
"""Images that are made float64 at once."""


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel."""

    mean: Float64[np.ndarray, " C"]
    deviation: Float64[np.ndarray, " C"]

    def __call__(self, image: Float32[np.ndarray, "*any C"]) -> Float32[np.ndarray, "*any C"]:
        return ((image - self.mean) / self.deviation).astype(np.float32)


class ImageWindows:
    """The endless sequence of training rows: `windows[i]` for any i >= 0.

    A row is `image` [H, W, C] normalised, `targets` [classes] and `weights` [], all float32.

    Args:
      found: at least one image.
      seed: at least 0, below 2^64.
    """

    def __init__(
        self, found: LabelledImages, augmentation: AugmentConfig, normalisation: Normalisation, seed: int
    ) -> None:
        self.per_epoch = len(found)
        self._found, self._augmentation, self._normalisation, self._seed = found, augmentation, normalisation, seed
        if not 0 <= seed < 2**64:
            raise UserError(f"seed: expected 0 <= seed < 2^64, got {seed}")
        # Prefetching straddles at most two epochs.
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: permutation(len(found), seed, epoch, 0))

    def identity(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self._augmentation)
        return {"images": self._found.digest(), "augmentation": settings, "seed": self._seed}

    def __len__(self) -> int:
        """More than any run reads: the sequence has no end, but random access wants a length."""
        return 2**62

    def __getitem__(self, index: int) -> Batch:
        epoch, place = divmod(int(index), self.per_epoch)
        draws = Draws(self._seed, int(index))
        image, target = self._changed(int(self._order(epoch)[place]), draws)
        if self._augmentation.mixup or self._augmentation.cutmix:
            other, its_target = self._changed(draws.below(self.per_epoch), draws)
            image, share = mix(image, other, self._augmentation, draws)
            target = share * target + (1 - share) * its_target
        return _row(self._normalisation(image), target)

    def _changed(self, which: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        image, which = self._found.readable(which)
        return augment(as_float(image), self._augmentation, draws), _one_hot(self._found, which)


class ImageSet(Sequence[Batch]):
    """Rows to score, as of `ImageWindows`, each as it is; that of a file which is no image has weight 0."""

    def __init__(self, found: LabelledImages, normalisation: Normalisation) -> None:
        self._found, self._normalisation = found, normalisation

    @property
    def windows(self) -> Sequence[Batch]:
        return self

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, target = self._found.images[index], _one_hot(self._found, index)
        if image is None:
            blank = _row(np.zeros(self._found.images.shape[1:], np.float32), target)
            return {**blank, "weights": np.zeros((), np.float32)}
        return _row(self._normalisation(as_float(image)), target)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Everything a run on images reads."""

    windows: ImageWindows
    evaluation: Mapping[str, ImageSet]
    normalisation: Normalisation
    training: LabelledImages
    held_out: LabelledImages

    def identity(self) -> str:
        return self.held_out.digest()

    @property
    def described(self) -> str:
        skipped = f", {len(self.training.skipped)} files skipped" if self.training.skipped else ""
        on_disk = ", read from disk as they are wanted" if isinstance(self.training.images, FolderImages) else ""
        return (
            f"{len(self.training):,} images of {len(self.training.classes)} classes to train on, "
            f"{len(self.held_out):,} held out{skipped}{on_disk}"
        )


def load_images(config: ImageRunConfig) -> ImageData:
    """What a run of `config` reads.

    Raises:
      UserError: images that cannot be read or split, or a model for another number of classes or channels.
    """
    data, classes = config.data, config.model.num_classes
    found = read_images(data.source, data.size, config.model.in_channels)
    if len(found.classes) != classes:
        raise UserError(
            f"model.num_classes: {data.source} has {len(found.classes)} classes, got {classes}; add "
            f"--model.num-classes {len(found.classes)}"
        )
    training, held_out = split_by_class(found, data.holdout, data.fold)
    normalisation = _normalisation(training)
    windows = ImageWindows(training, data.augment, normalisation, config.seed)
    return ImageData(windows, {HELD_OUT: ImageSet(held_out, normalisation)}, normalisation, training, held_out)


def as_float(images: Shaped[np.ndarray, "*any"]) -> Float32[np.ndarray, "*any"]:
    """In [0, 1]."""
    return images.astype(np.float32) / 255 if images.dtype == np.uint8 else images


def _normalisation(found: LabelledImages) -> Normalisation:
    axes, images = (0, 1, 2), found.sample()
    blocks = [images[first : first + BLOCK] for first in range(0, len(images), BLOCK)]
    size, count = 255.0 if images.dtype == np.uint8 else 1.0, math.prod(images.shape[:3])
    mean = np.sum([block.sum(axes, dtype=np.float64) for block in blocks], axis=0) / count
    deviation = np.sqrt(np.sum([((block - mean) ** 2).sum(axes) for block in blocks], axis=0) / count) / size
    # A channel that is the same everywhere says nothing, and is not to be divided by 0.
    return Normalisation(mean / size, np.where(deviation > 0, deviation, 1.0))


def _one_hot(found: LabelledImages, which: int) -> Float32[np.ndarray, " classes"]:
    target = np.zeros(len(found.classes), np.float32)
    target[found.labels[which]] = 1
    return target


def _row(image: np.ndarray, target: np.ndarray) -> Batch:
    return {"images": image, "targets": target.astype(np.float32), "weights": np.ones((), np.float32)}
