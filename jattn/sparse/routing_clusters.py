"""Two ways to attend within clusters of tokens: the definition, by masks, and one that gathers what it needs.

Both route by the same scores and divide by the same counts. The reference ranks all tokens and masks all T x S pairs of
every cluster; the other takes the w best, and its largest array holds C w x w weights per head.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32

from jattn.checks import accumulator_dtype
from jattn.dispatch import over_mesh
from jattn.sparse.kmeans import Variant, cluster_members, commitment_error, directions, route_scores

EPS: dict[Variant, float] = {"google": 1e-2, "lucid": 1e-5}
OWN_LOGIT = -5e4
"""What a token's logit with itself is in "lucid" with shared queries and keys: below any usual one, above a mask."""


class RoutingAux(NamedTuple):
    """What a call of `routing_attention` has beside its output.

    Attributes:
      loss: `commitment` times the mean square of xhat - mu_nearest. "google": the mean over queries plus the mean over
        keys, the same number twice when these are shared; "lucid": one mean over both.
      query_members: positions of each cluster's queries, in order ("google") or best first ("lucid"). Where masked
        tokens are excluded, a place that no token takes holds T.
      key_members: likewise, of its keys.
      clusters: in how many clusters each query is; where that is 0 the output is.
    """

    loss: Float[Array, ""]
    query_members: Int32[Array, "B N C w"]
    key_members: Int32[Array, "B N C u"]
    clusters: Int32[Array, "B T N"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a call."""

    window: int
    key_window: int
    variant: Variant
    is_causal: bool
    excluded: bool
    commitment: float
    return_aux: bool


class Operands(NamedTuple):
    """The arrays of a call; `key` is `None` where queries are the keys."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"] | None
    value: Float[Array, "B S K V"]
    means: Float[Array, "N C H"]
    q_real: Bool[Array, "B T"] | None
    kv_real: Bool[Array, "B S"] | None
    mem_key: Float[Array, "N C M H"] | None
    mem_value: Float[Array, "N C M V"] | None


class _Routed(NamedTuple):
    """Queries and keys as they attend, and what they are routed by."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    scale: float
    q_scores: Float[Array, "B N C T"]
    kv_scores: Float[Array, "B N C S"]
    loss: Float[Array, ""] | None


def _route(plan: Plan, x: Operands) -> _Routed:
    dtype, shared = x.query.dtype, x.key is None
    q_hat = directions(x.query, plan.variant)
    kv_hat = q_hat if x.key is None else directions(x.key, plan.variant)
    q_scores = route_scores(q_hat, x.means)
    kv_scores = q_scores if shared else route_scores(kv_hat, x.means)
    loss = None
    if plan.return_aux:
        real = (x.q_real, x.kv_real) if plan.excluded else (None, None)
        error, terms = commitment_error(q_hat, q_scores, x.means, real[0])
        other = (error, terms) if shared else commitment_error(kv_hat, kv_scores, x.means, real[1])
        if plan.variant == "google":
            loss = error / jnp.maximum(terms, 1) + other[0] / jnp.maximum(other[1], 1)
        elif shared:
            loss = error / jnp.maximum(terms, 1)
        else:
            loss = (error + other[0]) / jnp.maximum(terms + other[1], 1)
        loss = plan.commitment * loss
    if plan.variant == "google":
        return _Routed(q_hat.astype(dtype), kv_hat.astype(dtype), 1.0, q_scores, kv_scores, loss)
    key = kv_hat.astype(dtype) if x.key is None else x.key
    return _Routed(x.query, key, x.query.shape[-1] ** -0.5, q_scores, kv_scores, loss)


@functools.partial(jax.jit, static_argnames="plan")
def gathered_clusters(operands: Operands, *, plan: Plan) -> tuple[Array, RoutingAux | None]:
    return over_mesh(functools.partial(_attend_clusters, plan), _places(plan, operands), operands)


@functools.partial(jax.jit, static_argnames="plan")
def dense_clusters(operands: Operands, *, plan: Plan) -> tuple[Array, RoutingAux | None]:
    return over_mesh(functools.partial(_attend_everywhere, plan), _places(plan, operands), operands)


def _places(plan: Plan, operands: Operands) -> tuple[P, RoutingAux | None]:
    """Where explicit mesh axes have what is returned."""
    batch, length, heads = jax.typeof(operands.query).sharding.spec[:3]
    rows, lists = P(batch, length, heads), P(batch, heads)
    specs: Any = {"loss": P(), "query_members": lists, "key_members": lists, "clusters": rows}
    return rows, RoutingAux(**specs) if plan.return_aux else None


def _attend_clusters(plan: Plan, x: Operands) -> tuple[Array, RoutingAux | None]:
    """Gather the tokens of every cluster, attend within, and add up what every token got."""
    (batch, q_len, heads, _), kv_len, kv_heads = x.query.shape, x.value.shape[1], x.value.shape[2]
    routed = _route(plan, x)
    by_position = plan.variant == "google"
    real = (x.q_real, x.kv_real) if plan.excluded else (None, None)
    q_at = cluster_members(routed.q_scores, plan.window, real[0], by_position=by_position)
    kv_at = q_at
    if x.key is not None:
        kv_at = cluster_members(routed.kv_scores, plan.key_window, real[1], by_position=by_position)
    row, head = jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[:, None, None]
    kv_head = head // (heads // kv_heads)
    query, value = _at(routed.query, row, q_at, head), _at(x.value, row, kv_at, kv_head)
    key = _at(routed.key, row, kv_at, head if x.key is None else kv_head)

    q_pos, kv_pos = q_at[..., :, None], kv_at[..., None, :]
    allowed = (q_pos < q_len) & (kv_pos < kv_len)
    if not plan.excluded and x.q_real is not None:
        allowed &= _at(x.q_real, row, q_at)[..., :, None]
    if not plan.excluded and x.kv_real is not None:
        allowed &= _at(x.kv_real, row, kv_at)[..., None, :]
    if plan.is_causal:
        allowed &= q_pos >= kv_pos
    own = (q_pos == kv_pos) & (q_pos < q_len) if _hides_own(plan, x) else None

    acc = accumulator_dtype(x.query.dtype)
    z = routed.scale * jnp.einsum("bncqh,bnckh->bncqk", query, key, preferred_element_type=acc)
    if own is not None:
        z, allowed = jnp.where(own, OWN_LOGIT, z), allowed | own
    if x.mem_key is not None and x.mem_value is not None:
        learnt = routed.scale * jnp.einsum("bncqh,ncmh->bncqm", query, x.mem_key, preferred_element_type=acc)
        z = jnp.concatenate([learnt, z], axis=-1)
        allowed = jnp.concatenate([jnp.broadcast_to(q_pos < q_len, learnt.shape), allowed], axis=-1)
        learnt_values = jnp.broadcast_to(x.mem_value, (batch, *x.mem_value.shape))
        value = jnp.concatenate([learnt_values, value], axis=3)
    p = softmax_where(z, allowed).astype(value.dtype)
    out = jnp.einsum("bncqk,bnckv->bncqv", p, value, preferred_element_type=acc)

    # A place that no token takes is beyond the end, and dropped.
    total = jnp.zeros((batch, q_len, heads, out.shape[-1]), acc).at[row, q_at, head].add(out, mode="drop")
    clusters = jnp.zeros((batch, q_len, heads), jnp.int32).at[row, q_at, head].add(1, mode="drop")
    return _finish(plan, x, routed, total, clusters, q_at, kv_at)


def _attend_everywhere(plan: Plan, x: Operands) -> tuple[Array, RoutingAux | None]:
    """The definition: for every cluster a softmax over all pairs, with a mask of who is in it."""
    _, q_len, heads, _ = x.query.shape
    kv_len = x.value.shape[1]
    routed, acc = _route(plan, x), accumulator_dtype(x.query.dtype)

    def members(scores: Array, window: int, real: Array | None) -> tuple[Array, Array]:
        """Who is in each cluster, `[B, N, C, T]` booleans, and the positions of those."""
        length = scores.shape[-1]
        if real is not None and plan.excluded:
            scores = jnp.where(real[:, None, None], scores, -jnp.inf)
        order = jnp.argsort(-scores, axis=-1, stable=True)
        chosen = jnp.argsort(order, axis=-1) < window
        if real is not None and plan.excluded:
            chosen &= real[:, None, None]
        listed = order[..., :window]
        listed = jnp.where(jnp.take_along_axis(chosen, listed, axis=-1), listed, length)
        return chosen, jnp.sort(listed, axis=-1) if plan.variant == "google" else listed

    in_q, q_at = members(routed.q_scores, plan.window, x.q_real)
    in_kv, kv_at = in_q, q_at
    if x.key is not None:
        in_kv, kv_at = members(routed.kv_scores, plan.key_window, x.kv_real)

    key, value = (jnp.repeat(a, heads // a.shape[2], axis=2) for a in (routed.key, x.value))
    z = routed.scale * jnp.einsum("btnh,bsnh->bnts", routed.query, key, preferred_element_type=acc)[:, :, None]
    allowed = in_q[..., :, None] & in_kv[..., None, :]
    if x.q_real is not None:
        allowed &= x.q_real[:, None, None, :, None]
    if x.kv_real is not None:
        allowed &= x.kv_real[:, None, None, None, :]
    if plan.is_causal:
        allowed &= jnp.tri(q_len, dtype=bool)
    if _hides_own(plan, x):
        own = jnp.eye(q_len, dtype=bool)
        z, allowed = jnp.where(own, OWN_LOGIT, z), allowed | (own & in_q[..., None])
    z = jnp.broadcast_to(z, allowed.shape)
    if x.mem_key is not None and x.mem_value is not None:
        learnt = routed.scale * jnp.einsum("btnh,ncmh->bnctm", routed.query, x.mem_key, preferred_element_type=acc)
        z = jnp.concatenate([learnt, z], axis=-1)
        allowed = jnp.concatenate([jnp.broadcast_to(in_q[..., None], learnt.shape), allowed], axis=-1)
    p = softmax_where(z, allowed).astype(value.dtype)
    total = jnp.einsum("bncts,bsnv->btnv", p[..., -kv_len:], value, preferred_element_type=acc)
    if x.mem_value is not None:
        learnt_p = p[..., :-kv_len]
        total = total + jnp.einsum("bnctm,ncmv->btnv", learnt_p, x.mem_value, preferred_element_type=acc)
    clusters = jnp.moveaxis(jnp.sum(in_q, axis=2, dtype=jnp.int32), 1, 2)
    return _finish(plan, x, routed, total, clusters, q_at.astype(jnp.int32), kv_at.astype(jnp.int32))


def _at(x: Array, *where: Array) -> Array:
    """`x[where]`, and 0 beyond its end, whither the places point that no token takes."""
    return x.at[where].get(mode="fill", fill_value=0)


def _finish(
    plan: Plan, x: Operands, routed: _Routed, total: Array, clusters: Array, q_at: Array, kv_at: Array
) -> tuple[Array, RoutingAux | None]:
    out = total / (clusters + EPS[plan.variant])[..., None].astype(total.dtype)
    # A query of NaN may be in no cluster, and must not come out as the 0 of a sound one.
    lost = jnp.isnan(routed.q_scores[:, :, 0])
    if plan.excluded and x.q_real is not None:
        lost &= x.q_real[:, None]
    out = jnp.where(jnp.swapaxes(lost, 1, 2)[..., None], jnp.nan, out).astype(x.query.dtype)
    if routed.loss is None:
        return out, None
    return out, RoutingAux(routed.loss, q_at, kv_at, clusters)


def _hides_own(plan: Plan, x: Operands) -> bool:
    return plan.variant == "lucid" and x.key is None


def softmax_where(z: Array, allowed: Array) -> Array:
    """Over the last axis where allowed, 0 elsewhere and in a row that allows nothing."""
    z = jnp.where(allowed, z, -jnp.inf)
    m = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    p = jnp.exp(z - jnp.where(m == -jnp.inf, 0, m))
    total = jnp.sum(p, axis=-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1)
