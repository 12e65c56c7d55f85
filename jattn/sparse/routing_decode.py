"""Routing attention one token at a time: the "google" definition with shared queries and keys, among the tokens so far.

At step t the tokens after t are left out, as in the released code: cluster c holds the w of the first t + 1 tokens that
score highest by mean c. Token t attends to the members of the clusters that it is in itself,

    o_t = sum_{c of t} softmax_{s in c}(<LN(q_t), LN(q_s)>) v_s / (|{c of t}| + 0.01)

which is the last row of causal `routing_attention` over those t + 1 tokens. It is not row t of `routing_attention` over
a longer sequence: there later tokens compete for the places, and token t or what it looked at may lose its own. A model
trained by the one and read out by the other has this mismatch; nothing here hides it. Only where w holds the whole
sequence do the two agree.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from jattn.checks import accumulator_dtype, bind_shapes, check_count, check_floating, check_grouped_heads
from jattn.dispatch import over_mesh
from jattn.dot_product import check_addend
from jattn.sparse.kmeans import check_means, directions, route_scores
from jattn.sparse.routing_clusters import EPS, softmax_where


class RoutingCache(NamedTuple):
    """The tokens so far. Scores are kept, so means that move between two steps count for later tokens only.

    Attributes:
      key: LN(q).
      value: v.
      scores: sigma, in float32 or wider.
      written: how many tokens each row has.
    """

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S K V"]
    scores: Float[Array, "B N C S"]
    written: Int32[Array, " B"]


def init_routing_cache(
    means: Float[Array, "N C H"], batch: int, capacity: int, *, num_kv_heads: int, value_dim: int, dtype: Any
) -> RoutingCache:
    """A cache for `capacity` tokens that holds none.

    Args:
      means: what tokens will be routed by.
      batch, capacity, num_kv_heads, value_dim: B, S, K (of the values) and V.
      dtype: of queries and values.

    Raises:
      ValueError, TypeError: a wrong shape or size.
    """
    sizes = bind_shapes(("means", means, "N C H"))
    for name, size in (("batch", batch), ("capacity", capacity), ("num_kv_heads", num_kv_heads)):
        check_count(name, size)
    check_grouped_heads(sizes["N"], num_kv_heads)
    return RoutingCache(
        key=jnp.zeros((batch, capacity, sizes["N"], sizes["H"]), dtype),
        value=jnp.zeros((batch, capacity, num_kv_heads, check_count("value_dim", value_dim)), dtype),
        scores=jnp.zeros((batch, sizes["N"], sizes["C"], capacity), accumulator_dtype(dtype)),
        written=jnp.zeros((batch,), jnp.int32),
    )


def routing_step(
    query: Float[Array, "B N H"],
    value: Float[Array, "B K V"],
    means: Float[Array, "N C H"],
    state: RoutingCache,
    *,
    window_size: int,
) -> tuple[Float[Array, "B N V"], RoutingCache]:
    """One more token, in O(C S) for the places and O(C w (H + V)) for the attention.

    Args:
      query: `[B, N, H]`, the token's key as well.
      value: `[B, K, V]`; query head n reads value head `n // (N // K)`.
      means: `[N, C, H]`.
      state: from `init_routing_cache` or the step before; a token beyond its capacity is not kept and gets 0.
      window_size: w, as in `routing_attention`.

    Returns:
      `(out [B, N, V] in the query's dtype, the state after the token)`.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option.
    """
    sizes = bind_shapes(
        ("query", query, "B N H"),
        ("value", value, "B K V"),
        ("state.key", state.key, "B S N H"),
        ("state.value", state.value, "B S K V"),
        ("state.scores", state.scores, "B N C S"),
        ("state.written", state.written, "B"),
    )
    check_floating(query=query, value=value)
    check_means(means, {"N": sizes["N"], "K": sizes["N"], "H": sizes["H"]})
    check_addend("means", means, query)
    check_grouped_heads(sizes["N"], sizes["K"])
    step = functools.partial(_step, check_count("window_size", window_size))
    kept = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, state)
    return over_mesh(step, (P(*jax.typeof(query).sharding.spec[:2]), kept), query, value, means, state)


def _step(window: int, query: Array, value: Array, means: Array, state: RoutingCache) -> tuple[Array, RoutingCache]:
    (batch, heads, _), kv_heads, capacity = query.shape, value.shape[1], state.key.shape[1]
    hat = directions(query, "google")
    row, head, now = jnp.arange(batch), jnp.arange(heads), state.written
    scores = route_scores(hat[:, None], means)[..., 0]
    state = RoutingCache(
        key=state.key.at[row, now].set(hat.astype(state.key.dtype), mode="drop"),
        value=state.value.at[row, now].set(value.astype(state.value.dtype), mode="drop"),
        scores=state.scores.at[row, :, :, now].set(scores.astype(state.scores.dtype), mode="drop"),
        written=now + 1,
    )
    now = now[:, None, None, None]
    so_far = jnp.where(jnp.arange(capacity) <= now, state.scores, -jnp.inf)
    _, at = jax.lax.top_k(so_far, min(window, capacity))
    seen = at <= now
    is_member = jnp.any(at == now, axis=-1)

    row, head = row[:, None, None, None], head[:, None, None]
    key = state.key[row, at, head].astype(query.dtype)
    values = state.value[row, at, head // (heads // kv_heads)].astype(query.dtype)
    acc = accumulator_dtype(query.dtype)
    z = jnp.einsum("bnh,bncsh->bncs", hat.astype(query.dtype), key, preferred_element_type=acc)
    p = softmax_where(z, seen & is_member[..., None]).astype(query.dtype)
    total = jnp.einsum("bncs,bncsv->bnv", p, values, preferred_element_type=acc)
    clusters = jnp.sum(is_member, axis=-1, dtype=acc)
    return (total / (clusters + EPS["google"])[..., None]).astype(query.dtype), state
