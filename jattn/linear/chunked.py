"""Causal linear attention in chunks: matrix products inside a chunk, and a scan that carries the state between them.

A chunk of C tokens with local rows r = 1..C and cumulated gates b_r = g_1 + ... + g_r, entered with state S:

    A[r, j] = sum_h q[r, h] k[j, h] exp(b[r, h] - b[j, h])                j <= r, else 0
    o_r     = scale * ((q_r * exp b_r)^T S + sum_j A[r, j] v_j)
    S'      = diag(exp b_C) S + sum_j (k_j * exp(b_C - b_j)) v_j^T

The chunks of a block run side by side, a scan runs over the blocks, and a block is small enough to stay in cache.
Blocks are rematerialised: what the backward pass keeps is the inputs and one state per block; scores, decay factors
and the states of the chunks are computed again. The backward pass is the transpose of these equations as JAX
derives it, so derivatives of any order and direction exist.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jattn.linear import decay

# Numbers in a block of q, k or v: 512 KiB in float32, so that a block and its scores stay in a CPU's cache.
BLOCK_NUMBERS = 2**17
MAX_CHUNKS_PER_BLOCK = 16


@functools.partial(jax.jit, static_argnames=("scale", "chunk_size", "out_dtype"))
def causal(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    log_decay: Float[Array, " ..."],
    segment_ids: Int[Array, "B T"] | None,
    state: Float[Array, "B K H V"],
    *,
    scale: float,
    chunk_size: int | None,
    out_dtype: Any,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B K H V"]]:
    """Outputs in `out_dtype` and the state after the last token; `log_decay` is [K], [B, T, K] or [B, T, K, H]."""
    chunk = chunk_size or default_chunk(max(query.shape[-1], value.shape[-1]), per_channel=log_decay.ndim == 4)
    run = functools.partial(in_blocks, _block, query, (key, value), log_decay, segment_ids, state)
    return run(scale=scale, chunk=chunk, out_dtype=out_dtype)


def in_blocks(
    chunks_of: Callable[..., tuple[Array, Array]],
    query: Float[Array, "B T N H"],
    tokens: tuple[Float[Array, "B T _ _"], ...],
    log_decay: Float[Array, " ..."],
    segment_ids: Int[Array, "B T"] | None,
    state: Float[Array, "B K H V"],
    *,
    scale: float,
    chunk: int,
    out_dtype: Any,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B K H V"]]:
    """A causal recurrence as a scan over blocks of chunks.

    Args:
      chunks_of: one block, `chunks_of(query [B, K, n, G, C, H], *tokens [B, _, n, C, _], factors, segments, state) ->
        (unscaled out [B, K, n, G, C, V], state)`. Tokens after the last one are zeros, and do not decay.
      query: N is a multiple of K, or smaller, and then K of `chunks_of` is N.
      tokens: what else there is for every token, keys and values first; each has its own number of heads.
      log_decay: [K], [B, T, K] or [B, T, K, H].
    """
    batch, length, heads, width = query.shape
    groups = max(heads // state.shape[1], 1)
    chunk = min(chunk, 1 << (length - 1).bit_length())
    blocks, chunks = _partition(length, chunk, batch * max(heads, state.shape[1]) * max(width, state.shape[-1]))

    def split(x: Array) -> Array:
        """[B, T, ...] -> [blocks, B, chunks, C, ...], with zeros after the last token."""
        x = jnp.pad(x, [(0, 0), (0, blocks * chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, blocks, chunks, chunk, *x.shape[2:]), 1, 0)

    is_constant = log_decay.ndim == 1
    tables = decay.constant(log_decay, chunk) if is_constant else None
    if is_constant:
        gates: Any = np.clip(length - chunk * np.arange(blocks * chunks), 0, chunk).reshape(blocks, chunks)
    else:
        gates = split(log_decay if log_decay.ndim == 4 else log_decay[..., None])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(state: Array, xs: tuple[Any, ...]) -> tuple[Array, Array]:
        query, tokens, gates, segments = xs
        query = query.transpose(0, 3, 1, 4, 2, 5)  # [B, K, n, G, C, H]
        tokens = (x.transpose(0, 3, 1, 2, 4) for x in tokens)  # [B, K, n, C, .]
        factors = tables(gates) if tables else decay.per_token(gates.transpose(0, 3, 1, 2, 4))
        out, state = chunks_of(query, *tokens, factors, segments, state)
        return state, (scale * out).astype(out_dtype).transpose(0, 2, 4, 1, 3, 5)

    xs = (
        split(query.reshape(batch, length, heads // groups, groups, width)),
        jax.tree.map(split, tokens),
        gates,
        None if segment_ids is None else _borders(segment_ids, blocks, chunks, chunk),
    )
    if blocks == 1:
        state, out = block(state, jax.tree.map(lambda x: x[0], xs))
    else:
        state, out = jax.lax.scan(block, state, xs)
        out = jnp.moveaxis(out, 0, 1)
    out = out.reshape(batch, -1, *out.shape[-3:])[:, :length]
    return out.reshape(batch, length, -1, out.shape[-1]), state


def default_chunk(width: int, per_channel: bool) -> int:
    """The faster of 32, 64 and 128 on a CPU: scores of a chunk cost what the states cost when it is as long as wide.

    A gate per channel costs one more product for every halving of the chunk, so there the shorter is never slower.
    """
    return 32 if per_channel or width <= 32 else 64


def _partition(length: int, chunk: int, numbers_per_token: int) -> tuple[int, int]:
    """How many blocks, and how many chunks in each, so that a block fits the cache and few padded tokens are added."""
    needed = -(-length // chunk)
    chunks = min(max(BLOCK_NUMBERS // (numbers_per_token * chunk), 1), MAX_CHUNKS_PER_BLOCK)
    blocks = -(-needed // chunks)
    return blocks, -(-needed // blocks)


def _borders(segment_ids: Array, blocks: int, chunks: int, chunk: int) -> tuple[Array, Array]:
    """The segment of every token, [blocks, B, chunks, C], and of the token before every chunk, [blocks, B, chunks].

    Padded tokens continue the last segment; before the first token comes the state, which belongs to its segment.
    """
    batch, length = segment_ids.shape
    after = jnp.broadcast_to(segment_ids[:, -1:], (batch, blocks * chunks * chunk - length))
    ids = jnp.concatenate([segment_ids, after], axis=1).reshape(batch, blocks * chunks, chunk)
    before = jnp.concatenate([ids[:, :1, 0], ids[:, :-1, -1]], axis=1)
    return (
        jnp.moveaxis(ids.reshape(batch, blocks, chunks, chunk), 1, 0),
        jnp.moveaxis(before.reshape(batch, blocks, chunks), 1, 0),
    )


def within_segments(
    factors: decay.Factors, segments: tuple[Int[Array, "B n C"], Int[Array, "B n"]] | None
) -> decay.Factors:
    """The factors between rows of the same segment; 0 between others."""
    if segments is None:
        return factors
    read, write, total, scores = factors
    ids, before = (x[:, None] for x in segments)
    last = ids[..., -1]
    same = (ids[..., :, None] == ids[..., None, :])[:, :, :, None]
    return decay.Factors(
        read=jnp.where((ids == before[..., None])[..., None], read, 0),
        write=jnp.where((ids == last[..., None])[..., None], write, 0),
        total=jnp.where((before == last)[..., None, None], total, 0),
        scores=lambda query, key: jnp.where(same, scores(query, key), 0),
    )


def _block(
    query: Float[Array, "B K n G C H"],
    key: Float[Array, "B K n C H"],
    value: Float[Array, "B K n C V"],
    factors: decay.Factors,
    segments: tuple[Int[Array, "B n C"], Int[Array, "B n"]] | None,
    state: Float[Array, "B K H V"],
) -> tuple[Float[Array, "B K n G C V"], Float[Array, "B K H V"]]:
    """Unscaled outputs of n consecutive chunks, in the state's dtype, and the state after them."""
    read, write, total, scores = within_segments(factors, segments)
    weights = scores(query, key)
    product = functools.partial(jnp.einsum, preferred_element_type=state.dtype)
    written = product("bknch,bkncv->nbkhv", (key * write).astype(key.dtype), value)
    kept = jnp.broadcast_to(jnp.moveaxis(total, 2, 0).swapaxes(-1, -2), (*written.shape[:-1], 1))

    def step(state: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, written = chunk
        return kept * state + written, state

    state, entered = jax.lax.scan(step, state, (kept, written), unroll=4)
    out = product("bkngcd,bkndv->bkngcv", weights.astype(value.dtype), value)
    decayed = (query * read[:, :, :, None]).astype(query.dtype)
    out += product("bkngch,nbkhv->bkngcv", decayed, entered.astype(query.dtype))
    return out, state
