"""One run at a time in a workdir: a lock of the operating system's, which ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.errors import UserError


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Hold `workdir` for this process; the file `lock` in it says for whom.

    Raises:
      UserError: another process holds it, or the file cannot be made.
    """
    path = workdir / "lock"
    try:
        file = open(path, "a+")  # noqa: SIM115, open as long as it is locked
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); choose another --workdir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{workdir}: a run is going on there ({holder}); wait for it or choose another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
