"""The routing mixer: its two kinds of heads, decoding, and means that move when they are told to."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jattn.nn import RoutingMixer, RoutingState, SlidingWindowMixer
from jattn.sparse.kmeans import KMeansState, kmeans_update
from jattn.sparse.routing import routing_attention

B, T, D = 2, 13, 10
HEADS: dict[str, Any] = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 6, "routed_heads": 4}
SMALL: dict[str, Any] = {"num_clusters": 3, "window_size": 4, "window": 5}
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
MASK = np.arange(T) < np.array([T - 4, 3])[:, None]


@functools.cache
def made(**options: Any) -> RoutingMixer:
    """A mixer of which no weight is where it starts; output projections would hide everything."""
    mixer = RoutingMixer(D, **{**HEADS, **SMALL, **options}, layer_index=1, num_layers=3, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    state = nnx.state(mixer, nnx.Param)
    nnx.update(mixer, jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(leaf.dtype), state))
    return mixer


@pytest.fixture
def mixer() -> RoutingMixer:
    return nnx.clone(made())


@pytest.fixture
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)


@nnx.jit
def apply(mixer: Any, x: Any, positions: Any, state: Any = None) -> Any:
    return mixer(x, positions=positions, state=state)


def by_pieces(mixer: RoutingMixer, x: Any, cuts: tuple[int, ...]) -> tuple[Any, Any]:
    state, pieces = mixer.init_state(B, x.shape[1], jnp.float32), []
    for first, last in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        y, state = apply(mixer, x[:, first:last], POSITIONS[:, first:last], state)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
        pieces.append(y)
    return jnp.concatenate(pieces, axis=1), state


def assert_near(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def test_a_mixer_is_the_op_of_its_routed_heads_and_a_window(mixer, x):
    query = (x @ mixer.query.kernel[...]).reshape(B, T, 4, 6)
    value = (x @ mixer.value.kernel[...]).reshape(B, T, 2, 6)
    out = routing_attention(
        query, None, value, mixer.means[...], window_size=4, variant="google", is_causal=True, share_qk=True
    )
    assert isinstance(mixer.local, SlidingWindowMixer)
    assert (mixer.local.projections.num_heads, mixer.local.projections.num_kv_heads, mixer.local.window) == (2, 1, 5)
    near, _ = mixer.local(x, positions=POSITIONS)
    got, none = apply(mixer, x, POSITIONS)
    assert none is None
    assert_near(got, out.reshape(B, T, -1) @ mixer.out.kernel[...] + near)


def test_half_of_the_heads_route_unless_told_and_all_may(x):
    assert RoutingMixer(D, num_heads=5, rngs=nnx.Rngs(0)).routed_heads == 2
    assert RoutingMixer(12, num_heads=6, num_kv_heads=3, rngs=nnx.Rngs(0)).routed_heads == 2
    every = made(routed_heads=6)
    assert every.local is None
    whole, _ = apply(every, x, POSITIONS)
    assert whole.shape == x.shape
    assert by_pieces(every, x, (4,))[1].local is None


def test_a_new_layer_passes_its_input_through(x):
    mixer = RoutingMixer(D, **HEADS, **SMALL, rngs=nnx.Rngs(0))
    assert not np.any(apply(mixer, x, POSITIONS)[0])


def test_decoding_is_the_last_row_of_every_prefix_however_it_is_cut(mixer, x):
    got, _ = by_pieces(mixer, x, tuple(range(1, T)))
    assert_near(by_pieces(mixer, x, (5, 6))[0], got)
    for t in (8, T - 1):
        whole, _ = apply(mixer, x[:, : t + 1], POSITIONS[:, : t + 1])
        assert_near(got[:, t], whole[:, t])


def test_decoding_is_the_parallel_form_only_where_clusters_hold_all(x):
    for window, agrees in ((T, True), (4, False)):
        mixer = made(window_size=window)
        error = np.abs(by_pieces(mixer, x, ())[0] - apply(mixer, x, POSITIONS)[0]).max()
        assert (error < 2e-5) == agrees
        assert agrees or error > 0.1


@pytest.mark.parametrize("from_nothing", [False, True])
def test_is_causal_by_gradient(mixer, x, from_nothing):
    state = mixer.init_state(B, T, jnp.float32) if from_nothing else None
    gradient = nnx.jit(nnx.grad(lambda x, mixer: mixer(x, positions=POSITIONS, state=state)[0][:, 7].sum()))(x, mixer)
    assert not np.any(gradient[:, 8:])
    assert np.all(np.any(gradient[:, 5:8], axis=(0, 2)))


def test_means_are_no_parameters_and_get_no_gradient(mixer, x):
    kinds = {path[0]: type(leaf) for path, leaf in nnx.to_flat_state(nnx.state(mixer, RoutingState))}
    assert set(kinds) == {"means", "counts", "totals"}
    assert not {"means", "counts", "totals"} & {path[0] for path, _ in nnx.to_flat_state(nnx.state(mixer, nnx.Param))}

    def loss(mixer: RoutingMixer) -> Any:
        y, aux = mixer.with_aux(x, positions=POSITIONS)
        return jnp.sum(y**2) + aux.loss

    gradient = nnx.jit(nnx.grad(loss))(mixer)
    paths = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(gradient)}
    assert "means" not in " ".join(paths)
    assert {"query/kernel", "value/kernel", "out/kernel", "local/projections/key/kernel"} <= set(paths)
    assert all(np.any(leaf[...]) for leaf in paths.values())


def test_the_loss_pulls_queries_to_their_means(x):
    mixer = nnx.clone(made(commitment=0.5))

    def loss(mixer: RoutingMixer) -> Any:
        return mixer.with_aux(x, positions=POSITIONS)[1].loss

    value, gradient = nnx.jit(nnx.value_and_grad(loss))(mixer)
    assert value > 0
    assert np.any(gradient.query.kernel[...])
    assert not np.any(gradient.out.kernel[...])
    mixer.query.kernel[...] -= 0.5 * gradient.query.kernel[...]
    assert loss(mixer) < 0.99 * value


def test_means_move_when_they_are_told_to(mixer, x):
    before = jax.tree.map(np.asarray, mixer.kmeans_state())
    apply(mixer, x, POSITIONS)
    jax.tree.map(np.testing.assert_array_equal, tuple(mixer.kmeans_state()), tuple(before))
    query = (x @ mixer.query.kernel[...]).reshape(B, T, 4, 6)
    want = kmeans_update(KMeansState(*before), query, decay=0.999, mask=MASK)
    got = nnx.jit(lambda mixer, x: mixer.updated_means(x, mask=MASK))(mixer, x)
    jax.tree.map(assert_near, tuple(got), tuple(want))
    np.testing.assert_array_equal(mixer.means[...], before.means)
    nnx.jit(lambda mixer, x: mixer.update_means(x, mask=MASK))(mixer, x)
    jax.tree.map(assert_near, tuple(mixer.kmeans_state()), tuple(want))
    assert np.all(np.any(mixer.means[...] != before.means, axis=-1))
    assert mixer.counts[...].sum() > before.counts.sum()


def test_an_update_over_devices_is_that_of_the_whole_batch(mixer, x):
    x = jnp.concatenate([x, x[:, ::-1] ** 2])
    want = mixer.updated_means(x)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    graph, state = nnx.split(mixer)

    def update(state: Any, x: Any) -> Any:
        return nnx.merge(graph, state).updated_means(x, axis_name="data")

    sharded = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    jax.tree.map(assert_near, tuple(sharded(state, x)), tuple(want))


def test_masked_tokens_are_seen_by_no_head(mixer, x):
    real = MASK[:, ::-1]  # padding comes first, where causal heads would see it

    @nnx.jit
    def run(mixer: RoutingMixer, x: Any) -> Any:
        return mixer.with_aux(x, positions=POSITIONS, mask=jnp.asarray(real))

    y, aux = run(mixer, x)
    spoilt, other = run(mixer, jnp.where(real[..., None], x, -7.0))
    np.testing.assert_array_equal(y[real], spoilt[real])
    assert aux.loss == other.loss
    assert not np.any(aux.clusters[~real])
    assert not np.array_equal(y[real], mixer.with_aux(x, positions=POSITIONS)[0][real])


def test_bfloat16_stays_near_float32(mixer, x):
    # Queries rounded to eight bits may change places; in clusters that hold all there are none to change.
    mixer = made(window_size=T)
    wide, _ = apply(mixer, x, POSITIONS)
    narrow = RoutingMixer(D, **{**HEADS, **SMALL, "window_size": T}, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(narrow, nnx.state(mixer))
    got, _ = apply(narrow, x.astype(jnp.bfloat16), POSITIONS)
    assert got.dtype == jnp.bfloat16
    assert np.sqrt(np.mean((got - wide) ** 2)) < 0.03 * np.sqrt(np.mean(wide**2))
    assert narrow.means[...].dtype == jnp.float32
    assert narrow.init_state(1, 3, jnp.bfloat16).routed.scores.dtype == jnp.float32


def test_flops_are_linear_in_rows_and_count_clusters(mixer):
    assert mixer.flops(3, 64) == pytest.approx(3 * mixer.flops(1, 64))
    linear = 2 * 64 * D * (24 + 12 + 24)
    routed = 4 * 6 * 3 * (2 * 64 + 2 * 4**2)
    assert mixer.flops(1, 64) == linear + routed + mixer.local.flops(1, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4, "head_dim": None, "num_kv_heads": None}, "num_heads: a width of 10 does not divide by 4"),
        ({"num_kv_heads": 4}, "6 heads cannot be shared by 4"),
        ({"routed_heads": 3}, "routed_heads: expected at most 6 and a multiple of the 2 heads that share"),
        ({"routed_heads": 8}, "routed_heads: expected at most 6"),
        ({"routed_heads": 0}, "routed_heads: expected at least 1, got 0"),
        ({"num_clusters": 0}, "num_clusters: expected at least 1, got 0"),
        ({"window_size": 0}, "window_size: expected at least 1, got 0"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"init_count": 3}, "init_count: expected one of 0, 1, got 3"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=message):
        RoutingMixer(D, **{**HEADS, **SMALL, **options}, rngs=nnx.Rngs(0))


def test_packed_rows_are_refused(mixer, x):
    with pytest.raises(ValueError, match=r"^segment_ids: clusters are of a whole row"):
        mixer(x, positions=POSITIONS, segment_ids=jnp.ones((B, T), jnp.int32))
