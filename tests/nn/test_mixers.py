"""The mixer protocol, for every mixer of the catalog: state, causality, segments, shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.catalog import CATALOG

MIXERS = [entry for entry in CATALOG if entry.layer]
OPTIONS = {"sliding_window": {"window": 5}}
WIDTH, BATCH, LENGTH = 12, 2, 23


@pytest.fixture(params=MIXERS, ids=lambda entry: entry.name)
def mixer(request):
    options = OPTIONS.get(request.param.name, {})
    mixer = request.param.load_layer()(
        WIDTH, num_heads=4, num_kv_heads=2, head_dim=6, layer_index=1, num_layers=3, rngs=nnx.Rngs(0), **options
    )
    # The output projection starts at zero, which would hide everything.
    kernel = mixer.projections.out.kernel
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape) * 0.3
    return mixer


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)


@nnx.jit
def apply(mixer, x, positions, segment_ids=None, state=None):
    """Compiled: operation by operation, most of the time would go into compiling."""
    return mixer(x, positions=positions, segment_ids=segment_ids, state=state)


def positions(first, last):
    return np.broadcast_to(np.arange(first, last, dtype=np.int32), (BATCH, last - first))


def whole(mixer, x):
    return apply(mixer, x, positions(0, x.shape[1]))


def alone(mixer, x, first, last):
    """What some of the tokens give as a document of their own.

    What comes after a token changes nothing (see `test_is_causal_by_gradient`): one program does for every document.
    """
    return whole(mixer, np.roll(x, -first, axis=1))[0][:, : last - first]


def assert_near(got, want):
    """Within the rounding of float32, which grows with the output of a mixer that does not normalise it."""
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1, np.abs(want).max()))


def assert_decodes_as_it_is_trained(mixer, x):
    """A prefill, more of it, and tokens one by one give what the parallel form gives."""
    expected, none = whole(mixer, x)
    assert none is None
    state = mixer.init_state(BATCH, LENGTH, jnp.float32)
    pieces = []
    # An empty-state prefill, a second piece, then single tokens; the window of 5 wraps round within them.
    for first, last in [(0, 7), (7, 14), *((t, t + 1) for t in range(14, LENGTH))]:
        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        y, state = apply(mixer, x[:, first:last], positions(first, last), state=state)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
        pieces.append(y)
    assert_near(np.concatenate(pieces, 1), expected)


def test_prefill_then_decode_is_the_parallel_forward(mixer, x):
    assert_decodes_as_it_is_trained(mixer, x)


def test_is_causal_by_gradient(mixer, x):
    gradient = nnx.jit(nnx.grad(lambda x, mixer: whole(mixer, x)[0][:, 11].sum()))(x, mixer)
    assert not np.any(gradient[:, 12:])
    assert np.any(gradient[:, 8:12], axis=-1).all()


def packed(*lengths):
    """Positions, which restart with each document as packed data does, and numbers of the documents."""
    ids = np.repeat(np.arange(1, 1 + len(lengths), dtype=np.int32), lengths)
    return np.concatenate([positions(0, length) for length in lengths], 1), np.broadcast_to(ids, (BATCH, len(ids)))


def test_segments_do_not_see_one_another(mixer, x):
    got, _ = apply(mixer, x, *packed(9, LENGTH - 9))
    assert_near(got, np.concatenate([alone(mixer, x, 0, 9), alone(mixer, x, 9, LENGTH)], 1))


def test_a_state_belongs_to_the_first_segment_and_ends_in_the_last(mixer, x):
    """Read 7 tokens of a document, then a piece in which it ends after 4 and another begins, then on with that one."""
    state = mixer.init_state(BATCH, LENGTH, jnp.float32)
    a, state = apply(mixer, x[:, :7], positions(0, 7), state=state)
    restart, ids = (part[:, 7:16] for part in packed(11, LENGTH - 11))
    b, state = apply(mixer, x[:, 7:16], restart, ids, state)
    c, _ = apply(mixer, x[:, 16:], positions(5, 12), state=state)
    documents = [alone(mixer, x, 0, 11), alone(mixer, x, 11, LENGTH)]
    assert_near(np.concatenate([a, b, c], 1), np.concatenate(documents, 1))


@pytest.mark.parametrize("length", [1, 7])
def test_a_cache_of_other_rows_is_refused(length):
    """JAX would read and write out of bounds, where it finds the last row and leaves nothing."""
    mixers = [entry for entry in MIXERS if entry.name in ("softmax", "sliding_window", "neighborhood_1d", "kronecker")]
    for entry in mixers:
        mixer = entry.load_layer()(WIDTH, num_heads=2, rngs=nnx.Rngs(0))
        state = mixer.init_state(1, LENGTH, jnp.float32)
        with pytest.raises(ValueError, match=r"state.key: expected \[B, C, K, H\] with B = 2 as in key, got \(1, "):
            mixer(np.ones((BATCH, length, WIDTH), np.float32), positions=positions(0, length), state=state)


def test_flops_grow_as_the_entry_says(mixer, x):
    del x
    assert mixer.flops(3, 64) == pytest.approx(3 * mixer.flops(1, 64))
    assert mixer.flops(1, 64) > 2 * 64 * WIDTH * 24 * 2


@pytest.mark.parametrize("entry", MIXERS, ids=lambda entry: entry.name)
def test_a_width_that_heads_do_not_divide(entry):
    with pytest.raises(ValueError, match="num_heads: a width of 12 does not divide by 5 heads"):
        entry.load_layer()(12, num_heads=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="6 heads cannot be shared by 4"):
        entry.load_layer()(12, num_heads=6, num_kv_heads=4, rngs=nnx.Rngs(0))


def test_bfloat16_stays_near_float32(mixer, x):
    wide, _ = whole(mixer, x)
    narrow, _ = whole(mixer, x.astype(jnp.bfloat16))
    assert np.sqrt(np.mean((narrow - wide) ** 2)) < 0.03 * np.sqrt(np.mean(wide**2))


def test_cache_sizes_are_what_they_promise():
    by_name = {entry.name: entry.load_layer() for entry in MIXERS}
    window = by_name["sliding_window"](12, num_heads=2, window=5, rngs=nnx.Rngs(0))
    assert window.init_state(1, 1000, jnp.float32).key.shape == (1, 5, 2, 6)
    lightning = by_name["lightning"](12, num_heads=2, rngs=nnx.Rngs(0))
    assert lightning.init_state(1, 1000, jnp.bfloat16).S.shape == (1, 2, 6, 6)
    assert lightning.init_state(1, 1000, jnp.bfloat16).S.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sliding_window", {"window": 0}, "window: expected at least 1, got 0"),
        ("linear", {"decay": "token"}, "decay: expected one of 'channel', 'head', 'none', got 'token'"),
        ("lightning", {"norm": "batch"}, "norm: expected one of 'layernorm'"),
        ("lightning", {"gate_rank": 0}, "gate_rank: expected at least 1, got 0"),
    ],
)
def test_option_errors(name, options, message):
    layer = next(entry for entry in MIXERS if entry.name == name).load_layer()
    with pytest.raises(ValueError, match=message):
        layer(12, num_heads=2, rngs=nnx.Rngs(0), **options)
