"""Neighborhood attention: every query sees a window of keys around it on a grid of one, two or three axes.

For query i of head n and the keys j of its key head n // (N / K), with the windows of `jattn.neighborhood.window`:

    z_ij = scale <q_i, k_j> + bias_n[j - i + w - 1]      for j in the window of i, along every axis, and not hidden
    z_im = scale <q_i, k_m>                              for every additional token m
    lse_i = log( sum_j exp(z_ij) + sum_m exp(z_im) )     o_i = sum_j exp(z_ij - lse_i) v_j + sum_m exp(z_im - lse_i) v_m

The bias is there only with `rel_pos_bias`; distances are those of a dilation group. A query that sees nothing, which
only `key_mask` brings about, has o = 0, lse = -inf and hands no gradient to anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jattn import blockwise
from jattn.blockwise import blockwise_attention
from jattn.checks import accumulator_dtype, check_flags
from jattn.dispatch import Choice, Implementation, dispatch
from jattn.dot_product import dense_attention, make_score, merge_attentions, varying_alike
from jattn.fused import fused_softmax, kernels
from jattn.masks import Full
from jattn.neighborhood.arguments import Operands, check_grid, check_operands, check_rel_pos_bias
from jattn.neighborhood.fused import check_fused_neighborhood, fused_neighborhood
from jattn.neighborhood.window import Neighborhood, per_axis, visible
from jattn.neighborhood.xla import windowed_attention
from jattn.softmax_tile import Score

Sizes = int | tuple[int, ...]


def neighborhood_attention(
    query: Float[Array, "B ... N H"],
    key: Float[Array, "B ... K H"],
    value: Float[Array, "B ... K V"],
    *,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    additional_keys: Float[Array, "B M K H"] | None = None,
    additional_values: Float[Array, "B M K V"] | None = None,
    rel_pos_bias: Float[Array, "N ..."] | None = None,
    key_mask: Bool[Array, "B ..."] | None = None,
    clamp_window: bool = False,
    return_lse: bool = False,
    q_tile: Sizes | None = None,
    kv_tile: Sizes | None = None,
    implementation: Choice = None,
) -> Any:
    """Neighborhood attention of NATTEN (Hassani et al. 2023, 2024), in time and memory linear in the tokens.

    Where an argument is one number for each axis, a tuple gives them and a number serves all.

    Args:
      query: `[B, *grid, N, H]`, with a grid of 1, 2 or 3 axes.
      key: `[B, *grid, K, H]`, on the same grid; query head n reads key head `n // (N // K)`.
      value: `[B, *grid, K, V]`.
      kernel_size: keys in a window w along each axis. Windows are moved inward at borders; with an even w, there is one
        key more before the query than after it.
      stride: s neighboring queries share a window, 1 <= s <= w: 1 is a window around each query, s = w is attention
        within blocks (Generalized Neighborhood Attention).
      dilation: tokens from one key of a window to the next (DiNA); w d must not exceed the extent of the axis.
      is_causal: along each axis, keys after the query are hidden and the window is of the w keys up to the last query
        that shares it. It is not an order of the flattened tokens.
      scale: of the products; `None` is `H ** -0.5`.
      additional_keys, additional_values: `[B, M, K, H]` and `[B, M, K, V]`, M tokens that every query sees, under one
        softmax with its window.
      rel_pos_bias: `[N, 2 w - 1, ...]`, added to the scaled products of the windows, for stride 1 and no causal axis.
        On TPU the kernels hold it about 128 times for a head: some 80000 numbers fit the chip, half as many that of v5p
        and tpu7x. Tiles that are given are powers of two along all axes but the first then.
      key_mask: `[B, *grid]`, False hides a key from all queries.
      clamp_window: on a small grid take the widest window that there is, and no stride beyond it, instead of an error.
      return_lse: return `(out, lse)`.
      q_tile, kv_tile: tokens of a tile of queries and of keys along each axis; `None` is what is fast. They change the
        order of sums and nothing else.
      implementation: "pallas_tpu", "pallas_gpu", "xla" (all linear) or "reference" (dense; the one that has
        forward-mode derivatives); see `jattn.explain`.

    Returns:
      `out [B, *grid, N, V]` in the query's dtype; `lse [B, *grid, N]`, natural logarithm, over window and additional
      tokens, in float32 (float64 for float64). Gradients reach all arrays of floats, through both.

    Differs from NATTEN in that a `scale` of 0 is one, w = 1 is a window (the output is then the value), and with
    additional tokens the gradient of lse is exact.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a window that reaches beyond the grid; a stride beyond the
        window.
    """
    operands = Operands(query, key, value, additional_keys, additional_values, rel_pos_bias, key_mask)
    sizes = check_operands(operands)
    check_flags(clamp_window=clamp_window, return_lse=return_lse)
    neighborhood = Neighborhood(kernel_size, stride, dilation, is_causal).on(operands.grid, clamp_window)
    check_rel_pos_bias(operands, neighborhood)
    rank = len(operands.grid)
    tiles = {
        name: None if t is None else per_axis(name, t, rank) for name, t in (("q_tile", q_tile), ("kv_tile", kv_tile))
    }
    out, lse = dispatch(
        "neighborhood_attention",
        _IMPLEMENTATIONS,
        implementation,
        varying_alike(operands),
        neighborhood=neighborhood,
        score=make_score(scale, None, sizes["H"]),
        **tiles,
    )
    return (out, lse) if return_lse else out


def _of_rank(rank: int) -> Callable[..., Any]:
    """`neighborhood_attention` for grids of one rank."""
    name, axes = f"na{rank}d", ", ".join("XYZ"[:rank])

    @functools.wraps(neighborhood_attention)
    def attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
        found = check_grid("query", query)
        if found != rank:
            raise ValueError(
                f"query: {name} takes a grid of {rank} axes, [B, {axes}, N, H], got shape "
                f"{tuple(query.shape)} with {found}; neighborhood_attention takes any"
            )
        return neighborhood_attention(query, key, value, **options)

    attend.__name__ = attend.__qualname__ = name
    attend.__doc__ = (
        f"`neighborhood_attention` on a grid of {rank} axes, and no other: query `[B, {axes}, N, H]`, key and value "
        f"`[B, {axes}, K, H or V]`.\n\n    The arguments, the result and the errors are those of "
        "`neighborhood_attention`.\n    "
    )
    return attend


na1d, na2d, na3d = (_of_rank(rank) for rank in (1, 2, 3))


def _dense(x: Operands, *, neighborhood: Neighborhood, score: Score, q_tile: Any, kv_tile: Any) -> tuple[Array, Array]:
    """The definition: one softmax over all tokens of the grid that are seen, and the additional ones."""
    grid, tokens = x.grid, x.tokens
    axes = neighborhood.axes(grid)
    rank = len(grid)

    def pairwise(table: Any, a: int) -> Array:
        """`[X, X]` of axis a, to be broadcast to all pairs of tokens."""
        shape = [1] * (2 * rank)
        shape[a] = shape[rank + a] = grid[a]
        return jnp.asarray(table).reshape(shape)

    seen = functools.reduce(jnp.logical_and, (pairwise(visible(axis), a) for a, axis in enumerate(axes)))
    seen = seen.reshape(1, 1, tokens, tokens)
    if x.key_mask is not None:
        seen = seen & x.key_mask.reshape(-1, 1, 1, tokens)
    bias = None
    if x.rel_pos_bias is not None:
        entry = jnp.zeros((), np.int32)
        for a, axis in enumerate(axes):
            i = np.arange(axis.extent) // axis.dilation
            distance = np.clip(i - i[:, None], 1 - axis.window, axis.window - 1)
            entry = entry * (2 * axis.window - 1) + pairwise(distance + axis.window - 1, a)
        table = x.rel_pos_bias.astype(accumulator_dtype(x.rel_pos_bias.dtype))  # its gradient is a sum over all queries
        bias = table.reshape(x.query.shape[-2], -1)[:, entry.reshape(tokens, tokens)][None]
    query, key, value = (_flat(a) for a in (x.query, x.key, x.value))
    if x.additional_keys is not None and x.additional_values is not None:
        key, value = jnp.concatenate([key, x.additional_keys], 1), jnp.concatenate([value, x.additional_values], 1)
        beyond = [(0, 0), (0, 0), (0, 0), (0, x.additional_keys.shape[1])]
        seen = jnp.pad(seen, beyond, constant_values=True)
        bias = None if bias is None else jnp.pad(bias, beyond)
    out, lse = dense_attention(blockwise.Operands(query, key, value, bias, seen), mask=Full(), score=score)
    return out.reshape(*x.query.shape[:-1], -1), lse.reshape(x.query.shape[:-1])


def _flat(x: Float[Array, "B ... N H"]) -> Float[Array, "B T N H"]:
    return x.reshape(x.shape[0], -1, *x.shape[-2:])


def with_additional(window: Callable[..., Any], dense: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation of the op from one of windows alone and one of full attention.

    Args:
      window: `window(operands, *, neighborhood, score, q_tile, kv_tile) -> (out, lse)`, without the additional tokens.
      dense: `dense(blockwise.Operands, *, mask, score) -> (out, lse)`.
    """

    def attend(x: Operands, *, score: Score, **options: Any) -> tuple[Array, Array]:
        near = window(x._replace(additional_keys=None, additional_values=None), score=score, **options)
        if x.additional_keys is None or x.additional_values is None:
            return near
        beyond = blockwise.Operands(_flat(x.query), x.additional_keys, x.additional_values)
        out, lse = dense(beyond, mask=Full(), score=score)
        far = out.reshape(near[0].shape), lse.reshape(near[1].shape)
        return merge_attentions((near[0], far[0]), (near[1], far[1]))

    return attend


def _on_kernels(platform: Any, x: Operands, **options: Any) -> tuple[Array, Array]:
    near, far = (functools.partial(f, platform) for f in (fused_neighborhood, fused_softmax))
    return with_additional(near, far)(x, **options)


# Fastest first. Called as `run(operands, *, neighborhood, score, q_tile, kv_tile)`, with a number for each axis.
_KERNELS = kernels(_on_kernels, check_fused_neighborhood)
_IMPLEMENTATIONS = (
    _KERNELS.tpu,
    _KERNELS.gpu,
    Implementation("xla", with_additional(windowed_attention, blockwise_attention)),
    Implementation("reference", _dense),
    _KERNELS.interpret,
)
