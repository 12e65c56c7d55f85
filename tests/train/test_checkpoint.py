"""Sealed checkpoints: bits come back, damage is found, and a process may die at any moment."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import checkpoint
from train.checkpoint import HEADER, MANIFEST, Checkpoints, find_damage
from train.errors import UserError

ROOT = Path(__file__).parents[2]


def make_state(step: int = 0):
    """Every dtype a run holds, scalars, empty nodes and the containers of optax."""
    k = jax.random.key(step)
    params = {
        "embed": jax.random.normal(k, (7, 5)),
        "blocks": [{"kernel": jax.random.normal(k, (5, 3), jnp.bfloat16), "bias": jnp.full(3, -0.0)}, {}],
    }
    labels = {"embed": "adam", "blocks": [{"kernel": "muon", "bias": "adam"}, {}]}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"adam": optax.adamw(1e-3), "muon": optax.trace(0.9, nesterov=True)}, labels),
    )
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.int32(step),
        "skipped": jnp.uint32(2**32 - 1),
        "done": jnp.array([True, False]),
        "odd": jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e-45, -0.0], jnp.float32),
        "key": jax.random.key(step + 1),
        "keys": jax.random.split(jax.random.key(step), 3),
        "empty": jnp.zeros((0, 3)),
    }


def bits(x: jax.Array) -> tuple[str, tuple[int, ...], bytes]:
    data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return str(x.dtype), x.shape, np.asarray(data).tobytes()


def assert_same_bits(a, b):
    assert str(jax.tree.structure(a)) == str(jax.tree.structure(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array)
        assert bits(x) == bits(y)


def small(step: int) -> dict[str, jax.Array]:
    return {"w": jnp.arange(12.0) + step, "n": jnp.int32(step)}


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """A folder with sealed steps 3, 5, 7."""
    directory = tmp_path_factory.mktemp("three")
    with Checkpoints(directory) as checkpoints:
        for step in (3, 5, 7):
            checkpoints.save(step, small(step), {"note": step}, wait=True)
    return directory


@pytest.fixture
def saved(three, tmp_path) -> Path:
    """A copy of `three` to damage."""
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


# What is stored


def test_every_bit_comes_back(tmp_path):
    state = make_state(11)
    extra = {"data": {"step": 11}, "config": {"lr": 1e-3, "name": "ü", "none": None}}
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(11, state, extra, wait=True)
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.latest() == 11
        for like in (state, jax.eval_shape(lambda: make_state(0))):
            restored, got = checkpoints.restore(11, like)
            assert_same_bits(restored, state)
            assert got == extra


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    @jax.jit
    def make(step):
        return [jax.random.normal(jax.random.fold_in(jax.random.key(i), step), (401, 503)) for i in range(7)]

    update = jax.jit(lambda state: [x * 0 - 1 for x in state], donate_argnums=0)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(5):
            state = make(step)
            checkpoints.save(step, state, {})
            for _ in range(3):
                state = update(state)
            jax.block_until_ready(state)
        checkpoints.wait()
        for step in range(5):
            assert_same_bits(checkpoints.restore(step, make(0))[0], make(step))


def test_saving_the_same_step_again_does_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, small(3), {}, wait=True)
        before = (tmp_path / "step_00000003" / MANIFEST).stat().st_mtime_ns
        checkpoints.save(3, small(3), {}, wait=True)
        assert (tmp_path / "step_00000003" / MANIFEST).stat().st_mtime_ns == before
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(3, small(0))
        checkpoints.save(3, small(3), {})
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="valid checkpoint and is not overwritten"),
    ):
        checkpoints.save(3, small(4), {})


def test_only_arrays_are_state(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match=r"state: 'lr/peak' is a float; make it a jax.Array, or pass it in extra"):
            checkpoints.save(0, {"lr": {"peak": 0.1}}, {})
        with pytest.raises(ValueError, match=r"two leaves have the path 'a/b'"):
            checkpoints.save(0, {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}}, {})
        with pytest.raises(TypeError, match="JSON serializable"):
            checkpoints.save(0, small(0), {"now": object()})
    assert not steps_in(tmp_path)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros(12)}, r"n is left over"),
        ({**small(0), "b": {"c": jnp.zeros(2)}}, r"b/c is missing"),
        ({**small(0), "w": jnp.zeros((3, 4))}, r"w is float32\[12\], wanted float32\[3,4\]"),
        ({**small(0), "w": jnp.zeros(12, jnp.bfloat16)}, r"w is float32\[12\], wanted bfloat16\[12\]"),
        ({**small(0), "n": jnp.uint32(0)}, r"n is int32\[\], wanted uint32\[\]"),
        ({**small(0), "n": jax.random.key(0)}, r"n is int32\[\], wanted key<fry>\[\]"),
    ],
)
def test_another_model_is_refused_by_name(three, like, message):
    with Checkpoints(three) as checkpoints, pytest.raises(UserError, match=message + ".*start in another folder"):
        checkpoints.restore(7, like)


def test_restore_of_a_step_that_is_not_there(three):
    with Checkpoints(three) as checkpoints, pytest.raises(UserError, match=r"no such step, there are \[3, 5, 7\]"):
        checkpoints.restore(6, small(0))


# Which ones stay


def test_pruning_keeps_the_newest(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, small(step), {})
        checkpoints.wait()
        assert steps_in(tmp_path) == ["step_00000004", "step_00000005"]
        assert checkpoints.latest() == 5


def test_damaged_checkpoints_do_not_count_as_kept(saved):
    for step in (5, 7):
        (saved / f"step_0000000{step}" / HEADER).unlink()
    said: list[str] = []
    with Checkpoints(saved, keep=2, say=said.append) as checkpoints:
        assert checkpoints.latest() == 3
        checkpoints.restore(3, small(0))
        checkpoints.save(6, small(6), {}, wait=True)
        # 5 is damaged and goes; 7 is beyond where this run is, and 3 is the second of the two valid ones.
        assert steps_in(saved) == ["step_00000003", "step_00000006", "step_00000007"]
        checkpoints.save(7, small(7), {"second": True}, wait=True)
        assert said[-1].endswith(f"step_00000007: {HEADER} is missing")
        assert said[-1].startswith("replaced")
        assert steps_in(saved) == ["step_00000006", "step_00000007"]
        assert checkpoints.restore(7, small(0))[1] == {"second": True}


def test_leftovers_are_removed_with_a_message(saved):
    shutil.rmtree(saved / "step_00000005" / "state")
    (saved / "step_00000005" / MANIFEST).unlink()
    (saved / "step_00000009" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (saved / "notes").mkdir()
    said: list[str] = []
    with Checkpoints(saved, say=said.append) as checkpoints:
        assert checkpoints.latest() == 7
        checkpoints.clean()
    assert steps_in(saved) == ["notes", "step_00000003", "step_00000007"]
    assert [line.split()[0] for line in said] == ["skipped", "removed", "removed"]
    assert all("unfinished" in line for line in said)


# Damage


def truncate(folder: Path, path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(folder: Path, path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = random.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def delete(folder: Path, path: Path) -> None:
    path.unlink()


def empty_manifest(folder: Path, path: Path) -> None:
    (folder / MANIFEST).write_bytes(b"")


def half_written(folder: Path, path: Path) -> None:
    (folder / MANIFEST).unlink()
    path.unlink(missing_ok=True)


def no_files(folder: Path, path: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [truncate, flip, delete, empty_manifest, half_written, no_files])
def test_damage_is_skipped_with_the_reason(saved, damage):
    seed = random.randrange(2**32)
    random.seed(seed)
    newest = saved / "step_00000007"
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    victim = random.choice(files)
    damage(newest, victim)
    said: list[str] = []
    with Checkpoints(saved, say=said.append) as checkpoints:
        assert checkpoints.latest() == 5, f"{damage.__name__} of {victim.name} passed unseen, seed {seed}"
        assert_same_bits(checkpoints.restore(5, small(0))[0], small(5))
        with pytest.raises(UserError, match="cannot be restored"):
            checkpoints.restore(7, small(0))
    assert len(said) == 1
    assert said[0].startswith(f"skipped {newest}: ")
    if damage in (empty_manifest, half_written, no_files):
        assert MANIFEST in said[0]
    elif victim.name != MANIFEST:  # a damaged manifest may accuse any file
        assert f": {victim.relative_to(newest)} " in said[0]


def test_every_flipped_bit_of_the_manifest_is_found(saved):
    folder = saved / "step_00000007"
    good = (folder / MANIFEST).read_bytes()
    assert find_damage(folder) is None
    for place in random.Random(0).sample(range(8 * len(good)), 300):
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        (folder / MANIFEST).write_bytes(data)
        assert find_damage(folder) is not None, place


def test_large_files_are_summed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK", 1000)
    data = np.random.default_rng(0).bytes(3500)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(b"")
    text = checkpoint.manifest(tmp_path, ["a", "b"])
    assert [len(json.loads(text)["files"][name]["crc32"].split()) for name in "ab"] == [4, 1]
    for place in (0, 999, 1000, 3499):
        (tmp_path / "a").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert checkpoint.manifest(tmp_path, ["a", "b"]) != text


def test_nothing_valid_is_an_error_never_a_new_start(saved):
    for step in (3, 5, 7):
        (saved / f"step_0000000{step}" / MANIFEST).unlink()
    with Checkpoints(saved, say=lambda line: None) as checkpoints:
        with pytest.raises(UserError, match=r"none of its 3 checkpoints is valid; bring one back"):
            checkpoints.latest()
        # What is sealed and damaged is an error even if it is the only one ...
        shutil.rmtree(saved / "step_00000003")
        shutil.rmtree(saved / "step_00000005")
        (saved / "step_00000007" / MANIFEST).write_text("{}")
        with pytest.raises(UserError, match=r"none of its 1 checkpoints is valid"):
            checkpoints.latest()
        # ... but a first save that was cut off has nothing to lose.
        (saved / "step_00000007" / MANIFEST).unlink()
        assert checkpoints.latest() is None


# Failed writes


@pytest.fixture
def small_files_only():
    """Files may not grow beyond 64 KiB: a full disk, as far as a write can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_failed_write_surfaces_at_the_next_call_and_is_never_sealed(saved, small_files_only):
    large = {"w": jax.random.normal(jax.random.key(0), (100_003,))}
    message = r"step 9 could not be written .*the last sealed checkpoint is step 7; free some space"
    with Checkpoints(saved) as checkpoints:
        checkpoints.save(9, large, {})
        with pytest.raises(UserError, match=message) as caught:
            checkpoints.save(10, small(10), {})
        assert "\n" not in str(caught.value)
        assert find_damage(saved / "step_00000009") == f"unfinished, it has no {MANIFEST}"
        assert checkpoints.latest() == 7
        small_files_only()
        checkpoints.save(9, large, {}, wait=True)
        assert checkpoints.latest() == 9
        assert_same_bits(checkpoints.restore(9, large)[0], large)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        Checkpoints(tmp_path / "file") as checkpoints,
        pytest.raises(UserError, match=r"step 1 could not be written to .*file \(NotADirectoryError: .*permissions"),
    ):
        checkpoints.save(1, small(1), {})


def test_threads_end_with_close(tmp_path):
    before = set(threading.enumerate())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1), {})
    checkpoints.close()
    checkpoints.close()
    assert find_damage(tmp_path / "step_00000001") is None
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


# Processes that die

PRELUDE = """
import os, signal, sys, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp
from train import checkpoint
from train.checkpoint import Checkpoints
directory = sys.argv[1]
def state(step):
    return {"w": jnp.arange(200_003.0) + step, "n": jnp.int32(step)}
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def child(source: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(source), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


def child_state(step: int) -> dict[str, jax.Array]:
    return {"w": jnp.arange(200_003.0) + step, "n": jnp.int32(step)}


@pytest.mark.parametrize(
    ("moment", "newest", "stays"),
    [
        ("checkpoint._write_synced = die", 1, [1]),  # before the write: only an empty folder
        ("checkpoint._write_arrays = lambda w, f, a: (write(w, f, a), die())", 1, [1]),  # during it
        ("checkpoint.manifest = die", 1, [1]),  # before the seal
        ("os.replace = lambda a, b: die() if str(b).endswith('MANIFEST.json') else replace(a, b)", 1, [1]),
        ("Checkpoints._prune = die", 2, [1, 2]),  # before pruning
        ("checkpoint.shutil.rmtree = die", 2, [2]),  # during pruning
    ],
)
def test_kill_at_each_moment_of_a_save(tmp_path, moment, newest, stays):
    process = child(
        f"""
        with Checkpoints(directory, keep=1) as checkpoints:
            checkpoints.save(1, state(1), {{"s": 1}}, wait=True)
            write, replace = checkpoint._write_arrays, os.replace
            {moment}
            checkpoints.save(2, state(2), {{"s": 2}}, wait=True)
        """,
        str(tmp_path),
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert errors == ""
    assert steps_in(tmp_path) == [f"step_{step:08d}" for step in (1, 2)]
    with Checkpoints(tmp_path, keep=1, say=lambda line: None) as checkpoints:
        assert checkpoints.latest() == newest
        restored, extra = checkpoints.restore(newest, child_state(0))
        assert_same_bits(restored, child_state(newest))
        assert extra == {"s": newest}
        # The run goes on as if nothing had happened.
        checkpoints.clean()
        assert steps_in(tmp_path) == [f"step_{step:08d}" for step in stays]
        checkpoints.save(newest + 1, child_state(newest + 1), {}, wait=True)
        assert steps_in(tmp_path) == [f"step_{newest + 1:08d}"]
        assert checkpoints.latest() == newest + 1


def test_kill_at_random_moments(tmp_path):
    """Each round resumes where the last was killed; what had been reported as sealed is never lost."""
    sealed = 0
    for _ in range(3):
        process = child(
            """
            with Checkpoints(directory, keep=2, say=lambda line: None) as checkpoints:
                step = checkpoints.latest() or 0
                checkpoints.clean()
                if step:
                    assert int(checkpoints.restore(step, state(0))[0]["n"]) == step
                while True:
                    step += 1
                    checkpoints.save(step, state(step), {})
                    print(step - 1, flush=True)  # `save` has waited for the one before
            """,
            str(tmp_path),
        )
        assert process.stdout is not None
        started = int(process.stdout.readline())
        assert started >= sealed
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        output, errors = process.communicate()
        assert errors == ""
        sealed = max([started, *map(int, output.split())])
        with Checkpoints(tmp_path, say=lambda line: None) as checkpoints:
            step = checkpoints.latest()
            assert (step or 0) >= sealed
            if step is not None:
                assert_same_bits(checkpoints.restore(step, child_state(0))[0], child_state(step))


def test_restore_onto_another_mesh(tmp_path):
    """8 -> 4 -> 1 -> 8 devices: the same bits, in the shardings that were asked for."""
    process = child(
        """
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        specs = {"w": P("data", "fsdp"), "b": P("fsdp"), "key": P(), "n": P(), "keys": P("fsdp")}
        def make():
            k = jax.random.key(0)
            return {"w": jax.random.normal(k, (16, 24), jnp.bfloat16), "b": jnp.arange(8), "key": k,
                    "n": jnp.int32(3), "keys": jax.random.split(k, 4)}
        def shardings(shape):
            mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "fsdp"))
            return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        def data(x):
            return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        wanted = {name: data(x) for name, x in make().items()}
        state = jax.device_put(make(), shardings((2, 4)))
        for step, shape in enumerate([(2, 2), (1, 1), (4, 2)]):
            with Checkpoints(directory) as checkpoints:
                checkpoints.save(step, state, {}, wait=True)
            like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                                jax.eval_shape(make), shardings(shape))
            with Checkpoints(directory) as checkpoints:
                state, _ = checkpoints.restore(step, like)
            for name, x in state.items():
                assert x.sharding.is_equivalent_to(like[name].sharding, x.ndim), (shape, name, x.sharding)
                assert x.dtype == like[name].dtype
                assert data(x).tobytes() == wanted[name].tobytes(), (shape, name)
        print("ok")
        """,
        str(tmp_path),
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output == "ok\n"
    assert errors == ""
