"""Attention over listed blocks against its definition, in float64 with every gradient, and what it costs."""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn.dot_product import dot_product_attention, merge_attentions
from jattn.masks import Causal, Fn, SlidingWindow
from jattn.sparse.block_mask import BlockMask
from jattn.sparse.block_sparse import block_sparse_attention
from pallas_kernels.block_sparse.dropout import factors as dropout_factors

B, T, S, N, K, H, V = 2, 29, 37, 6, 3, 5, 7
IMPLEMENTATIONS = ("reference", "xla")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Inputs(NamedTuple):
    query: Any
    key: Any
    value: Any
    kv_bias: Any = None
    sinks: Any = None
    captured: Any = ()


def inputs(q_len: int = T, kv_len: int = S, dtype: Any = np.float64, *, extras: bool = False) -> Inputs:
    rng = np.random.default_rng(q_len)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    x = Inputs(normal(B, q_len, N, H), normal(B, kv_len, K, H), normal(B, kv_len, K, V))
    if not extras:
        return x
    table = {"slopes": normal(N), "relative": normal(B, q_len + kv_len), "shift": np.array([kv_len])}
    return x._replace(kv_bias=normal(B, K, kv_len), sinks=normal(N), captured=(normal(N), table))


def score_mod(score: Any, b: Any, h: Any, q_pos: Any, kv_pos: Any, temperature: Any, table: Any) -> Any:
    """ALiBi's slopes, a table of relative positions, a temperature of each head and an integer that has no gradient."""
    relative = table["relative"][b, q_pos - kv_pos + table["shift"][0]]
    return score * temperature[h] + table["slopes"][h] * (q_pos - kv_pos) / 10 + relative


def random_mask(*lists: int, q_len: int = T, kv_len: int = S) -> np.ndarray:
    """Empty, partial and full blocks; queries 16 .. 23 see nothing, nor does query 3 of a block that is listed."""
    mask = np.random.default_rng(1).random((*lists, q_len, kv_len)) < 0.4
    mask[..., 8:16, 5:20] = True
    mask[..., 16:24, :] = False
    mask[..., 3:4, :] = False
    return mask


def definition(x: Inputs, mask: Any, keep: Any, *, cap: float | None) -> tuple[Any, Any]:
    """The formulas, with all pairs at once; mask `[B, N, T, S]`."""
    query, key, value = (jnp.moveaxis(a, 2, 1) for a in x[:3])
    key, value = (jnp.repeat(a, N // K, axis=1) for a in (key, value))
    z = jnp.einsum("bnth,bnsh->bnts", query, key) * H**-0.5
    if x.kv_bias is not None:
        z = z + jnp.repeat(x.kv_bias, N // K, axis=1)[:, :, None]
    if x.captured:
        temperature, table = x.captured
        distance = np.arange(z.shape[2])[:, None] - np.arange(z.shape[3])
        z = z * temperature[:, None, None] + table["slopes"][:, None, None] * distance / 10
        z = z + table["relative"][:, None][:, :, distance + z.shape[3]]
    if cap is not None:
        z = cap * jnp.tanh(z / cap)
    weights = jnp.where(mask, jnp.exp(z), 0)
    total = weights.sum(axis=-1)
    if x.sinks is not None:
        total = total + jnp.exp(x.sinks)[:, None]
    seen = total > 0
    total = jnp.where(seen, total, 1)
    out = (weights * keep / total[..., None]) @ value
    return jnp.moveaxis(out, 1, 2), jnp.moveaxis(jnp.where(seen, jnp.log(total), -jnp.inf), 1, 2)


def derivatives(attend: Any) -> Any:
    """A compiled function of inputs: gradients of a loss that reads outputs and log-sum-exps, and both of these.

    What else `attend` takes has no gradients.
    """

    def loss(x: Inputs, *given: Any) -> Any:
        out, lse = attend(x, *given)
        weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        some = jnp.isfinite(lse)
        return jnp.sum(out * weights) + jnp.sum(jnp.where(some, jnp.sin(jnp.where(some, lse, 0)), 0)), (out, lse)

    return quick_jit(jax.grad(loss, has_aux=True, allow_int=True))


@functools.cache
def defined(cap: float | None) -> Any:
    return derivatives(functools.partial(definition, cap=cap))


def expected(x: Inputs, mask: Any, *, cap: float | None = None, keep: Any = 1.0) -> Any:
    """The definition's results with derivatives; all masks share a program."""
    return defined(cap)(x, np.broadcast_to(mask, (B, N, *mask.shape[2:])), keep)


def call(x: Inputs, block_mask: Any, **options: Any) -> Any:
    mod = {"score_mod": score_mod, "captured": x.captured} if x.captured else {}
    return block_sparse_attention(
        *x[:3], block_mask, kv_bias=x.kv_bias, sinks=x.sinks, return_lse=True, **mod, **options
    )  # fmt: skip


def assert_close(got: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(got), strict=True):
        if np.asarray(b).dtype != jax.dtypes.float0:
            np.testing.assert_allclose(b, a, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


# (lists, block_q, block_kv, static, with segments, with everything else)
CASES = {
    "one list, traced": ((1, 1), 8, 5, False, False, False),
    "batch rows": ((2, 1), 4, 16, True, False, False),
    "batch rows and key heads": ((2, 3), 8, 5, True, False, True),
    "query heads, traced": ((1, 6), 16, 8, False, False, True),
    "segments": ((1, 1), 8, 5, True, True, True),
    "segments and query heads, traced": ((2, 6), 7, 6, False, True, True),
    "a block of the whole": ((1, 1), 128, 128, True, False, True),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_definition_with_every_gradient(name: str):
    lists, block_q, block_kv, static, with_segments, extras = CASES[name]
    mask = random_mask(*lists)
    rng = np.random.default_rng(2)
    options: dict[str, Any] = {"logits_soft_cap": 2.0} if extras else {}
    seen = mask.repeat(N // lists[1], 1) if lists[1] == K else mask
    with jax.enable_x64(True):
        x = inputs(extras=extras)
        keep: Any = 1.0
        if with_segments:
            ids = np.sort(rng.integers(0, 4, (B, T))), np.sort(rng.integers(0, 3, (B, S)))
            options["segment_ids"] = ids
            seen = seen & (ids[0][:, :, None] == ids[1][:, None, :])[:, None]
        if extras:
            options |= {"dropout_rate": 0.3, "dropout_seed": 5}
            where = np.ix_(*map(np.arange, (B, N, T, S)))
            keep = dropout_factors(jnp.uint32(5), *where, 0.3, np.float64)
        wanted = expected(x, seen, cap=2.0 if extras else None, keep=keep)
        listed = BlockMask.from_dense if static else quick_jit(BlockMask.from_dense, static_argnums=(1, 2))
        block_mask = listed(mask, block_q, block_kv)
        for implementation in IMPLEMENTATIONS:
            got = derivatives(functools.partial(call, block_mask=block_mask, implementation=implementation, **options))(
                x
            )
            assert_close(got, wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_narrow_dtypes(dtype: str, tolerance: float):
    mask = random_mask(1, 6)
    block_mask = BlockMask.from_dense(mask, 8, 5)
    x = jax.tree.map(lambda a: jnp.asarray(a, dtype), inputs())
    wide = jax.tree.map(lambda a: a.astype(np.float32), x)
    wanted = expected(wide, mask)
    got = derivatives(functools.partial(call, block_mask=block_mask))(x)
    assert got[0].query.dtype == got[1][0].dtype == dtype
    assert got[1][1].dtype == np.float32
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(
            b.astype(np.float32), a, rtol=0, atol=tolerance * float(np.max(np.abs(np.where(np.isinf(a), 0, a))))
        )


@pytest.mark.parametrize("mask", [Causal(4), Causal() & SlidingWindow(5) | ~Causal(20), SlidingWindow(3, 30)], ids=str)
def test_a_symbolic_mask_is_its_blocks_and_that_of_dot_product_attention(mask: Any):
    x = inputs(dtype=np.float32)
    wanted = quick_jit(lambda x: dot_product_attention(*x[:3], mask=mask, return_lse=True))(x)
    for block_mask, implementation in itertools.product(
        (mask, BlockMask.from_expr(mask, T, S, 8, 16)), IMPLEMENTATIONS
    ):
        run = quick_jit(functools.partial(call, block_mask=block_mask, implementation=implementation))
        assert_close(run(x), wanted, 2e-6)


def test_a_mask_that_reads_its_head():
    mask = Fn(lambda q, k, h: (k <= q) & (q - k < 3 * (h + 1)), "staircase")
    with jax.enable_x64(True):
        x = inputs(T, T)
        distance = np.arange(T)[:, None] - np.arange(T)
        seen = (distance >= 0) & (distance < 3 * (np.arange(N)[:, None, None] + 1))
        wanted = expected(x, seen[None])
        kind = np.tile(np.tri(4, dtype=np.int8), (1, N, 1, 1))
        lists = BlockMask.from_map(kind, T, T, 8, 8, mask=mask)
        for implementation, block_mask in itertools.product(IMPLEMENTATIONS, (mask, lists)):
            got = derivatives(functools.partial(call, block_mask=block_mask, implementation=implementation))(x)
            assert_close(got, wanted)


# Queries that see nothing


@pytest.mark.parametrize(
    ("implementation", "with_sinks", "cap"),
    [("reference", True, None), ("reference", False, 2.0), ("xla", True, 2.0), ("xla", False, None)],
)
def test_queries_that_see_nothing(implementation: str, with_sinks: bool, cap: float | None):
    """Query 3 is masked in blocks that are listed, 16 .. 23 in a row that lists none."""
    mask = random_mask()
    dead = ~mask.any(axis=1)
    assert set(np.flatnonzero(dead)) == {3, *range(16, 24)}
    x = jax.tree.map(np.float32, inputs(extras=with_sinks)._replace(captured=(), kv_bias=None))
    block_mask = BlockMask.from_dense(mask, 8, 8)
    assert block_mask.n_total[0, 0].tolist()[2] == 0
    run = functools.partial(call, block_mask=block_mask, implementation=implementation, logits_soft_cap=cap)

    @quick_jit
    def pulled_back(x: Inputs, cotangents: Any) -> Any:
        results, pull_back = jax.vjp(run, x)
        return results, pull_back(cotangents)[0]

    weights = np.cos(np.arange(B * T * N * V, dtype=np.float32)).reshape(B, T, N, V)
    seen = ~dead[:, None]
    of_lse = np.broadcast_to(np.float32(with_sinks | seen), (B, T, N))
    (out, lse), gradient = pulled_back(x, (weights, of_lse))
    assert not any(np.isnan(a).any() for a in jax.tree.leaves((gradient, out, lse)))
    assert (out[:, dead] == 0).all()
    wanted = x.sinks if with_sinks else np.float32(-np.inf)
    np.testing.assert_array_equal(lse[:, dead], np.broadcast_to(wanted, lse[:, dead].shape))
    assert (gradient.query[:, dead] == 0).all()
    assert np.abs(gradient.query[:, ~dead]).min(axis=(0, 2, 3)).max() > 0
    _, of_dead_rows = pulled_back(x, (np.where(seen[..., None], 0, weights), np.zeros_like(of_lse)))
    assert not any(np.any(a) for a in jax.tree.leaves(of_dead_rows))


@every_implementation
@pytest.mark.parametrize("traced", [False, True])
def test_no_block_at_all(implementation: str, traced: bool):
    kind = np.zeros((2, 1, 4, 5), np.int8)
    block_mask = BlockMask.from_map(jnp.asarray(kind) if traced else kind, T, S, 8, 8)
    gradient, (out, lse) = derivatives(functools.partial(call, block_mask=block_mask, implementation=implementation))(
        inputs(dtype=np.float32)
    )
    assert not np.any(out)
    assert (lse == -np.inf).all()
    assert not any(np.any(a) for a in jax.tree.leaves(gradient))


# What lists may say


@every_implementation
def test_a_full_block_listed_as_partial_changes_nothing(implementation: str):
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, (1, K, 4, 5)).astype(np.int8)
    x = inputs(dtype=np.float32)
    full, partial = (
        derivatives(functools.partial(
            call, block_mask=BlockMask.from_map(each, T, S, 8, 8), implementation=implementation
        ))(x)
        for each in (kind, np.minimum(kind, 1))
    )  # fmt: skip
    if implementation == "reference":
        jax.tree.map(np.testing.assert_array_equal, full, partial)
    assert_close(full, partial, 5e-6)


def test_one_compilation_serves_every_selection():
    traces = []

    def attend(x: Inputs, idx: Any, num: Any) -> Any:
        traces.append(idx)
        return call(x, BlockMask.from_indices(idx, T, S, 8, 8, num=num, mask=Causal(8)))

    run = derivatives(attend)
    rng = np.random.default_rng(0)
    x = inputs(dtype=np.float32)
    for _ in range(3):
        idx = np.argsort(rng.random((B, K, 4, 5)), axis=-1)[..., :2]
        num = rng.integers(0, 3, (B, K, 4))
        static = BlockMask.from_indices(idx, T, S, 8, 8, num=num, mask=Causal(8))
        assert_close(run(x, idx, num), expected(x, static.to_dense(N)), 5e-6)
    assert len(traces) == 1


def test_disjoint_masks_merge_into_their_union():
    mask = random_mask(1, 6)
    first = mask & (np.random.default_rng(4).random(mask.shape) < 0.5)
    parts = [BlockMask.from_dense(part, 8, 5) for part in (first, mask & ~first)]
    with jax.enable_x64(True):
        x = inputs()
        wanted = derivatives(functools.partial(call, block_mask=BlockMask.from_dense(mask, 8, 5)))(x)
        got = derivatives(lambda x: merge_attentions(*zip(*(call(x, part) for part in parts), strict=True)))(x)
        assert_close(got, wanted)


@every_implementation
def test_documents_are_separate_runs(implementation: str):
    x = inputs(T, T, np.float32)
    ids = np.repeat([[4, 1, 9]], [11, 3, 15], axis=1).repeat(B, axis=0)
    block_mask = BlockMask.from_expr(Causal(), T, T, 4, 8)

    def run(x: Inputs, ids: Any) -> Any:
        return call(x, block_mask, segment_ids=ids, implementation=implementation)

    run = quick_jit(run)
    out, lse = run(x, (ids, ids))
    for start, stop in ((0, 11), (11, 14), (14, 29)):
        piece = Inputs(*(a[:, start:stop] for a in x[:3]))
        alone = quick_jit(lambda x: call(x, Causal(), implementation=implementation))(piece)
        assert_close((out[:, start:stop], lse[:, start:stop]), alone, 2e-6)
    jax.tree.map(np.testing.assert_array_equal, run(x, (ids + 100, ids + 100)), (out, lse))
    # A padding token whose id is not on the other side sees nothing and is not seen.
    q_ids, kv_ids = ids.copy(), ids.copy()
    q_ids[:, 20:], kv_ids[:, 20:] = -1, -2
    padded = run(x, (q_ids, kv_ids))
    assert (padded[0][:, 20:] == 0).all()
    assert_close(padded[0][:, :20], out[:, :20], 2e-6)


@every_implementation
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 40), (3, 300), (40, 2)])
def test_short_lengths(implementation: str, q_len: int, kv_len: int):
    with jax.enable_x64(True):
        x = inputs(q_len, kv_len)
        mask = random_mask(2, 1, q_len=q_len, kv_len=kv_len)
        wanted = expected(x, mask)
        block_mask = BlockMask.from_dense(mask, 128, 128)
        assert_close(
            derivatives(functools.partial(call, block_mask=block_mask, implementation=implementation))(x), wanted
        )


# Dropout


def test_dropout_is_a_function_of_the_pair_alone():
    x = inputs(T, T, np.float32)
    heads = BlockMask.from_map(np.tile(np.tri(4, dtype=np.int8), (B, N, 1, 1)), T, T, 8, 8, mask=Causal())
    attended = [
        (Causal(), "reference"),
        (Causal(), "xla"),
        (BlockMask.from_expr(Causal(), T, T, 4, 16), "xla"),
        (BlockMask.from_expr(Causal(), T, T, 32, 8), "reference"),
        (heads, "xla"),
    ]
    outs = [
        quick_jit(lambda x, m=m, i=i: call(x, m, dropout_rate=0.25, dropout_seed=9, implementation=i)[0])(x)
        for m, i in attended
    ]
    for out in outs[1:]:
        assert_close(out, outs[0], 2e-6)
    run = quick_jit(lambda x, seed: call(x, Causal(), dropout_rate=0.25, dropout_seed=seed))
    assert_close(run(x, 9)[0], outs[0], 2e-6)  # traced or not
    other = run(x, 10)
    assert not np.allclose(other[0], outs[0], atol=0.1)
    plain = quick_jit(lambda x: call(x, Causal()))(x)
    assert_close(other[1], plain[1], 2e-6)  # the log-sum-exp is of all keys
    assert_close(quick_jit(lambda x: call(x, Causal(), dropout_seed=9))(x)[0], plain[0], 1e-6)


def test_dropout_bits_are_fair_and_independent():
    where = np.ix_(*map(np.arange, (4, 8, 64, 64)))
    kept = np.stack([np.asarray(dropout_factors(jnp.uint32(s), *where, 0.25, np.float32)) > 0 for s in range(4)])
    assert set(np.unique(np.asarray(dropout_factors(jnp.uint32(0), *where, 0.25, np.float32)))) == {
        0,
        np.float32(4 / 3),
    }
    error = math.sqrt(0.25 * 0.75 / kept.size)
    assert abs(kept.mean() - 0.75) < 4 * error
    for axis in range(kept.ndim):  # neither do neighbours know of each other, nor rows, heads or seeds
        a, b = (np.take(kept, np.arange(kept.shape[axis] - 1) + i, axis=axis) - 0.75 for i in (0, 1))
        assert abs((a * b).mean()) < 4 * 0.25 * 0.75 / math.sqrt(a.size)
        rest = tuple(other for other in range(kept.ndim) if other != axis)
        assert np.abs(kept.mean(axis=rest) - 0.75).max() < 5 * error * math.sqrt(kept.shape[axis])


# Cost


def test_steps_are_the_listed_pairs():
    x = inputs(T, T, np.float32)
    block_mask = BlockMask.from_expr(Causal() & SlidingWindow(7), T, T, 4, 4)
    jaxpr = str(jax.make_jaxpr(lambda x: call(x, block_mask, implementation="xla"))(x))
    kinds = block_mask.to_map()
    lengths = [int(n) for n in re.findall(r"length=(\d+)", jaxpr)]
    assert sorted(lengths) == sorted([(kinds == 1).sum(), (kinds == 2).sum()])


@pytest.mark.parametrize("kind", ["static", "traced", "segments and heads"])
def test_memory_is_linear_in_the_length(kind: str):
    temp = {}
    for length in (2048, 8192):
        mask = Causal() & SlidingWindow(255)
        block_mask: Any = BlockMask.from_expr(mask, length, length, 128, 128)
        options = {}
        if kind == "segments and heads":
            options["segment_ids"] = np.arange(length)[None] // 300
            block_mask = BlockMask.from_map(block_mask.to_map().repeat(4, 1), length, length, 128, 128, mask=mask)
        x = [jax.ShapeDtypeStruct((1, length, heads, 16), np.float32) for heads in (4, 2, 2)]

        def loss(x: Any, block_mask: Any, options: Any = options) -> Any:
            return jnp.sum(jnp.sin(block_sparse_attention(*x, block_mask, implementation="xla", **options)))

        if kind == "traced":
            compiled = quick_jit(jax.grad(loss)).lower(x, block_mask).compile()
        else:
            compiled = quick_jit(jax.grad(functools.partial(loss, block_mask=block_mask))).lower(x).compile()
        temp[length] = compiled.memory_analysis().temp_size_in_bytes
        sizes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
        assert max(math.prod(map(int, size.split(","))) for size in sizes) < length**2
    assert temp[8192] <= 4.5 * temp[2048]


# Transformations


@pytest.mark.parametrize("kind", ["segments", "lists"])
def test_on_a_mesh(kind: str):
    x = inputs(T, T, np.float32)
    ids = np.repeat([[0, 1, 2], [3, 4, 5]], [11, 3, 15], axis=1)
    lists = BlockMask.from_dense(random_mask(B, 1, q_len=T, kv_len=T), 8, 8)

    def loss(x: Inputs, ids: Any, lists: Any) -> Any:
        given = (Causal(), ids) if kind == "segments" else (lists, None)
        out = call(x, given[0], segment_ids=given[1], implementation="xla")[0]
        return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(N * V).reshape(N, V)))

    # Static lists are constants of the program, which no one places.
    gradient = jax.grad(functools.partial(loss, lists=lists))
    wanted = quick_jit(gradient)(x, ids)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:2])
        with jax.set_mesh(mesh):
            placed = jax.device_put((x, ids), NamedSharding(mesh, P("data")))
            got = quick_jit(gradient)(*placed)
        assert_close(jax.device_get(got), wanted, 1e-5)


@every_implementation
def test_heads_on_a_mesh_of_explicit_axes(implementation: str):
    x = jax.tree.map(np.float32, inputs(13, 13, extras=True)[:4])

    def loss(*x: Any) -> Any:
        return jnp.sum(jnp.sin(block_sparse_attention(*x[:3], Causal(), kv_bias=x[3], implementation=implementation)))

    gradient = quick_jit(jax.grad(loss, (0, 1, 2, 3)))
    mesh = jax.make_mesh((3,), ("tensor",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:3])
    places = (*[P(None, None, "tensor")] * 3, P(None, "tensor"))
    with jax.set_mesh(mesh):
        got = gradient(*jax.device_put(x, tuple(NamedSharding(mesh, place) for place in places)))
    assert_close(jax.device_get(got), jax.device_get(gradient(*x)), 1e-5)


def test_inside_shard_map_with_segments_and_captured_arrays():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = jax.tree.map(np.float32, inputs(T, T, extras=True))
    slopes = (x.captured[1]["slopes"],)
    ids = np.repeat([[0, 1, 2], [3, 4, 5]], [11, 3, 15], axis=1)

    def attend(x: Inputs, slopes: Any, ids: Any) -> Any:
        return block_sparse_attention(
            *x[:3], Causal(), segment_ids=ids, sinks=x.sinks, kv_bias=x.kv_bias, implementation="xla",
            score_mod=lambda score, b, h, q, k, slopes: score + slopes[h] * (q - k), captured=slopes,
        )  # fmt: skip

    x = x._replace(captured=None)
    rows, whole = P("data"), P()
    specs = (Inputs(rows, rows, rows, rows, whole, None), (whole,), rows)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=rows)
    got, wanted = (
        quick_jit(jax.grad(lambda x, s, f=f: jnp.sum(jnp.sin(f(x, s, ids))), argnums=(0, 1)))(x, slopes)
        for f in (sharded, attend)
    )
    assert_close(got, wanted, 1e-5)


def test_vmap_over_lists():
    x = inputs(dtype=np.float32)
    rng = np.random.default_rng(0)
    idx = jnp.asarray(np.argsort(rng.random((3, 4, 5)), axis=-1)[..., :2])

    def run(idx: Any) -> Any:
        return call(x, BlockMask.from_indices(idx, T, S, 8, 8), implementation="xla")

    wanted = [quick_jit(run)(each) for each in idx]
    assert_close(quick_jit(jax.vmap(run))(idx), jax.tree.map(lambda *a: jnp.stack(a), *wanted), 2e-6)


# Bad input

X = inputs(dtype=np.float32)
BAD = {
    "another length": (
        {"block_mask": BlockMask.from_expr(Causal(), T, T)},
        ValueError,
        "block_mask: made for 29 queries and 29 keys, got 29 and 37; build it for these, or pass a symbolic mask",
    ),
    "other batch rows": (
        {"block_mask": BlockMask.from_dense(random_mask(3, 1))}, ValueError, "block_mask: .* 1 or B = 2 .* got 3",
    ),
    "other heads": (
        {"block_mask": BlockMask.from_dense(random_mask(1, 2))}, ValueError, "block_mask: .* K = 3 or N = 6 .* got 2",
    ),
    "an array for a mask": ({"block_mask": random_mask()}, TypeError, r"block_mask: .*BlockMask\.from_dense"),
    "no mask": ({"block_mask": None}, TypeError, r"block_mask: .* got NoneType; .* Full\(\) lets all see all"),
    "a bias of query heads": ({"kv_bias": np.ones((B, N, S), np.float32)}, ValueError, "kv_bias: .* K = 3"),
    "nobody reads what is captured": ({"captured": (np.ones(3),)}, ValueError, "captured: there is no score_mod"),
    "captured alone": (
        {"score_mod": lambda s, *_: s, "captured": np.ones(3)}, TypeError, r"captured: .* write \(array,\)",
    ),
    "captured numbers": ({"score_mod": lambda s, *_: s, "captured": (1.0,)}, TypeError, r"captured\[0\]: expected an"),
    "a score of other shape": ({"score_mod": lambda s, b, h, q, k: q - k}, ValueError, "score_mod: expected the new"),
    "a score that is none": ({"score_mod": lambda *_: None}, ValueError, "score_mod: expected .* got NoneType"),
    "a function of too little": ({"score_mod": lambda s: s}, TypeError, r"score_mod: .* 0 captured .* got .*\(s\)"),
    "a function of too much": (
        {"score_mod": lambda s, b, h, q, k, slopes: s}, TypeError, r"score_mod: is called as f\(score, b, h, q_pos"
    ),
    "no function": ({"score_mod": "alibi"}, TypeError, "score_mod: expected a callable"),
    "no seed": ({"dropout_rate": 0.5}, ValueError, "dropout_seed: dropout_rate = 0.5 needs one"),
    "all dropped": ({"dropout_rate": 1.0, "dropout_seed": 0}, ValueError, "dropout_rate: .* less than 1, got 1"),
    "a key for a seed": (
        {"dropout_rate": 0.5, "dropout_seed": jax.random.key(0)}, TypeError, "dropout_seed: .*",
    ),
    "a long seed": ({"dropout_rate": 0.5, "dropout_seed": 2**32}, ValueError, "dropout_seed: .* 32 bits"),
    "another machine": ({"implementation": "pallas_gpu"}, NotImplementedError, "runs on cuda, and this is cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    given, error, message = BAD[name]
    with pytest.raises(error, match=message):
        block_sparse_attention(*X[:3], **{"block_mask": Causal(), **given})


def test_no_keys():
    with pytest.raises(ValueError, match="dimension S is 0"):
        block_sparse_attention(X.query, X.key[:, :0], X.value[:, :0], Causal())


@pytest.mark.parametrize("transform", [jax.jit, jax.grad], ids=["jit", "grad"])
def test_traced_arrays_in_functions_are_refused(transform: Any):
    def in_score(slopes: Any) -> Any:
        return block_sparse_attention(*X[:3], Causal(), score_mod=lambda s, b, h, q, k: s + slopes[h]).sum()

    def in_mask(last: Any) -> Any:
        return block_sparse_attention(*X[:3], Fn(lambda q, k, h: k < last[q], "last")).sum()

    with pytest.raises(TypeError, match=r"score_mod: it reads a traced array.*captured=\(array,\)"):
        transform(in_score)(np.ones(N, np.float32))
    with pytest.raises(TypeError, match=r"block_mask: it reads a traced array.*segment_ids="):
        transform(in_mask)(np.ones(T, np.float32))


def test_what_goes_wrong_in_a_score_function_is_said_to_be_there():
    with pytest.raises(ValueError, match="truth value") as found:
        block_sparse_attention(*X[:3], Causal(), score_mod=lambda s, b, h, q, k: s if q > k else 2 * s)
    assert any("In score_mod" in note and "jax.numpy.where" in note for note in found.value.__notes__)
