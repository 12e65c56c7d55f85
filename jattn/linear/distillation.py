"""How far Hedgehog's attention is from the softmax attention that it is to mimic.

    a*_ts = softmax_s(scale q_t . k_s)                                          the teacher
    a_ts  = phi_q(q_t) . phi_k(k_s) / (sum_r phi_q(q_t) . phi_k(k_r) + eps)     the student
    L     = xent_factor mean_t(- sum_s a*_ts log max(a_ts, 1e-12)) + mse_factor mean_t,c((o_t - o*_t)_c ^ 2)

The means run over batch, query heads and rows, not over the weights of a row. A scan goes over blocks of rows, whose
weights the backward pass computes again: T x S weights never stand side by side.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jattn import checks
from jattn.linear import arguments
from jattn.linear.hedgehog import Activation, check_maps, hedgehog_feature_map

LEAST_WEIGHT = 1e-12


def attention_distillation_loss(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    query_weight: Float[Array, "N H F"] | None = None,
    key_weight: Float[Array, "K H F"] | Float[Array, "N H F"] | None = None,
    mask: Bool[Array, "B 1 1 S"] | None = None,
    *,
    query_bias: Float[Array, "N F"] | None = None,
    key_bias: Float[Array, "K F"] | Float[Array, "N F"] | None = None,
    activation: Activation = "softmax_dim",
    is_causal: bool = True,
    scale: float | None = None,
    eps: float = 1e-12,
    segment_ids: Int[Array, "B T"] | None = None,
    xent_factor: float = 1.0,
    mse_factor: float = 0.0,
    block_size: int = 128,
) -> Float[Array, ""]:
    """Loss of one layer (Zhang et al. 2024, eq. 5: cross-entropy alone; HazyResearch/lolcats: `mse_factor=1000` alone).

    Gradients reach weights and biases only. Queries, keys and values are the teacher's, and as constants to the
    student as to the teacher.

    Args:
      query, key, value, query_weight, key_weight, mask, query_bias, key_bias, activation, is_causal, eps, segment_ids:
        as in `hedgehog_attention`. Rows that may attend to nothing do not count.
      scale: of the teacher's logits; `None` means `H ** -0.5`.
      xent_factor, mse_factor: at least 0; what has the factor 0 is not computed. The squared error is that of heads,
        before any output projection.
      block_size: rows whose weights are held at a time; memory grows as B N S times this.

    Returns:
      a scalar in float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: as `hedgehog_attention`.
    """
    arguments.check_arrays(query=query, key=key, value=value)
    sizes = checks.bind_shapes(("query", query, "B T N H"), ("key", key, "B S K H"), ("value", value, "B S K V"))
    checks.check_floating(query=query)
    checks.check_same_dtype(query=query, key=key, value=value)
    checks.check_flags(is_causal=is_causal)
    sizes = check_maps(sizes, query_weight, key_weight, query_bias, key_bias, activation)
    checks.check_no_empty(sizes, "BTSNHV")
    if is_causal:
        checks.check_causal_lengths(sizes["T"], sizes["S"])
    elif segment_ids is not None and sizes["T"] != sizes["S"]:
        raise ValueError(f"segment_ids: needs a key for every query, got {sizes['T']} queries and {sizes['S']} keys")
    arguments.check_padding_mask(mask, sizes)
    arguments.check_segment_ids(segment_ids, sizes)
    xent_factor, mse_factor, eps = (
        _not_negative(name, x) for name, x in (("xent_factor", xent_factor), ("mse_factor", mse_factor), ("eps", eps))
    )
    scale = arguments.scale(scale, default=sizes["H"] ** -0.5)
    block = min(checks.check_count("block_size", block_size), sizes["T"])

    accumulator = checks.accumulator_dtype(query.dtype)
    query, key, value = (jax.lax.stop_gradient(jnp.asarray(x, accumulator)) for x in (query, key, value))
    features = functools.partial(hedgehog_feature_map, activation=activation)
    # A map of keys is shared by a group of query heads, [B, S, K, 1, 2F], or is one head's, [B, S, K, G, 2F].
    keys = features(key, key_weight, key_bias).reshape(*key.shape[:3], -1, 2 * sizes["F"])
    rows = {
        "query": query.reshape(*query.shape[:2], sizes["K"], -1, sizes["H"]),
        "features": features(query, query_weight, query_bias).reshape(*query.shape[:2], sizes["K"], -1, 2 * sizes["F"]),
        "position": jnp.broadcast_to(jnp.arange(sizes["T"]), query.shape[:2]),
    }
    if segment_ids is not None:
        rows["segment"] = jnp.asarray(segment_ids)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(sums: tuple[Array, Array], rows: dict[str, Array]) -> tuple[tuple[Array, Array], None]:
        loss, count = _block_loss(
            key,
            keys,
            value,
            mask,
            segment_ids,
            rows,
            is_causal=is_causal,
            scale=scale,
            eps=eps,
            xent_factor=xent_factor,
            mse_factor=mse_factor,
        )
        return (sums[0] + loss, sums[1] + count), None

    zero = jnp.zeros((), accumulator)
    whole, rest = divmod(sizes["T"], block)
    blocks = {
        name: jnp.moveaxis(x[:, : whole * block].reshape(x.shape[0], whole, block, *x.shape[2:]), 1, 0)
        for name, x in rows.items()
    }
    (total, count), _ = jax.lax.scan(add, (zero, zero), blocks)
    if rest:
        (total, count), _ = add((total, count), {name: x[:, whole * block :] for name, x in rows.items()})
    return total / jnp.maximum(count * sizes["N"], 1)


def _block_loss(
    key: Float[Array, "B S K H"],
    keys: Float[Array, "B S K #G features"],
    value: Float[Array, "B S K V"],
    mask: Bool[Array, "#B 1 1 S"] | None,
    segment_ids: Int[Array, "B S"] | None,
    rows: dict[str, Array],
    *,
    is_causal: bool,
    scale: float,
    eps: float,
    xent_factor: float,
    mse_factor: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed over the heads of a block of rows, the loss; and how many rows see something."""
    # [B, 1, 1, rows, S]
    position = rows["position"][:, None, None, :, None]
    allowed = (
        position >= jnp.arange(key.shape[1]) if is_causal else jnp.ones((*position.shape[:-1], key.shape[1]), bool)
    )
    if mask is not None:
        allowed = allowed & mask[:, :, None]
    if segment_ids is not None:
        allowed = allowed & (rows["segment"][:, :, None] == segment_ids[:, None, :])[:, None, None]
    seen = jnp.any(allowed, axis=-1)

    logits = jnp.where(allowed, scale * jnp.einsum("btkgh,bskh->bkgts", rows["query"], key), -jnp.inf)
    teacher = jnp.where(seen[..., None], jax.nn.softmax(jnp.where(seen[..., None], logits, 0), axis=-1), 0)
    shared = keys[:, :, :, 0] if keys.shape[3] == 1 else keys
    products = "btkgf,bskf->bkgts" if keys.shape[3] == 1 else "btkgf,bskgf->bkgts"
    weights = jnp.where(allowed, jnp.einsum(products, rows["features"], shared), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True) + eps
    student = weights / jnp.where(total == 0, 1, total)

    loss = jnp.zeros((), key.dtype)
    if xent_factor:
        loss -= xent_factor * jnp.sum(teacher * jnp.log(jnp.maximum(student, LEAST_WEIGHT)))
    if mse_factor:
        error = jnp.einsum("bkgts,bskv->bkgtv", student - teacher, value)
        loss += mse_factor * jnp.sum(error**2) / value.shape[-1]
    return loss, jnp.sum(seen).astype(key.dtype)


def _not_negative(name: str, x: float) -> float:
    number = arguments.number(name, x)
    if number < 0:
        raise ValueError(f"{name}: expected at least 0, got {x}")
    return number
