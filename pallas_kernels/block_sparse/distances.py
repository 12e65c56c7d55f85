"""Score functions that add a number for every distance of key and query, such as a table of relative positions.

    f(y, n, t, s) = y + g_n(s - t)

g is asked for all distances once, outside of the kernel, so what it reads may be of any form, and has its gradients
there. The kernel has g as a strip of as many rows as lanes, which shift by one from each to the next: the logits of 128
queries from t0 on and of keys from s0 on, both multiples of 128, are a piece of it from a multiple of 128 lanes on,

    strip_n[r, x] = g_n(x - o - r)                z[t0 + r, s0 + j] = y + strip_n[r, s0 - t0 + o + j]

with o the largest t0. So a tile of logits takes one addition. The gradients dy of a head add up in a strip alike, and
that of g is the sum over r of what stands at x = d + o + r: seven sums of halves, each moved by its height.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Literal
from jaxtyping import Array, Float

from pallas_kernels.block_sparse.tiling import LANES

BUDGET = 16 * 2**20
"""Bytes that a strip may take on the chip: 32768 distances."""

_CONSTANT, _DISTANCE, _SCORE = "constant", "distance", "score"
# fmt: off
_ELEMENTWISE = frozenset((
    "abs", "add", "and", "ceil", "clamp", "convert_element_type", "copy", "cos", "div", "eq", "erf", "exp", "exp2",
    "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "ne", "neg", "not", "or", "pow", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "square",
    "stop_gradient", "sub", "tanh", "xor",
))
# fmt: on
"""What gives one number for one number of each operand."""


def is_by_distance(program: Any) -> bool:
    """Whether a score function is the score plus a function of the head and of s - t.

    Args:
      program: a jaxpr of (score `[8, 128]`, b, h, q_pos `[8, 1]`, kv_pos `[1, 128]`, *captured).
    """
    captured = [_CONSTANT] * (len(program.jaxpr.invars) - 5)
    return _kinds(program.jaxpr, [_SCORE, None, _CONSTANT, (1, 0), (0, 1), *captured]) == [_SCORE]


def _kinds(jaxpr: Any, kinds: Sequence[Any]) -> list[Any]:
    """Of the results: constant, of the distance, the score plus one of these, or (a, b) for a t + b s + a constant."""
    known: dict[Any, Any] = dict.fromkeys(jaxpr.constvars, _CONSTANT)
    known |= dict(zip(jaxpr.invars, kinds, strict=True))

    def kind(x: Any) -> Any:
        return _CONSTANT if isinstance(x, Literal) else known.get(x)

    for equation in jaxpr.eqns:
        found = [kind(x) for x in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if equation.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
            results = _kinds(inner.jaxpr, found)
        else:
            results = [_kind(equation, found)] * len(equation.outvars)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [kind(x) for x in jaxpr.outvars]


def _kind(equation: Any, kinds: list[Any]) -> Any:
    name, result = equation.primitive.name, equation.outvars[0].aval
    if None in kinds or not kinds:
        return None
    if all(kind == _CONSTANT for kind in kinds):
        return _CONSTANT
    affine = [(0, 0) if kind == _CONSTANT else kind for kind in kinds]
    if all(isinstance(kind, tuple) for kind in affine):
        # Positions are exact in these types.
        wide = result.dtype in (jnp.int32, jnp.int64, jnp.uint32, jnp.float32, jnp.float64)
        match name:
            case "add" if wide:
                return _whole([a + b for a, b in zip(*affine, strict=True)])
            case "sub" if wide:
                return _whole([a - b for a, b in zip(*affine, strict=True)])
            case "neg" if wide:
                return _whole([-a for a in affine[0]])
            case "convert_element_type" if wide:
                return affine[0]
            case "broadcast_in_dim" if _keeps_axes(equation):
                return affine[0]
            case "eq" | "ne" | "lt" | "le" | "gt" | "ge":  # a comparison of a difference with 0
                return None if sum(affine[0]) != sum(affine[1]) else _DISTANCE
        if any(sum(kind) for kind in affine):
            return None
    kinds = [_DISTANCE if isinstance(kind, tuple) else kind for kind in kinds]
    if _SCORE in kinds:
        adds = (name == "add" and kinds.count(_SCORE) == 1) or (name == "sub" and kinds[1] != _SCORE)
        alike = name in ("convert_element_type", "broadcast_in_dim") and result == equation.invars[0].aval
        return _SCORE if adds or alike else None
    if name in _ELEMENTWISE:
        return _DISTANCE
    match name:
        case "broadcast_in_dim":
            return _DISTANCE if _keeps_axes(equation) else None
        case "concatenate":  # the parts of an index; what would make something else of it is not known here
            return _DISTANCE
        case "gather":
            return _DISTANCE if kinds[0] == _CONSTANT else None
    return None


def _whole(affine: list[int]) -> Any:
    return tuple(affine) if any(affine) else _CONSTANT


def _keeps_axes(equation: Any) -> bool:
    """Queries stay along the first axis and keys along the second."""
    return equation.params["broadcast_dimensions"] == tuple(range(equation.invars[0].aval.ndim))


def length(q_len: int, kv_len: int) -> int:
    """Lanes of a strip, for lengths in whole blocks."""
    return q_len + kv_len - LANES


def numbers(
    score_mod: Callable[..., Any],
    captured: Sequence[Array],
    *,
    heads: int,
    lengths: tuple[int, int],
    padded: tuple[int, int],
) -> Float[Array, "N L"]:
    """g for the distances 1 - T to S - 1 of `padded` lengths T and S; those beyond `lengths` count as the last ones."""
    (q_len, kv_len), (most_q, most_kv) = lengths, padded
    distance = jnp.clip(jnp.arange(1 - most_q, most_kv), 1 - q_len, kv_len - 1)[None]
    q_pos, kv_pos, score = jnp.maximum(-distance, 0), jnp.maximum(distance, 0), jnp.zeros(distance.shape, jnp.float32)

    def of_head(n: Array) -> Array:
        return score_mod(score, jnp.int32(0), n, q_pos, kv_pos, *captured)[0]

    return jax.vmap(of_head)(jnp.arange(heads, dtype=jnp.int32))


def strips(g: Float[Array, "N L"]) -> Float[Array, "N 128 lanes"]:
    """Rows that begin one number earlier each, from copies of g laid end to end."""
    heads, size = g.shape
    lanes = size - LANES + 1
    copies = jnp.broadcast_to(jnp.pad(g, [(0, 0), (0, 1)])[:, None], (heads, LANES, size + 1)).reshape(heads, -1)
    return copies[:, LANES - 1 : LANES - 1 + LANES * size].reshape(heads, LANES, size)[:, :, :lanes]


def _at(start: Any, offset: int, size: int) -> Any:
    return pl.ds(pl.multiple_of(start + offset, LANES), size)


def tile(strip: Any, origin: Any, rows: slice, columns: slice) -> jax.Array:
    """What the logits of a tile get; `origin`: the lane of the first query and key of their blocks."""
    size = columns.stop - columns.start
    pieces = [strip[:, _at(origin, columns.start - row, size)] for row in range(rows.start, rows.stop, LANES)]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)


def add(sums: Any, origin: Any, rows: slice, columns: slice, dy: jax.Array) -> None:
    """Adds the gradients of a tile to a strip, before which one tile of lanes is empty."""
    size = columns.stop - columns.start
    for i, row in enumerate(range(rows.start, rows.stop, LANES)):
        sums[:, _at(origin, LANES + columns.start - row, size)] += dy[i * LANES : (i + 1) * LANES]


def total(sums: Any) -> jax.Array:
    """The gradient of g behind one number more, from a strip of gradients."""
    x, height = sums[...], LANES // 2
    while height:
        # Row r of the lower half moves to the left; what comes in at the right end is the empty tile of lanes.
        x = x[:height] + pltpu.roll(x[height:], x.shape[1] - height, 1)
        height //= 2
    return x


def scratch(lanes: int) -> Any:
    return pltpu.VMEM((LANES, LANES + lanes), jnp.float32)
