"""The language model: scanned units, packing, remat, dtypes, errors."""

import dataclasses

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
    model = LM(config, rngs=nnx.Rngs(seed))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    noise = {
        jax.tree_util.keystr(path): jax.random.normal(jax.random.key(i), x.shape) for i, (path, x) in enumerate(leaves)
    }
    state = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.where(jnp.any(x != 0), x, 0.2 * noise[jax.tree_util.keystr(path)]),
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, state)
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 13)))


def test_scan_equals_a_loop_over_units(model, tokens):
    x = model.embed(tokens)
    graph, stacked = nnx.split(model.units)
    positions = jnp.broadcast_to(jnp.arange(13), (2, 13))
    for index in range(CONFIG.num_units):
        unit = nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], stacked))
        x, _ = unit(x, positions=positions, segment_ids=None, state=None)
    np.testing.assert_allclose(model.hidden(tokens)[0], model.norm(x), atol=1e-5)


def test_layers_differ_and_know_their_index(model):
    slopes = model.units.blocks[0].mixer.slopes[...]
    alone = Unit(CONFIG, 1, rngs=nnx.Rngs(0)).blocks[0].mixer.slopes[...]
    np.testing.assert_allclose(slopes[1], alone, rtol=1e-6)
    assert (slopes[0] > slopes[1]).all()
    kernel = model.units.blocks[0].mlp.up.kernel[...]
    assert (kernel[0] != kernel[1]).all()


def test_a_state_makes_pieces_equal_to_the_whole(model, tokens):
    expected, _ = model(tokens)
    state = model.init_state(2, 13)
    first, state = model(tokens[:, :6], state=state)
    second, state = model(tokens[:, 6:], state=state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), expected, atol=5e-5)
    assert (state.position == 13).all()


def test_packed_documents_are_independent(model, tokens):
    ids = jnp.where(jnp.arange(13) < 5, 1, 2) * jnp.ones((2, 1), jnp.int32)
    restart = jnp.where(jnp.arange(13) < 5, jnp.arange(13), jnp.arange(13) - 5) * jnp.ones((2, 1), jnp.int32)
    packed, _ = model(tokens, positions=restart, segment_ids=ids)
    alone = jnp.concatenate([model(tokens[:, :5])[0], model(tokens[:, 5:])[0]], 1)
    np.testing.assert_allclose(packed, alone, atol=5e-5)


def test_loss_is_the_cross_entropy_of_the_logits(model, tokens):
    logits, _ = model(tokens)
    targets = jnp.roll(tokens, -1, axis=1)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(model.loss(tokens, targets), expected, atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_memory_and_not_gradients(tokens, remat):
    def gradient(config):
        graph, weights, rest = nnx.split(make(config), nnx.Param, ...)
        return jax.jit(jax.grad(lambda w: nnx.merge(graph, w, rest).loss(tokens, tokens).sum()))(weights)

    kept = jax.tree.leaves(gradient(CONFIG))
    again = jax.tree.leaves(gradient(dataclasses.replace(CONFIG, remat=remat)))
    for a, b in zip(kept, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_tied_head_and_soft_cap(tokens):
    config = dataclasses.replace(CONFIG, tied=True, logits_soft_cap=0.5)
    model = make(config)
    assert model.head is None
    assert count_parameters(model) == count_parameters(make()) - 12 * 17
    logits, _ = model(tokens)
    assert 0 < float(jnp.abs(logits).max()) <= 0.5


def test_bfloat16_computation_keeps_float32_weights(tokens):
    model = make(dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    assert model.hidden(tokens)[0].dtype == jnp.bfloat16
    assert model(tokens)[0].dtype == jnp.float32


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
        ({"remat": "some"}, "remat: expected one of 'none', 'dots', 'full', got 'some'"),
        ({"mlp": "relu"}, "mlp: expected one of 'swiglu', 'gelu', 'none', got 'relu'"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_input_errors(model, tokens):
    with pytest.raises(TypeError, match="tokens: expected an integer dtype, got float32"):
        model(tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"segment_ids: expected \[B, T\] with T = 13 as in tokens, got \(2, 5\)"):
        model(tokens, segment_ids=tokens[:, :5])


@pytest.mark.parametrize("entry", [entry for entry in CATALOG if entry.layer], ids=lambda entry: entry.name)
@pytest.mark.parametrize("packed", [False, True])
def test_a_large_batch_is_its_rows(entry, packed):
    """At 64 rows the CPU compiler fuses what it does not at one, and one such fusion read outside of its buffers."""
    config = LMConfig(width=64, num_layers=1, pattern=(entry.name,), num_heads=1, mlp_width=128)
    graph, weights, rest = nnx.split(LM(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    weights = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), weights)
    tokens = jax.random.randint(jax.random.key(1), (64, 64), 0, 256)
    segments = jnp.ones_like(tokens) if packed else None

    @jax.jit
    def hidden(weights, tokens, segments):
        return nnx.merge(graph, weights, rest).hidden(tokens, segment_ids=segments)[0]

    whole = hidden(weights, tokens, segments)
    for row in range(0, 64, 9):
        alone = hidden(weights, tokens[row : row + 1], None if segments is None else segments[row : row + 1])
        np.testing.assert_allclose(whole[row : row + 1], alone, rtol=1e-4, atol=1e-4)
