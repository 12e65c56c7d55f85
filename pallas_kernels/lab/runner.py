"""Runs every case for every target in processes of their own, at most two at a time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallas_kernels.lab import worker
from pallas_kernels.lab.cases import Case

_PROCESSES = 2  # a compiler takes a core and a gibibyte or two
_SECONDS = 900.0


def run(source: str, cases: dict[str, dict[str, Case]], *, report: bool) -> Iterator[dict[str, Any]]:
    """Compile all `cases`, by target and name, and yield a row for each as it comes; one that failed has an `error`.

    Args:
      source: where the processes load the cases from again; see `cases.load`.
      report: read the schedules too; every case then has a process to itself, otherwise those of a target share two.
    """
    compilers: list[_Compiler] = []
    of_thread = threading.local()

    def compile_case(target: str, name: str) -> dict[str, Any]:
        compiler = getattr(of_thread, "compiler", None)
        if compiler is None or compiler.target != target or not compiler.is_alive or report:
            if compiler is not None:
                compiler.close()
            compiler = of_thread.compiler = _Compiler(source, target, report)
            compilers.append(compiler)
        return compiler.compile(name)

    pool = concurrent.futures.ThreadPoolExecutor(_PROCESSES)
    try:
        waiting = {
            pool.submit(compile_case, target, name): (target, name, case)
            for target, named in cases.items()
            for name, case in named.items()
        }
        for future in concurrent.futures.as_completed(waiting):
            target, name, case = waiting[future]
            about = {"target": target, "case": name, "note": case.note, "minimum_bytes": case.minimum_bytes}
            yield about | future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for compiler in compilers:
            compiler.close()


class _Compiler:
    """A process that compiles cases for `target` as they are asked for, one at a time."""

    def __init__(self, source: str, target: str, report: bool) -> None:
        self.target = target
        self.is_alive = True
        self._folder = tempfile.TemporaryDirectory(prefix="kernel-lab-")
        self._log = Path(self._folder.name, "log")
        self._read = 0
        dump = Path(self._folder.name, "dump")
        dump.mkdir()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", worker.__name__, source, target, str(dump) if report else ""],
                env=worker.environment(target, dump if report else None),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def compile(self, name: str) -> dict[str, Any]:
        """What the process found, or why it found nothing; then it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            self._process.kill()

        timer = threading.Timer(_SECONDS, give_up)
        timer.start()
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and its log says why
            print(name, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        timer.cancel()
        log = self._log.read_bytes()[self._read :].decode(errors="replace")
        self._read = self._log.stat().st_size
        if answer:
            return json.loads(answer)
        self.is_alive = False
        code = self._process.wait()
        if is_late.is_set():
            return {"error": f"took longer than {_SECONDS:g} s"}
        lines = log.strip().splitlines() or ["it said nothing"]
        fatal = [line for line in lines if re.match(r"F\d{4} |Fatal|.*Check fail", line)]
        return {"error": f"the compiler's process ended with code {code}: {(fatal or lines[-1:])[0][:400]}"}

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()
