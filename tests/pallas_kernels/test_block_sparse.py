"""The block-sparse kernels, interpreted, against dense attention in float64: values, log-sum-exps, every gradient."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import dot_product_attention
from jattn.masks import Causal, Fn, Full, SlidingWindow
from pallas_kernels.block_sparse import (
    BlockLists,
    Blocks,
    Program,
    Tile,
    Tiling,
    Windows,
    WorkList,
    block_sparse_attention,
)

CUT = Tiling(
    block_q=128,
    block_kv=256,
    forward=Tile(128, 128, 1),
    backward=Tile(128, 128, 1),
    strip=128,
    ones=False,
    split=False,
    vmem=2**26,
    resident=2**25,
)
TWO_WALKS = dataclasses.replace(CUT, resident=0)
WIDE_UNITS = dataclasses.replace(CUT, ones=True, split=True)
COLUMNS = dataclasses.replace(WIDE_UNITS, turned=(Tile(128, 256, 2), Tile(128, 128, 1)))
ON_GPU = Blocks(
    block_q=128,
    block_kv=256,
    forward=Program(64, 128, 4, 2),
    queries=Program(128, 64, 4, 2),
    keys=Program(32, 128, 4, 2),
)
TABLE = jnp.arange(2.0)
LATE = ~Causal(offset=100)  # the last queries see nothing
WINDOW = Causal(offset=40) & SlidingWindow(150)


def work_lists(kinds):
    """Lists by row and by column of kinds `[Bm, Nm, nq, nk]`, padded to one length by steps that do nothing."""

    def listed(kind):
        some = kind > 0
        some[~some.any(axis=1), 0] = True
        return *np.nonzero(some), kind[np.nonzero(some)]

    def together(kinds):
        found = [listed(kind) for kind in kinds.reshape(-1, *kinds.shape[2:])]
        most = max(len(steps[0]) for steps in found)

        def array(which):
            padded = [
                np.pad(steps[which], (0, most - len(steps[0])), **({"mode": "edge"} if which < 2 else {}))
                for steps in found
            ]
            return np.stack(padded).astype(np.int32).reshape(*kinds.shape[:2], most)

        return [array(which) for which in range(3)]

    row, col, kind = together(np.swapaxes(kinds, 2, 3))
    return WorkList(*together(kinds)), WorkList(col, row, kind)


def block_lists(kinds):
    """Lists of rows and of columns of the same; beyond its end a list names blocks that it must not visit."""

    def listed(kinds):
        order = np.argsort(np.where(kinds == 0, 3, kinds), axis=-1, kind="stable").astype(np.int32)
        return BlockLists(order, *(np.sum(x, axis=-1, dtype=np.int32) for x in (kinds == 1, kinds > 0)))

    return listed(kinds), listed(np.swapaxes(kinds, 2, 3))


def of_mask(mask, q_len, kv_len):
    return mask.block_kinds(q_len, kv_len, CUT.block_q, CUT.block_kv)[None, None].astype(np.int32)


def operands(batch, q_len, kv_len, heads, kv_heads, width, value_width, *, dtype=jnp.float32, **more):
    """And as `more` says sinks, kv_bias or other arrays of the given shapes."""
    keys = iter(jax.random.split(jax.random.key(0), 12))
    shapes = {
        "query": (batch, q_len, heads, width),
        "key": (batch, kv_len, kv_heads, width),
        "value": (batch, kv_len, kv_heads, value_width),
    }
    found = {name: jax.random.normal(next(keys), shape).astype(dtype) for name, shape in shapes.items()}
    found |= {name: jax.random.normal(next(keys), shape) for name, shape in more.items()}
    cotangents = (
        jax.random.normal(next(keys), (batch, q_len, heads, value_width)).astype(dtype),
        jax.random.normal(next(keys), (batch, q_len, heads)),
    )
    return found, cotangents


def allowed(kinds, mask, windows, heads, q_len, kv_len):
    """The dense mask of kinds."""
    by_pair = np.repeat(np.repeat(kinds, CUT.block_q, axis=2), CUT.block_kv, axis=3)[..., :q_len, :kv_len]
    by_head = np.repeat(by_pair, heads // kinds.shape[1], axis=1)
    rule = mask.dense(q_len, kv_len)
    if windows is not None:
        low, high = (x[..., None] for x in windows[:2])
        rule = rule & ((low <= windows.place[:, None]) & (windows.place[:, None] < high)).all(axis=1)[:, None]
    rows = max(len(x) if np.ndim(x) == 4 else 1 for x in (by_head, rule))
    by_head, rule = (np.resize(x, (rows, *np.shape(x)[-3:])) if np.ndim(x) == 4 else x for x in (by_head, rule))
    return (by_head == 2) | ((by_head == 1) & rule)


def _all_rows(x, batch):
    """Batch row b has row b mod G."""
    return np.concatenate([x] * (batch // len(x))) if len(x) > 1 else x


def with_gradients(function, arguments, cotangents):
    out, transpose = jax.vjp(function, arguments)
    return dict(zip(("out", "lse"), out, strict=True)) | transpose(cotangents)[0]


@functools.partial(jax.jit, static_argnames=("soft_cap", "reference"))
def dense(arguments, cotangents, mask, segments, *, soft_cap, reference):
    def attend(x):
        x = reference(x) if reference else x
        bias = x.get("bias")
        if "kv_bias" in x:
            bias = jnp.repeat(x["kv_bias"], x["query"].shape[2] // x["key"].shape[2], axis=1)[:, :, None]
        return dot_product_attention(
            x["query"],
            x["key"],
            x["value"],
            bias,
            mask,
            scale=0.2,
            logits_soft_cap=soft_cap,
            sinks=x.get("sinks"),
            segment_ids=segments,
            return_lse=True,
            implementation="reference",
        )

    return with_gradients(attend, arguments, cotangents)


def assert_as_dense(
    arguments,
    cotangents,
    mask,
    kinds=None,
    *,
    cut=CUT,
    soft_cap=None,
    segments=None,
    windows=None,
    ratio=1e-5,
    reference=None,
    **options,
):
    """`reference(arguments) -> arguments` says what a score function does to the arguments of dense attention."""
    query, key = arguments["query"], arguments["key"]
    sizes = (query.shape[2], query.shape[1], key.shape[1])
    kinds = of_mask(mask, *sizes[1:]) if kinds is None else kinds
    by_row, by_col = block_lists(kinds) if isinstance(cut, Blocks) else work_lists(kinds)
    captured = [name for name in arguments if name not in ("query", "key", "value", "kv_bias", "sinks")]

    def fused(x):
        return block_sparse_attention(
            *(x[name] for name in ("query", "key", "value")),
            by_row,
            by_col,
            element=mask.elem,
            interval=mask.interval,
            q_segment_ids=None if segments is None else segments[0],
            kv_segment_ids=None if segments is None else segments[1],
            windows=windows,
            sinks=x.get("sinks"),
            kv_bias=x.get("kv_bias"),
            captured=[x[name] for name in captured],
            scale=0.2,
            soft_cap=soft_cap,
            block_q=CUT.block_q,
            block_kv=CUT.block_kv,
            platform="interpret_gpu" if isinstance(cut, Blocks) else "interpret",
            cut=cut,
            **options,
        )

    got = jax.jit(functools.partial(with_gradients, fused))(arguments, cotangents)
    visible = _all_rows(allowed(kinds, mask, windows, *sizes), len(query))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (arguments, cotangents))
        want = dense(*wide, visible, segments, soft_cap=soft_cap, reference=reference)
    got, want = jax.tree.map(lambda x: np.asarray(x, np.float64), (got, want))
    seen = np.isfinite(want["lse"])
    np.testing.assert_array_equal(np.isfinite(got["lse"]), seen)
    assert not got["out"][~seen].any()
    for name, wanted in want.items():
        finite = seen if name == "lse" else ...
        error = np.sqrt(np.mean((got[name][finite] - wanted[finite]) ** 2))
        size = np.sqrt(np.mean(wanted[finite] ** 2))
        assert error < (ratio if name in ("out", "lse") else 2 * ratio) * size, f"{name}: {error / size:.2g}"
    return got


@pytest.mark.parametrize(
    ("sizes", "mask", "cut"),
    [
        ((2, 211, 307, 4, 2, 128, 80), WINDOW, CUT),
        ((1, 211, 307, 2, 1, 80, 128), LATE, TWO_WALKS),
        ((1, 307, 211, 2, 2, 16, 256), WINDOW, CUT),
        ((2, 211, 307, 4, 2, 128, 80), WINDOW, ON_GPU),
        ((1, 211, 307, 2, 1, 80, 128), LATE, ON_GPU),
        ((1, 307, 211, 2, 2, 7, 96), WINDOW, ON_GPU),
    ],
    ids=[
        *("grouped", "two walks, rows that see nothing", "narrow"),
        *("gpu, grouped", "gpu, rows that see nothing", "gpu, narrow"),
    ],
)
def test_values_and_gradients(sizes, mask, cut):
    assert_as_dense(*operands(*sizes), mask, cut=cut)


@pytest.mark.parametrize("cut", [CUT, COLUMNS, dataclasses.replace(TWO_WALKS, split=True), ON_GPU])
def test_bfloat16(cut):
    assert_as_dense(*operands(1, 211, 307, 2, 1, 128, 128, dtype=jnp.bfloat16), LATE, cut=cut, ratio=5e-3)


@pytest.mark.parametrize(
    ("cut", "value_width"),
    [(WIDE_UNITS, 128), (CUT, 125), (CUT, 126), (TWO_WALKS, 253)],
    ids=["a tile of ones", "as few ones as are taken", "one too few", "two walks, ones in the second tile"],
)
def test_gradients_of_weights_that_nearly_cancel(cut, value_width):
    """<do, v> and <do, o> are 19350 and something of size 1, which is lost if either is less exact than a float32."""
    arguments, cotangents = operands(1, 211, 307, 2, 1, 64, value_width, dtype=jnp.bfloat16)
    arguments["value"] = arguments["value"].at[..., 0].set(1 + 2**-7)
    d_out = (cotangents[0] / value_width**0.5).at[..., 0].set(19200)
    assert_as_dense(arguments, (d_out, cotangents[1]), LATE, cut=cut, ratio=5e-3)


@pytest.mark.parametrize("cut", [CUT, ON_GPU], ids=["tpu", "gpu"])
def test_rows_that_see_nothing_whether_listed_or_not(cut):
    """With and without a sink; the second block of queries is not listed, the first one all but empty."""
    listed, mask = np.array([[[[1, 1], [0, 0], [2, 0]]]], np.int32), Causal(offset=-120)
    assert_as_dense(*operands(1, 307, 307, 1, 1, 16, 16), mask, listed, cut=cut)
    arguments, cotangents = operands(1, 307, 307, 2, 1, 16, 16, sinks=(2,))
    got = assert_as_dense(arguments, cotangents, mask, listed, cut=cut)
    np.testing.assert_allclose(got["lse"][0, 128:256], np.broadcast_to(arguments["sinks"], (128, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "cut"),
    [((2, 1), CUT), ((1, 2), CUT), ((2, 4), TWO_WALKS), ((1, 2), ON_GPU), ((2, 4), ON_GPU)],
    ids=["batch", "key heads", "batch and heads, two walks", "gpu, key heads", "gpu, batch and heads"],
)
def test_lists_of_batch_rows_and_heads(shape, cut):
    kinds = np.random.default_rng(0).integers(0, 3, (*shape, 2, 2)).astype(np.int32)
    kinds[0, 0, 1] = 0
    assert_as_dense(*operands(2, 211, 307, 4, 2, 16, 32), Causal(), kinds, cut=cut)


@pytest.mark.parametrize(
    ("of_groups", "cut"),
    [(False, CUT), (True, TWO_WALKS), (False, WIDE_UNITS), (True, ON_GPU)],
    ids=["one list", "lists of groups, two walks", "one list, wide", "lists of groups, gpu"],
)
def test_windows_of_coordinates(of_groups, cut):
    """Two groups of three batch rows each, in turn; some windows are empty, and lists leave blocks out."""
    rng = np.random.default_rng(1)
    low = rng.integers(0, 17, (2, 2, 211))
    windows = Windows(low, low + rng.integers(-2, 17, low.shape), rng.integers(0, 23, (2, 307)))
    kinds = np.asarray([[[[1, 2], [0, 1]]], [[[1, 1], [1, 0]]]][: 1 + of_groups], np.int32)
    dtype, ratio = (jnp.bfloat16, 5e-3) if cut is WIDE_UNITS else (jnp.float32, 1e-5)
    arguments, cotangents = operands(6, 211, 307, 2, 1, 16, 32, dtype=dtype, kv_bias=(6, 1, 307))
    arguments["kv_bias"] = jnp.where(jnp.arange(307) % 5 == 2, -jnp.inf, arguments["kv_bias"])
    assert_as_dense(arguments, cotangents, Causal(offset=150), kinds, windows=windows, cut=cut, ratio=ratio)


@pytest.mark.parametrize(
    ("cut", "width", "options"),
    [
        (CUT, 16, {}),
        (TWO_WALKS, 112, {}),
        (WIDE_UNITS, 64, {}),
        (WIDE_UNITS, 128, {}),
        (CUT, 16, {"soft_cap": 3.0}),
        (ON_GPU, 16, {}),
    ],
    ids=["marks", "no room", "wide", "wide, another tile of lanes", "no marks under a cap", "gpu"],
)
def test_windows_of_a_grid(cut, width, options):
    """Blocks of 8 x 32 keys; of the windows some are empty, some hold keys of a later block or masked keys alone."""
    rng = np.random.default_rng(2)
    first, last = (x.reshape(-1) for x in np.mgrid[:16, :32])
    low = np.stack([rng.integers(0, 16, 211), rng.integers(0, 32, 211)])[None]
    windows = Windows(low, low + rng.integers(0, [[5], [9]], (2, 211)), np.stack([first, last]))
    dtype, ratio = (jnp.bfloat16, 5e-3) if cut is WIDE_UNITS else (jnp.float32, 1e-5)
    arguments, cotangents = operands(2, 211, 512, 2, 1, width, 32, dtype=dtype, kv_bias=(2, 1, 512))
    arguments["kv_bias"] = jnp.where(first % 4 == 3, -jnp.inf, arguments["kv_bias"])
    kinds = np.ones((1, 1, 2, 2), np.int32)
    got = assert_as_dense(arguments, cotangents, Full(), kinds, windows=windows, cut=cut, ratio=ratio, **options)
    assert 20 < np.isneginf(got["lse"][0, :, 0]).sum() < 190


def test_windows_that_do_not_belong():
    low, place = np.zeros((2, 2, 128), np.int32), np.zeros((2, 256), np.int32)
    with pytest.raises(ValueError, match=r"windows: expected low and high \[G, axes, 128\] with G a divisor of 1"):
        small(windows=Windows(low, low, place))()
    with pytest.raises(ValueError, match=r"place \[axes, 256\], got .*\[2, 100\]"):
        small(windows=Windows(low[:1], low[:1], place[:, :100]))()
    with pytest.raises(ValueError, match="windows: expected integers"):
        small(windows=Windows(low[:1] * 0.5, low[:1], place))()


def test_one_compilation_serves_all_traced_lists():
    arguments, _ = operands(1, 256, 512, 1, 1, 16, 16)
    traces = 0

    @jax.jit
    def attend(by_row, by_col, query):
        nonlocal traces
        traces += 1
        out, _ = block_sparse_attention(
            query, arguments["key"], arguments["value"], by_row, by_col, scale=0.2, block_q=128, block_kv=256,
            platform="interpret", cut=CUT,
        )  # fmt: skip
        return jnp.sum(out)

    for listed in ([[2, 0], [0, 2]], [[0, 2], [2, 0]]):
        kinds = np.array([[listed]], np.int32)
        lists = jax.tree.map(jnp.asarray, work_lists(kinds))
        got, gradient = jax.value_and_grad(attend, argnums=2)(*lists, arguments["query"])

        def dense(query, mask):
            out = dot_product_attention(
                query, arguments["key"], arguments["value"], mask=mask, scale=0.2, implementation="reference"
            )
            return jnp.sum(out)

        want, wanted = jax.value_and_grad(dense)(arguments["query"], allowed(kinds, Causal(), None, 1, 256, 512))
        np.testing.assert_allclose(got, want, rtol=1e-4)
        np.testing.assert_allclose(gradient, wanted, atol=1e-5)
    assert traces == 1


@pytest.mark.parametrize(
    ("cut", "value_width"), [(CUT, 32), (TWO_WALKS, 128), (ON_GPU, 32)], ids=["one walk", "two walks", "gpu"]
)
def test_segments_bias_of_keys_cap_and_sinks(cut, value_width):
    segments = (
        jnp.asarray(np.repeat([0, 3, 4], [50, 101, 60])[None]),
        jnp.asarray(np.repeat([0, 3, 5], [80, 131, 96])[None]),
    )
    arguments, cotangents = operands(1, 211, 307, 4, 2, 16, value_width, kv_bias=(1, 2, 307), sinks=(4,))
    assert_as_dense(arguments, cotangents, Causal(offset=60), cut=cut, soft_cap=3.0, segments=segments)


@pytest.mark.parametrize("soft_cap", [60.0, 70.0], ids=["no maximum", "running maximum"])
@pytest.mark.parametrize(("cut", "dtype", "ratio"), [(CUT, jnp.float32, 1e-5), (WIDE_UNITS, jnp.bfloat16, 5e-3)])
def test_rows_at_both_ends_of_a_cap(cut, dtype, ratio, soft_cap):
    """Of some queries all logits are at the lower end, of others at the upper; others see nothing."""
    arguments, cotangents = operands(1, 211, 307, 2, 1, 16, 32, dtype=dtype)
    arguments["key"] = arguments["key"].at[..., 0].set(4)
    for rows, along in ((slice(90, 110), -2000), (slice(120, 140), 2000)):
        arguments["query"] = arguments["query"].at[:, rows].set(0).at[:, rows, :, 0].set(along)
    got = assert_as_dense(arguments, cotangents, Causal(offset=-7), cut=cut, soft_cap=soft_cap, ratio=ratio)
    seen = np.log(np.arange(211) - 6.0, where=np.arange(211) > 6, out=np.zeros(211))[:, None]
    rounding = 1e-5 * soft_cap if dtype == jnp.float32 else 2.0**-8  # weights that are alike are rounded alike
    np.testing.assert_allclose(got["lse"][0, 90:110] - seen[90:110], -soft_cap, atol=rounding)
    np.testing.assert_allclose(got["lse"][0, 120:140] - seen[120:140], soft_cap, atol=rounding)
    assert np.isneginf(got["lse"][0, :7]).all()


@pytest.mark.parametrize("cut", [WIDE_UNITS, TWO_WALKS, ON_GPU], ids=["one walk", "two walks", "gpu"])
def test_score_functions_and_the_gradients_of_what_they_capture(cut):
    def score_mod(score, b, h, q_pos, kv_pos, slopes, temperature, shift):
        return score * temperature[b, h] + slopes[h] * (kv_pos - q_pos) * 0.01 + shift

    def reference(x):
        distance = jnp.arange(307) - jnp.arange(211)[:, None]
        bias = x["slopes"][:, None, None] * distance * 0.01 + x["shift"]
        return x | {"query": x["query"] * x["temperature"][:, None, :, None], "bias": bias[None]}

    arguments, cotangents = operands(2, 211, 307, 4, 2, 16, 32, slopes=(4,), temperature=(2, 4), shift=())
    assert_as_dense(arguments, cotangents, LATE, cut=cut, soft_cap=4.0, score_mod=score_mod, reference=reference)


def small(**options):
    arguments, _ = operands(1, 128, 256, 1, 1, 16, 16)
    by_row, by_col = work_lists(np.full((1, 1, 1, 1), 2, np.int32))
    named = {"by_row": by_row, "by_col": by_col, "scale": 1.0, "block_q": 128, "block_kv": 256} | options
    return functools.partial(block_sparse_attention, **(arguments | {"platform": "interpret"} | named))


def test_the_cut_that_is_chosen():
    got, lse = small(scale=0.2)()
    arguments, _ = operands(1, 128, 256, 1, 1, 16, 16)
    want = dot_product_attention(**arguments, scale=0.2, return_lse=True, implementation="reference")
    np.testing.assert_allclose(got, want[0], atol=1e-5)
    np.testing.assert_allclose(lse, want[1], atol=1e-5)


def test_what_the_kernel_does_not_do():
    table = jnp.zeros(300)
    with pytest.raises(NotImplementedError, match="scalar index per axis"):
        small(score_mod=lambda s, b, h, q, kv, table: s + table[q], captured=[table])()
    with pytest.raises(NotImplementedError, match="scalar index per axis"):
        small(score_mod=lambda s, b, h, q, kv, table: s * table, captured=[table])()
    with pytest.raises(NotImplementedError, match="not float16"):
        small(query=jnp.zeros((1, 128, 1, 16), jnp.float16))()
    with pytest.raises(NotImplementedError, match="up to 256 channels, not 300"):
        small(value=jnp.zeros((1, 256, 1, 300)))()


def test_lists_and_blocks_that_do_not_belong():
    with pytest.raises(ValueError, match="multiples of 128, got 64 and 256"):
        small(block_q=64)()
    with pytest.raises(ValueError, match=r"Bm in \{1\}"):
        small(by_row=WorkList(*np.zeros((3, 2, 1, 4), np.int32)))()
    with pytest.raises(ValueError, match="use larger blocks: block_q=256, block_kv=512"):
        small(by_row=WorkList(*np.zeros((3, 1, 1, 2**18), np.int32)))()
    with pytest.raises(ValueError, match=r"by_col: expected .* as by_row has"):
        small(query=jnp.zeros((1, 128, 2, 16)), by_col=WorkList(*np.zeros((3, 1, 2, 1), np.int32)))()
    with pytest.raises(ValueError, match="expected both or neither"):
        small(q_segment_ids=jnp.zeros((1, 128), jnp.int32))()
    with pytest.raises(ValueError, match="score_mod: expected scores"):
        small(score_mod=lambda s, *_: s[:1])()
    call, (arguments, _) = small(by_col=None, cut=TWO_WALKS), operands(1, 128, 256, 1, 1, 16, 16)
    gradient = jax.grad(lambda query: jnp.sum(call(query=query)[0]))
    with pytest.raises(ValueError, match="by_col: expected a list"):
        gradient(arguments["query"])


def test_the_op_on_the_kernel():
    rng = np.random.default_rng(5)
    query, key, value = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 300, 4, 32), (2, 300, 2, 32), (2, 300, 2, 48))
    )
    slopes = jnp.asarray([0.1, 0.2, 0.3, 0.4])
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, 300))), jnp.int32)
    mask = Causal() & SlidingWindow(150)

    def gradients(implementation):
        def loss(query, key, value, slopes):
            out, lse = jattn.block_sparse_attention(
                query, key, value, mask, score_mod=lambda score, b, h, i, j, slopes: score - slopes[h] * (i - j),
                captured=(slopes,), segment_ids=ids, return_lse=True, implementation=implementation,
            )  # fmt: skip
            return jnp.sum(jnp.sin(out)) + jnp.sum(lse), (out, lse)

        return jax.jit(jax.value_and_grad(loss, argnums=range(4), has_aux=True))(query, key, value, slopes)

    for found, wanted in zip(*(jax.tree.leaves(gradients(name)) for name in ("interpret", "reference")), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    (decision,) = jattn.explain(jattn.block_sparse_attention, query, key, value, mask)
    assert decision.chosen["tpu"] == "pallas_tpu"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_mask": jattn.BlockMask.from_dense(np.tri(60, dtype=bool), 128, 128)}, "have a bank"),
        ({"block_mask": jattn.BlockMask.from_expr(Causal(), 60, 60, 32, 32)}, "a multiple of 128"),
        ({"block_mask": Fn(lambda i, j, h: i >= TABLE[j % 2], key="table")}, "element: .* reads some"),
        ({"score_mod": lambda x, b, h, i, j: x * TABLE[h]}, "score_mod: .* pass them in captured"),
        ({"score_mod": lambda x, b, h, i, j, t: x + t[i], "captured": (TABLE,)}, "by one scalar index per axis"),
    ],
)
def test_what_the_op_leaves_to_xla(options, reason):
    query = jnp.ones((1, 60, 2, 16))
    given = {"block_mask": Causal(), **options}
    (decision,) = jattn.explain(jattn.block_sparse_attention, query, query, query, **given)
    assert decision.chosen["tpu"] == "xla"
    assert re.search(reason, decision.refused["pallas_tpu"])
