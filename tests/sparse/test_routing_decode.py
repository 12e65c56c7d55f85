"""Routing attention token by token: it is the last row of every prefix, and no more than that."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn.sparse.routing import routing_attention
from jattn.sparse.routing_decode import init_routing_cache, routing_step
from tests.sparse.test_routing import (
    SHARED,
    B,
    C,
    H,
    K,
    N,
    T,
    V,
    W,
    assert_close,
    assert_same_bits,
    operands,
    quick_jit,
    shared,
)  # fmt: skip


@functools.cache
def decoded(window: int) -> Any:
    x = operands(np.float32)
    means = jnp.asarray(x["means"])
    state = init_routing_cache(means, B, T, num_kv_heads=K, value_dim=V, dtype=jnp.float32)
    step = quick_jit(functools.partial(routing_step, window_size=window))
    outs = []
    for t in range(T):
        out, state = step(x["query"][:, t], x["value"][:, t], means, state)
        outs.append(out)
    return jnp.stack(outs, axis=1), state


def test_a_step_is_the_last_row_of_the_prefix():
    x = shared(operands(np.float32))
    got, state = decoded(W)
    options: dict[str, Any] = {**SHARED, "is_causal": True}
    for t in (0, W - 1, W, T - 1):
        prefix = {name: a[:, : t + 1] if name in ("query", "value") else a for name, a in x.items()}
        assert_close(got[:, t], routing_attention(**prefix, **options)[:, t], 1e-6)
    assert np.all(state.written == T)
    # Training and decoding differ, and agree where the clusters hold all.
    assert np.max(np.abs(got - routing_attention(**x, **options))) > 0.1
    all_in, _ = decoded(T)
    assert_close(all_in, routing_attention(**x, **{**options, "window_size": T}), 1e-6)


def test_a_full_cache_keeps_what_it_has():
    x = operands(np.float32)
    _, state = decoded(W)
    out, after = routing_step(x["query"][:, 0], x["value"][:, 0], jnp.asarray(x["means"]), state, window_size=W)
    assert not np.any(out)
    assert_same_bits(after[:3], state[:3])


def test_a_step_on_a_mesh_of_explicit_axes():
    x, means = operands(np.float32), np.ones((N, C, H), np.float32)
    step = jax.jit(functools.partial(routing_step, window_size=W))
    state = init_routing_cache(means, B, T, num_kv_heads=K, value_dim=V, dtype=jnp.float32)
    want = jax.device_get(step(x["query"][:, 0], x["value"][:, 0], means, state))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("data"))
        placed = (jax.device_put(a, rows) for a in (x["query"][:, 0], x["value"][:, 0]))
        out, after = step(*placed, jax.device_put(means, NamedSharding(mesh, P())), jax.device_put(state, rows))
        assert jax.typeof(out).sharding.spec == P("data", None, None)
        assert jax.typeof(after.key).sharding.spec == P("data", None, None, None)
        jax.tree.map(functools.partial(assert_close, tolerance=1e-6), jax.device_get((out, after)), want)


def test_bad_arguments_of_decoding():
    x, means = operands(np.float32), jnp.ones((N, C, H))
    with pytest.raises(ValueError, match=r"6 heads cannot be shared by 4"):
        init_routing_cache(means, B, T, num_kv_heads=4, value_dim=V, dtype=jnp.float32)
    state = init_routing_cache(means, B, T, num_kv_heads=K, value_dim=V, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"^state.value: expected \[B, S, K, V\]"):
        routing_step(x["query"][:, 0], x["value"][:, 0, :1], means, state, window_size=W)
    with pytest.raises(ValueError, match=r"^window_size: expected at least 1"):
        routing_step(x["query"][:, 0], x["value"][:, 0], means, state, window_size=0)
