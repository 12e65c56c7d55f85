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
    return jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)


@nnx.jit
def apply(mixer, x, positions, segment_ids=None, state=None):
    """Compiled: operation by operation, most of the time would go into compiling."""
    return mixer(x, positions=positions, segment_ids=segment_ids, state=state)


def positions(first, last):
    return jnp.broadcast_to(jnp.arange(first, last), (BATCH, last - first))


def whole(mixer, x, **context):
    return apply(mixer, x, positions(0, x.shape[1]), **context)


def assert_near(got, want):
    """Within the rounding of float32, which grows with the output of a mixer that does not normalise it."""
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1, np.abs(want).max()))


def test_prefill_then_decode_is_the_parallel_forward(mixer, x):
    expected, none = whole(mixer, x)
    assert none is None
    state = mixer.init_state(BATCH, LENGTH, jnp.float32)
    pieces = []
    # An empty-state prefill, a second piece, then single tokens; the window of 5 wraps round within them.
    for first, last in [(0, 7), (7, 16), *((t, t + 1) for t in range(16, LENGTH))]:
        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        y, state = apply(mixer, x[:, first:last], positions(first, last), state=state)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
        pieces.append(y)
    assert_near(jnp.concatenate(pieces, 1), expected)


def test_is_causal_by_gradient(mixer, x):
    gradient = nnx.jit(nnx.grad(lambda x, mixer: whole(mixer, x)[0][:, 11].sum()))(x, mixer)
    assert (gradient[:, 12:] == 0).all()
    assert (jnp.abs(gradient[:, 8:12]).sum(-1) > 0).all()


def test_segments_do_not_see_one_another(mixer, x):
    ids = jnp.where(jnp.arange(LENGTH) < 9, 1, 2) * jnp.ones((BATCH, 1), jnp.int32)
    # Positions restart with each document, as packed data does.
    restart = jnp.concatenate([positions(0, 9), positions(0, LENGTH - 9)], 1)
    packed, _ = apply(mixer, x, restart, ids)
    alone = [whole(mixer, part)[0] for part in (x[:, :9], x[:, 9:])]
    assert_near(packed, jnp.concatenate(alone, 1))


def test_a_state_belongs_to_the_first_segment_and_ends_in_the_last(mixer, x):
    """Read 7 tokens of a document, then a piece in which it ends after 4 and another begins, then on with that one."""
    first, last = x[:, :11], x[:, 11:]
    ids = jnp.where(jnp.arange(7, 17) < 11, 1, 2) * jnp.ones((BATCH, 1), jnp.int32)
    state = mixer.init_state(BATCH, LENGTH, jnp.float32)
    a, state = apply(mixer, x[:, :7], positions(0, 7), state=state)
    restart = jnp.concatenate([positions(7, 11), positions(0, 6)], 1)
    b, state = apply(mixer, x[:, 7:17], restart, ids, state)
    c, _ = apply(mixer, x[:, 17:], positions(6, 12), state=state)
    alone = jnp.concatenate([whole(mixer, first)[0], whole(mixer, last)[0]], 1)
    assert_near(jnp.concatenate([a, b, c], 1), alone)


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
    scale = jnp.sqrt(jnp.mean(wide**2))
    assert float(jnp.sqrt(jnp.mean((narrow - wide) ** 2)) / scale) < 0.03


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
