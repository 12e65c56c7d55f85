"""Score functions in block-sparse attention: what they may do where pairs are masked, gradients of what they read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.masks import Causal, Full
from jattn.sparse.block_sparse import block_sparse_attention
from tests.sparse.test_block_sparse import (
    H,
    Inputs,
    N,
    T,
    assert_close,
    derivatives,
    every_implementation,
    inputs,
    quick_jit,
)


@every_implementation
def test_a_score_function_may_mask_and_be_wild_where_masked(implementation: str):
    def mod(score: Any, b: Any, h: Any, q_pos: Any, kv_pos: Any) -> Any:
        return jnp.where((q_pos + kv_pos) % 3 == 0, -jnp.inf, score * jnp.sqrt(q_pos - kv_pos + 0.0))  # NaN above

    with jax.enable_x64(True):
        x = inputs(T, T)
        t, s = np.arange(T)[:, None], np.arange(T)
        seen = (s <= t) & ((t + s) % 3 != 0)

        def wanted(x: Inputs) -> Any:
            roots = np.sqrt(np.maximum(t - s, 0))
            key = jnp.repeat(x.key, 2, 2)
            z = jnp.einsum("btnh,bsnh->bnts", x.query, key) * H**-0.5 * roots
            z = jnp.where(seen, z, -1e30)
            p = jnp.where(seen, jax.nn.softmax(z, axis=-1), 0)
            lse = jnp.where(seen.any(1), jax.nn.logsumexp(z, axis=-1), -jnp.inf)
            return jnp.einsum("bnts,bsnv->btnv", p, jnp.repeat(x.value, 2, 2)), jnp.moveaxis(lse, 1, 2)

        def run(x: Inputs) -> Any:
            options: Any = {"score_mod": mod, "return_lse": True, "implementation": implementation}
            return block_sparse_attention(*x[:3], Causal(), **options)

        assert_close(derivatives(run)(x), derivatives(wanted)(x))


def test_a_score_function_may_read_what_is_constant():
    slopes = jnp.arange(6.0)
    x = inputs(dtype=np.float32)

    def mod(score: Any, b: Any, h: Any, q_pos: Any, kv_pos: Any) -> Any:
        return score + slopes[h]

    got = quick_jit(lambda x: block_sparse_attention(*x[:3], Full(), score_mod=mod))(x)
    assert_close(got, quick_jit(lambda x: block_sparse_attention(*x[:3], Full()))(x), 2e-6)


@every_implementation
def test_the_gradient_of_what_is_captured_in_short_floats_is_summed_long(implementation: str):
    """Over all pairs; summed in bfloat16, it would stop growing where a term is less than its last bit."""
    x = jax.tree.map(lambda a: jnp.asarray(a, "bfloat16"), inputs(397, 397)[:3])
    table = jnp.asarray(np.random.default_rng(1).standard_normal((N, 5)), "bfloat16")

    @quick_jit
    def gradient(table: Any, x: Any) -> Any:
        def loss(table: Any) -> Any:
            mod = lambda score, b, h, q, k, table: score + table[h, (q - k) % 5]  # noqa: E731
            options: Any = {"score_mod": mod, "captured": (table,), "implementation": implementation}
            return jnp.sum(jnp.square(block_sparse_attention(*x, Causal(), **options).astype(jnp.float32)))

        return jax.grad(loss)(table).astype(jnp.float32)

    want = gradient(table.astype(jnp.float32), jax.tree.map(lambda a: a.astype(jnp.float32), x))
    assert np.linalg.norm(gradient(table, x) - want) < 2e-2 * np.linalg.norm(want)
