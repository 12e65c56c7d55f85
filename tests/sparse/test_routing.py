"""Routing attention: against loops in NumPy, where it is dense attention, and what must hold of clusters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import catalog
from jattn.dot_product import dot_product_attention
from jattn.sparse.kmeans import KMeansState, directions, kmeans_init_lloyd, kmeans_update
from jattn.sparse.routing import routing_attention
from jattn.sparse.sliding_window import sliding_window_attention

B, T, N, K, C, W, H, V, M = 2, 13, 6, 3, 4, 5, 7, 11, 2
# Most of the time here is LLVM's; what it would optimise away is not what is tested.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SHARED: dict[str, Any] = {"share_qk": True, "window_size": W}


def operands(dtype: Any = np.float64, kv_len: int = T, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"query": (B, T, N, H), "key": (B, kv_len, K, H), "value": (B, kv_len, K, V), "means": (N, C, H)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def shared(x: dict[str, Any]) -> dict[str, Any]:
    return {**x, "key": None}


def memory(dtype: Any = np.float64) -> dict[str, Any]:
    rng = np.random.default_rng(9)
    return {name: rng.standard_normal((N, C, M, d)).astype(dtype) for name, d in (("mem_key", H), ("mem_value", V))}


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=tolerance), got, want)


def assert_same_bits(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def as_the_authors_do(x: dict[str, Any], window: int, is_causal: bool) -> np.ndarray:
    """The "google" definition by loops: the best w of a cluster, sorted; a triangle in ranks; sums over counts + 0.01.

    Causal means queries for keys.
    """
    query, value = x["query"], x["value"]
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for b, n in np.ndindex(len(query), query.shape[2]):
        kv = n * value.shape[2] // query.shape[2]
        q = layer_norm(query[b, :, n])
        k = q if x["key"] is None else layer_norm(x["key"][b, :, kv])
        counts = np.full(len(q), 0.01)
        for mean in x["means"][n]:
            q_list, k_list = (np.sort(np.argsort(-(a @ mean), kind="stable")[:window]) for a in (q, k))
            logits = q[q_list] @ k[k_list].T
            if is_causal:
                logits[np.triu_indices(len(q_list), 1)] = -1e9
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, q_list, n] += weights / weights.sum(-1, keepdims=True) @ value[b, k_list, kv]
            counts[q_list] += 1
        out[b, :, n] /= counts[:, None]
    return out


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("window", "is_shared", "kv_len"), [(W, True, T), (T + 4, True, T), (W, False, 17)])
def test_google_is_what_the_authors_loops_give(implementation, window, is_shared, kv_len):
    with jax.enable_x64(True):
        x = operands(kv_len=kv_len)
        x = shared(x) if is_shared else x
        got = routing_attention(
            **x, window_size=window, is_causal=is_shared, share_qk=is_shared, implementation=implementation
        )
        assert_close(got, as_the_authors_do(x, window, is_shared), 1e-12)


MASK = np.arange(T) < np.array([T - 4, 3])[:, None]


def test_one_cluster_of_everything_is_dense_attention():
    x = operands(np.float32)
    x["means"] = x["means"][:, :1]
    got = routing_attention(**x, window_size=T, variant="lucid")
    assert_close(got, dot_product_attention(x["query"], x["key"], x["value"]) / (1 + 1e-5), 1e-6)
    got = routing_attention(**shared(x), window_size=T, is_causal=True, share_qk=True)
    normal, value = layer_norm(x["query"]), np.repeat(x["value"], N // K, axis=2)
    dense = dot_product_attention(normal, normal, value, is_causal=True, scale=1.0)
    assert_close(got, dense / 1.01, 1e-6)


@pytest.mark.parametrize("variant", ["google", "lucid"])
@pytest.mark.parametrize("window", [W, T + 20])
def test_every_cluster_has_its_number_of_members(variant, window):
    x = operands(np.float32, kv_len=17)
    _, aux = routing_attention(**x, window_size=window, variant=variant, context_window_size=3, return_aux=True)
    assert aux.query_members.shape == (B, N, C, min(window, T))
    assert aux.key_members.shape == (B, N, C, 3)
    assert all(len(set(row)) == len(row) for row in np.asarray(aux.query_members).reshape(-1, min(window, T)).tolist())
    assert np.all(np.sum(aux.clusters, axis=1) == C * min(window, T))
    counts = np.zeros((B, T, N), int)
    np.add.at(counts, _where(aux.query_members), 1)
    assert_same_bits(aux.clusters, counts)
    in_order = np.all(np.diff(aux.query_members, axis=-1) > 0)
    assert in_order == (variant == "google")


def _where(members: Any) -> tuple[np.ndarray, ...]:
    """Indices `[B, T, N]` of the members."""
    row, head = np.arange(B)[:, None, None, None], np.arange(N)[None, :, None, None]
    return tuple(np.broadcast_arrays(row, members, head))


def test_the_earliest_of_equals_are_members():
    x = operands(np.float32)
    x["query"] = np.ones_like(x["query"]) * np.arange(H, dtype=np.float32)
    for variant in ("google", "lucid"):
        out, aux = routing_attention(**shared(x), **SHARED, variant=variant, return_aux=True)
        assert np.all(aux.query_members == np.arange(W))
        assert np.all(aux.clusters == C * (np.arange(T) < W)[:, None])
        assert not np.any(out[:, W:])
        assert np.all(np.any(out[:, :W], axis=-1))


@pytest.mark.parametrize("variant", ["google", "lucid"])
def test_routing_knows_directions_only(variant):
    x = operands(np.float32)
    route = functools.partial(routing_attention, **SHARED, variant=variant, return_aux=True)
    _, want = route(**shared(x))
    lengths = np.random.default_rng(3).uniform(1, 9, (B, T, N, 1)).astype(np.float32)
    _, got = route(**shared({**x, "query": lengths * x["query"]}))
    assert_same_bits(got[1:], want[1:])
    _, other = route(**shared({**x, "query": -x["query"]}))
    assert not np.array_equal(other.query_members, want.query_members)


@pytest.mark.parametrize("variant", ["google", "lucid"])
def test_no_output_depends_on_a_later_value_but_clusters_do_on_later_tokens(variant):
    x = shared(operands(np.float32))
    op = functools.partial(routing_attention, **SHARED, variant=variant, is_causal=True)
    want = op(**x)
    for j in (0, 5, T - 2):
        got = op(**{**x, "value": np.where(np.arange(T)[:, None, None] == j, np.float32(7), x["value"])})
        assert_same_bits(got[:, :j], want[:, :j])
        assert not np.array_equal(got[:, j:], want[:, j:])
    # The last token turned round takes places of others or leaves them its own: the mismatch of training and decoding.
    got = op(**{**x, "query": np.concatenate([x["query"][:, :-1], -x["query"][:, -1:]], axis=1)})
    assert not np.array_equal(got[:, :-1], want[:, :-1])


def test_no_gradient_comes_from_the_future_where_ranks_are_compared():
    op = functools.partial(routing_attention, **SHARED, is_causal=True)
    row = quick_jit(jax.grad(lambda x, t: jnp.sum(jnp.sin(op(**x)[:, t]))))
    for t in (0, 6, T - 1):
        gradient = row(shared(operands(np.float32)), t)
        for name in ("query", "value"):
            assert not np.any(gradient[name][:, t + 1 :])
            assert np.any(gradient[name][:, t]) == (name == "value" or t > 0)


def test_a_token_sees_itself_only_where_there_is_nothing_else():
    x = shared(operands(np.float32))
    x["value"] = np.broadcast_to(np.eye(T, V + 2, dtype=np.float32)[None, :, None], (B, T, K, T))
    for is_causal in (False, True):
        out, aux = routing_attention(**x, **SHARED, variant="lucid", is_causal=is_causal, return_aux=True)
        own = np.asarray(out)[:, np.arange(T), :, np.arange(T)].swapaxes(0, 1) * aux.clusters
        # Causal: it is alone in as many clusters as it is the first of.
        first = np.sum(np.min(aux.query_members, axis=-1)[:, None] == np.arange(T)[:, None, None], axis=-1)
        assert_close(own, first * is_causal * aux.clusters / (aux.clusters + 1e-5), 1e-6)


@pytest.mark.parametrize("variant", ["google", "lucid"])
def test_masked_tokens_are_in_no_cluster_or_only_in_the_way(variant):
    x, weights = operands(np.float32), (~MASK)[..., None, None]
    mask = MASK[:, None, None]
    options = {**SHARED, "variant": variant, "mask": mask, "return_aux": True}
    run = quick_jit(functools.partial(routing_attention, **{**options, "is_causal": True}))
    out, aux = run(**shared(x))
    spoilt = {name: np.where(weights, -77, x[name]).astype(np.float32) for name in ("query", "value")}
    assert_same_bits(run(**shared({**x, **spoilt})), (out, aux))
    assert not np.any(out[~MASK])
    assert not np.any(aux.clusters[~MASK])
    # Three real tokens: in every cluster, and two of its places stay empty.
    assert np.all(aux.clusters[1, :3] == C)
    assert np.all(np.sum(aux.query_members[1] == T, axis=-1) == 2)
    alone = routing_attention(
        **shared({name: a[1:, :3] if name in ("query", "value") else a for name, a in x.items()}),
        **{**options, "mask": None, "is_causal": True},
    )
    assert_close((out[1, :3], aux.clusters[1, :3]), (alone[0][0], alone[1].clusters[0]), 1e-6)
    routed, late = routing_attention(**shared(x), **{**options, "padding": "routed"})
    _, unmasked = routing_attention(**shared(x), **{**options, "mask": None})
    assert_same_bits(late.query_members, unmasked.query_members)
    assert late.loss == unmasked.loss != aux.loss
    assert np.all(np.isfinite(routed))


@pytest.mark.parametrize(("variant", "padding"), [("google", "excluded"), ("lucid", "routed")])
def test_a_row_without_real_keys_gives_zeros_and_no_gradient(variant, padding):
    x = operands(np.float32)
    mask = np.broadcast_to(np.array([True, False])[:, None, None, None], (B, 1, 1, T))

    def loss(x: Any) -> Any:
        out, aux = routing_attention(
            **x, window_size=W, variant=variant, mask=mask, query_mask=mask[:, 0, 0], padding=padding, commitment=0.0,
            return_aux=True,
        )  # fmt: skip
        return jnp.sum(jnp.sin(out)) + aux.loss, out

    gradient, out = quick_jit(jax.grad(loss, has_aux=True))(x)
    assert not np.any(out[1])
    assert np.any(out[0])
    for name in ("query", "key", "value"):
        assert not np.any(gradient[name][1])
        assert np.any(gradient[name][0])


def planted(length: int, clusters: int, width: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of one head near orthogonal directions, in a random order; their clusters, and the directions."""
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.standard_normal((width, width)))[0][:clusters].astype(np.float32)
    which = rng.permutation(np.arange(length) % clusters)
    tokens = centres[which] + noise * rng.standard_normal((length, width)).astype(np.float32) / np.sqrt(width)
    return tokens[None, :, None].astype(np.float32), which, centres[None]


@pytest.mark.parametrize("variant", ["google", "lucid"])
def test_planted_clusters_are_found_and_do_not_meet(variant):
    length, clusters, width = 24, 4, 16
    tokens, which, centres = planted(length, clusters, width, noise=0.02)
    centres = np.asarray(directions(jnp.asarray(centres), variant))
    spread = np.linalg.norm(centres[0, 0])
    start = centres + 0.1 * spread * np.random.default_rng(1).standard_normal(centres.shape).astype(np.float32)
    state = KMeansState(start.astype(np.float32))
    if variant == "google":
        state = KMeansState(state.means, jnp.ones((1, clusters)), state.means)
    for _ in range(8):
        state = kmeans_update(state, tokens, variant=variant, decay=0.4)
    assert np.max(np.abs(start - centres)) > 0.1 * spread
    assert np.max(np.abs(state.means - centres)) < 1e-2 * spread

    value = np.broadcast_to(np.eye(clusters, dtype=np.float32)[which][None, :, None], (1, length, 1, clusters))
    out, aux = routing_attention(
        tokens, None, value, state.means, window_size=length // clusters, variant=variant, share_qk=True,
        return_aux=True,
    )  # fmt: skip
    assert np.all(aux.clusters == 1)
    scale = 1 + (0.01 if variant == "google" else 1e-5)
    assert_close(out[0, :, 0], np.eye(clusters)[which] / scale, 1e-6)


def test_clusters_reach_what_a_window_of_as_many_keys_does_not():
    """The paper's claim in miniature: alike tokens lie far apart, and w keys chosen by content stand for all."""
    length, clusters, width = 256, 4, 16
    window = length // clusters
    query, which, _ = planted(length, clusters, width, noise=0.3)
    # A query of the k-th direction finds its like in the k-th quarter of the keys only.
    order = np.argsort(which)
    key = query[:, order]
    value = np.random.default_rng(4).standard_normal((clusters, 8)).astype(np.float32)[which[order]][None, :, None]
    x = 40 * query, key, value

    @jax.jit
    @jax.vmap
    def learnt(rng: Any) -> Any:
        means = kmeans_init_lloyd(rng, key, clusters).means
        return routing_attention(*x, means, window_size=window, variant="lucid", return_aux=True)

    outs, aux = learnt(jax.random.split(jax.random.key(0), 30))
    # Lloyd's algorithm ends where it began badly: of all starts, the one whose means are nearest to the tokens.
    routed = outs[jnp.argmin(aux.loss)]
    exact = dot_product_attention(*x)
    local = sliding_window_attention(*x, window=(window // 2, window // 2 - 1))
    near, far = (float(jnp.sqrt(jnp.mean((out - exact) ** 2))) for out in (routed, local))
    assert near < 0.2 * far, (near, far)


# Arguments

KEYLESS = {"key": None, "share_qk": True}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"is_causal": True}, ValueError, r"^is_causal: variant='google' compares ranks .* pass share_qk=True"),
        ({"share_qk": True}, ValueError, r"^key: with share_qk=True queries are their own keys; pass None"),
        ({"key": None}, ValueError, r"^key: expected \[B, S, K, H\], got None; pass share_qk=True"),
        ({**KEYLESS, "value": np.ones((B, T + 1, K, V), np.float32)}, ValueError, r"^value: .* with T = 13"),
        ({**KEYLESS, "value": np.ones((B, T, 4, V), np.float32)}, ValueError, r"6 heads cannot be shared by 4"),
        ({**KEYLESS, "value": np.ones((B, T, K, V), np.float16)}, TypeError, r"expected dtype float32"),
        ({**KEYLESS, "context_window_size": 3}, ValueError, r"^context_window_size: with share_qk"),
        ({**KEYLESS, "query_mask": MASK}, ValueError, r"^query_mask: with share_qk mask says"),
        ({"query_mask": MASK[:, 1:]}, ValueError, r"^query_mask: expected booleans \[B, T\] = \(2, 13\)"),
        ({"mask": MASK}, ValueError, r"^mask: expected booleans \[B, 1, 1, S\] = \(2, 1, 1, 13\)"),
        ({"mask": np.ones((B, 1, 1, T))}, ValueError, r"^mask: expected booleans"),
        ({"mask": "causal"}, TypeError, r"^mask: expected an array"),
        ({"window_size": 0}, ValueError, r"^window_size: expected at least 1, got 0"),
        ({"window_size": 2.0}, TypeError, r"^window_size: expected a static integer"),
        ({"context_window_size": 0}, ValueError, r"^context_window_size: expected at least 1"),
        ({"variant": "paper"}, ValueError, r"^variant: expected one of 'google', 'lucid', got 'paper'"),
        ({"padding": "zeros"}, ValueError, r"^padding: expected one of"),
        ({"is_causal": 1}, TypeError, r"^is_causal: expected a static True or False"),
        ({"commitment": "1"}, TypeError, r"^commitment: expected a static number"),
        ({"means": np.ones((N, C, H + 1), np.float32)}, ValueError, r"^means: expected \[N, C, H\] with H = 7"),
        ({"means": np.ones((N - 1, C, H), np.float32)}, ValueError, r"^means: expected \[N, C, H\] with N = 6"),
        ({"means": np.ones((N, 0, H), np.float32)}, ValueError, r"^means: expected at least one cluster"),
        ({"means": np.ones((N, C, H))}, TypeError, r"^means: logits are computed in float32, got float64"),
        ({"means": np.ones((N, C, H), np.int32)}, TypeError, r"^means: expected a floating dtype"),
        (memory(np.float32), ValueError, r"^mem_key: variant='google' has no learnt keys"),
        ({"variant": "lucid", "mem_key": memory(np.float32)["mem_key"]}, ValueError, r"^mem_value: expected an array"),
        ({"variant": "lucid", **memory()}, TypeError, r"^mem_key: expected dtype float32"),
        (
            {"variant": "lucid", **{name: a[:, 1:] for name, a in memory(np.float32).items()}},
            ValueError, r"^mem_key: expected \[N, C, M, H\] with C = 4",
        ),
        ({"implementation": "pallas"}, NotImplementedError, r"routing_attention has no such implementation"),
    ],
)  # fmt: skip
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        routing_attention(**{**operands(np.float32), "window_size": W, **options})


def test_causal_lengths_must_agree():
    with pytest.raises(ValueError, match=r"^is_causal: with 13 queries and 17 keys"):
        routing_attention(**operands(np.float32, kv_len=17), window_size=W, variant="lucid", is_causal=True)


def test_the_entry_names_what_exists():
    entry = catalog.get("routing")
    assert entry in catalog.WEIGHTED
    assert entry.load_op() is jattn.routing_attention is routing_attention
    assert jattn.kmeans_update is kmeans_update
    with pytest.raises(ValueError, match="routing: is an op without a layer"):
        entry.load_layer()
