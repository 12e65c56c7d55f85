"""Lightning Attention-2: its definition, its limits, and the three tables of slopes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.linear.lightning import lightning_attention, lightning_attention_step, lightning_slopes
from jattn.linear.recurrence import LinearState

B, T, N, K, H, V = 2, 37, 6, 3, 5, 7
SLOPES = np.float32([0.9, 0.2, 0.0])
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(length: int = T, heads: int = N):
    rng = np.random.default_rng(0)
    shapes = ((B, length, heads, H), (B, length, K, H), (B, length, K, V))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def definition(query, key, value, slopes):
    """sum_{j <= t} exp(-slope)^(t - j) (q_t . k_j) v_j, in float64."""
    key, value, slopes = (
        np.repeat(x.astype(np.float64), N // K, axis=axis) for x, axis in ((key, 2), (value, 2), (slopes, 0))
    )
    distance = np.arange(T)[:, None] - np.arange(T)
    decay = np.where(distance >= 0, np.exp(-slopes[:, None, None] * np.maximum(distance, 0)), 0)
    return np.einsum("btnh,bsnh,nts,bsnv->btnv", query.astype(np.float64), key, decay, value)


@pytest.mark.parametrize("chunk_size", [4, 32, None])
def test_equals_its_definition(chunk_size):
    out = quick_jit(functools.partial(lightning_attention, chunk_size=chunk_size))(*make(), SLOPES)
    np.testing.assert_allclose(out, definition(*make(), SLOPES), atol=2e-5)


def test_no_slopes_are_slopes_of_zero_and_scale_multiplies():
    args = make()
    plain = quick_jit(lightning_attention)(*args)
    np.testing.assert_allclose(plain, definition(*args, np.zeros(K)), atol=5e-5)
    scaled = quick_jit(functools.partial(lightning_attention, scale=0.25))(*args, np.zeros(K, np.float32))
    np.testing.assert_allclose(scaled, 0.25 * plain, atol=1e-5)


def test_an_infinite_slope_leaves_the_token_itself():
    query, key, value = make(heads=K)
    out, vjp = jax.vjp(
        lambda *args: quick_jit(lightning_attention)(*args, np.full(K, np.inf, np.float32)), query, key, value
    )
    own = np.sum(query * key, axis=-1, keepdims=True)
    np.testing.assert_allclose(out, own * value, atol=1e-5)
    for gradient, want in zip(
        vjp(jnp.ones_like(out)), (key * value.sum(-1, keepdims=True), None, own + 0 * value), strict=True
    ):
        assert np.isfinite(gradient).all()
        if want is not None:
            np.testing.assert_allclose(gradient, want, atol=1e-5)


def test_constant_tokens_sum_a_geometric_series():
    query = key = np.zeros((1, T, K, H), np.float32)
    key[..., 0] = 1
    slopes = np.float32([0.5, 0.1, 2.0])
    out = quick_jit(lightning_attention)(query, key, np.ones((1, T, K, 1), np.float32), slopes)[0, :, :, 0]
    kept = np.exp(-slopes.astype(np.float64))
    np.testing.assert_allclose(out, (1 - kept ** np.arange(1, T + 1)[:, None]) / (1 - kept), rtol=1e-5)


def test_leading_empty_tokens_change_nothing():
    query, key, value = make()
    longer = [np.concatenate([np.zeros_like(x[:, :11]), x], axis=1) for x in (query, key, value)]
    op = quick_jit(functools.partial(lightning_attention, return_state=True))
    out, state = op(query, key, value, SLOPES)
    late, late_state = op(*longer, SLOPES)
    np.testing.assert_allclose(late[:, 11:], out, atol=1e-5)
    np.testing.assert_allclose(late_state.S, state.S, atol=1e-5)


def test_decoding_continues_the_state():
    query, key, value = make()
    op = quick_jit(functools.partial(lightning_attention, scale=0.5, return_state=True))
    whole, end = op(query, key, value, SLOPES)
    out, state = op(query[:, :-2], key[:, :-2], value[:, :-2], SLOPES)
    outs = [out]
    for t in (T - 2, T - 1):
        out, state = lightning_attention_step(query[:, t], key[:, t], value[:, t], state, SLOPES, scale=0.5)
        outs.append(out[:, None])
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(state.S, end.S, atol=1e-5)


def test_slopes_have_a_gradient():
    args = make()
    loss = lambda slopes: jnp.sum(jnp.sin(lightning_attention(*args, slopes, scale=0.1)))  # noqa: E731
    gradient = quick_jit(jax.grad(loss))(SLOPES)
    for head in range(2):
        step = 1e-2 * np.eye(K, dtype=np.float32)[head]
        up, down = (np.sin(0.1 * definition(*args, SLOPES + s)).sum() for s in (step, -step))
        assert gradient[head] == pytest.approx((up - down) / 2e-2, rel=1e-2)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20])
def test_slopes_of_the_released_code(heads):
    slopes = np.asarray(lightning_slopes(heads))
    power = 2 ** int(np.log2(heads))
    want = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    want += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    np.testing.assert_allclose(slopes, want, rtol=1e-6)
    assert slopes.dtype == np.float32


def test_layer_factors():
    base = lightning_slopes(4)
    np.testing.assert_allclose(lightning_slopes(4, 3, 12), base * (1 - 3 / 11 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(lightning_slopes(4, 11, 12), base * 1e-5, rtol=1e-6)
    np.testing.assert_allclose(lightning_slopes(4, 0, 1), base)
    np.testing.assert_allclose(lightning_slopes(4, 3, 12, "paper"), 8 / 4 * np.arange(4) * (1 - 3 / 12), rtol=1e-6)
    geometric = 2.0 ** (-8 * np.arange(1, 7) / 6)
    factor = 1 - 3 / (11 + 1e-5) + 1e-5
    np.testing.assert_allclose(lightning_slopes(6, 3, 12, "minimax"), geometric * factor, rtol=1e-6)
    np.testing.assert_allclose(lightning_slopes(6, variant="minimax"), geometric, rtol=1e-6)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((0,), ValueError, "num_heads: expected at least 1"),
        ((4.0,), TypeError, "num_heads: expected a static integer"),
        ((4, 1), ValueError, "layer_idx, num_layers: expected both or neither, got 1 and None"),
        ((4, 3, 3), ValueError, "layer_idx: expected less than num_layers = 3, got 3"),
        ((4, 0, 1, "alibi"), ValueError, "variant: expected one of 'repo', 'paper', 'minimax', got 'alibi'"),
    ],
)
def test_slope_errors(args, error, message):
    with pytest.raises(error, match=message):
        lightning_slopes(*args)


@pytest.mark.parametrize(
    ("slopes", "error", "message"),
    [
        (SLOPES[:2], ValueError, r"slopes: expected \[K\], one per head of key \(2, 5, 3, 5\), got \(2,\)"),
        (-SLOPES, ValueError, "slopes: expected at least 0"),
        (0.5, TypeError, "slopes: expected an array, got float"),
        (np.arange(3), TypeError, "slopes: expected a floating dtype"),
    ],
)
def test_errors_name_the_slopes(slopes, error, message):
    with pytest.raises(error, match=message):
        lightning_attention(*make(5), slopes)


def test_a_state_of_the_normalised_form_is_refused():
    query, key, value = make(1)
    state = LinearState(np.zeros((B, K, H, V), np.float32), np.zeros((B, K, H), np.float32))
    with pytest.raises(ValueError, match=r"state\.z: normalize=False has no use"):
        lightning_attention_step(query[:, 0], key[:, 0], value[:, 0], state)
