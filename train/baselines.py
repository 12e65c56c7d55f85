"""What a held-out figure is put beside: what methods reach that know nothing of attention."""

from __future__ import annotations

import bz2
import lzma
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64

from train.data.sources import Document

COMPRESSED_AT_MOST = 16 * 2**20
"""Bytes of text: `xz -9e` reads about 2 MB a second, and a run should not wait minutes for a yardstick."""


def compressor_baselines(training: Sequence[Document], held_out: Sequence[Document]) -> dict[str, float]:
    """Bits per byte of general compressors on the held-out text, alone and after they have seen the training text.

    The second figure is the growth of the archive when the held-out text is put behind the training text, so it is
    what the compressor needs once it knows what the model knows. More than `COMPRESSED_AT_MOST` is not compressed.
    """
    known, text = b"\n".join(training), b"\n".join(held_out)
    if len(known) + len(text) > COMPRESSED_AT_MOST:
        return {}
    preset = 9 | lzma.PRESET_EXTREME
    alone = len(lzma.compress(text, preset=preset))
    growth = len(lzma.compress(known + b"\n" + text, preset=preset)) - len(lzma.compress(known, preset=preset))
    return {
        "xz -9e, held-out text alone": 8 * alone / len(text),
        "xz -9e, after the training text": 8 * growth / len(text),
        "bzip2 -9, held-out text alone": 8 * len(bz2.compress(text, 9)) / len(text),
    }


FITTED_AT_MOST = 5_000_000
"""Pixels of training images: logistic regression of the 1.2 million of "photos" takes seconds, and of more, minutes."""


def logistic_baseline(
    pixels: Float32[np.ndarray, "N D"],
    labels: Int64[np.ndarray, " N"],
    held_out_pixels: Float32[np.ndarray, "M D"],
    held_out_labels: Int64[np.ndarray, " M"],
) -> dict[str, float]:
    """Held-out accuracy of logistic regression; more than `FITTED_AT_MOST` is not fitted."""
    if pixels.size > FITTED_AT_MOST:
        return {}
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged; a yardstick need not
        fitted = LogisticRegression(max_iter=300).fit(pixels, labels)
    return {"logistic regression on the pixels": float(fitted.score(held_out_pixels, held_out_labels))}
