"""The op on the block-sparse kernels for GPU, interpreted, against dense attention in float64: lists, blocks, choices.

Masks, biases, caps and score functions are in `test_block_sparse`, for the kernels of both machines.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import fused, split_keys
from jattn.blockwise import Operands
from jattn.dispatch import Implementation
from jattn.masks import Causal, Fn, Full, SlidingWindow
from jattn.sparse import block_sparse
from jattn.sparse.block_mask import BlockMask
from pallas_kernels.block_sparse import BlockLists, block_sparse_attention, choose_blocks

B, N, K = 2, 4, 2
DOCUMENTS = np.repeat([[0, 1, 2, 3], [5, 5, 2, 9]], [40, 3, 60, 48], axis=1)


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    """`implementation="interpret"` is that of the kernels for GPU."""
    run, check = (functools.partial(f, "interpret_gpu") for f in (fused.fused_attention, fused.check_fused))
    interpret = Implementation("interpret", run, check)
    others = [each for each in block_sparse._IMPLEMENTATIONS if each.name != "interpret"]
    monkeypatch.setattr(block_sparse, "_IMPLEMENTATIONS", (*others, interpret))


def arrays(q_len, kv_len, width, value_width, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (B, q_len, N, width), (B, kv_len, K, width), (B, kv_len, K, value_width), (N,)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def results(implementation, block_mask, arguments, **options):
    """Outputs, log-sum-exps where they are finite, and the gradients of a function of both."""

    def run(query, key, value, slopes):
        if "score_mod" in options:
            options["captured"] = (slopes, jnp.arange(N)[::-1])
        out, lse = jattn.block_sparse_attention(
            query, key, value, block_mask, return_lse=True, implementation=implementation, **options
        )
        seen = jnp.isfinite(lse)
        loss = jnp.sum(jnp.sin(3 * out.astype(lse.dtype))) + jnp.sum(jnp.cos(jnp.where(seen, lse, 0)))
        return loss, (out, jnp.where(seen, lse, 0), seen)

    (_, aux), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2, 3), has_aux=True))(*arguments)
    return *aux, *gradients


def assert_as_dense(block_mask, arguments, *, ratio=1e-5, **options):
    got = results("interpret", block_mask, arguments, **options)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), np.float64) for x in arguments]
        want = results("reference", block_mask, wide, **options)
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.sqrt(np.mean((a - b) ** 2)) <= ratio * np.sqrt(np.mean(b**2))


@pytest.mark.parametrize(
    ("mask", "lengths", "options"),
    [
        (Causal(), (151, 151), {}),
        (Causal() & SlidingWindow(50), (151, 151), {"segment_ids": DOCUMENTS}),
        (Full(), (151, 151), {"segment_ids": DOCUMENTS}),
        (Full(), (37, 149), {}),
        (Fn(lambda q, k, h: k <= q - 5 * h, "later for later heads"), (67, 67), {}),
    ],
    ids=["causal", "window in documents", "documents", "all", "a rule of heads, rows that see nothing"],
)
def test_symbolic_masks(mask, lengths, options):
    assert_as_dense(mask, arrays(*lengths, 24, 16), **options)


@pytest.mark.parametrize(
    ("mask", "q_len"), [(Full(), 5), (Causal(offset=3000) & SlidingWindow(1500), 1), (Causal(-7), 5)], ids=repr
)
def test_a_few_queries_read_parts_of_many_keys(mask, q_len):
    """With a score function that knows rows, heads and positions, sinks and biases of keys."""
    arguments = arrays(q_len, 4096, 24, 16)
    x = Operands(*arguments[:3])
    assert split_keys.parts_of(x, mask, None, 0.0) == 8
    assert split_keys.parts_of(x, mask, 5.0, 0.0) == split_keys.parts_of(x, mask, None, 0.1) == 1
    assert split_keys.parts_of(x._replace(key=x.key[:, :4000]), mask, None, 0.0) == 1

    def score_mod(score, b, h, q_pos, kv_pos, slopes, order):
        return score - 0.001 * slopes[order[h]] * (kv_pos - q_pos) * (b + 1)

    ids = np.repeat([[0, 1], [1, 1]], [1000, 3096], axis=1)
    more = {"kv_bias": jnp.cos(jnp.arange(B * K * 4096.0)).reshape(B, K, 4096), "sinks": jnp.linspace(-1, 1, N)}
    assert_as_dense(mask, arguments, score_mod=score_mod, segment_ids=(np.ones((B, q_len), int), ids), **more)


def test_dropout():
    assert_as_dense(Causal() & SlidingWindow(90), arrays(151, 151, 24, 16), dropout_rate=0.3, dropout_seed=2**32 - 5)


@pytest.mark.parametrize("widths", [(16, 32), (136, 200)])
def test_bfloat16(widths):
    """The loss too reads rounded outputs."""
    assert_as_dense(Causal(), arrays(151, 151, *widths, jnp.bfloat16), ratio=1e-2)


@pytest.mark.parametrize(
    ("lengths", "blocks"), [((67, 53), (16, 48)), ((263, 601), (256, 512))], ids=["small", "tile by tile"]
)
def test_blocks_of_any_size(lengths, blocks):
    mask = BlockMask.from_expr(Causal(offset=9) & SlidingWindow(300), *lengths, *blocks)
    assert_as_dense(mask, arrays(*lengths, 16, 16))


def test_traced_lists_of_heads_serve_every_selection():
    arguments, traces = arrays(67, 101, 16, 16), 0
    kinds = np.random.default_rng(3).integers(0, 3, (2, B, N, 3, 4)).astype(np.int8)
    kinds[0, 0, 1] = 0  # a head that sees nothing
    kinds[1, :, :, 2] = 0

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, kinds, *arguments):
        nonlocal traces
        traces += 1
        block_mask = BlockMask.from_map(kinds, 67, 101, 32, 32, mask=Causal(offset=30))
        return results(implementation, block_mask, arguments)

    for each in kinds:
        got, want = (run(name, jnp.asarray(each), *arguments) for name in ("interpret", "reference"))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5)
    assert traces == 2


def test_alibi_through_a_table_of_heads_under_a_cap():
    def score_mod(score, b, h, q_pos, kv_pos, slopes, order):
        return score - 0.05 * slopes[order[h]] ** 2 * jnp.abs(q_pos - kv_pos)

    assert_as_dense(Causal(), arrays(83, 83, 16, 16), score_mod=score_mod, logits_soft_cap=3.0)


def test_batches_of_calls():
    query, key, value, _ = arrays(37, 37, 16, 16)
    run = functools.partial(jattn.block_sparse_attention, block_mask=Causal(), implementation="interpret")

    @jax.jit
    def gradient(query, key, value):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(run(*x))), (0, 1, 2))(query, key, value)

    several = [jnp.stack([x, x[::-1], -x]) for x in (query, key, value)]
    got = jax.vmap(gradient)(*several)
    want = [jnp.stack(x) for x in zip(*(gradient(*(x[i] for x in several)) for i in range(3)), strict=True)]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_what_a_gpu_runs():
    query, key, value, _ = arrays(60, 60, 16, 16)

    def decided(block_mask, *arguments):
        (decision,) = jattn.explain(jattn.block_sparse_attention, *(arguments or (query, key, value)), block_mask)
        return decision

    assert decided(Causal()).chosen["cuda"] == "pallas_gpu"
    assert decided(BlockMask.from_expr(Causal(), 60, 60, 16, 48)).chosen["cuda"] == "pallas_gpu"
    odd = decided(BlockMask.from_expr(Causal(), 60, 60, 24, 16))
    assert odd.chosen["cuda"] == "xla"
    assert "blocks of a multiple of 16" in odd.refused["pallas_gpu"]
    wide = decided(Causal(), *(jnp.zeros((1, 60, 1, 160)) for _ in range(3)))
    assert "up to 128 channels, not 160, in float32" in wide.refused["pallas_gpu"]
    halves = decided(Causal(), *(x.astype(jnp.float16) for x in (query, key, value)))
    assert "bfloat16 or float32 alone" in halves.refused["pallas_gpu"]


@pytest.mark.parametrize(
    ("width", "dtype"),
    [*((width, jnp.bfloat16) for width in (16, 64, 80, 128, 192, 256)), (64, jnp.float32), (128, jnp.float32)],
)
def test_the_cut_that_is_chosen_divides_blocks_into_tiles(width, dtype):
    for lengths, blocks in (((5, 4096), (None, None)), ((4096, 300000), (None, None)), ((600, 600), (48, 640))):
        cut = choose_blocks(*lengths, width, width, dtype, block_q=blocks[0], block_kv=blocks[1])
        for program in (cut.forward, cut.queries, cut.keys):
            for size, tile in ((cut.block_q, program.q), (cut.block_kv, program.kv)):
                assert size % tile == 0
                assert tile >= 16
                assert tile & (tile - 1) == 0


@pytest.mark.parametrize(
    ("width", "dtype"), [(64, jnp.bfloat16), (128, jnp.bfloat16), (256, jnp.bfloat16), (128, "f4")]
)
def test_the_cut_of_a_gpu_with_less_memory(width, dtype):
    """An A100 and a consumer's GPU. A program holds its own tile, and those of the other side that it loads ahead."""
    of_token = width * jnp.dtype(dtype).itemsize
    for kibibytes in (163, 99, 64):
        cut = choose_blocks(4096, 4096, width, width, dtype, shared=kibibytes << 10)
        taken = [
            cut.forward.q + 2 * cut.forward.stages * cut.forward.kv,
            2 * (cut.queries.q + cut.queries.stages * cut.queries.kv),
            2 * (cut.keys.kv + cut.keys.stages * cut.keys.q),
        ]
        assert max(taken) * of_token < kibibytes << 10
    whole = choose_blocks(4096, 4096, width, width, dtype)
    assert whole == choose_blocks(4096, 4096, width, width, dtype, shared=227 << 10)
    assert whole != cut


def test_lists_that_do_not_belong():
    query, key, value, _ = arrays(60, 60, 16, 16)
    idx, count = np.zeros((1, 1, 2, 2), np.int32), np.ones((1, 1, 2), np.int32)
    run = functools.partial(
        block_sparse_attention, query, key, value, scale=1.0, block_q=32, block_kv=32, platform="interpret_gpu"
    )
    good = BlockLists(idx, count, count)
    with pytest.raises(ValueError, match=r"by_row: expected idx \[Bm, Nm, 2, W\] with Bm in \{1, 2\}"):
        run(BlockLists(idx[:, :, :1], count, count), good)
    with pytest.raises(ValueError, match="by_col: expected integers"):
        run(good, good._replace(idx=idx.astype(np.float32)))
    with pytest.raises(ValueError, match="multiples of 16, got 8"):
        run(good, good, block_q=8)
    with pytest.raises(ValueError, match="by_col: expected a list"):
        jax.grad(lambda query: jnp.sum(block_sparse_attention(query, key, value, good, **run.keywords)[0]))(query)
