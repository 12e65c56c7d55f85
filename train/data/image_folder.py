"""A folder of images with a folder inside for each class: what is in it, and its images where memory is too small.

Files have a fixed order: classes by name, the files of each by path. Image i is file i decoded, cut at its middle to
the shape that is wanted, and resized. Where it stays on disk it is decoded whenever it is asked for, and known by

    mark(i) = hash(number of bytes of file i, its first and its last 8 KiB)

so that a million files are told apart without all that is in them being read.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from train.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
SKIPPED_AT_MOST = 0.01
"""Share of the files of a folder that may be no readable images."""
IN_MEMORY = 4 * 2**30
"""Bytes of decoded images; a folder that has more stays on disk."""
END = 8 * 2**10
THREADS = min(32, max(2, os.cpu_count() or 1))
SAY_SECONDS = 5.0


class Listing(NamedTuple):
    """The files of a folder, by paths relative to it."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: Int64[np.ndarray, " N"]


class Unreadable(Collection[str]):
    """The files of a folder that were found to be no images, by all threads together.

    Each is named when it is found. Beyond `SKIPPED_AT_MOST` of all files `add` raises `UserError`.
    """

    def __init__(self, root: Path, total: int) -> None:
        self._root, self._total = root, total
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        with self._lock:
            if name not in self._names:
                self._names.add(name)
                say(
                    f"{self._root}: {name} is no readable image, left out ({len(self)} of {self._total:,} files so far)"
                )
            check_skipped(self._root, sorted(self._names), self._total)

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __contains__(self, name: object) -> bool:
        return name in self._names


class FolderImages:
    """Images on disk: `images[i]` is uint8 [H, W, C], or `None` where the file is no whole image.

    `images[mask]` and `images[indices]` are some of them, on disk too. Threads may share it.

    Attributes:
      marks: of every file.
      unreadable: of the whole folder.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, root: Path, files: Sequence[str], marks: Sequence[bytes], shape: tuple[int, int, int], found: Unreadable
    ) -> None:
        self._root, self._files, self.marks, self.unreadable = root, files, marks, found
        self.shape = (len(files), *shape)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, which: Any) -> Any:
        height, width, channels = self.shape[1:]
        if not isinstance(which, np.ndarray):
            name = self._files[which]
            image = decoded(self._root / name, (height, width), channels)
            if image is None:
                _mark(self._root / name)  # that it is there: else another image would stand in for it in silence
                self.unreadable.add(name)
            return image
        chosen = np.arange(len(self))[which]
        files, marks = ([each[index] for index in chosen] for each in (self._files, self.marks))
        return FolderImages(self._root, files, marks, (height, width, channels), self.unreadable)

    def digest(self) -> bytes:
        return hashlib.blake2b(repr(self.shape).encode() + b"".join(self.marks), digest_size=16).digest()


def list_folder(root: Path) -> Listing:
    """The images of every class, not yet opened.

    Raises:
      UserError: no folder, fewer than two classes, a class without images.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data.source names digits, photos, a folder or an .npz")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) < 2:
        raise UserError(
            f"{root}: expected a folder of images for each of at least two classes, found {len(folders)} folders"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(told(folders, len(folders), f"{root}: classes listed")):
        found = [str(path.relative_to(root)) for path in _image_files(folder)]
        if not found:
            raise UserError(
                f"{folder}: holds no image ({', '.join(IMAGE_SUFFIXES)}); put some there, or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    return Listing(root, tuple(folder.name for folder in folders), tuple(files), np.array(labels, np.int64))


def on_disk(listing: Listing, size: tuple[int, int], channels: int) -> FolderImages:
    """The images of a folder, to be decoded when they are asked for."""
    mode_of(channels)  # at once, not when the first image is decoded
    root, files = listing.root, listing.files
    marks = told(in_threads(lambda name: _mark(root / name), files), len(files), f"{root}: files looked at")
    return FolderImages(root, files, list(marks), (*size, channels), Unreadable(root, len(files)))


def check_skipped(root: Path, skipped: Sequence[str], total: int) -> str:
    """What to say of skipped files; raises `UserError` where they are too many."""
    named = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
    said = f"{root}: {len(skipped)} of {total} files are no readable images ({named})"
    if len(skipped) > SKIPPED_AT_MOST * total:
        raise UserError(f"{said}, more than {SKIPPED_AT_MOST:.0%}; repair or remove them")
    return said


def decoded(path: Path, size: tuple[int, int], channels: int) -> UInt8[np.ndarray, "H W C"] | None:
    """The image in a file, or `None` where the file is no whole image."""
    pillow, mode = load_pillow(), mode_of(channels)
    try:
        with pillow.open(path) as file:
            image = file.convert(mode)
    # Pillow raises what its decoders raise: broken PNG is a SyntaxError, a cut-off file an OSError.
    except (OSError, ValueError, SyntaxError, EOFError, pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        return None
    from PIL import ImageOps

    fitted = ImageOps.fit(image, size[::-1], pillow.Resampling.BILINEAR)
    return np.asarray(fitted).reshape(*size, channels)


def mode_of(channels: int) -> str:
    """What Pillow calls images of so many channels."""
    if channels not in (1, 3):
        raise UserError(f"model.in_channels: images of files have 1 channel (grey) or 3 (colour), got {channels}")
    return "L" if channels == 1 else "RGB"


@functools.cache
def load_pillow() -> Any:
    from PIL import Image  # here, not above: only runs on images need it

    # For good: `warnings.catch_warnings` changes what all threads see.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    return Image


def in_threads[A, B](read: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """`map(read, items)` by several threads, never more than a thousand items ahead."""
    with ThreadPoolExecutor(THREADS) as pool:
        for some in itertools.batched(items, 1000):
            yield from pool.map(read, some)


def told[A](items: Sequence[A] | Iterator[A], total: int, what: str) -> Iterator[A]:
    """The same items; while they take long, a line every few seconds says how many there were."""
    last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= SAY_SECONDS:
            last = time.monotonic()
            say(f"{what}: {count:,} of {total:,}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _image_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not hidden:
            yield path


def _mark(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            start = file.read(END)
            file.seek(max(len(start), size - END))
            return hashlib.blake2b(size.to_bytes(8, "little") + start + file.read(END), digest_size=16).digest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); repair or remove it") from error
