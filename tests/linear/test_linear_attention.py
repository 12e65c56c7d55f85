"""`linear_attention` against a dense float64 formula, and the laws that hold between its options."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jattn.linear import chunked
from jattn.linear.recurrence import LinearState, linear_attention, linear_attention_step

B, N, K, H, V = 2, 6, 3, 5, 7
FORMS = ("none", "constant", "token", "channel")
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def run(op, *args):
    """`op(*args)`, compiled quickly; arguments may be `None`."""
    return quick_jit(op)(*args)


def make(length: int, form: str = "none", dtype: Any = np.float32, *, key_length: int | None = None, seed: int = 0):
    """query, key, value, log_decay; queries and keys are positive, as a normalised form wants them."""
    rng = np.random.default_rng(seed)
    S = key_length or length
    query, key = (rng.uniform(0.1, 1.0, (B, t, n, H)).astype(dtype) for t, n in ((length, N), (S, K)))
    value = rng.standard_normal((B, S, K, V)).astype(dtype)
    shape = {"none": None, "constant": (K,), "token": (B, S, K), "channel": (B, S, K, H)}[form]
    log_decay = None if shape is None else -rng.exponential(0.3, shape).astype(dtype)
    return query, key, value, log_decay


def make_state(normalize: bool, dtype: Any = np.float32) -> LinearState:
    rng = np.random.default_rng(7)
    S = rng.standard_normal((B, K, H, V)).astype(dtype)
    return LinearState(S, rng.uniform(0.5, 1.5, (B, K, H)).astype(dtype) if normalize else None)


def dense(
    query, key, value, log_decay=None, segment_ids=None, state=None, *, is_causal=True, scale=1.0, normalize=False,
    eps=1e-6, eps_mode="denominator",
):  # fmt: skip
    """The op from its [T, S] weights, every head on its own: weight exp(b_t - b_j), b the running sum of gates."""
    groups = query.shape[2] // key.shape[2]
    if log_decay is None:
        log_decay = jnp.zeros(key.shape[2], key.dtype)
    gates = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    gates = jnp.broadcast_to(gates, key.shape)
    key, value, gates = (jnp.repeat(x, groups, axis=2) for x in (key, value, gates))
    b = jnp.cumsum(gates, axis=1)
    T, S = query.shape[1], key.shape[1]
    allowed = np.ones((1, T, S, 1, 1), bool)
    first = np.ones((1, T, 1, 1), bool)
    last = np.ones((1, S, 1, 1), bool)
    if segment_ids is not None:
        allowed = (segment_ids[:, :, None] == segment_ids[:, None])[..., None, None]
        first, last = ((segment_ids == segment_ids[:, i : i + 1 or None])[..., None, None] for i in (0, -1))
    if is_causal:
        allowed = allowed & np.tri(T, S, dtype=bool)[None, :, :, None, None]
        exponent = b[:, :, None] - b[:, None]
    else:
        exponent = -jnp.abs(b[:, :, None] - b[:, None]) if T == S else jnp.zeros((1, T, S, 1, 1))
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, exponent, 0)), 0)
    scores = scale * jnp.einsum("btnh,bsnh,btsnh->btsn", query, key, jnp.broadcast_to(weights, (B, T, S, N, H)))
    out, total = jnp.einsum("btsn,bsnv->btnv", scores, value), scores.sum(axis=2)
    written = jnp.where(last, jnp.exp(b[:, -1:] - b), 0) * key
    S_end, z_end = jnp.einsum("bsnh,bsnv->bnhv", written, value), written.sum(axis=1)
    if state is not None:
        S0, z0 = (None if x is None else jnp.repeat(x, groups, axis=1) for x in state)
        read = scale * jnp.where(first, jnp.exp(b), 0) * query
        kept = jnp.exp(b[:, -1]) * (first & last)[:, -1]
        out, S_end = out + jnp.einsum("btnh,bnhv->btnv", read, S0), S_end + kept[..., None] * S0
        if normalize:
            total, z_end = total + jnp.einsum("btnh,bnh->btn", read, z0), z_end + kept * z0
    if normalize:
        total += eps if eps_mode == "denominator" else scale * eps * query.sum(axis=-1)
        out = out / total[..., None]
    return out, LinearState(S_end[:, ::groups], z_end[:, ::groups] if normalize else None)


def differentiated(op):
    """Outputs of `op` and the gradients of every argument, for one random cotangent, the same in any dtype."""

    @quick_jit
    def both(*args):
        out, vjp = jax.vjp(op, *args)
        rng = np.random.default_rng(3)
        cotangent = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(jnp.bfloat16).astype(x.dtype), out)
        return out, vjp(cotangent)

    return both


def value_and_gradients(op, *args):
    return differentiated(op)(*args)


def assert_close(got, want, tolerance: float) -> None:
    """Root mean square of the difference over that of `want`, for every leaf."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.isfinite(x).all()
        assert np.sqrt(np.mean((x - y) ** 2)) <= tolerance * (np.sqrt(np.mean(y**2)) + 1e-8)


NORMALIZED = {"normalize": True, "eps": 0.1, "scale": 0.7}
CASES = {
    "one-channel": (("xla",), 1, 8, "channel", {}),
    "one-constant": (("xla",), 1, 8, "constant", NORMALIZED),
    "token-by-z": (("xla", "reference"), 17, 8, "token", NORMALIZED | {"eps_mode": "z"}),
    "none": (("xla", "reference"), 37, 16, "none", {"scale": 0.3}),
    "constant": (("xla", "reference"), 37, 8, "constant", {}),
    "token": (("xla",), 67, None, "token", {}),
    "channel": (("xla", "reference"), 67, 16, "channel", NORMALIZED),
    "blocks-constant": (("xla",), 149, 8, "constant", NORMALIZED | {"eps_mode": "z"}),  # more than one block of chunks
    "blocks-channel": (("xla",), 149, 8, "channel", {}),
}


@pytest.mark.parametrize(("implementations", "length", "chunk", "form", "options"), CASES.values(), ids=CASES)
def test_agrees_with_the_dense_formula(implementations, length, chunk, form, options):
    with jax.enable_x64(True):
        state = make_state(options.get("normalize", False), np.float64)
        args = [x for x in make(length, form, np.float64) if x is not None]
        want = value_and_gradients(lambda state, *args: dense(*args, state=state, **options), state, *args)
        for name in implementations:
            op = functools.partial(
                linear_attention, **options, return_state=True, chunk_size=chunk, implementation=name
            )
            got = value_and_gradients(lambda state, *args, op=op: op(*args, initial_state=state), state, *args)
            assert_close(got, want, 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_bidirectional_agrees_with_the_dense_formula(form):
    with jax.enable_x64(True):
        args = [x for x in make(17, form, np.float64, key_length=23 if form == "none" else None) if x is not None]
        options = {"is_causal": False} | (NORMALIZED if form != "token" else {"scale": 0.4})
        want = value_and_gradients(lambda *args: dense(*args, **options)[0], *args)
        for name in ("xla", "reference")[: 2 if form == "token" else 1]:
            op = functools.partial(linear_attention, **options, chunk_size=8, implementation=name)
            assert_close(value_and_gradients(op, *args), want, 1e-12)


SEGMENTS = np.array([[0] * 5 + [2] * 11 + [3] * 1 + [4] * 20, [1] * 16 + [2] * 16 + [6] * 5])


@pytest.mark.parametrize("form", FORMS)
def test_segments_agree_with_the_dense_formula(form):
    with jax.enable_x64(True):
        args = [x for x in make(37, form, np.float64) if x is not None]
        state = make_state(False, np.float64)

        def every_way(op, state, *args):
            causal = op(*args, segment_ids=SEGMENTS, initial_state=state, return_state=True)
            return causal, op(*args, segment_ids=SEGMENTS, is_causal=False)

        def dense_op(*args, initial_state=None, return_state=False, **options):
            out, state = dense(*args, state=initial_state, **options)
            return (out, state) if return_state else out

        op = functools.partial(linear_attention, chunk_size=8)
        got = value_and_gradients(functools.partial(every_way, op), state, *args)
        assert_close(got, value_and_gradients(functools.partial(every_way, dense_op), state, *args), 1e-12)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_segments_equal_separate_runs(implementation):
    query, key, value, log_decay = make(29, "token")
    state = make_state(True)
    segment_ids = np.array([[0] * 5 + [1] * 12 + [3] * 12, [1] * 12 + [2] * 12 + [6] * 5])
    op = quick_jit(
        functools.partial(
            linear_attention, normalize=True, return_state=True, chunk_size=8, implementation=implementation
        )
    )
    out, end = jax.tree.map(np.asarray, op(query, key, value, log_decay, segment_ids=segment_ids, initial_state=state))
    for row in range(B):
        one = lambda x, row=row: x[row : row + 1]  # noqa: E731
        for number in np.unique(segment_ids[row]):
            tokens = segment_ids[row] == number
            initial = jax.tree.map(lambda x, row=row, first=tokens[0]: x[row : row + 1] * first, state)
            alone, alone_end = op(*(one(x)[:, tokens] for x in (query, key, value, log_decay)), initial_state=initial)
            assert_close(one(out)[:, tokens], alone, 1e-6)
        assert_close(jax.tree.map(one, end), alone_end, 1e-6)


@pytest.mark.parametrize(("implementation", "form"), [*(("xla", form) for form in FORMS), ("reference", "channel")])
def test_any_split_gives_what_the_whole_gives(implementation, form):
    """Halves of equal length, which end within a chunk: one program for both."""
    query, key, value, log_decay = make(26, form)
    op = quick_jit(
        functools.partial(
            linear_attention, normalize=True, return_state=True, chunk_size=8, implementation=implementation
        )
    )
    part = lambda s: [x[:, s] if x is not None and x.ndim > 1 else x for x in (query, key, value, log_decay)]  # noqa: E731
    whole = op(query, key, value, log_decay, initial_state=make_state(True))
    first, state = op(*part(slice(0, 13)), initial_state=make_state(True))
    second, state = op(*part(slice(13, None)), initial_state=state)
    assert_close((np.concatenate([first, second], axis=1), state), whole, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_reverse_is_flip_of_everything(form):
    query, key, value, log_decay = make(37, form)
    flip = lambda x: x[:, ::-1] if x is not None and x.ndim > 1 else x  # noqa: E731
    op = functools.partial(linear_attention, return_state=True, chunk_size=8, initial_state=make_state(False))

    def both(query, key, value, log_decay):
        backward = op(query, key, value, log_decay, segment_ids=SEGMENTS, reverse=True)
        flipped, state = op(*map(flip, (query, key, value, log_decay)), segment_ids=6 - flip(SEGMENTS))
        return backward, (flip(flipped), state)

    assert_close(*run(both, query, key, value, log_decay), 1e-6)


@pytest.mark.parametrize(
    ("form", "options"),
    [("none", {}), ("constant", NORMALIZED), ("token", {}), ("channel", NORMALIZED | {"eps_mode": "z"})],
)
def test_steps_equal_the_whole(form, options):
    query, key, value, log_decay = make(13, form)
    normalize = "normalize" in options
    state = make_state(normalize)
    op = functools.partial(linear_attention, initial_state=state, return_state=True, **options)
    whole = run(op, query, key, value, log_decay)
    per_token = log_decay is not None and log_decay.ndim > 1

    def step(state, token):
        query, key, value, *gate = token
        out, state = linear_attention_step(query, key, value, state, gate[0] if gate else log_decay, **options)
        return state, out

    tokens = [np.moveaxis(x, 1, 0) for x in (query, key, value, *([log_decay] if per_token else []))]
    state, out = run(functools.partial(jax.lax.scan, step), state, tokens)
    assert_close((np.moveaxis(out, 0, 1), state), whole, 1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_padded_token_is_as_if_it_were_not_there(form, is_causal):
    query, key, value, log_decay = make(19, form)
    real = np.arange(19) % 3 != 1
    key[:, ~real], value[:, ~real] = np.nan, np.inf
    mask = np.broadcast_to(real, (B, 1, 1, 19))
    op = functools.partial(linear_attention, is_causal=is_causal, normalize=True, chunk_size=8)
    op = quick_jit(functools.partial(op, return_state=is_causal))
    short = [x[:, real] if x is not None and x.ndim > 1 else x for x in (query, key, value, log_decay)]
    got, want = op(query, key, value, log_decay, mask), op(*short)
    if is_causal:
        (got, state), (want, want_state) = got, want
        assert_close(state, want_state, 1e-6)
    assert_close(np.asarray(got)[:, real], want, 1e-6)


@pytest.mark.parametrize("form", ["constant", "token", "channel"])
def test_strong_gates_stay_exact_in_float32(form):
    """-20 a step, resets and no decay side by side: no overflow, no cancellation, in outputs or gradients."""
    query, key, value, log_decay = make(67, form)
    rng = np.random.default_rng(1)
    log_decay = rng.choice(np.float32([-1e4, -20.0, -0.3, -0.01, 0.0]), log_decay.shape, p=[0.1, 0.2, 0.3, 0.3, 0.1])
    if form == "constant":
        log_decay = np.float32([-1e4, -20.0, -0.01])
    op = functools.partial(linear_attention, return_state=True, chunk_size=16)
    got = value_and_gradients(op, query, key, value, log_decay)
    with jax.enable_x64(True):
        exact = [x.astype(np.float64) for x in (query, key, value, log_decay)]
        assert_close(got, value_and_gradients(dense, *exact), 1e-6)


@pytest.mark.parametrize("form", ["constant", "token", "channel"])
def test_a_gate_of_minus_infinity_counts_as_minus_ten_thousand(form):
    query, key, value, log_decay = make(11, form)
    log_decay[1 if form == "constant" else np.s_[:, 5:9]] = -np.inf
    both = differentiated(linear_attention)
    assert_close(both(query, key, value, log_decay), both(query, key, value, np.maximum(log_decay, -1e4)), 0)


@pytest.mark.parametrize("form", ["constant", "token", "channel"])
def test_bfloat16_operands(form):
    args = make(149, form)
    half = [jnp.asarray(x, jnp.bfloat16) for x in args[:3]]
    op = functools.partial(linear_attention, return_state=True, chunk_size=32)
    out, gradients = value_and_gradients(op, *half, args[3])
    assert out[0].dtype == jnp.bfloat16
    assert out[1].S.dtype == jnp.float32
    with jax.enable_x64(True):
        exact = [np.asarray(x, np.float64) for x in (*half, args[3])]
        if form == "constant":
            exact[3] = np.broadcast_to(exact[3], (B, 149, K))
        want, want_gradients = value_and_gradients(dense, *exact)
        assert_close(out, want, 3e-3)
        assert_close(gradients[:3], want_gradients[:3], 5e-3)
        if form == "constant":  # a sum over all tokens of terms that largely cancel
            terms = np.asarray(want_gradients[3])
            error = np.abs(np.asarray(gradients[3], np.float64) - terms.sum(axis=(0, 1)))
            assert (error <= 3e-3 * np.abs(terms).sum(axis=(0, 1))).all()
        else:
            assert_close(gradients[3], want_gradients[3], 5e-3)


@pytest.mark.parametrize("eps_mode", ["denominator", "z"])
def test_rows_without_any_weight_give_zero(eps_mode):
    query, key, value, _ = make(11)
    key[:, :4] = 0
    query[:, 7] = 0
    op = functools.partial(linear_attention, normalize=True, eps=0.0, eps_mode=eps_mode)
    out, gradients = value_and_gradients(op, query, key, value)
    assert (np.asarray(out)[:, [0, 1, 2, 3, 7]] == 0).all()
    assert (np.abs(np.asarray(out)[:, [4, 10]]) > 0).any(axis=(1, 2, 3)).all()
    assert all(np.isfinite(x).all() for x in gradients)


def test_normalised_weights_sum_to_one():
    query, key, value, log_decay = make(37, "token")
    op = functools.partial(linear_attention, normalize=True, eps=0.0)
    out = run(op, query, key, np.ones_like(value), log_decay)
    np.testing.assert_allclose(out, 1, atol=1e-6)


def test_scale_zero_is_zero_and_none_is_one():
    query, key, value, _ = make(11)
    assert (np.asarray(linear_attention(query, key, value, scale=0.0)) == 0).all()
    assert_close(linear_attention(query, key, value), linear_attention(query, key, value, scale=1), 0)


@pytest.mark.parametrize("form", ["constant", "token", "channel"])
def test_chunk_size_changes_nothing(form):
    args = make(37, form)
    want = run(functools.partial(linear_attention, implementation="reference"), *args)
    for chunk in (1, 256):
        assert_close(run(functools.partial(linear_attention, chunk_size=chunk), *args), want, 1e-6)


def test_transformations():
    args = make(7, "channel")
    every = (0, 1, 2, 3)
    op = functools.partial(linear_attention, normalize=True, chunk_size=2)
    loss = lambda *args: jnp.sum(jnp.sin(op(*args)))  # noqa: E731
    tangents = tuple(np.random.default_rng(2).standard_normal(x.shape).astype(x.dtype) for x in args)
    want = op(*args)
    gradient, forward_of_reverse = run(lambda *args: jax.jvp(jax.grad(loss, every), args, tangents), *args)
    along = lambda *args: jax.jvp(loss, args, tangents)[1]  # noqa: E731
    derivative, reverse_of_forward = run(jax.value_and_grad(along, every), *args)

    batched = run(jax.vmap(op), *(np.stack([x, x[::-1]]) for x in args))
    assert_close(batched[0], want, 1e-6)
    assert_close(run(jax.grad(jax.checkpoint(loss), every), *args), gradient, 1e-6)
    _, scanned = run(lambda *args: jax.lax.scan(lambda _, args: (0, op(*args)), 0, args), *(x[None] for x in args))
    assert_close(scanned[0], want, 1e-6)
    assert_close(derivative, sum(np.vdot(g, t) for g, t in zip(gradient, tangents, strict=True)), 1e-5)
    assert_close(forward_of_reverse, reverse_of_forward, 1e-5)


def test_inside_shard_map_replicated_gates_get_the_whole_gradient():
    query, key, value, log_decay = make(7, "constant")
    state = make_state(False)
    loss = lambda *args: jnp.sum(jnp.sin(linear_attention(*args[:4], initial_state=args[4], chunk_size=4)))  # noqa: E731
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P("data"), P("data"), P("data"), P(), LinearState(P("data"), None))
    sharded = jax.shard_map(lambda *args: jax.lax.psum(loss(*args), "data"), mesh=mesh, in_specs=specs, out_specs=P())
    args = (query, key, value, log_decay, state)
    got = run(jax.grad(sharded, argnums=(0, 1, 2, 3, 4)), *args)
    assert_close(got, run(jax.grad(loss, argnums=(0, 1, 2, 3, 4)), *args), 1e-6)


def test_on_an_explicit_mesh_batch_and_heads_stay_sharded():
    rng = np.random.default_rng(0)
    args = [rng.standard_normal((2, 37, heads, H)).astype(np.float32) for heads in (4, 2, 2)]
    op = functools.partial(linear_attention, segment_ids=SEGMENTS, chunk_size=2)  # more than one block of chunks
    want = run(op, *args)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spec = P("data", None, "tensor")
        out = run(op, *(jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in args))
        assert jax.typeof(out).sharding.spec == P("data", None, "tensor", None)
    assert_close(out, want, 1e-6)


@pytest.mark.parametrize("form", ["constant", "channel"])
def test_memory_is_linear_in_the_length(form):
    def compiled(length):
        shapes = make(length, form)
        loss = lambda *args: jnp.sum(jnp.sin(linear_attention(*args, implementation="xla")))  # noqa: E731
        return quick_jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*shapes).compile()

    programs = {length: compiled(length) for length in (4096, 8192)}
    small, large = (program.memory_analysis().temp_size_in_bytes for program in programs.values())
    assert large <= 2.1 * small
    assert large <= 8 * 4 * B * 8192 * (N * (H + V) + K * (H + V))
    shapes = re.findall(r"f32\[([\d,]+)\]", programs[8192].as_text())
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes]
    assert max(sizes) < 8192 * 8192
    assert max(sizes) < B * N * 8192 * H * V


def test_blocks_hold_few_padded_tokens():
    for length, chunk, width in ((1, 1, 1), (513, 64, 256), (4097, 64, 256), (300, 8, 10**9)):
        blocks, chunks = chunked._partition(length, chunk, width)
        assert length <= blocks * chunks * chunk < length + (blocks + 1) * chunk
        assert chunks == 1 or chunks * chunk * width <= chunked.BLOCK_NUMBERS


def test_numpy_scalars_and_arrays_are_taken():
    query, key, value, log_decay = make(5, "constant")
    assert_close(
        linear_attention(query, key, value, log_decay, scale=np.float32(0.5), chunk_size=np.int64(4)),
        linear_attention(*map(jnp.asarray, (query, key, value, log_decay)), scale=0.5),
        1e-6,
    )


Q, KEY, VALUE, GATE = make(5, "token")
STATE = make_state(False)
BAD = [
    ({"key": KEY[:, :, :2], "value": VALUE[:, :, :2], "query": Q[:, :, :5]}, ValueError, "query: 5 heads"),
    ({"query": Q[..., :3]}, ValueError, r"key: .* with H = 3"),
    ({"query": Q.astype(np.int32)}, TypeError, "query: expected a floating dtype"),
    ({"key": KEY.astype(np.float16)}, TypeError, "key: expected dtype float32"),
    ({"query": Q.tolist()}, TypeError, "query: expected an array, got list"),
    ({"query": Q[:, :4]}, ValueError, "is_causal: .* 4 queries and 5 keys; pass is_causal=False"),
    ({"query": Q[:, :0], "key": KEY[:, :0], "value": VALUE[:, :0]}, ValueError, "dimension T is 0"),
    ({"log_decay": GATE[:, :4]}, ValueError, r"log_decay: expected \[K\] = \(3,\) or .* got \(2, 4, 3\)"),
    ({"log_decay": -GATE}, ValueError, "log_decay: .* at most 0, got positive numbers"),
    ({"log_decay": -0.5}, TypeError, "log_decay: expected an array"),
    ({"mask": np.ones((B, 1, 5, 5), bool)}, ValueError, r"mask: .* honours key padding, a boolean array \[B, 1, 1"),
    ({"mask": np.ones((B, 1, 1, 5))}, ValueError, "mask: expected booleans, got float64"),
    ({"mask": "causal"}, ValueError, "mask: expected an array .* got str"),
    ({"segment_ids": np.zeros((B, 4), int)}, ValueError, "segment_ids: .* with T = 5"),
    ({"segment_ids": np.zeros((B, 5))}, TypeError, "segment_ids: expected an integer dtype"),
    ({"segment_ids": np.array([[0, 1, 1, 0, 0]] * B)}, ValueError, "segment_ids: .* never decrease"),
    ({"initial_state": STATE.S}, TypeError, "initial_state: expected a LinearState"),
    ({"initial_state": LinearState(STATE.S[:, :, :, :2], None)}, ValueError, r"initial_state\.S: .* with V = 7"),
    ({"initial_state": LinearState(STATE.S.astype(np.float16), None)}, TypeError, r"initial_state\.S: .* float32"),
    ({"initial_state": STATE, "normalize": True}, ValueError, r"initial_state\.z: normalize=True needs"),
    ({"initial_state": make_state(True)}, ValueError, r"initial_state\.z: normalize=False has no use"),
    ({"chunk_size": 24}, ValueError, "chunk_size: expected a power of two, got 24; the nearest are 16 and 32"),
    ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1"),
    ({"chunk_size": 8.0}, TypeError, "chunk_size: expected a static integer"),
    ({"eps_mode": "row"}, ValueError, "eps_mode: expected one of 'denominator', 'z'"),
    ({"eps": -1e-6}, ValueError, "eps: expected at least 0"),
    ({"scale": "1"}, TypeError, "scale: expected a Python number"),
    ({"is_causal": False, "reverse": True}, ValueError, "reverse: turns a causal order around"),
    ({"is_causal": False, "log_decay": GATE, "return_state": True}, ValueError, "return_state: .* log_decay no single"),
    ({"is_causal": False, "log_decay": GATE, "query": Q[:, :4]}, ValueError, "log_decay: with is_causal=False"),
    ({"implementation": "fast"}, ValueError, "implementation: expected one of"),
    ({"implementation": "pallas_tpu"}, NotImplementedError, "linear_attention runs on tpu, and this is cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_errors_name_the_argument(changes, error, message):
    args = {"query": Q, "key": KEY, "value": VALUE} | changes
    with pytest.raises(error, match=message):
        linear_attention(**args)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state": None}, TypeError, "state: expected a LinearState, got None"),
        ({"state": LinearState(STATE.S[:1], None)}, ValueError, r"state\.S: .* with B = 2"),
        ({"log_decay": GATE}, ValueError, r"log_decay: expected \[K\] = \(3,\) or \[B, K\] = \(2, 3\)"),
        ({"normalize": True}, ValueError, r"state\.z: normalize=True needs"),
        ({"query": Q}, ValueError, r"query: expected 3 dimensions"),
    ],
)
def test_errors_of_a_step_name_the_argument(changes, error, message):
    args = {"query": Q[:, 0], "key": KEY[:, 0], "value": VALUE[:, 0], "state": STATE} | changes
    with pytest.raises(error, match=message):
        linear_attention_step(**args)
