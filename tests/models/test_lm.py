"""The language model: scanned units, packing, remat, dtypes, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.catalog import CATALOG
from jattn.models.lm import LM, LMConfig, Unit, count_parameters

CONFIG = LMConfig(
    vocab_size=17,
    width=12,
    num_layers=6,
    pattern=("lightning", "softmax", "sliding_window"),
    num_heads=2,
    mlp_width=20,
    mixer_options={"sliding_window": {"window": 3}},
)


def make(config=CONFIG, seed=0):
    """A model whose zero-initialised parameters are not zero, so that every part of it matters."""
    model = nnx.jit(lambda: LM(config, rngs=nnx.Rngs(seed)))()
    rng = np.random.default_rng(seed)

    def moved(x):
        return x if np.any(x) else jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)

    nnx.update(model, jax.tree.map(moved, nnx.state(model, nnx.Param)))
    return model


@nnx.jit
def call(model, tokens, **context):
    """Compiled: operation by operation, most of the time would go into compiling."""
    return model(tokens, **context)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 17, (2, 13), np.int32)


def test_scan_equals_a_loop_over_units(model, tokens):
    graph, stacked = nnx.split(model.units)
    positions = np.broadcast_to(np.arange(13), (2, 13))
    apply = nnx.jit(lambda unit, x: unit(x, positions=positions, segment_ids=None, state=None)[0])
    x = model.embed(tokens)
    for index in range(CONFIG.num_units):
        x = apply(nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], stacked)), x)
    want = model.norm(x) @ model.head.kernel[...]
    np.testing.assert_allclose(call(model, tokens)[0], want, atol=1e-5)


def test_layers_differ_and_know_their_index(model):
    slopes = model.units.blocks[0].mixer.slopes[...]
    alone = Unit(CONFIG, 1, rngs=nnx.Rngs(0)).blocks[0].mixer.slopes[...]
    np.testing.assert_allclose(slopes[1], alone, rtol=1e-6)
    assert (slopes[0] > slopes[1]).all()
    kernel = model.units.blocks[0].mlp.up.kernel[...]
    assert (kernel[0] != kernel[1]).all()


def test_a_state_makes_pieces_equal_to_the_whole(model, tokens):
    expected, _ = call(model, tokens)
    state = model.init_state(2, 13)
    first, state = call(model, tokens[:, :6], state=state)
    second, state = call(model, tokens[:, 6:], state=state)
    np.testing.assert_allclose(np.concatenate([first, second], 1), expected, atol=5e-5)
    assert (state.position == 13).all()


def test_packed_documents_are_independent(model, tokens):
    """What follows a token changes nothing: the whole's program gives the second document too, and more after it."""
    ids = np.repeat(np.int32([[1, 2]] * 2), [5, 8], axis=1)
    restart = np.tile(np.concatenate([np.arange(5), np.arange(8)]), (2, 1))
    packed, _ = call(model, tokens, positions=restart, segment_ids=ids)
    first, second = (call(model, x)[0] for x in (tokens, np.roll(tokens, -5, axis=1)))
    np.testing.assert_allclose(packed, np.concatenate([first[:, :5], second[:, :8]], 1), atol=5e-5)


def test_loss_is_the_cross_entropy_of_the_logits(model, tokens):
    logits = np.asarray(call(model, tokens)[0], np.float64)
    targets = np.roll(tokens, -1, axis=1)
    right = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    loss = nnx.jit(lambda model: model.loss(tokens, targets))(model)
    np.testing.assert_allclose(loss, np.log(np.exp(logits).sum(-1)) - right, atol=1e-5)


@functools.cache
def gradient(remat):
    config = dataclasses.replace(CONFIG, num_layers=4, pattern=("lightning", "softmax"), mixer_options={}, remat=remat)
    graph, weights, rest = nnx.split(make(config), nnx.Param, ...)
    tokens = np.random.default_rng(0).integers(0, 17, (2, 13), np.int32)
    return jax.jit(jax.grad(lambda w: nnx.merge(graph, w, rest).loss(tokens, tokens).sum()))(weights)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_memory_and_not_gradients(remat):
    for a, b in zip(jax.tree.leaves(gradient("none")), jax.tree.leaves(gradient(remat)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_tied_head_and_soft_cap(model, tokens):
    config = dataclasses.replace(CONFIG, tied=True, logits_soft_cap=0.5)
    tied = make(config)
    assert tied.head is None
    assert count_parameters(tied) == count_parameters(model) - 12 * 17
    logits, _ = call(tied, tokens)
    assert 0 < np.abs(logits).max() <= 0.5


def test_bfloat16_computation_keeps_float32_weights(tokens):
    model = make(dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    assert jax.eval_shape(lambda: model.hidden(tokens)[0]).dtype == jnp.bfloat16
    assert call(model, tokens)[0].dtype == jnp.float32


def test_flops_count_the_matrices():
    """With short sequences almost all work is in the matrices: two operations per weight and token."""
    model = make(dataclasses.replace(CONFIG, width=96, mlp_width=160))
    matrices = sum(
        leaf[0].size * 2 if leaf.ndim == 3 else leaf.size
        for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))
        if leaf.ndim > 1
    )
    embedding = 17 * 96
    assert model.flops(1, 2) / (2 * 2 * (matrices - embedding)) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 7}, "num_layers: 7 is no multiple of the pattern's length 3; 9 would be"),
        ({"pattern": ("lightnin",)}, "'lightnin'; did you mean 'lightning'"),
        ({"pattern": ()}, "pattern: expected at least one mixer name"),
        ({"mixer_options": {"linear": {}}}, "mixer_options: 'linear' is not in the pattern"),
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads: expected at least 1, got 0"),
        ({"head_dim": 0}, "head_dim: expected at least 1, got 0"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap: expected a positive number or None, got 0.0"),
        ({"remat": "some"}, "remat: expected one of 'none', 'dots', 'full', got 'some'"),
        ({"mlp": "relu"}, "mlp: expected one of 'swiglu', 'gelu', 'none', got 'relu'"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_pattern_is_no_string():
    with pytest.raises(TypeError, match=r"pattern: expected a tuple .* got the string 'kda'; write \('kda',\)"):
        dataclasses.replace(CONFIG, pattern="kda")


def test_input_errors(model, tokens):
    with pytest.raises(TypeError, match="tokens: expected an integer dtype, got float32"):
        model(tokens.astype(np.float32))
    with pytest.raises(ValueError, match=r"segment_ids: expected \[B, T\] with T = 13 as in tokens, got \(2, 5\)"):
        model(tokens, segment_ids=tokens[:, :5])


@pytest.mark.parametrize("entry", [entry for entry in CATALOG if entry.layer], ids=lambda entry: entry.name)
def test_a_large_batch_is_its_rows(entry):
    """At 64 rows the CPU compiler fuses what it does not at one, and one such fusion read outside of its buffers."""
    config = LMConfig(width=64, num_layers=1, pattern=(entry.name,), num_heads=1, mlp_width=128)
    graph, weights, rest = nnx.split(nnx.jit(lambda: LM(config, rngs=nnx.Rngs(0)))(), nnx.Param, ...)
    rng = np.random.default_rng(1)
    weights = jax.tree.map(lambda x: np.asarray(x) + 0.05 * rng.standard_normal(x.shape).astype(x.dtype), weights)
    tokens = rng.integers(0, 256, (64, 64), np.int32)

    @jax.jit
    def hidden(weights, tokens, segments=None):
        return nnx.merge(graph, weights, rest).hidden(tokens, segment_ids=segments)[0]

    rows = range(0, 64, 9)
    alone = np.concatenate([hidden(weights, tokens[row : row + 1]) for row in rows])
    for segments in (None, np.ones_like(tokens)):
        whole = np.asarray(hidden(weights, tokens, segments))
        np.testing.assert_allclose(whole[rows], alone, rtol=1e-4, atol=1e-4)
