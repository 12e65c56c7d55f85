"""The linear kernels, interpreted, against the recurrence token by token: values, states and every gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.linear.recurrence import token_scan
from pallas_kernels.linear import gates, linear_attention, programs, tiling
from pallas_kernels.linear.programs import Blocks
from pallas_kernels.linear.tiling import Tiling

# A call of the same sizes, gates and cut runs what another test has compiled.
RAGGED = (2, 61, 2, 2, 7, 11)
SEGMENTS = np.repeat([[0, 1, 2, 7], [2, 3, 5, 6]], [5, 29, 1, 26], axis=1)
SMALL = Tiling(chunk=16, chunks=2, heads=1, lag=1, times=2)
ON_GPU = Blocks(chunk=16, tile=8, value_tile=8)

each_kernel = pytest.mark.parametrize("blocks", [SMALL, ON_GPU], ids=["tpu", "gpu"])


def operands(
    batch, length, heads, kv_heads, width, value_width, *, constant=False, channel=False, dtype=jnp.float32, decay=1.0
):
    keys = jax.random.split(jax.random.key(0), 7)
    normal = jax.random.normal
    query = normal(keys[0], (batch, length, heads, width)).astype(dtype)
    key = normal(keys[1], (batch, length, kv_heads, width)).astype(dtype)
    value = normal(keys[2], (batch, length, kv_heads, value_width)).astype(dtype)
    shape = (kv_heads,) if constant else (batch, length, kv_heads, width) if channel else (batch, length, kv_heads)
    gate = -decay * jax.random.uniform(keys[3], shape)
    state = normal(keys[4], (batch, kv_heads, width, value_width))
    cotangents = normal(keys[5], (batch, length, heads, value_width)).astype(dtype), normal(keys[6], state.shape)
    return (query, key, value, gate, state), cotangents


def both(arguments, cotangents, segment_ids=None, blocks=None):
    """Outputs and gradients of the kernel that `blocks` belong to, and of the definition in float64."""
    platform = "interpret_gpu" if isinstance(blocks, Blocks) else "interpret"

    def fused(query, key, value, gate, state):
        return linear_attention(
            query, key, value, gate, segment_ids, state, scale=0.7, platform=platform, blocks=blocks
        )

    found = [with_gradients(fused, arguments, cotangents)]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (arguments, cotangents))
        found.append(recurrence(*wide, segment_ids))
    return dict(
        zip(("out", "state", "query", "key", "value", "gate", "initial"), zip(*found, strict=True), strict=True)
    )


def with_gradients(function, arguments, cotangents):
    out, transpose = jax.vjp(function, *arguments)
    return *out, *transpose(cotangents)


@jax.jit
def recurrence(arguments, cotangents, segment_ids):
    def definition(query, key, value, gate, state):
        return token_scan(
            query, key, value, gate, segment_ids, state, scale=0.7, chunk_size=None, out_dtype=query.dtype
        )

    return with_gradients(definition, arguments, cotangents)


def assert_near(pairs, ratio):
    for name, (got, want) in pairs.items():
        got, want = (np.asarray(x, np.float64) for x in (got, want))
        error = np.sqrt(np.mean((got - want) ** 2)) / np.sqrt(np.mean(want**2))
        assert error < ratio, f"{name}: {error:.2g}"


@each_kernel
@pytest.mark.parametrize(
    ("sizes", "constant"),
    [(RAGGED, False), (RAGGED, True), ((1, 128, 2, 2, 8, 16), True)],
    ids=["gates of tokens", "gates of heads, ragged", "tables"],
)
def test_values_and_gradients(sizes, constant, blocks):
    assert_near(both(*operands(*sizes, constant=constant), blocks=blocks), 1e-5)


@pytest.mark.parametrize("blocks", [Tiling(chunk=16, chunks=2, heads=2, lag=3), ON_GPU], ids=["tpu", "gpu"])
def test_grouped_heads(blocks):
    assert_near(both(*operands(1, 37, 6, 2, 5, 3, constant=False), blocks=blocks), 1e-5)


def test_queries_wait_for_the_states_that_a_long_step_makes_again():
    blocks = Tiling(chunk=8, chunks=8, heads=2, lag=2)
    assert_near(both(*operands(1, 70, 2, 2, 5, 3), blocks=blocks), 1e-5)


def test_the_cut_that_is_chosen():
    assert_near(both(*operands(2, 131, 1, 1, 5, 7)), 1e-5)


@each_kernel
@pytest.mark.parametrize("constant", [True, False])
def test_segments(constant, blocks):
    assert_near(both(*operands(*RAGGED, constant=constant), SEGMENTS, blocks), 1e-5)


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        (RAGGED, SMALL),
        ((1, 100, 1, 1, 8, 8), None),
        (RAGGED, ON_GPU),
        ((1, 53, 6, 2, 13, 17), ON_GPU),
        ((1, 64, 4, 2, 16, 8), ON_GPU),
    ],
    ids=["ragged", "chosen", "gpu, ragged", "gpu, grouped and ragged", "gpu, whole tiles"],
)
def test_gates_of_channels(sizes, blocks):
    """On TPU heads that share are in `test_channel_decays`."""
    assert_near(both(*operands(*sizes, channel=True), blocks=blocks), 1e-5)


@each_kernel
def test_gates_of_channels_in_segments_and_strong(blocks):
    assert_near(both(*operands(*RAGGED, channel=True, decay=20.0), SEGMENTS, blocks), 1e-5)


@each_kernel
def test_gates_of_channels_with_bfloat16(blocks):
    pairs = both(*operands(1, 61, 2, 2, 16, 11, channel=True, dtype=jnp.bfloat16), blocks=blocks)
    assert_near({name: pair for name, pair in pairs.items() if name != "gate"}, 5e-3)
    assert_near({"gate": pairs["gate"]}, 1e-2)


@each_kernel
@pytest.mark.parametrize("channel", [False, True])
def test_strong_gates(channel, blocks):
    """Gates of -20 among gates of nearly 0: sums in float32 would lose the small ones."""
    arguments, cotangents = operands(*RAGGED, channel=channel)
    strong = jax.random.bernoulli(jax.random.key(1), 0.5, arguments[3].shape)
    gate = jnp.where(strong, -20.0, arguments[3] * 1e-2)
    assert_near(both((*arguments[:3], gate, arguments[4]), cotangents, blocks=blocks), 1e-5)


@each_kernel
@pytest.mark.parametrize("channel", [False, True])
def test_a_gate_that_forgets_everything(channel, blocks):
    arguments, cotangents = operands(*RAGGED, channel=channel)
    gate = arguments[3].at[:, 11].set(-1e4)
    pairs = both((*arguments[:3], gate, arguments[4]), cotangents, blocks=blocks)
    assert_near(pairs, 1e-5)
    assert not np.any(pairs["gate"][0][:, 11])


@each_kernel
def test_bfloat16(blocks):
    pairs = both(*operands(1, 61, 2, 2, 7, 11, constant=False, dtype=jnp.bfloat16), blocks=blocks)
    assert pairs["out"][0].dtype == pairs["query"][0].dtype == jnp.bfloat16
    assert pairs["state"][0].dtype == jnp.float32
    assert_near({name: pair for name, pair in pairs.items() if name != "gate"}, 5e-3)
    assert_near({"gate": pairs["gate"]}, 1e-2)


def test_unwanted_gradients_of_gates_are_not_computed():
    arguments, _ = operands(1, 64, 2, 2, 7, 11, constant=True)

    def loss(query, gate):
        out, _ = linear_attention(
            query, *arguments[1:3], gate, None, arguments[4], scale=1.0, platform="interpret", blocks=SMALL
        )
        return jnp.sum(out)

    text = {which: str(jax.make_jaxpr(jax.grad(loss, which))(arguments[0], arguments[3])) for which in (0, 1)}
    assert len(text[0]) < len(text[1])


def test_what_the_kernel_does_not_do():
    with pytest.raises(NotImplementedError, match="state of 4096 x 4096 does not fit"):
        tiling.check(4096, 4096, jnp.bfloat16, None)
    with pytest.raises(NotImplementedError, match="at most 128 channels in float32, not 256 and 3"):
        programs.check(256, 3, jnp.dtype(jnp.float32))
    with pytest.raises(ValueError, match=r"blocks.chunk: expected a power of two from 8, got 24"):
        tiling.check(8, 8, jnp.bfloat16, dataclasses.replace(SMALL, chunk=24))


@pytest.mark.parametrize(("heads", "width", "cores"), [(8, 128, 1), (8, 128, 2), (24, 64, 1), (3, 80, 1), (5, 33, 2)])
def test_the_cut_is_whole_tiles_of_lanes(heads, width, cores):
    cut = tiling.choose(1, 8192, heads, 1, width, width, jnp.bfloat16, cores=cores)
    assert heads % cut.heads == 0
    assert cut.heads == heads or cut.heads * width % tiling.LANES == 0
    if (heads, width) == (8, 128):
        assert cut.heads == 8 // cores


def test_sums_in_parts_are_exact():
    gate = jnp.where(jnp.arange(128) % 2 == 0, -20.0, -1e-3)[None, :, None]
    coarse, fine = np.asarray(gates.sums(gate, 128, 128, 1, jnp.float32), np.float64)[0, 0]
    exact = np.cumsum(np.asarray(gate, np.float64)[0, :, 0])
    assert np.abs(np.diff(coarse) + np.diff(fine) - np.diff(exact)).max() < 1e-7
    assert np.abs(np.diff(np.cumsum(np.asarray(gate)[0, :, 0])) - np.diff(exact)).max() > 1e-5
