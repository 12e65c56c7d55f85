"""Sharding rules, the optimisers, and the training step on meshes of eight devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jattn.catalog import CATALOG
from jattn.models.lm import LM, LMConfig
from train.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, ScheduleConfig, load_recipe, recipes
from train.errors import UserError
from train.evaluate import place
from train.optimizer import matrices
from train.sharding import RULES, make_mesh, parameter_shardings, path_name, state_shardings
from train.step import make_program
from train.tasks import task_of

MODEL = LMConfig(
    width=16,
    num_layers=2,
    pattern=("lightning", "sliding_window"),
    num_heads=4,
    mlp_width=24,
    mixer_options={"sliding_window": {"window": 8}},
)
CONFIG = RunConfig(
    model=MODEL, schedule=ScheduleConfig(steps=10), data=DataConfig(context=32, batch=8), precision="float32"
)
ADAMW = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(name="adamw"))
# What leaves the step as it is shares a program, of which each test looks at its own.
PARTS = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(MODEL, remat="dots"),
    data=dataclasses.replace(CONFIG.data, accumulate=4),
    optimizer=OptimizerConfig(ema=0.15),
)
PARTS_ON_A_MESH = dataclasses.replace(
    CONFIG, model=dataclasses.replace(MODEL, remat="full"), data=dataclasses.replace(CONFIG.data, accumulate=2)
)
ALONE, ALL_SPLIT = MeshConfig(), MeshConfig(fsdp=2, tensor=2, context=2)


def shapes(model):
    return nnx.state(nnx.eval_shape(lambda: LM(model, rngs=nnx.Rngs(0))), nnx.Param)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    size = (CONFIG.data.batch, CONFIG.data.context)
    tokens = rng.integers(0, 32, size).astype(np.int32)
    return {
        "tokens": tokens,
        "targets": (tokens * 5 + 1) % 32,
        "segment_ids": np.repeat([[1, 2]], [20, 12], axis=1).repeat(size[0], 0).astype(np.int32),
        "positions": np.concatenate([np.arange(20), np.arange(12)])[None].repeat(size[0], 0).astype(np.int32),
        "weights": np.ones(size, np.float32),
    }


def names(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", recipes())
def test_every_parameter_of_every_recipe_has_one_rule(name):
    task = task_of(load_recipe(name))
    parameters = nnx.state(nnx.eval_shape(lambda: task.build(nnx.Rngs(0))), nnx.Param)
    found = names(parameter_shardings(parameters, make_mesh(MeshConfig(tensor=2, fsdp=2)), task.rules))
    assert found.keys() == names(parameters).keys()
    if task.unit == "tokens":
        assert found["embed/embedding"].spec == P("tensor", "fsdp")


@pytest.mark.parametrize("entry", [entry for entry in CATALOG if entry.layer], ids=lambda entry: entry.name)
@pytest.mark.parametrize("options", [{}, {"norm": "layernorm", "mlp": "gelu", "tied": True}], ids=["default", "other"])
def test_every_parameter_of_every_mixer_has_one_rule(entry, options):
    model = dataclasses.replace(MODEL, pattern=(entry.name,), mixer_options={}, **options)
    found = names(parameter_shardings(shapes(model), make_mesh(MeshConfig(tensor=2, fsdp=2))))
    assert found["units/blocks/0/mixer/projections/query/kernel"].spec == P(None, "fsdp", "tensor")
    assert found["units/blocks/0/mixer/projections/out/kernel"].spec == P(None, "tensor", "fsdp")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (RULES[1:], "parameter embed/embedding is matched by 0 rules"),
        ((*RULES, (r"embed/.*", (None, None))), "parameter embed/embedding is matched by 2 rules"),
    ],
)
def test_rules_must_match_once(rules, message):
    with pytest.raises(UserError, match=message):
        parameter_shardings(shapes(MODEL), make_mesh(MeshConfig()), rules)


@pytest.mark.parametrize(
    ("mesh", "model", "message"),
    [
        ({"tensor": 3}, {}, "mesh: .* does not fit 8 devices"),
        ({"data": 2}, {}, "mesh: .* does not fit 8 devices"),
        ({"fsdp": 0}, {}, "mesh.fsdp: expected at least 1, got 0"),
        ({"tensor": 8}, {"mlp_width": 20}, "mesh.tensor: 8 devices do not divide a dimension of 20 of parameter units"),
    ],
)
def test_meshes_that_do_not_fit(mesh, model, message):
    with pytest.raises(UserError, match=message):
        parameter_shardings(shapes(dataclasses.replace(MODEL, **model)), make_mesh(MeshConfig(**mesh)))


@pytest.mark.parametrize(
    ("data", "mesh", "message"),
    [
        ({"batch": 6}, {}, "data.batch: 6 sequences do not divide over data x fsdp = 8 devices"),
        ({"context": 30}, {"context": 4}, "data.context: 30 tokens do not divide over context = 4 devices"),
    ],
)
def test_batches_that_do_not_divide(data, mesh, message):
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **data))
    with pytest.raises(UserError, match=message):
        make_program(config, make_mesh(MeshConfig(**mesh)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer_options": {"sliding_window": {"window": 0}}}, "model: window: expected at least 1, got 0"),
        ({"num_heads": 3}, "model: num_heads: a width of 16 does not divide by 3 heads"),
        ({"num_kv_heads": 3}, "model: query: 4 heads cannot be shared by 3"),
        ({"mixer_options": {"sliding_window": {"widow": 3}}}, "mixer_options.sliding_window: has no option 'widow'"),
    ],
)
def test_models_that_cannot_be_built(options, message):
    with pytest.raises(UserError, match=message):
        make_program(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, **options)), make_mesh(MeshConfig()))


@functools.cache
def compiled(config, mesh, devices):
    return make_program(config, make_mesh(mesh, jax.devices()[:devices]))


def train(program, steps=3, factor=1.0, batches=None):
    state, losses = program.init(0), []
    for index in range(steps):
        given = batch(index) if batches is None else batches[index]
        state, metrics = program.step(state, place(given, program), np.float32(factor), program.request(0))
        losses.append(float(metrics["loss"]))
    return state, losses, metrics


def run(config, mesh, devices, **options):
    return train(compiled(config, mesh, devices), **options)


@pytest.fixture(scope="module")
def alone():
    return run(CONFIG, ALONE, 1)


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4, "tensor": 2}, {"tensor": 2, "context": 2}, {"tensor": 8}], ids=str)
def test_a_mesh_changes_where_and_not_what(mesh, alone):
    """Sums in another order: Muon's five matrix iterations magnify the last bits of a gradient to about 1e-4."""
    state, losses, _ = run(CONFIG, MeshConfig(**mesh), 8)
    np.testing.assert_allclose(losses, alone[1], rtol=2e-4)
    for ours, theirs in zip(jax.tree.leaves(state.parameters), jax.tree.leaves(alone[0].parameters), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
    if "fsdp" in mesh:
        kernel = names(state.parameters)["units/blocks/0/mlp/up/kernel"]
        assert kernel.sharding.spec == P(None, "fsdp", "tensor")
        assert kernel.addressable_shards[0].data.shape == (1, 4, 12)


def test_the_same_mesh_gives_the_same_bits(alone):
    """As after a restart: compiled again."""
    again = train(make_program(CONFIG, make_mesh(ALONE, jax.devices()[:1])))
    assert again[1] == alone[1]
    for one, two in zip(jax.tree.leaves(again[0]), jax.tree.leaves(alone[0]), strict=True):
        np.testing.assert_array_equal(one, two)


def test_moments_live_where_their_parameters_do():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    program = make_program(CONFIG, mesh)
    shardings = names(state_shardings(program.state_shape, program.state_shape.parameters, mesh))
    moments = {name: s for name, s in shardings.items() if name.endswith("mlp/up/kernel") and "optimizer" in name}
    assert moments
    assert {s.spec for s in moments.values()} == {P(None, "fsdp", "tensor")}
    assert shardings["step"].spec == P()


def test_an_update_that_is_not_finite_is_skipped(alone):
    bad = batch(0)
    bad["weights"] = bad["weights"] * np.nan
    state, losses, metrics = run(CONFIG, ALONE, 1, batches=[batch(0), bad, batch(1)])
    assert np.isnan(losses[1])
    assert int(metrics["skipped"]) == int(state.skipped) == 1
    assert int(state.step) == 3
    # The step after it starts from the parameters and moments of before it.
    expected, _, _ = run(CONFIG, ALONE, 1, steps=2)
    for one, two in zip(jax.tree.leaves(state.parameters), jax.tree.leaves(expected.parameters), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_factor_of_zero_changes_no_parameter():
    state, _, _ = run(CONFIG, ALONE, 1, steps=1, factor=0.0)
    begun = compiled(CONFIG, ALONE, 1).init(0)
    for one, two in zip(jax.tree.leaves(state.parameters), jax.tree.leaves(begun.parameters), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("config", [CONFIG, ADAMW], ids=lambda config: config.optimizer.name)
def test_it_learns(config):
    _, losses, _ = run(config, ALONE, 1, steps=25, factor=2.0, batches=[batch(0)] * 25)
    assert losses[0] == pytest.approx(np.log(256), rel=0.05)
    assert losses[-1] < 0.5 * losses[0]


def test_muon_takes_the_matrices_of_the_layers_and_nothing_else():
    taken = {name for name, kind in names(matrices(shapes(MODEL))).items() if kind is not None}
    found = {name.rsplit("/", 1)[0] if name.endswith(("axis",)) else name for name in taken}
    kernels = {name for name in names(shapes(MODEL)) if name.startswith("units/") and name.endswith("kernel")}
    assert found == kernels
    assert kernels


def test_bfloat16_computes_narrow_and_keeps_wide(alone):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    state, losses, _ = run(config, ALONE, 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.parameters)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses, alone[1], rtol=0.02)


PARTED = pytest.mark.parametrize(
    "settings", [(PARTS, ALONE, 1), (PARTS_ON_A_MESH, ALL_SPLIT, 8)], ids=["one device", "mesh"]
)


@PARTED
def test_accumulation_takes_the_gradient_of_the_whole_batch(settings):
    """Parts of different weight too: the mean is over tokens, not over parts."""
    uneven = batch(0)
    uneven["weights"][::3] = 0
    state, losses, metrics = run(*settings, steps=2, batches=[uneven, batch(1)])
    expected, wanted, norms = run(CONFIG, ALONE, 1, steps=2, batches=[uneven, batch(1)])
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norms["grad_norm"], rtol=1e-4)
    for path, leaf in names(state.parameters).items():
        np.testing.assert_allclose(leaf, names(expected.parameters)[path], atol=2e-3, err_msg=path)


def test_the_average_follows_its_formula():
    states = [run(PARTS, ALONE, 1, steps=steps)[0] for steps in (1, 2, 3)]
    mean = compiled(PARTS, ALONE, 1).init(0).parameters
    for count, state in enumerate(states):
        d = min(0.15, (1 + count) / (10 + count))
        mean = jax.tree.map(lambda m, x, d=d: d * m + (1 - d) * x, mean, state.parameters)
        for path, leaf in names(state.average).items():
            np.testing.assert_allclose(leaf, names(mean)[path], rtol=1e-5, atol=1e-6, err_msg=path)
    assert names(states[-1].weights).keys() == names(states[-1].parameters).keys()
    assert compiled(CONFIG, ALONE, 1).state_shape.average is None


def test_the_state_is_donated():
    program = compiled(CONFIG, MeshConfig(fsdp=4, tensor=2), 8)
    state = program.init(0)
    leaves = jax.tree.leaves(state)
    program.step(state, place(batch(), program), np.float32(1), program.request(0))
    assert all(leaf.is_deleted() for leaf in leaves)
    arguments = (program.state_shape, place(batch(), program), np.float32(1), program.request(0))
    memory = program.step.lower(*arguments).compile().memory_analysis()
    on_one_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(program.init(0)))
    assert memory.alias_size_in_bytes >= on_one_device


def test_requests_of_all_processes_become_one():
    program = compiled(CONFIG, MeshConfig(tensor=2, context=2), 8)
    _, metrics = program.step(program.init(0), place(batch(), program), np.float32(1), program.request(2))
    assert int(metrics["request"]) == 2


@PARTED
def test_rematerialisation_changes_memory_and_not_the_step(settings, alone):
    _, losses, _ = run(*settings)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)


# Mixers that are split by the same code train once on a split sequence: `tests/test_sharding.py` has all. Those of a
# group are the layers of one model.
SPLIT_ALIKE = {"retnet": "lightning", "linear_transformer": "linear", "normalized_attention": "linear"}
SPLIT_ALIKE |= {"delta_rule": "kda", "gated_delta_rule": "kda", "simple_gla": "mamba2", "hgrn2": "linear"}
SPLIT = {
    "states": ("lightning", "linear", "mamba2", "kda", "hedgehog"),
    "scores": ("softmax", "sliding_window", "block_sparse", "neighborhood_1d", "kronecker"),
}


def test_every_mixer_is_in_a_model_with_a_split_sequence():
    grouped = [name for names in SPLIT.values() for name in names]
    assert sorted([*grouped, *SPLIT_ALIKE]) == sorted(entry.name for entry in CATALOG if entry.layer)
    assert set(SPLIT_ALIKE.values()) <= set(grouped)


@pytest.mark.parametrize("pattern", SPLIT.values(), ids=SPLIT)
def test_every_mixer_trains_with_a_split_sequence(pattern):
    """On a mesh with a context axis the mixers run in pieces, by ring, halo or scan; the step stays the same.

    Adam's moments are sums of gradients, in which an error keeps its size.
    """
    model = dataclasses.replace(MODEL, pattern=pattern, num_layers=len(pattern), mlp="none", mixer_options={})
    config = dataclasses.replace(ADAMW, model=model)
    expected, wanted, _ = run(config, ALONE, 1)
    state, losses, _ = run(config, ALL_SPLIT, 8)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    moments = names(expected.optimizer)
    for path, leaf in names(state.optimizer).items():
        atol = 1e-4 * np.abs(moments[path]).max()
        np.testing.assert_allclose(leaf, moments[path], atol=atol, err_msg=f"{pattern}: {path}")
    for path, leaf in names(state.parameters).items():
        np.testing.assert_allclose(leaf, names(expected.parameters)[path], atol=2e-4, err_msg=f"{pattern}: {path}")
