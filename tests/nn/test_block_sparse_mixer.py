"""Masks and score functions of the user's own in a mixer; the protocol itself is in test_mixers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.masks import Causal, Sink, SlidingWindow
from jattn.nn import BlockSparseMixer
from jattn.sparse.block_sparse import block_sparse_attention

WIDTH, LENGTH = 12, 23
MASK = SlidingWindow(4) | Sink(2)
FILE = """
import jax.numpy as jnp
from jattn.masks import Sink, SlidingWindow
mask = SlidingWindow(4) | Sink(2)
def alibi(score, b, h, q_pos, kv_pos, slopes, strength):
    return score + strength[0] * slopes[h] * (kv_pos - q_pos)
def slopes(num_heads):
    return 0.5 ** jnp.arange(1.0, num_heads + 1), jnp.ones(1)
"""


def alibi(score, b, h, q_pos, kv_pos, slopes, strength):
    return score + strength[0] * slopes[h] * (kv_pos - q_pos)


def slopes(num_heads):
    return 0.5 ** jnp.arange(1.0, num_heads + 1), jnp.ones(1)


def mixer(**options):
    made = BlockSparseMixer(
        WIDTH, num_heads=4, num_kv_heads=2, head_dim=6, rngs=nnx.Rngs(0), rope_theta=None, **options
    )
    kernel = made.projections.out.kernel
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)
    return made


def inputs():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH)), jnp.float32)
    return x, jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))


def test_is_the_op_between_projections():
    made, (x, positions) = mixer(mask=MASK, score_mod=alibi, score_parameters=slopes), inputs()
    query, key, value = made.heads(x, positions)
    out = block_sparse_attention(query, key, value, Causal() & MASK, score_mod=alibi, captured=slopes(4))
    np.testing.assert_allclose(made(x, positions=positions)[0], made.projections.merge(out), rtol=0, atol=1e-6)


def test_decoding_knows_the_mask_the_scores_and_their_weights():
    made, (x, positions) = mixer(mask=MASK, score_mod=alibi, score_parameters=slopes), inputs()
    made.score_parameters[0][...] = jnp.asarray([3.0, 0.2, -0.5, 1.0])
    expected, _ = made(x, positions=positions)
    plain, _ = mixer(mask=MASK)(x, positions=positions)
    assert np.abs(expected - plain).max() > 0.1
    state, pieces = made.init_state(2, LENGTH, jnp.float32), []
    for first, last in [(0, 6), (6, 9), *((t, t + 1) for t in range(9, LENGTH))]:
        y, state = made(x[:, first:last], positions=positions[:, first:last], state=state)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected, rtol=0, atol=2e-5)


def test_weights_of_the_score_function_are_trained():
    made, (x, positions) = mixer(score_mod=alibi, score_parameters=slopes), inputs()
    gradient = nnx.grad(lambda made: jnp.sum(made(x, positions=positions)[0] ** 2))(made)
    found = list(jax.tree.leaves(gradient["score_parameters"]))
    assert [leaf.shape for leaf in found] == [(4,), (1,)]
    assert all(np.abs(leaf).min() > 0 for leaf in found)


def test_functions_by_name(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(FILE)
    named = mixer(mask=f"{path}:mask", score_mod=f"{path}:alibi", score_parameters=f"{path}:slopes")
    given = mixer(mask=MASK, score_mod=alibi, score_parameters=slopes)
    x, positions = inputs()
    np.testing.assert_array_equal(named(x, positions=positions)[0], given(x, positions=positions)[0])
    assert (
        mixer(mask=f"{path}:mask", score_mod=f"{path}:alibi", score_parameters=f"{path}:slopes").score_mod
        is named.score_mod
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": "nowhere.py:mask"}, ValueError, "'nowhere.py:mask': expected .* of something that is there"),
        ({"mask": "jattn.masks:Circle"}, ValueError, "no attribute 'Circle'"),
        ({"mask": "mask"}, ValueError, "'mask': expected"),
        ({"mask": lambda q, k, h: q > k}, TypeError, "mask: expected a jattn.masks.Mask, got function; jattn.masks.Fn"),
        ({"score_parameters": slopes}, ValueError, "score_parameters: there is no score_mod"),
    ],
    ids=["file", "name", "colon", "predicate", "no-score"],
)
def test_what_is_wrong_is_named(options, error, message):
    with pytest.raises(error, match=message):
        mixer(**options)


def test_flops_follow_the_mask():
    sparse, dense = mixer(mask=SlidingWindow(127)), mixer()
    tokens, heads, width = 4096, 4, 12
    of_pairs = [each.flops(1, tokens) - each.projections.flops(tokens) for each in (sparse, dense)]
    # Blocks of 128: a row of a window of 128 keys touches two.
    assert of_pairs[0] == pytest.approx(2 * heads * width * 128 * 128 * (2 * 32 - 1))
    assert of_pairs[1] == pytest.approx(2 * heads * width * 128 * 128 * 32 * 33 / 2)
