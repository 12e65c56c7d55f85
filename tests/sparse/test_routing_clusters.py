"""Both forms of routing attention: against each other, their gradients, precision, loss, and on a mesh."""

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
from tests.sparse.test_routing import (
    MASK,
    SHARED,
    B,
    N,
    T,
    V,
    W,
    assert_close,
    assert_same_bits,
    layer_norm,
    memory,
    operands,
    quick_jit,
    shared,
)  # fmt: skip

# Every way in which a call may be put together; the masks leave fewer real tokens than a cluster has places.
CASES: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "google-masked": (True, T, {"is_causal": True, "mask": MASK}),
    "google-masked-late": (True, T, {"mask": MASK, "padding": "routed"}),
    "google-cross": (False, 17, {"query_mask": MASK, "context_window_size": 3}),
    "lucid-masked": (True, T, {"variant": "lucid", "mask": MASK, "memory": True}),
    "lucid-masked-late": (True, T, {"variant": "lucid", "mask": MASK, "padding": "routed", "is_causal": True}),
    "lucid-two": (False, T, {"variant": "lucid", "is_causal": True, "mask": MASK, "query_mask": MASK, "memory": True}),
    "lucid-cross": (False, 17, {"variant": "lucid", "context_window_size": 30}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gathering_is_the_dense_definition_with_gradients(case):
    is_shared, kv_len, options = CASES[case]
    options = {"window_size": W, "share_qk": is_shared, "commitment": 0.5, **options}
    if "mask" in options:
        options["mask"] = options["mask"][:, None, None]
    has_memory = options.pop("memory", False)
    weights = np.random.default_rng(1).standard_normal((B, T, N, V))

    def derivatives(implementation: str) -> Any:
        def loss(x: Any) -> Any:
            out, aux = routing_attention(**x, **options, return_aux=True, implementation=implementation)
            return jnp.sum(out * weights) + aux.loss, (out, aux)

        return quick_jit(jax.grad(loss, has_aux=True))

    with jax.enable_x64(True):
        x = {**operands(kv_len=kv_len), **(memory() if has_memory else {})}
        x = shared(x) if is_shared else x
        (grads, (out, aux)), want = derivatives("xla")(x), derivatives("reference")(x)
        assert_close((grads, (out, aux)), want, 1e-11)
        assert not np.any(grads["means"])
        assert all(np.any(grad) for name, grad in grads.items() if name != "means" and grad is not None)
        assert not np.any(np.asarray(out)[np.asarray(aux.clusters) == 0])


def test_gradients_are_those_of_finite_differences():
    options = {**SHARED, "is_causal": True, "commitment": 0.5}
    weights = np.random.default_rng(1).standard_normal((B, T, N, V))

    def loss(x: Any) -> Any:
        out, aux = routing_attention(**x, **options, return_aux=True)
        return jnp.sum(out * weights) + aux.loss

    run = quick_jit(jax.value_and_grad(loss))
    with jax.enable_x64(True):
        x = shared(operands())
        _, gradient = run(x)
        rng = np.random.default_rng(2)
        for name in ("query", "value"):
            step = 1e-6 * rng.standard_normal(x[name].shape)
            want = run({**x, name: x[name] + step})[0] - run({**x, name: x[name] - step})[0]
            assert abs(2 * np.sum(gradient[name] * step) - want) < 1e-12 + 1e-6 * abs(want), name


def test_huge_and_tiny_tokens():
    x = shared(operands(np.float32))
    op = functools.partial(routing_attention, **SHARED, is_causal=True, return_aux=True)
    want = op(**x)
    assert_close(op(**{**x, "query": x["query"] * np.float32(2.0**100)})[0], want[0], 1e-5)
    lucid = functools.partial(op, variant="lucid")
    want = lucid(**x)
    got = lucid(**{**x, "query": x["query"] * np.float32(2.0**-100)})
    assert np.all(np.isfinite(got[0]))
    for scale in (2.0**100, 2.0**-30):
        got = lucid(**{**x, "query": x["query"] * np.float32(scale)})
        assert_same_bits(got[1].query_members, want[1].query_members)
        assert_close(got[1].loss, want[1].loss, 1e-5)


def test_a_token_of_nan_does_not_come_out_as_zero():
    x = operands(np.float32)
    query = x["query"].copy()
    query[0, 4:6] = np.nan
    # NaN ranks first, so the earlier of the two takes the one place of every cluster, and the other is in none.
    out, aux = routing_attention(**{**x, "query": query}, window_size=1, return_aux=True)
    assert not np.any(aux.clusters[0, 5])
    assert np.all(np.isnan(out[0, 4:6]))
    assert np.all(np.isfinite(out[0, np.r_[:4, 6:T]]))
    assert np.all(np.isfinite(out[1]))


def test_the_loss_is_the_distance_to_the_nearest_mean():
    x = operands(kv_len=17)
    means = x["means"]

    def error(tokens: np.ndarray, variant: str) -> np.ndarray:
        """`(xhat - mu_nearest)^2`, `[B, T, N, H]`."""
        tokens = np.repeat(tokens, N // tokens.shape[2], axis=2)
        hat = layer_norm(tokens) if variant == "google" else tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
        nearest = np.argmax(np.einsum("btnh,nch->btnc", hat, means), axis=-1)
        return (hat - means[np.arange(N), nearest]) ** 2

    with jax.enable_x64(True):
        for variant in ("google", "lucid"):
            queries, keys = error(x["query"], variant), error(x["key"], variant)
            parts = queries.mean(), keys.mean()
            both = sum(parts) if variant == "google" else np.concatenate([queries, keys], axis=1).mean()
            options: dict[str, Any] = {"variant": variant, "window_size": W, "commitment": 0.5, "return_aux": True}
            assert_close(routing_attention(**x, **options)[1].loss, 0.5 * both, 1e-12)
            alone = shared({**x, "value": x["value"][:, :T]})
            one = routing_attention(**alone, **options, share_qk=True)[1].loss
            assert_close(one, (1.0 if variant == "google" else 0.5) * parts[0], 1e-12)
            real = routing_attention(**alone, **options, share_qk=True, mask=MASK[:, None, None])[1].loss
            assert_close(real, (1.0 if variant == "google" else 0.5) * queries[MASK].mean(), 1e-12)


def test_bfloat16_routes_in_float32():
    x = {name: jnp.asarray(a, jnp.bfloat16) for name, a in operands(np.float32).items()}
    wide = {name: a.astype(jnp.float32) for name, a in x.items()}
    run = functools.partial(routing_attention, **SHARED, return_aux=True)
    (got, got_aux), (want, want_aux) = run(**shared(x)), run(**shared(wide))
    assert got.dtype == jnp.bfloat16
    assert got_aux.loss.dtype == jnp.float32
    assert_same_bits(got_aux, want_aux)
    error = np.asarray(got, np.float32) - want
    assert np.sqrt(np.mean(error**2)) < 3 * 2**-8 * np.sqrt(np.mean(np.square(want)))


def test_on_a_mesh_of_explicit_axes():
    x = shared({**operands(np.float32), "value": np.repeat(operands(np.float32)["value"], 2, axis=2)})
    op = jax.jit(functools.partial(routing_attention, **SHARED, is_causal=True, return_aux=True))
    want = jax.device_get(op(**x))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    rows = P("data", None, "tensor")
    with jax.set_mesh(mesh):
        places = {"query": rows, "value": rows, "means": P("tensor")}
        placed = {name: jax.device_put(x[name], NamedSharding(mesh, spec)) for name, spec in places.items()}
        out, aux = op(**placed, key=None)
        assert jax.typeof(out).sharding.spec == P("data", None, "tensor", None)
        assert jax.typeof(aux.query_members).sharding.spec == P("data", "tensor", None, None)
        assert_close(jax.device_get((out, aux)), want, 1e-6)
