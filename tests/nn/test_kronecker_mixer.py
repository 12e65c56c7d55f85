"""What a mixer over pairs of tokens can that others cannot; the protocol itself is in test_mixers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.nn import KroneckerMixer
from jattn.sparse.kronecker import kronecker_attention

WIDTH, LENGTH = 12, 19


def mixer(**options):
    made = KroneckerMixer(WIDTH, num_heads=4, num_kv_heads=2, head_dim=6, rngs=nnx.Rngs(0), **options)
    kernel = made.projections.out.kernel
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)
    return made


def inputs():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH)), jnp.float32)
    return x, jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))


def test_is_the_op_between_projections():
    made, (x, positions) = mixer(windows=(None, 3)), inputs()
    query, keys, values = made._heads(x)
    np.testing.assert_allclose(jnp.mean(keys[1] ** 2, axis=-1), 1, rtol=1e-3)
    out = kronecker_attention(query, keys, values, is_causal=True, windows=(None, 3), scale=6**-0.5)
    np.testing.assert_allclose(made(x, positions=positions)[0], made.projections.merge(out), rtol=0, atol=1e-6)


@pytest.mark.parametrize("windows", [(None, 3), (5, 4), (4, 7)], ids=str)
def test_windows_while_decoding(windows):
    made, (x, positions) = mixer(windows=windows), inputs()
    expected, _ = made(x, positions=positions)
    state, pieces = made.init_state(2, LENGTH, jnp.float32), []
    assert state.key.shape == (2, LENGTH if None in windows else max(windows), 2, 12)
    for first, last in [(0, 6), (6, 9), *((t, t + 1) for t in range(9, LENGTH))]:
        y, state = made(x[:, first:last], positions=positions[:, first:last], state=state)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("windows", [(3,), (0, 2)], ids=str)
def test_windows_that_cannot_be(windows):
    with pytest.raises(ValueError, match="windows: expected"):
        mixer(windows=windows)
