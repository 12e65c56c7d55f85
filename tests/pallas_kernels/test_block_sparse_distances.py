"""Score functions that add a number for every distance: which are found, and that a strip is as good as a tile."""

import jax
import jax.numpy as jnp
import pytest

import jattn
from jattn.masks import Causal, Full, SlidingWindow
from pallas_kernels.block_sparse import distances, limits
from tests.pallas_kernels.test_block_sparse import CUT, LATE, TWO_WALKS, WIDE_UNITS, WINDOW, assert_as_dense, operands

Q_LEN, KV_LEN = 211, 307
CONSTANTS = jnp.arange(64.0)

BY_DISTANCE = {
    "a table": lambda x, b, h, q, k, t, n: x + t[h, k - q + 32],
    "a table of some": lambda x, b, h, q, k, t, n: x + t[h, jnp.clip(k - q + 32, 0, 63)],
    "a row of a table": lambda x, b, h, q, k, t, n: x + t[0][jnp.abs(q - k)],
    "taken": lambda x, b, h, q, k, t, n: jnp.take(t[h], k - q + 3) + x,
    "logarithms": lambda x, b, h, q, k, t, n: x - t[h, 0] * jnp.log1p(t[h, 1] * jnp.abs(q - k)),
    "affine": lambda x, b, h, q, k, t, n: x + t[h, 0] * (k - q),
    "moved": lambda x, b, h, q, k, t, n: x + t[h, (k + 3) - (q - 2)],
    "floating-point positions": lambda x, b, h, q, k, t, n: x + jnp.exp(-jnp.abs(q.astype(jnp.float32) - k)),
    "cases": lambda x, b, h, q, k, t, n: x + jnp.where(k - q > 5, t[h, 0], jax.nn.relu(t[h, (k - q) // 2])),
    "compared positions": lambda x, b, h, q, k, t, n: x + jnp.where((q == k) | (q + 1 < k), -jnp.inf, t[h, 0]),
    "buckets": lambda x, b, h, q, k, t, n: x + t[h, (jnp.log((q - k).clip(1).astype(jnp.float32)) * 9).astype(int)],
    "of no distance": lambda x, b, h, q, k, t, n: x + t.sum() + t[h, n[0]],
    "constants of its own": lambda x, b, h, q, k, t, n: x + CONSTANTS[(k - q) % 64],
    "compiled": jax.jit(lambda x, b, h, q, k, t, n: x + t[h, k - q + 32]),
}
OTHERS = {
    "by query": lambda x, b, h, q, k, t, n: x + t[h, q],
    "by the sum": lambda x, b, h, q, k, t, n: x + t[h, k + q],
    "by batch row": lambda x, b, h, q, k, t, n: x + t[b, k - q],
    "a temperature": lambda x, b, h, q, k, t, n: x * t[h, 0],
    "the score twice": lambda x, b, h, q, k, t, n: x + (x + t[h, k - q]),
    "the score taken off": lambda x, b, h, q, k, t, n: t[h, k - q] - x,
    "a mask of scores": lambda x, b, h, q, k, t, n: jnp.where(k <= q, x, -jnp.inf),
    "a product": lambda x, b, h, q, k, t, n: x + k * q,
    "a multiple": lambda x, b, h, q, k, t, n: x + t[h, 2 * k - q],
    "compared with a number": lambda x, b, h, q, k, t, n: x + jnp.where(k < 7, 1.0, 0.0),
    "narrow positions": lambda x, b, h, q, k, t, n: x + (k.astype(jnp.bfloat16) - q.astype(jnp.bfloat16)),
    "a sum over a tile": lambda x, b, h, q, k, t, n: x + jnp.sum(k - q),
    "a sum over the keys before": lambda x, b, h, q, k, t, n: x + jnp.cumsum(k - q, axis=1),
    "turned round": lambda x, b, h, q, k, t, n: x + (k - q)[:, ::-1],
    "places in the tile": lambda x, b, h, q, k, t, n: x + jnp.arange(128),
    "keys for queries": lambda x, b, h, q, k, t, n: x + jnp.broadcast_to((k - q)[0, :8, None], (8, 128)),
    "halves of a tile": lambda x, b, h, q, k, t, n: x + jnp.concatenate([(k - q)[:, 64:], (k - q)[:, :64]], axis=1),
    "rows of a table": lambda x, b, h, q, k, t, n: x + t[k - q].sum(-1),
}


def program(score_mod):
    shapes = ((8, 128), (), (), (8, 1), (1, 128), (4, 64), (4,))
    kinds = (jnp.float32, *[jnp.int32] * 4, jnp.float32, jnp.int32)
    return jax.make_jaxpr(score_mod)(*map(jax.ShapeDtypeStruct, shapes, kinds))


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_what_adds_by_distance(name):
    assert distances.is_by_distance(program(BY_DISTANCE[name]))


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not(name):
    assert not distances.is_by_distance(program(OTHERS[name]))


def relative(score, b, h, q_pos, kv_pos, table):
    return score + table[h, kv_pos - q_pos + Q_LEN]


def as_bias(x):
    distance = jnp.arange(KV_LEN) - jnp.arange(Q_LEN)[:, None]
    bias = x["table"][:, distance + Q_LEN][None]
    if "kv_bias" in x:  # the op has one bias
        bias = bias + jnp.repeat(x["kv_bias"], 2, axis=1)[:, :, None]
    return {name: a for name, a in x.items() if name != "kv_bias"} | {"bias": bias}


@pytest.mark.parametrize(
    ("cut", "mask", "more", "options"),
    [
        (CUT, SlidingWindow(0, 60), {}, {}),
        (CUT, LATE, {"sinks": (4,), "kv_bias": (2, 2, KV_LEN)}, {"soft_cap": 3.0}),
        (TWO_WALKS, WINDOW, {"sinks": (4,)}, {}),
        (TWO_WALKS, Full(), {}, {"soft_cap": 3.0}),
    ],
    ids=["one walk, parts of blocks", "all that logits have, rows that see nothing", "two walks", "a cap, no mask"],
)
def test_a_table_with_all_gradients(cut, mask, more, options):
    arguments, cotangents = operands(2, Q_LEN, KV_LEN, 4, 2, 16, 32, **more, table=(4, Q_LEN + KV_LEN))
    assert_as_dense(arguments, cotangents, mask, cut=cut, score_mod=relative, reference=as_bias, **options)


def test_a_table_in_bfloat16_and_segments():
    arguments, cotangents = operands(1, Q_LEN, KV_LEN, 2, 1, 128, 128, dtype=jnp.bfloat16, table=(2, Q_LEN + KV_LEN))
    ids = tuple(jnp.arange(size)[None] // 90 for size in (Q_LEN, KV_LEN))
    assert_as_dense(
        arguments, cotangents, Causal(96), cut=WIDE_UNITS, segments=ids, ratio=5e-3, score_mod=relative,
        reference=as_bias,
    )  # fmt: skip


def test_distances_that_nothing_may_see_and_numbers_beyond_them():
    """Those of tokens after the ends are never asked for; there the function is not a number."""

    def near(score, b, h, q_pos, kv_pos, table):
        distance = kv_pos - q_pos
        beyond = (distance <= -Q_LEN) | (distance >= KV_LEN)
        hidden = jnp.where(jnp.abs(distance) % 5 == 2, -jnp.inf, table[h, distance + Q_LEN])
        return score + jnp.where(beyond, jnp.nan, hidden)

    def reference(x):
        x = as_bias(x)
        distance = jnp.abs(jnp.arange(KV_LEN) - jnp.arange(Q_LEN)[:, None])
        return x | {"bias": jnp.where(distance % 5 == 2, -jnp.inf, x["bias"])}

    arguments, cotangents = operands(1, Q_LEN, KV_LEN, 2, 1, 16, 32, table=(2, Q_LEN + KV_LEN))
    assert_as_dense(arguments, cotangents, Full(), score_mod=near, reference=reference)


def test_the_op_runs_it():
    table = jnp.zeros((2, 601))

    def decide(length, score_mod=lambda x, b, h, q, k, t: x + t[h, k - q + 300]):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        return jattn.explain(
            jattn.block_sparse_attention, x, x, x, Causal(), score_mod=score_mod, captured=(table,)
        )[0]  # fmt: skip

    decision = decide(300)
    assert decision.chosen["tpu"] == "pallas_tpu"
    assert decision.chosen["cuda"] == "pallas_gpu"
    assert "score_mod: the kernel holds 32768 distances, not 40000" in decide(20000).refused["pallas_tpu"]
    # What can be read by scalars needs no room for distances.
    assert decide(20000, lambda x, b, h, q, k, t: x - t[h, 0] * jnp.abs(q - k)).chosen["tpu"] == "pallas_tpu"
    assert limits.form(lambda x, b, h, q, k: x - jnp.abs(q - k), (), lengths=(7, 7), platform="tpu").by_distance
