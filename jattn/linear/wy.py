"""The delta rule in chunks (WY form; Yang et al. 2024, section 3): what depends on the state alone is sequential.

A chunk of C tokens with local rows r = 1..C and cumulated gates b_r = g_1 + ... + g_r, entered with state S. Every row
writes u_r = beta_r (v_r - what the state holds under k_r by then), and so the rows solve a triangular system:

    L[r, j] = beta_r sum_h k[r, h] k[j, h] exp(b[r, h] - b[j, h])         j < r, else 0
    U       = (I + L)^-1 (diag(beta) V - diag(beta) (K * exp b) S)        = P - W S
    A[r, j] = sum_h q[r, h] k[j, h] exp(b[r, h] - b[j, h])                j <= r, else 0
    o_r     = scale * ((q_r * exp b_r)^T S + sum_j A[r, j] u_j)
    S'      = diag(exp b_C) S + sum_j (k_j * exp(b_C - b_j)) u_j^T        = M S + R

P, W, M and R of all chunks are matrix products made side by side; one product M S + R for each chunk is what has to
wait, and then all U and o are side by side again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jattn.linear import chunked, decay

ELIMINATED = 16  # rows of a triangle that are eliminated one after another; larger ones are joined by matrix products


@functools.partial(jax.jit, static_argnames=("scale", "chunk_size", "out_dtype"))
def causal(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T Kv V"],
    beta: Float[Array, "B T Kv"],
    log_decay: Float[Array, " ..."],
    segment_ids: Int[Array, "B T"] | None,
    state: Float[Array, "B Kv H V"],
    *,
    scale: float,
    chunk_size: int | None,
    out_dtype: Any,
) -> tuple[Float[Array, "B T O V"], Float[Array, "B Kv H V"]]:
    """Outputs in `out_dtype`, O the larger of N and Kv, and the state after the last token.

    `log_decay` is [Kv], [B, T, Kv] or [B, T, Kv, H] and, as `beta`, of the state's dtype.
    """
    chunk = chunk_size or chunked.default_chunk(max(state.shape[2:]), per_channel=log_decay.ndim == 4)
    tokens = (key, value, beta[..., None])
    run = functools.partial(chunked.in_blocks, _block, query, tokens, log_decay, segment_ids, state)
    return run(scale=scale, chunk=chunk, out_dtype=out_dtype)


def _block(
    query: Float[Array, "B N n G C H"],
    key: Float[Array, "B K n C H"],
    value: Float[Array, "B Kv n C V"],
    beta: Float[Array, "B Kv n C 1"],
    factors: decay.Factors,
    segments: tuple[Int[Array, "B n C"], Int[Array, "B n"]] | None,
    state: Float[Array, "B Kv H V"],
) -> tuple[Float[Array, "B Kv n G C V"], Float[Array, "B Kv H V"]]:
    """Unscaled outputs of n consecutive chunks, in the state's dtype, and the state after them."""
    heads, width = state.shape[1:3]
    # What is erased is the difference of things that nearly cancel: rounded operands would show several times over.
    query, key, value = (x.astype(state.dtype) for x in (query, key, value))
    query, key = (per_state_head(x, heads, axis=1) for x in (query, key))
    read, write, total, scores = chunked.within_segments(factors, segments)
    weights = scores(jnp.concatenate([query, key[:, :, :, None]], axis=3), key)
    solved = unit_lower_inverse(beta * jnp.tril(weights[:, :, :, -1], -1))
    written = solved @ (beta * value)
    erased = solved @ (beta * read * key)
    onward = jnp.swapaxes(key * write, -1, -2)
    kept = jnp.swapaxes(total, -1, -2) * jnp.eye(width, dtype=state.dtype) - onward @ erased

    def step(state: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, added = chunk
        return kept @ state + added, state

    chunks = (jnp.moveaxis(kept, 2, 0), jnp.moveaxis(onward @ written, 2, 0))
    state, entered = jax.lax.scan(step, state, chunks, unroll=4)
    entered = jnp.moveaxis(entered, 0, 2)
    written -= erased @ entered
    out = weights[:, :, :, :-1] @ written[:, :, :, None] + (query * read[:, :, :, None]) @ entered[:, :, :, None]
    return out, state


def per_state_head(x: Array, heads: int, axis: int) -> Array:
    """Every one of the heads along `axis` for each of the `heads // x.shape[axis]` states that it serves."""
    shared = heads // x.shape[axis]
    return x if shared == 1 else jnp.repeat(x, shared, axis=axis)


@jax.custom_jvp
def unit_lower_inverse(lower: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
    """(I + L)^-1 of a strictly lower triangular L; C is a power of two.

    Triangles of 16 rows by elimination, larger ones from the two halves: [[A, 0], [B, D]]^-1 = [[A^-1, 0],
    [-D^-1 B A^-1, D^-1]]. Powers of L, which would do too, cancel badly where keys are alike.
    """
    size = lower.shape[-1]
    half = min(ELIMINATED, size)
    triangles = _blocks(lower, half, below=False)
    inverse = jnp.broadcast_to(jnp.eye(half, dtype=lower.dtype), triangles.shape)
    for row in range(half - 1):
        inverse -= triangles[..., :, row, None] * inverse[..., row, None, :]
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    while half < size:
        first, second = decay.halves(inverse)
        inverse = decay.join(inverse, -product(product(second, _blocks(lower, half, below=True)), first), 0.0)
        half *= 2
    return inverse[..., 0, :, :]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """d (I + L)^-1 = -(I + L)^-1 dL (I + L)^-1."""
    inverse = unit_lower_inverse(*primals)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return inverse, -product(product(inverse, tangents[0]), inverse)


def _blocks(x: Array, size: int, *, below: bool) -> Array:
    """Blocks [..., m, size, size] of [..., C, C]: all on the diagonal, or `below` every other one of these."""
    step = 2 * size if below else size
    rows = range(size if below else 0, x.shape[-1], step)
    return jnp.stack([x[..., r : r + size, r - size * below : r - size * below + size] for r in rows], axis=-3)
