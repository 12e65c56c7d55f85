"""Softmax attention against a NumPy float64 softmax, `jax.nn` and finite differences; one path against the other."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jattn
from jattn.blockwise import Operands, block_size, blockwise_attention
from jattn.dot_product import dense_attention, dot_product_attention, merge_attentions
from jattn.masks import Causal, Chunked, Empty, Fn, Full, Mask, Sink, SlidingWindow, Stride
from jattn.softmax_tile import Score

B, T, S, N, K, H, V = 2, 29, 37, 6, 3, 5, 7
IMPLEMENTATIONS = ("reference", "xla")
SMALL_BLOCKS = {
    "reference": dense_attention,
    "xla": functools.partial(blockwise_attention, block_sizes=(8, 8)),
}
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def operands(dtype: Any = np.float64, *, kv_len: int = S, seed: int = 0, **more: Any) -> Operands:
    rng = np.random.default_rng(seed)
    made = {"query": (B, T, N, H), "key": (B, kv_len, K, H), "value": (B, kv_len, K, V)}
    return Operands(**{name: rng.standard_normal(shape).astype(dtype) for name, shape in made.items()}, **more)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def segments(seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 3, (B, T)), rng.integers(0, 3, (B, S))


def softmax(x: Operands, mask: Mask, score: Score) -> tuple[np.ndarray, np.ndarray]:
    """The definition, row by row in float64: a plain sum of exponentials over the keys that the row may see."""
    x = Operands(*(None if a is None else np.asarray(a) for a in x))
    batch, q_len, heads, _ = x.query.shape
    kv_len, kv_heads, value_dim = x.value.shape[1:]
    pairs = (batch, heads, q_len, kv_len)
    bias = np.broadcast_to(0.0 if x.bias is None else x.bias, pairs)
    allowed = np.broadcast_to(True if x.mask is None else x.mask, pairs)
    out, lse = np.zeros((batch, q_len, heads, value_dim)), np.full((batch, q_len, heads), -np.inf)
    for b, n, t in np.ndindex(batch, heads, q_len):
        seen = allowed[b, n, t] & mask.elem(t, np.arange(kv_len), n)
        if x.q_segments is not None:
            seen = seen & (x.kv_segments[b] == x.q_segments[b, t])
        g = n // (heads // kv_heads)
        z = x.key[b, seen, g].astype(float) @ x.query[b, t, n].astype(float) * score.scale + bias[b, n, t, seen]
        if score.soft_cap is not None:
            z = score.soft_cap * np.tanh(z / score.soft_cap)
        sink = [] if x.sinks is None else [float(x.sinks[n])]
        if len(z) + len(sink):
            lse[b, t, n] = np.log(np.exp(np.concatenate([z, sink])).sum())
            out[b, t, n] = np.exp(z - lse[b, t, n]) @ x.value[b, seen, g]
    return out, lse


def derivatives(attend: Any, **options: Any) -> Any:
    """A function of operands: the gradients of a loss that reads outputs and log-sum-exps, and both of these."""

    def run(x: Operands) -> tuple[Operands, tuple[Any, Any]]:
        floats = {name: a for name, a in x._asdict().items() if a is not None and jnp.issubdtype(a.dtype, jnp.floating)}
        weights = normal(*x.query.shape[:3], x.value.shape[-1], seed=9)

        def loss(arrays: dict[str, Any]) -> Any:
            out, lse = attend(x._replace(**arrays), **options)
            seen = jnp.isfinite(lse)
            return jnp.sum(out * weights) + jnp.sum(jnp.where(seen, jnp.sin(jnp.where(seen, lse, 0)), 0)), (out, lse)

        grads, results = jax.grad(loss, has_aux=True)(floats)
        return Operands(**{"query": None, "key": None, "value": None, **grads}), results

    return quick_jit(run)


SCORE, CAPPED = Score(0.3, None), Score(1.5, 2.0)
THIRDS = Fn(lambda q, kv, head: (q + kv + head) % 3 != 0, key="thirds")
CASES = {
    "plain": ({}, Full(), SCORE),
    "causal": ({"sinks": normal(N)}, Causal(offset=3), SCORE),
    "tree, cap, sinks, segments": (
        {"sinks": normal(N), "q_segments": segments()[0], "kv_segments": segments()[1], "bias": normal(B, N, T, S)},
        Causal(8) & ~Stride(5) | Sink(3),
        CAPPED,
    ),
    "per head and arrays": (
        {"bias": normal(1, N, 1, S), "mask": np.random.default_rng(3).random((B, 1, T, S)) < 0.6},
        THIRDS & SlidingWindow(9, 4),
        CAPPED,
    ),
    "row bias, mask of keys": (
        {"bias": normal(B, 1, T, 1), "mask": np.random.default_rng(3).random((1, N, 1, S)) < 0.6},
        Chunked(16),
        SCORE,
    ),
    "nothing": ({"bias": normal(1, 1, 1, 1), "sinks": normal(N)}, Empty(), SCORE),
}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_reference_is_the_definition(name: str):
    more, mask, score = CASES[name]
    with jax.enable_x64(True):
        out, lse = quick_jit(functools.partial(dense_attention, mask=mask, score=score))(operands(**more))
    wanted_out, wanted_lse = softmax(operands(**more), mask, score)
    np.testing.assert_allclose(out, wanted_out, rtol=0, atol=1e-14)
    np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=1e-14)


def test_reference_derivatives_are_those_of_its_values():
    _, mask, score = CASES["tree, cap, sinks, segments"]
    rng = np.random.default_rng(0)
    shapes = {"query": (1, 4, 2, 3), "key": (1, 5, 1, 3), "value": (1, 5, 1, 2), "bias": (1, 2, 1, 5), "sinks": (2,)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    def attend(arrays):
        return dense_attention(Operands(**arrays), mask=mask, score=score)

    with jax.enable_x64(True):
        check_grads(attend, (arrays,), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "block_sizes"),
    [*((name, (8, 16)) for name in CASES), ("tree, cap, sinks, segments", (16, 8)), ("per head and arrays", (29, 40))],
    ids=str,
)
def test_blockwise_is_the_reference_with_every_gradient(name: str, block_sizes: tuple[int, int]):
    more, mask, score = CASES[name]
    with jax.enable_x64(True):
        x = operands(**more)
        wanted = derivatives(dense_attention, mask=mask, score=score)(x)
        got = derivatives(blockwise_attention, mask=mask, score=score, block_sizes=block_sizes)(x)
    for (path, a), b in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-13, err_msg=jax.tree_util.keystr(path))
        assert b.dtype == np.float64
        assert b.shape == a.shape


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"is_causal": True}, {"is_causal": True}),
        ({"mask": SlidingWindow(5, 3)}, {"local_window_size": (5, 3)}),
    ],
    ids=["full", "causal", "window"],
)
def test_agrees_with_jax_nn(ours: dict[str, Any], theirs: dict[str, Any]):
    query, key, value = operands(np.float32, kv_len=T)[:3]
    arrays = (query, key, value[..., :H], normal(1, N, T, 1).astype(np.float32))
    wanted = quick_jit(lambda *a: jax.nn.dot_product_attention(*a, **theirs))(*arrays)
    for implementation in IMPLEMENTATIONS:
        got = quick_jit(lambda *a, i=implementation: dot_product_attention(*a, **ours, implementation=i))(*arrays)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tree, cap, sinks, segments", "per head and arrays"])
def test_single_and_half_precision(implementation: str, name: str):
    more, mask, score = CASES[name]
    for dtype in (jnp.float32, jnp.bfloat16):
        halves = {name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in more.items()}
        x = jax.tree.map(jnp.asarray, operands(np.float32, **halves))
        x = x._replace(query=x.query.astype(dtype), key=x.key.astype(dtype), value=x.value.astype(dtype))
        segment_ids = None if x.q_segments is None else (x.q_segments, x.kv_segments)
        attend = functools.partial(
            dot_product_attention, scale=score.scale, logits_soft_cap=score.soft_cap, return_lse=True,
            segment_ids=segment_ids, implementation=implementation,
        )  # fmt: skip
        # Only a symbolic mask or an array may be given.
        allowed = mask if x.mask is None else x.mask & mask.elem(*np.ogrid[:T, :S], np.arange(N)[:, None, None])
        out, lse = quick_jit(attend)(x.query, x.key, x.value, x.bias, allowed, sinks=x.sinks)
        wanted_out, wanted_lse = softmax(x, mask, score)
        # In bfloat16 the weights and the output are each rounded once, by half a unit in the last place of at most |v|;
        # in float32 there are the rounding errors of sums, exponentials and logarithms besides.
        units = 1 if dtype == jnp.bfloat16 else 8
        tolerance = units * float(jnp.finfo(dtype).eps) * float(np.abs(x.value).max())
        assert out.dtype == dtype
        assert lse.dtype == jnp.float32
        np.testing.assert_allclose(out.astype(float), wanted_out, rtol=0, atol=tolerance)
        np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("listed", [True, False], ids=["in a visited block", "in a skipped block"])
@pytest.mark.parametrize("with_sinks", [True, False])
def test_rows_that_see_nothing(implementation: str, listed: bool, with_sinks: bool):
    # Strictly causal: the first query sees nothing. Causal from key 16 on: the first two blocks of queries see nothing.
    mask, dead = (Causal(-1), np.s_[:, :1]) if listed else (Causal() & ~Sink(16), np.s_[:, :16])
    x = operands(np.float32, sinks=normal(N).astype(np.float32) if with_sinks else None)
    grads, (out, lse) = derivatives(SMALL_BLOCKS[implementation], mask=mask, score=SCORE)(x)
    assert not any(np.isnan(a).any() for a in jax.tree.leaves((grads, out, lse)))
    assert (out[dead] == 0).all()
    wanted = np.broadcast_to(x.sinks if with_sinks else np.float32(-np.inf), lse[dead].shape)
    np.testing.assert_array_equal(lse[dead], wanted)
    assert (grads.query[dead] == 0).all()
    # Their neighbours are not disturbed: keys and values get the gradients of the living rows alone.
    alive = np.ones(T, bool)
    alive[dead[1]] = False
    assert np.abs(grads.query[:, alive]).min() > 0
    np.testing.assert_allclose(out, softmax(x, mask, SCORE)[0], rtol=0, atol=1e-5)


def test_a_bias_of_minus_infinity_masks():
    allowed = np.random.default_rng(4).random((B, N, T, S)) < 0.5
    allowed[:, :, 5] = False
    x = operands(np.float32)
    wanted = derivatives(dense_attention, mask=Full(), score=SCORE)(x._replace(mask=allowed))
    biased = x._replace(bias=np.where(allowed, 0, -np.inf).astype(np.float32))
    for attend in SMALL_BLOCKS.values():
        grads, results = derivatives(attend, mask=Full(), score=SCORE)(biased)
        assert (grads.bias[~allowed] == 0).all()
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves((grads._replace(bias=None), results)), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=2e-6)


def test_what_is_not_seen_is_not_read():
    rng = np.random.default_rng(5)
    allowed = rng.random((B, N, T, S)) < 0.5
    bias = rng.standard_normal((B, N, T, S)).astype(np.float32)
    gradient = derivatives(SMALL_BLOCKS["xla"], mask=Causal(), score=SCORE)
    hidden = ~(allowed & Causal().dense(T, S))
    clean = operands(np.float32, mask=allowed, bias=np.where(hidden, 0, bias))
    dirty = clean._replace(bias=np.where(hidden, np.nan, bias))
    # Keys from 32 on lie in blocks that no query visits.
    for name in ("key", "value"):
        array = getattr(clean, name).copy()
        array[:, 32:] = np.nan
        dirty = dirty._replace(**{name: array})
    for a, b in zip(*(jax.tree.leaves(gradient(x)) for x in (clean, dirty)), strict=True):
        np.testing.assert_array_equal(a, b)


def temporary_bytes(length: int, bias: tuple[int, ...] | None) -> int:
    """What the compiler sets aside for the gradients, beyond arguments and results."""
    shapes = [(1, length, n, H) for n in (N, K, K)] + ([] if bias is None else [bias])
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    step = quick_jit(jax.grad(lambda *a: jnp.sum(dot_product_attention(*a, mask=Causal()) ** 2), range(len(arrays))))
    return step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_with_its_square():
    short, long = (temporary_bytes(length, (1, N, 1, length)) for length in (4096, 8192))
    assert long < 2.1 * short
    assert long < 8192**2


def test_a_full_bias_costs_its_gradient_and_no_other_array_of_that_size():
    assert temporary_bytes(4096, (1, 1, 4096, 4096)) < temporary_bytes(4096, None) + 1.1 * 4 * 4096**2


def test_blocks_cover_and_are_even():
    for length in (1, 5, 128, 129, 300, 1023, 1025, 4096, 100_003):
        block = block_size(length)
        count = -(-length // block)
        assert (count - 1) * block < length
        assert count * block - length < 8 * count
        assert block <= 256


def test_transformations():
    x = operands(np.float32, kv_len=T)[:3]

    def loss(query, key, value):
        out, lse = dot_product_attention(query, key, value, mask=Causal() & Chunked(16), return_lse=True)
        return jnp.sum(out**2) + jnp.sum(lse)

    grad = jax.grad(loss, (0, 1, 2))
    wanted = quick_jit(grad)(*x)
    alone = quick_jit(jax.vmap(lambda *a: grad(*(array[None] for array in a))))(*x)
    scanned = quick_jit(lambda *a: jax.lax.scan(lambda c, array: (c, grad(*(y[None] for y in array))), 0, a)[1])(*x)
    remat = quick_jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*x)
    for a, b, c, d in zip(wanted, alone, scanned, remat, strict=True):
        np.testing.assert_allclose(b[:, 0], a, rtol=0, atol=1e-5)
        np.testing.assert_allclose(c[:, 0], a, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(d, a)


def test_on_a_mesh_with_operands_that_are_not_split_alike():
    x = operands(np.float32, kv_len=T)
    x = x._replace(key=x.key[:, :, :1], value=x.value[:, :, :1], sinks=normal(N).astype(np.float32))
    arrays = (x.query, x.key, x.value, x.sinks)

    def attend(query, key, value, sinks):
        return dot_product_attention(query, key, value, is_causal=True, sinks=sinks)

    def grad(attend):
        return quick_jit(jax.grad(lambda *a: jnp.sum(attend(*a) ** 2), (0, 1, 2, 3)))

    wanted = grad(attend)(*arrays)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(kind, kind))
        specs = (P("data", None, "heads"), P("data"), P("data"), P("heads"))
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]
            mapped = jax.shard_map(attend, in_specs=specs, out_specs=specs[0])
            got = grad(mapped)(*placed)
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_mask_may_be_an_argument_of_a_jitted_function():
    x = operands(np.float32)[:3]
    out = jax.jit(dot_product_attention)(*x, None, Causal(8))
    np.testing.assert_allclose(out, softmax(Operands(*x), Causal(8), Score(H**-0.5, None))[0], rtol=0, atol=1e-6)


def test_explain():
    decision = jattn.explain(dot_product_attention, *operands(np.float32)[:3])[0]
    assert (decision.chosen["cpu"], decision.chosen["tpu"]) == ("xla", "pallas_tpu")
    with pytest.raises(NotImplementedError, match="runs on tpu"):
        dot_product_attention(*operands(np.float32)[:3], implementation="pallas_tpu")


@pytest.mark.parametrize("parts", [1, 3])
def test_merge_is_attention_over_the_union(parts: int):
    masks = [Stride(parts, phase) & Causal(8) for phase in range(parts)]
    with jax.enable_x64(True):
        x = operands()

        def merged(x, *, score):
            return merge_attentions(*zip(*(dense_attention(x, mask=mask, score=score) for mask in masks), strict=True))

        wanted = derivatives(dense_attention, mask=Causal(8), score=SCORE)(x)
        got = derivatives(merged, score=SCORE)(x)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-13)


def test_merge_with_sides_that_saw_nothing():
    out = normal(2, 3, 4).astype(np.float32)
    lse = normal(2, 3).astype(np.float32)
    nothing = np.full((2, 3), -np.inf, np.float32)
    garbage = np.full((2, 3, 4), np.nan, np.float32)

    def loss(outs, lses):
        out, lse = merge_attentions(outs, lses)
        return jnp.sum(out) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0)), (out, lse)

    grad = quick_jit(jax.grad(loss, (0, 1), has_aux=True))
    grads, (got, got_lse) = grad((garbage, out, garbage), (nothing, lse, nothing))
    np.testing.assert_array_equal(got, out)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-6)
    np.testing.assert_array_equal(grads[0][1], 1)
    for side, kind in itertools.product((0, 2), (0, 1)):
        np.testing.assert_array_equal(grads[kind][side], 0)
    grads, (got, got_lse) = grad((garbage, garbage), (nothing, nothing))
    np.testing.assert_array_equal(got, 0)
    np.testing.assert_array_equal(got_lse, -np.inf)
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_beyond_the_range_of_exp(implementation: str):
    x = operands(np.float32)
    attend = functools.partial(SMALL_BLOCKS[implementation], mask=Full())
    out, lse = quick_jit(functools.partial(attend, score=Score(1e4, None)))(x)
    z = 1e4 * np.einsum("btnh,bsnh->btns", x.query.astype(float), x.key.astype(float).repeat(N // K, 2))
    best = z.argmax(-1)
    clear = np.partition(z, -2)[..., -2] < z.max(-1) - 100
    assert clear.mean() > 0.9
    chosen = np.take_along_axis(x.value.repeat(N // K, 2).transpose(0, 2, 1, 3), best.transpose(0, 2, 1)[..., None], 2)
    np.testing.assert_allclose(out[clear], chosen.transpose(0, 2, 1, 3)[clear], rtol=1e-6)
    np.testing.assert_allclose(lse, z.max(-1), rtol=1e-5)


def test_second_derivatives_where_masked_logits_are_beyond_the_range_of_exp():
    """Masked logits are far above the log-sum-exp of those that are seen: exp of the difference is infinite."""

    def second(implementation: str) -> Any:
        def loss(query: Any) -> Any:
            out, _ = SMALL_BLOCKS[implementation](x._replace(query=query), mask=Causal(), score=Score(1e3, None))
            return jnp.sum(jnp.sin(out))

        return quick_jit(jax.grad(lambda query: jnp.sum(jnp.sin(jax.grad(loss)(query)))))(x.query)

    with jax.enable_x64(True):
        x = operands()
        wanted = second("reference")
        assert np.abs(wanted).max() > 1
        np.testing.assert_allclose(second("xla"), wanted, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_scale_of_zero_is_a_scale(implementation: str):
    x = operands(np.float32)
    out = quick_jit(functools.partial(dot_product_attention, scale=0.0, implementation=implementation))(*x[:3])
    mean = x.value.mean(axis=1, keepdims=True).repeat(N // K, axis=2)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), rtol=0, atol=1e-6)


def bad(**changes: Any) -> Any:
    """A call with float32 arrays and some arguments changed."""
    x = operands(np.float32)._asdict()
    arguments = {"query": x["query"], "key": x["key"], "value": x["value"], **changes}
    return lambda: dot_product_attention(**arguments)


ones = functools.partial(np.ones, dtype=np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad(query=[[1.0]]), TypeError, "query: expected an array, got list"),
        (bad(query=ones((B, T, H))), ValueError, "query: expected 4 dimensions"),
        (bad(key=ones((B, S, K, H + 1))), ValueError, "key: expected .* with H = 5 as in query"),
        (bad(value=ones((B, S - 1, K, V))), ValueError, "value: expected .* with S = 37 as in key"),
        (bad(query=ones((B, T, 4, H))), ValueError, "query: 4 heads cannot be shared by 3"),
        (bad(key=ones((B, 0, K, H)), value=ones((B, 0, K, V))), ValueError, "dimension S is 0"),
        (bad(query=np.ones((B, T, N, H), int)), TypeError, "query: expected a floating dtype"),
        (bad(key=np.ones((B, S, K, H), np.float16)), TypeError, "key: expected dtype float32 as in query"),
        (bad(bias=ones((N, T, S))), ValueError, "bias: expected .* each size may be 1"),
        (bad(bias=ones((B, K, T, S))), ValueError, "bias: expected .* each size may be 1"),
        (bad(bias=np.ones((1, 1, T, S), np.int32)), TypeError, "bias: expected a floating dtype"),
        (bad(bias=np.ones((1, 1, T, S))), TypeError, "bias: logits are computed in float32, got float64"),
        (bad(mask=ones((1, 1, T, S))), TypeError, "mask: expected booleans"),
        (bad(mask=np.ones((1, 1, S, T), bool)), ValueError, "mask: expected .* each size may be 1"),
        (bad(is_causal=True), ValueError, r"is_causal: .* mask=Causal\(offset=8\)"),
        (bad(scale="small"), TypeError, "scale: expected a static number"),
        (bad(logits_soft_cap=0.0), ValueError, "logits_soft_cap: expected a positive number"),
        (bad(sinks=ones(K)), ValueError, "sinks: expected .* N = 6"),
        (bad(segment_ids=np.ones((B, T), int)), ValueError, r"segment_ids: .* pass \(query_ids"),
        (bad(segment_ids=(np.ones((B, T), int),)), ValueError, "segment_ids: expected .* a pair"),
        (bad(segment_ids=(np.ones((B, T), int), np.ones((B, T), int))), ValueError, r"segment_ids \(keys\): expected"),
        (bad(segment_ids=(ones((B, T)), ones((B, S)))), TypeError, "segment_ids .* expected an integer dtype"),
        (bad(implementation="cuda"), ValueError, "implementation: expected one of"),
        (lambda: merge_attentions([], []), ValueError, "outs, lses: expected as many"),
        (lambda: merge_attentions([ones((2, 3))], [ones(3)]), ValueError, r"outs\[0\], lses\[0\]: expected"),
        (lambda: merge_attentions([ones((2, 3))] * 2, [ones(2), np.ones(2)]), TypeError, r"lses\[1\]: expected dtype"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
