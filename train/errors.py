"""The one exception for what a person can fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake in files, options or folders: its one-line message says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


@contextmanager
def user_errors(where: str) -> Iterator[None]:
    """What the library refuses in here came from a person's options or files: it becomes a one-line `UserError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A full disk, or a folder that became read-only, is a `UserError`: the same command goes on when it is mended."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror or error}); free some space or mend the permissions, "
            "then start again"
        ) from error
