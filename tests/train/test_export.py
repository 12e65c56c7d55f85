"""Weights as safetensors, bit for bit, and what `inspect` says of checkpoints, whole and damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn.models.lm import LMConfig
from train import inspect as inspection
from train.__main__ import main
from train.checkpoint import HEADER, MANIFEST, Checkpoints
from train.config import DataConfig, OptimizerConfig, RunConfig, ScheduleConfig, save_config
from train.errors import UserError
from train.export import read_safetensors, write_safetensors
from train.sharding import make_mesh, path_name
from train.step import TrainState, make_program

ROOT = Path(__file__).parents[2]
CONFIG = RunConfig(
    model=LMConfig(
        width=16,
        num_layers=2,
        pattern=("lightning", "sliding_window"),
        num_heads=2,
        mlp_width=24,
        mixer_options={"sliding_window": {"window": 8}},
    ),
    schedule=ScheduleConfig(steps=10),
    data=DataConfig(context=32, batch=8),
    optimizer=OptimizerConfig(ema=0.9),
)


def sharded_tree() -> dict[str, object]:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    keys = jax.random.split(jax.random.key(0), 3)
    place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))  # noqa: E731
    return {
        "units": {
            "blocks": [
                {"kernel": place(jax.random.normal(keys[0], (3, 8, 6)), None, "fsdp", "tensor")},
                {"kernel": place(jax.random.normal(keys[1], (3, 4, 2), jnp.bfloat16), None, None, "tensor")},
            ]
        },
        # Every special number, in an order that a transposition would show.
        "odd": place(jnp.array([[jnp.nan, jnp.inf, -0.0, 1e-45], [1.0, 2.0, 3.0, -jnp.inf]]).T, "fsdp", None),
        "scalar": place(jnp.float32(7)),
    }


def bits(x: object) -> tuple[str, tuple[int, ...], bytes]:
    array = np.asarray(x)
    return str(array.dtype), array.shape, array.tobytes()


def test_sharded_arrays_come_back_bit_for_bit_and_on_their_shardings(tmp_path):
    tree = sharded_tree()
    write_safetensors(tree, tmp_path / "a.safetensors", {"config": "{}", "step": "3"})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    back = read_safetensors(tmp_path / "a.safetensors", like)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert bits(x) == bits(y)
        assert x.sharding == y.sharding


def test_the_file_is_read_by_safetensors_alone(tmp_path):
    tree = sharded_tree()
    path = tmp_path / "a.safetensors"
    write_safetensors(tree, path, {"config": "{}", "step": "3"})
    found = safetensors.numpy.load_file(path)
    assert set(found) == {"units.blocks.0.kernel", "units.blocks.1.kernel", "odd", "scalar"}
    assert bits(found["units.blocks.1.kernel"]) == bits(tree["units"]["blocks"][1]["kernel"])
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"config": "{}", "step": "3"}
        assert bits(file.get_tensor("odd")) == bits(tree["odd"])


def test_the_file_is_for_everyone_whom_the_folder_is_for(tmp_path):
    write_safetensors({"w": jnp.arange(3.0)}, tmp_path / "a.safetensors", {})
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_conversion_rounds_as_jax_does(tmp_path):
    tree = sharded_tree()
    write_safetensors(tree, tmp_path / "a.safetensors", {}, "bfloat16")
    found = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    wanted = tree["units"]["blocks"][0]["kernel"].astype(jnp.bfloat16)
    assert bits(found["units.blocks.0.kernel"]) == bits(wanted)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_safetensors({"w": jnp.arange(3.0)}, path, {})
    before = path.read_bytes()

    def disk_full(arrays, draft, metadata):
        Path(draft).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
    with pytest.raises(
        UserError, match=r"a.safetensors: the weights cannot be written .*No space left.*free some space"
    ):
        write_safetensors({"w": jnp.zeros(3)}, path, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros(3)}, r"b\.c is left over"),
        ({"w": jnp.zeros(3), "b": {"c": jnp.zeros(2), "d": jnp.zeros(1)}}, r"b\.d is missing"),
        ({"w": jnp.zeros((3, 1)), "b": {"c": jnp.zeros(2)}}, r"w is float32\[3\], wanted float32\[3, 1\]"),
        ({"w": jnp.zeros(3, jnp.bfloat16), "b": {"c": jnp.zeros(2)}}, r"w is float32\[3\], wanted bfloat16\[3\]"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path, like, message):
    write_safetensors({"w": jnp.zeros(3), "b": {"c": jnp.zeros(2)}}, tmp_path / "a.safetensors", {})
    with pytest.raises(UserError, match=rf"does not fit the model: {message}$"):
        read_safetensors(tmp_path / "a.safetensors", like)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_no_weights_file(tmp_path, content):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="is no readable safetensors file") as caught:
        read_safetensors(path, {})
    assert "\n" not in str(caught.value)


# A run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, TrainState]:
    """A run's folder with steps 3 and 7, as far as export and inspect look, and its newest state."""
    workdir = tmp_path_factory.mktemp("run")
    save_config(CONFIG, workdir / "config.json")
    (workdir / "environment.json").write_text(json.dumps({"jax": "0.0", "devices": "8 x cpu"}))
    program = make_program(CONFIG, make_mesh(CONFIG.mesh))
    state = program.init(0)
    # The average differs from the parameters, so that it shows which of them is taken.
    state = state._replace(step=jnp.int32(7), average=jax.tree.map(lambda x: 2 * x + 1, state.average))
    extra = {"data": {"step": 7, "seed": 0}, "config": json.loads((workdir / "config.json").read_text())}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(3, state._replace(step=jnp.int32(3)), extra)
        checkpoints.save(7, state, extra, wait=True)
    return workdir, state


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def test_export_writes_the_weights_that_are_scored(trained, tmp_path, capsys):
    workdir, state = trained
    output = tmp_path / "w.safetensors"
    assert main(["export", str(workdir), "--output", str(output), "--dtype", "bfloat16"]) == 0
    found = safetensors.numpy.load_file(output)
    wanted = {
        path_name(keys).replace("/", "."): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(state.average)
    }
    assert found.keys() == wanted.keys()
    assert "units.blocks.0.mixer.projections.query.kernel" in found
    for name, leaf in wanted.items():
        assert bits(found[name]) == bits(leaf.astype(jnp.bfloat16)), name
    with safetensors.safe_open(output, "numpy") as file:
        metadata = file.metadata()
    assert metadata["step"] == "7"
    assert json.loads(metadata["config"])["model"]["width"] == 16
    assert f"{len(wanted)} arrays" in capsys.readouterr().out
    assert main(["export", str(workdir)]) == 0
    assert main(["export", str(workdir), "--dtype", "bfloat16"]) == 0
    rounded = safetensors.numpy.load_file(workdir / "model.bfloat16.safetensors")
    assert {name: bits(x) for name, x in rounded.items()} == {name: bits(x) for name, x in found.items()}
    back = read_safetensors(workdir / "model.safetensors", state.average)
    assert all(bits(x) == bits(y) for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(state.average), strict=True))


def test_export_without_a_folder(capsys):
    assert main(["export"]) == 2
    assert main(["export", "nowhere"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert err[0] == "error: export: expected the folder of a run first, as in python -m train export runs/pydoc_lm"
    assert err[1].startswith("error: nowhere: holds no run")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_inspect_tells_what_a_checkpoint_holds(trained, capsys):
    workdir, state = trained
    assert main(["inspect", str(workdir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(step["step"], step["state"], step["problem"]) for step in found["steps"]] == [
        (3, "valid", None),
        (7, "valid", None),
    ]
    folder = workdir / "checkpoints" / "step_00000007"
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert found["steps"][1]["bytes"] == on_disk
    assert 0 <= found["steps"][1]["seconds"] < 600
    assert found["step"] == 7
    assert set(found["arrays"]) == {"step", "parameters", "optimizer", "skipped", "average"}
    for group in ("parameters", "optimizer", "average"):
        leaves = jax.tree.leaves(getattr(state, group))
        assert sorted((x["numbers"], x["bytes"], x["dtype"], x["shape"]) for x in found["arrays"][group]) == sorted(
            (leaf.size, leaf.nbytes, str(leaf.dtype), list(leaf.shape)) for leaf in leaves
        )
    assert found["files"] == json.loads((folder / MANIFEST).read_text())["files"]
    assert found["data"] == {"step": 7, "seed": 0}
    assert found["config"]["optimizer"]["ema"] == 0.9
    assert found["environment"] == {"jax": "0.0", "devices": "8 x cpu"}


def test_one_step_and_the_folder_of_checkpoints(trained, capsys, monkeypatch):
    folder = trained[0] / "checkpoints"
    assert inspection.inspect(folder)["step"] == 7
    of_step = inspection.inspect(folder / "step_00000003")
    assert (of_step["step"], len(of_step["steps"])) == (3, 1)
    assert of_step["environment"]["jax"] == "0.0"
    monkeypatch.chdir(folder / "step_00000003")
    assert inspection.inspect(Path("."))["step"] == 3


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_tables_fit_the_window_and_lose_nothing(trained, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["inspect", str(trained[0])]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert "\x1b" not in out
    assert "…" not in out
    assert "optimizer.ema" in "".join(out.split())
    # The column of names, folded or not, holds every one of them whole.
    lines = out.splitlines()
    (head,) = [index for index, line in enumerate(lines) if line.startswith("array ")]
    width = lines[head].index("dtype")
    column = "".join(line[:width].strip() for line in lines[head + 1 : lines.index("", head)])
    groups = inspection.inspect(trained[0])["arrays"]
    assert column == "".join(array["name"] for arrays in groups.values() for array in arrays)


def test_damage_is_named_and_the_newest_valid_step_shown(run, capsys):
    (data,) = list((run / "checkpoints" / "step_00000007" / "state" / "d").iterdir())[:1]
    flip(data)
    assert main(["inspect", str(run), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [step["state"] for step in found["steps"]] == ["valid", "damaged"]
    assert data.name in found["steps"][1]["problem"]
    assert "another checksum" in found["steps"][1]["problem"]
    assert found["step"] == 3
    # The damaged one, when it is asked for.
    assert main(["inspect", str(run / "checkpoints" / "step_00000007")]) == 1
    out = capsys.readouterr().out
    assert "Step 7" in out
    assert "another checksum" in " ".join(out.split())


def test_a_save_in_flight_is_no_damage(run, capsys):
    (run / "checkpoints" / "step_00000007" / MANIFEST).unlink()
    assert main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    assert "unfinished" in out
    assert "Step 3" in out
    shutil.rmtree(run / "checkpoints" / "step_00000003")
    assert main(["inspect", str(run)]) == 1
    assert "no valid checkpoint" in capsys.readouterr().out


def test_a_header_that_cannot_be_read(run, capsys):
    folder = run / "checkpoints" / "step_00000007"
    (folder / HEADER).write_text("{")
    assert main(["inspect", str(folder)]) == 1
    assert f"{HEADER} has 1 bytes" in " ".join(capsys.readouterr().out.split())


def test_inspect_of_no_checkpoints(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    for words, message in (
        ([], "error: inspect: expected the folder of a run first"),
        ([str(tmp_path)], f"error: {tmp_path}: holds no checkpoint"),
        ([str(tmp_path / "none")], f"error: {tmp_path / 'none'}: is no folder"),
        ([str(tmp_path), "--jsn"], "error: "),
    ):
        assert main(["inspect", *words]) == 2
        err = capsys.readouterr().err
        assert err.startswith(message)
        assert err.count("\n") == 1


def test_inspect_needs_no_device(trained):
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "train", "inspect", str(trained[0]), "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 7
