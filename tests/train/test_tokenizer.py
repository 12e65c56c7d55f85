"""Text to ids and back: every document returns as it was, and a run keeps the tokenizer it began with."""

from __future__ import annotations

import codecs
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from train.data.sources import read_documents
from train.data.tokenizer import FILE, BPETokenizer, ByteTokenizer, load_tokenizer
from train.errors import UserError

ROOT = Path(__file__).parents[2]
DOCUMENTS = read_documents("pydoc")[:12]
VOCABULARY = 300


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> BPETokenizer:
    found = load_tokenizer("train", tmp_path_factory.mktemp("trained"), DOCUMENTS, VOCABULARY)
    assert isinstance(found, BPETokenizer)
    return found


def text_of(trained: BPETokenizer) -> str:
    return trained._tokenizer.to_str()


def write(path: Path, *, special: str | None = None, normalise: bool = False, pieces: tuple[str, ...] = ()) -> Path:
    """A byte-level tokenizer.json without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*letters, *pieces])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalise:
        tokenizer.normalizer = normalizers.Lowercase()
    if special is not None:
        tokenizer.add_special_tokens([special])
    tokenizer.save(str(path))
    return path


@settings(deadline=None, max_examples=200)
@given(st.text())
@example("")
@example("\r\n\t \u00a0\u2003  ")
@example("<s></s><|endoftext|>[UNK]")
@example("e\u0301 \u00e9 \ufeff \U0001f468\u200d\U0001f469\u200d\U0001f467 \x00\x7f")
def test_a_document_comes_back_as_it_was(trained, text):
    document = text.encode()
    for tokenizer in (ByteTokenizer(), trained):
        ids = tokenizer.encode(document)
        assert np.issubdtype(ids.dtype, np.unsignedinteger)
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.decode(ids) == document


def test_a_byte_is_its_own_token():
    tokenizer = ByteTokenizer()
    every = bytes(range(256))
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode(every).tolist() == list(range(256))
    assert tokenizer.decode(range(256)) == every


def test_training_makes_text_shorter_within_the_vocabulary(trained):
    assert trained.vocab_size == VOCABULARY
    encoded = trained.encode_batch(DOCUMENTS)
    assert sum(map(len, encoded)) < 0.75 * sum(map(len, DOCUMENTS))
    assert max(int(ids.max()) for ids in encoded) < VOCABULARY
    for document, ids in zip(DOCUMENTS, encoded, strict=True):
        np.testing.assert_array_equal(ids, trained.encode(document))


def test_characters_appear_when_their_last_byte_does(trained):
    text = "naïve 日本語 \U0001f600!"
    decoder = codecs.getincrementaldecoder("utf-8")()
    shown = [decoder.decode(trained.decode([token])) for token in trained.encode(text.encode())]
    assert "".join(shown) == text
    assert "" in shown  # some token is less than a character


def test_what_looks_special_is_text(tmp_path):
    path = write(tmp_path / "given.json", special="<s>")
    plain = Tokenizer.from_file(str(path))
    assert len(plain.encode("a<s>b").ids) == 3  # what the library would do
    tokenizer = load_tokenizer(str(path), tmp_path, None, 1000)
    ids = tokenizer.encode(b"a<s>b")
    assert len(ids) == 5
    assert tokenizer.decode(ids) == b"a<s>b"
    assert tokenizer.vocab_size == 257
    assert tokenizer.decode([256]) == b"<s>"
    assert tokenizer.decode([999]) == b""


def test_training_is_deterministic_across_processes(trained, tmp_path):
    source = (
        "import sys; from pathlib import Path; from train.data.sources import read_documents; "
        "from train.data.tokenizer import load_tokenizer; "
        f"load_tokenizer('train', Path(sys.argv[1]), read_documents('pydoc')[:12], {VOCABULARY})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", source, str(tmp_path)], env=environment, check=True)
    assert json.loads((tmp_path / FILE).read_text()) == json.loads(text_of(trained))


def test_a_run_keeps_its_tokenizer(tmp_path):
    first = load_tokenizer("train", tmp_path, DOCUMENTS, VOCABULARY)
    kept = (tmp_path / FILE).read_bytes()
    assert os.listdir(tmp_path) == [FILE]
    # Other text, as after new files came into a folder: the ids keep their meaning.
    again = load_tokenizer("train", tmp_path, [b"entirely other text"], VOCABULARY)
    assert (tmp_path / FILE).read_bytes() == kept
    np.testing.assert_array_equal(again.encode(DOCUMENTS[0]), first.encode(DOCUMENTS[0]))
    load_tokenizer("train", tmp_path, None, VOCABULARY)
    (tmp_path / FILE).unlink()
    with pytest.raises(UserError, match="without it the run's tokens mean nothing; bring it back"):
        load_tokenizer("train", tmp_path, None, VOCABULARY)


def test_a_given_tokenizer_is_copied_and_may_not_change(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "mine.json")
    workdir = tmp_path / "run"
    workdir.mkdir()
    for spec in (str(path), str(path), "~/mine.json"):
        assert load_tokenizer(spec, workdir, DOCUMENTS, 256).vocab_size == 256
    assert (workdir / FILE).read_text() == path.read_text()
    write(path, pieces=("ab",))
    with pytest.raises(UserError, match=r"mine.json is not the one that this run began with, which is .*run/tok"):
        load_tokenizer("~/mine.json", workdir, DOCUMENTS, 300)
    path.unlink()
    assert load_tokenizer(str(path), workdir, None, 256).vocab_size == 256


def test_no_tokenizer_leaves_no_file(tmp_path):
    assert isinstance(load_tokenizer(None, tmp_path, DOCUMENTS, 256), ByteTokenizer)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("content", "vocab_size", "message"),
    [
        (None, 300, r"given.json cannot be read \(No such file or directory\); give a tokenizer.json"),
        (b"\xff\xfe", 300, r"given.json cannot be read \(it is no text\)"),
        (b"{}", 300, r"tokenizer.json: is no tokenizer.json"),
        (write, 255, r"has 256 tokens and the model 255; give --model.vocab-size 256 or more"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, vocab_size, message):
    path = tmp_path / "given.json"
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(path), tmp_path, DOCUMENTS, vocab_size)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_must_hold_the_bytes(tmp_path):
    with pytest.raises(UserError, match=r"model.vocab_size: a tokenizer needs at least the 256 bytes, got 255"):
        load_tokenizer("train", tmp_path, DOCUMENTS, 255)
    assert not os.listdir(tmp_path)


def test_tokens_that_are_not_bytes(tmp_path):
    # U+2581 for a space, as SentencePiece has it.
    path = write(tmp_path / "given.json", pieces=("\u2581the",))
    with pytest.raises(UserError, match="is not made of byte letters"):
        load_tokenizer(str(path), tmp_path, None, 300)


def test_text_that_would_come_back_changed_is_refused(tmp_path):
    path = write(tmp_path / "given.json", normalise=True)
    tokenizer = load_tokenizer(str(path), tmp_path, None, 300)
    assert tokenizer.decode(tokenizer.encode(b"small")) == b"small"
    with pytest.raises(UserError, match=r"a text does not come back as it was \(it starts with 'Capital'"):
        tokenizer.encode_batch([b"small", b"Capital"])
