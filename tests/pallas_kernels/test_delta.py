"""The kernels of the delta rule, interpreted, against the recurrence token by token: values, states, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import explain
from jattn.linear.arguments import LinearState
from jattn.linear.delta_rule import delta_rule as op
from jattn.linear.delta_rule import token_scan
from pallas_kernels.linear import channel_delta_gpu, delta, delta_gpu, delta_rule, solve, tiling, walk
from pallas_kernels.linear.programs import Blocks
from pallas_kernels.linear.tiling import Tiling

# A call of the same sizes, gates and cut runs what another test has compiled.
RAGGED = (2, 37, 3, 3, 3, 7, 5)
SEGMENTS = np.repeat([[3, 4, 9], [0, 1, 7]], [5, 19, 13], axis=1)
TWO_CHUNKS = (1, 150, 1, 1, 1, 16, 8)
SMALL = Tiling(chunk=16, chunks=2, heads=1, lag=1, times=2)
ON_GPU = Blocks(chunk=16, tile=8, value_tile=8)
NAMES = ("out", "end", "query", "key", "value", "beta", "gate", "initial")

each_kernel = pytest.mark.parametrize("blocks", [SMALL, ON_GPU], ids=["tpu", "gpu"])
each_chosen_cut = pytest.mark.parametrize("blocks", [None, delta_gpu.choose(jnp.bfloat16)], ids=["tpu", "gpu"])


def operands(sizes, *, constant=False, channel=False, dtype=jnp.float32, decay=1.0, alike=0.0):
    """Keys of length 1; with `alike`, so much of every key is the same."""
    batch, length, heads, kv_heads, states, width, value_width = sizes
    keys = jax.random.split(jax.random.key(0), 9)
    normal = jax.random.normal

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    query = unit(normal(keys[0], (batch, length, heads, width))).astype(dtype)
    common = unit(normal(keys[8], (width,)))
    key = unit(alike * common + (1 - alike) * unit(normal(keys[1], (batch, length, kv_heads, width)))).astype(dtype)
    value = normal(keys[2], (batch, length, states, value_width)).astype(dtype)
    beta = jax.random.uniform(keys[3], (batch, length, states), maxval=2.0 if alike == 0 else 1.0)
    shape = (states,) if constant else (batch, length, states, width) if channel else (batch, length, states)
    gate = -decay * jax.random.uniform(keys[4], shape)
    state = normal(keys[5], (batch, states, width, value_width))
    out = (batch, length, max(heads, states), value_width)
    cotangents = normal(keys[6], out).astype(dtype), normal(keys[7], state.shape)
    return (query, key, value, beta, gate, state), cotangents


def gradients_of(function, arguments, cotangents):
    out, transpose = jax.vjp(function, *arguments)
    return *out, *transpose(cotangents)


def named(results):
    return dict(zip(NAMES, (np.asarray(x, np.float64) for x in results), strict=True))


@jax.jit
def recurrence(arguments, cotangents, segment_ids):
    def definition(query, key, value, beta, gate, state):
        options = {"scale": 0.7, "chunk_size": None, "out_dtype": query.dtype}
        return token_scan(query, key, value, beta, gate, segment_ids, state, **options)

    return gradients_of(definition, arguments, cotangents)


def reference(arguments, cotangents, segment_ids=None):
    """The recurrence in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (arguments, cotangents))
        return named(recurrence(*wide, segment_ids))


def errors(arguments, cotangents, segment_ids=None, blocks=None):
    """RMS of the difference over RMS of the definition, for outputs and gradients; `blocks` say of which kernel."""
    platform = "interpret_gpu" if isinstance(blocks, Blocks) else "interpret"

    def fused(query, key, value, beta, gate, state):
        gates = (gate, segment_ids, state)
        return delta_rule(query, key, value, beta, *gates, scale=0.7, platform=platform, blocks=blocks)

    got = named(gradients_of(fused, arguments, cotangents))
    want = reference(arguments, cotangents, segment_ids)
    return {name: np.sqrt(np.mean((got[name] - want[name]) ** 2) / np.mean(want[name] ** 2)) for name in NAMES}


@pytest.mark.parametrize(
    ("sizes", "constant", "blocks"),
    [
        (RAGGED, False, SMALL),
        (RAGGED, True, SMALL),
        ((1, 64, 2, 2, 2, 7, 5), True, SMALL),
        ((1, 53, 6, 3, 3, 5, 19), False, Tiling(16, 2, 3, 1)),
        ((2, 37, 2, 2, 4, 7, 5), False, Tiling(16, 2, 2, 1)),
        (RAGGED, False, ON_GPU),
        (RAGGED, True, ON_GPU),
        ((1, 53, 6, 3, 3, 5, 19), False, ON_GPU),
        ((2, 37, 2, 2, 4, 7, 5), False, ON_GPU),
    ],
    ids=(
        *("ragged", "constant and ragged", "constant, in tables", "grouped", "more values than keys"),
        *("gpu, ragged", "gpu, constant", "gpu, grouped", "gpu, more values than keys"),
    ),
)
def test_values_and_gradients_are_the_definition(sizes, constant, blocks):
    for name, error in errors(*operands(sizes, constant=constant), blocks=blocks).items():
        assert error < 1e-5, name


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        (RAGGED, SMALL),
        ((2, 37, 2, 2, 4, 7, 5), Tiling(16, 2, 2, 1)),
        ((1, 100, 1, 1, 1, 16, 8), None),
        (RAGGED, ON_GPU),
        ((2, 37, 2, 2, 4, 37, 19), ON_GPU),
        ((1, 32, 4, 2, 2, 32, 16), ON_GPU),
    ],
    ids=(
        *("ragged", "more values than keys", "chosen"),
        *("gpu, ragged", "gpu, more values than keys", "gpu, grouped and whole tiles"),
    ),
)
def test_gates_of_channels(sizes, blocks):
    """On TPU grouped heads are in `test_channel_decays`."""
    for name, error in errors(*operands(sizes, channel=True), blocks=blocks).items():
        assert error < 1e-5, name


@each_kernel
def test_gates_of_channels_in_segments_and_strong(blocks):
    arguments, cotangents = operands(RAGGED, channel=True)
    strong = jax.random.bernoulli(jax.random.key(1), 0.5, arguments[4].shape)
    gate = jnp.where(strong, -20.0, arguments[4] * 1e-2)
    arguments = (*arguments[:4], gate, arguments[5])
    for name, error in errors(arguments, cotangents, segment_ids=SEGMENTS, blocks=blocks).items():
        assert error < 1e-5, name


@pytest.mark.parametrize("blocks", [Tiling(32, 2, 1, 1), channel_delta_gpu.choose(jnp.bfloat16)], ids=["tpu", "gpu"])
def test_gates_of_channels_with_bfloat16(blocks):
    found = errors(*operands((1, 61, 2, 2, 2, 32, 32), channel=True, dtype=jnp.bfloat16), blocks=blocks)
    for name, error in found.items():
        assert error < (1e-2 if name in ("gate", "beta") else 5e-3), name


def test_gates_of_channels_on_gpu_with_the_chosen_cut_and_keys_that_are_nearly_alike():
    arguments = operands((1, 131, 1, 1, 1, 16, 8), channel=True, alike=0.8, decay=0.01)
    for name, error in errors(*arguments, blocks=channel_delta_gpu.choose(jnp.float32)).items():
        assert error < 1e-5, name


@each_chosen_cut
def test_the_chosen_cut_is_the_definition(blocks):
    for name, error in errors(*operands(TWO_CHUNKS), blocks=blocks).items():
        assert error < 1e-5, name


@each_kernel
def test_segments_are_sequences_of_their_own(blocks):
    for name, error in errors(*operands(RAGGED), segment_ids=SEGMENTS, blocks=blocks).items():
        assert error < 1e-5, name


@each_kernel
def test_gates_that_forget_all_are_finite_and_right(blocks):
    for name, error in errors(*operands(RAGGED, decay=20.0), blocks=blocks).items():
        # A gate of -20 has a gradient near 1e-9 of others, left over from sums of others.
        assert error < (2e-5 if name == "gate" else 1e-5), name


@each_chosen_cut
def test_keys_that_are_nearly_alike(blocks):
    """The triangular system is then far from the identity: entries of its powers reach 1e5."""
    for name, error in errors(*operands(TWO_CHUNKS, alike=0.8, decay=0.01), blocks=blocks).items():
        assert error < 1e-5, name


@each_chosen_cut
def test_one_key_whose_value_is_mirrored_by_every_token(blocks):
    (query, key, value, beta, gate, state), cotangents = operands(TWO_CHUNKS, alike=1.0)
    arguments = query, key, value, jnp.full_like(beta, 2), 1e-3 * gate, state
    for name, error in errors(arguments, cotangents, blocks=blocks).items():
        # Nothing is ever forgotten, and entries of the inverse are 2 and -2: a sum of 128 products of two of them is 2,
        # and rounds 1.5e-5 of that, in each of four joins.
        assert error < 4 * 128 * 2.0**-23, name


@each_chosen_cut
def test_bfloat16_operands(blocks):
    """Single products of bfloat16 round by 2 ** -9; gates and beta gather the errors of several."""
    found = errors(*operands((1, 128, 2, 2, 2, 32, 32), dtype=jnp.bfloat16), blocks=blocks)
    for name, error in found.items():
        assert error < (1e-2 if name in ("gate", "beta") else 5e-3), name


@pytest.mark.parametrize("channel", [False, True])
def test_what_a_gpu_keeps_for_the_backward_pass_is_the_arguments(channel):
    arguments, _ = operands((1, 150, 2, 2, 2, 16, 8), channel=channel)

    def kept(*arguments):
        def fused(query, key, value, beta, gate, state):
            return delta_rule(query, key, value, beta, gate, None, state, scale=0.7, platform="interpret_gpu")

        return jax.vjp(fused, *arguments)[1]

    assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(kept, *arguments))) <= sum(x.size for x in arguments)


def test_gates_that_want_no_gradient_cost_none():
    arguments, cotangents = operands(RAGGED)

    def loss(*trained):
        out, end = delta_rule(
            *trained[:4], arguments[4], None, trained[4], scale=0.7, platform="interpret", blocks=SMALL
        )
        return jnp.sum(out * cotangents[0]) + jnp.sum(end * cotangents[1])

    trained = (*arguments[:4], arguments[5])
    gradients = jax.grad(loss, argnums=range(5))(*trained)
    want = reference(arguments, cotangents)
    for got, name in zip(gradients, ("query", "key", "value", "beta", "initial"), strict=True):
        np.testing.assert_allclose(got, want[name], rtol=2e-4, atol=1e-5)


def test_the_op_chooses_the_kernel_of_a_platform():
    (query, key, value, *_), _ = operands((1, 21, 2, 2, 4, 7, 5))
    (decision,) = explain(op, query, key, value)
    assert decision.chosen == {"cpu": "xla", "tpu": "pallas_tpu", "cuda": "pallas_gpu"}
    (decision,) = explain(op, query, key, value, log_decay=jnp.zeros((*value.shape[:3], query.shape[-1])))
    assert decision.chosen == {"cpu": "xla", "tpu": "pallas_tpu", "cuda": "pallas_gpu"}


def test_the_op_on_the_kernel():
    """Padding, reverse order and the default gates are made outside of the kernel."""
    (query, key, value, beta, _, state), _ = operands((2, 21, 2, 2, 4, 7, 5))
    mask = (jnp.arange(21) < jnp.asarray([[21], [13]]))[:, None, None]
    options = {"mask": mask, "reverse": True, "initial_state": LinearState(state, None), "return_state": True}
    got, want = (op(query, key, value, beta, **options, implementation=name) for name in ("interpret", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_the_inverse_of_a_triangle(chunk):
    lower = np.tril(np.random.default_rng(0).uniform(-1, 1, (chunk, chunk)), -1).astype(np.float32) / 4

    @jax.jit
    def inverse_of(lower):
        found = []

        def solved():
            found.append((yield from solve.unit_lower_inverse(lower, jnp.float32)))

        walk.lockstep([solved()])
        return found[0]

    inverse = inverse_of(lower)
    exact = np.linalg.inv(np.eye(chunk) + lower.astype(np.float64))
    assert np.abs(inverse - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("chunk", [8, 16, 64, 128])
def test_the_inverses_of_two_triangles(chunk, count):
    """What stands at and above the diagonal is not read, whichever of the two is mirrored."""
    given = np.random.default_rng(0).uniform(-1, 1, (3, chunk, chunk)).astype(np.float32)
    triangles, x = np.tril(given[:count], -1) / 4, given[2]
    others = np.triu(given[:count] + 1e3)

    @jax.jit
    def products_of(lowers):
        found = []

        def solved():
            inverses = yield from solve.unit_lower_inverses(list(lowers), jnp.float32)
            found.extend((inverse.times(x), inverse.times(x, (0, 0))) for inverse in inverses)

        walk.lockstep([solved()])
        return found

    exact = np.linalg.inv(np.eye(chunk) + triangles.astype(np.float64))
    for products, inverse in zip(products_of(triangles + others), exact, strict=True):
        for got, want in zip(products, (inverse @ x, inverse.T @ x), strict=True):
            assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.float16}, "bfloat16 and float32, not float16"),
        ({"heads": (4, 1, 2)}, "shares a state among queries or a key among states, not both"),
        ({"width": 4096}, "does not fit the kernel's 64 MiB; heads of 1024 x 1024 do"),
        ({"width": 256, "platform": "gpu"}, "at most 128 channels in float32, not 256 and 256"),
    ],
)
def test_what_the_kernel_does_not_do(change, message):
    width, dtype = change.get("width", 4), change.get("query", np.float32)
    operands = [jax.ShapeDtypeStruct((1, 8, heads, width), dtype) for heads in change.get("heads", (1, 1, 1))]
    gates = jax.ShapeDtypeStruct(change.get("gates", (1, 8, 1)), np.float32)
    with pytest.raises(NotImplementedError, match=message):
        delta.check(*operands, gates, platform=change.get("platform", "tpu"))


def test_a_cut_keeps_the_states_of_a_key_head_together():
    assert tiling.choose(1, 256, 8, 1, 128, 128, jnp.bfloat16, shared=4, cores=1).heads % 4 == 0
