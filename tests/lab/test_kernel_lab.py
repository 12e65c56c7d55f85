"""The meter for kernels with its compilers, libtpu and XLA:GPU; `make lab` installs both.

One command compiles every case below for two TPUs, another for H100; the tests read the figures.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lab import Case, chips
from pallas_kernels.lab.__main__ import main

BLOCK, ROWS, COLUMNS = 512, 2, 3


def dot(x, y):
    return jax.lax.dot_general(x, y, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def matmul(x, y, *, parameters=None, block=BLOCK, name="matmul"):
    """Tiles of `block` rows and columns; x stays while the columns run."""

    def kernel(x, y, z):
        z[...] = dot(x[...], y[...]).astype(z.dtype)

    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), x.dtype),
        grid=(x.shape[0] // block, y.shape[1] // block),
        in_specs=[
            pl.BlockSpec((block, x.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((y.shape[0], block), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((block, block), lambda i, j: (i, j)),
        compiler_params=parameters,
        name=name,
    )(x, y)


def wide(x):
    """Asks for 256 MiB of VMEM, more than any chip has."""

    def kernel(x, y, scratch):
        scratch[:8] = x[...]
        y[...] = scratch[:8]

    return pl.pallas_call(kernel, x, scratch_shapes=[pltpu.VMEM((1 << 19, 128), x.dtype)], name="wide")(x)


def by_hand(x):
    """A grid whose loop has no pipeline: its blocks are copied by the kernel."""

    def kernel(x, y, inside, semaphore):
        place = pl.ds(pl.program_id(0) * BLOCK, BLOCK)
        pltpu.async_copy(x.at[place], inside, semaphore).wait()
        inside[...] = dot(inside[...], inside[:128]).astype(inside.dtype)
        pltpu.async_copy(inside, y.at[place], semaphore).wait()

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    scratch = [pltpu.VMEM((BLOCK, 128), x.dtype), pltpu.SemaphoreType.DMA]
    grid = (x.shape[0] // BLOCK,)
    return pl.pallas_call(
        kernel, x, grid=grid, in_specs=[anywhere], out_specs=anywhere, scratch_shapes=scratch, name="by_hand"
    )(x)


def refuses(x):
    raise NotImplementedError("no such tile")


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def cases(target):
    if target == "h100":
        tiles = functools.partial(
            matmul, block=128, name="tiles", parameters=plgpu.CompilerParams(num_warps=4, num_stages=2)
        )
        arguments = (array(256, 64), array(64, 384))
        return {
            "matmul": Case(tiles, arguments, 2 * (256 * 64 + 64 * 384 + 256 * 384)),
            "twice": Case(lambda x, y: tiles(x, y) + tiles(2 * x, y), arguments),
            "xla": Case(jnp.dot, arguments),
        }
    k, m, n = BLOCK, ROWS * BLOCK, COLUMNS * BLOCK
    return {
        "matmul": Case(matmul, (array(m, k), array(k, n)), 2 * (m * k + k * n + m * n)),
        "by hand": Case(by_hand, (array(3 * BLOCK, 128),)),
        "wide": Case(wide, (array(8, 128, dtype=jnp.float32),)),
        "refuses": Case(refuses, (array(8, 128),)),
        "xla": Case(jnp.sin, (array(8, 128),)),
    }


@functools.cache
def report(module, targets, only):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.json")
        code = main(["report", "--module", module, "--targets", targets, "--only", only, "--json", str(path)])
        return code, {(row["target"], row["case"]): row for row in json.loads(path.read_text())["rows"]}


TPUS = "v5e,v6e"


def row(target, case):
    return report(__file__, target if target == "h100" else TPUS, "[!wr]*")[1][target, case]


@pytest.mark.parametrize("target", TPUS.split(","))
def test_matmul_slots_are_the_closed_form(target):
    found, chip = row(target, "matmul"), chips.CHIPS[target]
    (kernel,) = found["kernels"]
    slots = BLOCK * math.ceil(BLOCK / chip.mxu_width) ** 2 / chip.mxu_rows
    assert kernel["step_matmul_slots"] == slots
    assert kernel["steps"] == ROWS * COLUMNS
    # No schedule is shorter than its matmuls, and this one should be near them.
    assert slots / chip.mxus <= kernel["hot_bundles"] <= kernel["step_bundles"] < 2 * slots / chip.mxus
    assert found["seconds"] == pytest.approx(ROWS * COLUMNS * kernel["step_bundles"] / chip.clock_hz)
    assert found["times_minimum"] == pytest.approx(found["seconds"] / found["minimum_seconds"])
    assert not kernel["notes"]


@pytest.mark.parametrize("target", TPUS.split(","))
def test_matmul_reads_the_columns_for_every_row(target):
    found = row(target, "matmul")
    assert found["moved_from"] == "block specs"
    assert found["moved_bytes"] == 2 * BLOCK * BLOCK * (ROWS + ROWS * COLUMNS + ROWS * COLUMNS)


@pytest.mark.parametrize("target", TPUS.split(","))
def test_a_grid_without_a_pipeline_has_its_steps(target):
    found = row(target, "by hand")
    assert found["kernels"][0]["steps"] == 3
    assert found["moved_from"] == "operands and results"
    assert found["moved_bytes"] == 2 * 2 * 3 * BLOCK * 128


@pytest.mark.parametrize("target", TPUS.split(","))
def test_failures_are_rows_with_their_reasons(target, capsys):
    code, rows = report(__file__, target, "[wr]*")
    assert code == 1
    assert "RESOURCE_EXHAUSTED" in rows[target, "wide"]["error"]
    assert rows[target, "refuses"]["error"] == "NotImplementedError: no such tile"
    shown = capsys.readouterr()
    assert f"wide on {target}: VMEM overflow: " in shown.out
    assert f"refuses on {target}: NotImplementedError: no such tile" in shown.out
    assert "[2/2]" in shown.err


PROCESSES = """\
import os
import jax.numpy as jnp
from pallas_kernels.lab import Case

def tells(x):
    raise NotImplementedError(os.getpid())

def dies(x):
    os._exit(3)

def cases(target):
    x = (jnp.zeros((8, 128)),)
    return {str(n): Case(dies if n == 3 else tells, x) for n in range(8)}
"""


def errors(verb, module, folder, only="*"):
    path = folder / "figures.json"
    arguments = ["--module", str(module), "--targets", "v5e", "--only", only, "--json", str(path)]
    assert main([verb, *arguments]) == 1
    return {row["case"]: row["error"] for row in json.loads(path.read_text())["rows"]}


def test_cases_share_processes_and_one_that_dies_fails_alone(tmp_path):
    module = tmp_path / "processes.py"
    module.write_text(PROCESSES)
    rows = errors("compile", module, tmp_path)
    assert "ended with code 3" in rows.pop("3")
    assert len(rows) == 7
    assert all(error.startswith("NotImplementedError: ") for error in rows.values())
    assert len(set(rows.values())) <= 3  # of two, and of one in the place of that which died
    # A dump is that of a process.
    assert len(set(errors("report", module, tmp_path, "[0-2]").values())) == 3


@pytest.mark.parametrize("target", ["v6e", "h100"])
def test_a_program_without_a_kernel_is_a_failure(target):
    assert row(target, "xla")["error"] == "dump: the program calls no Pallas kernel"


def test_h100_shows_registers_and_the_tensor_cores():
    found = row("h100", "matmul")
    (kernel,) = found["kernels"]
    assert kernel["name"] == "tiles"
    # 128 x 128 float32 sums lie in the registers of 128 threads.
    assert 128 <= kernel["registers"] <= 255
    assert kernel["wgmma"] + kernel["mma_sync"] > 0
    assert kernel["threads"] == 128
    assert kernel["spill_store_bytes"] == 0
    assert found["moved_bytes"] == 2 * (256 * 64 + 64 * 384 + 256 * 384)
    assert found["minimum_seconds"] == pytest.approx(found["moved_bytes"] / 3352e9)
    assert row("h100", "twice")["moved_bytes"] == 2 * found["moved_bytes"]


# Bundles of the tile and of the grid step as libtpu 0.0.52 schedules them; a tile has two matmuls of 512 x 512 x 128.
ANCHORS = {"v5e": (1323, 1579), "v6e": (1002, 1305)}


@pytest.mark.parametrize("target", ANCHORS)
def test_splash_attention_is_measured_as_known(target):
    code, rows = report("pallas_kernels.lab.anchors", TPUS, "forward 512")
    assert code == 0
    (kernel,) = rows[target, "forward 512"]["kernels"]
    chip = chips.CHIPS[target]
    tiles = math.ceil(512 / chip.mxu_width) * math.ceil(128 / chip.mxu_width)
    assert kernel["step_matmul_slots"] == 2 * 512 * tiles / chip.mxu_rows
    assert (kernel["hot_bundles"], kernel["step_bundles"]) == pytest.approx(ANCHORS[target], rel=0.05)
    assert kernel["steps"] == 8 * 8 * 8
