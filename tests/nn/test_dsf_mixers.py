"""Mixers of the dynamical systems framework: the protocol for those without heads, and each as its system."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import catalog
from jattn.linear.dsf import dsf_eigenvalues, dsf_scan
from jattn.models.lm import LM, LMConfig, count_parameters
from jattn.nn import (
    LinearTransformerMixer,
    LRUMixer,
    NormalizedMixer,
    QLSTMMixer,
    ReversedQLSTMMixer,
    RGLRUMixer,
    S6Mixer,
    ShortConvolution,
    SoftmaxDSFMixer,
    SSDMixer,
)
from jattn.nn.dsf_recurrent import RGLRU, BlockLinear
from tests.nn import test_mixers as protocol
from train.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, ScheduleConfig
from train.sharding import make_mesh, parameter_shardings

WIDTH, BATCH, LENGTH = protocol.WIDTH, protocol.BATCH, protocol.LENGTH
POSITIONS = protocol.positions(0, LENGTH)
RECURRENT = catalog.RECURRENCES
every_entry = pytest.mark.parametrize("entry", RECURRENT, ids=lambda entry: entry.name)
x = protocol.x


def filled(mixer: Any) -> Any:
    """The mixer with weights where some start at zero, an output projection among them, or all alike."""
    rng = np.random.default_rng(1)
    state = nnx.state(mixer, nnx.Param)
    noisy = jax.tree.map(lambda x: np.asarray(x) + 0.3 * rng.standard_normal(x.shape).astype(x.dtype), state)
    nnx.update(mixer, jax.tree.map(jnp.asarray, noisy))
    return mixer


# The protocol of every mixer, for those of `RECURRENCES`


@pytest.fixture(params=RECURRENT, ids=lambda entry: entry.name)
def mixer(request):
    make = request.param.load_layer()
    return filled(make(WIDTH, num_heads=4, num_kv_heads=2, head_dim=6, layer_index=1, num_layers=3, rngs=nnx.Rngs(0)))


test_prefill_then_decode_is_the_parallel_forward = protocol.test_prefill_then_decode_is_the_parallel_forward
test_is_causal_by_gradient = protocol.test_is_causal_by_gradient
test_segments_do_not_see_one_another = protocol.test_segments_do_not_see_one_another
test_a_state_belongs_to_the_first_segment = protocol.test_a_state_belongs_to_the_first_segment_and_ends_in_the_last
test_bfloat16_stays_near_float32 = protocol.test_bfloat16_stays_near_float32


def test_flops_are_linear_in_tokens_and_count_the_matrices(mixer):
    assert mixer.flops(3, 64) == pytest.approx(3 * mixer.flops(1, 64))
    assert mixer.flops(2, 64) == pytest.approx(mixer.flops(1, 128))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(mixer, nnx.Param))
    matrices = [leaf.size for path, leaf in leaves if leaf.ndim > 1 and "bias" not in jax.tree_util.keystr(path)]
    assert mixer.flops(1, 64) >= 2 * 64 * sum(matrices)


@every_entry
def test_entries_name_what_exists(entry):
    layer, op = entry.load_layer(), entry.load_op()
    assert catalog.get(entry.name) is entry
    assert entry.name not in [other.name for other in catalog.CATALOG]
    assert "return_state" in inspect.signature(op).parameters
    if entry.step:
        assert callable(catalog.load(entry.step))
    assert importlib.import_module("jattn.nn").__dict__[layer.__name__] is layer


def test_layers_of_an_unknown_name_are_suggested_from_both_tables():
    with pytest.raises(ValueError, match=r"'qlstmm'; did you mean 'qlstm'\? The catalog has softmax.*, rglru"):
        catalog.get("qlstmm")


# Each is its system

MAKERS = {
    "softmax": functools.partial(SoftmaxDSFMixer, num_heads=2, num_kv_heads=1, head_dim=2, rope_theta=None),
    "linear": functools.partial(LinearTransformerMixer, num_heads=4, num_kv_heads=2, head_dim=5, rope_theta=None),
    "normalized": functools.partial(NormalizedMixer, num_heads=4, num_kv_heads=2, head_dim=4, rope_theta=100.0),
    "softplus": functools.partial(
        NormalizedMixer, num_heads=2, value_dim=5, rope_theta=None, normalizer="softplus", use_bias=False
    ),
    "exp_of": functools.partial(NormalizedMixer, num_heads=3, normalizer="exp_of:sigmoid"),
    "s6": functools.partial(S6Mixer, head_dim=5),
    "ssd": functools.partial(SSDMixer, head_dim=5),
    "lru": functools.partial(LRUMixer, state_dim=9),
    "qlstm": functools.partial(QLSTMMixer, expand=3),
    "qlstm_reversed": functools.partial(ReversedQLSTMMixer, taps=3),
    "rglru": functools.partial(RGLRUMixer, num_heads=3),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_a_mixer_is_its_system(name, packed, x):
    mixer = filled(MAKERS[name](WIDTH, rngs=nnx.Rngs(0)))
    ids = np.repeat([[1, 2], [3, 5]], [9, LENGTH - 9], axis=1).astype(np.int32) if packed else None
    options = {"segment_ids": ids} | ({"order": 12} if name == "softmax" else {})
    x = 0.3 * x if name == "softmax" else x  # where twelve terms of the exponential's series are enough

    @nnx.jit
    def both(mixer, x):
        system = mixer.as_dsf(x, **options)
        want, _ = mixer(x, positions=POSITIONS, segment_ids=ids)
        return system, mixer.finish(x, dsf_scan(system)), want

    system, got, want = both(mixer, x)
    protocol.assert_near(got, want)
    if packed:
        assert (np.asarray(dsf_eigenvalues(system))[:, 9] == 0).all()


def test_normalised_attention_divides_where_it_is_told(x):
    mixer = filled(NormalizedMixer(WIDTH, num_heads=2, rngs=nnx.Rngs(0)))

    @nnx.jit
    def run(mixer, x):
        systems = [mixer.as_dsf(x, normalize_in=where) for where in ("state", "readout")]
        return [mixer.finish(x, dsf_scan(system)) for system in systems], dsf_eigenvalues(systems[1])

    outs, eigenvalues = run(mixer, x)
    protocol.assert_near(outs[0], outs[1])
    assert (np.asarray(eigenvalues) == 1).all()


def test_values_share_the_width_however_small_the_states_are():
    for make in (SoftmaxDSFMixer, LinearTransformerMixer, NormalizedMixer):
        mixer = make(WIDTH, num_heads=2, head_dim=2, rngs=nnx.Rngs(0))
        assert mixer.projections.value.out_features == WIDTH
        assert mixer.projections.query.out_features == 4
        assert mixer.projections.query.bias is not None
    softmax = SoftmaxDSFMixer(WIDTH, num_heads=2, head_dim=1, rngs=nnx.Rngs(0))
    assert softmax.init_state(3, 7, jnp.float32).value.shape == (3, 7, 2, 6)
    linear = LinearTransformerMixer(WIDTH, num_heads=2, num_kv_heads=1, head_dim=3, rngs=nnx.Rngs(0))
    assert [leaf.shape for leaf in linear.init_state(5, 7, jnp.bfloat16)] == [(5, 1, 3, 6), (5, 1, 3)]


def test_softmax_with_narrow_keys_decodes_as_it_is_trained(x):
    mixer = filled(SoftmaxDSFMixer(WIDTH, num_heads=2, num_kv_heads=1, head_dim=2, rngs=nnx.Rngs(0)))
    protocol.assert_decodes_as_it_is_trained(mixer, x)


# Sizes and starting values


def test_s6_starts_as_published():
    mixer = S6Mixer(40, head_dim=5, rngs=nnx.Rngs(0))
    assert mixer.x_proj.kernel.shape == (40, 3 + 2 * 5)  # ceil(40 / 16) beside B and C
    np.testing.assert_allclose(mixer.A_log[...], np.tile(np.log(np.arange(1, 6)), (40, 1)), rtol=1e-6)
    assert (mixer.D[...] == 1).all()
    assert np.abs(mixer.dt_proj.kernel[...]).max() <= 3**-0.5
    step = np.log1p(np.exp(mixer.dt_bias[...]))
    assert 1e-3 <= step.min() < 5e-3
    assert 2e-2 < step.max() <= 0.1
    assert (mixer.out_proj.kernel[...] == 0).all()
    assert S6Mixer(40, rngs=nnx.Rngs(0)).init_state(2, 9, jnp.bfloat16).shape == (2, 40, 16)
    scalar = SSDMixer(40, head_dim=5, rngs=nnx.Rngs(0))
    assert scalar.x_proj.kernel.shape == (40, 11)
    assert scalar.dt_proj is None
    assert float(scalar.A_log[...]) == 0


def test_lru_starts_on_a_ring():
    mixer = LRUMixer(WIDTH, state_dim=500, r_min=0.5, r_max=0.9, rngs=nnx.Rngs(0))
    lam = np.asarray(dsf_eigenvalues(mixer.as_dsf(jnp.zeros((1, 1, WIDTH)))))[0, 0, 0, 0]
    assert lam.shape == (500,)
    assert 0.5 <= np.abs(lam).min() < 0.52
    assert 0.89 < np.abs(lam).max() <= 0.9
    assert np.angle(lam).max() > 3
    assert np.angle(lam).min() < -3
    # gamma makes the state of a white input as large as the input, whatever lam is.
    np.testing.assert_allclose(np.exp(mixer.gamma_log[...]), np.sqrt(1 - np.abs(lam) ** 2), rtol=1e-5)
    assert mixer.init_state(2, 9, jnp.bfloat16).dtype == jnp.complex64


def test_lru_is_its_loop(x):
    mixer = filled(LRUMixer(WIDTH, state_dim=5, rngs=nnx.Rngs(0)))
    p = {name: np.asarray(leaf, np.float64) for name, leaf in nnx.to_pure_dict(nnx.state(mixer, nnx.Param)).items()}
    lam = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    inputs = np.exp(p["gamma_log"]) * (np.asarray(x) @ (p["B_re"] + 1j * p["B_im"]))
    h, want = 0, []
    for t in range(LENGTH):
        h = lam * h + inputs[:, t]
        want.append((h @ (p["C_re"] + 1j * p["C_im"])).real + p["D"] * np.asarray(x[:, t]))
    protocol.assert_near(protocol.whole(mixer, x)[0], np.stack(want, axis=1))


def test_rg_lru_starts_near_one_and_its_gates_are_block_diagonal(x):
    layer = RGLRU(600, 3, rngs=nnx.Rngs(0))
    squared = np.asarray(1 / (1 + np.exp(layer.decay[...]))) ** 2
    assert 0.81 <= squared.min() < 0.815
    assert 0.99 < squared.max() < 0.998002
    gate = filled(BlockLinear(WIDTH, 3, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
    shift = np.repeat(np.float32([0, 1, 0]), 4)
    moved = np.asarray(gate(x + shift)) - gate(x)
    assert (np.abs(moved).max((0, 1)) > 0).tolist() == [False] * 4 + [True] * 4 + [False] * 4


def test_rg_lru_forgets_where_a_position_is_0(x):
    mixer = filled(RGLRUMixer(WIDTH, num_heads=3, rngs=nnx.Rngs(0)))
    restart, _ = protocol.packed(9, LENGTH - 9)
    got, _ = protocol.apply(mixer, x, restart)
    alone = [protocol.alone(mixer, x, 0, 9), protocol.alone(mixer, x, 9, LENGTH)]
    protocol.assert_near(got, np.concatenate(alone, axis=1))
    # And from a state, of which nothing is left then.
    state = jax.tree.map(jnp.ones_like, mixer.init_state(BATCH, LENGTH, jnp.float32))
    protocol.assert_near(protocol.apply(mixer, x, POSITIONS, state=state)[0], protocol.whole(mixer, x)[0])


def test_a_short_convolution_with_a_bias_and_without_activation(x):
    layer = ShortConvolution(WIDTH, activation=None, use_bias=True, rngs=nnx.Rngs(0))
    assert (layer.bias[...] == 0).all()
    before, _ = layer(x)
    layer.bias[...] = jnp.arange(WIDTH, dtype=jnp.float32)
    np.testing.assert_allclose(layer(x)[0], before + np.arange(WIDTH), atol=1e-5)
    silu = ShortConvolution(WIDTH, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(silu(x)[0], jax.nn.silu(before), atol=1e-6)


# In a model


@every_entry
def test_a_model_of_it_generates_as_it_is_trained_and_fits_a_mesh(entry):
    config = LMConfig(18, 16, 2, pattern=(entry.name,), num_heads=4, head_dim=4, mlp="none")
    model = LM(config, rngs=nnx.Rngs(0))
    assert not any(
        "mlp" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.state(model))
    )
    parameters = nnx.state(model, nnx.Param)
    parameter_shardings(parameters, make_mesh(MeshConfig(tensor=2, fsdp=2)))  # each has one rule, or this raises
    model = filled(model)
    tokens = np.random.default_rng(2).integers(0, 17, (2, 11), np.int32)
    want, _ = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    step = nnx.jit(lambda model, tokens, state: model(tokens, state=state))
    state, pieces = model.init_state(2, 11), []
    for cut in (slice(0, 9), slice(9, 10), slice(10, 11)):
        out, state = step(model, tokens[:, cut], state)
        pieces.append(out)
    protocol.assert_near(np.concatenate(pieces, axis=1), want)
    assert model.flops(1, 8) > 0
    with_mlp = nnx.eval_shape(lambda: LM(dataclasses.replace(config, mlp="gelu"), rngs=nnx.Rngs(0)))
    assert count_parameters(model) < count_parameters(with_mlp)


@every_entry
def test_a_large_batch_is_its_rows(entry, x):
    """As for every mixer of the catalog: at 64 rows the CPU compiler fuses what it does not at one."""
    mixer = filled(entry.load_layer()(WIDTH, num_heads=1, rngs=nnx.Rngs(0)))
    rows = np.tile(x, (32, 1, 1)) + 0.1 * np.random.default_rng(0).normal(size=(64, LENGTH, WIDTH)).astype(np.float32)
    run = nnx.jit(lambda mixer, x: mixer(x, positions=jnp.broadcast_to(jnp.arange(LENGTH), x.shape[:2]))[0])
    whole = np.asarray(run(mixer, rows))
    for row in (0, 37, 63):
        protocol.assert_near(whole[row : row + 1], run(mixer, rows[row : row + 1]))


def test_s6_and_rg_lru_train_with_a_split_sequence():
    from tests.train.test_step import run

    model = LMConfig(width=16, num_layers=2, pattern=("s6", "rglru"), num_heads=4, head_dim=4, mlp="none")
    data = DataConfig(context=32, batch=8)
    optimizer = OptimizerConfig(name="adamw")
    schedule = ScheduleConfig(steps=10)
    config = RunConfig(model=model, optimizer=optimizer, schedule=schedule, data=data, precision="float32")
    _, wanted, _ = run(config, MeshConfig(), 1)
    _, losses, _ = run(config, MeshConfig(fsdp=2, tensor=2, context=2), 8)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (NormalizedMixer, {"num_heads": 5}, ValueError, "num_heads: a width of 12 does not divide by 5 heads"),
        (NormalizedMixer, {"num_heads": 5, "head_dim": 3}, ValueError, "num_heads: .* or give value_dim"),
        (NormalizedMixer, {"num_heads": 2, "normalizer": "elu"}, ValueError, "normalizer: expected one of 'exp'"),
        (S6Mixer, {"head_dim": 0}, ValueError, "head_dim: expected at least 1, got 0"),
        (S6Mixer, {"shared_rate": None}, TypeError, "shared_rate: expected a static True or False"),
        (LRUMixer, {"r_min": 0.9, "r_max": 0.5}, ValueError, "r_min, r_max: expected 0 <= r_min < r_max <= 1"),
        (LRUMixer, {"state_dim": 2.5}, TypeError, "state_dim: expected a static integer"),
        (QLSTMMixer, {"expand": 0}, ValueError, "expand: expected at least 1, got 0"),
        (QLSTMMixer, {"taps": 0}, ValueError, "taps: expected at least 1, got 0"),
        (RGLRUMixer, {"num_heads": 5}, ValueError, "num_heads: a width of 12 does not divide by 5 heads"),
    ],
)
def test_option_errors(make, options, error, message):
    with pytest.raises(error, match=message):
        make(WIDTH, rngs=nnx.Rngs(0), **options)
