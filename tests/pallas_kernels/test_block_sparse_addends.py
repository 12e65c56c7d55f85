"""Score functions that only add to the score: which are found, and that a row and a column are as good as a tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.masks import Causal, Full
from pallas_kernels.block_sparse import Tile, Tiling, WorkList, addends, block_sparse_attention
from tests.pallas_kernels.test_block_sparse import COLUMNS, CUT, LATE, TWO_WALKS, WINDOW, assert_as_dense, operands


def alibi(score, b, h, q_pos, kv_pos, slopes, *_):
    return score + slopes[h] * (kv_pos - q_pos)


ADDENDS = {
    "alibi": alibi,
    "alibi, the other way round": lambda x, b, h, q, k, t, n: x - t[h] * (q - k),
    "slopes that are computed": lambda x, b, h, q, k, t, n: jnp.exp2(-0.5 * (h + 1)) * (k - q) + x,
    "a quotient": lambda x, b, h, q, k, t, n: x + (k - q) / 8,
    "of the keys, of the queries and of neither": lambda x, b, h, q, k, t, n: x + 0.1 * k - t[h] * q + t[b],
    "of none": lambda x, b, h, q, k, t, n: x,
    "an integer": lambda x, b, h, q, k, t, n: x + n[h] * (q - k),
    "floating-point positions": lambda x, b, h, q, k, t, n: x + t[h] * (k.astype(jnp.float32) - q),
    "compiled": jax.jit(alibi),
}
OTHERS = {
    "a distance": lambda x, b, h, q, k, t, n: x - t[h] * jnp.abs(k - q),
    "a distance that rounds": lambda x, b, h, q, k, t, n: x + (k - q) // 8,
    "narrow positions": lambda x, b, h, q, k, t, n: x + (k - q).astype(jnp.bfloat16),
    "truncated positions": lambda x, b, h, q, k, t, n: x + (0.1 * k).astype(jnp.int32),
    "a product": lambda x, b, h, q, k, t, n: x + 0.1 * (k * q),
    "a temperature": lambda x, b, h, q, k, t, n: x * t[h],
    "a negative score": lambda x, b, h, q, k, t, n: k - x,
    "the score twice": lambda x, b, h, q, k, t, n: x + x,
    "no score": lambda x, b, h, q, k, t, n: jnp.zeros((8, 128)) + 0.1 * q + 0.1 * k,
    "a mask": lambda x, b, h, q, k, t, n: jnp.where(k <= q, x, -jnp.inf),
    "places in the tile": lambda x, b, h, q, k, t, n: x + jnp.arange(128),
    "a sum over keys": lambda x, b, h, q, k, t, n: x + jnp.sum(k),
    "keys for queries": lambda x, b, h, q, k, t, n: x + jnp.broadcast_to(k[0, :8, None], (8, 128)),
    "a compiled distance": jax.jit(lambda x, b, h, q, k, t, n: x - t[h] * jnp.abs(k - q)),
}


def program(score_mod):
    shapes = ((8, 128), (), (), (8, 1), (1, 128), (4,), (4,))
    kinds = (jnp.float32, *[jnp.int32] * 4, jnp.float32, jnp.int32)
    return jax.make_jaxpr(score_mod)(*map(jax.ShapeDtypeStruct, shapes, kinds))


@pytest.mark.parametrize("name", ADDENDS)
def test_what_adds(name):
    assert addends.is_addend(program(ADDENDS[name]))


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_more_than_to_add(name):
    assert not addends.is_addend(program(OTHERS[name]))


def as_bias(x, q_len, kv_len):
    distance = jnp.arange(kv_len) - jnp.arange(q_len)[:, None]
    return x | {"bias": x["slopes"][None, :, None, None] * distance}


@pytest.mark.parametrize(
    ("cut", "mask", "more"),
    [
        (CUT, WINDOW, {}),
        (CUT, LATE, {"sinks": (4,), "kv_bias": (2, 2, 307)}),
        (TWO_WALKS, WINDOW, {"sinks": (4,)}),
        (TWO_WALKS, Full(), {}),
        (COLUMNS, Causal(-20), {"sinks": (4,), "kv_bias": (2, 2, 307)}),
    ],
    ids=["one walk", "sinks, a bias of keys, rows that see nothing", "two walks", "no mask", "columns, all of these"],
)
def test_alibi_with_all_gradients(cut, mask, more):
    arguments, cotangents = operands(2, 211, 307, 4, 2, 16, 32, **more, slopes=(4,))
    arguments["slopes"] = jnp.asarray([0.5, 0.03, -0.2, 0.0])

    def reference(x):
        x = as_bias(x, 211, 307)
        if "kv_bias" in x:  # the op has one bias
            x = x | {"bias": x["bias"] + jnp.repeat(x["kv_bias"], 2, axis=1)[:, :, None]}
        return {name: a for name, a in x.items() if name != "kv_bias"}

    assert_as_dense(arguments, cotangents, mask, cut=cut, score_mod=alibi, reference=reference)


def test_alibi_in_bfloat16():
    """The gradient of a slope is a difference of sums that are much larger: neither may be rounded on its own."""
    arguments, cotangents = operands(1, 211, 307, 2, 1, 128, 128, dtype=jnp.bfloat16, slopes=(2,))
    arguments["slopes"] = jnp.asarray([0.7, 0.11])
    for cut in (CUT, COLUMNS):
        assert_as_dense(
            arguments, cotangents, Causal(96), cut=cut, ratio=5e-3, score_mod=alibi,
            reference=lambda x: as_bias(x, 211, 307),
        )  # fmt: skip


def test_parts_are_exact():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 997)) * 1000, jnp.float32)
    found = addends.parts(x, jnp.bfloat16)
    for part in found:
        np.testing.assert_array_equal(part, part.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(sum(found), x)


def test_many_numbers_that_are_read():
    """More of them than one tile of rows below the queries holds derivatives of."""
    names = [f"w{i}" for i in range(7)]
    arguments, cotangents = operands(1, 211, 307, 2, 1, 16, 32, dtype=jnp.bfloat16, **dict.fromkeys(names, (2,)))
    arguments |= {name: arguments[name] * 0.02 for name in names}

    def many(score, b, h, q_pos, kv_pos, *weights):
        for i, weight in enumerate(weights):
            score = score + weight[h] * ((i - 3) * kv_pos + q_pos * weights[0][h])
        return score

    def reference(x):
        t, s = jnp.arange(211)[:, None], jnp.arange(307)
        bias = sum(x[name][:, None, None] * ((i - 3) * s + t * x["w0"][:, None, None]) for i, name in enumerate(names))
        return {name: a for name, a in x.items() if name not in names} | {"bias": bias[None]}

    assert_as_dense(arguments, cotangents, Causal(96), ratio=5e-3, score_mod=many, reference=reference)


_ALL = [(row, col, 2) for row in range(2) for col in range(2)]


def _work_list(steps):
    """Of (row, col, kind)."""
    return WorkList(*np.asarray(steps, np.int32).T[:, None, None])


def test_a_head_that_an_infinite_addend_masks():
    arguments, cotangents = operands(1, 211, 307, 2, 1, 16, 32)
    hidden = jnp.asarray([0.0, -jnp.inf])

    def hide(score, b, h, q_pos, kv_pos, hidden):
        return score + hidden[h]

    by_row, by_col = (_work_list(sorted(_ALL, key=lambda step: step[axis])) for axis in (0, 1))

    def attend(x):
        out, lse = block_sparse_attention(
            x["query"], x["key"], x["value"], by_row, by_col, score_mod=hide, captured=[hidden], scale=0.2,
            block_q=128, block_kv=256, platform="interpret", cut=CUT,
        )  # fmt: skip
        return jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0)) + jnp.sum(out * cotangents[0]), (out, lse)

    gradients, (out, lse) = jax.grad(attend, has_aux=True)(arguments)
    assert (lse[..., 1] == -jnp.inf).all()
    assert np.isfinite(lse[..., 0]).all()
    assert not np.any(out[:, :, 1])
    assert not np.any(gradients["query"][:, :, 1])
    assert all(np.isfinite(x).all() for x in gradients.values())


LONG = Tiling(
    block_q=16384, block_kv=1024, forward=Tile(2048, 1024, 1), backward=Tile(2048, 1024, 1), strip=1024, ones=False,
    split=False, vmem=2**26, resident=2**40,
)  # fmt: skip


def test_nothing_is_lost_far_from_the_origin():
    """The last 2003 of 130003 queries, with the keys around them and the very first ones."""
    length, slope, at = 130003, 0.03, slice(128000, 130003)
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (rng.standard_normal((length, 16)).astype(np.float32) for _ in range(4))
    by_row = _work_list([*((row, 0, 0) for row in range(7)), (7, 0, 2), (7, 124, 1), (7, 125, 1), (7, 126, 1)])

    def attend(query, key, value, slopes):
        out, lse = block_sparse_attention(
            *(x[None, :, None] for x in (query, key, value)), by_row, element=Causal().elem, score_mod=alibi,
            captured=[slopes], scale=0.25, block_q=16384, block_kv=1024, platform="interpret", cut=LONG,
        )  # fmt: skip
        loss = jnp.sum((out[0, :, 0] * cotangent)[at]) + jnp.sum(jnp.sin(lse[0, at, 0]))
        return loss, (out[0, at, 0], lse[0, at, 0])

    t = np.arange(at.start, at.stop)
    s = np.concatenate([np.arange(1024), np.arange(124 * 1024, length)])

    def dense(query, key, value, slopes):
        z = 0.25 * query[t] @ key[s].T + slopes[0] * (s - t[:, None])
        z = jnp.where(s <= t[:, None], z, -jnp.inf)
        lse = jax.nn.logsumexp(z, axis=1)
        out = jnp.exp(z - lse[:, None]) @ value[s]
        return jnp.sum(out * cotangent[at]) + jnp.sum(jnp.sin(lse)), (out, lse)

    def results(function, dtype):
        arguments = [x.astype(dtype) for x in (query, key, value, np.asarray([slope], np.float32))]
        found = jax.jit(jax.value_and_grad(function, (0, 1, 2, 3), has_aux=True))(*arguments)
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(found)]

    got = results(attend, np.float32)
    with jax.enable_x64(True):
        want = results(dense, np.float64)
    for found, wanted in zip(got, want, strict=True):
        assert np.sqrt(np.mean((found - wanted) ** 2)) < 2e-5 * np.sqrt(np.mean(wanted**2))
