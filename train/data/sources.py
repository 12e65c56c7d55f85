"""Documents as bytes, and the split that holds some of them out.

A token is a byte, so the vocabulary is 0..255 and nothing needs to be learnt or downloaded before training. A document
is at least one byte of valid UTF-8; its boundary is marked by segment ids, not by a special token.

The held-out set is a function of the set of contents alone: order every distinct content by its hash and hold out the
first `ceil(holdout * count)`. Hence the order and the names of files do not matter, and two copies of a document are
always on the same side.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.errors import UserError

type Document = bytes

VOCABULARY = 256
EMBEDDED = "pydoc"
TEXT_SUFFIXES = (
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".pyi",
    ".tex",
    ".html",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".java",
    ".js",
    ".ts",
)
JSONL_SUFFIX = ".jsonl"


def embedded() -> tuple[tuple[str, Document], ...]:
    """CPython's own reference text, which every Python carries: (topic, UTF-8 bytes) pairs in the order of topics."""
    from pydoc_data.topics import topics

    return tuple((name, topics[name].encode()) for name in sorted(topics))


def read_documents(spec: str | Sequence[str], field: str = "text") -> tuple[Document, ...]:
    """All documents that `spec` names, in a fixed order.

    Args:
      spec: "pydoc" for the embedded text, or a file, a folder or a glob, or a sequence of these. A folder is walked in
        sorted order and gives its files with a suffix in `TEXT_SUFFIXES` or `.jsonl`, hidden ones left out; a file
        named outright or by a glob is read whatever its suffix. A file that several entries name is read once.
      field: the key that holds the text in a JSONL line.

    Returns:
      one document per text file and one per JSONL line (blank lines aside).

    Raises:
      UserError: nothing matches, an empty file or document, bytes that are not UTF-8, a line that is not a JSON object
        or lacks the field; the message names file, line and the fix.
    """
    specs = (spec,) if isinstance(spec, str) else tuple(spec)
    if not specs:
        raise UserError(
            f"no data is named; give files, folders, globs, or {EMBEDDED!r}, the embedded text (--data.source)"
        )
    if EMBEDDED in specs:
        if len(specs) > 1:
            raise UserError(
                f"{EMBEDDED!r} is the embedded text and stands alone; for a folder of that name write ./{EMBEDDED}"
            )
        return tuple(text for _, text in embedded())
    paths = dict.fromkeys(path for one in specs for path in _matches(one))
    return tuple(document for path in paths for document in _documents(path, field))


def split_by_document(
    documents: Sequence[Document], holdout: float = 0.1
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """The (training, held-out) documents, each in the order of `documents`; at least one distinct content on each side.

    Raises:
      UserError: `holdout` is not between 0 and 1, or there are fewer than two distinct documents.
    """
    if not 0 < holdout < 1:
        raise UserError(
            f"holdout: expected a fraction between 0 and 1, got {holdout}; 0.1 holds out a tenth of the documents"
        )
    contents = sorted(set(documents), key=_content_hash)
    if len(contents) < 2:
        raise UserError(
            f"{len(contents)} distinct document cannot be split into training and held-out ones; give more files, or "
            f"cut the text into several (in JSONL, one document per line)"
        )
    held = frozenset(contents[: min(math.ceil(holdout * len(contents)), len(contents) - 1)])
    return tuple(d for d in documents if d not in held), tuple(d for d in documents if d in held)


def _content_hash(document: Document) -> bytes:
    return hashlib.blake2b(document, digest_size=16).digest()


def _matches(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if path.is_file():
        return [path.resolve()]
    if path.is_dir():
        found = sorted(_walk(path))
        wanted = ", ".join((*TEXT_SUFFIXES, JSONL_SUFFIX))
        problem = (
            f"{spec}: the folder holds no file ending in {wanted}; name other files with a glob such as '{spec}/*'"
        )
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        problem = f"{spec}: no such file or folder, and no glob that matches a file; check the path"
    if not found:
        raise UserError(problem)
    return [path.resolve() for path in found]


def _walk(folder: Path) -> Iterator[Path]:
    for base, folders, names in folder.walk():
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith((*TEXT_SUFFIXES, JSONL_SUFFIX)):
                yield base / name


def _documents(path: Path, field: str) -> Iterator[Document]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions or leave it out") from error
    if not data.strip():
        raise UserError(f"{path}: the file is empty; remove it or leave it out")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the file with "
            f"`iconv -f latin1 -t utf-8` (or from what it is in), or leave it out"
        ) from error
    if path.suffix.lower() != JSONL_SUFFIX:
        yield data
        return
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 and its like, which are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _jsonl_text(f"{path}, line {number}", line, field)


def _jsonl_text(where: str, line: str, field: str) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: is not JSON ({error.msg} at column {error.colno}); one JSON object per line is wanted"
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with field {field!r}, got a {type(record).__name__}")
    if field not in record:
        present = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where}: has no field {field!r} (its fields: {present}); name the field that holds the text")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(
            f"{where}: field {field!r} holds a {type(text).__name__}; a string is wanted, name another field"
        )
    if not text:
        raise UserError(f"{where}: field {field!r} is empty; remove the line")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field!r} holds half a surrogate pair, which is no text; repair the line"
        ) from error
