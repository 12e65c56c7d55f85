"""What a run on images is: frozen dataclasses beside those of `train.config`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jattn.models import vision
from train.config import CommonConfig, OptimizerConfig
from train.errors import UserError
from train.values import check_least, check_ranges

ADAMW = OptimizerConfig(name="adamw", learning_rate=0.002, weight_decay=0.05, b2=0.999)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How a training image is changed before the model sees it; another way each time."""

    crop: int = 0
    """Black pixels put around the image before a piece of its size is cut out anywhere."""
    flip: bool = False
    """Mirror every second image, left to right."""
    operations: int = 0
    """How many of rotate, translate, shear, brightness, contrast and cutout are drawn for an image (RandAugment)."""
    magnitude: float = 0.5
    """Of those at most: 1 is 30 degrees, 0.3 of a side, a factor of 0.1 or 1.9, or a hole of 0.4 of the sides."""
    mixup: float = 0.0
    """Mix two images and their labels in shares from Beta(mixup, mixup); 0 does not."""
    cutmix: float = 0.0
    """Cut a box out of another image, its area from Beta(cutmix, cutmix); 0 does not. With both, either by chance."""


@dataclasses.dataclass(frozen=True)
class ImageDataConfig:
    """Which images, and how they become batches."""

    source: str = "digits"
    """"digits" (1,797 scanned digits) and "photos" (pieces of two photographs) come with scikit-learn; or a folder
    with a folder of images for each class, which stays on disk if its images take more than 4 GiB, or an .npz file
    with `images` and `labels`."""
    size: tuple[int, int] = (8, 8)
    """Height and width; images of another size are cut to this shape at the middle, and resized."""
    augment: AugmentConfig = AugmentConfig()
    batch: int = 64
    """Images in a step, over all devices."""
    accumulate: int = 1
    """Parts that a step cuts its batch into, one after the other, to need less memory."""
    holdout: float = 0.2
    """Fraction of each class that is never trained on and gives the figures."""
    fold: int = 0
    """Which fraction: folds 0, 1, ... hold out different images, and together all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRunConfig(CommonConfig):
    """One training run of an image classifier."""

    task: ClassVar[str] = "images"
    rows: ClassVar[str] = "images"

    model: vision.Config
    data: ImageDataConfig = ImageDataConfig()
    optimizer: OptimizerConfig = ADAMW
    label_smoothing: float = 0.0
    """Share of a training label that is spread over all classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        data, augment = self.data, self.data.augment
        check_least(
            ("data.size", min(data.size), 1),
            ("data.fold", data.fold, 0),
            ("data.augment.crop", augment.crop, 0),
            ("data.augment.operations", augment.operations, 0),
        )
        check_ranges(
            self,
            {
                "[0, 1]": ("data.augment.magnitude", "label_smoothing"),
                "[0, inf)": ("data.augment.mixup", "data.augment.cutmix"),
            },
        )
        if (data.fold + 1) * data.holdout > 1 + 1e-9:
            last = int((1 + 1e-9) / data.holdout) - 1
            raise UserError(f"data.fold: with data.holdout = {data.holdout} the last is {last}, got {data.fold}")
        if self.optimizer.name != "adamw":
            raise UserError(
                f"optimizer.name: image models are trained by adamw, got {self.optimizer.name}; Muon knows the "
                "matrices of language models only"
            )
