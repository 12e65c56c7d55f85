"""Runs every case for every target, each in a process of its own, at most two at a time."""

from __future__ import annotations

import concurrent.futures
import json
import re
import subprocess
import sys
import tempfile
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
      report: read the schedules too.
    """
    running: list[subprocess.Popen] = []
    pool = concurrent.futures.ThreadPoolExecutor(_PROCESSES)
    try:
        waiting = {
            pool.submit(_process, running, source, target, name, report): (target, name, case)
            for target, named in cases.items()
            for name, case in named.items()
        }
        for future in concurrent.futures.as_completed(waiting):
            target, name, case = waiting[future]
            about = {"target": target, "case": name, "note": case.note, "minimum_bytes": case.minimum_bytes}
            yield about | future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.kill()


def _process(running: list[subprocess.Popen], source: str, target: str, name: str, report: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="kernel-lab-") as folder:
        dump, result, log = Path(folder, "dump"), Path(folder, "result.json"), Path(folder, "log")
        dump.mkdir()
        command = [
            sys.executable,
            "-m",
            worker.__name__,
            source,
            target,
            name,
            str(dump) if report else "",
            str(result),
        ]
        environment = worker.environment(target, dump if report else None)
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            running.append(process)
            try:
                code = process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                return {"error": f"took longer than {_SECONDS:g} s"}
            finally:
                process.kill()
                process.wait()
                running.remove(process)
        if result.exists():
            return json.loads(result.read_text())
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        fatal = [line for line in lines if re.match(r"F\d{4} |Fatal|.*Check fail", line)]
        return {"error": f"the compiler's process ended with code {code}: {(fatal or lines[-1:])[0][:400]}"}
