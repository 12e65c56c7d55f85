"""Images with their classes: where they are found, and the split that holds some of each class out.

The held-out part is a function of the set of contents alone: order the distinct images of a class by their hash; fold f
of a fraction h is those from place round(f h n) to round((f + 1) h n) of n. Hence neither names nor the order of files
matter, and two copies of an image in one class are always on the same side.

Everything is held in memory, a byte for each channel of a pixel (four where the source has floats).
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from train.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
SKIPPED_AT_MOST = 0.01
"""Share of the files of a folder that may be no readable images."""
BANDS = ("top", "middle", "bottom")
"""The regions of a photograph that are classes of "photos"."""
PATCH = 32


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """All images of a source.

    Attributes:
      images: uint8, or float32 in [0, 1].
      labels: indices into `classes`.
      skipped: files that are no readable images.
    """

    images: Shaped[np.ndarray, "N H W C"]
    labels: Int64[np.ndarray, " N"]
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: Any) -> LabelledImages:
        """Some of them."""
        return dataclasses.replace(self, images=self.images[which], labels=self.labels[which])

    def digest(self) -> str:
        """Of contents and classes, in their order."""
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=16)
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
    if found.images.shape[1:3] == size:
        return found
    return dataclasses.replace(found, images=np.stack([_resized(image, size) for image in found.images]))


def split_by_class(found: LabelledImages, holdout: float, fold: int) -> tuple[LabelledImages, LabelledImages]:
    """The (training, held-out) images, each in the order of `found`; at least one distinct image of a class on each.

    Raises:
      UserError: a class has too few distinct images.
    """
    held_out = np.zeros(len(found), bool)
    contents = [hashlib.blake2b(np.ascontiguousarray(image).tobytes()).digest() for image in found.images]
    for label, name in enumerate(found.classes):
        own = np.flatnonzero(found.labels == label)
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
        pixels = np.asarray(_as_mode(_pillow().fromarray(photo), channels)).reshape(*photo.shape[:2], -1)
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
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data.source names digits, photos, a folder or an .npz")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) < 2:
        raise UserError(
            f"{root}: expected a folder of images for each of at least two classes, found {len(folders)} folders"
        )
    images, labels, skipped = [], [], []
    for label, folder in enumerate(folders):
        files = list(_image_files(folder))
        if not files:
            raise UserError(
                f"{folder}: holds no image ({', '.join(IMAGE_SUFFIXES)}); put some there, or remove the folder"
            )
        for path in files:
            image = _decoded(path, size, channels)
            if image is None:
                skipped.append(str(path.relative_to(root)))
            else:
                images.append(image)
                labels.append(label)
        if label not in labels[-1:]:
            raise UserError(f"{folder}: none of its {len(files)} files is a readable image; replace them")
    if skipped:
        named = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        said = f"{root}: {len(skipped)} of {len(skipped) + len(images)} files are no readable images ({named})"
        if len(skipped) > SKIPPED_AT_MOST * (len(skipped) + len(images)):
            raise UserError(f"{said}, more than {SKIPPED_AT_MOST:.0%}; repair or remove them")
        print(f"{said}; they are skipped", file=sys.stderr)
    names = tuple(folder.name for folder in folders)
    return LabelledImages(np.stack(images), np.array(labels, np.int64), names, tuple(skipped))


def _image_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not hidden:
            yield path


def _decoded(path: Path, size: tuple[int, int], channels: int) -> np.ndarray | None:
    """uint8 [H, W, C], or `None` where the file is no whole image."""
    pillow = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(path) as file:
                image = _as_mode(file, channels)
    # Pillow raises what its decoders raise: broken PNG is a SyntaxError, a cut-off file an OSError.
    except (OSError, ValueError, SyntaxError, EOFError, pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        return None
    from PIL import ImageOps

    fitted = ImageOps.fit(image, size[::-1], pillow.Resampling.BILINEAR)
    return np.asarray(fitted).reshape(*size, channels)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w, C] as [H, W, C] of the same dtype, cut to the new shape at the middle."""
    from PIL import ImageOps

    pillow = _pillow()
    fit: Callable[[Any], np.ndarray] = lambda one: np.asarray(  # noqa: E731
        ImageOps.fit(pillow.fromarray(one), size[::-1], pillow.Resampling.BILINEAR)
    )
    return np.stack([fit(np.ascontiguousarray(image[..., channel])) for channel in range(image.shape[-1])], -1)


def _as_mode(image: Any, channels: int) -> Any:
    if channels not in (1, 3):
        raise UserError(f"model.in_channels: images of files have 1 channel (grey) or 3 (colour), got {channels}")
    return image.convert("L" if channels == 1 else "RGB")


def _pillow() -> Any:
    from PIL import Image  # here, not above: only runs on images need it

    return Image
