"""Sealed checkpoints: arrays written by Orbax in the background, then a manifest of checksums as the last thing.

    DIR/step_00000123/state/           the arrays, as Orbax writes them (one flat dictionary, path -> array)
    DIR/step_00000123/checkpoint.json  step, shape and dtype of every array, and the caller's JSON
    DIR/step_00000123/MANIFEST.json    size and CRC-32 of every other file: the seal

A folder is a checkpoint if and only if its manifest is there and agrees with every byte. The manifest is written when
all else is on disk, into a temporary file that is then renamed, so it is there whole or not at all. What a process
leaves that dies

  before the write    no new folder; the previous checkpoint is untouched
  during the write    a folder without manifest: unfinished, never read; `clean` or the next save of the step removes it
  before the seal     the same: complete, but nothing says so
  during the seal     the same, with a temporary file beside the files; the rename is the one moment that counts
  before pruning      one checkpoint too many, which the next pruning takes
  during pruning      an unfinished folder, for a manifest is deleted before the files it vouches for

Pruning comes only after a newer checkpoint has been sealed, so at each of these moments the newest sealed one is
whole. One save is in flight at a time: the second starts when the first is sealed. Hence a single folder without a
manifest may be a first save that was cut off, where starting anew loses nothing; several folders of which none is valid
mean damage, and that is an error rather than a restart.

The state is any pytree of JAX arrays. It is stored by path ("params/blocks/0/kernel"), so that a missing, extra,
reshaped or recast parameter is refused by name, and so that containers (optax's NamedTuples) are no part of the format.
A typed random key is stored as the integers in it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp

from jattn.checks import check_count
from train import distributed
from train.errors import UserError

MANIFEST = "MANIFEST.json"
HEADER = "checkpoint.json"
ARRAYS = "state"
PREFIX = "step_"
CHUNK = 4 * 2**20
ORBAX_PATIENCE = 7 * 86400
CHECKSUM_THREADS = min(8, os.cpu_count() or 1)


class Checkpoints:
    """The checkpoints in one folder.

    Args:
      directory: created by the first save.
      keep: how many of the newest stay.
      say: receives one line for everything skipped or removed.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 3, say: Callable[[str], None] = print) -> None:
        self.directory = Path(directory).absolute()
        self._keep = check_count("keep", keep)
        self._say = say
        self._checked: set[int] = set()
        self._damaged: set[int] = set()
        self._last: int | None = None
        self._kept_also: int | None = None
        self._sealing: Future[None] | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any], *, keep_also: int | None = None, wait: bool = False
    ) -> None:
        """Write `state` and `extra` as the checkpoint of `step`.

        Returns when the arrays have been copied off the devices, so that they may be donated; the rest happens in the
        background. A save that is still running is waited for first. Saving again the step just saved or restored does
        nothing.

        Args:
          step: at least 0.
          state: a pytree of JAX arrays.
          extra: JSON that comes back from `restore`.
          keep_also: a step that stays although it is not among the newest, such as the best so far.
          wait: return only when the checkpoint is sealed.

        Raises:
          UserError: this write, or the one before it, failed (nothing incomplete is ever sealed); a valid checkpoint of
            this step exists.
        """
        step = check_count("step", step, minimum=0)
        self._wait_together()
        self._kept_also = keep_also
        if step == self._last:
            return
        leaves = _flatten(state)
        arrays = {path: _as_data(leaf) for path, leaf in leaves.items()}
        header = {"step": step, "arrays": {path: _describe(x) for path, x in leaves.items()}, "extra": dict(extra)}
        text = json.dumps(header, indent=1)
        folder = self._folder(step)
        try:
            distributed.decide("checkpoint begun", lambda: self._begin(folder, text))
            _write_arrays(self._orbax(), folder / ARRAYS, arrays)
        except OSError as error:
            raise self._failed(step, error) from error
        self._last = step
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._sealing = self._worker.submit(self._seal, step)
        if wait:
            self._wait_together()

    def wait(self) -> None:
        """Wait for the save in flight, if any, and raise here what went wrong in it."""
        if self._sealing is not None:
            try:
                self._sealing.result()
            finally:  # an interrupt while waiting leaves the save in flight
                if self._sealing.done():
                    self._sealing = None

    def _wait_together(self) -> None:
        if not distributed.is_main():
            self.wait()
        distributed.decide("checkpoint sealed", self.wait)

    def close(self) -> None:
        """`wait`, then end the threads; idempotent."""
        try:
            self.wait()
        finally:
            if self._worker is not None:
                self._worker.shutdown()
                self._worker = None
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def latest(self) -> int | None:
        """The newest step that is sealed and agrees with its checksums, or `None` where nothing was ever sealed.

        Says why each newer folder was skipped. Nothing is changed, so it may run beside the process that writes. Of
        many processes the first reads, and all have its answer.

        Raises:
          UserError: there are checkpoints and none is valid.
        """
        step = distributed.decide("newest checkpoint", self._latest)
        if step is not None:
            self._checked.add(step)
        return step

    def _latest(self) -> int | None:
        steps = self._steps()
        for step in reversed(steps):
            problem = find_damage(self._folder(step))
            if problem is None:
                return step
            self._damaged.add(step)
            self._say(f"skipped {self._folder(step)}: {problem}")
        if len(steps) > 1 or (steps and self._is_sealed(steps[0])):
            raise UserError(
                f"{self.directory}: none of its {len(steps)} checkpoints is valid; "
                f"bring one back from a backup, or start the run in another folder"
            )
        return None

    def clean(self) -> None:
        """Remove what unfinished writes have left. For the run that writes here, and after `latest`."""
        distributed.decide("checkpoints cleaned", self._clean)

    def _clean(self) -> None:
        for step in self._steps():
            if not self._is_sealed(step):
                self._say(f"removed {self._folder(step)}: unfinished, it was cut off before its seal")
                shutil.rmtree(self._folder(step))

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the extra JSON of `step`.

        Args:
          step: as from `latest`.
          like: the wanted pytree, of `jax.ShapeDtypeStruct` or of arrays, whose shardings are taken (without one, the
            default device); the mesh may differ from the one that saved.

        Raises:
          UserError: no such checkpoint, a damaged one, or arrays missing, left over, or of another shape or dtype.
        """
        folder = self._folder(step)
        if step not in self._checked:
            problem = find_damage(folder) if folder.is_dir() else f"no such step, there are {self._steps()}"
            if problem is not None:
                raise UserError(f"checkpoint {folder} cannot be restored: {problem}")
            self._checked.add(step)
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        wanted = _flatten(like)
        _check_agreement(folder, header["arrays"], {path: _describe(x) for path, x in wanted.items()})
        stored = _read_arrays(self._orbax(), folder / ARRAYS, {path: _target(leaf) for path, leaf in wanted.items()})
        leaves = [_from_data(stored[path], leaf) for path, leaf in wanted.items()]
        self._last = step
        return jax.tree.unflatten(jax.tree.structure(like), leaves), header["extra"]

    def _seal(self, step: int) -> None:
        folder = self._folder(step)
        try:
            self._writer.wait_until_finished()
            if not distributed.is_main():
                return
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in files:
                _sync(path)
            for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
                _sync(path)
            _write_synced(folder / MANIFEST, manifest(folder, [path.relative_to(folder).as_posix() for path in files]))
            _sync(self.directory)
            self._prune(step)
        except Exception as error:
            self._last = None
            raise self._failed(step, error) from error

    def _prune(self, newest: int) -> None:
        # Damaged ones must not count as kept, nor those beyond the step just sealed, which this run has yet to reach.
        self._damaged.discard(newest)
        sealed = [step for step in self._steps() if step <= newest and self._is_sealed(step)]
        valid = [step for step in sealed if step not in self._damaged]
        for step in sorted(set(sealed) - {*valid[-self._keep :], *({self._kept_also} & {*valid})}):
            try:
                _remove(self._folder(step))
            except OSError as error:
                self._say(f"{self._folder(step)} is no longer needed, and could not be removed ({error})")

    def _begin(self, folder: Path, header: str) -> None:
        try:
            self._make_way(folder)
            folder.mkdir(parents=True)
            _write_synced(folder / HEADER, header)
        except OSError as error:
            raise self._failed(int(folder.name.removeprefix(PREFIX)), error) from error

    def _make_way(self, folder: Path) -> None:
        """Remove an unfinished or damaged folder that stands where this save goes."""
        if not folder.is_dir():
            return
        problem = find_damage(folder)
        if problem is None:
            raise UserError(f"{folder} is a valid checkpoint and is not overwritten; resume from it or remove it")
        self._say(f"replaced {folder}: {problem}")
        _remove(folder)

    def _failed(self, step: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:300]
        last = max((s for s in self._steps() if self._is_sealed(s)), default=None)
        kept = "no checkpoint was sealed before" if last is None else f"the last sealed checkpoint is step {last}"
        return UserError(
            f"the checkpoint of step {step} could not be written to {self.directory} "
            f"({type(error).__name__}: {reason}); {kept}; free some space or mend the permissions, then start again"
        )

    def _folder(self, step: int) -> Path:
        return self.directory / f"{PREFIX}{step:08d}"

    def _steps(self) -> list[int]:
        """Every step that has a folder, sealed or not, ascending."""
        if not self.directory.is_dir():
            return []
        names = (path.name.removeprefix(PREFIX) for path in self.directory.glob(f"{PREFIX}*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def _is_sealed(self, step: int) -> bool:
        return (self._folder(step) / MANIFEST).exists()

    def _orbax(self) -> Any:
        if self._writer is None:
            import orbax.checkpoint as ocp

            # Everything they would report reaches the user as an exception; their logs repeat that with tracebacks.
            _drop_late_reports()
            for name in ("absl", "asyncio"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            # Orbax takes its patience by the wall clock, which may be set forward by hours. Folders that it makes in
            # the background have a patience of their own, which cannot be set.
            patient = ocp.AsyncOptions(timeout_secs=ORBAX_PATIENCE, create_directories_asynchronously=False)
            # Floats barely compress (8 % here), at twice the processor time.
            handler = ocp.PyTreeCheckpointHandler(use_compression=False)
            self._writer = ocp.AsyncCheckpointer(handler, async_options=patient)
        return self._writer


def manifest(folder: Path, names: list[str]) -> str:
    """The manifest of `names` in `folder`: sizes, and the CRC-32 of each 4 MiB piece; a function of the bytes alone.

    CRC-32 finds every flipped bit and every burst up to 32 bits, and a random change but for one in 2^32; it runs at
    several GB/s where a cryptographic hash does not reach one. Nobody is expected to forge a checkpoint.
    """
    sizes = {name: (folder / name).stat().st_size for name in names}
    pieces = [(name, start) for name in names for start in range(0, max(sizes[name], 1), CHUNK)]
    local = threading.local()

    def checksum(piece: tuple[str, int]) -> str:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(CHUNK))
        name, start = piece
        with open(folder / name, "rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < CHUNK and (count := file.readinto(local.buffer[done:])):
                done += count
        return f"{zlib.crc32(local.buffer[:done]):08x}"

    with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
        sums = list(pool.map(checksum, pieces))
    files: dict[str, dict[str, Any]] = {name: {"bytes": sizes[name], "crc32": ""} for name in names}
    for (name, _), text in zip(pieces, sums, strict=True):
        files[name]["crc32"] = f"{files[name]['crc32']} {text}".strip()
    return json.dumps({"format": 1, "piece_bytes": CHUNK, "files": files}, indent=1, sort_keys=True)


def find_damage(folder: Path) -> str | None:
    """Why `folder` is no valid checkpoint, or `None`: its manifest is made anew and compared with it byte for byte."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        listed = {str(name): (entry["bytes"], entry["crc32"]) for name, entry in json.loads(text)["files"].items()}
        for name, (size, _) in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
        found = manifest(folder, list(listed))
    except FileNotFoundError:
        return f"unfinished, it has no {MANIFEST}"
    except OSError as error:
        return f"it cannot be read ({error})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged, it is no list of files"
    for name, entry in json.loads(found)["files"].items():
        if entry["crc32"] != listed[name][1]:
            return f"{name} has another checksum than when it was sealed"
    return None if found == text and HEADER in listed else f"{MANIFEST} was altered"


def _remove(folder: Path) -> None:
    """Unseal first: a deletion that is cut off must leave an unfinished checkpoint, not a sealed one with holes."""
    (folder / MANIFEST).unlink(missing_ok=True)
    _sync(folder)
    shutil.rmtree(folder)


@functools.cache
def _drop_late_reports() -> None:
    """After a failed write, its other pieces report to an event loop that is closed, or are never awaited.

    Their error has reached the user by then, as an exception of the save that they belong to.
    """
    before = sys.unraisablehook

    def hook(report: Any) -> None:
        late = str(report.exc_value)
        if not isinstance(report.exc_value, RuntimeError | RuntimeWarning) or not (
            late == "Event loop is closed" or (late.startswith("coroutine ") and late.endswith("was never awaited"))
        ):
            before(report)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _write_synced(path: Path, text: str) -> None:
    """The file appears under its name whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Orbax is imported where it is used: it takes half as long to load as jax, and `--help` does without.


def _write_arrays(writer: Any, folder: Path, arrays: dict[str, jax.Array]) -> None:
    from orbax.checkpoint import args

    writer.save(folder, args=args.PyTreeSave({path: x for path, x in arrays.items() if x.size}))


def _read_arrays(writer: Any, folder: Path, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    from orbax.checkpoint import args, checkpoint_utils

    # Orbax refuses arrays without elements; they have no bits to keep.
    empty = {path: jnp.zeros(x.shape, x.dtype, device=x.sharding) for path, x in targets.items() if not x.size}
    stored = {path: x for path, x in targets.items() if x.size}
    arguments = checkpoint_utils.construct_restore_args(stored)
    return empty | writer.restore(folder, args=args.PyTreeRestore(stored, arguments))


def _flatten(tree: Any) -> dict[str, Any]:
    """Path -> leaf, such as "opt_state/0/mu/kernel"."""
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path in flat:
            raise ValueError(f"state: two leaves have the path {path!r}; rename one of the keys")
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            raise TypeError(f"state: {path!r} is a {type(leaf).__name__}; make it a jax.Array, or pass it in extra")
        flat[path] = leaf
    return flat


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _as_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _from_data(data: jax.Array, leaf: Any) -> jax.Array:
    if not _is_key(leaf):
        return data
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(jnp.empty(0, leaf.dtype)))


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """What to restore for `leaf`; the trailing dimension of a key's integers is never sharded."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    data = jax.eval_shape(_as_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _describe(x: Any) -> str:
    """Dtype and shape, such as "float32[3,5]"."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def _check_agreement(folder: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    problems = [f"{path} is missing" for path in wanted if path not in found]
    problems += [f"{path} is left over" for path in found if path not in wanted]
    problems += [
        f"{path} is {found[path]}, wanted {wanted[path]}"
        for path in wanted
        if path in found and found[path] != wanted[path]
    ]
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(
            f"{folder} does not fit this model and optimiser: {listed}; "
            f"restore it with the configuration that wrote it, or start in another folder"
        )
