"""What `python -m train compile` says: collectives read from HLO, verdicts, advice and one-line errors.

No TPU compiler is needed here: the step is compiled for eight host devices, and libtpu's texts are short samples.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn.models.lm import LMConfig
from train import compile as ahead
from train import hlo
from train.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, ScheduleConfig, load_recipe
from train.errors import UserError

TINY = RunConfig(
    model=LMConfig(
        width=32,
        num_layers=6,
        pattern=("lightning", "sliding_window"),
        num_heads=4,
        mlp_width=48,
        mixer_options={"sliding_window": {"window": 8}},
    ),
    schedule=ScheduleConfig(steps=10),
    data=DataConfig(context=32, batch=16),
    optimizer=OptimizerConfig(name="adamw"),
    mesh=MeshConfig(data=2, fsdp=4),
)

TPU_TEXT = """\
HloModule jit_step, is_scheduled=true

%body.1 (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %all-gather.1 = bf16[1,32,64]{2,1,0:T(8,128)(2,1)} all-gather(%x), metadata={op_name="f/while/dot"}
  ROOT %t = (s32[], bf16[8,4]) while(%init), condition=%inner_condition, body=%inner_body
}

%inner_condition (p: s32[]) -> pred[] {
  %c = u32[]{:T(128)} constant(4)
  ROOT %lt = pred[] compare(%p, %c), direction=LT
}

%inner_body (p: s32[]) -> s32[] {
  %s = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
  ROOT %f = s32[] fusion(%y), calls=%fused
}

%fused (p: s32[]) -> s32[] {
  ROOT %all-reduce.9 = (f32[3]{0}, pred[5]{0}) all-reduce(%y, %z), to_apply=%add
}

%condition.1 (p: s32[]) -> pred[] {
  %c = s32[] constant(6)
  ROOT %lt = pred[] compare(%p, %c), direction=LT
}

%never (p: s32[]) -> s32[] {
  ROOT %all-to-all.1 = f32[7]{0} all-to-all(%y)
}

ENTRY %main (p: s32[]) -> s32[] {
  %w = (s32[], bf16[8,4]) while(%init), condition=%condition.1, body=%body.1
  %g = ((f32[6,8,64]{2,1,0}), (f32[6,32,64]{2,1,0})) all-gather-start(%p), dimensions={1}
  ROOT %r = s32[] add(%a, %b)
}
"""


def test_collectives_know_their_loops_and_bytes():
    gather, permute, reduce, outside = hlo.collectives(TPU_TEXT)
    assert (gather.kind, gather.shapes, gather.bytes) == ("all-gather", ((1, 32, 64),), 32 * 64 * 2)
    assert (gather.depth, gather.times, gather.source) == (1, 6, "f/while/dot")
    assert (permute.bytes, permute.depth, permute.times) == (2 * 8 * 2, 2, 24)
    # Inside a fusion inside two loops; a variadic one has two results.
    assert (reduce.bytes, reduce.depth, reduce.times) == (3 * 4 + 5, 2, 24)
    assert (outside.shapes, outside.bytes, outside.depth) == (((6, 32, 64),), 6 * 32 * 64 * 4, 0)
    rows = {row.kind: row for row in hlo.traffic([gather, permute, reduce, outside])}
    assert set(rows) == {"all-gather", "all-reduce", "collective-permute"}
    assert rows["all-gather"] == hlo.Traffic("all-gather", 1, 1, 7, 6 * 4096 + 49152)


def test_a_gather_of_a_whole_stack_is_found():
    of_unit, of_stack = hlo.weight_gathers(hlo.collectives(TPU_TEXT), [((6, 32, 64), (1, 4, 1))])
    assert [gather.depth for gather in of_unit] == [1]
    assert [gather.shapes for gather in of_stack] == [((6, 32, 64),)]
    # In the loop over the parts of an accumulated batch it is one all the same.
    nested = [dataclasses.replace(gather, depth=1, times=4) for gather in of_stack]
    assert hlo.weight_gathers(nested, [((6, 32, 64), (1, 4, 1))])[1] == nested
    # Neither size comes from a parameter that is not split.
    assert hlo.weight_gathers(hlo.collectives(TPU_TEXT), [((6, 32, 64), (1, 1, 1))]) == ([], [])


@pytest.mark.parametrize("whole", [False, True], ids=["one unit at a time", "whole stack"])
def test_the_scan_of_a_real_program_gathers_a_unit_at_a_time(whole):
    mesh = Mesh(jax.devices(), ("fsdp",))
    stack = jax.ShapeDtypeStruct((3, 32, 48), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    replicated = NamedSharding(mesh, P())

    def layer(x, w):
        w = jax.lax.with_sharding_constraint(w, replicated)
        return jnp.tanh(x @ w) @ w.T, None

    def model(x, stack):
        if whole:
            stack = jax.lax.with_sharding_constraint(stack, replicated)
        return jax.lax.scan(layer, x, stack)[0]

    found = hlo.collectives(jax.jit(model).lower(x, stack).compile().as_text())
    of_unit, of_stack = hlo.weight_gathers(found, [((3, 32, 48), (1, 8, 1))])
    assert (bool(of_unit), bool(of_stack)) == (not whole, whole)
    assert all(gather.times == 3 for gather in of_unit)


@pytest.fixture
def host_devices(monkeypatch):
    """Stand-ins for a topology: the eight devices of this process, with a given memory each."""

    def use(memory):
        monkeypatch.setattr(ahead, "prepare", lambda topology: None)
        monkeypatch.setattr(ahead, "devices_of", lambda topology: jax.devices())
        monkeypatch.setattr("train.config.load_recipe", lambda name: TINY)
        monkeypatch.setitem(ahead.MEMORY, "cpu", memory)

    return use


def test_a_step_that_fits(host_devices, capsys, tmp_path):
    host_devices(1 << 30)
    path = tmp_path / "report.json"
    assert command_or_code(["tiny", "--topology", "host", "--json", str(path), "--model.num-layers", "4"]) == 0
    shown = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["fits"]
    assert report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    assert report["tokens"] == 16 * 32
    assert f"{report['parameters']:,} parameters, 512 tokens a step" in shown
    assert f"fits, {report['total'] / (1 << 30):.0%} of 1 GiB" in shown
    memory = report["memory"]
    # Weights and two moments in float32, mostly over four devices, and five numbers for every token of two rows.
    state = 3 * 4 * report["parameters"] / 4
    assert 0.9 * state < memory["arguments"] - 2 * 32 * 5 * 4 < 1.2 * state
    assert memory["aliased"] > 0.9 * state
    assert report["total"] == memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
    assert "all-reduce" in shown


@pytest.mark.parametrize(("flags", "options"), [((), None), (("--quick",), {"optimization_level": "O1"})])
def test_quick_asks_less_of_the_compiler_and_says_so(flags, options, host_devices, monkeypatch, capsys):
    host_devices(1 << 30)
    asked = []

    class Lowered:
        def compile(self, options):
            asked.append(options)
            return jax.jit(lambda: 0).lower().compile(options)

    monkeypatch.setattr(ahead, "_lower", lambda *arguments: Lowered())
    assert command_or_code(["tiny", *flags, "--topology", "host"]) == 0
    assert asked == [options]
    assert ("without --quick" in capsys.readouterr().out) == bool(flags)


def test_a_step_that_does_not_fit_says_what_would_change_that(host_devices, capsys):
    host_devices(1 << 16)
    assert command_or_code(["tiny", "--topology", "host"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit, needs" in shown
    offered = [line.strip().split("   ")[0] for line in shown.partition("any of these needs less:")[2].splitlines()]
    offered = [change for change in offered if change]
    assert "--model.remat full" in offered
    assert "--mesh.data 1 --mesh.fsdp 8" in offered
    assert "--data.accumulate 2" in offered
    assert "--mesh.data 1 --mesh.context 2" in offered


def command_or_code(arguments):
    try:
        ahead.main(arguments)
    except SystemExit as end:
        return end.code
    return 0


def test_every_change_that_is_offered_can_be_made():
    from flax import nnx

    from jattn.models.lm import LM
    from train.config import parse_overrides
    from train.sharding import check_batch, parameter_shardings

    devices = jax.devices()
    model = nnx.eval_shape(lambda: LM(TINY.model, rngs=nnx.Rngs(0)))
    offered = list(ahead.changes(TINY, devices, model))
    assert len(offered) >= 6
    for change in offered:
        config = parse_overrides(TINY, change.split("   ")[0].split())
        assert config != TINY
        mesh = ahead.place(config, devices)
        check_batch(mesh, config.data.batch // config.data.accumulate, config.data.context)
        parameter_shardings(nnx.state(model, nnx.Param), mesh)


def test_nothing_is_offered_that_does_not_divide():
    from flax import nnx

    from jattn.models.lm import LM

    model = nnx.eval_shape(lambda: LM(TINY.model, rngs=nnx.Rngs(0)))
    odd = dataclasses.replace(TINY, data=DataConfig(context=33, batch=8), mesh=MeshConfig(data=8))
    offered = " ".join(ahead.changes(odd, jax.devices(), model))
    assert "--mesh.fsdp 8" in offered
    assert "context" not in offered
    assert "--data.batch" not in offered


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
         "Used 22.78G of 15.75G hbm. Exceeded hbm capacity by 7.03G.", round(22.78 * 2**30)),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (849.86G) exceeds available HBM (15.75G).", round(849.86 * 2**30)),
        ("RESOURCE_EXHAUSTED: Ran out of memory", 0),
        ("INTERNAL: Mosaic failed to compile", None),
    ],
)  # fmt: skip
def test_the_compilers_out_of_memory_error_is_read(message, wanted):
    assert ahead._ran_out(message) == wanted


def test_a_compiler_that_runs_out_of_memory_is_a_verdict(host_devices, monkeypatch, capsys):
    host_devices(16 << 30)

    class Lowered:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 22.50G of 15.75G hbm.")

    monkeypatch.setattr(ahead, "_lower", lambda *arguments: Lowered())
    assert command_or_code(["tiny", "--topology", "host"]) == 1
    assert "does not fit, needs 22.5 GiB of 16 GiB of a device" in capsys.readouterr().out


def test_a_gpu_is_warned_of_the_share_that_jax_takes():
    report = ahead.Report(
        "r", "h100:8", "NVIDIA H100 80GB HBM3", 8, {"fsdp": 8}, 1, 1, True, 70, 80, {}, 1.0, 0.0, [], 0, 0, 0, 1.0, []
    )
    assert "fits, 88% of" in ahead.verdict(report)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in ahead.verdict(report)
    assert "FRACTION" not in ahead.verdict(dataclasses.replace(report, total=50))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=1, fsdp=3), r"does not fit 8 devices.*--mesh\.data 1 --mesh\.tensor 1 .*--mesh\.fsdp 8 does"),
        (MeshConfig(data=1, tensor=4, context=4), r"--mesh\.data 1 --mesh\.tensor 4 --mesh\.context 2 .*fsdp 1 does"),
    ],
)
def test_a_mesh_of_another_size_names_one_that_fits(mesh, message):
    with pytest.raises(UserError, match=message):
        ahead.place(dataclasses.replace(TINY, mesh=mesh), jax.devices())


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e:2x4", r"\.venv-lab/bin/python -m train compile \.\.\.\), or pip install libtpu"),
        ("h100:8", "--no-deps jax-cuda13-plugin=="),
        ("foo", "--topology foo: no chip is called 'foo'; there are v4, v5e, "),
    ],
)
def test_a_missing_compiler_or_chip_is_one_line(topology, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message) as caught:
        ahead.main(["lm_v5e_8", "--topology", topology])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lm_1b"], "expected --topology NAME"),
        (["lm_1b", "--topology"], "--topology: expected a value after it"),
        (["lm_1b", "--topology", "h100:12"], "expected h100:N with N up to 8 or a multiple of 8"),
    ],
)
def test_options_that_cannot_be(arguments, message, monkeypatch):
    monkeypatch.setattr(ahead, "prepare", lambda topology: None)
    with pytest.raises(UserError, match=message):
        ahead.main(arguments)


def test_help_names_the_recipes(capsys):
    ahead.main(["--help"])
    shown = capsys.readouterr().out
    assert "--topology NAME" in shown
    assert "lm_1b" in shown


@pytest.mark.parametrize(("name", "least", "most"), [("lm_1b", 1.2e9, 1.4e9), ("lm_v5e_8", 2e8, 4e8)])
def test_recipes_have_the_size_they_claim(name, least, most):
    from flax import nnx

    from jattn.models.lm import LM, count_parameters

    config = load_recipe(name)
    assert least < count_parameters(nnx.eval_shape(lambda: LM(config.model, rngs=nnx.Rngs(0)))) < most
    assert config.precision == "bfloat16"
    assert math.prod(dataclasses.astuple(config.mesh)) in (8, 512)
