"""Packed sequences with states of their own, against every sequence by itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.linear.arguments import LinearState
from jattn.linear.delta_rule import delta_rule
from jattn.linear.hedgehog import hedgehog_attention
from jattn.linear.lightning import lightning_attention
from jattn.linear.recurrence import linear_attention
from jattn.linear.varlen import attend_varlen

T, N, K, H, V = 23, 4, 2, 5, 7
OFFSETS = np.asarray([0, 6, 6, 19, 20], np.int32)  # an empty sequence, and three tokens of none

OPS = {
    "linear": (linear_attention, {"log_decay": (1, T, K, H)}, {}),
    "normalised": (linear_attention, {"log_decay": (1, T, K)}, {"normalize": True, "eps": 50.0}),
    "lightning": (lightning_attention, {"slopes": (K,)}, {}),
    "delta": (delta_rule, {"log_decay": (1, T, K), "beta": (1, T, K)}, {"scale": 0.7}),
}


def operands(name):
    op, shapes, options = OPS[name]
    generator = np.random.default_rng(0)
    arrays = {"query": (1, T, N, H), "key": (1, T, K, H), "value": (1, T, K, V)}
    x = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in arrays.items()}
    for gate, shape in shapes.items():
        sign = -1 if gate == "log_decay" else 1
        x[gate] = sign * generator.uniform(0.1, 1, shape).astype(np.float32)
    count = len(OFFSETS) - 1
    start = LinearState(
        generator.standard_normal((count, K, H, V)).astype(np.float32),
        generator.uniform(0.1, 1, (count, K, H)).astype(np.float32) if options.get("normalize") else None,
    )
    return op, x, start, options


@pytest.mark.parametrize("name", OPS)
def test_every_sequence_by_itself(name):
    op, x, start, options = operands(name)
    weights = np.random.default_rng(1).standard_normal((1, T, N, V)).astype(np.float32)

    def packed(x, start):
        return attend_varlen(
            op, cu_seqlens=OFFSETS, max_length=16, initial_state=start, return_state=True, **x, **options
        )

    def apart(x, start):
        outs, ends = [], []
        for i, (a, b) in enumerate(itertools.pairwise(OFFSETS)):
            own = jax.tree.map(lambda s, i=i: s[i : i + 1], start)
            if a == b:
                ends.append(own)
                continue
            piece = {n: leaf[:, a:b] if leaf.shape[:2] == (1, T) else leaf for n, leaf in x.items()}
            out, end = op(**piece, initial_state=own, return_state=True, **options)
            outs.append(out)
            ends.append(end)
        rest = jnp.zeros((1, T - OFFSETS[-1], N, V))
        return jnp.concatenate([*outs, rest], 1), jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *ends)

    def both(f):
        def loss(x, start):
            out, end = f(x, start)
            return jnp.sum(out * weights) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(end)), (out, end)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, start)

    for got, want in zip(jax.tree.leaves(both(packed)), jax.tree.leaves(both(apart)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def test_offsets_may_be_traced():
    op, x, start, options = operands("delta")
    call = jax.jit(lambda ends: attend_varlen(op, cu_seqlens=ends, max_length=T, initial_state=start, **x, **options))
    for offsets in (OFFSETS, np.asarray([0, 1, 2, 3, T], np.int32)):
        want = attend_varlen(op, cu_seqlens=offsets, max_length=T, initial_state=start, **x, **options)
        np.testing.assert_allclose(call(offsets), want, atol=1e-5)


@pytest.mark.parametrize("offsets", [[0, 3, T], [0, 5]])
def test_maps_of_as_many_channels_as_tokens_are_no_tokens(offsets):
    """One head's weight [1, H, F] and bias [1, F] look like tokens [1, T, ..] where H = F = T."""
    generator = np.random.default_rng(2)
    shapes = {"query": (1, T, 1, T), "key": (1, T, 1, T), "value": (1, T, 1, V)}
    x = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights, bias = (generator.standard_normal(shape).astype(np.float32) for shape in ((2, 1, T, T), (1, T)))
    maps = {"query_weight": weights[0], "key_weight": weights[1], "query_bias": bias, "key_bias": bias}
    got = attend_varlen(hedgehog_attention, cu_seqlens=np.asarray(offsets, np.int32), max_length=T, **x, **maps)
    for a, b in itertools.pairwise(offsets):
        alone = hedgehog_attention(**{name: array[:, a:b] for name, array in x.items()}, **maps)
        np.testing.assert_allclose(got[:, a:b], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": [0, 9, 4, T]}, "^cu_seqlens: expected offsets from 0 to T = 23 that do not decrease"),
        ({"cu_seqlens": [1, 9, T]}, "^cu_seqlens: expected offsets from 0"),
        ({"cu_seqlens": [0, T + 1]}, "^cu_seqlens: expected offsets from 0"),
        ({"cu_seqlens": [0]}, "^cu_seqlens: expected at least two numbers, got 1"),
        ({"cu_seqlens": [0, 20]}, "^max_length: 16 is less than the longest sequence"),
        ({"max_length": 0}, "^max_length: expected"),
        ({"query": np.zeros((2, T, N, H), np.float32)}, "^query: expected one row with all sequences, got 2"),
        ({"segment_ids": np.zeros((1, T), np.int32)}, "^segment_ids: cu_seqlens says"),
        ({"key": np.zeros((1, 22, K, H), np.float32)}, r"^key: expected \[B, T, K, H\] with T = 23"),
        ({"value": np.zeros((1, 22, K, V), np.float32)}, r"^value: expected \[B, T, Kv, V\] with T = 23"),
        ({"value": None}, "^value: expected an array, got NoneType"),
        ({"log_decay": np.zeros((1, 22, K, H), np.float32)}, "^log_decay: .* with T = 23"),
        ({"log_decay": np.zeros((4, 16, K), np.float32)}, "^log_decay: .* with B = 1"),
        ({"log_decay": np.zeros((1, T), np.float32)}, r"^log_decay: expected 3 dimensions \[B, T, heads\]"),
        ({"beta": np.ones((1, 22, K), np.float32)}, r"^beta: expected \[B, T, heads\] with T = 23"),
    ],
)
def test_bad_calls_are_named(change, message):
    op, x, _, _ = operands("linear")
    given = {"cu_seqlens": OFFSETS, "max_length": 16, **x, **change}
    for dtype in (np.int32, np.uint32):
        given["cu_seqlens"] = np.asarray(given["cu_seqlens"], dtype)
        with pytest.raises((TypeError, ValueError), match=message):
            attend_varlen(op, **given)
