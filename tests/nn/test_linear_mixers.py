"""What is particular to the linear mixers: short convolutions, decays, betas, sizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.linear.delta_rule import delta_rule
from jattn.linear.recurrence import linear_attention
from jattn.nn import DeltaNetMixer, GatedDeltaNetMixer, HGRN2Mixer, KDAMixer, RetNetMixer, ShortConvolution
from jattn.nn.decay import SoftplusDecay

B, T, C = 2, 11, 12
X = np.random.default_rng(0).standard_normal((B, T, C)).astype(np.float32)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))


def silu(x):
    return x / (1 + np.exp(-x))


def filled(module: Any) -> Any:
    """The module with an output projection that is not zero."""
    kernel = module.projections.out.kernel
    kernel[...] = 0.3 * jax.random.normal(jax.random.key(1), kernel.shape)
    return module


def shapes(module: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


# The short convolution


@pytest.mark.parametrize("taps", [1, 4])
def test_a_short_convolution_is_its_sum(taps):
    layer = ShortConvolution(C, taps=taps, rngs=nnx.Rngs(0))
    padded = np.concatenate([np.zeros((B, taps - 1, C)), X], axis=1)
    w = np.asarray(layer.kernel[...])
    want = silu(sum(w[d] * padded[:, taps - 1 - d : taps - 1 - d + T] for d in range(taps)))
    out, state = layer(X)
    assert state is None
    np.testing.assert_allclose(out, want, atol=1e-6)
    assert np.abs(w).max() <= taps**-0.5
    assert layer.flops(3) == 2 * 3 * taps * C


def test_a_short_convolution_restarts_with_a_segment_and_goes_on_from_its_state():
    layer = ShortConvolution(C, rngs=nnx.Rngs(0))
    ids = np.array([[0] * 5 + [1] * 6, [3] * 9 + [4] * 2])
    whole, _ = layer(X, segment_ids=ids)
    for row, cut in enumerate((5, 9)):
        alone = np.concatenate([layer(X[row : row + 1, s])[0] for s in (slice(0, cut), slice(cut, T))], axis=1)
        np.testing.assert_allclose(whole[row : row + 1], alone, atol=1e-6)
    state, pieces = layer.init_state(B, jnp.float32), []
    for first, last in ((0, 1), (1, 6), (6, 8), (8, T)):  # pieces shorter and longer than the state
        out, state = layer(X[:, first:last], segment_ids=ids[:, first:last], state=state)
        # A state belongs to the segment that the next piece begins with; where another begins, the past is left out.
        ended = ids[:, last - 1] != ids[:, min(last, T - 1)]
        state = jnp.where(ended[:, None, None], 0, state)
        pieces.append(out)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-6)


def test_a_short_convolution_sums_in_float32():
    layer = ShortConvolution(C, rngs=nnx.Rngs(0))
    narrow = jnp.asarray(X, jnp.bfloat16)
    out, state = layer(narrow, state=layer.init_state(B, jnp.bfloat16))
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(out, layer(narrow.astype(jnp.float32))[0], rtol=2**-8, atol=1e-30)


# The mixers


def test_delta_net_is_the_authors_block():
    mixer = filled(DeltaNetMixer(C, num_heads=3, negative_eigenvalues=True, rngs=nnx.Rngs(0)))
    p, c = mixer.projections, mixer.convolutions
    query, key, value = (
        convolution(X @ np.asarray(layer.kernel[...]))[0].reshape(B, T, 3, 4)
        for layer, convolution in ((p.query, c.query), (p.key, c.key), (p.value, c.value))
    )
    query, key = (x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6) for x in (query, key))
    beta = 2 / (1 + np.exp(-X @ np.asarray(mixer.beta.kernel[...])))
    out = delta_rule(query, key, value, beta)
    out = out / np.sqrt(np.mean(out**2, axis=-1, keepdims=True) + 1e-5)
    want = out.reshape(B, T, C) @ np.asarray(p.out.kernel[...])
    np.testing.assert_allclose(mixer(X, positions=POSITIONS)[0], want, atol=1e-5)


def test_gated_delta_net_and_kda_have_the_authors_parameters():
    gated = GatedDeltaNetMixer(C, num_heads=2, num_value_heads=4, head_dim=3, value_dim=5, rngs=nnx.Rngs(0))
    found = shapes(gated)
    assert found["projections/value/kernel"] == (C, 20)
    assert found["projections/out/kernel"] == (20, C)
    assert found["convolutions/query/kernel"] == (4, 6)
    assert found["decay/up/kernel"] == (C, 4)
    assert found["decay/up/bias"] == found["decay/log_rate"] == (4,)
    assert found["gate/up/kernel"] == (C, 20)
    assert found["norm/scale"] == (5,)
    assert gated.init_state(B, 100, jnp.bfloat16).memory.S.shape == (B, 4, 3, 5)
    assert gated.init_state(B, 100, jnp.bfloat16).past[2].shape == (B, 3, 20)
    found = shapes(KDAMixer(C, num_heads=2, head_dim=3, rngs=nnx.Rngs(0)))
    assert (found["decay/down/kernel"], found["decay/up/kernel"]) == ((C, 3), (3, 6))
    assert (found["gate/down/kernel"], found["gate/up/bias"]) == ((C, 3), (6,))
    assert "decay/up/kernel" not in shapes(DeltaNetMixer(C, num_heads=2, rngs=nnx.Rngs(0)))


def test_more_value_heads_than_keys_decode_as_they_are_trained():
    mixer = filled(KDAMixer(C, num_heads=2, num_value_heads=4, head_dim=3, value_dim=5, rngs=nnx.Rngs(0)))
    whole, _ = mixer(X, positions=POSITIONS)
    state = mixer.init_state(B, T, jnp.float32)
    first, state = mixer(X[:, :9], positions=POSITIONS[:, :9], state=state)
    pieces = [first]
    for t in (9, 10):
        out, state = mixer(X[:, t : t + 1], positions=POSITIONS[:, t : t + 1], state=state)
        pieces.append(out)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-5)


def test_a_softplus_decay_starts_slow_and_is_mamba_2s():
    layer = SoftplusDecay(C, 64, 5, dtype=None, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    rate = np.exp(layer.log_rate[...])
    assert 1 <= rate.min() < 2
    assert 15 < rate.max() <= 16
    fresh = -np.asarray(layer(np.zeros((1, 1, C), np.float32))) / rate[:, None]
    assert 9e-4 < fresh.min() < 2e-3
    assert 5e-2 < fresh.max() < 0.11
    logits = X @ np.asarray(layer.up.kernel[...]) + np.asarray(layer.up.bias[...])
    step = np.log1p(np.exp(logits)).reshape(B, T, 64, 5)
    np.testing.assert_allclose(layer(X), -rate[:, None] * step, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_hgrn2_writes_what_it_forgets(layer):
    mixer = filled(HGRN2Mixer(C, num_heads=3, layer_index=layer, num_layers=4, rngs=nnx.Rngs(0)))
    query, logits, value = mixer.projections.split(X)
    forget = layer / 4 + (1 - layer / 4) / (1 + np.exp(-logits))
    out = linear_attention(silu(query), 1 - forget, value, np.log(forget), scale=0.5).reshape(B, T, C)
    out = out / np.sqrt(np.mean(out**2, axis=-1, keepdims=True) + 1e-6)
    want = out @ np.asarray(mixer.projections.out.kernel[...])
    np.testing.assert_allclose(mixer(X, positions=POSITIONS)[0], want, atol=1e-5)


def test_hgrn2_stays_finite_where_everything_is_forgotten():
    mixer = filled(HGRN2Mixer(C, num_heads=3, num_layers=4, rngs=nnx.Rngs(0)))
    gradient = nnx.grad(lambda mixer: jnp.sum(mixer(1e4 * X, positions=POSITIONS)[0] ** 2))(mixer)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_retention_heads_have_no_mean_and_do_not_see_where_a_text_begins():
    mixer = filled(RetNetMixer(C, num_heads=3, value_dim=6, rngs=nnx.Rngs(0)))
    out, _ = mixer(X, positions=POSITIONS)
    np.testing.assert_allclose(mixer(X, positions=POSITIONS + 100)[0], out, atol=1e-4)
    assert not np.allclose(mixer(X, positions=2 * POSITIONS)[0], out, atol=1e-2)
    mixer.projections.value.kernel[...] = jnp.ones_like(mixer.projections.value.kernel[...])  # a head of equal channels
    # What rounding leaves of the variance, the norm multiplies by 300.
    np.testing.assert_allclose(mixer(X, positions=POSITIONS)[0], 0, atol=1e-2)
    assert np.abs(out).max() > 0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_value_heads": 3}, ValueError, "value: 3 heads cannot share 2 key heads"),
        ({"num_kv_heads": 1, "num_value_heads": 3}, ValueError, "query: 2 heads cannot be shared by 3 value heads"),
        ({"value_dim": 0}, ValueError, "value_dim: expected at least 1, got 0"),
        ({"taps": 0}, ValueError, "taps: expected at least 1, got 0"),
        ({"decay": "token"}, ValueError, "decay: expected one of 'none', 'head', 'channel'"),
        ({"gate": "tanh"}, ValueError, "activation: expected one of 'sigmoid', 'silu'"),
        ({"negative_eigenvalues": 1}, TypeError, "negative_eigenvalues: expected a static True or False"),
    ],
)
def test_option_errors(options, error, message):
    with pytest.raises(error, match=message):
        DeltaNetMixer(C, num_heads=2, rngs=nnx.Rngs(0), **options)
