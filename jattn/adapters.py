"""Any op of this library as the `attention_fn` of Flax's own attention layers.

    nnx.MultiHeadAttention(..., attention_fn=as_attention_fn(sliding_window_attention, window=128))

Flax calls `attention_fn(query, key, value, **keywords)` with more keywords than an op has. What an op cannot honour is
an error, never a silence: a mask that is dropped trains a model that sees the future.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jattn.catalog import CATALOG


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionFn:
    """What `as_attention_fn` returns; frozen, and hashable by its values, so that it may be a field of Flax modules."""

    op: Callable[..., Any]
    fixed: tuple[tuple[str, Any], ...] = ()

    def _values(self) -> Any:
        leaves, structure = jax.tree.flatten(self.fixed)
        return self.op, structure, tuple(map(_hashable, leaves))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionFn) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = True,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Callable[..., Any] | None = None,
        qk_attn_weights_einsum: Callable[..., Any] | None = None,
        attn_weights_value_einsum: Callable[..., Any] | None = None,
        force_fp32_for_softmax: bool = False,
        is_causal: bool = False,
    ) -> Array:
        """Attention over `[..., T, N, H]` arrays with Flax's keywords.

        Raises:
          NotImplementedError: dropout of attention weights, sowing them, or custom einsums were asked for.
          ValueError: the op has no place for the bias, mask or causality that was passed.
        """
        # broadcast_dropout only shapes a dropout that is refused; statistics are float32 here in any case.
        del dropout_rng, broadcast_dropout, force_fp32_for_softmax
        name = self.op.__name__
        if dropout_rate > 0.0 and not deterministic:
            raise NotImplementedError(
                f"dropout_rate: {name} never forms the attention weights, so it cannot drop them; "
                "set the layer's dropout_rate to 0 (dropout on the output is a layer of its own)"
            )
        if module is not None:
            raise NotImplementedError(
                f"module: {name} never forms the attention weights, so it cannot sow them; leave sow_weights=False"
            )
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise NotImplementedError(f"qk_attn_weights_einsum: {name} has its own contractions")
        query, key, value = _promote(query, key, value, dtype, promote_dtype)
        options = dict(self.fixed)
        accepted = inspect.signature(self.op).parameters
        for keyword, passed in (("bias", bias), ("mask", mask), ("is_causal", True if is_causal else None)):
            if passed is None or (keyword == "is_causal" and _always_causal(self.op)):
                continue
            if keyword in options:
                raise ValueError(f"{keyword}: fixed by as_attention_fn and passed by the layer too; drop one of them")
            if keyword not in accepted:
                raise ValueError(f"{keyword}: {name} has no such argument; {_WAY_OUT[keyword]}")
            options[keyword] = passed

        batch = query.shape[:-3]
        if mask is not None:
            # Flax makes masks of float zeros and ones.
            options["mask"] = _flatten_batch(jnp.asarray(mask).astype(bool), batch)
        if bias is not None:
            options["bias"] = _flatten_batch(jnp.asarray(bias), batch)
        with jax.default_matmul_precision(_precision_name(precision)):
            out = self.op(*(x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)), **options)
        return out.reshape(*batch, *out.shape[1:])


def as_attention_fn(op: Callable[..., Array], **fixed: Any) -> AttentionFn:
    """`op` with `fixed` options as a drop-in for `flax`'s `attention_fn`.

    Args:
      op: an op of this library, `op(query, key, value, ...) -> out`.
      fixed: options of the op, checked against its signature now rather than at the first call.

    Raises:
      TypeError: an option that the op does not have.
      ValueError: an option that changes what the op returns (`return_lse`, `return_state`).
    """
    if not callable(op):
        raise TypeError(f"op: expected an op of this library, such as jattn.dot_product_attention, got {op!r}")
    accepted = inspect.signature(op).parameters
    for keyword, option in fixed.items():
        if keyword not in accepted or keyword in ("query", "key", "value"):
            raise TypeError(f"{keyword}: {op.__name__} has no such option; it has {', '.join(list(accepted)[3:])}")
        if keyword in ("return_lse", "return_state") and option:
            raise ValueError(f"{keyword}: a Flax layer takes one array from its attention_fn")
    return AttentionFn(op, tuple(sorted(fixed.items())))


def _hashable(x: Any) -> Any:
    """An array, such as slopes, as what is in it."""
    return (x.shape, str(x.dtype), np.asarray(x).tobytes()) if isinstance(x, (jax.Array, np.ndarray)) else x


_WAY_OUT = {
    "mask": "use an op that has one, or fix its own arguments (a window, segment_ids) in as_attention_fn",
    "bias": "use dot_product_attention, which has one",
    "is_causal": "its own arguments settle causality, so leave the layer's at False",
}


def _always_causal(op: Callable[..., Any]) -> bool:
    reference = f"{op.__module__}:{op.__name__}"
    return any(entry.op == reference and entry.causality == "is" for entry in CATALOG)


def _promote(
    query: Array, key: Array, value: Array, dtype: Any, promote_dtype: Callable[..., Any] | None
) -> tuple[Array, Array, Array]:
    if promote_dtype is not None:
        return promote_dtype((query, key, value), dtype=dtype)
    common = jnp.result_type(query, key, value) if dtype is None else dtype
    return query.astype(common), key.astype(common), value.astype(common)


def _flatten_batch(x: Array, batch: tuple[int, ...]) -> Array:
    """`[*batch, N, T, S]` as `[B, N, T, S]`; a leading size of 1 on every batch axis stays 1."""
    missing = len(batch) + 3 - x.ndim
    x = x.reshape((1,) * missing + x.shape) if missing > 0 else x
    lead = x.shape[:-3]
    if all(size == 1 for size in lead):
        return x.reshape(1, *x.shape[-3:])
    return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(-1, *x.shape[-3:])


def _precision_name(precision: Any) -> Any:
    """Flax's `precision` in the form that `jax.default_matmul_precision` takes; a pair must agree with itself."""
    if isinstance(precision, tuple):
        if precision[0] != precision[1]:
            raise NotImplementedError(f"precision: a different one for each operand, {precision}, is not supported")
        precision = precision[0]
    return precision.name.lower() if isinstance(precision, jax.lax.Precision) else precision
