"""Cross-entropy of a large vocabulary, a slice of tokens at a time.

loss_t = logsumexp_v(x_t . W_v) - x_t . W_{y_t}. The `[tokens, vocabulary]` logits exist for one slice only, in the
forward pass and in the backward pass, which makes them again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jattn import checks

# One slice of float32 logits takes about this many bytes.
_SLICE_BYTES = 16 << 20


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D vocab"],
    targets: Int[Array, "B T"],
    *,
    soft_cap: float | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "B T"]:
    """Cross-entropy of every token, in nats.

    Args:
      hidden: what the head reads.
      head: the output matrix (the transposed embedding when they are tied).
      targets: the token that should follow; ids outside `[0, vocab)` give an undefined loss, so weigh them with 0.
      soft_cap: c in c tanh(logits / c), or `None`.
      chunk_size: tokens per slice; `None` chooses about 16 MB of logits.

    Returns:
      float32 (or wider) losses; temporary memory does not grow with T x vocabulary.
    """
    sizes = checks.bind_shapes(("hidden", hidden, "B T D"), ("head", head, "D vocab"), ("targets", targets, "B T"))
    checks.check_floating(hidden=hidden, head=head)
    checks.check_integer(targets=targets)
    dtype = checks.accumulator_dtype(hidden.dtype)
    tokens = sizes["B"] * sizes["T"]
    if chunk_size is None:
        chunk_size = max(1, _SLICE_BYTES // (4 * sizes["vocab"]))
    chunk_size = min(checks.check_count("chunk_size", chunk_size), tokens)

    @jax.checkpoint
    def slice_loss(x: Array, y: Array) -> Array:
        logits = jnp.einsum("td,dv->tv", x, head.astype(x.dtype), preferred_element_type=dtype)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        chosen = jnp.take_along_axis(logits, y[:, None], axis=-1, mode="clip")[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    x, y = hidden.reshape(tokens, -1), targets.reshape(tokens)
    if chunk_size == tokens:
        return slice_loss(x, y).reshape(targets.shape)
    slices = -(-tokens // chunk_size)
    padding = slices * chunk_size - tokens
    x = jnp.pad(x, ((0, padding), (0, 0))).reshape(slices, chunk_size, -1)
    y = jnp.pad(y, (0, padding)).reshape(slices, chunk_size)
    losses = jax.lax.map(lambda pair: slice_loss(*pair), (x, y))
    return losses.reshape(-1)[:tokens].reshape(targets.shape)
