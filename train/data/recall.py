"""Synthetic recall: sequences whose answers stand earlier in them, as a pure function of (seed, index).

    mqar       k1 v1 k2 v2 .. kP vP . . k2 . k1 . . .    v2 is the answer at the query k2, v1 at the query k1
    copying    begin x1 x2 .. xn | x1 x2 .. xn-1         x1 .. xn are the answers from the separator | on
    induction  . . . ! x . . . . . . . . . . . . . !     x is the answer at the last token

A dot is a random token. Only answers are scored: their weight is 1, every other weight is 0 and its target 0.

Window i is made from the raw output of a Philox generator with the key (seed, i), which NumPy promises never to change;
held-out window i is made from the same key with another counter, so the two never share a random number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from jattn.checks import check_count
from train.config import RecallConfig
from train.data.packing import Batch
from train.errors import UserError

_TRAINING, _HELD_OUT = 0, 1


class RecallWindows:
    """The endless sequence of windows of a task: `windows[i]` for any i >= 0, a `Batch` of shape [context].

    - "mqar", multi-query associative recall (Arora et al. 2023, Zoology; `zoology/data/multiquery_ar.py`): `pairs` keys
      from 1 .. V/2 - 1, each followed by a value from V/2 .. V - 1, all different. Every key is asked once, at token
      2 pairs + 2 g, with the gaps g drawn one after the other without replacement, with probability proportional to
      (g + 1)^(power - 1). Everything else is a uniform token, as the released code does by default
      (`random_non_queries`). Published: V = 8192, power 0.01, two layers, and (context, pairs) of (64, 4), (128, 8),
      (256, 16) and (512, 64).
    - "copying" (Jelassi et al. 2024; `synthetic_exps/data_utils.py`): a string of `copy_length` uniform tokens, a
      separator, and the string again. The last two tokens of the vocabulary are begin and separator. A window holds as
      many strings as fit, each a segment of its own. Differs from the released code: all strings have one length, so
      none needs an end, and none is cut off. Published: 26 letters, 20 to 50 of them, context 220. (The selective
      copying of Gu and Dao 2023 puts noise between the tokens; this one does not.)
    - "induction" (Gu and Dao 2023, section 4.1.2; Olsson et al. 2022): uniform tokens; the vocabulary's last token, the
      trigger, stands at a uniform place and at the end, where the token that followed it first is the answer.
      Published: V = 16, context 256, two layers.

    Args:
      task: with a task that is not `None`.
      vocab_size: V.
      context: tokens per window.
      seed: at least 0, below 2^64.

    Raises:
      UserError: the task does not fit the context or the vocabulary.
    """

    def __init__(self, task: RecallConfig, vocab_size: int, context: int, seed: int) -> None:
        self.context = check_count("context", context)
        self.per_epoch = 2**62
        self._task, self._vocab_size, self._seed = task, check_count("vocab_size", vocab_size), seed
        if not 0 <= seed < 2**64:
            raise UserError(f"seed: expected 0 <= seed < 2^64, got {seed}")
        _check(task, vocab_size, context)

    def identity(self) -> dict[str, Any]:
        return {
            "recall": dataclasses.asdict(self._task),
            "vocab_size": self._vocab_size,
            "context": self.context,
            "seed": self._seed,
        }

    def __len__(self) -> int:
        """More windows than any run reads: the sequence has no end, but random access wants a length."""
        return 2**62

    def __getitem__(self, index: int) -> Batch:
        return self._window(index, _TRAINING)

    def held_out(self, count: int) -> Batch:
        """Windows [count, context] that are drawn independently of every training window."""
        windows = [self._window(index, _HELD_OUT) for index in range(check_count("count", count))]
        return {name: np.stack([window[name] for window in windows]) for name in windows[0]}

    def _window(self, index: int, part: int) -> Batch:
        key = np.array([self._seed, int(index)], np.uint64)
        random = np.random.Philox(key=key, counter=np.array([0, 0, 0, part], np.uint64))
        make = {"mqar": _mqar, "copying": _copying, "induction": _induction}[str(self._task.task)]
        return make(self._task, self._vocab_size, self.context, random)


def _check(task: RecallConfig, vocab_size: int, context: int) -> None:
    if task.task == "mqar":
        pairs = task.pairs
        if pairs < 1:
            raise UserError(f"data.recall.pairs: expected at least 1, got {pairs}")
        if not 0 < task.power <= 1:
            raise UserError(f"data.recall.power: expected 0 < power <= 1 (1 is uniform), got {task.power}")
        if context % 2 or context < 4 * pairs:
            raise UserError(
                f"data.context: mqar with data.recall.pairs = {pairs} needs an even number of at least {4 * pairs} "
                f"tokens, two for each pair and two for each query, got {context}"
            )
        if vocab_size // 2 - 1 < pairs:
            raise UserError(
                f"model.vocab_size: mqar takes data.recall.pairs = {pairs} different keys from the first half without "
                f"token 0, so expected at least {2 * pairs + 2}, got {vocab_size}"
            )
    elif task.task == "copying":
        if task.copy_length < 1:
            raise UserError(f"data.recall.copy_length: expected at least 1, got {task.copy_length}")
        if context < 2 * task.copy_length + 1:
            raise UserError(
                f"data.context: copying data.recall.copy_length = {task.copy_length} tokens needs at least "
                f"{2 * task.copy_length + 1}, got {context}"
            )
        if vocab_size < 4:
            raise UserError(
                f"model.vocab_size: copying needs two tokens besides begin and separator, so at least 4, "
                f"got {vocab_size}"
            )
    elif task.task == "induction":
        if context < 3:
            raise UserError(
                f"data.context: induction needs the trigger, an answer and the trigger again, so at least 3 tokens, "
                f"got {context}"
            )
        if vocab_size < 3:
            raise UserError(
                f"model.vocab_size: induction needs two tokens besides the trigger, so at least 3, got {vocab_size}"
            )
    else:
        raise UserError(f"data.recall.task: expected mqar, copying or induction, got {task.task}")


def _mqar(task: RecallConfig, vocab_size: int, context: int, random: np.random.Philox) -> Batch:
    pairs, half = task.pairs, vocab_size // 2
    keys = 1 + _first(random.random_raw(half - 1), pairs)
    values = half + _first(random.random_raw(vocab_size - half), pairs)
    places = np.arange(1, context // 2 - pairs + 1)
    # Exponential clocks of these rates ring in the order of a draw without replacement with these weights.
    gaps = _first(-np.log(_uniform(random, len(places))) / places ** (task.power - 1), pairs)
    queries = 2 * pairs + 2 * gaps
    window = _unscored(_below(random, vocab_size, context))
    window["tokens"][0 : 2 * pairs : 2], window["tokens"][1 : 2 * pairs : 2] = keys, values
    window["tokens"][queries] = keys
    window["targets"][queries], window["weights"][queries] = values, 1
    return window


def _copying(task: RecallConfig, vocab_size: int, context: int, random: np.random.Philox) -> Batch:
    n = task.copy_length
    length = 2 * n + 1
    count = context // length
    begin, separator = vocab_size - 2, vocab_size - 1
    string = _below(random, vocab_size - 2, count * n).reshape(count, n)
    rows = np.full((count, length), begin)
    rows[:, 1 : n + 1], rows[:, n + 1], rows[:, n + 2 :] = string, separator, string[:, :-1]
    window = _unscored(np.zeros(context))
    used = count * length
    window["tokens"][:used] = rows.ravel()
    window["targets"][:used].reshape(count, length)[:, n + 1 :] = string
    window["weights"][:used].reshape(count, length)[:, n + 1 :] = 1
    window["segment_ids"][:used], window["segment_ids"][used:] = np.repeat(np.arange(1, count + 1), length), 0
    window["positions"][:used], window["positions"][used:] = np.tile(np.arange(length), count), 0
    return window


def _induction(task: RecallConfig, vocab_size: int, context: int, random: np.random.Philox) -> Batch:
    trigger = vocab_size - 1
    window = _unscored(_below(random, trigger, context))
    (place,) = _below(random, context - 2, 1)
    window["tokens"][[place, -1]] = trigger
    window["targets"][-1], window["weights"][-1] = window["tokens"][place + 1], 1
    return window


def _unscored(tokens: Shaped[np.ndarray, " context"]) -> Batch:
    """One segment of `tokens`, without an answer yet."""
    context = len(tokens)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.zeros(context, np.int32),
        "segment_ids": np.ones(context, np.int32),
        "positions": np.arange(context, dtype=np.int32),
        "weights": np.zeros(context, np.float32),
    }


def _below(random: np.random.Philox, bound: int, count: int) -> Int64[np.ndarray, " count"]:
    """Uniform integers in [0, bound), up to a bias of bound / 2^64."""
    return (random.random_raw(count) % np.uint64(bound)).astype(np.int64)


def _uniform(random: np.random.Philox, count: int) -> Float64[np.ndarray, " count"]:
    """Uniform numbers strictly between 0 and 1."""
    return ((random.random_raw(count) >> np.uint64(11)) + 0.5) * 2.0**-53


def _first(ranks: Shaped[np.ndarray, " n"], count: int) -> Int64[np.ndarray, " count"]:
    """The indices of the `count` smallest, smallest first."""
    chosen = np.argpartition(ranks, count - 1)[:count]
    return chosen[np.argsort(ranks[chosen])]
