"""What the derivatives of all kernels share: of which operands, through remat, and of which order."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import block_sparse_attention, delta_rule, dot_product_attention, linear_attention, masks
from jattn.neighborhood.neighborhood import neighborhood_attention

GRID, HEADS, WIDTH = 9, 2, 8
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.standard_normal((1, GRID, HEADS, WIDTH)).astype(np.float32) for _ in range(3))
GATES = -RNG.random((1, GRID, HEADS)).astype(np.float32)
KV_BIAS = RNG.standard_normal((1, HEADS, GRID)).astype(np.float32)
SLOPES = RNG.random(HEADS).astype(np.float32)
TABLE = RNG.standard_normal((HEADS, 5)).astype(np.float32)


def _linear(query, log_decay, **options):
    return linear_attention(query, KEY, VALUE, log_decay, **options)


def _normalized(query, log_decay, **options):
    return linear_attention(jnp.exp(query), jnp.exp(KEY), VALUE, log_decay, normalize=True, **options)


def _delta(query, log_decay, **options):
    return delta_rule(query, KEY / 4, VALUE, log_decay=log_decay, **options)


def _biased(query, kv_bias, **options):
    return block_sparse_attention(query, KEY, VALUE, masks.Causal(), kv_bias=kv_bias, **options)


def _by_distance(score, b, n, i, j, slopes):
    return score - slopes[n] * jnp.abs(i - j)


def _captured(query, slopes, **options):
    options |= {"score_mod": _by_distance, "captured": (slopes,)}
    return block_sparse_attention(query, KEY, VALUE, masks.Full(), **options)


def _neighborhood(query, rel_pos_bias, **options):
    return neighborhood_attention(query, KEY, VALUE, kernel_size=3, rel_pos_bias=rel_pos_bias, **options)


CASES = {
    "linear": (_linear, GATES),
    "normalized": (_normalized, GATES),
    "delta": (_delta, GATES),
    "key bias": (_biased, KV_BIAS),
    "captured": (_captured, SLOPES),
    "neighborhood": (_neighborhood, TABLE),
}


def _loss(case, implementation, *args):
    op, _ = CASES[case]
    return jnp.sum(jnp.sin(op(*args, implementation=implementation)))


@pytest.mark.parametrize("case", CASES)
def test_what_was_differentiated_before_changes_no_gradient(case):
    """JAX keeps what it traced for the gradient of the query alone, in which the other operand has none."""
    args = QUERY, CASES[case][1]
    want = jax.jit(jax.grad(functools.partial(_loss, case, "xla"), 1))(*args)
    loss = functools.partial(_loss, case, "interpret")
    for moved in (1, 0):
        jax.grad(loss, moved)(*args)
    got = jax.grad(jax.checkpoint(loss), 1)(*args)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("case", ["linear", "normalized", "delta"])
def test_where_no_kernel_runs_second_derivatives_are_those_of_xla(case):
    args = QUERY, CASES[case][1]

    def second(implementation):
        gradient = jax.grad(functools.partial(_loss, case, implementation), (0, 1))
        squared = lambda *args: sum(jnp.sum(x**2) for x in gradient(*args))  # noqa: E731
        along = jax.vmap(lambda t: jax.jvp(gradient, args, (t * args[0], args[1]))[1])
        return jax.jit(lambda *args: (jax.grad(squared, (0, 1))(*args), along(jnp.array([1.0, 2.0]))))(*args)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), second(None), second("xla"))


@pytest.mark.parametrize("op", [dot_product_attention, linear_attention, delta_rule])
def test_a_kernel_refuses_second_derivatives_and_says_what_has_them(op):
    def gradient(query):
        return jax.grad(lambda query: jnp.sum(op(query, KEY, VALUE, implementation="interpret") ** 2))(query)

    for second in (
        lambda: jax.grad(lambda query: jnp.sum(gradient(query) ** 2))(QUERY),
        lambda: jax.jit(jax.jvp, static_argnums=0)(gradient, (QUERY,), (QUERY,)),
        lambda: jax.vmap(lambda t: jax.jvp(gradient, (QUERY,), (t,))[1])(QUERY[None]),
    ):
        with pytest.raises(NotImplementedError, match=r"first derivatives, backward.*implementation='xla'"):
            second()
