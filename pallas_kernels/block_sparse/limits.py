"""What the block-sparse kernels take and what they do not, and what a score function is to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.block_sparse import addends, distances, distances_gpu, scores, tiling
from pallas_kernels.block_sparse.tiling import LANES
from pallas_kernels.entry import GPU, Platform

CAPTURED_BUDGET = 128 * 2**10
SUBLANES = 8
# Positions of queries and of keys in the smallest tile, and a head: what functions are asked with to learn about them.
_INTEGERS = tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((SUBLANES, 1), (1, LANES), ()))


def check(
    query: Array,
    key: Array,
    value: Array,
    *,
    element: Callable[..., Any] | None,
    score_mod: Callable[..., Any] | None,
    captured: Sequence[Array],
    block_q: int,
    block_kv: int,
    platform: Platform = "tpu",
) -> None:
    """Raises `NotImplementedError` with the reason where the kernel does not do a call."""
    _check_arrays(query, key, value, platform=platform, block_q=block_q, block_kv=block_kv)
    _check_element(element)
    lengths = query.shape[1], key.shape[1]
    if form(score_mod, captured, lengths=lengths, platform=platform).by_distance and platform in GPU:
        distances_gpu.check_size(query.shape[2], lengths, (block_q, block_kv))


def _check_arrays(
    query: Array,
    key: Array,
    value: Array,
    *,
    platform: Platform,
    block_q: int,
    block_kv: int,
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype not in (jnp.bfloat16, jnp.float32) or x.dtype != query.dtype:
            raise NotImplementedError(f"{name}: the kernel multiplies bfloat16 or float32 alone, not {x.dtype}")
        most = tiling.widest(x.dtype) if platform in GPU else 256
        if x.shape[-1] > most:
            raise NotImplementedError(
                f"{name}: the kernel has heads of up to {most} channels, not {x.shape[-1]}"
                + (f", in {x.dtype}, for more do not fit the registers" if platform in GPU else "")
            )
    least = tiling.LEAST if platform in GPU else LANES
    if block_q % least or block_kv % least or block_q < 1 or block_kv < 1:
        raise ValueError(f"block_q, block_kv: expected multiples of {least}, got {block_q} and {block_kv}")


def _check_element(element: Callable[..., Any] | None) -> None:
    if element is not None and jax.make_jaxpr(lambda *at: element(*at))(*_INTEGERS).consts:
        raise NotImplementedError("element: the kernel holds no arrays of its surroundings, and this mask reads some")


class Form(NamedTuple):
    """What a score function does.

    Attributes:
      reads: how often the kernel reads a number that has a gradient from captured arrays.
      adds: all that it does is to add something affine in the positions.
      by_distance: or to add a number for every distance, for which the kernel asks it nothing.
    """

    reads: int
    adds: bool
    by_distance: bool


def form(
    score_mod: Callable[..., Any] | None, captured: Sequence[Array], *, lengths: tuple[int, int], platform: Platform
) -> Form:
    """Raises `NotImplementedError` with the reason where the kernel does not do what a score function does."""
    if score_mod is None:
        return Form(0, False, False)
    refused, reads, adds = None, 0, False
    try:
        reads, adds = _read(score_mod, captured, platform)
    except NotImplementedError as reason:
        refused = reason
    if platform in GPU:
        # It reads scalars as fast as anything, and has their gradients from the walk that is there.
        if refused is not None and _is_by_distance(score_mod, captured):
            return Form(0, False, True)
    elif not adds and _is_by_distance(score_mod, captured):
        if 4 * LANES * sum(lengths) <= distances.BUDGET:
            return Form(0, False, True)
        if refused is not None:
            most = distances.BUDGET // (4 * LANES)
            refused = NotImplementedError(f"score_mod: the kernel holds {most} distances, not {sum(lengths)}")
    if refused is not None:
        raise refused
    return Form(reads, adds, False)


def _is_by_distance(score_mod: Callable[..., Any], captured: Sequence[Array]) -> bool:
    """Of a score function that reads arrays as it likes."""
    q_pos, kv_pos, scalar = _INTEGERS
    score = jax.ShapeDtypeStruct((SUBLANES, LANES), jnp.float32)
    arrays = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in captured)
    try:
        return distances.is_by_distance(
            jax.make_jaxpr(lambda *x: score_mod(*x))(score, scalar, scalar, q_pos, kv_pos, *arrays)
        )
    except (TypeError, ValueError):  # arrays that do not broadcast against a tile
        return False


def _read(score_mod: Callable[..., Any], captured: Sequence[Array], platform: Platform) -> tuple[int, bool]:
    """How many numbers that have gradients the score function reads from captured arrays, and if all it does is add."""
    size = sum(4 * x.size for x in captured)
    if platform not in GPU and size > CAPTURED_BUDGET:
        raise NotImplementedError(
            f"captured: the kernel has {CAPTURED_BUDGET >> 10} KiB of scalar memory for such arrays, not {size} bytes"
        )
    count = 0

    def run(x: Array, b: Array, h: Array, q_pos: Array, kv_pos: Array, *arrays: Array) -> Array:
        def read(i: int, flat: Any) -> Array:
            nonlocal count
            count += int(jnp.issubdtype(arrays[i].dtype, jnp.floating))
            return arrays[i].reshape(-1)[flat]

        return score_mod(x, b, h, q_pos, kv_pos, *scores.tables([x.shape for x in arrays], read))

    tile, (q_pos, kv_pos, scalar) = (SUBLANES, LANES), _INTEGERS
    arrays = (jax.ShapeDtypeStruct(x.shape, scalar_dtype(x)) for x in captured)
    try:
        x = jax.ShapeDtypeStruct(tile, jnp.float32)
        program, out = jax.make_jaxpr(run, return_shape=True)(x, scalar, scalar, q_pos, kv_pos, *arrays)
    except (AttributeError, TypeError) as error:
        raise NotImplementedError(scores.INDICES.format(error)) from error
    if program.consts:
        raise NotImplementedError(
            "score_mod: the kernel holds no arrays of its surroundings, and this one reads some; pass them in captured"
        )
    if out.shape != tile or out.dtype != jnp.float32:
        raise ValueError(f"score_mod: expected scores float32{list(tile)} back, got {out.dtype}{list(out.shape)}")
    return count, addends.is_addend(program)


def scalar_dtype(x: Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.float32
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool:
        return jnp.int32
    raise NotImplementedError(f"captured: scalar memory has float32 and int32, not {x.dtype}")
