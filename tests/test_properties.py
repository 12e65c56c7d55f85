"""Every entry of the catalog, through one contract: what holds for any attention variant holds for this one.

Sizes are distinct primes where the heads allow it, so that no transposition passes unseen. An entry says itself what it
accepts; nothing here knows an op by its name.
"""

from __future__ import annotations

import collections
import functools
import inspect
import logging
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn import catalog
from jattn.linear.recurrence import LinearState
from jattn.linear.sea_params import init_sea_params

B, T, N, K, H, V, F = 2, 13, 6, 3, 5, 7, 11
# Entries that share an op differ in their layers only.
OPS = tuple({entry.op: entry for entry in reversed((*catalog.CATALOG, *catalog.WEIGHTED))}.values())[::-1]
CASES = [(entry, implementation) for entry in OPS for implementation in ("reference", "xla")]
every_case = pytest.mark.parametrize(("entry", "implementation"), CASES, ids=[f"{e.name}-{i}" for e, i in CASES])
every_op = pytest.mark.parametrize("entry", OPS, ids=lambda entry: entry.name)
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
traces: collections.Counter[tuple[str, str]] = collections.Counter()
SEGMENTS = np.repeat([[1, 1, 2], [4, 6, 9]], [5, 1, 7], axis=1).astype(np.int32)


def parameters(entry: catalog.Entry) -> set[str]:
    return set(inspect.signature(entry.load_op()).parameters)


def cases_where(holds: Any) -> Any:
    cases = [(entry, implementation) for entry, implementation in CASES if holds(entry)]
    return pytest.mark.parametrize(("entry", "implementation"), cases, ids=[f"{e.name}-{i}" for e, i in cases])


def with_feature(feature: str) -> Any:
    return cases_where(lambda entry: feature in entry.features)


def with_argument(name: str) -> Any:
    return cases_where(lambda entry: name in parameters(entry))


def state_of(entry: catalog.Entry, kv_heads: int, value_dim: int, rng: Any) -> LinearState:
    """A state such as the op returns: over keys or, with the sum of them that it divides by, over their features."""
    if "feature_map" not in entry.features:
        return LinearState(rng.standard_normal((B, kv_heads, H, value_dim)), None)
    return LinearState(rng.standard_normal((B, kv_heads, 2 * F, value_dim)), rng.uniform(0.1, 1, (B, kv_heads, 2 * F)))


def weights_of(value_dim: int, length: int, seed: int) -> Any:
    """The weights of an op that cannot do without, moved from where they start, for that is a point of many ties."""
    sizes = {"num_heads": N, "head_dim": H, "value_dim": value_dim, "predictor_length": 8, "max_length": length}
    params = init_sea_params(jax.random.key(seed), **sizes)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape), params)


def constants(entry: catalog.Entry) -> dict[str, Any]:
    """What an op reads beside its operands and hands no gradient to: the same in every call."""
    if "means" not in parameters(entry):
        return {}
    return {"means": np.random.default_rng(7).standard_normal((N, 3, H)).astype(np.float32)}


def has_axes(leaf: Any, *sizes: int) -> bool:
    """Whether an argument is an array that begins with these axes; a tree of weights does not."""
    return isinstance(leaf, jax.Array) and leaf.shape[: len(sizes)] == sizes


def arguments(
    entry: catalog.Entry,
    dtype: Any = np.float32,
    *,
    seed: int = 0,
    every: bool = False,
    length: int = T,
    batch: int = B,
) -> dict[str, Any]:
    """Query, key, value, gates, maps and sinks by name; with `every` also bias and initial state, which cost time."""
    rng = np.random.default_rng(seed)
    kv_heads = K if "grouped_heads" in entry.features else N
    value_dim = V if "value_dim" in entry.features else H
    normal = rng.standard_normal
    # A delta rule is a contraction where keys have length 1.
    key_length = H**-0.5 if "beta" in parameters(entry) else 1.0
    channels = (H,) if "channel_decay" in entry.features else ()
    makers: dict[str, Any] = {
        "query": lambda: normal((batch, length, N, H)),
        "key": lambda: key_length * normal((batch, length, kv_heads, H)),
        "value": lambda: normal((batch, length, kv_heads, value_dim)),
        "sinks": lambda: normal(N),
        "slopes": lambda: rng.uniform(0.1, 0.5, kv_heads),
        "gamma": lambda: rng.uniform(0.6, 0.9, kv_heads),
        "beta": lambda: rng.uniform(0.1, 0.9, (batch, length, kv_heads)),
        "log_decay": lambda: -rng.exponential(0.3, (batch, length, kv_heads, *channels)),
        "query_weight": lambda: normal((N, H, F)),
        "key_weight": lambda: normal((kv_heads, H, F)),
        "query_bias": lambda: normal((N, F)),
        "key_bias": lambda: normal((kv_heads, F)),
        "params": lambda: weights_of(value_dim, length, seed),
    }
    if every:
        makers["bias"] = lambda: normal((batch, N, length, length))
        makers["kv_bias"] = lambda: normal((batch, kv_heads, length))
        makers["initial_state"] = lambda: state_of(entry, kv_heads, value_dim, rng)
    made = {name: make() for name, make in makers.items() if name in parameters(entry)}
    dtypes = {"initial_state": jnp.promote_types(dtype, np.float32)}
    return {n: jax.tree.map(lambda x, n=n: jnp.asarray(x, dtypes.get(n, dtype)), x) for n, x in made.items()}


def call(entry: catalog.Entry, implementation: str, **options: Any) -> Any:
    """The op as a function of a dictionary of arrays."""
    op = entry.load_op()
    fixed = {**entry.example, **constants(entry), "implementation": implementation, **options}
    return lambda x: op(**x, **fixed)


def causal(entry: catalog.Entry) -> dict[str, Any]:
    return {"is_causal": True} if "is_causal" in parameters(entry) else {}


def extras(entry: catalog.Entry) -> dict[str, Any]:
    """Options that make the op return all it can, with a soft cap where it has one."""
    options = {"lse": {"return_lse": True}, "state": {"return_state": True}, "soft_cap": {"logits_soft_cap": 2.0}}
    return {name: value for f in options if f in entry.features for name, value in options[f].items()}


@functools.cache
def plain(name: str, implementation: str) -> Any:
    """The compiled op of one output; tests share it."""
    entry = catalog.get(name)

    def counted(x: dict[str, Any]) -> Any:
        traces[name, implementation] += 1
        return call(entry, implementation)(x)

    return quick_jit(counted)


def projected(outputs: Any) -> Any:
    """A number that depends on every element of every output that is not -inf."""
    leaves = jax.tree.leaves(outputs)
    finite = [jnp.where(jnp.isfinite(x), x, 0) for x in leaves]
    return sum(jnp.sum(jnp.sin(1.0 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)) * x) for x in finite)


@functools.cache
def value_and_gradients(name: str, implementation: str) -> Any:
    """Of a call with every array argument and every output, causal and with segments."""
    entry = catalog.get(name)
    options = {**causal(entry), **extras(entry)}
    if "segments" in entry.features:
        options["segment_ids"] = SEGMENTS
    return quick_jit(jax.value_and_grad(lambda x: projected(call(entry, implementation, **options)(x))))


@functools.cache
def pulled_back(name: str, implementation: str) -> Any:
    """The output of a plain call, causal where it may be, and what a cotangent of it becomes; tests share it."""
    entry = catalog.get(name)

    def run(x: dict[str, Any], cotangent: Any) -> tuple[Any, dict[str, Any]]:
        out, pull_back = jax.vjp(call(entry, implementation, **causal(entry)), x)
        return out, pull_back(cotangent)[0]

    return quick_jit(run)


def cotangent_of(entry: catalog.Entry) -> np.ndarray:
    heads, width = N, V if "value_dim" in entry.features else H
    return np.cos(np.arange(B * T * heads * width)).reshape(B, T, heads, width).astype(np.float32)


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """The root mean square of every leaf's error, over that of the leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.array_equal(a == -np.inf, b == -np.inf)
        a, b = np.where(a == -np.inf, 0, a), np.where(b == -np.inf, 0, b)
        assert np.sqrt(np.mean((a - b) ** 2)) <= tolerance * np.sqrt(np.mean(b**2))


def assert_same_bits(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


@every_case
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_shapes_and_dtypes(entry, implementation, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = arguments(entry, jnp.dtype(dtype), every=True)
        result = jax.eval_shape(call(entry, implementation, **extras(entry)), x)
        out, other = result if isinstance(result, tuple) else (result, None)
        heads = x["value"].shape[-2:]
        assert (out.shape, out.dtype) == ((B, T, N, heads[-1]), dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        if "lse" in entry.features:
            assert (other.shape, other.dtype) == ((B, T, N), wide)
        if "state" in entry.features:
            like = state_of(entry, *heads, np.random.default_rng())
            assert jax.tree.map(lambda s: (s.shape, s.dtype), other) == jax.tree.map(lambda s: (s.shape, wide), like)


@every_case
def test_bfloat16_is_near_what_float32_gives(entry, implementation):
    x = arguments(entry, jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)
    run = plain(entry.name, implementation)
    # Eight bits of mantissa, an eps of 2**-8: rounding of operands, of weights and of the output.
    assert_close(run(x), run(wide), 3 * 2**-8)


@every_case
def test_jit_is_eager_and_repeats_its_bits_without_compiling_again(entry, implementation, caplog):
    x, run = arguments(entry), plain(entry.name, implementation)
    first, eager = run(x), call(entry, implementation)
    assert_close(first, eager(x), 1e-6)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        eager(x)
    assert not [message for message in caplog.messages if message.startswith("Compiling")]
    before = traces[entry.name, implementation]
    assert_same_bits(run(x), first)
    assert not np.array_equal(run(arguments(entry, seed=1)), first)
    assert traces[entry.name, implementation] == before


@every_case
def test_vmap_is_a_loop(entry, implementation):
    each = [arguments(entry, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    run = plain(entry.name, implementation)
    mapped = quick_jit(jax.vmap(call(entry, implementation)))(stacked)
    assert_close(mapped, jnp.stack([run(x) for x in each]), 1e-6)


@every_case
def test_gradients_are_those_of_finite_differences(entry, implementation):
    step = 1e-6
    run = value_and_gradients(entry.name, implementation)
    with jax.enable_x64(True):
        x = arguments(entry, np.float64, every=True)
        _, gradient = run(x)
        rng = np.random.default_rng(1)
        for name in x:
            direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), x[name])
            ends = [
                run({**x, name: jax.tree.map(lambda leaf, d, s=s: leaf + s * step * d, x[name], direction)})[0]
                for s in (1, -1)
            ]
            want = (ends[0] - ends[1]) / (2 * step)
            products = jax.tree.map(lambda g, d: np.sum(np.asarray(g) * d), gradient[name], direction)
            got = sum(jax.tree.leaves(products))
            size = sum(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(gradient[name]))
            assert size > 0, name
            assert abs(got - want) <= 1e-7 * size + 1e-8, name


@every_op
def test_implementations_agree(entry):
    with jax.enable_x64(True):
        x = arguments(entry, np.float64, every=True)
        assert_close(value_and_gradients(entry.name, "xla")(x), value_and_gradients(entry.name, "reference")(x), 1e-12)


@every_case
def test_examples_of_a_batch_do_not_meet(entry, implementation):
    run, x = plain(entry.name, implementation), arguments(entry)
    want = run(x)
    spoilt = {name: leaf.at[1].set(jnp.nan) if has_axes(leaf, B) else leaf for name, leaf in x.items()}
    got = run(spoilt)
    assert_same_bits(got[0], want[0])
    assert np.isnan(got[1]).all()


@with_feature("mask")
def test_padding_is_not_read(entry, implementation):
    real = np.array([9, 11])
    mask = np.arange(T) < real[:, None]
    run = quick_jit(call(entry, implementation, mask=mask[:, None, None, :]))
    x = arguments(entry)
    spoilt = {
        name: jnp.where(mask.reshape(B, T, *[1] * (x[name].ndim - 2)), x[name], -77.0)
        for name in ("key", "value", "beta", "log_decay")
        if name in x
    }
    want = run(x)
    assert_same_bits(run({**x, **spoilt}), want)
    assert not np.array_equal(run({**x, "value": x["value"].at[:, 0].set(-77.0)}), want)


@with_feature("segments")
def test_segments_are_separate_runs(entry, implementation):
    x = arguments(entry)
    run = quick_jit(call(entry, implementation, segment_ids=SEGMENTS))
    whole = run(x)
    for start, stop in ((0, 5), (5, 6), (6, T)):
        piece = {name: leaf[:, start:stop] if has_axes(leaf, B, T) else leaf for name, leaf in x.items()}
        second = whole[1, start:stop]
        alone = plain(entry.name, implementation)(piece)
        assert_close(second, alone[1], 2e-6)
        if stop == T:
            assert_close(whole[0, start:], alone[0], 2e-6)
    # Garbage in one segment reaches no other.
    spoilt = {name: leaf.at[:, 6:].set(-77.0) if has_axes(leaf, B, T) else leaf for name, leaf in x.items()}
    assert_same_bits(run(spoilt)[:, :6], whole[:, :6])


@every_case
def test_no_gradient_comes_from_the_future(entry, implementation):
    x, cotangent = arguments(entry), cotangent_of(entry)
    for t in (0, 6, T - 2):
        row = np.zeros_like(cotangent)
        row[:, t] = cotangent[:, t]
        _, gradient = pulled_back(entry.name, implementation)(x, row)
        for name in ("query", "key", "value"):
            assert not np.any(gradient[name][:, t + 1 :]), name
        assert np.any(gradient["value"][:, t])


@with_feature("state")
def test_a_split_and_single_steps_give_the_whole(entry, implementation):
    options = {**causal(entry), "return_state": True}
    x = arguments(entry, every=True)
    run = quick_jit(call(entry, implementation, **options))
    want, last = run(x)

    def part(start: int, stop: int, state: Any) -> dict[str, Any]:
        piece = {n: leaf for n, leaf in x.items() if n != "initial_state"}
        piece = {n: leaf[:, start:stop] if leaf.shape[:2] == (B, T) else leaf for n, leaf in piece.items()}
        return {**piece, "initial_state": state}

    first, state = run(part(0, 5, x["initial_state"]))
    second, state = run(part(5, T, state))
    assert_close((jnp.concatenate([first, second], axis=1), state), (want, last), 2e-6)

    step = quick_jit(catalog.load(entry.step))
    state, outs = x["initial_state"], []
    for t in range(T):
        token = part(t, t + 1, None)
        del token["initial_state"]
        token = {n: leaf[:, 0] if leaf.shape[:2] == (B, 1) else leaf for n, leaf in token.items()}
        out, state = step(**token, state=state)
        outs.append(out)
    assert_close((jnp.stack(outs, axis=1), state), (want, last), 2e-6)


@with_feature("grouped_heads")
def test_grouped_heads_are_repeated_ones(entry, implementation):
    x = arguments(entry)
    axes = {"key": 2, "value": 2, "beta": 2, "log_decay": 2, "slopes": 0, "gamma": 0, "key_weight": 0, "key_bias": 0}
    repeated = {name: jnp.repeat(x[name], N // K, axis=axis) for name, axis in axes.items() if name in x}
    run = plain(entry.name, implementation)
    assert_close(run({**x, **repeated}), run(x), 2e-6)


@with_argument("scale")
def test_a_scale_of_zero_is_legal(entry, implementation):
    run = quick_jit(call(entry, implementation, scale=0.0))
    x = arguments(entry)
    out = run(x)
    assert np.isfinite(out).all()
    assert_same_bits(run({**x, "query": -3 * x["query"]}), out)
    assert not np.array_equal(out, plain(entry.name, implementation)(x))


# What JAX makes of an op is not tried on its definition too: that is a few operations of JAX's own.
@every_op
def test_inside_checkpoint_and_scan(entry):
    op = call(entry, "xla", **causal(entry))
    layers = arguments(entry)
    query = layers.pop("query")
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), layers)
    cotangent = cotangent_of(entry)[..., :H]

    def scanned(query: Any, layers: Any) -> Any:
        body = jax.checkpoint(lambda query, x: (query + op({**x, "query": query})[..., :H], None))
        return jax.lax.scan(body, query, layers)[0]

    @quick_jit
    def run(query: Any, layers: Any) -> Any:
        out, pull_back = jax.vjp(scanned, query, layers)
        return out, *pull_back(cotangent)

    def widened(arriving: Any) -> np.ndarray:
        """With zeros for the values that no layer adds."""
        return np.concatenate([arriving, np.zeros_like(cotangent_of(entry)[..., H:])], axis=-1)

    one = pulled_back(entry.name, "xla")
    inputs, query_of = [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(2)], [query]
    for x in inputs:
        query_of.append(query_of[-1] + one({**x, "query": query_of[-1]}, widened(cotangent))[0][..., :H])
    gradients, arriving = [], cotangent
    for x, before in zip(inputs[::-1], query_of[-2::-1], strict=True):
        _, gradient = one({**x, "query": before}, widened(arriving))
        arriving = arriving + gradient.pop("query")
        gradients.append(gradient)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *gradients[::-1])
    assert_close(run(query, layers), (query_of[-1], arriving, stacked), 2e-5)


def placement(x: dict[str, Any]) -> dict[str, P]:
    return {name: P("data") if has_axes(leaf, B) else P() for name, leaf in x.items()}


@every_op
def test_inside_shard_map(entry):
    x, cotangent = arguments(entry), cotangent_of(entry)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    op = call(entry, "xla", **causal(entry))
    op = jax.shard_map(op, mesh=mesh, in_specs=(placement(x),), out_specs=P("data"))
    got = quick_jit(jax.grad(lambda x: jnp.sum(op(x) * cotangent)))(x)
    assert_close(got, pulled_back(entry.name, "xla")(x, cotangent)[1], 1e-5)


@every_op
def test_on_a_mesh_of_explicit_axes(entry):
    x, cotangent = arguments(entry), cotangent_of(entry)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(x[name], NamedSharding(mesh, spec)) for name, spec in placement(x).items()}
        op = call(entry, "xla", **causal(entry))
        weights = jax.device_put(cotangent, NamedSharding(mesh, P("data")))
        got = quick_jit(jax.grad(lambda x: jnp.sum(op(x) * weights)))(placed)
        out_type = jax.eval_shape(op, placed)
        assert out_type.sharding.spec == P("data", None, None, None)
    assert_close(jax.device_get(got), jax.device_get(pulled_back(entry.name, "xla")(x, cotangent)[1]), 1e-5)


@every_op
def test_memory_is_linear_in_the_length(entry):
    temp = {}
    for length in (1024, 4096):
        shapes = jax.eval_shape(lambda length=length: arguments(entry, length=length, batch=1))
        gradient = jax.grad(lambda x: projected(call(entry, "xla")(x)))
        compiled = quick_jit(gradient).lower(shapes).compile()
        temp[length] = compiled.memory_analysis().temp_size_in_bytes
        sizes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
        assert max(math.prod(map(int, size.split(","))) for size in sizes) < length**2
    assert temp[4096] <= 4.5 * temp[1024]
