"""How far SEA's estimate, its scores and its output are from the softmax attention that it is to stand for.

    z*, c* = the teacher's logits [N, T, T] and output       est_T = the estimate, a cell's number for each of its keys

    L = 0.1 KL(softmax z* || softmax est_T) + mean (softmax est_T - softmax z*)^2
      + 0.1 KL(softmax z* || softmax x)     + mean (softmax x - softmax z*)^2           x = scale <q_t, k_s>, all pairs
      + mean (o - c*)^2

In causal order KL is summed over pairs and divided by B N T; in the other it is summed over pairs of real tokens and
divided by how many of these there are. Every mean is over all elements, padded ones included. It makes T x T weights.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.linear import arguments
from jattn.linear.sea import sea_attention, token_reach
from jattn.linear.sea_params import SEAParams
from jattn.linear.sea_selection import key_cells, sea_interpolate

KL_FACTOR = 0.1


def sea_distillation_loss(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    params: SEAParams,
    teacher_logits: Float[Array, "B N T T"],
    teacher_output: Float[Array, "B T N V"],
    mask: Bool[Array, "B 1 1 T"] | None = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> Float[Array, ""]:
    """L of one layer (Lee et al. 2024, eq. 7; the factors are the released code's).

    Args:
      query, key, value, params, mask, is_causal, scale, segment_ids: as in `sea_attention`.
      teacher_logits: z*, scaled; what a row may not see is left out of its softmax here.
      teacher_output: c*, by head. No gradient reaches the teacher.
      options: `k_budget` and the other options of `sea_attention`.

    Returns:
      a scalar in float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: as `sea_attention`.
    """
    checks.bind_shapes(
        ("query", query, "B T N H"),
        ("value", value, "B T K V"),
        ("teacher_logits", teacher_logits, "B N T T"),
        ("teacher_output", teacher_output, "B T N V"),
    )
    checks.check_floating(teacher_logits=teacher_logits, teacher_output=teacher_output)
    out, made = sea_attention(
        query,
        key,
        value,
        params,
        mask,
        is_causal=is_causal,
        scale=scale,
        segment_ids=segment_ids,
        return_intermediates=True,
        **options,
    )
    accumulator = checks.accumulator_dtype(query.dtype)
    teacher_logits, teacher_output = (
        jax.lax.stop_gradient(jnp.asarray(x, accumulator)) for x in (teacher_logits, teacher_output)
    )
    keep = None if mask is None else jnp.broadcast_to(mask[:, 0, 0], query.shape[:2])
    reach = token_reach(keep, query, is_causal=is_causal, segment_ids=segment_ids)
    _, allowed = key_cells(reach, 1)
    allowed = allowed[:, None]

    def log_weights(logits: Array) -> Array:
        # Finite, so that a row that sees nothing weighs all alike in teacher and student, and adds nothing.
        return jax.nn.log_softmax(jnp.where(allowed, logits, jnp.finfo(accumulator).min / 2), axis=-1)

    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=accumulator)
    scores = arguments.scale(scale, default=query.shape[-1] ** -0.5) * scores.reshape(teacher_logits.shape)
    target = log_weights(teacher_logits)
    weights = jnp.exp(target)
    loss = jnp.mean((out.astype(accumulator) - teacher_output) ** 2)
    for logits in (sea_interpolate(made.estimate, reach, 0.0), scores):
        student = log_weights(logits)
        if is_causal:
            rows = weights.shape[0] * weights.shape[1] * weights.shape[2]
            divergence = jnp.sum(weights * (target - student)) / rows
        else:
            pairs = allowed if keep is None else allowed & keep[:, None, :, None]
            terms = weights * (jnp.log(weights + 1e-12) - student)
            tokens = query.shape[0] * query.shape[1] if keep is None else jnp.sum(keep)
            divergence = jnp.sum(jnp.where(pairs, terms, 0)) / tokens
        loss += KL_FACTOR * divergence + jnp.mean((jnp.exp(student) - weights) ** 2)
    return loss
