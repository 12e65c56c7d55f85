"""PKA: position-aligned, keyword-scoped attention of an image that several conditions steer (Zhou et al. 2026).

Text T, image X, spatial conditions SP_1 .. SP_C on the image's grid and subjects SJ_1 .. SJ_J have queries, keys and
values of their own. Instead of all tokens attending to all, whose cost grows with the square of C,

    conditions   each attends to itself only, so it depends on neither image nor time, and is made once for all steps
    text         attends to [T; X]
    base         the image attends to [T; X]
    PAA_i        image token i attends to the one token i of SP_c (eq. 2): a softmax over one key, so v_SP,i itself
    KSA_i        image token i attends to SJ_j if M_ij (eq. 3, 4), else 0
    M            = norm_i(r_ij) >= eps,  r_ij = (1 / N) sum_n sum_{w in keywords of j} <q_X,in, k_T,wn>

M of one denoising step is used at the next; the first step has all tokens. How the three are combined:

    "add"        base_i + sum_c PAA_ic + sum_j KSA_ij: three softmaxes, the equations as they are written
    "joint"      one softmax over T, X, token i of every SP_c and, where M_ij, SJ_j: attention among all tokens without
                 the pairs that are left out. By log-sum-exp, one more logit per spatial condition

An image token costs M + L + C + sum_j M_ij S_j pairs. The conditions never join one sequence with the image.

There is no authors' code to compare with. The paper does not say what text attends to, how the parts are combined, what
"Norm" is, nor how heads share a mask; the functions below say what was chosen. It takes streams and not one query, key
and value, so it is no entry of the catalog.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jattn.checks import (
    accumulator_dtype,
    bind_shapes,
    check_choice,
    check_count,
    check_flags,
    check_floating,
    check_grouped_heads,
    check_no_empty,
    check_same_dtype,
)
from jattn.dispatch import Choice, Implementation, dispatch, on_mesh_of, over_mesh
from jattn.dot_product import check_query_key_value, dot_product_attention, make_score, merge_attentions, varying_alike
from jattn.sparse.pka_streams import (
    Outputs,
    Stream,
    Streams,
    check_keywords,
    check_mask,
    check_rule,
    check_streams,
)

Combine = Literal["add", "joint"]
Normalization = Literal["minmax", "softmax"]


def pka_attention(
    streams: Streams,
    mask: Bool[Array, "B J L"] | None = None,
    *,
    combine: Combine = "add",
    scale: float | None = None,
    eps: float = 0.2,
    normalization: Normalization = "minmax",
    max_tokens: int | None = None,
    implementation: Choice = None,
) -> tuple[Outputs, Bool[Array, "B J L"]]:
    """One attention layer of a diffusion transformer with several conditions (Zhou et al. 2026, section 3).

    Args:
      streams: queries, keys and values after projection and rotary embedding. All have the same numbers of heads.
      mask: `[B, J, L]`, which image tokens see which of the J subjects: what this function returned at the denoising
        step before. `None` at the first step: all see all.
      combine: "add" or "joint"; see the top of this file. The paper does not state it; "add" is what its equations say,
        "joint" is full attention without the pairs left out.
      scale: of the logits; `None` is `H ** -0.5`.
      eps, normalization: of the mask that is returned, as in `keyword_mask`.
      max_tokens: for how many image tokens of a row the subjects' attention is made, as in `keyword_scoped_attention`.
      implementation: "xla" (above) or "reference" (dense logits against the sequence of all tokens, masked; the one
        that has forward-mode derivatives).

    Returns:
      `(outputs, next_mask)`. The mask is that of this step's queries and text keys, for the next step: `mask` is never
      replaced by it here. Without a subject it is `[B, 0, L]`. Gradients reach every query, key and value that the
      outputs depend on; with "add" they do not depend on the keys of spatial conditions but through their own output.
      Under `shard_map` over heads the mask is that of the heads at hand.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a spatial condition that is not on the image's grid.
    """
    sizes = check_streams(streams)
    check_choice("combine", combine, ("add", "joint"))
    check_rule(eps, normalization)
    if max_tokens is not None:
        check_count("max_tokens", max_tokens)
    if mask is not None:
        check_mask(mask, "B J L", B=sizes["B"], J=len(streams.subjects), L=sizes["L"])
    score = make_score(scale, None, sizes["H"])
    outputs = dispatch(
        "pka_attention", _IMPLEMENTATIONS, implementation, varying_alike(streams), mask,
        combine=combine, scale=score.scale, max_tokens=max_tokens,
    )  # fmt: skip
    image: Any = streams.image
    masks = [
        _mask_of(image.query, streams.text.key, s.keyword_ids, s.keyword_valid, eps, normalization)
        for s in streams.subjects
    ]
    return outputs, jnp.stack(masks, axis=1) if masks else _no_token(image.query)[:, None][:, :0]


def position_aligned_attention(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K V"],
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Token i attends to key i and no other (Zhou et al. 2026, eq. 2).

    A softmax over one key is 1, so the output is the value, bit for bit, for each query head, and gets no gradient to
    query and key: it is an injection of values. What is to learn how much of it to take needs the log-sum-exp, which is
    the one logit (`pka_attention(combine="joint")`), or a gate.

    Args:
      query, key, value: `[B, L, N, H]`, `[B, L, K, H]`, `[B, L, K, V]`.
      scale: of the logit; `None` is `H ** -0.5`.
      return_lse: return `(out, lse)`.

    Returns:
      `out [B, L, N, V]`, or `(out, lse [B, L, N])` with `lse_i = scale <q_i, k_i>` in float32 (float64 for float64).

    Raises:
      ValueError, TypeError: a wrong shape or dtype; unequal numbers of queries and keys.
    """
    sizes = check_query_key_value(query, key, value)
    check_flags(return_lse=return_lse)
    if sizes["T"] != sizes["S"]:
        raise ValueError(
            f"key: {sizes['S']} tokens on a grid of their own for {sizes['T']} queries; resize the condition to the "
            "image's grid"
        )
    out, lse = _aligned(query, key, value, make_score(scale, None, sizes["H"]).scale)
    return (out, lse) if return_lse else out


def keyword_mask(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B M K H"],
    keyword_ids: Int[Array, "B W"] | None,
    *,
    keyword_valid: Bool[Array, "B W"] | None = None,
    eps: float = 0.2,
    normalization: Normalization = "minmax",
) -> Bool[Array, "B L"]:
    """Which image tokens concern the subject that the keywords name (Zhou et al. 2026, eq. 3 and 4).

        r_i = (1 / N) sum_n sum_{w in keywords} <q_in, k_wn>        mask_i = norm_i(r) >= eps

    Args:
      query: the image's queries, `[B, L, N, H]`.
      key: the text's keys, `[B, M, K, H]`.
      keyword_ids: positions in the text, `[B, W]`. They are a set: one that is there twice counts once. Under `jit` an
        id that is no position of the text counts as not there; elsewhere it is an error. `None` or W = 0: no keyword.
      keyword_valid: which ids count, `[B, W]`, where rows have different numbers; the others may hold anything.
      eps: how relevant a token must be. The paper has 0.2.
      normalization: "minmax", `(r - min r) / (max r - min r)` over the row's tokens, under which eps = 0 keeps all and
        eps > 1 none, as the paper describes (it says "Norm" only); where all r are alike, the result is 1. Or
        "softmax" of r over the row's tokens, as a later version is summarised; its values are 1 / L on average, so
        that eps = 0.2 keeps next to nothing.

    Returns:
      `[B, L]` booleans. A row without a keyword is true everywhere, whatever eps is. The mean over heads is our choice.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option.
    """
    sizes = bind_shapes(("query", query, "B L N H"), ("key", key, "B M K H"))
    check_floating(query=query)
    check_same_dtype(query=query, key=key)
    check_no_empty(sizes, "BLNHMK")
    check_grouped_heads(sizes["N"], sizes["K"])
    check_keywords("", keyword_ids, keyword_valid, sizes)
    check_rule(eps, normalization)
    return _mask_of(query, key, keyword_ids, keyword_valid, eps, normalization)


def keyword_scoped_attention(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    mask: Bool[Array, "B L"],
    *,
    scale: float | None = None,
    max_tokens: int | None = None,
    return_lse: bool = False,
    implementation: Choice = None,
) -> Any:
    """Attention to a subject by the tokens that concern it; the others get 0 (Zhou et al. 2026, eq. 4).

    Their rows are left out. A query set to zero instead would give the mean of the subject's values.

    Args:
      query: the image's queries, `[B, L, N, H]`.
      key, value: the subject's, `[B, S, K, H]` and `[B, S, K, V]`.
      mask: `[B, L]`, which queries take part; see `keyword_mask`.
      scale: of the logits; `None` is `H ** -0.5`.
      max_tokens: the queries of a row are gathered into this many places and only those are worked on. It bounds the
        cost and never the result: where a row of the batch has more, all L are worked on (both are made under `vmap`,
        which cannot choose). `None`: always all L.
      return_lse: return `(out, lse)`.
      implementation: "xla" or "reference" (dense, without gathering; the one that has forward-mode derivatives).

    Returns:
      `out [B, L, N, V]`, or `(out, lse [B, L, N])`; 0 and -inf for the rows left out, and no gradient from them.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option.
    """
    sizes = check_query_key_value(query, key, value)
    check_flags(return_lse=return_lse)
    if max_tokens is not None:
        check_count("max_tokens", max_tokens)
    check_mask(mask, "B L", B=sizes["B"], L=sizes["T"])
    scale = make_score(scale, None, sizes["H"]).scale
    operands = varying_alike((query, key, value, mask))
    out, lse = dispatch(
        "keyword_scoped_attention", _SCOPED, implementation, *operands, scale=scale, max_tokens=max_tokens
    )
    return (out, lse) if return_lse else out


def pka_pairs(
    *,
    text: int,
    image: int,
    spatial: int = 0,
    subjects: Sequence[int] = (),
    selected: Sequence[int] | None = None,
    cached: bool = False,
) -> int:
    """Pairs of a query and a key in a call, of a batch row and head; each takes 2 (H + V) operations.

        (M + L)^2 + C L + sum_j selected_j S_j        and, unless they are cached,        C L^2 + sum_j S_j^2

    Args:
      text, image: M and L, tokens.
      spatial: C, how many conditions on the image's grid.
      subjects: S_j, tokens of each subject.
      selected: how many image tokens see each subject; `None` is all L.
      cached: whether the conditions' own outputs are not made.
    """
    rows = (image,) * len(subjects) if selected is None else tuple(selected)
    if len(rows) != len(subjects):
        raise ValueError(f"selected: expected a number for each of {len(subjects)} subjects, got {len(rows)}")
    own = 0 if cached else spatial * image**2 + sum(s**2 for s in subjects)
    return (text + image) ** 2 + spatial * image + sum(n * s for n, s in zip(rows, subjects, strict=True)) + own


def _mask_of(query: Any, key: Array, ids: Any, valid: Any, eps: float, normalization: Normalization) -> Array:
    with on_mesh_of((query, key)):
        return _compiled_mask(query, key, ids, valid, eps, normalization)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _compiled_mask(query: Any, key: Array, ids: Any, valid: Any, eps: float, normalization: Normalization) -> Array:
    if ids is None or ids.shape[1] == 0:
        return ~_no_token(query)
    run = functools.partial(_relevant, eps, normalization)
    return over_mesh(run, P(*jax.typeof(query).sharding.spec[:2]), query, key, ids, valid)


def _relevant(eps: float, normalization: Normalization, query: Array, key: Array, ids: Array, valid: Any) -> Array:
    batch, length, heads, _ = query.shape
    acc = accumulator_dtype(query.dtype)
    query, key = jax.lax.stop_gradient((query, key))
    chosen = ids[:, :, None] == jnp.arange(key.shape[1])
    if valid is not None:
        chosen = chosen & valid[:, :, None]
    chosen = jnp.any(chosen, axis=1)
    # One vector per key head does for all keywords.
    keywords = jnp.einsum("bm,bmkh->bkh", chosen.astype(key.dtype), key, preferred_element_type=acc)
    grouped = query.reshape(batch, length, key.shape[2], -1, query.shape[3]).astype(acc)
    # The compiler may sum anew, in another order, for each reader of r; the least would then not be the least.
    r = jax.lax.optimization_barrier(jnp.einsum("blkgh,bkh->bl", grouped, keywords) / heads)
    if normalization == "softmax":
        relevance = jax.nn.softmax(r, axis=1)
    else:
        low, high = (f(r, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
        spread = high - low
        relevance = jnp.where(spread > 0, jnp.clip((r - low) / jnp.where(spread > 0, spread, 1), 0, 1), 1)
    return (relevance >= eps) | ~jnp.any(chosen, axis=1, keepdims=True)


def _no_token(query: Float[Array, "B L N H"]) -> Bool[Array, "B L"]:
    """False for each of them; made of the queries, to be laid out over devices as they are."""
    return jnp.any(jnp.zeros_like(query, dtype=bool), axis=(2, 3))


def _aligned(query: Array, key: Array, value: Array, scale: float) -> tuple[Array, Array]:
    """The values by query head, and the one logit."""
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, width)
    acc = accumulator_dtype(query.dtype)
    logit = scale * jnp.einsum("blkgh,blkh->blkg", grouped, key, preferred_element_type=acc)
    out = jnp.broadcast_to(value[:, :, :, None], (*grouped.shape[:4], value.shape[3]))
    return out.reshape(batch, length, heads, -1), logit.reshape(batch, length, heads)


def _masked_rows(
    query: Array, key: Array, value: Array, mask: Array, *, scale: float, max_tokens: int | None = None
) -> tuple[Array, Array]:
    """The definition: every row masked or not."""
    del max_tokens
    return dot_product_attention(
        query, key, value, mask=mask[:, None, :, None], scale=scale, return_lse=True, implementation="reference"
    )


@functools.partial(jax.jit, static_argnames=("scale", "max_tokens"))
def _gathered_rows(
    query: Array, key: Array, value: Array, mask: Array, *, scale: float, max_tokens: int | None
) -> tuple[Array, Array]:
    """`(out, lse)`, with the rows that take part side by side where they fit."""

    def every() -> tuple[Array, Array]:
        out, lse = dot_product_attention(query, key, value, scale=scale, return_lse=True)
        return jnp.where(mask[:, :, None, None], out, 0), jnp.where(mask[:, :, None], lse, -jnp.inf)

    length, heads = query.shape[1:3]
    if max_tokens is None or max_tokens >= length:
        return every()
    count = jnp.sum(mask, axis=1)

    def gathered() -> tuple[Array, Array]:
        order = jnp.argsort(~mask, axis=1, stable=True)[:, :max_tokens]
        live = jnp.arange(max_tokens) < count[:, None]
        rows = jax.vmap(lambda each, order: each[order])(query, order)
        out, lse = dot_product_attention(rows, key, value, scale=scale, return_lse=True)
        out, lse = jnp.where(live[..., None, None], out, 0), jnp.where(live[..., None], lse, -jnp.inf)

        def put_back(out: Array, lse: Array, order: Array) -> tuple[Array, Array]:
            # A place that is not live holds a row that takes no part, whose output is 0 anyway.
            zeros, nothing = jnp.zeros((length, *out.shape[1:]), out.dtype), jnp.full((length, heads), -jnp.inf)
            return (
                zeros.at[order].set(out, unique_indices=True),
                nothing.astype(lse.dtype).at[order].set(lse, unique_indices=True),
            )

        return jax.vmap(put_back)(out, lse, order)

    return jax.lax.cond(jnp.max(count) <= max_tokens, gathered, every)


def _own(stream: Any, scale: float, implementation: Choice) -> Any:
    """What the queries of a stream read from its keys; `None` without queries."""
    if stream.query is None:
        return None
    return dot_product_attention(stream.query, stream.key, stream.value, scale=scale, implementation=implementation)


def _own_alike(streams: tuple[Stream, ...], scale: float) -> tuple[Any, ...]:
    """The same of several streams of one shape at once, so that a program does not grow with their number."""
    asking = [i for i, stream in enumerate(streams) if stream.query is not None]
    if len(asking) < 2:
        return tuple(_own(stream, scale, None) for stream in streams)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(streams[i] for i in asking))
    out = jax.vmap(lambda stream: _own(stream, scale, None))(stacked)
    return tuple(out[asking.index(i)] if i in asking else None for i in range(len(streams)))


def _dense(streams: Streams, mask: Array | None, *, combine: Combine, scale: float, max_tokens: int | None) -> Outputs:
    """The definition: the image attends to the sequence of all tokens under a mask, or to each part under its own."""
    del max_tokens
    image: Any = streams.image
    batch, length = image.key.shape[:2]
    every = jnp.ones((1, 1, length, 1), bool)
    own = jnp.eye(length, dtype=bool)[None, None]

    def attend(*parts: tuple[Any, Array]) -> Array:
        """The image's output over some streams, of which it sees what `[B or 1, 1, L, S or 1]` booleans say."""
        keys, values = (jnp.concatenate([getattr(s, name) for s, _ in parts], axis=1) for name in ("key", "value"))
        pairs = [jnp.broadcast_to(seen, (batch, 1, length, s.key.shape[1])) for s, seen in parts]
        options: dict[str, Any] = {"mask": jnp.concatenate(pairs, axis=-1), "scale": scale}
        return dot_product_attention(image.query, keys, values, implementation="reference", **options)

    base = (streams.text, every), (image, every)
    aligned = [(stream, own) for stream in streams.spatial]
    scoped = [
        (subject, every if mask is None else mask[:, j, None, :, None]) for j, subject in enumerate(streams.subjects)
    ]
    if combine == "joint":
        out = attend(*base, *aligned, *scoped)
    else:
        out = _sum([attend(*base), *(attend(part) for part in (*aligned, *scoped))])
    text = Stream(
        streams.text.query,
        jnp.concatenate([streams.text.key, image.key], axis=1),
        jnp.concatenate([streams.text.value, image.value], axis=1),
    )
    return Outputs(
        _own(text, scale, "reference"),
        out,
        tuple(_own(stream, scale, "reference") for stream in streams.spatial),
        tuple(_own(subject, scale, "reference") for subject in streams.subjects),
    )


@functools.partial(jax.jit, static_argnames=("combine", "scale", "max_tokens"))
def _by_parts(
    streams: Streams, mask: Array | None, *, combine: Combine, scale: float, max_tokens: int | None
) -> Outputs:
    words: Any
    image: Any
    words, image = streams.text, streams.image
    query, key, value = (jnp.concatenate([a, b], axis=1) for a, b in zip(words, image, strict=True))
    base, base_lse = dot_product_attention(query, key, value, scale=scale, return_lse=True)
    text = streams.text.key.shape[1]
    parts = [(base[:, text:], base_lse[:, text:])]
    parts += [_aligned(image.query, stream.key, stream.value, scale) for stream in streams.spatial]
    for j, subject in enumerate(streams.subjects):
        if mask is None:
            options: dict[str, Any] = {"scale": scale, "return_lse": True}
            parts.append(dot_product_attention(image.query, subject.key, subject.value, **options))
        else:
            rows = image.query, subject.key, subject.value, mask[:, j]
            parts.append(_gathered_rows(*rows, scale=scale, max_tokens=max_tokens))
    outs, lses = zip(*parts, strict=True)
    return Outputs(
        base[:, :text],
        merge_attentions(outs, lses)[0] if combine == "joint" else _sum(outs),
        _own_alike(streams.spatial, scale),
        tuple(_own(subject, scale, None) for subject in streams.subjects),
    )


def _sum(outs: Sequence[Array]) -> Array:
    acc = accumulator_dtype(outs[0].dtype)
    return sum((out.astype(acc) for out in outs[1:]), outs[0].astype(acc)).astype(outs[0].dtype)


_IMPLEMENTATIONS = (Implementation("xla", _by_parts), Implementation("reference", _dense))
_SCOPED = (Implementation("xla", _gathered_rows), Implementation("reference", _masked_rows))
