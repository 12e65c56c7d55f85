"""The causal dilated window as a mixer, beyond what `test_mixers` asks of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.nn import NeighborhoodMixer

LENGTH = 23


def made(**options):
    mixer = NeighborhoodMixer(12, num_heads=4, num_kv_heads=2, head_dim=6, rngs=nnx.Rngs(0), **options)
    kernel = mixer.projections.out.kernel
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape) * 0.3
    return mixer, jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, 12)), jnp.float32)


@nnx.jit
def apply(mixer, x, positions, segment_ids=None, state=None):
    return mixer(x, positions=positions, segment_ids=segment_ids, state=state)


def positions(first, last):
    return jnp.broadcast_to(jnp.arange(first, last), (2, last - first))


@pytest.mark.parametrize(("kernel_size", "dilation"), [(4, 3), (3, 7), (30, 2)])
def test_a_query_sees_every_dth_token_of_its_window(kernel_size, dilation):
    mixer, x = made(kernel_size=kernel_size, dilation=dilation)
    gradient = nnx.grad(lambda x, mixer: apply(mixer, x, positions(0, LENGTH))[0][0, 20].sum())(x, mixer)
    seen = [t for t in range(LENGTH) if float(jnp.abs(gradient[0, t]).sum())]
    assert seen == sorted(t for t in range(20, max(-1, 20 - kernel_size * dilation), -dilation) if t >= 0)


@pytest.mark.parametrize("capacity", [LENGTH, 13])
def test_pieces_of_a_text(capacity):
    """A ring of 12 slots wraps round within pieces and single tokens; one of 13 places has them all too."""
    mixer, x = made(kernel_size=4, dilation=3)
    want, _ = apply(mixer, x, positions(0, LENGTH))
    state, pieces = mixer.init_state(2, capacity, jnp.float32), []
    assert state.key.shape[1] == 12
    for first, last in [(0, 5), (5, 19), *((t, t + 1) for t in range(19, LENGTH))]:
        y, state = apply(mixer, x[:, first:last], positions(first, last), state=state)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), want, atol=2e-5)


def test_documents_do_not_see_one_another():
    mixer, x = made(kernel_size=4, dilation=3)
    ids = jnp.broadcast_to(jnp.where(jnp.arange(LENGTH) < 10, 1, 2), (2, LENGTH))
    restart = jnp.concatenate([positions(0, 10), positions(0, LENGTH - 10)], 1)
    packed, _ = apply(mixer, x, restart, ids)
    alone = [apply(mixer, part, positions(0, part.shape[1]))[0] for part in (x[:, :10], x[:, 10:])]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), atol=2e-5)
    prefilled, _ = apply(mixer, x, restart, ids, mixer.init_state(2, LENGTH, jnp.float32))
    np.testing.assert_allclose(prefilled, packed, atol=2e-5)


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="dilation: expected at least 1, got 0"):
        made(dilation=0)
