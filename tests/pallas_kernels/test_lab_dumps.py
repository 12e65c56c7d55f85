"""Dumps of libtpu and of XLA:GPU are read as figures, or are an error; no compiler for either is needed.

`fixtures/loops.*` is cut from libtpu's dump for v5e of a kernel with a grid of 3, a region that only the first step
runs, and two inner loops of 5 and 3 turns; bundles between the branches were taken out, so that they can be counted:

    0-48 kernel    3-46 grid    10-39 body    16-17 first step    19-28 five turns    29-37 three turns
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lab import chips, gpu, program, schedule, tpu, traffic
from pallas_kernels.lab.schedule import DumpError

FIXTURES = Path(__file__).parent / "fixtures"
BUNDLES = (FIXTURES / "loops.bundles.txt").read_text()
UTILIZATION = (FIXTURES / "loops.utilization.txt").read_text()
V5E = chips.CHIPS["v5e"]


def read(bundles=BUNDLES, utilization=UTILIZATION):
    return schedule.read(bundles, utilization, V5E.branch_delay)


def flat(region):
    yield region.first, region.last, region.loop, region.trips
    for child in region.children:
        yield from flat(child)


def test_regions_and_trips_of_a_dump():
    assert list(flat(read().root)) == [
        (0, 48, False, 1),
        (3, 46, True, 3),
        (10, 39, False, 1),
        (16, 17, False, 1),
        (19, 28, True, 5),
        (29, 37, True, 3),
    ]
    assert not read().notes


def test_a_step_leaves_out_what_only_the_first_one_runs():
    found = tpu.figures(read(), V5E)
    inner = 5 * 10 + 3 * 9
    assert found["steps"] == 3
    assert found["step_bundles"] == 44 - 2 - 10 - 9 + inner
    assert found["step_all_bundles"] == 44 - 10 - 9 + inner
    # Two MATMULs in either loop.
    assert found["step_matmul_slots"] == 5 * 2 + 3 * 2
    assert found["step_matmul_percent"] == pytest.approx(100 * 16 / 4 / found["step_bundles"])
    assert found["units"]["MATMUL"] == found["step_matmul_percent"]
    assert found["busiest_percent"] == found["units"][found["busiest_unit"]] == max(found["units"].values())
    assert [region["hot_bundles"] for region in found["hot_regions"]] == [10, 9]
    # A part is a bundle here.
    for region in found["hot_regions"]:
        assert len(region["course"]) == region["hot_bundles"]
        assert np.mean(region["course"]) == pytest.approx(region["hot_matmul_percent"])
    assert [sum(share > 0 for share in region["course"]) for region in found["hot_regions"]] == [2, 2]
    assert found["seconds"] == pytest.approx(3 * found["step_bundles"] / 1.5e9)
    assert found["complete"]


@pytest.mark.parametrize(("ways", "steps"), [((), 3), (("input",), 4), (("output",), 4), (("input", "output"), 5)])
def test_a_grid_turns_more_often_than_it_has_steps_where_blocks_are_copied(ways, steps):
    bundles = BUNDLES
    for way in ways:
        bundles = bundles.replace(f"/* {way} window allocation", "/* scratch allocation")
    assert tpu.figures(read(bundles), V5E)["steps"] == steps


def without_matmuls():
    head, rows = UTILIZATION.splitlines()[:4], UTILIZATION.splitlines()[4:]
    return "\n".join([*head, *("0" + row[1:] for row in rows)])


def test_a_kernel_without_matmuls_runs_all_of_a_step():
    found = tpu.figures(read(utilization=without_matmuls()), V5E)
    assert found["step_bundles"] == found["step_all_bundles"] == 44 - 10 - 9 + 5 * 10 + 3 * 9
    assert found["step_matmul_slots"] == 0


COUNTER = "%s194_s5 = sadd.s32 1, %s855_s5"
SPILLED = "%s194_s5 = sadd.s32 1, %s7_s5  ;;  %s7_s5 = sld [smem:[#a_spill]]  ;;  %9 = sst [smem:[#a_spill]] %s855_s5"


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("%s194_s5, 5 /*", "%s194_s5, 0x11 /*", 17),
        ("scmp.ge.s32.totalorder %s194_s5, 5", "scmp.gt.s32.totalorder %s194_s5, 5", 6),
        ("sadd.s32 1, %s855_s5", "sadd.s32 2, %s855_s5", 3),
        ("%s995_s5 = smov.u32 0", "%s995_s5 = smov.u32 4294967294", 7),
        ("%s194_s5, 5 /*", "%s194_s5, %s900_s1 /*", None),
        (COUNTER, "%s194_s5 = sadd.s32 %s900_s1, %s855_s5", None),
        # The counter was spilled, and one value is stored in its slot; then two are.
        (COUNTER, SPILLED, 5),
        (COUNTER, SPILLED + "  ;;  %10 = sst [smem:[#a_spill]] %s859_s18", None),
    ],
)
def test_trips_are_counted_from_constants_or_not_at_all(old, new, trips):
    assert old in BUNDLES
    found = read(BUNDLES.replace(old, new))
    (loop,) = [region for region in flat(found.root) if region[0] == 19]
    assert loop[3] == (trips or 1)
    assert bool(found.notes) == (trips is None)
    assert tpu.figures(found, V5E)["complete"] == (trips is not None)


def test_a_grid_of_unknown_length_has_no_time():
    found = tpu.figures(read(BUNDLES.replace("%s22_s13, 5 /*", "%s22_s13, %s900_s1 /*")), V5E)
    assert found["steps"] is None
    assert found["seconds"] is None
    assert found["step_bundles"] == 100


@pytest.mark.parametrize(
    ("bundles", "utilization", "message"),
    [
        ("nothing here", UTILIZATION, "has no bundles"),
        (BUNDLES, "", "unknown head"),
        (BUNDLES, UTILIZATION.replace("MATMUL,", "MXU,"), "no column MATMUL"),
        (BUNDLES, UTILIZATION + "0 0 0\n", "has not 11 numbers"),
        (BUNDLES, UTILIZATION + "0 0 0 0 0 0 0 0 0 0 0\n", "49 bundles but 50 rows"),
        (BUNDLES.replace("sbr.rel (%p98_p11)", "sbr.abs (%p98_p11)"), UTILIZATION, "bundle 0x5 .* unknown form"),
        (BUNDLES.replace("bundleno = 40", "bundleno = 400"), UTILIZATION, "0x5 branches to 0x190"),
    ],
)
def test_an_unknown_dump_is_an_error(bundles, utilization, message):
    with pytest.raises(DumpError, match=message):
        read(bundles, utilization)


PROGRAM = """\
HloModule jit_f

%body (p: bf16[16,128]) -> bf16[16,128] {
  ROOT %turn.2 = bf16[48,128]{1,0} custom-call(%p, %q), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[240,128]{1,0}, bf16[128,128]{1,0}}
}

ENTRY %main (a: bf16[240,128], b: bf16[128,128]) -> bf16[48,128] {
  %a = bf16[240,128]{1,0} parameter(0)
  %turn.1 = (bf16[48,128]{1,0}, pred[8]{0}) custom-call(%a, %b), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[240,128]{1,0:T(8,128)(2,1)}, s4[128,128]{1,0}}, frontend_attributes={kernel_metadata={
"note": "over lines"
}}, backend_config={"body":"TUzv"}
  ROOT %copy = bf16[48,128]{1,0} copy(%turn.1)
}
"""  # noqa: E501


def test_calls_of_a_program():
    inner, outer = program.calls(PROGRAM, "tpu_custom_call")
    assert (inner.name, inner.nested, inner.bytes) == ("turn.2", True, 2 * 128 * (48 + 240 + 128))
    assert (outer.name, outer.nested) == ("turn.1", False)
    assert outer.bytes == 2 * 128 * (48 + 240) + 8 + 128 * 128 // 2
    assert "counted once" in inner.notes()[0]
    assert not outer.notes()
    assert outer.attributes.strip().endswith('{"body":"TUzv"}')


def call(grid, in_spec, out_spec, shape=(300, 256)):
    def kernel(x, y):
        y[...] = jnp.zeros_like(y)

    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    return pl.pallas_call(kernel, out, grid=grid, in_specs=[in_spec], out_specs=out_spec, name="turn")


def traced(function, *shapes):
    return jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr.jaxpr


def test_bytes_by_block_specs():
    rows, columns = 300, 256
    # The operand's block stays while j runs; the result's last rows are cut at the edge.
    kernel = call(
        (2, 3), pl.BlockSpec((None, 8, 128), lambda i, j: (i, 0, 0)), pl.BlockSpec((128, 128), lambda i, j: (j, i))
    )
    jaxpr = traced(lambda x: jax.lax.scan(lambda c, _: (kernel(x), None), x[0] * 0, None, 3)[0], (2, rows, columns))
    assert traffic.of_kernel(jaxpr, "turn.17") == 4 * (2 * 8 * 128 + rows * columns)
    assert traffic.grid_steps(jaxpr, "turn.17") == {6}
    assert traffic.of_kernel(jaxpr, "other.17") is None


def test_a_block_that_comes_back_is_moved_again():
    kernel = call((3, 2), pl.BlockSpec((8, 128), lambda i, j: (j, 0)), pl.BlockSpec((8, 128), lambda i, j: (i, 0)))
    assert traffic.of_kernel(traced(kernel, (16, 128)), "turn") == 4 * 8 * 128 * (3 * 2 + 3)


def test_blocks_that_only_the_device_knows():
    assert (
        traffic.of_kernel(traced(call((), pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec()), (8, 128)), "turn") is None
    )

    def prefetched(index):
        spec = pltpu.PrefetchScalarGridSpec(1, grid=(3,), in_specs=[pl.BlockSpec((8, 128), index)])
        kernel = pl.pallas_call(
            lambda s, x, y: None, jax.ShapeDtypeStruct((8, 128), jnp.float32), grid_spec=spec, name="turn"
        )
        arguments = jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((24, 128), jnp.float32)
        return traffic.of_kernel(jax.jit(kernel).trace(*arguments).jaxpr.jaxpr, "turn")

    assert prefetched(lambda i, s: (s[i], 0)) is None
    assert prefetched(lambda i, s: (i, 0)) == 4 * 128 * (24 + 8)


def test_a_kernel_for_another_platform_moves_nothing_here():
    def both(x):
        kernel = functools.partial(pl.pallas_call, lambda x, y: None, x, name="turn")
        return kernel()(x) + kernel(grid=(5,), compiler_params=plgpu.CompilerParams())(x)

    assert traffic.of_kernel(traced(both, (8, 128)), "turn.1") == 2 * 4 * 8 * 128
    assert traffic.grid_steps(traced(both, (8, 128)), "turn.1") == {1}


def dump(folder, name="turn.1"):
    (folder / f"12-{name}-65-packed-bundles-post-ra.txt").write_text(BUNDLES)
    (folder / f"12-{name}-68-pre-delay_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)


def test_a_kernel_of_a_dump_knows_what_it_moves(tmp_path):
    dump(tmp_path)
    (tmp_path / "3-deduplication-map.txt").write_text("key: turn.1\nvalues:\n  turn.2\n")
    spec = pl.BlockSpec((100, 256), lambda i: (i, 0))
    (found,) = tpu.kernels(tmp_path, PROGRAM, traced(call((3,), spec, spec), (300, 256)), V5E)
    assert (found["calls"], found["steps"]) == (2, 3)
    assert (found["moved_bytes"], found["moved_from"]) == (2 * 4 * 300 * 256, traffic.BLOCKS)
    # Nothing of that name was traced: operands and results once each. A grid of another length is noticed.
    (found,) = tpu.kernels(tmp_path, PROGRAM, traced(jnp.sin, (3,)), V5E)
    assert found["moved_from"] == traffic.OPERANDS
    spec = pl.BlockSpec((50, 256), lambda i: (i, 0))
    (found,) = tpu.kernels(tmp_path, PROGRAM, traced(call((6,), spec, spec), (300, 256)), V5E)
    assert "its grid has [6] steps, the schedule 3" in found["notes"][-1]


def test_a_kernel_that_is_not_in_the_dump_is_an_error(tmp_path):
    nothing = traced(jnp.sin, (3,))
    with pytest.raises(DumpError, match=r"kernel turn\.2: no packed-bundles-post-ra among the 0 files"):
        tpu.kernels(tmp_path, PROGRAM, nothing, V5E)
    dump(tmp_path)
    with pytest.raises(DumpError, match=r"kernel turn\.2: no packed-bundles"):
        tpu.kernels(tmp_path, PROGRAM, nothing, V5E)
    dump(tmp_path, "turn.2")
    assert len(tpu.kernels(tmp_path, PROGRAM, nothing, V5E)) == 2
    (tmp_path / "12-turn.2-68-pre-delay_hlo-static-per-bundle-utilization.txt").unlink()
    with pytest.raises(DumpError, match=r"kernel turn\.2: no pre-delay"):
        tpu.kernels(tmp_path, PROGRAM, nothing, V5E)
    with pytest.raises(DumpError, match="calls no Pallas kernel"):
        tpu.kernels(tmp_path, "ENTRY %main {\n}", nothing, V5E)


PTX = """\
.visible .entry turn__1(
	.param .u64 turn__1_param_0
)
.reqntid 128, 1, 1
{
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
}
.visible .entry turn(
	.param .u64 turn_param_0
)
.reqntid 256, 1, 1
{
	// wgmma.mma_async in a remark is none
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, p, 1, 1, 0, 1;
	{ setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, p, 1, 1, 0, 1; }
}
"""
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'turn' for 'sm_90a'
ptxas info    : Function properties for turn
    108 bytes stack frame, 104 bytes spill stores, 92 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 108 bytes stack frame, 16 bytes smem
ptxas info    : Compiling entry function 'turn__1' for 'sm_90a'
ptxas info    : Function properties for turn__1
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""
GPU_PROGRAM = """\
ENTRY %main (a: bf16[16,8]) -> bf16[16,8] {
  %x = bf16[16,8]{1,0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", operand_layout_constraints={bf16[16,8]{1,0}}, backend_config={grid_x = 4 : i32, name = "turn", num_warps = 4 : i32}
  ROOT %y = bf16[16,8]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", operand_layout_constraints={bf16[16,8]{1,0}}, backend_config={grid_x = 4 : i32, name = "turn", num_warps = 4 : i32}
}
"""  # noqa: E501
LAUNCHES = """\
001: kCustomKernel [source | next=002] turn grid: [4, 2, 1] threads: [256, 1, 1]  shared_memory: 32768 bytes
002: kCustomKernel [prev=001 | sink] turn__1 grid: [4, 2, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
003: kCustomKernel [prev=002 | sink] returned grid: [4, 2, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
"""


def test_ptx_and_what_ptxas_said():
    assert gpu.figures(PTX, LOG, "turn", 32768) == {
        "registers": 255,
        "spill_store_bytes": 104,
        "spill_load_bytes": 92,
        "shared_bytes": 32768 + 16,
        "threads": 256,
        "wgmma": 2,
        "mma_sync": 0,
    }
    second = gpu.figures(PTX, LOG, "turn__1", 0)
    assert (second["registers"], second["wgmma"], second["mma_sync"]) == (40, 0, 1)
    with pytest.raises(DumpError, match="kernel other: ptxas says it in an unknown form"):
        gpu.figures(PTX, LOG, "other", 0)


def test_kernels_of_a_gpu_dump(tmp_path, monkeypatch):
    with pytest.raises(DumpError, match="0 thunk_sequence files"):
        gpu.kernels(tmp_path, GPU_PROGRAM)
    (tmp_path / "m.thunk_sequence.txt").write_text("")
    with pytest.raises(DumpError, match="turn is not among the launches"):
        gpu.kernels(tmp_path, GPU_PROGRAM)
    (tmp_path / "m.thunk_sequence.txt").write_text(LAUNCHES)
    with pytest.raises(DumpError, match="turn: no PTX among the 0"):
        gpu.kernels(tmp_path, GPU_PROGRAM)
    (tmp_path / "m.1.ptx").write_text(PTX)
    (tmp_path / "ptxas").write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{LOG}END\n")
    (tmp_path / "ptxas").chmod(0o755)
    monkeypatch.setattr(gpu, "_ptxas", lambda: str(tmp_path / "ptxas"))
    found = gpu.kernels(tmp_path, GPU_PROGRAM)
    assert [(kernel["name"], kernel["shared_bytes"]) for kernel in found] == [("turn", 32784), ("turn__1", 0)]
    with pytest.raises(DumpError, match="calls no Pallas kernel"):
        gpu.kernels(tmp_path, PROGRAM)
    with pytest.raises(DumpError, match="Mosaic GPU are called, but it wrote no PTX"):
        gpu.kernels(tmp_path, PROGRAM.replace("tpu_custom_call", "mosaic_gpu_v2"))


def test_a_kernel_of_mosaic_gpu(tmp_path, monkeypatch):
    folder = Path(gpu.environment(tmp_path)["MOSAIC_GPU_DUMP_TO"])
    (folder / "entry_0.ptx").write_text(PTX.partition(".visible .entry turn(")[0])
    (tmp_path / "ptxas").write_text(f"#!/bin/sh\ncat <<'END'\n{LOG}END\n")
    (tmp_path / "ptxas").chmod(0o755)
    monkeypatch.setattr(gpu, "_ptxas", lambda: str(tmp_path / "ptxas"))
    text = PROGRAM.replace("tpu_custom_call", "mosaic_gpu_v2")
    with pytest.raises(DumpError, match="its launch is not in the dump"):
        gpu.kernels(tmp_path, text)
    (folder / "entry_0.after_layout_inference.txt").write_text("threads(%a) dynamic_shared_memory_size %c84056_i32 {")
    (found,) = gpu.kernels(tmp_path, text)
    assert (found["name"], found["registers"], found["shared_bytes"]) == ("entry_0", 40, 84056)
