"""Neighborhood attention against its definition in float64, with every gradient; what it is equal to; what it costs."""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn.dispatch import explain
from jattn.dot_product import dot_product_attention, merge_attentions
from jattn.neighborhood import xla
from jattn.neighborhood.neighborhood import na1d, na2d, na3d, neighborhood_attention
from jattn.neighborhood.window import Neighborhood

B, N, K, H, V, M = 2, 6, 3, 5, 7, 4
IMPLEMENTATIONS = ("reference", "xla")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
ARRAYS = ("query", "key", "value", "additional_keys", "additional_values", "rel_pos_bias")

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "1-D": ((29,), {"kernel_size": 7}),
    "1-D, even, strided, dilated": ((29,), {"kernel_size": 4, "stride": 3, "dilation": 5}),
    "1-D, causal": ((31,), {"kernel_size": 6, "is_causal": True}),
    "1-D, causal, strided, dilated": ((31,), {"kernel_size": 5, "stride": 4, "dilation": 3, "is_causal": True}),
    "2-D": ((13, 11), {"kernel_size": (3, 4)}),
    "2-D, strided, dilated, causal columns": (
        (13, 17),
        {"kernel_size": (5, 4), "stride": (2, 3), "dilation": (2, 3), "is_causal": (False, True)},
    ),
    "3-D": ((5, 7, 3), {"kernel_size": (2, 3, 3), "stride": (1, 2, 3), "dilation": (2, 1, 1)}),
    "3-D, causal": ((3, 5, 7), {"kernel_size": (3, 2, 3), "dilation": (1, 2, 2), "is_causal": (True, False, True)}),
    "one token": ((1, 1), {"kernel_size": 1}),
    "a window of one": ((7,), {"kernel_size": 1}),
}
every_case = pytest.mark.parametrize(("grid", "options"), CASES.values(), ids=CASES)


def inputs(grid: tuple[int, ...], seed: int = 0, dtype: Any = np.float64, value_dim: int = V, **options: Any) -> Any:
    """Query, key and value by name; with `additional`, M tokens; with `bias=w`, a table for windows of w."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    x = {"query": normal(B, *grid, N, H), "key": normal(B, *grid, K, H), "value": normal(B, *grid, K, value_dim)}
    if options.get("additional"):
        x |= {"additional_keys": normal(B, M, K, H), "additional_values": normal(B, M, K, value_dim)}
    if "bias" in options:
        x["rel_pos_bias"] = normal(N, *(2 * w - 1 for w in options["bias"]))
    return x


def defined(x: dict[str, Any], seen: np.ndarray, scale: float = H**-0.5) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp with all weights at once, additional tokens in the same softmax; `seen [B or 1, T, T]`."""
    q, k, v = (np.asarray(x[name], np.float64).reshape(B, -1, *x[name].shape[-2:]) for name in ARRAYS[:3])
    tokens = q.shape[1]
    if "additional_keys" in x:
        k, v = np.concatenate([k, x["additional_keys"]], 1), np.concatenate([v, x["additional_values"]], 1)
        seen = np.pad(seen, [(0, 0), (0, 0), (0, M)], constant_values=True)
    k, v = (np.repeat(a, N // K, axis=2) for a in (k, v))
    weights = np.where(seen[:, None], np.exp(scale * np.einsum("bqnh,bknh->bnqk", q, k)), 0)
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    out = np.einsum("bnqk,bknv->bqnv", weights / np.where(total == 0, 1, total)[..., None], v)
    grid = x["query"].shape[1:-2]
    assert tokens == math.prod(grid)
    return out.reshape(B, *grid, N, -1), np.moveaxis(lse, 1, 2).reshape(B, *grid, N)


def scalar(outputs: tuple[Any, Any]) -> Any:
    """A number that depends on every element of output and log-sum-exp."""
    out, lse = outputs
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    return sum(jnp.sum(jnp.cos(jnp.arange(a.size, dtype=a.dtype).reshape(a.shape)) * a) for a in (out, lse))


def call(implementation: Any, **options: Any) -> Any:
    """The op with its log-sum-exp, of a dictionary of arrays."""
    return quick_jit(lambda x: neighborhood_attention(**x, **options, return_lse=True, implementation=implementation))


def value_and_gradients(implementation: Any, x: Any, **options: Any) -> tuple[Any, Any]:
    op = lambda x: neighborhood_attention(**x, **options, return_lse=True, implementation=implementation)  # noqa: E731

    def loss(x: Any) -> tuple[Any, Any]:
        outputs = op(x)
        return scalar(outputs), outputs

    (_, outputs), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(x)
    return outputs, gradients


def assert_close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        largest = float(np.max(np.abs(b), initial=1.0, where=np.isfinite(b)))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest)


# What it computes


@every_case
@every_implementation
def test_it_is_the_softmax_over_the_window(grid, options, implementation):
    with jax.enable_x64(True):
        x = inputs(grid)
        seen = Neighborhood(**options).dense(grid)[None]
        assert_close(call(implementation, **options)(x), defined(x, seen))


@every_case
def test_gradients_are_those_of_the_dense_definition(grid, options):
    with jax.enable_x64(True):
        x = inputs(grid, additional=True)
        want, gradients = value_and_gradients("reference", x, **options)
        assert all(np.any(gradient) for gradient in gradients.values()) or math.prod(grid) == 1
        got = value_and_gradients("xla", x, **options)
        assert_close(got, (want, gradients))


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((29,), {"kernel_size": 6, "dilation": 2}),
        ((11, 7), {"kernel_size": (4, 3), "dilation": (2, 1)}),
        ((5, 3, 7), {"kernel_size": (2, 3, 3), "dilation": (2, 1, 2)}),
    ],
    ids=["1-D", "2-D", "3-D"],
)
def test_a_bias_of_relative_positions_and_hidden_keys_have_their_place_and_gradients(grid, options):
    sizes = Neighborhood(**options).on(grid).kernel_size
    with jax.enable_x64(True):
        x = inputs(grid, additional=True, bias=sizes)
        options = {**options, "key_mask": np.random.default_rng(5).random((B, *grid)) < 0.7}
        got, want = (value_and_gradients(implementation, x, **options) for implementation in ("xla", "reference"))
        assert_close(got, want)
        assert np.count_nonzero(want[1]["rel_pos_bias"]) == want[1]["rel_pos_bias"].size


@every_implementation
def test_the_bias_is_that_of_the_distance_in_a_group(implementation):
    grid, window, dilation = (13, 11), (3, 5), (2, 2)
    with jax.enable_x64(True):
        x = inputs(grid, bias=window)
        table = x.pop("rel_pos_bias")
        out, lse = call(implementation, kernel_size=window, dilation=dilation)({**x, "rel_pos_bias": table})
        # One query, written out: the window of (4, 0) is moved inward along the columns.
        rows, cols = np.array([2, 4, 6]), np.array([0, 2, 4, 6, 8])
        for n in range(N):
            z = np.einsum("h,yxh->yx", x["query"][1, 4, 0, n], x["key"][1][np.ix_(rows, cols)][:, :, n // 2]) * H**-0.5
            z = z + table[n][np.ix_((rows - 4) // 2 + 2, (cols - 0) // 2 + 4)]
            p = np.exp(z) / np.exp(z).sum()
            assert lse[1, 4, 0, n] == pytest.approx(np.log(np.exp(z).sum()), abs=1e-12)
            want = np.einsum("yx,yxv->v", p, x["value"][1][np.ix_(rows, cols)][:, :, n // 2])
            np.testing.assert_allclose(out[1, 4, 0, n], want, atol=1e-12)


@every_implementation
def test_queries_that_see_nothing_have_zeros_and_hand_on_no_gradient(implementation):
    grid, options = (11, 7), {"kernel_size": 3}
    key_mask = np.ones((B, *grid), bool)
    key_mask[1, 2:7] = False
    with jax.enable_x64(True):
        x = inputs(grid)
        want = defined(x, Neighborhood(**options).dense(grid)[None] & key_mask.reshape(B, 1, -1))
        (out, lse), gradients = value_and_gradients(implementation, x, **options, key_mask=key_mask)
        assert_close((out, lse), want)
        blind = np.isneginf(lse)
        assert blind[1, 3:6].all()
        assert blind.sum() == 3 * 7 * N
        assert not np.any(out[1, 3:6])
        assert not np.any(gradients["query"][1, 3:6])
        assert not np.any(gradients["key"][1, 2:7])
        assert all(np.isfinite(gradient).all() for gradient in gradients.values())
        # With additional tokens they see those.
        x = inputs(grid, additional=True)
        out, lse = call(implementation, **options, key_mask=key_mask)(x)
        assert np.isfinite(lse).all()
        flat = x["query"][1, 3:6].reshape(1, -1, N, H)
        alone = dot_product_attention(flat, x["additional_keys"][1:], x["additional_values"][1:])
        np.testing.assert_allclose(out[1, 3:6].reshape(alone.shape), alone, atol=1e-12)


# What it is equal to


@pytest.mark.parametrize("stride", [1, 2, 5, 13])
@every_implementation
def test_a_window_of_all_tokens_is_full_attention_for_any_stride(stride, implementation):
    x = inputs((13,), dtype=np.float32)
    for is_causal in (False, True):
        got = call(implementation, kernel_size=13, stride=stride, is_causal=is_causal)(x)
        want = dot_product_attention(**x, is_causal=is_causal, return_lse=True, implementation="reference")
        assert_close(got, want, 2e-6)


@every_implementation
def test_a_stride_of_the_window_is_attention_within_blocks(implementation):
    x = inputs((6, 15), dtype=np.float32)

    def blocks(a: Any) -> Any:
        return a.reshape(B, 2, 3, 3, 5, *a.shape[-2:]).swapaxes(2, 3).reshape(B * 6, 15, *a.shape[-2:])

    out, _ = call(implementation, kernel_size=(3, 5), stride=(3, 5))(x)
    want = dot_product_attention(*(blocks(x[name]) for name in ARRAYS[:3]), implementation="reference")
    np.testing.assert_allclose(blocks(np.asarray(out)), want, atol=1e-6)


@every_implementation
def test_dilation_is_attention_on_every_strided_slice(implementation):
    x = inputs((17, 11), dtype=np.float32)
    out, lse = call(implementation, kernel_size=(3, 2), stride=(2, 1), dilation=(5, 3), is_causal=(False, True))(x)
    plain = call(implementation, kernel_size=(3, 2), stride=(2, 1), is_causal=(False, True))
    for group in itertools.product(range(5), range(3)):
        own = (slice(None), slice(group[0], None, 5), slice(group[1], None, 3))
        assert_close((out[own], lse[own]), plain({name: a[own] for name, a in x.items()}), 2e-6)


@every_implementation
def test_away_from_borders_it_moves_with_its_input(implementation):
    x = inputs((19, 17), dtype=np.float32)
    moved = {name: np.roll(a, (1, 1), axis=(1, 2)) for name, a in x.items()}
    run = call(implementation, kernel_size=(5, 4))
    (out, _), (then, _) = run(x), run(moved)
    np.testing.assert_allclose(then[:, 6:-5, 5:-4], out[:, 5:-6, 4:-5], atol=2e-6)
    assert not np.allclose(then[:, 1:3], out[:, :2], atol=1e-3), "at a border it does not"


def test_it_merges_with_attention_to_other_tokens_gradients_included():
    """The window and the additional tokens apart, merged, are one softmax."""
    grid, options = (7, 11), {"kernel_size": (3, 5), "dilation": (2, 1)}
    with jax.enable_x64(True):
        x = inputs(grid, additional=True)

        def merged(x: Any) -> Any:
            near = neighborhood_attention(
                *(x[name] for name in ARRAYS[:3]), **options, return_lse=True, implementation="xla"
            )
            flat = x["query"].reshape(B, -1, N, H)
            far = dot_product_attention(flat, x["additional_keys"], x["additional_values"], return_lse=True)
            parts = zip(near, far, strict=True)
            return merge_attentions(*([a, b.reshape(a.shape)] for a, b in parts))

        got = merged(x), quick_jit(jax.grad(lambda x: scalar(merged(x))))(x)
        want = value_and_gradients("reference", x, **options)
        assert_close(got, want)
        assert_close(want[0], defined(x, Neighborhood(**options).dense(grid)[None]))


# Every combination, and short floats


@pytest.mark.parametrize("is_causal", [*itertools.product((False, True), repeat=3)])
def test_every_combination_of_causal_axes(is_causal):
    options = {"kernel_size": (2, 3, 2), "stride": (1, 2, 2), "is_causal": is_causal}
    with jax.enable_x64(True):
        x = inputs((3, 5, 4))
        assert_close(call("xla", **options)(x), defined(x, Neighborhood(**options).dense((3, 5, 4))[None]))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", (1e-2, 1e-2)), ("bfloat16", (5e-2, 1e-2))])
def test_short_floats_keep_statistics_long(dtype, tolerance):
    options = {"kernel_size": (5, 4), "stride": (2, 1)}
    short = {name: jnp.asarray(a, dtype) for name, a in inputs((13, 11), dtype=np.float32).items()}
    wide = {name: a.astype(jnp.float32) for name, a in short.items()}

    def run(x: Any) -> Any:
        op = lambda x: neighborhood_attention(**x, **options, return_lse=True)  # noqa: E731
        (out, lse), pull_back = jax.vjp(op, x)
        (gradients,) = pull_back((0.05 * jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype), 0 * lse))
        return out, lse, gradients

    (out, lse, gradients), want = run(short), run(wide)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    np.testing.assert_allclose(lse, want[1], atol=1e-5)
    np.testing.assert_allclose(out.astype(jnp.float32), want[0], rtol=0, atol=tolerance[0])
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        np.testing.assert_allclose(gradient.astype(jnp.float32), want[2][name], rtol=0, atol=tolerance[1])


@every_implementation
def test_the_gradient_of_a_short_bias_is_summed_long(implementation: str):
    """Over all queries; summed in bfloat16, it would stop growing where a term is less than its last bit."""
    x = {name: jnp.asarray(a, "bfloat16") for name, a in inputs((401,), dtype=np.float32, bias=(5,)).items()}
    table = x.pop("rel_pos_bias")

    @quick_jit
    def gradient(table: Any, x: Any) -> Any:
        def loss(table: Any) -> Any:
            out = neighborhood_attention(**x, kernel_size=5, rel_pos_bias=table, implementation=implementation)
            return jnp.sum(jnp.square(out.astype(jnp.float32)))

        return jax.grad(loss)(table).astype(jnp.float32)

    want = gradient(table.astype(jnp.float32), jax.tree.map(lambda a: a.astype(jnp.float32), x))
    assert np.linalg.norm(gradient(table, x) - want) < 1e-2 * np.linalg.norm(want)


# Tiles, steps, options


@pytest.mark.parametrize(("q_tile", "kv_tile"), [(1, 2), ((5, 3), (2, 7)), (16, 16)])
@pytest.mark.parametrize("logits", [1, 2**13, 2**30])
def test_tiles_and_steps_change_nothing_but_the_order_of_sums(q_tile, kv_tile, logits, monkeypatch):
    options = {"kernel_size": (4, 3), "stride": (3, 1), "dilation": (2, 1)}
    grid = (13, 11)
    with jax.enable_x64(True):
        x = inputs(grid)
        monkeypatch.setattr(xla, "LOGITS", logits)
        got = value_and_gradients("xla", x, **options, q_tile=q_tile, kv_tile=kv_tile)
        assert_close(got, value_and_gradients("reference", x, **options))


@every_implementation
def test_a_scale_of_zero_is_legal_and_a_scale_is_of_all_products(implementation):
    with jax.enable_x64(True):
        x = inputs((13,), additional=True)
        seen = Neighborhood(5).dense((13,))[None]
        for scale in (0.0, 0.3, -1.0):
            assert_close(call(implementation, kernel_size=5, scale=scale)(x), defined(x, seen, scale))


@every_implementation
def test_a_clamped_window_is_the_widest_that_fits(implementation):
    x = inputs((5, 13), dtype=np.float32)
    options = {"stride": (4, 1), "dilation": (1, 2)}
    got = call(implementation, kernel_size=(7, 7), clamp_window=True, **options)(x)
    assert_close(got, call(implementation, kernel_size=(5, 6), **options)(x), 1e-7)


def test_the_functions_of_one_rank_take_that_rank_only():
    for rank, op in enumerate((na1d, na2d, na3d), 1):
        assert op.__name__ == f"na{rank}d"
        x = inputs((3,) * rank, dtype=np.float32)
        assert_close(op(**x, kernel_size=2), neighborhood_attention(**x, kernel_size=2), 1e-7)
        other = inputs((3,) * (rank % 3 + 1), dtype=np.float32)
        with pytest.raises(ValueError, match=f"^query: na{rank}d takes a grid of {rank} axes"):
            op(**other, kernel_size=2)


def test_the_reference_has_forward_mode_derivatives():
    with jax.enable_x64(True):
        x = inputs((3, 5), additional=True, bias=(2, 3))
        op = functools.partial(neighborhood_attention, kernel_size=(2, 3), implementation="reference")
        tangents = inputs((3, 5), seed=1, additional=True, bias=(2, 3))
        _, got = jax.jvp(lambda x: op(**x), (x,), (tangents,))
        step = 1e-6
        ends = [op(**{name: x[name] + sign * step * tangents[name] for name in x}) for sign in (1, -1)]
        np.testing.assert_allclose(got, (ends[0] - ends[1]) / (2 * step), atol=1e-8)


def test_explain_says_what_runs():
    (decision,) = explain(neighborhood_attention, **inputs((7,), dtype=np.float32), kernel_size=3)
    assert decision.op == "neighborhood_attention"
    assert decision.chosen["cpu"] == "xla"


# What it costs


def _text(extent: int, **options: Any) -> Any:
    sizes = ((1, extent, extent, 2, 8),) * 3
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in sizes]
    table = jax.ShapeDtypeStruct((2, 9, 9), np.float32)

    def loss(q: Any, k: Any, v: Any, rel_pos_bias: Any) -> Any:
        op = functools.partial(neighborhood_attention, kernel_size=5, implementation="xla", return_lse=True)
        return scalar(op(q, k, v, rel_pos_bias=rel_pos_bias, **options))

    return quick_jit(jax.grad(loss, (0, 1, 2, 3))).lower(*arrays, table).compile()


def test_memory_is_linear_in_the_tokens_and_nothing_is_scattered():
    temp = {}
    for extent in (32, 64):
        compiled = _text(extent)
        temp[extent] = compiled.memory_analysis().temp_size_in_bytes
        text = compiled.as_text()
        assert "scatter(" not in text
        sizes = [math.prod(map(int, size.split(","))) for size in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)]
        assert max(sizes) < extent**4 / 2
    assert temp[64] <= 4.5 * temp[32]


def test_gradients_repeat_their_bits_and_eager_is_jit():
    x = inputs((13, 11), dtype=np.float32, bias=(3, 3))
    first, second = (value_and_gradients("xla", x, kernel_size=3) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    eager = neighborhood_attention(**x, kernel_size=3, return_lse=True, implementation="xla")
    assert_close(eager, first[0], 2e-6)


def test_on_a_mesh_and_inside_shard_map():
    grid, options = (7, 5), {"kernel_size": 3, "implementation": "xla", "return_lse": True}
    x = inputs(grid, dtype=np.float32, additional=True, bias=(3, 3))
    table = x.pop("rel_pos_bias")

    def loss(x: Any, table: Any) -> Any:
        out, lse = neighborhood_attention(**x, rel_pos_bias=table, **options)
        return jnp.sum(out * jnp.arange(V)) + jnp.sum(lse)

    want = quick_jit(jax.grad(loss, (0, 1)))(x, table)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        got = quick_jit(jax.grad(loss, (0, 1)))(placed, jax.device_put(table, NamedSharding(mesh, P())))
    assert_close(jax.device_get(got), jax.device_get(want), 2e-5)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    each = jax.shard_map(
        lambda x, table: loss(x, table)[None], mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    got = quick_jit(jax.grad(lambda x, table: each(x, table).sum(), (0, 1)))(x, table)
    assert_close(jax.device_get(got), jax.device_get(want), 2e-5)


# What it refuses


def _with(**changes: Any) -> dict[str, Any]:
    x = {**inputs((7, 5), dtype=np.float32), "kernel_size": 3, **changes}
    return {name: value for name, value in x.items() if value is not None or name in changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": np.ones((B, N, H))}, ValueError, r"query: expected \[B, \*grid, heads, width\] with 1, 2 or 3"),
        ({"query": [1.0]}, TypeError, "query: expected an array, got list"),
        ({"key": None}, TypeError, "key: expected an array, got NoneType"),
        ({"value": None}, TypeError, "value: expected an array, got NoneType"),
        ({"key": np.ones((B, 7, 6, K, H), np.float32)}, ValueError, r"key: expected .* Y = 5 as in query, got"),
        ({"key": np.ones((B, 35, K, H), np.float32)}, ValueError, "key: expected 5 dimensions"),
        ({"key": np.ones((B, 7, 5, 4, H), np.float32)}, ValueError, "value: expected .* K = 4 as in key"),
        ({"key": np.ones((B, 7, 5, K, H), np.float16)}, TypeError, "key: expected dtype float32 as in query"),
        ({"query": np.ones((B, 7, 5, 4, H), np.float32)}, ValueError, "query: 4 heads cannot be shared by 3"),
        ({"query": np.ones((B, 7, 5, N, H), np.int32)}, TypeError, "query: expected a floating dtype"),
        ({"additional_keys": np.ones((B, M, K, H), np.float32)}, ValueError, "additional_values: expected both"),
        ({"additional_values": np.ones((B, M, K, V), np.float32)}, ValueError, "additional_keys: expected both"),
        (
            {f"additional_{n}": np.ones((B, M, K, d), np.float32) for n, d in (("keys", H), ("values", H))},
            ValueError,
            "additional_values: expected .* V = 7 as in value",
        ),
        ({"key_mask": np.ones((B, 7, 5))}, TypeError, r"key_mask: .* pass key_mask.astype\(bool\)"),
        ({"key_mask": np.ones((B, 35), bool)}, ValueError, "key_mask: expected 3 dimensions"),
        ({"rel_pos_bias": np.ones((N, 5, 4), np.float32)}, ValueError, r"rel_pos_bias: expected .* = \(6, 5, 5\)"),
        ({"rel_pos_bias": np.ones((N, 5, 5), np.float64)}, TypeError, "rel_pos_bias: logits are computed in float32"),
        ({"rel_pos_bias": np.ones((N, 5, 5), np.float32), "stride": 2}, ValueError, "rel_pos_bias: .*apply_rotary"),
        ({"rel_pos_bias": np.ones((N, 5, 5), np.float32), "is_causal": (False, True)}, ValueError, "rel_pos_bias: "),
        ({"kernel_size": 6}, ValueError, "kernel_size: a window of 6 .* pass at most 5, or clamp_window=True"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size: expected a number or a tuple of 2"),
        ({"stride": 4}, ValueError, "stride: 4 on axis 0 is more than the window of 3"),
        ({"dilation": (1, 2)}, ValueError, "kernel_size: a window of 3 with dilation 2 reaches over 6"),
        ({"scale": np.ones(1)}, TypeError, "scale: expected a static number"),
        ({"q_tile": (4, 4, 4)}, ValueError, "q_tile: expected a number or a tuple of 2"),
        ({"kv_tile": 0}, ValueError, "kv_tile: expected at least 1"),
        ({"clamp_window": None}, TypeError, "clamp_window: expected a static True or False"),
        ({"return_lse": 1}, TypeError, "return_lse: expected a static True or False"),
        ({"implementation": "cuda"}, ValueError, "implementation: expected one of"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(changes, error, message):
    with pytest.raises(error, match=f"^{message}"):
        neighborhood_attention(**_with(**changes))


def test_a_grid_without_tokens_is_refused():
    x = {name: a[:, :0] for name, a in inputs((7,), dtype=np.float32).items()}
    with pytest.raises(ValueError, match=r"^dimension X is 0"):
        neighborhood_attention(**x, kernel_size=1)
