"""The products of neighborhood attention one by one, with the weights in memory (Hassani et al. 2023, 2024).

A query i has W = prod w slots; slot o is the key start(i) + o of its window, row-major along the axes. With weights
A `[tokens, W]` of every head, and an inverse window for keys, the three products of the papers are

    PN(q, k)_io = <q_i, k_{start(i) + o}>        NN(A, v)_i = sum_o A_io v_{start(i) + o}
    IN(A, x)_j  = sum_{i: j seen by i} A_{i, j - start(i)} x_i

and each is what the gradients of the others are made of:

    PN: dq = NN(dA, k), dk = IN(dA, q)    NN: dA = PN(do, v), dv = IN(A, do)    IN: dA = PN(x, dy), dx = NN(A, dy)

A loop over slots gathers; nothing is scattered. Slots without a key, which causal windows have, are no part of any sum.
Time is O(tokens x W x H) at the speed of memory: for research on weights; `neighborhood_attention` is for speed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jattn.checks import (
    accumulator_dtype,
    bind_shapes,
    check_floating,
    check_grouped_heads,
    check_no_empty,
    check_same_dtype,
)
from jattn.dot_product import varying_alike
from jattn.neighborhood.arguments import GRID, check_grid
from jattn.neighborhood.window import Axis, Neighborhood, inverse_window_bounds, window_bounds

Sizes = int | tuple[int, ...]
Axes = tuple[Axis, ...]


def na_qk(
    query: Float[Array, "B ... N H"],
    key: Float[Array, "B ... K H"],
    *,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: bool | tuple[bool, ...] = False,
) -> Float[Array, "B ... N W"]:
    """The products of every query with the keys of its window, PN, without a scale.

    Args:
      query: `[B, *grid, N, H]`, with a grid of 1, 2 or 3 axes.
      key: `[B, *grid, K, H]`; query head n reads key head `n // (N // K)`.
      kernel_size, stride, dilation, is_causal: as in `neighborhood_attention`.

    Returns:
      `[B, *grid, N, W]` in the query's dtype, with W the product of `kernel_size`; -inf in slots without a key, so
      that a softmax over the last axis gives them 0.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option.
    """
    rank = check_grid("query", query)
    sizes = bind_shapes(("query", query, f"B {GRID[rank]} N H"), ("key", key, f"B {GRID[rank]} K H"))
    check_floating(query=query)
    check_same_dtype(query=query, key=key)
    check_no_empty(sizes, sizes)
    check_grouped_heads(sizes["N"], sizes["K"])
    grid = tuple(query.shape[1 : 1 + rank])
    axes = Neighborhood(kernel_size, stride, dilation, is_causal).axes(grid)
    return _qk(axes, *varying_alike((query, key)))


def na_av(
    attention: Float[Array, "B ... N W"],
    value: Float[Array, "B ... K V"],
    *,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: bool | tuple[bool, ...] = False,
) -> Float[Array, "B ... N V"]:
    """The sum of the values of every window, weighted, NN.

    Args:
      attention: `[B, *grid, N, W]`, the weights of the slots as `na_qk` orders them; not read where there is no key.
      value: `[B, *grid, K, V]`; query head n reads value head `n // (N // K)`.
      kernel_size, stride, dilation, is_causal: as in `neighborhood_attention`.

    Returns:
      `[B, *grid, N, V]` in the dtype of both.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option.
    """
    rank = check_grid("attention", attention)
    sizes = bind_shapes(("attention", attention, f"B {GRID[rank]} N W"), ("value", value, f"B {GRID[rank]} K V"))
    check_floating(attention=attention)
    check_same_dtype(attention=attention, value=value)
    check_no_empty(sizes, sizes)
    check_grouped_heads(sizes["N"], sizes["K"])
    grid = tuple(attention.shape[1 : 1 + rank])
    axes = Neighborhood(kernel_size, stride, dilation, is_causal).axes(grid)
    slots = math.prod(axis.window for axis in axes)
    if sizes["W"] != slots:
        raise ValueError(
            f"attention: expected [B, *grid, N, W] with W = {slots}, the keys of a window of kernel_size, got "
            f"{tuple(attention.shape)}"
        )
    return _av(axes, *varying_alike((attention, value)))


# Compiled as one even when they are called eagerly.
@functools.partial(jax.jit, static_argnums=0)
def _qk(axes: Axes, query: Array, key: Array) -> Array:
    slots, seen = _slots(axes, False)
    exists = jax.vmap(lambda slot: seen(slot).exists, out_axes=1)(jnp.arange(slots))
    products = _products(axes, _by_head(query, key.shape[-2]), _by_head(key, key.shape[-2])[:, :, :, 0])
    products = jnp.where(exists[:, None, None], products, -jnp.inf)
    return products.reshape(*query.shape[:-1], slots)


@functools.partial(jax.jit, static_argnums=0)
def _av(axes: Axes, attention: Array, value: Array) -> Array:
    kv_heads = value.shape[-2]
    out = _weighted(axes, _by_head(attention, kv_heads), _by_head(value, kv_heads)[:, :, :, 0])
    return out.reshape(*attention.shape[:-1], value.shape[-1])


class _Seen(NamedTuple):
    """Of one slot: which token of the other side each token has in it, if it has one.

    Attributes:
      slot: of the pair in the window of its query.
    """

    token: Int[Array, " T"]
    exists: Bool[Array, " T"]
    slot: Int[Array, " T"]


class _Table(NamedTuple):
    """The same along one axis, for all slots of it."""

    token: Int[np.ndarray, "X w"]
    exists: Bool[np.ndarray, "X w"]
    slot: Int[np.ndarray, "X w"]


@functools.lru_cache(maxsize=256)
def _tables(axis: Axis, of_keys: bool) -> _Table:
    """What every query of an axis sees, or what every key is seen by."""
    first, stop = inverse_window_bounds(*axis) if of_keys else window_bounds(*axis)
    other = first[:, None] + np.arange(axis.window if not of_keys else (stop - first).max())
    exists = other < stop[:, None]
    x = np.arange(axis.extent)[:, None]
    token = np.where(exists, other * axis.dilation + x % axis.dilation, x)
    start, _ = window_bounds(*axis)
    slot = x // axis.dilation - start[token] if of_keys else other - first[:, None]
    return _Table(token, exists, np.where(exists, slot, 0))


def _slots(axes: Axes, of_keys: bool) -> tuple[int, Callable[[Array], _Seen]]:
    """How many slots there are, and a function that gives what is in one."""
    tables = [_tables(axis, of_keys) for axis in axes]
    sizes = [table.token.shape[1] for table in tables]
    rank = len(sizes)

    def seen(slot: Array) -> _Seen:
        token, found, exists = jnp.zeros((), np.int32), jnp.zeros((), np.int32), jnp.ones((), bool)
        for a, (axis, table, o) in enumerate(zip(axes, tables, jnp.unravel_index(slot, sizes), strict=True)):
            shape = [-1 if b == a else 1 for b in range(rank)]
            along = _Seen(*(jnp.asarray(x)[:, o].reshape(shape) for x in table))
            token = token * axis.extent + along.token
            found = found * axis.window + along.slot
            exists = exists & along.exists
        return _Seen(token.reshape(-1), exists.reshape(-1), found.reshape(-1))

    return math.prod(sizes), seen


def _by_head(x: Float[Array, "B ... N D"], kv_heads: int) -> Float[Array, "B T K G D"]:
    return x.reshape(x.shape[0], -1, kv_heads, x.shape[-2] // kv_heads, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(axes: Axes, q: Float[Array, "B T K G D"], k: Float[Array, "B T K D"]) -> Float[Array, "B T K G W"]:
    """PN; 0 in slots without a key."""
    slots, seen = _slots(axes, False)

    def step(_: None, slot: Array) -> tuple[None, Array]:
        at = seen(slot)
        found = jnp.einsum("btkgd,btkd->btkg", q, k[:, at.token], preferred_element_type=_wide(q))
        return None, jnp.where(at.exists[:, None, None], found, 0).astype(q.dtype)

    return jnp.moveaxis(jax.lax.scan(step, None, jnp.arange(slots))[1], 0, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(axes: Axes, a: Float[Array, "B T K G W"], v: Float[Array, "B T K D"]) -> Float[Array, "B T K G D"]:
    """NN."""
    slots, seen = _slots(axes, False)

    def step(total: Array, slot: Array) -> tuple[Array, None]:
        at = seen(slot)
        weight = jnp.where(at.exists[:, None, None], a[..., slot], 0)
        return total + jnp.einsum("btkg,btkd->btkgd", weight, v[:, at.token], preferred_element_type=_wide(v)), None

    zero = jnp.zeros_like(a[..., :1] * v[:, :, :, None], _wide(v))
    return jax.lax.scan(step, zero, jnp.arange(slots))[0].astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collected(axes: Axes, a: Float[Array, "B T K G W"], x: Float[Array, "B T K G D"]) -> Float[Array, "B T K D"]:
    """IN."""
    slots, seen = _slots(axes, True)

    def step(total: Array, slot: Array) -> tuple[Array, None]:
        at = seen(slot)
        weight = jnp.where(at.exists[:, None, None], a[:, at.token, :, :, at.slot].swapaxes(0, 1), 0)
        return total + jnp.einsum("btkg,btkgd->btkd", weight, x[:, at.token], preferred_element_type=_wide(x)), None

    zero = jnp.zeros_like(a[..., 0, :1] * x[..., 0, :], _wide(x))
    return jax.lax.scan(step, zero, jnp.arange(slots))[0].astype(x.dtype)


def _wide(x: Array) -> Any:
    return accumulator_dtype(x.dtype)


def _rule(of: Any, of_first: Callable[..., Array], of_second: Callable[..., Array]) -> None:
    """The gradient rule of a product `of(axes, a, b)`."""
    of.defvjp(
        lambda axes, a, b: (of(axes, a, b), (a, b)),
        lambda axes, operands, d: (of_first(axes, *operands, d), of_second(axes, *operands, d)),
    )


_rule(_products, lambda w, q, k, d: _weighted(w, d, k), lambda w, q, k, d: _collected(w, d, q))
_rule(_weighted, lambda w, a, v, d: _products(w, d, v), lambda w, a, v, d: _collected(w, a, d))
_rule(_collected, lambda w, a, x, d: _products(w, x, d), lambda w, a, x, d: _weighted(w, a, d))
