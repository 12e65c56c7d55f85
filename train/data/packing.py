"""Documents packed into windows of a fixed length, as a pure function of (seed, index).

Epoch e permutes the documents with a generator keyed by (seed, e), lays them end to end, and cuts the stream
x_0 .. x_{N-1} into W = (N - 1) // C windows; window k reads x_{kC} .. x_{kC + C - 1} and predicts the tokens one
further, so every token is a target once per epoch, except in a ragged tail of fewer than C tokens, another one in each
epoch. The windows are permuted too, for neighbours in one document are correlated. Since N is the same in every epoch,
so is W, and window i of the endless run is window i mod W of epoch i // W: nothing is carried over, and any window is
found without its predecessors.

The concatenation is never built: a position is looked up among the permuted documents' starts (`searchsorted`) and read
from the one flat array of tokens.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int64, Integer

from jattn.checks import check_count
from train.errors import UserError

type Batch = dict[str, np.ndarray]
"""Of text: int32 `tokens, targets, segment_ids, positions` and float32 `weights`, each [..., context]."""

type Tokens = bytes | Integer[np.ndarray, " length"]
"""One document: its bytes, which are tokens of a vocabulary of 256, or the integers that a tokenizer made of it."""


class Windows(Protocol):
    """An endless sequence of training windows (rows of batches), each a function of its index alone."""

    per_epoch: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...

    def identity(self) -> dict[str, Any]:
        """What fixes the sequence, as JSON: an index means the same window only where all of this agrees."""


def permutation(length: int, *key: int) -> Int64[np.ndarray, " length"]:
    """A permutation of 0..length-1 that depends on `key` alone.

    It sorts raw Philox output, which NumPy promises never to change; `Generator.permutation` has no such promise, and a
    run must find its data again after an upgrade.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(raw, kind="stable")


class PackedWindows:
    """The endless sequence of training windows: `windows[i]` for any i >= 0.

    An element is a `Batch` of shape [context]. Segment ids count documents from 1 within the window, positions restart
    at each document, and a weight is 0 where the target lies in another document than the token (the first byte of a
    document is not to be guessed from the last of another), else 1.

    Args:
      documents: at least one byte each.
      context: tokens per window.
      seed: at least 0.

    Raises:
      UserError: all documents together are shorter than one context and its last target.
    """

    def __init__(self, documents: Sequence[Tokens], context: int, seed: int) -> None:
        self.context = check_count("context", context)
        self._seed = check_count("seed", seed, minimum=0)
        self._lengths = np.array([len(document) for document in documents], np.int64)
        total = int(self._lengths.sum())
        if total <= context:
            raise UserError(
                f"the training text has {total} tokens, and one context of {context} needs {context + 1}; "
                f"give more text or choose a shorter context"
            )
        self._tokens: Integer[np.ndarray, " total"] = np.concatenate([_as_array(d) for d in documents])
        self._offsets = np.cumsum(self._lengths) - self._lengths
        self.per_epoch = (total - 1) // context
        # Prefetching straddles at most two epochs.
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of windows, and per permuted document its start in the stream and its shift to the flat array."""
        order = permutation(len(self._lengths), self._seed, epoch, 0)
        lengths = self._lengths[order]
        starts = np.cumsum(lengths) - lengths
        return permutation(self.per_epoch, self._seed, epoch, 1), starts, self._offsets[order] - starts

    def identity(self) -> dict[str, Any]:
        digest = hashlib.blake2b(self._lengths.tobytes(), digest_size=16)
        digest.update(self._tokens.view(np.uint8))
        return {"documents": digest.hexdigest(), "context": self.context, "seed": self._seed}

    def __len__(self) -> int:
        """More windows than any run reads: the sequence has no end, but random access wants a length."""
        return 2**62

    def __getitem__(self, index: int) -> Batch:
        epoch, k = divmod(int(index), self.per_epoch)
        window_order, starts, shifts = self._epoch(epoch)
        stream = window_order[k] * self.context + np.arange(self.context + 1)
        document = np.searchsorted(starts, stream, side="right") - 1
        tokens = self._tokens[stream + shifts[document]].astype(np.int32)
        begin = np.maximum(starts[document[:-1]], stream[0])
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segment_ids": (document[:-1] - document[0] + 1).astype(np.int32),
            "positions": (stream[:-1] - begin).astype(np.int32),
            "weights": (document[1:] == document[:-1]).astype(np.float32),
        }


def eval_windows(documents: Sequence[Tokens], context: int) -> EvalWindows:
    """Windows [context] that score every token but the first of each document exactly once.

    Each document is cut by itself, so a score does not depend on its neighbours. What remains of a row beyond the
    document has segment id 0 and weight 0; tokens and targets there are 0. The first token of a document has nothing
    before it that could predict it, so the number of tokens scored is `sum(len(d) - 1 for d in documents)`.

    Raises:
      UserError: no document has a token to score.
    """
    return EvalWindows(documents, check_count("context", context))


class EvalWindows(Sequence[Batch]):
    """See `eval_windows`; a window is made when it is read, so a large set needs no memory besides its documents."""

    def __init__(self, documents: Sequence[Tokens], context: int) -> None:
        self._documents, self._context = documents, context
        counts = [-(-max(len(document) - 1, 0) // context) for document in documents]
        self._ends = np.cumsum(counts)
        if not sum(counts):
            raise UserError(
                "the held-out documents have no token to score; give longer documents or hold out more of them"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - (int(self._ends[which - 1]) if which else 0)) * self._context
        piece = _as_array(self._documents[which][start : start + self._context + 1])
        n = len(piece) - 1
        window = _blank(self._context)
        window["tokens"][:n], window["targets"][:n] = piece[:-1], piece[1:]
        window["positions"][:n], window["segment_ids"][:n], window["weights"][:n] = np.arange(n), 1, 1
        return window


def eval_batches(
    windows: Sequence[Batch], global_batch: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """`windows` in batches [global_batch / process_count, ...] of one shape, this process's rows.

    The last batch is filled with rows of zeros, whose weight is 0 too. Threads read the rows of a batch, for an image
    may have to be decoded.
    """
    rows = rows_per_process(global_batch, process_count)
    blank = {name: np.zeros_like(array) for name, array in windows[0].items()}
    with ThreadPoolExecutor() as pool:
        for first in range(process_index * rows, -(-len(windows) // global_batch) * global_batch, global_batch):
            read = pool.map(windows.__getitem__, range(first, min(first + rows, len(windows))))
            part = [*read, *[blank] * rows][:rows]
            yield {name: np.stack([window[name] for window in part]) for name in blank}


def _blank(context: int) -> Batch:
    integers = ("tokens", "targets", "segment_ids", "positions")
    return {name: np.zeros(context, np.int32) for name in integers} | {"weights": np.zeros(context, np.float32)}


def _as_array(document: Tokens) -> np.ndarray:
    return np.frombuffer(document, np.uint8) if isinstance(document, bytes) else document


def rows_per_process(global_batch: int, process_count: int) -> int:
    """Rows of a global batch that each process reads.

    Raises:
      UserError: the batch does not divide evenly.
    """
    check_count("global_batch", global_batch)
    if global_batch % check_count("process_count", process_count):
        raise UserError(
            f"a global batch of {global_batch} rows cannot be shared by {process_count} processes; "
            f"choose a multiple of {process_count}"
        )
    return global_batch // process_count
