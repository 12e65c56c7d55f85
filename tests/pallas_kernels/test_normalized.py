"""The kernel that divides by the sum of the weights, interpreted, against the recurrence in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import linear_attention
from jattn.linear.recurrence import LinearState
from pallas_kernels.linear import normalized_linear_attention
from pallas_kernels.linear.tiling import Tiling

SMALL = Tiling(chunk=16, chunks=2, heads=1, lag=1, times=2)
TOGETHER = Tiling(chunk=16, chunks=1, heads=2, lag=1, times=2)
NAMES = ("out", "S", "z", "dquery", "dkey", "dvalue", "dgate", "dS", "dz")


def errors(sizes, *, constant=False, dtype=jnp.float32, eps=(1e-3, 0.0), blocks=SMALL, segments=False):
    """RMS ratio of every result and gradient; features are positive, gates those of tokens or of heads."""
    batch, length, heads, kv_heads, width, value_width = sizes
    rng = np.random.default_rng(0)
    key_shape, state_shape = (batch, length, kv_heads, width), (batch, kv_heads, width, value_width)
    arrays = [
        rng.uniform(0.05, 1, (batch, length, heads, width)).astype(dtype),
        rng.uniform(0.05, 1, key_shape).astype(dtype),
        rng.standard_normal((*key_shape[:3], value_width)).astype(dtype),
        -rng.uniform(0, 0.3, kv_heads if constant else key_shape[:3]).astype(np.float32),
        rng.standard_normal(state_shape).astype(np.float32),
        rng.uniform(0.5, 1, state_shape[:3]).astype(np.float32),
    ]
    shapes = ((batch, length, heads, value_width), state_shape, state_shape[:3])
    cotangents = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    ids = np.sort(rng.integers(0, 3, (batch, length))).astype(np.int32) if segments else None

    def run(op, arrays):
        def loss(*arrays):
            results = op(*arrays)
            return sum(jnp.sum(x * y) for x, y in zip(results, cotangents, strict=True)), results

        (_, results), gradients = jax.jit(jax.value_and_grad(loss, argnums=range(6), has_aux=True))(*arrays)
        return (*results, *gradients)

    def kernel(query, key, value, gate, S, z):
        op = functools.partial(normalized_linear_attention, scale=0.7, eps=eps, platform="interpret", blocks=blocks)
        return op(query, key, value, gate, ids, S, z)

    def definition(query, key, value, gate, S, z):
        out, state = linear_attention(
            query, key, value, gate, scale=0.7, normalize=True, eps=max(eps), segment_ids=ids,
            eps_mode="z" if eps[1] else "denominator", initial_state=LinearState(S, z), return_state=True,
            implementation="reference",
        )  # fmt: skip
        return out, *state

    found = run(kernel, arrays)
    with jax.enable_x64(True):
        wanted = run(definition, [jnp.asarray(x, jnp.float64) for x in arrays])
    pairs = [(np.asarray(x, np.float64), np.asarray(y)) for x, y in zip(found, wanted, strict=True)]
    return {name: np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)) for name, (x, y) in zip(NAMES, pairs, strict=True)}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 37, 2, 2, 5, 7), {}),
        ((1, 64, 4, 2, 8, 16), {"constant": True, "eps": (0.0, 0.1), "blocks": TOGETHER}),
        ((2, 67, 2, 2, 8, 8), {"segments": True, "eps": (0.0, 0.0)}),
        ((1, 131, 2, 1, 16, 24), {"blocks": None, "constant": True}),
    ],
)
def test_values_and_gradients_are_the_definition(sizes, options):
    found = errors(sizes, **options)
    assert all(ratio < 1e-5 for ratio in found.values()), found


def test_bfloat16_operands():
    found = errors((1, 150, 2, 1, 64, 64), dtype=jnp.bfloat16, blocks=None, segments=True)
    # A query's gradient is of value - out, which is small where the rounded terms it comes from are not.
    assert found.pop("dquery") < 1e-2
    assert all(ratio < 5e-3 for ratio in found.values()), found


def test_a_divisor_of_zero_gives_zero_and_no_gradient():
    zeros, ones = jnp.zeros((1, 20, 1, 8)), jnp.ones((1, 20, 1, 8))
    state = jnp.zeros((1, 1, 8, 8)), jnp.zeros((1, 1, 8))

    def total(query, key):
        op = functools.partial(normalized_linear_attention, scale=1.0, eps=(0.0, 0.0), platform="interpret")
        return jnp.sum(op(query, key, ones, jnp.zeros(1), None, *state, blocks=SMALL)[0])

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    for arrays in ((zeros, ones), (ones, zeros)):
        value, gradients = run(*arrays)
        assert value == 0
        assert all(np.all(np.asarray(x) == 0) for x in gradients)


REVERSE, NO_ORDER = {"reverse": True, "eps_mode": "z", "eps": 0.1}, {"is_causal": False}
OF_HEADS, OF_TOKENS, OF_CHANNELS = (2,), (2, 29, 2), (2, 29, 2, 5)


@pytest.mark.parametrize(
    ("options", "gates"),
    [
        ({}, OF_HEADS),
        ({}, OF_CHANNELS),
        (REVERSE, OF_HEADS),
        (REVERSE, OF_TOKENS),
        (NO_ORDER, OF_TOKENS),
        (NO_ORDER, OF_CHANNELS),
    ],
)
def test_the_op_on_kernels(options, gates):
    rng = np.random.default_rng(1)
    query, key, value = (rng.uniform(0.05, 1, (2, 29, *last)).astype(np.float32) for last in ((4, 5), (2, 5), (2, 7)))
    gate = -rng.uniform(0, 1, gates).astype(np.float32)
    given = {"normalize": True, "scale": 0.7, **options}
    if options.get("is_causal", True):
        state = LinearState(*(rng.uniform(0.05, 1, s).astype(np.float32) for s in ((2, 2, 5, 7), (2, 2, 5))))
        given |= {"initial_state": state, "return_state": True}
    found, wanted = (
        linear_attention(query, key, value, gate, implementation=name, **given) for name in ("interpret", "reference")
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
