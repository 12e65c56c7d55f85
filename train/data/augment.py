"""Changes to a training image, each a function of (image, draws): the same draws make the same image.

    warp      x'(p) = x(A (p - c) + c + t), bilinear, black outside: rotate, translate, shear
    colour    brightness x' = f x, contrast x' = mean + f (x - mean), both cut to [0, 1]
    cut       crop of the padded image; cutout, a hole of mean grey
    mix       mixup l x + (1 - l) y; cutmix, x with a box of y, l the share that stays of x

Images are float32 [H, W, C] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32
from scipy.ndimage import affine_transform
from scipy.special import betaincinv

from train.image_config import AugmentConfig

type Image = Float32[np.ndarray, "H W C"]


class Draws:
    """Random numbers of the key (seed, index), from raw Philox output, which NumPy promises never to change."""

    def __init__(self, seed: int, index: int) -> None:
        # Recall windows and permutations have other counters and other keys.
        self._bits = np.random.Philox(key=np.array([seed, index], np.uint64), counter=np.array([0, 0, 0, 7], np.uint64))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Strictly between `low` and `high`."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) + 0.5) * 2.0**-53

    def below(self, count: int) -> int:
        """One of 0 .. count - 1, up to a bias of count / 2^64."""
        return int(self._bits.random_raw()) % count

    def beta(self, alpha: float) -> float:
        """From Beta(alpha, alpha)."""
        return float(betaincinv(alpha, alpha, self.uniform()))


def augment(image: Image, config: AugmentConfig, draws: Draws) -> Image:
    """`image` after everything that changes one image by itself."""
    names = list(OPERATIONS)
    for _ in range(config.operations):
        operation = OPERATIONS[names[draws.below(len(names))]]
        image = operation(image, draws.uniform(-config.magnitude, config.magnitude), draws)
    if config.crop:
        image = crop(image, config.crop, draws)
    if config.flip and draws.below(2):
        image = image[:, ::-1]
    return image


def mix(image: Image, other: Image, config: AugmentConfig, draws: Draws) -> tuple[Image, float]:
    """The mixture of two images, and the share of the first, of the label too."""
    if config.mixup and not (config.cutmix and draws.below(2)):
        share = draws.beta(config.mixup)
        return (share * image + (1 - share) * other).astype(np.float32), share
    height, width = image.shape[:2]
    side = np.sqrt(1 - draws.beta(config.cutmix))
    rows, columns = round(side * height), round(side * width)
    top, left = draws.below(height - rows + 1), draws.below(width - columns + 1)
    mixed = image.copy()
    box = np.s_[top : top + rows, left : left + columns]
    mixed[box] = other[box]
    return mixed, 1 - rows * columns / (height * width)


def crop(image: Image, padding: int, draws: Draws) -> Image:
    """A piece of the image's size, out of it with `padding` black pixels on every side."""
    height, width = image.shape[:2]
    top, left = draws.below(2 * padding + 1), draws.below(2 * padding + 1)
    return np.pad(image, ((padding, padding), (padding, padding), (0, 0)))[top : top + height, left : left + width]


def rotate(image: Image, strength: float, draws: Draws) -> Image:
    angle = strength * np.pi / 6
    return _warp(image, np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]))


def translate(image: Image, strength: float, draws: Draws) -> Image:
    """Along one of the axes."""
    shift = np.zeros(2)
    axis = draws.below(2)
    shift[axis] = 0.3 * strength * image.shape[axis]
    return _warp(image, np.eye(2), shift)


def shear(image: Image, strength: float, draws: Draws) -> Image:
    """Along one of the axes."""
    matrix = np.eye(2)
    axis = draws.below(2)
    matrix[axis, 1 - axis] = 0.3 * strength
    return _warp(image, matrix)


def brightness(image: Image, strength: float, draws: Draws) -> Image:
    return np.clip((1 + 0.9 * strength) * image, 0, 1).astype(np.float32)


def contrast(image: Image, strength: float, draws: Draws) -> Image:
    mean = image.mean()
    return np.clip(mean + (1 + 0.9 * strength) * (image - mean), 0, 1).astype(np.float32)


def cutout(image: Image, strength: float, draws: Draws) -> Image:
    """A hole whose sides are 0.4 |strength| of the image's; none where that rounds to no pixel."""
    height, width = image.shape[:2]
    rows, columns = (round(0.4 * abs(strength) * side) for side in (height, width))
    top, left = draws.below(height - rows + 1), draws.below(width - columns + 1)
    holed = image.copy()
    holed[top : top + rows, left : left + columns] = image.mean()
    return holed


OPERATIONS: dict[str, Callable[[Image, float, Draws], Image]] = {
    operation.__name__: operation for operation in (rotate, translate, shear, brightness, contrast, cutout)
}
"""What `AugmentConfig.operations` draws from; a strength is in [-1, 1]."""


def _warp(image: Image, matrix: np.ndarray, shift: np.ndarray | float = 0.0) -> Image:
    """Pixel p of the result is pixel A (p - c) + c - shift of the image, c its centre."""
    centre = (np.array(image.shape[:2]) - 1) / 2
    offset = centre - matrix @ centre - shift
    channels = [
        affine_transform(image[..., c], matrix, offset, order=1, mode="grid-constant") for c in range(image.shape[-1])
    ]
    return np.stack(channels, -1)
