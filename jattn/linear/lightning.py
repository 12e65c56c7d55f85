"""Lightning Attention-2: causal linear attention with a fixed exponential decay per head.

    o_t = scale * sum_{j <= t} exp(-slope)^(t - j) (q_t . k_j) v_j

It is `linear_attention` with the constant gate -slope, no denominator and, as in the paper, no 1 / sqrt(H).
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.dispatch import Choice
from jattn.linear.recurrence import LinearState, linear_attention, linear_attention_step


def lightning_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    slopes: Float[Array, " K"] | None = None,
    mask: Bool[Array, "B 1 1 T"] | None = None,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    reverse: bool = False,
    chunk_size: int | None = None,
    implementation: Choice = None,
) -> Any:
    """Lightning Attention-2 (Qin et al. 2024, algorithm 1; OpenNLPLab/lightning-attention), causal.

    The state returned is that of the recurrence, S_t = exp(-slope) S_{t-1} + k_t v_t^T, as decoding and MiniMax caches
    hold it; the released kernel carries exp(-slope) S_t. Unlike the released code, slopes have a gradient.

    Args:
      slopes: decay of every key head per token, at least 0, of any floating dtype; `None` decays nothing.
        `lightning_slopes` makes them.
      scale: multiplies the query; `None` means 1.

    The other arguments, the result and the errors are those of `linear_attention`.
    """
    # There is no other order to point to, as `linear_attention` would.
    checks.bind_shapes(("query", query, "B T N H"), ("key", key, "B T K H"))
    return linear_attention(
        query,
        key,
        value,
        _log_decay(slopes, key, axis=2),
        mask,
        scale=scale,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
        reverse=reverse,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def lightning_attention_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K V"],
    state: LinearState,
    slopes: Float[Array, " K"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B N V"], LinearState]:
    """One token of `lightning_attention`: the output and the state to pass with the next token."""
    return linear_attention_step(query, key, value, state, _log_decay(slopes, key, axis=1), scale=scale)


def _log_decay(slopes: Any, key: Any, axis: int) -> Any:
    if slopes is None:
        return None
    checks.check_array("slopes", slopes)
    checks.check_array("key", key)
    checks.check_floating(slopes=slopes)
    if slopes.ndim != 1 or (key.ndim > axis and slopes.shape[0] != key.shape[axis]):
        raise ValueError(f"slopes: expected [K], one per head of key {tuple(key.shape)}, got {tuple(slopes.shape)}")
    checks.check_values(
        "slopes", slopes, lambda x: x < 0, "expected at least 0, got negative numbers; pass -log(decay)"
    )
    return -slopes


def lightning_slopes(
    num_heads: int,
    layer_idx: int | None = None,
    num_layers: int | None = None,
    variant: Literal["repo", "paper", "minimax"] = "repo",
) -> Float[Array, " num_heads"]:
    """Slopes of the heads of layer `layer_idx` out of `num_layers`, or before any layer factor when both are `None`.

    - "repo" (released code): ALiBi's 2^(-8 (i + 1) / n) where n is a power of two; else the slopes of the power of two
      below, then every other slope of the one above. Times 1 - l / (L - 1) + 1e-5; 1 when there is one layer.
    - "paper" (TransNormerLLM; flash-linear-attention): 8 h / n * (1 - l / L), so head 0 never decays.
    - "minimax" (MiniMax in transformers): 2^(-8 (i + 1) / n) for any n, times 1 - l / (L - 1 + 1e-5) + 1e-5.

    Raises:
      ValueError: an unknown variant, only one of `layer_idx` and `num_layers`, or `layer_idx` out of range.
    """
    checks.check_count("num_heads", num_heads)
    checks.check_choice("variant", variant, ("repo", "paper", "minimax"))
    if (layer_idx is None) != (num_layers is None):
        raise ValueError(f"layer_idx, num_layers: expected both or neither, got {layer_idx} and {num_layers}")
    slopes = 8 * np.arange(num_heads) / num_heads if variant == "paper" else _geometric(num_heads, variant)
    if layer_idx is not None and num_layers is not None:
        layers = checks.check_count("num_layers", num_layers)
        layer = checks.check_count("layer_idx", layer_idx, minimum=0)
        if layer >= layers:
            raise ValueError(f"layer_idx: expected less than num_layers = {layers}, got {layer}")
        if variant == "paper":
            slopes = slopes * (1 - layer / layers)
        elif variant == "minimax":
            slopes = slopes * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
        elif layers > 1:
            slopes = slopes * (1 - layer / (layers - 1) + 1e-5)
    return jnp.asarray(slopes, jnp.float32)


def _geometric(num_heads: int, variant: str) -> np.ndarray:
    power = 1 << num_heads.bit_length() - 1
    if variant == "minimax" or power == num_heads:
        return 2.0 ** (-8 * np.arange(1, num_heads + 1) / num_heads)
    between = _geometric(2 * power, variant)[::2]
    return np.concatenate([_geometric(power, variant), between[: num_heads - power]])
