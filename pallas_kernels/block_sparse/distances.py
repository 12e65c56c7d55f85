"""Score functions that add a number for every distance of key and query, such as a table of relative positions.

    f(y, n, t, s) = y + g_n(s - t)

g is asked for all distances once, outside of the kernel, so what it reads may be of any form, and has its gradients
there. On TPU the kernel has g as a strip of `strips` along one axis, and a tile of logits takes one addition. On GPU it
has g as it is, a number of which it reads for each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse import strips
from pallas_kernels.block_sparse.strips import Strip

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


def strip(lengths: tuple[int, int], blocks: tuple[int, int]) -> tuple[Strip, list[Int[np.ndarray, "1 n"]]]:
    """Of all pairs of blocks, and where those of queries and of keys begin."""
    firsts = [np.arange(0, length, block)[None] for length, block in zip(lengths, blocks, strict=True)]
    least, most = -int(firsts[0][0, -1]), int(firsts[1][0, -1])
    return Strip((blocks[0],), (blocks[1],), (least,), (most,)), firsts


def lines(
    score_mod: Callable[..., Any], captured: Sequence[Array], strip: Strip, *, heads: int, lengths: tuple[int, int]
) -> Float[Array, "N 1 lanes"]:
    """g for the distances of a line; those beyond `lengths` of queries and keys count as the last ones."""
    q_len, kv_len = lengths
    return numbers(score_mod, captured, np.clip(strips.places(strip), 1 - q_len, kv_len - 1), heads=heads)[:, None]


def numbers(
    score_mod: Callable[..., Any], captured: Sequence[Array], of: Int[np.ndarray, " L"], *, heads: int
) -> Float[Array, "N L"]:
    """g for these distances."""
    distance = jnp.asarray(of, jnp.int32)[None]
    q_pos, kv_pos, score = jnp.maximum(-distance, 0), jnp.maximum(distance, 0), jnp.zeros(distance.shape, jnp.float32)

    def of_head(n: Array) -> Array:
        return score_mod(score, jnp.int32(0), n, q_pos, kv_pos, *captured)[0]

    return jax.vmap(of_head)(jnp.arange(heads, dtype=jnp.int32))
