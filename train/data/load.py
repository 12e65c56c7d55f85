"""From a configuration to what a run reads: the endless training windows, and the sets that it is scored on.

    text:    documents -> split -> tokens -> windows (of one text, or of several mixed by weight)
    recall:  windows made from their index

The held-out part is the set "held_out"; `data.eval_sets` adds others by name, scored whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from train.config import DataConfig, RunConfig
from train.data.packing import Batch, EvalWindows, PackedWindows, Tokens, Windows, eval_windows
from train.data.pipeline import MixedWindows, rows_of
from train.data.sources import Document, read_documents, split_by_document
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.errors import UserError
from train.tasks import HELD_OUT

RECALL_HELD_OUT = 256
"""Sequences that a synthetic task is scored on."""

OWN_NAMES = (HELD_OUT, "val")
"""No further set is called so: the run's own, and what its figures begin with in metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """Windows to score.

    Attributes:
      windows: in a fixed order.
      bytes: of text behind the tokens that are scored; `None` for synthetic ones, which have no text.
    """

    windows: Sequence[Batch]
    bytes: int | None


@dataclasses.dataclass(frozen=True)
class RunData:
    """Everything a run reads.

    Attributes:
      windows: to train on.
      evaluation: sets by name, `HELD_OUT` first.
      tokenizer: between text and ids; `None` for a synthetic task.
      tokens_per_byte: of the training text; 1 for a synthetic task.
      training, held_out: the documents, for compressors to be measured on; empty for a synthetic task.
      others: the documents of the further sets, by name.
    """

    windows: Windows
    evaluation: Mapping[str, EvalSet]
    tokenizer: Tokenizer | None
    tokens_per_byte: float = 1.0
    training: Sequence[Document] = ()
    held_out: Sequence[Document] = ()
    others: Mapping[str, Sequence[Document]] = dataclasses.field(default_factory=dict)

    def identity(self) -> str:
        """What a run is scored on: figures of different texts must not be one curve."""
        digest = hashlib.blake2b(digest_size=16)
        named = ((name.encode(), *documents) for name, documents in self.others.items())
        for piece in itertools.chain(self.held_out, *named):
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)
        return digest.hexdigest()

    @property
    def described(self) -> str:
        """For the first line of a run."""
        if not self.training:
            return "a synthetic task"
        size = sum(map(len, self.training))
        return f"{len(self.training)} documents to train on ({size:,} bytes), {len(self.held_out)} held out"


def load_data(config: RunConfig, workdir: Path) -> RunData:
    """What a run of `config` in `workdir` reads; a tokenizer that is trained for it is kept in `workdir`.

    Raises:
      UserError: data that cannot be read, split or encoded; the message names the file or option.
    """
    data, vocabulary = config.data, config.model.vocab_size
    if data.recall.task is not None:
        from train.data.recall import RecallWindows

        made = RecallWindows(data.recall, vocabulary, data.context, config.seed)
        held_out = EvalSet(rows_of(made.held_out(RECALL_HELD_OUT)), None)
        return RunData(made, {HELD_OUT: held_out}, None)
    sources = _sources(data)
    sides = [split_by_document(read_documents(source, data.field), data.holdout) for source in sources]
    held_out_documents = tuple(document for _, side in sides for document in side)
    # Each source is split by itself, so what one holds out may be in another too.
    held = frozenset(held_out_documents)
    sides = [(tuple(document for document in side if document not in held), out) for side, out in sides]
    training = tuple(document for side, _ in sides for document in side)
    tokenizer = load_tokenizer(data.tokenizer, workdir, training, vocabulary)
    encoded = [tokenizer.encode_batch(side) for side, _ in sides]
    ratio = sum(len(tokens) for side in encoded for tokens in side) / sum(map(len, training))
    parts = [PackedWindows(side, data.context, config.seed) for side in encoded]
    windows: Windows = MixedWindows(parts, data.weights) if data.weights else parts[0]
    evaluation = {HELD_OUT: text_set(held_out_documents, tokenizer, data.context, "data.holdout")}
    others = {name: read_documents(source, data.field) for name, source in eval_sources(data)}
    for name, texts in others.items():
        evaluation[name] = text_set(texts, tokenizer, data.context, f"data.eval_sets: {name}")
    return RunData(windows, evaluation, tokenizer, ratio, training, held_out_documents, others)


def text_set(documents: Sequence[Document], tokenizer: Tokenizer, context: int, where: str) -> EvalSet:
    """The documents as windows that score all of their tokens but the first."""
    if max(map(len, documents), default=0) < 2:
        raise UserError(f"{where}: no document has a token to score; give longer documents, or hold out more")
    tokens: Sequence[Tokens] = tokenizer.encode_batch(documents)
    windows: EvalWindows = eval_windows(tokens, context)
    scored = sum(len(d) - len(tokenizer.decode(t[:1])) for d, t in zip(documents, tokens, strict=True))
    return EvalSet(windows, scored)


def eval_sources(data: DataConfig) -> list[tuple[str, tuple[str, ...]]]:
    """`data.eval_sets` as (name, sources)."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for entry in data.eval_sets:
        name, separator, where = entry.partition("=")
        if not separator or not where or not name.isidentifier() or name in OWN_NAMES:
            raise UserError(
                f"data.eval_sets: expected name=files, as in books=books/*.jsonl, got {entry!r}"
                + (f" ({name} is a name of the run's own)" if name in OWN_NAMES else "")
            )
        if name in dict(found):
            raise UserError(f"data.eval_sets: two are called {name}; give one all files, separated by commas")
        found.append((name, tuple(where.split(","))))
    return found


def _sources(data: DataConfig) -> list[tuple[str, ...]]:
    """What becomes one text each: with weights every source, without them all together."""
    return [(source,) for source in data.source] if data.weights else [data.source]
