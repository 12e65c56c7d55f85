"""Text to token ids and back: bytes, or byte-level BPE of the `tokenizers` library.

A document comes back as it was, byte for byte: ids stand for pieces of UTF-8, nothing is normalised, and text that
looks like a special token is text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.data.sources import VOCABULARY, Document
from train.errors import UserError

FILE = "tokenizer.json"
TRAIN = "train"


class Tokenizer(Protocol):
    """Between UTF-8 and token ids.

    Attributes:
      vocab_size: ids are below it.
    """

    vocab_size: int

    def encode(self, text: Document) -> np.ndarray:
        """The ids of one document."""

    def encode_batch(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """The ids of each document."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; not always whole characters."""


class ByteTokenizer:
    """A token is a byte."""

    vocab_size = VOCABULARY

    def encode(self, text: Document) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def encode_batch(self, documents: Sequence[Document]) -> list[np.ndarray]:
        return [self.encode(document) for document in documents]

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(int(token) for token in ids)


class BPETokenizer:
    """A byte-level tokenizer.json.

    Args:
      tokenizer: of the `tokenizers` library.
      where: the file, for messages.
    """

    def __init__(self, tokenizer: Any, where: Path | str) -> None:
        self._tokenizer = tokenizer
        self._where = where
        # "<s>" in a text is three characters, not the start of one.
        tokenizer.encode_special_tokens = True
        self.vocab_size = tokenizer.get_vocab_size()
        table = {letter: byte for byte, letter in enumerate(_byte_letters())}
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self._pieces: dict[int, bytes] = {}
        for piece, token in tokenizer.get_vocab().items():
            if piece in added:
                self._pieces[token] = piece.encode()
            elif not {*piece} <= table.keys():
                raise UserError(
                    f"{where}: its token {piece!r} is not made of byte letters, so text would not come back as it was; "
                    f'give a byte-level tokenizer (GPT-2, Llama 3, ...), or "{TRAIN}" one from the text'
                )
            else:
                self._pieces[token] = bytes(table[letter] for letter in piece)
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: Document) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, documents: Sequence[Document]) -> list[np.ndarray]:
        texts = [document.decode() for document in documents]
        found = [
            np.array(encoding.ids, self._dtype)
            for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
        for document, ids in zip(documents, found, strict=True):
            if self.decode(ids) != document:
                start = document[:40].decode(errors="replace")
                raise UserError(
                    f"{self._where}: a text does not come back as it was (it starts with {start!r}); a tokenizer that "
                    f'normalises or leaves out characters cannot be used, "{TRAIN}" makes one that does neither'
                )
        return found

    def decode(self, ids: Iterable[int]) -> bytes:
        # A model whose vocabulary is rounded up may choose an id that stands for nothing.
        return b"".join(self._pieces.get(int(token), b"") for token in ids)


def load_tokenizer(
    spec: str | None, workdir: Path, training: Sequence[Document] | None, vocab_size: int
) -> ByteTokenizer | BPETokenizer:
    """The tokenizer of a run.

    Args:
      spec: `None` for bytes, a tokenizer.json, or "train".
      workdir: where the one that is used is kept, so that a run has the same one for ever.
      training: what "train" trains on when the workdir has none yet; `None` if it must have one.
      vocab_size: of the model.

    Raises:
      UserError: no such file, no byte-level tokenizer, or more tokens than the model has.
    """
    if spec is None:
        return ByteTokenizer()
    kept = workdir / FILE
    if not kept.exists():
        if spec == TRAIN:
            if training is None:
                raise UserError(f"{kept}: is missing, and without it the run's tokens mean nothing; bring it back")
            text = _train(training, vocab_size)
        else:
            text = _read(Path(spec).expanduser())
        draft = kept.with_suffix(".tmp")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, kept)
    elif spec != TRAIN and (given := Path(spec).expanduser()).exists() and _hash(_read(given)) != _hash(_read(kept)):
        raise UserError(f"data.tokenizer: {spec} is not the one that this run began with, which is {kept}")
    found = BPETokenizer(_parse(kept), kept)
    if found.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer: {spec} has {found.vocab_size} tokens and the model {vocab_size}; "
            f"give --model.vocab-size {found.vocab_size} or more"
        )
    return found


def _train(documents: Sequence[Document], vocab_size: int) -> str:
    """JSON of a byte-level BPE with at most `vocab_size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < VOCABULARY:
        raise UserError(f"model.vocab_size: a tokenizer needs at least the {VOCABULARY} bytes, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((document.decode() for document in documents), trainer)
    return tokenizer.to_str()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(
            f'data.tokenizer: {path} cannot be read ({reason}); give a tokenizer.json, or "{TRAIN}"'
        ) from error


def _parse(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(_read(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: is no tokenizer.json ({' '.join(str(error).split())[:120]})") from error


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE (Radford et al. 2019): itself where it prints."""
    prints = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]
