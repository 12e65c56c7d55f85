"""Softmax attention over any mask, with its log-sum-exp; every softmax family of the library is held to it.

For query t of head n and the keys s of its key head g = n // (N / K):

    x_ts = scale <q_t, k_s> + bias_ts           z_ts = c tanh(x_ts / c)  with a soft cap c, else x_ts
    lse_t = log( sum_{s allowed} exp(z_ts) + exp(sink_n) )     p_ts = exp(z_ts - lse_t) where allowed, else 0
    o_t = sum_s p_ts v_s

The sink term is there only with `sinks`. A query that may attend to nothing has o = 0, lse = -inf (with a sink: lse =
sink) and hands no gradient to anything, save that of its lse to its sink.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jattn.blockwise import Operands, blockwise_attention
from jattn.checks import (
    accumulator_dtype,
    bind_shapes,
    check_array,
    check_broadcastable,
    check_causal_lengths,
    check_flags,
    check_floating,
    check_grouped_heads,
    check_integer,
    check_no_empty,
    check_same_dtype,
)
from jattn.dispatch import Choice, Implementation, dispatch
from jattn.fused import check_fused_softmax, fused_softmax, kernels
from jattn.masks import Causal, Full, Mask
from jattn.softmax_tile import Score
from pallas_kernels.block_sparse import dropout

SegmentIds = Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None


def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | Mask | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    segment_ids: SegmentIds = None,
    return_lse: bool = False,
    implementation: Choice = None,
) -> Any:
    """Softmax attention (Vaswani et al. 2017, equation 1; sinks as in gpt-oss, soft cap as in Gemma 2).

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; query head n reads key head `n // (N // K)`.
      value: `[B, S, K, V]`.
      bias: added to the scaled logits, before the soft cap; each size is 1 or that of `[B, N, T, S]`. An entry of -inf
        masks its pair, but not under a soft cap, which makes -c of it: use `mask` there.
      mask: who may attend to whom: a boolean array (True may), each size 1 or that of `[B, N, T, S]`, or a symbolic
        `jattn.masks.Mask` over positions that start at 0 for queries and keys alike. A symbolic mask saves the time of
        the blocks that it leaves empty.
      is_causal: the mask `Causal()` on top; for T = S only.
      scale: of the logits; `None` is `H ** -0.5`.
      logits_soft_cap: c in `c tanh(x / c)`; positive.
      sinks: one logit per query head that takes part in the softmax and has no value.
      segment_ids: `[B, T]` for T = S, or `(query ids [B, T], key ids [B, S])`; only equal ids attend to each other.
      return_lse: return `(out, lse)`.
      implementation: "pallas_tpu", "pallas_gpu" (fused kernels, without `bias` and mask arrays), "xla" (blockwise; all
        take O(T + S) memory beyond the arguments) or "reference" (dense; the one that has forward-mode derivatives).

    Returns:
      `out [B, T, N, V]` in the query's dtype; `lse [B, T, N]`, natural logarithm, in float32 (float64 for float64).
      Gradients reach query, key, value, bias and sinks, through both.

    Keys and values must be finite even where they are masked, since 0 times NaN is NaN.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option.
    """
    sizes = check_query_key_value(query, key, value)
    check_flags(is_causal=is_causal, return_lse=return_lse)
    pairs = (sizes["B"], sizes["N"], sizes["T"], sizes["S"])
    if bias is not None:
        check_broadcastable("bias", bias, pairs, "B N T S")
        check_addend("bias", bias, query)
    symbolic, mask_array = _split_mask(mask, pairs)
    if is_causal:
        check_causal_lengths(sizes["T"], sizes["S"])
        symbolic = Causal() & symbolic
    check_sinks(sinks, query, sizes)
    q_segments, kv_segments = split_segment_ids(segment_ids, sizes)
    operands = varying_alike(Operands(query, key, value, bias, mask_array, sinks, q_segments, kv_segments))
    out, lse = dispatch(
        "dot_product_attention",
        _IMPLEMENTATIONS,
        implementation,
        operands,
        mask=symbolic,
        score=make_score(scale, logits_soft_cap, sizes["H"]),
    )
    return (out, lse) if return_lse else out


@functools.partial(jax.jit, static_argnames=("mask", "score", "score_mod", "dropout_rate"))
def dense_attention(
    operands: Operands,
    *,
    mask: Mask,
    score: Score,
    score_mod: Callable[..., Array] | None = None,
    dropout_rate: float = 0.0,
) -> tuple[Array, Array]:
    """The definition, with all `T x S` logits at once and derivatives by JAX; `(out, lse)`."""
    x = operands
    batch, q_len, heads, _ = x.query.shape
    kv_len, kv_heads = x.key.shape[1:3]
    acc = accumulator_dtype(x.query.dtype)
    grouped = (kv_heads, heads // kv_heads)

    def per_pair(array: Array) -> Array:
        """[#B, #N, #T, #S] as [#B, #K, #G, #T, #S]."""
        return array.reshape(array.shape[0], *(grouped if array.shape[1] > 1 else (1, 1)), *array.shape[2:])

    query = x.query.reshape(batch, q_len, *grouped, -1)
    z = jnp.einsum("btkgh,bskh->bkgts", query, x.key, preferred_element_type=acc) * score.scale
    if x.bias is not None:
        z = z + per_pair(x.bias).astype(acc)
    batch_pos, head = jnp.arange(batch).reshape(-1, 1, 1, 1, 1), jnp.arange(heads).reshape(*grouped, 1, 1)
    where = batch_pos, head, jnp.arange(q_len)[:, None], jnp.arange(kv_len)[None, :]
    allowed = mask.elem(*where[2:], head)
    if x.mask is not None:
        allowed = allowed & per_pair(x.mask)
    if x.q_segments is not None and x.kv_segments is not None:
        allowed = allowed & (x.q_segments[:, :, None] == x.kv_segments[:, None, :])[:, None, None]
    if score_mod is not None:  # elsewhere the caller's derivative may be anything, and is not handed on
        z = score_mod(jnp.where(allowed, z, 0), *where, *(x.captured or ())).astype(acc)
    if score.soft_cap is not None:
        z = score.soft_cap * jnp.tanh(z / score.soft_cap)
    z = jnp.where(allowed, z, -jnp.inf)

    m = jnp.max(z, axis=-1)
    if x.sinks is not None:
        sinks = x.sinks.reshape(*grouped, 1).astype(acc)
        m = jnp.maximum(m, sinks)
    m = jax.lax.stop_gradient(jnp.where(m == -jnp.inf, 0, m))
    p = jnp.exp(z - m[..., None])
    l = jnp.sum(p, axis=-1)
    if x.sinks is not None:
        l = l + jnp.exp(sinks - m)
    seen = l > 0
    l = jnp.where(seen, l, 1)
    p = p / l[..., None]
    if x.seed is not None:
        p = p * dropout.factors(x.seed, *where, dropout_rate, acc)
    out = jnp.einsum("bkgts,bskv->btkgv", p.astype(x.value.dtype), x.value, preferred_element_type=acc)
    lse = jnp.where(seen, m + jnp.log(l), -jnp.inf)
    return (
        out.reshape(batch, q_len, heads, -1).astype(x.query.dtype),
        jnp.moveaxis(lse, -1, 1).reshape(batch, q_len, heads),
    )


def merge_attentions(
    outs: Sequence[Float[Array, "*batch V"]], lses: Sequence[Float[Array, "*batch"]]
) -> tuple[Float[Array, "*batch V"], Float[Array, "*batch"]]:
    """Attention over the union of disjoint sets of keys, from the attention over each set.

        L = log sum_i exp(L_i)      o = sum_i exp(L_i - L) o_i

    Args:
      outs: one output per set, `[B, T, N, V]` (or any leading shape).
      lses: their log-sum-exps, `[B, T, N]`.

    Returns:
      `(out, lse)` in the dtypes that came. A side with `L_i = -inf` contributes exactly 0, whatever its output holds;
      all of them -inf gives 0 and -inf. Gradients reach every output and every log-sum-exp.

    Raises:
      ValueError, TypeError: no part at all, unequal counts, or a shape or dtype that differs between parts.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"outs, lses: expected as many outputs as log-sum-exps, got {len(outs)} and {len(lses)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_array(f"outs[{i}]", out)
        check_array(f"lses[{i}]", lse)
        check_floating(**{f"outs[{i}]": out, f"lses[{i}]": lse})
        check_same_dtype(**{"outs[0]": outs[0], f"outs[{i}]": out})
        check_same_dtype(**{"lses[0]": lses[0], f"lses[{i}]": lse})
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outs[{i}], lses[{i}]: expected {outs[0].shape} as in outs[0] and that without its last axis, got "
                f"{out.shape} and {lse.shape}"
            )
    acc = accumulator_dtype(outs[0].dtype, lses[0].dtype)
    parts = jnp.stack([lse.astype(acc) for lse in lses])
    empty = parts == -jnp.inf
    m = jnp.max(parts, axis=0)
    m = jax.lax.stop_gradient(jnp.where(m == -jnp.inf, 0, m))
    weights = jnp.where(empty, 0, jnp.exp(jnp.where(empty, 0, parts - m)))
    l = jnp.sum(weights, axis=0)
    seen = l > 0
    l = jnp.where(seen, l, 1)
    values = jnp.where(empty[..., None], 0, jnp.stack([out.astype(acc) for out in outs]))
    out = jnp.sum((weights / l)[..., None] * values, axis=0)
    lse = jnp.where(seen, m + jnp.log(l), -jnp.inf)
    return out.astype(outs[0].dtype), lse.astype(lses[0].dtype)


def check_query_key_value(query: Any, key: Any, value: Any) -> dict[str, int]:
    """The sizes B, T, S, N, K, H, V of a call whose arrays fit together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_array(name, x)
    sizes = bind_shapes(("query", query, "B T N H"), ("key", key, "B S K H"), ("value", value, "B S K V"))
    check_floating(query=query)
    check_same_dtype(query=query, key=key, value=value)
    check_no_empty(sizes, "BTSNKHV")
    check_grouped_heads(sizes["N"], sizes["K"])
    return sizes


def varying_alike[Tree](operands: Tree) -> Tree:
    """Inside `shard_map`: every array marked as varying over the mesh axes that any of them varies over.

    A custom gradient rule has to give each operand a gradient of its own type, while that of replicated sinks is a
    sum over the devices: the transpose of this mark.
    """
    over = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands)]
    axes = frozenset[str]().union(*over)

    def mark(x: Array) -> Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(mark, operands) if axes else operands


def check_sinks(sinks: Any, query: Any, sizes: dict[str, int]) -> None:
    if sinks is not None:
        bind_shapes(("sinks", sinks, "N"), N=sizes["N"])
        check_addend("sinks", sinks, query)


def make_score(scale: Any, logits_soft_cap: Any, head_dim: int) -> Score:
    """The two static numbers of a call, checked, with the default scale filled in."""
    for name, number in (("scale", scale), ("logits_soft_cap", logits_soft_cap)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float, np.number))):
            raise TypeError(
                f"{name}: expected a static number or None, got {type(number).__name__}; to learn a scale, multiply "
                f"the query by it"
            )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if logits_soft_cap is not None and not 0 < logits_soft_cap < math.inf:
        raise ValueError(f"logits_soft_cap: expected a positive number or None for no cap, got {logits_soft_cap}")
    return Score(
        head_dim**-0.5 if scale is None else float(scale), None if logits_soft_cap is None else float(logits_soft_cap)
    )


def split_segment_ids(segment_ids: Any, sizes: dict[str, int]) -> tuple[Array | None, Array | None]:
    """The ids of the queries and of the keys."""
    if segment_ids is None:
        return None, None
    if not isinstance(segment_ids, (tuple, list)):
        if sizes["T"] != sizes["S"]:
            raise ValueError(
                f"segment_ids: one array serves queries and keys only when there are as many of both, not {sizes['T']} "
                f"and {sizes['S']}; pass (query_ids [B, T], key_ids [B, S])"
            )
        segment_ids = segment_ids, segment_ids
    if len(segment_ids) != 2:
        raise ValueError(f"segment_ids: expected [B, T] or a pair (query_ids, key_ids), got {len(segment_ids)} of them")
    q_ids, kv_ids = segment_ids
    check_array("segment_ids (queries)", q_ids)
    check_array("segment_ids (keys)", kv_ids)
    known = {letter: sizes[letter] for letter in "BTS"}
    bind_shapes(("segment_ids (queries)", q_ids, "B T"), ("segment_ids (keys)", kv_ids, "B S"), **known)
    check_integer(**{"segment_ids (queries)": q_ids, "segment_ids (keys)": kv_ids})
    return q_ids, kv_ids


def check_addend(name: str, x: Any, query: Any) -> None:
    """`x` may be added to logits without losing digits."""
    check_floating(**{name: x})
    acc = accumulator_dtype(query.dtype)
    if jnp.promote_types(x.dtype, acc) != acc:
        raise TypeError(f"{name}: logits are computed in {acc}, got {x.dtype}; cast it with {name}.astype(jnp.{acc})")


def _split_mask(mask: Any, pairs: tuple[int, ...]) -> tuple[Mask, Array | None]:
    """The symbolic part and the array part of `mask=`."""
    if mask is None or isinstance(mask, Mask):
        return Full() if mask is None else mask, None
    check_broadcastable("mask", mask, pairs, "B N T S")
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask: expected booleans (True may attend) or a jattn.masks.Mask, got {mask.dtype}; for zeros and ones "
            f"pass mask.astype(bool), for an additive mask use bias="
        )
    return Full(), mask


_KERNELS = kernels(fused_softmax, check_fused_softmax)
_IMPLEMENTATIONS = (
    _KERNELS.tpu,
    _KERNELS.gpu,
    Implementation("xla", blockwise_attention),
    Implementation("reference", dense_attention),
    _KERNELS.interpret,
)
