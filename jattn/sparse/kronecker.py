"""Kronecker attention: one softmax over pairs, triples ... of keys (Alman and Song 2023, "higher-order correlations").

With factors k^1 .. k^m of keys, v^1 .. v^m of values (m = order - 1), all products entry by entry:

    x_i,j1..jm = scale sum_h q_ih k^1_j1h ... k^m_jmh       p_i = softmax over all (j1, ..., jm) that are allowed
    o_i = sum_j1..jm p_i,j1..jm  v^1_j1 * ... * v^m_jm      lse_i = log sum exp(x_i,..)

The fast form never makes the T x S^m logits. For a key j of the first factor, q_i * k^1_j is a query of the attention
over the other factors, which gives y_ij and L_ij, and

    lse_i = log sum_j exp(L_ij)        o_i = sum_j exp(L_ij - lse_i) v^1_j * y_ij

so it is T S^1 queries of one order less, a few keys j at a time; with one factor left it is `dot_product_attention`.
The paper has no code and no mask; the causal form here allows j1, ..., jm <= i.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jattn.checks import (
    accumulator_dtype,
    bind_shapes,
    check_array,
    check_causal_lengths,
    check_count,
    check_flags,
    check_floating,
    check_grouped_heads,
    check_integer,
    check_no_empty,
    check_same_dtype,
)
from jattn.dispatch import Choice, Implementation, dispatch, over_mesh
from jattn.dot_product import dot_product_attention, make_score, varying_alike
from jattn.masks import Causal, Full, Mask, SlidingWindow

QUERIES_AT_ONCE = 4096


def kronecker_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"] | Sequence[Float[Array, "B S K H"]],
    value: Float[Array, "B S K V"] | Sequence[Float[Array, "B S K V"]],
    *,
    is_causal: bool = False,
    windows: Sequence[int | None] | None = None,
    scale: float | None = None,
    key_masks: Sequence[Bool[Array, "B S"] | None] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    return_lse: bool = False,
    implementation: Choice = None,
) -> Any:
    """Exact Kronecker attention in O(T S^m (H + V)) time and O(T + S) memory (Alman and Song 2023, definition 1.2).

    Args:
      query: `[B, T, N, H]`.
      key: m factors `[B, S_f, K, H]`, whose lengths may differ; query head n reads head `n // (N // K)` of each. One
        array is one factor: ordinary attention.
      value: as many factors `[B, S_f, K, V]`.
      is_causal: only keys j1, ..., jm at or before the query; all lengths are T then.
      windows: with `is_causal`, for each factor the number of most recent keys, the query's own among them, or `None`.
      scale: of the logits; `None` is 1 / H (the paper's, not `H ** -0.5`).
      key_masks: for each factor `[B, S_f]`, True for keys that may be read, or `None`.
      segment_ids: `[B, T]`, for lengths that are all T; only keys of the query's own segment take part.
      return_lse: return `(out, lse)`.
      implementation: "xla" (above) or "reference" (all logits at once; the one that has forward-mode derivatives).

    Returns:
      `out [B, T, N, V]`, or `(out, lse [B, T, N])`. A query that may read nothing gives 0 and -inf. Gradients reach
      the query and every factor, through both.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; unequal numbers of factors.
    """
    check_flags(is_causal=is_causal, return_lse=return_lse)
    keys, values = factors_of("key", key), factors_of("value", value)
    sizes, lengths = check_factors(query, keys, values)
    masks = _masks(is_causal, windows, sizes["T"], lengths)
    valid = _check_key_masks(key_masks, sizes["B"], lengths)
    if segment_ids is not None:
        bind_shapes(("segment_ids", segment_ids, "B T"), B=sizes["B"], T=sizes["T"])
        check_integer(segment_ids=segment_ids)
        if set(lengths) != {sizes["T"]}:
            raise ValueError(f"segment_ids: {sizes['T']} queries and {lengths} keys; segments need equal lengths")
    score = make_score(1 / sizes["H"] if scale is None else scale, None, sizes["H"])
    operands = varying_alike(Operands(query, keys, values, valid, segment_ids))
    out, lse = dispatch(
        "kronecker_attention", _IMPLEMENTATIONS, implementation, operands, masks=masks, scale=score.scale
    )
    return (out, lse) if return_lse else out


class Operands(NamedTuple):
    """The arrays of a call; `valid` and `segments` may be `None`."""

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    valid: tuple[Array | None, ...]
    segments: Array | None


def factors_of(name: str, factors: Any) -> tuple[Array, ...]:
    if isinstance(factors, (tuple, list)):
        if not factors:
            raise ValueError(f"{name}: expected at least one factor, got none")
        for i, factor in enumerate(factors):
            check_array(f"{name}[{i}]", factor)
        return tuple(factors)
    check_array(name, factors)
    return (factors,)


def check_factors(
    query: Array, keys: tuple[Array, ...], values: tuple[Array, ...]
) -> tuple[dict[str, int], tuple[int, ...]]:
    check_array("query", query)
    if len(keys) != len(values):
        raise ValueError(f"value: expected {len(keys)} factors as in key, got {len(values)}")
    sizes = bind_shapes(("query", query, "B T N H"))
    check_floating(query=query)
    lengths = []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        names = ("key", "value") if len(keys) == 1 else (f"key[{i}]", f"value[{i}]")
        known = {letter: size for letter, size in sizes.items() if letter in "BHKV"}
        found = bind_shapes((names[0], key, "B S K H"), (names[1], value, "B S K V"), **known)
        check_same_dtype(query=query, **dict(zip(names, (key, value), strict=True)))
        sizes |= {letter: found[letter] for letter in "KV"}
        check_no_empty(found, "S")
        lengths.append(found["S"])
    check_no_empty(sizes, "BTNHKV")
    check_grouped_heads(sizes["N"], sizes["K"])
    return sizes, tuple(lengths)


def _masks(is_causal: bool, windows: Any, q_len: int, lengths: tuple[int, ...]) -> tuple[Mask, ...]:
    if not is_causal:
        if windows is not None:
            raise ValueError("windows: they look back from a query, so they need is_causal=True")
        return (Full(),) * len(lengths)
    for length in lengths:
        check_causal_lengths(q_len, length)
    if windows is None:
        return (Causal(),) * len(lengths)
    if not isinstance(windows, (tuple, list)) or len(windows) != len(lengths):
        raise ValueError(f"windows: expected an integer or None for each of {len(lengths)} factors, got {windows!r}")
    return tuple(
        Causal() if w is None else SlidingWindow(check_count(f"windows[{i}]", w) - 1) for i, w in enumerate(windows)
    )


def _check_key_masks(key_masks: Any, batch: int, lengths: tuple[int, ...]) -> tuple[Array | None, ...]:
    if key_masks is None:
        return (None,) * len(lengths)
    if not isinstance(key_masks, (tuple, list)) or len(key_masks) != len(lengths):
        raise ValueError(f"key_masks: expected an array or None for each of {len(lengths)} factors")
    for i, (mask, length) in enumerate(zip(key_masks, lengths, strict=True)):
        if mask is not None:
            check_array(f"key_masks[{i}]", mask)
            bind_shapes((f"key_masks[{i}]", mask, "B S"), B=batch, S=length)
            if mask.dtype != np.bool_:
                raise TypeError(f"key_masks[{i}]: expected booleans, True for keys that may be read, got {mask.dtype}")
    return tuple(key_masks)


def _dense(x: Operands, *, masks: tuple[Mask, ...], scale: float) -> tuple[Array, Array]:
    """The definition, with all logits `[B, K, G, T, S_1, ..., S_m]` at once."""
    batch, q_len, heads, _ = x.query.shape
    kv_heads, acc = x.keys[0].shape[2], accumulator_dtype(x.query.dtype)
    query = x.query.reshape(batch, q_len, kv_heads, -1, x.query.shape[3])
    m = len(x.keys)
    letters = "ijlmnopr"[:m]

    def product(first: str, factors: tuple[Array, ...], start: Array) -> Array:
        return jnp.einsum(
            ",".join([first, *(f"b{s}kh" for s in letters)]) + f"->bkgt{letters}" + ("h" if "h" not in first else ""),
            start, *(factor.astype(acc) for factor in factors),
        )  # fmt: skip

    z = scale * product("btkgh", x.keys, query.astype(acc))
    allowed: Any = True
    for f, (mask, key) in enumerate(zip(masks, x.keys, strict=True)):
        s = key.shape[1]
        pairs = jnp.asarray(mask.elem(jnp.arange(q_len)[:, None], jnp.arange(s)[None]))[None]
        if x.segments is not None:
            pairs = pairs & (x.segments[:, :, None] == x.segments[:, None, :])
        valid = x.valid[f]
        if valid is not None:
            pairs = pairs & valid[:, None, :]
        shape = [pairs.shape[0], 1, 1, q_len] + [1] * m
        shape[4 + f] = s
        allowed = allowed & pairs.reshape(shape)
    z = jnp.where(allowed, z, -jnp.inf)
    over = tuple(range(4, 4 + m))
    largest = jax.lax.stop_gradient(jnp.max(z, axis=over, keepdims=True))
    p = jnp.exp(z - jnp.where(largest == -jnp.inf, 0, largest))
    total = jnp.sum(p, axis=over, keepdims=True)
    seen = total > 0
    p = p / jnp.where(seen, total, 1)
    out = jnp.einsum(
        ",".join([f"bkgt{letters}", *(f"b{s}kv" for s in letters)]) + "->btkgv",
        p, *(value.astype(acc) for value in x.values),
    )  # fmt: skip
    lse = jnp.where(seen, largest + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
    lse = jnp.moveaxis(lse.reshape(batch, heads, q_len), 1, 2)
    return out.reshape(batch, q_len, heads, -1).astype(x.query.dtype), lse


@dataclasses.dataclass(frozen=True, repr=False)
class _Repeated(Mask):
    """`mask` for queries each of which stands `each` times in a row."""

    mask: Mask
    each: int

    def elem(self, q_pos: Any, kv_pos: Any, head: Any = None) -> Any:
        return self.mask.elem(q_pos // self.each, kv_pos, head)

    def classify(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> np.ndarray:
        return self.mask.classify(q_lo // self.each, q_hi // self.each, kv_lo, kv_hi)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: every query stands `each` times in a row, and `chunk` keys of the first factor go at once."""

    masks: tuple[Mask, ...]
    scale: float
    each: int
    chunk: int


@functools.partial(jax.jit, static_argnames=("masks", "scale"))
def _by_factors(x: Operands, *, masks: tuple[Mask, ...], scale: float) -> tuple[Array, Array]:
    rows = P(*jax.typeof(x.query).sharding.spec[:3])
    attend = functools.partial(_attend, _plan(masks, scale, 1, x.query.shape[1], x.keys))
    out, lse = over_mesh(attend, (rows, rows), x)
    return out.astype(x.query.dtype), lse


def _plan(masks: tuple[Mask, ...], scale: float, each: int, queries: int, keys: tuple[Array, ...]) -> _Plan:
    at_once = max(1, min(QUERIES_AT_ONCE // queries, keys[0].shape[1]))
    # The last chunk is nearly as long as the others.
    chunks = math.ceil(keys[0].shape[1] / at_once)
    return _Plan(masks, scale, each, math.ceil(keys[0].shape[1] / chunks))


def _attend(plan: _Plan, x: Operands) -> tuple[Array, Array]:
    """Output in the accumulator dtype, and the log-sum-exp."""
    if len(x.keys) > 1:
        return _over_first(plan, x)
    mask = plan.masks[0] if plan.each == 1 else _Repeated(plan.masks[0], plan.each)
    valid, ids = x.valid[0], x.segments
    segment_ids: Any = None
    if valid is not None or ids is not None:
        kv_ids = jnp.zeros(x.keys[0].shape[:2], jnp.int32) if ids is None else ids
        q_ids = jnp.repeat(kv_ids, plan.each, axis=1) if ids is not None else jnp.zeros(x.query.shape[:2], jnp.int32)
        if valid is not None:  # no query has a segment below the least
            kv_ids = jnp.where(valid, kv_ids, jnp.min(kv_ids) - 1)
        segment_ids = q_ids, kv_ids
    out, lse = dot_product_attention(
        x.query, x.keys[0], x.values[0], mask=mask, scale=plan.scale, segment_ids=segment_ids, return_lse=True
    )
    return out.astype(lse.dtype), lse


class _Piece(NamedTuple):
    """A few keys of the first factor with their values, where they begin, and which of them are keys."""

    key: Array
    value: Array
    start: Array
    valid: Array


def _pieces(plan: _Plan, x: Operands) -> _Piece:
    length = x.keys[0].shape[1]
    count = math.ceil(length / plan.chunk)

    def cut(a: Array) -> Array:
        padded = jnp.pad(a, ((0, 0), (0, count * plan.chunk - length)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(padded.reshape(a.shape[0], count, plan.chunk, *a.shape[2:]), 1, 0)

    valid = jnp.ones(x.keys[0].shape[:2], bool) if x.valid[0] is None else x.valid[0]
    return _Piece(cut(x.keys[0]), cut(x.values[0]), jnp.arange(count) * plan.chunk, cut(valid))


def _absorbed(plan: _Plan, x: Operands, piece: _Piece) -> tuple[Array, Array]:
    """`v^1_j * y_ij [B, T, c, N, V]` and `L_ij [B, T, c, N]` of the keys of a piece, -inf where j is not allowed."""
    batch, queries, heads, width = x.query.shape
    kv_heads, chunk = piece.key.shape[2], plan.chunk
    acc = accumulator_dtype(x.query.dtype)

    def spread(each_query: Array, each_key: Array) -> Array:
        """`[B, T, c, N, .]`: products of queries (or what they read) and keys."""
        by_group = each_query.reshape(*each_query.shape[:2], -1, kv_heads, heads // kv_heads, each_query.shape[-1])
        found = by_group.astype(acc) * each_key.astype(acc)[:, None, :, :, None]
        return found.reshape(batch, queries, chunk, heads, -1)

    asked = spread(x.query[:, :, None], piece.key).astype(x.query.dtype).reshape(batch, queries * chunk, heads, width)
    rest = Operands(asked, x.keys[1:], x.values[1:], x.valid[1:], x.segments)
    each = plan.each * chunk
    out, lse = _attend(_plan(plan.masks[1:], plan.scale, each, queries * chunk, x.keys[1:]), rest)
    read = spread(out.reshape(batch, queries, chunk, heads, -1), piece.value)

    position, j = jnp.arange(queries) // plan.each, piece.start + jnp.arange(chunk)
    allowed = plan.masks[0].elem(position[:, None], j) & piece.valid[:, None]
    if x.segments is not None:
        own = jnp.repeat(x.segments, plan.each, axis=1)
        allowed = allowed & (own[:, :, None] == x.segments[:, jnp.minimum(j, x.segments.shape[1] - 1)][:, None])
    return read, jnp.where(allowed[..., None], lse.reshape(batch, queries, chunk, heads), -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_first(plan: _Plan, x: Operands) -> tuple[Array, Array]:
    acc = accumulator_dtype(x.query.dtype)
    shape = x.query.shape[:3]

    def step(carry: tuple[Array, Array, Array], piece: _Piece) -> tuple[tuple[Array, Array, Array], None]:
        m, l, total = carry
        read, lse = _absorbed(plan, x, piece)
        largest = jnp.maximum(m, jnp.max(lse, axis=2))
        finite = jnp.where(largest == -jnp.inf, 0, largest)
        kept, p = jnp.exp(m - finite), jnp.exp(lse - finite[:, :, None])
        total = kept[..., None] * total + jnp.sum(p[..., None] * read, axis=2)
        return (largest, kept * l + jnp.sum(p, axis=2), total), None

    empty = jnp.full(shape, -jnp.inf, acc), jnp.zeros(shape, acc), jnp.zeros((*shape, x.values[0].shape[3]), acc)
    (m, l, total), _ = jax.lax.scan(step, varying_alike((empty, x))[0], _pieces(plan, x))
    seen = l > 0
    l = jnp.where(seen, l, 1)
    return total / l[..., None], jnp.where(seen, m + jnp.log(l), -jnp.inf)


def _forward(plan: _Plan, x: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Array, Array]]:
    out, lse = _over_first(plan, x)
    return (out, lse), (x, out, lse)


def _backward(
    plan: _Plan, residuals: tuple[Operands, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Operands]:
    """With p_ij = exp(L_ij - lse_i), u_ij = v^1_j * y_ij: du_ij = p_ij do_i, dL_ij = p_ij (<do_i, u_ij> - delta_i)."""
    x, out, lse = residuals
    d_out, d_lse = cotangents
    delta = jnp.sum(d_out * out, axis=-1) - jnp.where(lse == -jnp.inf, 0, d_lse)
    shift = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    wide = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, lse.dtype))
    summed = (x.query, x.keys[1:], x.values[1:])

    def step(sums: Any, piece: _Piece) -> tuple[Any, tuple[Array, Array]]:
        def run(query: Array, keys: Any, values: Any, key: Array, value: Array) -> tuple[Array, Array]:
            operands = x._replace(query=query, keys=(x.keys[0], *keys), values=(x.values[0], *values))
            return _absorbed(plan, operands, piece._replace(key=key, value=value))

        (read, L), pull_back = jax.vjp(run, *summed, piece.key, piece.value)
        p = jnp.exp(L - shift[:, :, None])
        d_read = p[..., None] * d_out[:, :, None]
        d_L = p * (jnp.sum(d_out[:, :, None] * read, axis=-1) - delta[:, :, None])
        *found, d_key, d_value = pull_back((d_read, d_L))
        return jax.tree.map(lambda a, b: a + b, sums, tuple(found)), (d_key, d_value)

    start = varying_alike((wide(summed), x))[0]
    (d_query, d_keys, d_values), firsts = jax.lax.scan(step, start, _pieces(plan, x))
    first = [jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])[:, : x.keys[0].shape[1]] for a in firsts]
    gradients = Operands(d_query, (first[0], *d_keys), (first[1], *d_values), (None,) * len(x.keys), None)
    return (
        jax.tree.map(lambda g, a: None if g is None else g.astype(a.dtype), gradients, x, is_leaf=lambda g: g is None),
    )


_over_first.defvjp(_forward, _backward)

_IMPLEMENTATIONS = (
    Implementation("xla", _by_factors),
    Implementation("reference", _dense),
)
