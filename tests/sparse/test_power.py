"""PowerAttention against dense softmax under a mask written out pair by pair, its receptive field, and its cost."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.dot_product import dot_product_attention
from jattn.sparse.block_mask import BlockMask
from jattn.sparse.power import power_attention, power_attention_mask, receptive_hops

B, N, K, H, V = 2, 6, 3, 5, 7
IMPLEMENTATIONS = ("reference", "xla")
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def operands(q_len: int, kv_len: int) -> list[np.ndarray]:
    rng = np.random.default_rng(q_len)
    return [rng.standard_normal(shape) for shape in ((B, q_len, N, H), (B, kv_len, K, H), (B, kv_len, K, V))]


def seen(q_len: int, kv_len: int, block_size: int, window_blocks: int, sink_blocks: int) -> np.ndarray:
    """The definition, pair by pair."""

    def pair(p: int, s: int) -> bool:
        distance = p // block_size - s // block_size
        near = distance < window_blocks or distance in [2**i for i in range(20)]
        return s <= p and (near or s // block_size < sink_blocks)

    return np.array([[pair(t + kv_len - q_len, s) for s in range(kv_len)] for t in range(q_len)])


def block_map(blocks: int, window_blocks: int, sink_blocks: int = 0) -> np.ndarray:
    """Which blocks are listed, from lists of blocks of 4."""
    mask = power_attention_mask(4, window_blocks, sink_blocks)
    return BlockMask.from_expr(mask, 4 * blocks, 4 * blocks, 4, 4).to_map()[0, 0] > 0


def reached(step: np.ndarray, layers: int) -> np.ndarray:
    """What the last block has heard of after some layers with residual connections."""
    row = np.arange(len(step)) == len(step) - 1
    for _ in range(layers):
        row = row | (row.astype(int) @ step > 0)
    return row


# Lengths that no block divides, a chunk in the middle of a block, a window beyond the sequence, one block in all.
CASES = {
    "whole": (37, 37, 4, 2, 1),
    "no-sink": (29, 29, 3, 1, 0),
    "chunk": (11, 37, 4, 1, 1),
    "one-query": (1, 29, 3, 1, 2),
    "wide": (23, 23, 4, 9, 3),
    "short": (5, 5, 8, 1, 1),
    "listed-smaller": (300, 300, 160, 1, 0),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_is_dense_softmax_under_the_mask_with_gradients(case, implementation):
    q_len, kv_len, *sizes = CASES[case]
    rng = np.random.default_rng(1)
    segments = tuple(np.sort(rng.integers(0, 2, (B, length))) for length in (q_len, kv_len))
    weights = rng.standard_normal((B, q_len, N, V))
    mask = seen(q_len, kv_len, *sizes)[None, None]
    options = dict(zip(("block_size", "window_blocks", "sink_blocks"), sizes, strict=True))

    def derivatives(op: Any, **fixed: Any) -> Any:
        def loss(x: Any) -> Any:
            out, lse = op(*x, scale=0.3, segment_ids=segments, return_lse=True, **fixed)
            some = jnp.isfinite(lse)
            return jnp.sum(out * weights) + jnp.sum(jnp.where(some, jnp.sin(jnp.where(some, lse, 0)), 0)), (out, lse)

        return quick_jit(jax.grad(loss, has_aux=True))

    with jax.enable_x64(True):
        x = operands(q_len, kv_len)
        got = derivatives(power_attention, **options, implementation=implementation)(x)
        want = derivatives(dot_product_attention, mask=mask, implementation="reference")(x)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-11), got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_window_over_all_is_causal_attention(implementation):
    x = [a.astype(np.float32) for a in operands(37, 37)]
    got = power_attention(*x, block_size=4, window_blocks=10, sink_blocks=0, implementation=implementation)
    np.testing.assert_allclose(got, dot_product_attention(*x, is_causal=True), atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_of_decoding_is_a_row_of_the_prefill(implementation):
    query, key, value = (a.astype(np.float32) for a in operands(29, 29))
    op = functools.partial(
        power_attention, block_size=3, window_blocks=1, sink_blocks=1, return_lse=True, implementation=implementation
    )
    out, lse = op(query, key, value)
    for t in (0, 2, 3, 17, 28):
        o, l = op(query[:, t : t + 1], key[:, : t + 1], value[:, : t + 1])
        np.testing.assert_allclose(o[:, 0], out[:, t], atol=2e-6)
        np.testing.assert_allclose(l[:, 0], lse[:, t], atol=2e-6)


def test_the_listed_blocks_of_a_row():
    assert np.flatnonzero(block_map(40, window_blocks=1)[37]).tolist() == [5, 21, 29, 33, 35, 36, 37]
    assert np.flatnonzero(block_map(40, 4, 2)[37]).tolist() == [0, 1, 5, 21, 29, 33, 34, 35, 36, 37]


def test_only_the_diagonal_blocks_ask_pair_by_pair():
    kinds = BlockMask.from_expr(power_attention_mask(8, 3, 1), 320, 320, 4, 4).to_map()[0, 0]
    assert np.array_equal(kinds == 1, np.eye(80, dtype=bool))


@pytest.mark.parametrize(("blocks", "window_blocks", "sink_blocks"), [(64, 5, 1), (100, 1, 0), (37, 3, 4), (500, 5, 1)])
def test_the_number_of_listed_blocks(blocks, window_blocks, sink_blocks):
    most = blocks * (sink_blocks + window_blocks + np.log2(blocks) + 1)
    assert block_map(blocks, window_blocks, sink_blocks).sum() <= most


@pytest.mark.parametrize("window_blocks", [1, 2, 3, 5])
def test_the_receptive_field_of_a_stack_of_layers(window_blocks):
    blocks = 1050
    step, hops = block_map(blocks, window_blocks), receptive_hops(blocks - 1, window_blocks)
    if window_blocks <= 3:
        assert hops.tolist() == [distance.bit_count() for distance in range(blocks)]
    for layers in range(1, 9):
        assert np.array_equal(reached(step, layers)[::-1], hops <= layers)
        missing = 2 ** (layers + 1) - 1 if window_blocks <= 3 else 2 ** (layers + 2) - 3
        assert np.flatnonzero(np.append(hops, layers + 1) > layers)[0] == min(missing, blocks)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_jacobian_of_a_small_network_is_not_zero_exactly_on_that_field(implementation):
    block, blocks, layers = 2, 24, 2

    def network(x: Any) -> Any:
        for _ in range(layers):
            uniform = jnp.zeros((1, x.size, 1, 1))
            x = x + power_attention(
                uniform, uniform, x.reshape(uniform.shape), block_size=block, window_blocks=1, sink_blocks=0,
                implementation=implementation,
            ).ravel()  # fmt: skip
        return x

    jacobian = quick_jit(jax.jacrev(network))(jnp.ones(block * blocks))
    p, s = np.arange(block * blocks)[:, None], np.arange(block * blocks)
    within = receptive_hops(blocks - 1, 1)[np.maximum(p // block - s // block, 0)] <= layers
    assert np.array_equal(jacobian != 0, (s <= p) & within)


def test_it_hears_of_every_block_where_patterns_as_costly_do_not():
    blocks, layers = 64, 6
    step = block_map(blocks, window_blocks=1)
    budget = step[-1].sum()
    distance = np.arange(blocks)[:, None] - np.arange(blocks)
    window = (distance >= 0) & (distance < budget)
    dilated = (distance >= 0) & (distance < 2 * budget) & (distance % 2 == 0)
    assert reached(step, layers).all()
    assert reached(window, layers).sum() == layers * (budget - 1) + 1 < 0.7 * blocks
    assert reached(dilated, layers).mean() == 0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "^block_size: expected at least 1"),
        ({"window_blocks": 0}, ValueError, "^window_blocks: expected at least 1"),
        ({"sink_blocks": -1}, ValueError, "^sink_blocks: expected at least 0"),
        ({"sink_blocks": 1.0}, TypeError, "^sink_blocks: expected a static integer"),
        ({"implementation": "fast"}, ValueError, "^implementation: expected one of"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        power_attention(*operands(6, 6), **options)


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match=r"^query: 7 queries cannot end where 6 keys end"):
        power_attention(*operands(7, 6))
    with pytest.raises(ValueError, match=r"^max_distance: expected at least 0"):
        receptive_hops(-1, 1)
