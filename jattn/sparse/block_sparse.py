"""Softmax attention over listed pairs of blocks, under any mask and score function (FlexAttention's op for JAX).

With a `BlockMask` that lists the pairs of blocks (i, j), for query t of head n and the keys s of its key head
g = n // (N / K):

    y_ts = scale <q_t, k_s> + bias_gs                      x_ts = f(y_ts, b, n, t, s)
    z_ts = c tanh(x_ts / c)  with a soft cap c, else x_ts
    M_ts = (t // block_q, s // block_kv) is listed, its element rule holds, and both are of one segment
    lse_t = log( sum_{s: M} exp(z_ts) + exp(sink_n) )    p_ts = exp(z_ts - lse_t) where M, else 0
    o_t = sum_s p_ts v_s

The sink term is there only with `sinks`. A query that sees nothing has o = 0, lse = -inf (with a sink: lse = sink) and
hands no gradient to anything, save that of its lse to its sink. With dropout, p_ts in the last sum is multiplied by
r_ts, which is 0 at a rate and 1 / (1 - rate) else; lse is that of all keys.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jattn.blockwise import Operands, Pairs, Plan, Walk, block_size, walk_blocks
from jattn.checks import accumulator_dtype, bind_shapes, check_array, check_flags, check_integer
from jattn.dispatch import Choice, Implementation, dispatch, over_mesh
from jattn.dot_product import (
    SegmentIds,
    check_addend,
    check_query_key_value,
    check_sinks,
    dense_attention,
    make_score,
    split_segment_ids,
    varying_alike,
)
from jattn.fused import check_fused, fused_attention, kernels
from jattn.masks import FULL, PARTIAL, Full, Mask
from jattn.softmax_tile import Score
from jattn.sparse.block_lists import compact
from jattn.sparse.block_mask import BlockMask, check_static

ScoreMod = Callable[..., Array]


def block_sparse_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    block_mask: BlockMask | Mask,
    *,
    score_mod: ScoreMod | None = None,
    captured: tuple[Any, ...] = (),
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    kv_bias: Float[Array, "B K S"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    segment_ids: SegmentIds = None,
    return_lse: bool = False,
    dropout_rate: float = 0.0,
    dropout_seed: int | Int[Array, ""] | None = None,
    implementation: Choice = None,
) -> Any:
    """Exact softmax attention in time proportional to the listed blocks; never a `T x S` array.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; query head n reads key head `n // (N // K)`.
      value: `[B, S, K, V]`.
      block_mask: a `BlockMask` of these lengths, with one list or lists for each batch row, key or query head; or a
        symbolic `jattn.masks.Mask`, for which blocks are chosen. Positions start at 0 for queries and keys alike.
      score_mod: `f(score, b, h, q_pos, kv_pos, *captured) -> score`, elementwise, on arrays that broadcast against the
        score in the accumulator dtype: batch row, query head and positions are integers. -inf masks a pair, but not
        under a soft cap. Its value and derivative may be infinite or NaN where a pair is masked, but not the derivative
        by what it captures.
      captured: arrays, or trees of them, that `score_mod` reads, narrower floats as float32; they get gradients.
      scale: of the products; `None` is `H ** -0.5`.
      logits_soft_cap: c in `c tanh(x / c)`, applied last; positive.
      kv_bias: `[B, K, S]`, added to the scaled products before `score_mod`.
      sinks: one logit per query head that takes part in the softmax and has no value.
      segment_ids: `[B, T]` for T = S, or `(query ids [B, T], key ids [B, S])`; only equal ids attend to each other, and
        pairs of blocks without an id in common are not visited.
      return_lse: return `(out, lse)`.
      dropout_rate: how likely a probability is dropped, below 1.
      dropout_seed: an integer of 32 bits, static or traced; which probabilities are dropped depends on it, the batch
        row, the head and the two positions, and on nothing else. It is not read at a rate of 0.
      implementation: "pallas_tpu", "pallas_gpu", "xla" (all walk the lists) or "reference" (dense; the one that has
        forward-mode derivatives); see `jattn.explain`.

    Returns:
      `out [B, T, N, V]` in the query's dtype; `lse [B, T, N]`, natural logarithm, in float32 (float64 for float64).
      Gradients reach query, key, value, kv_bias, sinks and captured, through both.

    Keys and values must be finite even where they are masked, since 0 times NaN is NaN.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a mask of other lengths; a traced array inside of a static
        mask or a score function.
    """
    sizes = check_query_key_value(query, key, value)
    check_flags(return_lse=return_lse)
    _check_block_mask(block_mask, sizes)
    if kv_bias is not None:
        bind_shapes(("kv_bias", kv_bias, "B K S"), **{letter: sizes[letter] for letter in "BKS"})
        check_addend("kv_bias", kv_bias, query)
    check_sinks(sinks, query, sizes)
    captured = _check_score_mod(score_mod, captured, query, sizes)
    rate = _check_dropout(dropout_rate, dropout_seed)
    operands = Operands(
        query, key, value, None, None, sinks, *split_segment_ids(segment_ids, sizes),
        captured=captured if score_mod is not None else None,
        seed=_bits(dropout_seed) if rate else None,
    )  # fmt: skip
    # What is known now is an option, for an array argument may become a traced one on its way.
    is_static = isinstance(block_mask, Mask) or block_mask.is_static
    operands, kv_bias, lists = varying_alike((operands, kv_bias, None if is_static else block_mask))
    out, lse = dispatch(
        "block_sparse_attention",
        _IMPLEMENTATIONS,
        implementation,
        operands,
        kv_bias,
        lists,
        static_mask=block_mask if is_static else None,
        score=make_score(scale, logits_soft_cap, sizes["H"]),
        score_mod=score_mod,
        dropout_rate=rate,
    )
    return (out, lse) if return_lse else out


def _dense(
    operands: Operands, kv_bias: Array | None, lists: BlockMask | None, *,
    static_mask: BlockMask | Mask | None, score: Score, score_mod: ScoreMod | None, dropout_rate: float,
) -> tuple[Array, Array]:  # fmt: skip
    """The definition, with all `T x S` logits at once."""
    block_mask: Any = static_mask if lists is None else lists
    heads = operands.query.shape[2]
    operands = operands._replace(bias=_per_query_head(kv_bias, operands))
    if isinstance(block_mask, BlockMask):
        dense: Any = block_mask.to_dense(heads)
        operands, block_mask = operands._replace(mask=dense), Full()
    return dense_attention(operands, mask=block_mask, score=score, score_mod=score_mod, dropout_rate=dropout_rate)


def _walked(
    operands: Operands, kv_bias: Array | None, lists: BlockMask | None, *,
    static_mask: BlockMask | Mask | None, score: Score, score_mod: ScoreMod | None, dropout_rate: float,
) -> tuple[Array, Array]:  # fmt: skip
    """One walk over the lists, in O(T + S) memory beyond the arguments and the lists."""
    q_len, kv_len = operands.query.shape[1], operands.key.shape[1]
    block_mask: Any = static_mask if lists is None else lists
    if isinstance(block_mask, Mask):
        block_mask = BlockMask.from_expr(block_mask, q_len, kv_len, block_size(q_len), block_size(kv_len))
    plan = Plan(
        mask=Full() if block_mask.mask is None else block_mask.mask,
        score=score,
        block_q=min(block_mask.block_q, q_len),
        block_kv=min(block_mask.block_kv, kv_len),
        score_mod=score_mod,
        dropout_rate=dropout_rate,
    )
    # The lists of a static mask are cut to what they hold here, before the program makes traced arrays of them.
    walk = _walk(block_mask) if block_mask.is_static and operands.q_segments is None else block_mask
    return _compiled(plan, operands._replace(bias=_per_query_head(kv_bias, operands)), walk)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(plan: Plan, operands: Operands, walk: BlockMask | Walk) -> tuple[Array, Array]:
    def attend(operands: Operands, walk: BlockMask | Walk) -> tuple[Array, Array]:
        if isinstance(walk, BlockMask):
            if operands.q_segments is not None and operands.kv_segments is not None:
                walk = walk.refine_segments(operands.q_segments, operands.kv_segments)
            walk = _walk(walk)
        return walk_blocks(plan, operands, walk)

    rows = P(*jax.typeof(operands.query).sharding.spec[:3])
    return over_mesh(attend, (rows, rows), operands, walk)


def _walk(block_mask: BlockMask) -> Walk:
    """The full and the partial pairs of the lists, without the steps that no pair belongs to."""
    steps = block_mask.work_list()

    def pairs(kind: int) -> Pairs:
        used: Any
        used, (row, col, bank) = compact(steps.kind == kind, steps.row, steps.col, steps.bank)
        if not block_mask.is_static:
            return Pairs(row, col, bank, used, used.max())
        return Pairs(row, col, bank, None if np.all(used == row.shape[-1]) else used)

    bank: Any = block_mask.bank
    return Walk(pairs(FULL), pairs(PARTIAL), bank)


def _per_query_head(kv_bias: Array | None, operands: Operands) -> Array | None:
    """`[B, K, S]` as a bias `[B, N, 1, S]`, wide enough for its gradient to be summed over the heads of a group."""
    if kv_bias is None:
        return None
    batch, _, heads, _ = operands.query.shape
    kv_heads, kv_len = kv_bias.shape[1:]
    by_group = kv_bias.astype(accumulator_dtype(kv_bias.dtype))[:, :, None]
    by_group = jnp.broadcast_to(by_group, (batch, kv_heads, heads // kv_heads, kv_len))
    return by_group.reshape(batch, heads, 1, kv_len)


def _bits(seed: Any) -> Array:
    return jnp.asarray(np.uint32(seed) if isinstance(seed, int) else seed).astype(jnp.uint32)


def _check_block_mask(block_mask: Any, sizes: dict[str, int]) -> None:
    if isinstance(block_mask, Mask):
        return check_static("block_mask", block_mask)
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask: expected a BlockMask or a jattn.masks.Mask, got {type(block_mask).__name__}; "
            f"BlockMask.from_dense takes a boolean array, create_block_mask a predicate, and Full() lets all see all"
        )
    lengths = sizes["T"], sizes["S"]
    if (block_mask.q_len, block_mask.kv_len) != lengths:
        raise ValueError(
            f"block_mask: made for {block_mask.q_len} queries and {block_mask.kv_len} keys, got {lengths[0]} and "
            f"{lengths[1]}; build it for these, or pass a symbolic mask, which fits any lengths"
        )
    batch, heads = block_mask.kv_idx.shape[:2]
    if batch not in (1, sizes["B"]):
        raise ValueError(f"block_mask: expected lists for 1 or B = {sizes['B']} batch rows, got {batch}")
    if heads not in (1, sizes["K"], sizes["N"]):
        raise ValueError(
            f"block_mask: expected lists for 1 head, K = {sizes['K']} or N = {sizes['N']} heads, got {heads}"
        )
    return None


def _check_score_mod(score_mod: Any, captured: Any, query: Any, sizes: dict[str, int]) -> tuple[Any, ...]:
    """What the function is to read: `captured` in dtypes in which the gradients of many pairs may be summed."""
    if not isinstance(captured, tuple):
        raise TypeError(f"captured: expected a tuple of arrays, got {type(captured).__name__}; write (array,) for one")
    for i, leaf in enumerate(jax.tree.leaves(captured)):
        check_array(f"captured[{i}]", leaf)
    if score_mod is None:
        if captured:
            raise ValueError("captured: there is no score_mod to read it")
        return captured
    if not callable(score_mod):
        raise TypeError(
            f"score_mod: expected a callable (score, b, h, q_pos, kv_pos, *captured), got {type(score_mod).__name__}"
        )
    captured = jax.tree.map(_wide, captured)
    acc = accumulator_dtype(query.dtype)
    shape = (sizes["B"], sizes["K"], sizes["N"] // sizes["K"], 2, 3)
    score = jax.ShapeDtypeStruct(shape, acc)
    where = [(shape[0], 1, 1, 1, 1), (*shape[1:3], 1, 1), (2, 1), (1, 3)]
    integers = [jax.ShapeDtypeStruct(each, jnp.arange(1).dtype) for each in where]
    with contextlib.suppress(ValueError):  # some callables have no signature
        signature = inspect.signature(score_mod)
        try:
            signature.bind(score, *integers, *captured)
        except TypeError:
            raise TypeError(
                f"score_mod: is called as f(score, b, h, q_pos, kv_pos, *captured), here with {len(captured)} captured "
                f"arguments; got a function of {signature}"
            ) from None
    try:
        program, out = jax.make_jaxpr(lambda *args: score_mod(*args), return_shape=True)(score, *integers, *captured)
    except Exception as error:
        error.add_note("In score_mod, whose arguments are arrays of many places: choose by jax.numpy.where, not by if.")
        raise
    if any(isinstance(constant, jax.core.Tracer) for constant in program.consts):
        raise TypeError(
            "score_mod: it reads a traced array of its surroundings, which would get no gradient; pass the array in "
            "captured=(array,) and take it as the argument after kv_pos"
        )
    if getattr(out, "shape", None) != shape or jnp.promote_types(out.dtype, acc) != acc:
        got = f"{out.dtype}{list(out.shape)}" if hasattr(out, "shape") else type(out).__name__
        raise ValueError(
            f"score_mod: expected the new score, {jnp.dtype(acc)}{list(shape)} as the score that it is given, got {got}"
        )
    return captured


def _wide(x: Any) -> Any:
    return x.astype(accumulator_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _check_dropout(rate: Any, seed: Any) -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)):
        raise TypeError(f"dropout_rate: expected a static number, got {type(rate).__name__}")
    if not (math.isfinite(rate) and 0 <= rate < 1):
        raise ValueError(f"dropout_rate: expected at least 0 and less than 1, got {rate}")
    if isinstance(seed, (jax.Array, np.ndarray, np.integer)):
        if seed.shape != ():
            raise ValueError(f"dropout_seed: expected one integer, got shape {tuple(seed.shape)}")
        check_integer(dropout_seed=seed)
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(
                f"dropout_seed: expected an integer, got {type(seed).__name__}; of a key take jax.random.bits(key)"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"dropout_seed: expected an integer of 32 bits, 0 to {2**32 - 1}, got {seed}")
    elif rate:
        raise ValueError(
            f"dropout_seed: dropout_rate = {rate} needs one; pass an integer, another one for every step and layer"
        )
    return float(rate)


# Fastest first. Called as
# `run(operands, kv_bias, lists, *, static_mask, score, score_mod, dropout_rate)`, where exactly one is not `None` of
# `lists`, a dynamic BlockMask, and `static_mask`, a static one or a symbolic mask.
_KERNELS = kernels(fused_attention, check_fused)
_IMPLEMENTATIONS = (
    _KERNELS.tpu,
    _KERNELS.gpu,
    Implementation("xla", _walked),
    Implementation("reference", _dense),
    _KERNELS.interpret,
)
