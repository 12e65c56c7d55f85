"""Many processes as one run, on JAX's own runtime.

The processes agree in three ways, and none can wait for ever on one that is gone:

  start       `initialise`: SLURM, GKE and Cloud TPU are found from their environment, anything else by flags
  decisions   `decide`: process 0 does what only one may do (read a folder, remove a file); all get what came of it
  the end     JAX's heartbeat: a process that is silent for `HEARTBEAT` seconds ends the others, with a message
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from train.errors import UserError

HEARTBEAT = 30
"""Seconds of silence after which a process counts as dead; the others end within twice that."""

PATIENCE = 600
"""Seconds that a process waits for another's decision: longer than checksums of a large checkpoint take."""


FAREWELL = 10
"""Seconds that process 0 waits, when all end with an error, for the others to have said so."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of a run find each other.

    Attributes:
      automatic: from the environment that SLURM, GKE or Cloud TPU sets.
      coordinator: HOST:PORT of process 0, which must be free there.
      num_processes, process_id: with a coordinator.
    """

    automatic: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def take_flags(arguments: list[str]) -> tuple[Processes, list[str]]:
    """`--distributed auto|off` or `--coordinator HOST:PORT --num-processes N --process-id I`, and the other arguments.

    Raises:
      UserError: a flag without value, only some of the three, or numbers that do not fit one another.
    """
    names = ("distributed", "coordinator", "num-processes", "process-id")
    found: dict[str, str] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, separator, value = word.removeprefix("--").partition("=")
        flag = flag.replace("_", "-")
        if not word.startswith("--") or flag not in names:
            rest.append(word)
            continue
        if not separator:
            value = next(words, "")
        if not value or value.startswith("--"):
            raise UserError(f"--{flag}: expected a value after it")
        found[flag] = value
    mode = found.pop("distributed", "off")
    if mode not in ("auto", "off"):
        raise UserError(f"--distributed: expected auto or off, got {mode!r}; --coordinator names a cluster by hand")
    if not found:
        return Processes(automatic=mode == "auto"), rest
    if mode == "auto" or len(found) < 3:
        raise UserError(
            "give either --distributed auto or all of --coordinator, --num-processes and --process-id, "
            f"got {', '.join('--' + name for name in found)}"
        )
    try:
        count, index = int(found["num-processes"]), int(found["process-id"])
    except ValueError:
        raise UserError(
            f"--num-processes, --process-id: expected integers, got {found['num-processes']!r}, {found['process-id']!r}"
        ) from None
    host, _, port = found["coordinator"].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator: expected HOST:PORT, got {found['coordinator']!r}")
    if not 0 <= index < count:
        raise UserError(f"--process-id: expected 0 to {count - 1} for {count} processes, got {index}")
    return Processes(False, found["coordinator"], count, index), rest


def initialise(processes: Processes, *, timeout: int = 300) -> None:
    """Join the processes; before anything asks JAX for devices. Nothing happens for a single process.

    Raises:
      UserError: no cluster is found in the environment, or the others do not come within `timeout` seconds.
    """
    if not processes.automatic and processes.coordinator is None:
        return
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.num_processes,
            processes.process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except Exception as error:  # the runtime raises what its transport raises
        reason = " ".join(str(error).split())[:200]
        where = processes.coordinator or "the environment's coordinator"
        raise UserError(
            f"the processes of the run did not find each other through {where} ({type(error).__name__}: {reason}); "
            f"start all of them within {timeout} s, or name them by --coordinator, --num-processes and --process-id"
        ) from error


def is_main() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


_calls = itertools.count()


def decide(what: str, make: Callable[[], Any]) -> Any:
    """`make()` as process 0 finds it, on every process; its `UserError` is raised on every process too.

    Every process must come here, in the same order and from its main thread. The result is JSON.
    """
    if jax.process_count() == 1:
        return make()
    key = f"jattn/decide/{next(_calls)}/{what}"
    if is_main():
        try:
            answer = {"value": make()}
        except UserError as error:
            _client().key_value_set(key, json.dumps({"error": str(error)}))
            raise
        _client().key_value_set(key, json.dumps(answer))
        return answer["value"]
    try:
        answer = json.loads(_client().blocking_key_value_get(key, PATIENCE * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"process 0 did not answer within {PATIENCE} s ({what}); see its log, then start the run again"
        ) from error
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


@contextmanager
def together() -> Iterator[None]:
    """What all processes do together; when one is gone, this one ends at once, with a message and code 3.

    An orderly end would wait for the others at a barrier.
    """
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        _end(f"error: {error}", 2, after_the_others=True)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = " ".join(str(error).split())[:300]
        _end(
            f"error: process {jax.process_index()} of {jax.process_count()} cannot go on without the others "
            f"({reason}); start all of them again with the same command, and the run goes on from its last checkpoint",
            3,
        )


def _end(message: str, code: int, *, after_the_others: bool = False) -> None:
    """Print and exit. Process 0 holds what all read from, so it can wait until the others have said their word."""
    print(message, file=sys.stderr, flush=True)
    if after_the_others:
        with suppress(jax.errors.JaxRuntimeError):
            if is_main():
                deadline = time.monotonic() + FAREWELL
                for process in range(1, jax.process_count()):
                    left = max(deadline - time.monotonic(), 0.001)
                    _client().blocking_key_value_get(f"jattn/ended/{process}", int(left * 1000))
                time.sleep(0.5)  # from their word to their exit
            else:
                _client().key_value_set(f"jattn/ended/{jax.process_index()}", str(code))
    os._exit(code)


def _client() -> Any:
    # JAX has no public name for its key-value store; Orbax reaches it in the same way.
    from jax._src import distributed

    return distributed.global_state.client
