"""`shard_attention` on eight host devices against the same op on one, values and gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn import masks
from jattn.dot_product import dot_product_attention
from jattn.linear.arguments import LinearState
from jattn.linear.delta_rule import delta_rule
from jattn.linear.gated import gated_delta_rule, kda, simple_gla
from jattn.linear.lightning import lightning_attention
from jattn.linear.recurrence import linear_attention
from jattn.linear.retention import retention
from jattn.sharding import ARRAYS, shard_attention
from jattn.sparse.sliding_window import sliding_window_attention

B, T, N, K, H, V = 2, 24, 8, 4, 5, 7
# Four pieces of six tokens (two of twelve). In the first row segments end inside a piece and at 6 and 12; in the second
# one goes on into a piece that another begins in, which covers the whole next piece. No row numbers them without gaps.
SEGMENTS = np.stack([np.repeat([-3, 1, 2, 5], [4, 2, 6, 12]), np.repeat([0, 7, 9], [9, 12, 3])]).astype(np.int32)
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_mesh(**axes: int) -> Any:
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=jax.devices()[:count]
    )


def make(length: int = T, **more: tuple[int, ...]) -> dict[str, Any]:
    """Query, key, value and gates by name; positive queries and keys, as a normalised form wants them."""
    rng = np.random.default_rng(length)
    x = {
        "query": rng.uniform(0.1, 1, (B, length, N, H)),
        "key": rng.uniform(0.1, 1, (B, length, K, H)),
        "value": rng.standard_normal((B, length, more.get("beta", (B, T, K))[2], V)),
    }
    if "beta" in more:  # keys of length 1, as a delta rule wants them
        x["key"] = x["key"] / np.linalg.norm(x["key"], axis=-1, keepdims=True)
    for name, shape in more.items():
        gate = rng.exponential(0.2, shape)
        x[name] = {"slopes": gate, "log_decay": -gate, "gamma": np.exp(-gate), "beta": 2 * np.exp(-gate)}[name]
    return {name: array.astype(np.float32) for name, array in x.items()}


WEIGHTS = np.random.default_rng(1).standard_normal((B, T, N, V)).astype(np.float32)


def value_and_gradients(op: Any, x: dict[str, Any], segment_ids: Any) -> Any:
    """The output and the gradients of all arrays of a random projection of it."""
    ids = {} if segment_ids is None else {"segment_ids": segment_ids}

    def loss(x: dict[str, Any]) -> Any:
        out = op(**x, **ids)
        return jnp.sum(out * WEIGHTS), out

    gradients, out = quick_jit(jax.grad(loss, has_aux=True))(x)
    return out, gradients


def alone(op: Any, options: dict[str, Any], x: dict[str, Any], segment_ids: Any) -> Any:
    """On one device. To name what CPUs run anyway saves tracing the kernels of other platforms."""
    return value_and_gradients(functools.partial(op, implementation="xla", **options), x, segment_ids)


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.sqrt(np.mean((a - b) ** 2)) <= tolerance * np.sqrt(np.mean(b**2))


@functools.cache
def everything_but_context() -> Any:
    return make_mesh(data=2, tensor=4)


OPS = {
    "softmax": (dot_product_attention, {"is_causal": True}, {}),
    "window": (sliding_window_attention, {"window": 5}, {}),
    "linear": (linear_attention, {"normalize": True}, {"log_decay": (B, T, K, H)}),
    "lightning": (lightning_attention, {}, {"slopes": (K,)}),
    "retention": (retention, {}, {}),
    "delta": (delta_rule, {}, {"beta": (B, T, K), "log_decay": (B, T, K, H)}),
}


@functools.cache
def op_alone(name: str) -> Any:
    op, options, more = OPS[name]
    return alone(op, options, make(**more), SEGMENTS)


@pytest.mark.parametrize("heads", [None, "tensor"])
@pytest.mark.parametrize("name", OPS)
def test_on_explicit_axes(name, heads):
    """What is shared out already, and a gate that the op makes itself."""
    op, options, more = OPS[name]
    mesh = jax.make_mesh((2, 2), ("context", "tensor"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    specs = {3: P(None, "context", heads), 4: P(None, "context", heads)}
    placed = {
        key: jax.device_put(x, NamedSharding(mesh, specs.get(x.ndim, P(heads)))) for key, x in make(**more).items()
    }
    ids = jax.device_put(SEGMENTS, NamedSharding(mesh, P(None, "context")))
    sharded = shard_attention(op, mesh, heads=heads, context="context", **options)
    out, _ = op_alone(name)
    assert_close(quick_jit(sharded)(**placed, segment_ids=ids), out)


@pytest.mark.parametrize("name", OPS)
def test_batch_and_heads(name):
    op, options, more = OPS[name]
    sharded = shard_attention(op, everything_but_context(), batch="data", heads="tensor", **options)
    assert_close(value_and_gradients(sharded, make(**more), SEGMENTS), op_alone(name))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_state_goes_in_and_comes_out_of_a_mesh(normalize):
    x, generator = make(), np.random.default_rng(5)
    start = LinearState(*(generator.standard_normal((B, K, H, *tail)).astype(np.float32) for tail in ((V,), ())))
    start = start if normalize else LinearState(start.S, None)
    # Far from 0, so that no denominator is near it.
    options = {"normalize": normalize, "eps": 50.0, "return_state": True}

    def both(op: Any) -> Any:
        def loss(x: Any, start: Any) -> Any:
            out, end = op(**x, initial_state=start, segment_ids=SEGMENTS)
            return jnp.sum(out * WEIGHTS) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(end)), (out, end)

        return quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, start)

    sharded = shard_attention(linear_attention, everything_but_context(), batch="data", heads="tensor", **options)
    assert_close(both(sharded), both(functools.partial(linear_attention, implementation="xla", **options)))


@pytest.mark.parametrize("name", OPS)
def test_the_compiler_splits_batch_and_heads_by_itself(name):
    op, options, more = OPS[name]
    mesh, x = everything_but_context(), make(**more)
    specs = {3: P("data", None, "tensor"), 4: P("data", None, "tensor", None), 1: P("tensor")}
    placed = {key: jax.device_put(array, NamedSharding(mesh, specs[array.ndim])) for key, array in x.items()}
    ids = jax.device_put(SEGMENTS, NamedSharding(mesh, P("data")))
    assert_close(value_and_gradients(functools.partial(op, **options), placed, ids), op_alone(name))


CONTEXT = {
    "ring": (dot_product_attention, {}, {}),
    "ring-causal": (dot_product_attention, {"is_causal": True, "scale": 3.0}, {}),
    "ring-causal-mask": (dot_product_attention, {"mask": masks.Causal(), "logits_soft_cap": 1.5}, {}),
    "halo-of-one": (sliding_window_attention, {"window": 2}, {}),
    "halo-in-reach": (sliding_window_attention, {"window": 4}, {}),
    "halo-of-hops": (sliding_window_attention, {"window": (14, 8)}, {}),
    "halo-right": (sliding_window_attention, {"window": (0, 5)}, {}),
    "halo-beyond": (sliding_window_attention, {"window": 10**6, "offset": 0}, {}),
    "linear": (linear_attention, {"is_causal": True}, {}),
    "linear-constant": (linear_attention, {}, {"log_decay": (K,)}),
    "linear-token": (linear_attention, {"chunk_size": 4}, {"log_decay": (B, T, K)}),
    "linear-channel": (linear_attention, {}, {"log_decay": (B, T, K, H)}),
    "linear-normalized": (linear_attention, {"normalize": True, "scale": 0.3}, {"log_decay": (B, T, K, H)}),
    "lightning": (lightning_attention, {}, {"slopes": (K,)}),
    "retention": (retention, {"scale": 0.3}, {"gamma": (K,)}),
    "simple-gla": (simple_gla, {}, {"log_decay": (B, T, K)}),
    "delta": (delta_rule, {"chunk_size": 4}, {"beta": (B, T, K)}),
    "delta-constant": (delta_rule, {"scale": 0.3}, {"beta": (B, T, K), "log_decay": (K,)}),
    "gated-delta": (gated_delta_rule, {}, {"beta": (B, T, K), "log_decay": (B, T, K)}),
    "kda-many-values": (kda, {}, {"beta": (B, T, N), "log_decay": (B, T, N, H)}),
}


# Without segments every op enters its shard as with them; one of a kind tells.
WHOLE = ("ring", "ring-causal-mask", "halo-in-reach", "linear-token", "lightning", "delta")


@pytest.mark.parametrize(
    ("name", "has_segments"), [*((name, True) for name in CONTEXT), *((name, False) for name in WHOLE)]
)
def test_context(name, has_segments):
    """Four devices along the sequence and two over the heads; a quarter of the sequence is six tokens."""
    op, options, more = CONTEXT[name]
    x, ids = make(**more), SEGMENTS if has_segments else None
    sharded = shard_attention(op, make_mesh(context=4, tensor=2), heads="tensor", context="context", **options)
    assert_close(value_and_gradients(sharded, x, ids), alone(op, options, x, ids))


@pytest.mark.parametrize("name", OPS)
def test_batch_heads_and_context_together(name):
    op, options, more = OPS[name]
    mesh = make_mesh(data=2, context=2, tensor=2)
    sharded = shard_attention(op, mesh, batch="data", heads="tensor", context="context", **options)
    assert_close(value_and_gradients(sharded, make(**more), SEGMENTS), op_alone(name))


def test_two_axes_split_the_batch_and_the_dtype_stays():
    x = {name: jnp.asarray(array, jnp.bfloat16) for name, array in make().items()}
    x = {name: jnp.concatenate([array, array], axis=0) for name, array in x.items()}
    mesh = make_mesh(data=2, fsdp=2, context=2)
    sharded = shard_attention(dot_product_attention, mesh, batch=("data", "fsdp"), context="context", is_causal=True)
    out = quick_jit(sharded)(**x)
    assert out.dtype == jnp.bfloat16
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), "context")), out.ndim)
    # One rounding of each partial output and one of the merged.
    assert_close(out, quick_jit(functools.partial(dot_product_attention, is_causal=True))(**x), 3 * 2**-9)


def test_ring_for_more_keys_than_queries():
    x, longer = make(), make(2 * T)
    x = {"query": x["query"], "key": longer["key"], "value": longer["value"]}
    sharded = shard_attention(dot_product_attention, make_mesh(context=4), context="context")
    assert_close(value_and_gradients(sharded, x, None), alone(dot_product_attention, {}, x, None))


def assert_refused(
    op: Any, message: str, error: Any = NotImplementedError, length: int = T, axes: Any = None, **given: Any
):
    """A call with `context` over four devices that must say `message`."""
    arrays = {name: given.pop(name) for name in (*ARRAYS, "slope") if name in given}
    x = {**make(length), **{name: given.pop(name) for name in ("query", "key", "value") if name in given}}
    with pytest.raises(error, match=message):
        shard_attention(op, make_mesh(context=4, tensor=2), **(axes or {"context": "context"}), **given)(**x, **arrays)


BOTH = ("context", "tensor")
BY_HEAD = masks.Causal() & ~masks.Fn(lambda q, k, head: q > k + head, key="distance by head")
ZEROS = np.zeros((B, T, K, H), np.float32)


@pytest.mark.parametrize(
    ("op", "message", "error", "given"),
    [
        (dot_product_attention, "^return_lse: only the output", NotImplementedError, {"return_lse": True}),
        (linear_attention, "^return_state: only the output", NotImplementedError, {"return_state": True}),
        (dot_product_attention, "^bias: arrays", NotImplementedError, {"bias": np.zeros((1, 1, T, T), np.float32)}),
        (dot_product_attention, "^mask: arrays", NotImplementedError, {"mask": np.ones((1, 1, T, T), bool)}),
        (linear_attention, "^initial_state: with context", NotImplementedError, {"initial_state": (ZEROS[:, 0], None)}),
        (dot_product_attention, "^is_causal: .* two readings", ValueError, {"is_causal": True, "length": 2 * T}),
        (dot_product_attention, "^segment_ids: .* pair", NotImplementedError, {"segment_ids": (SEGMENTS, SEGMENTS)}),
        (sliding_window_attention, "^context: the halo", NotImplementedError, {"window": 3, "offset": 2}),
        (sliding_window_attention, "^offset: .* two readings", ValueError, {"window": 3, "length": 2 * T}),
        (sliding_window_attention, "^window: expected at least 1, got 0", ValueError, {"window": 0}),
        (sliding_window_attention, "^window: expected a static integer", TypeError, {"window": 2.5}),
        (linear_attention, "without is_causal=False", NotImplementedError, {"is_causal": False}),
        (linear_attention, "without reverse", NotImplementedError, {"reverse": True}),
        (lightning_attention, "without reverse", NotImplementedError, {"reverse": True}),
        (delta_rule, "without reverse", NotImplementedError, {"reverse": True}),
        (delta_rule, "^slope: expected one of segment_ids, log_decay", TypeError, {"slope": np.ones(K, np.float32)}),
        (linear_attention, r"^log_decay: expected \[K\]", ValueError, {"log_decay": ZEROS[0, 0]}),
        (linear_attention, "slopes", TypeError, {"slopes": np.ones(K, np.float32)}),
        (lightning_attention, r"^slopes: expected \[K\]", ValueError, {"slopes": np.ones(N, np.float32)}),
        (dot_product_attention, "^segment_ids", ValueError, {"segment_ids": SEGMENTS[:, 1:]}),
        (dot_product_attention, "^query: expected 4 dimensions", ValueError, {"query": np.ones((B, T, N))}),
        (dot_product_attention, "^query: dimension 1 .* over 4 devices", ValueError, {"length": 22}),
        (dot_product_attention, "^key: dimension 2 .* 8 devices", ValueError, {"axes": {"heads": BOTH}}),
        (dot_product_attention, "^context: expected the name", TypeError, {"axes": {"context": BOTH}}),
        (dot_product_attention, "^heads: .* used by batch", ValueError, {"axes": {"batch": "tensor", "heads": BOTH}}),
        (dot_product_attention, "^context: .* axes context, tensor", ValueError, {"axes": {"context": "seq"}}),
        (dot_product_attention, "^mask: an Fn", NotImplementedError, {"axes": {"heads": "tensor"}, "mask": BY_HEAD}),
        (jnp.dot, "^op: expected one of dot_product_attention", ValueError, {}),
    ],
)  # fmt: skip
def test_what_is_not_made_says_so(op, message, error, given):
    given = dict(given)
    if given.get("length") == 2 * T:
        given["query"] = make()["query"]
    assert_refused(op, message, error, **given)
