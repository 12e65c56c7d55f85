"""Retention: causal linear attention whose decays per head are powers of two away from 1.

o_t = scale * sum_{j <= t} gamma_h^(t - j) (q_t . k_j) v_j,      gamma_h = 1 - 2^(-5 - h), h = 0, 1, ..
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.dispatch import Choice
from jattn.linear import arguments
from jattn.linear.recurrence import LinearState, linear_attention, linear_attention_step


def retention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    gamma: Float[Array, " K"] | None = None,
    mask: Bool[Array, "B 1 1 T"] | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: Choice = None,
) -> Any:
    """Retention of RetNet (Sun et al. 2023, eq. 5 and 6), causal; rotary positions and the norm are the layer's.

    Args:
      gamma: decay of every key head per token, above 0 and at most 1; `None` means `retention_gamma(K)`.
      scale: multiplies the query; `None` means `H ** -0.5`.

    The other arguments, the result and the errors are those of `linear_attention`.
    """
    arguments.check_arrays(query=query, key=key)
    sizes = checks.bind_shapes(("query", query, "B T N H"), ("key", key, "B T K H"))
    checks.check_grouped_heads(sizes["N"], sizes["K"])
    return linear_attention(
        query,
        key,
        value,
        retention_log_decay(gamma, sizes["K"], query.dtype),
        mask,
        scale=arguments.scale(scale, default=sizes["H"] ** -0.5),
        reverse=reverse,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def retention_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K V"],
    state: LinearState,
    gamma: Float[Array, " K"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B N V"], LinearState]:
    """One token of `retention`: the output and the state to pass with the next token."""
    arguments.check_arrays(query=query, key=key)
    sizes = checks.bind_shapes(("query", query, "B N H"), ("key", key, "B K H"))
    checks.check_grouped_heads(sizes["N"], sizes["K"])
    scale = arguments.scale(scale, default=sizes["H"] ** -0.5)
    log_decay = retention_log_decay(gamma, sizes["K"], query.dtype)
    return linear_attention_step(query, key, value, state, log_decay, scale=scale)


def retention_gamma(num_heads: int) -> Float[Array, " num_heads"]:
    """RetNet's decays, 1 - 2^(-5 - h): exact in float32 up to 20 heads; later heads do not decay."""
    checks.check_count("num_heads", num_heads)
    return jnp.asarray(1 - 2.0 ** (-5 - np.arange(num_heads)), jnp.float32)


def retention_log_decay(gamma: Any, heads: int, dtype: Any) -> Float[Array, " K"]:
    """log gamma in the accumulator dtype for queries of `dtype`: what it is off by adds up along the sequence."""
    gamma = retention_gamma(heads) if gamma is None else gamma
    checks.bind_shapes(("gamma", gamma, "K"), K=heads)
    checks.check_floating(gamma=gamma)
    message = "expected decays above 0 and at most 1, got others; pass exp(log_decay)"
    checks.check_values("gamma", gamma, lambda x: (x <= 0) | (x > 1), message)
    return jnp.log(gamma.astype(checks.accumulator_dtype(gamma.dtype, dtype)))
