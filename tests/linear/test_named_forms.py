"""Retention, simple GLA, the gated delta rule and KDA are their recurrences, with scales and gates of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.linear.arguments import LinearState
from jattn.linear.delta_rule import delta_rule
from jattn.linear.gated import gated_delta_rule, kda, simple_gla, simple_gla_step
from jattn.linear.recurrence import linear_attention
from jattn.linear.retention import retention, retention_gamma, retention_step
from jattn.sharding import shard_attention

B, T, N, K, H, V = 2, 11, 6, 3, 5, 7
RNG = np.random.default_rng(0)
Q, KEY, VALUE = (RNG.standard_normal(shape).astype(np.float32) for shape in ((B, T, N, H), (B, T, K, H), (B, T, K, V)))
KEY /= np.linalg.norm(KEY, axis=-1, keepdims=True)
GATE, GATES = (-RNG.exponential(0.3, shape).astype(np.float32) for shape in ((B, T, K), (B, T, K, H)))
BETA = RNG.uniform(0, 1, (B, T, K)).astype(np.float32)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-6)


def test_retention_decays_by_powers_of_two_and_scales():
    np.testing.assert_array_equal(retention_gamma(3), [31 / 32, 63 / 64, 127 / 128])
    assert retention_gamma(20)[-1] < 1
    distance = np.arange(T)[:, None] - np.arange(T)
    weights = np.where(distance >= 0, (1 - 2.0 ** (-5 - np.arange(K)[:, None, None])) ** np.maximum(distance, 0), 0)
    scores = np.einsum("btkgh,bskh,kts->bkgts", Q.reshape(B, T, K, -1, H), KEY, weights) * H**-0.5
    want = np.einsum("bkgts,bskv->btkgv", scores, VALUE).reshape(B, T, N, V)
    assert_close(retention(Q, KEY, VALUE), want)
    with jax.enable_x64(True):
        wide = retention(*(x.astype(np.float64) for x in (Q, KEY, VALUE)))
    np.testing.assert_allclose(wide, want, rtol=0, atol=1e-13)
    gamma = np.array([0.5, 0.25, 1.0], np.float32)
    assert_close(retention(Q, KEY, VALUE, gamma), linear_attention(Q, KEY, VALUE, np.log(gamma), scale=H**-0.5))


@pytest.mark.parametrize("gamma", [None, np.array([0.5, 0.25, 1.0], np.float32)])
def test_a_step_of_retention_is_one_token_of_it(gamma):
    want, state = retention(Q[:, :2], KEY[:, :2], VALUE[:, :2], gamma, return_state=True)
    carried = LinearState(jnp.zeros((B, K, H, V)), None)
    for t in range(2):
        out, carried = retention_step(Q[:, t], KEY[:, t], VALUE[:, t], carried, gamma)
        assert_close(out, want[:, t])
    assert_close(carried.S, state.S)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_retention_forgets_as_fast_on_a_mesh(dtype):
    gamma = jnp.asarray([0.75, 0.9, 0.98], dtype)
    mesh = jax.make_mesh((2,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    x = {"query": Q[:, :10], "key": KEY[:, :10], "value": VALUE[:, :10], "gamma": gamma}
    assert_close(shard_attention(retention, mesh, context="context")(**x), retention(**x))


def test_simple_gla_is_mamba_2_with_a_scale_of_one():
    step = -GATE  # Delta; A = -1
    x, b, c = VALUE, KEY, Q
    state, want = np.zeros((B, K, H, V)), []
    for t in range(T):
        state = np.exp(GATE[:, t])[..., None, None] * state
        state += b[:, t, ..., None] * (step[:, t, :, None] * x[:, t])[..., None, :]
        want.append(np.einsum("bkgh,bkhv->bkgv", c[:, t].reshape(B, K, -1, H), state).reshape(B, N, V))
    got, end = simple_gla(c, b, step[..., None] * x, GATE, scale=1.0, return_state=True)
    assert_close(got, np.stack(want, axis=1))
    assert_close(end.S, state)
    assert_close(simple_gla(c, b, x, GATE), linear_attention(c, b, x, GATE, scale=H**-0.5))
    zero = LinearState(jnp.zeros((B, K, H, V)), None)
    assert_close(simple_gla_step(c[:, 0], b[:, 0], x[:, 0], zero, GATE[:, 0])[0], simple_gla(c, b, x, GATE)[:, 0])


def test_the_delta_rules_are_one_function():
    assert_close(gated_delta_rule(Q, KEY, VALUE, BETA, GATE), delta_rule(Q, KEY, VALUE, BETA, GATE))
    assert_close(kda(Q, KEY, VALUE, BETA, GATES), delta_rule(Q, KEY, VALUE, BETA, GATES))
    same_for_all = np.broadcast_to(GATE[..., None], GATES.shape)
    assert_close(kda(Q, KEY, VALUE, BETA, same_for_all), gated_delta_rule(Q, KEY, VALUE, BETA, GATE))


@pytest.mark.parametrize(
    ("op", "given", "error", "message"),
    [
        (retention, {"gamma": np.array([0.5, 0.5, 1.5])}, ValueError, "gamma: expected decays above 0 and at most 1"),
        (retention, {"gamma": np.array([0.5, 0.5, 0.0])}, ValueError, "gamma: expected decays above 0 and at most 1"),
        (retention, {"gamma": np.ones(4)}, ValueError, r"gamma: expected \[K\] with K = 3"),
        (retention, {"gamma": 0.5}, TypeError, "gamma: expected an array"),
        (retention, {"query": Q[:, :4]}, ValueError, "key: .* with T = 4 as in query"),
        (simple_gla, {"log_decay": GATES}, ValueError, r"log_decay: expected \[B, T, K\] = \(2, 11, 3\), got"),
        (gated_delta_rule, {"log_decay": GATES}, ValueError, r"log_decay: expected \[B, T, Kv\] = \(2, 11, 3\), got"),
        (kda, {"log_decay": GATE}, ValueError, r"log_decay: expected \[B, T, Kv, H\] = \(2, 11, 3, 5\), got"),
        (kda, {"beta": 3 + BETA}, ValueError, "beta: expected numbers from 0 to 2"),
    ],
)
def test_errors_name_the_argument(op, given, error, message):
    with pytest.raises(error, match=message):
        op(**{"query": Q, "key": KEY, "value": VALUE, **given})
