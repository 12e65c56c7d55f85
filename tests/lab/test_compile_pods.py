"""Whole pods, compiled by libtpu and XLA:GPU on a machine that has neither; `make lab` installs both.

A pod takes a minute by `--quick`, and two or three as a run would be compiled, so each is compiled once by `--quick`
and every test reads the same report. Steps of less work are compiled as in a run.
"""

from __future__ import annotations

import functools

import pytest

from train import compile as ahead
from train import topology as chips
from train.config import MeshConfig, load_recipe, parse_overrides
from train.errors import UserError
from train.sharding import make_mesh

PODS = {
    "v5e:2x4": ("lm_v5e_8", ""),
    "v5p:8x8x8": ("lm_1b", ""),
    "v6e:16x16": ("lm_1b", "--mesh.fsdp 16 --mesh.tensor 4 --mesh.context 4"),
}
CHIPS = {"v5e:2x4": 8, "v5p:8x8x8": 512, "v6e:16x16": 256}


@functools.cache
def report(topology):
    recipe, overrides = PODS[topology]
    chips.prepare(topology)
    config = parse_overrides(load_recipe(recipe), overrides.split())
    return ahead.analyse(recipe, config, topology, quick=True)


@pytest.mark.parametrize("topology", PODS)
def test_the_recipe_fits_its_pod(topology):
    found = report(topology)
    assert found.devices == CHIPS[topology]
    assert found.fits
    # Weights and two moments in float32 over fsdp x tensor devices, little more than that beside the batch.
    state = 3 * 4 * found.parameters / found.mesh["fsdp"] / found.mesh["tensor"]
    assert 0.95 * state < found.memory["aliased"] < 1.15 * state


@pytest.mark.parametrize("topology", PODS)
def test_no_stack_of_weights_is_gathered(topology):
    assert report(topology).stack_gathers == 0


@pytest.mark.parametrize("topology", PODS)
def test_every_split_weight_is_gathered_inside_the_scan(topology):
    found = report(topology)
    assert found.unit_gathers >= found.unit_weights > 0


def test_libtpu_running_out_of_memory_is_a_verdict():
    chips.prepare("v5e-8")
    config = parse_overrides(load_recipe("lm_v5e_8"), ["--data.batch", "64", "--model.remat", "none"])
    found = ahead.analyse("lm_v5e_8", config, "v5e-8")
    assert not found.fits
    assert found.total > found.capacity
    assert found.changes[1].startswith("--model.remat full")


@pytest.mark.parametrize(
    ("topology", "devices"),
    [("v5e-8", 8), ("v6e-256", 256), ("v4:2x2x1", 4), ("tpu7x:2x2x1", 8), ("h100:4", 4), ("h100:16", 16)],
)
def test_topologies_have_known_devices(topology, devices):
    chips.prepare(topology)
    found = chips.devices_of(topology)
    assert len(found) == devices
    assert found[0].device_kind in chips.MEMORY


@pytest.mark.parametrize(
    ("topology", "what"),
    [
        ("v9:2x2", "no chip is called 'v9'"),
        *[(name, "is none that the compiler knows") for name in ("v5e:3x3", "v5p", "v5e-7")],
    ],
)
def test_unknown_topologies_are_one_line(topology, what):
    with pytest.raises(UserError, match=f"--topology {topology}: {what}") as caught:
        ahead.main(["lm_v5e_8", "--topology", topology])
    assert "\n" not in str(caught.value)


def test_a_torus_that_cannot_be_cut_is_named(monkeypatch):
    from jax.experimental import mesh_utils

    def refuse(*arguments, **options):
        raise NotImplementedError("no assignment")

    monkeypatch.setattr(mesh_utils, "create_device_mesh", refuse)
    chips.prepare("v5e:2x4")
    with pytest.raises(UserError, match="torus of 2 x 4 x 1 chips"):
        ahead.place(load_recipe("lm_v5e_8"), chips.devices_of("v5e:2x4"))


def test_an_axis_may_cut_a_side_of_the_torus():
    """8 of 4 x 4 chips: one side and half of the other."""
    chips.prepare("v5e-16")
    mesh = make_mesh(MeshConfig(data=2, fsdp=8), chips.devices_of("v5e-16"))
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (2, 8)


def test_a_step_compiles_for_h100():
    chips.prepare("h100:2")
    small = "--model.width 64 --model.num-layers 2 --model.mlp-width 64 --data.context 128 --data.batch 2"
    found = ahead.analyse("pydoc_lm", parse_overrides(load_recipe("pydoc_lm"), small.split()), "h100:2")
    assert found.fits
    assert found.device.startswith("NVIDIA H100")
    assert "all-reduce" in {row.kind for row in found.traffic}
