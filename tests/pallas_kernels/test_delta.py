"""The kernel of the delta rule, interpreted, against the recurrence token by token: values, states, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.linear.delta_rule import token_scan
from pallas_kernels.linear import delta_rule, solve, tiling
from pallas_kernels.linear.tiling import Tiling

SMALL = Tiling(chunk=16, chunks=2, heads=1, lag=1, times=2)
NAMES = ("out", "end", "query", "key", "value", "beta", "gate", "initial")


def operands(sizes, *, constant=False, dtype=jnp.float32, decay=1.0, alike=0.0):
    """Keys of length 1; with `alike`, so much of every key is the same."""
    batch, length, heads, kv_heads, states, width, value_width = sizes
    keys = jax.random.split(jax.random.key(0), 9)
    normal = jax.random.normal

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    query = unit(normal(keys[0], (batch, length, heads, width))).astype(dtype)
    common = unit(normal(keys[8], (width,)))
    key = unit(alike * common + (1 - alike) * unit(normal(keys[1], (batch, length, kv_heads, width)))).astype(dtype)
    value = normal(keys[2], (batch, length, states, value_width)).astype(dtype)
    beta = jax.random.uniform(keys[3], (batch, length, states), maxval=2.0 if alike == 0 else 1.0)
    gate = -decay * jax.random.uniform(keys[4], (states,) if constant else (batch, length, states))
    state = normal(keys[5], (batch, states, width, value_width))
    out = (batch, length, max(heads, states), value_width)
    cotangents = normal(keys[6], out).astype(dtype), normal(keys[7], state.shape)
    return (query, key, value, beta, gate, state), cotangents


def errors(arguments, cotangents, segment_ids=None, blocks=None, precise=False):
    """RMS of the difference over RMS of the definition, for outputs and gradients."""

    def fused(query, key, value, beta, gate, state):
        gates = (gate, segment_ids, state)
        return delta_rule(query, key, value, beta, *gates, scale=0.7, platform="interpret", blocks=blocks)

    def definition(query, key, value, beta, gate, state):
        options = {"scale": 0.7, "chunk_size": None, "out_dtype": query.dtype}
        return token_scan(query, key, value, beta, gate, segment_ids, state, **options)

    def run(function, arguments, cotangents):
        out, transpose = jax.vjp(jax.jit(function), *arguments)
        return [np.asarray(x, np.float64) for x in (*out, *transpose(cotangents))]

    got = run(fused, arguments, cotangents)
    want = run(definition, *jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, cotangents)))
    return {
        name: np.sqrt(np.mean((a - b) ** 2)) / np.sqrt(np.mean(b**2))
        for name, a, b in zip(NAMES, got, want, strict=True)
    }


if __name__ == "__main__":
    for sizes, kw, blocks in [
        ((2, 37, 3, 3, 3, 7, 5), {}, SMALL),
        ((1, 70, 4, 2, 2, 16, 8), {}, None),
        ((1, 37, 2, 2, 4, 7, 5), {}, Tiling(16, 2, 4, 1)),
        ((1, 64, 2, 2, 2, 7, 5), {"constant": True}, SMALL),
        ((1, 300, 2, 2, 2, 32, 16), {}, None),
        ((1, 300, 2, 2, 2, 32, 16), {"decay": 20.0}, None),
        ((1, 300, 2, 2, 2, 32, 16), {"alike": 0.8}, None),
        ((1, 300, 2, 2, 2, 64, 64), {"dtype": jnp.bfloat16}, None),
        ((1, 300, 2, 2, 2, 64, 64), {"dtype": jnp.bfloat16, "alike": 0.5, "decay": 0.1}, None),
        ((1, 300, 2, 2, 2, 64, 64), {"dtype": jnp.bfloat16, "alike": 0.8, "decay": 0.1}, None),
    ]:
        e = errors(*operands(sizes, **kw), blocks=blocks)
        print(sizes, kw, {k: f"{v:.1e}" for k, v in e.items()}, flush=True)
