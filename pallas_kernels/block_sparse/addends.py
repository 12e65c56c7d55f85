"""Score functions that add something affine in the positions, such as ALiBi: a row and a column instead of a tile.

    f(y, t, s) = y + g(t, s)      g(t, s) = g(t0, s) + a(t)      a(t) = g(t, s0) - g(t0, s0)      for any t0 and s0

What is added to the scores of a tile is the row g(t0, s), with the bias of keys, if there is one. The column a shifts
all logits of a query alike, and is left to its log-sum-exp. t0 and s0 are in the middle of a tile of queries: so no
number is larger than distances are, and nothing is lost far from the origin. The same split gives the gradient of a
number w that f reads from captured arrays, from the gradients dy of scores,

    dw = sum_s (dg(t0, s) / dw) (sum_t dy_ts) + sum_s (sum_t (da(t) / dw) dy_ts)

whose sums over t are more rows of the product q^T dy: one of ones, and da / dw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from pallas_kernels.block_sparse.walk import iota

Addend = Callable[[jax.Array, jax.Array], jax.Array]
"""g(q_pos, kv_pos), of positions that broadcast against each other."""

_CONSTANT, _AFFINE, _SCORE = range(3)
"""Without positions; affine in them; the score plus one of these."""


def is_addend(program: Any) -> bool:
    """Whether a score function, a jaxpr of (score, b, h, q_pos, kv_pos, *captured), is the score plus an addend."""
    captured = [_CONSTANT] * (len(program.jaxpr.invars) - 5)
    return _kinds(program.jaxpr, [_SCORE, _CONSTANT, _CONSTANT, _AFFINE, _AFFINE, *captured]) == [_SCORE]


def _kinds(jaxpr: Any, kinds: Sequence[int | None]) -> list[int | None]:
    """Of the results; `None` is anything else."""
    known: dict[Any, int | None] = dict(zip(jaxpr.invars, kinds, strict=True))

    def kind(x: Any) -> int | None:
        return _CONSTANT if isinstance(x, Literal) else known.get(x)

    for equation in jaxpr.eqns:
        found = [kind(x) for x in equation.invars]
        if equation.primitive.name in ("jit", "pjit"):
            results = _kinds(equation.params["jaxpr"].jaxpr, found)
        else:
            results = [_kind(equation, found)] * len(equation.outvars)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [kind(x) for x in jaxpr.outvars]


def _kind(equation: Any, kinds: list[Any]) -> int | None:
    if None in kinds or not kinds:
        return None
    if not any(kinds):
        return _CONSTANT
    result = equation.outvars[0].aval
    match equation.primitive.name, kinds:
        case "broadcast_in_dim", [kind]:
            return kind if equation.params["broadcast_dimensions"] == tuple(range(result.ndim)) else None
        case "convert_element_type", [kind]:  # any other type would round
            return kind if result.dtype == jnp.float32 else None
        case "add", [x, y] if [x, y] != [_SCORE, _SCORE]:
            return max(x, y)
        case "sub", [x, y] if y != _SCORE:
            return max(x, y)
        case ("neg", [1]) | ("mul", [0, 1] | [1, 0]):
            return _AFFINE
        case "div", [1, 0] if result.dtype == jnp.float32:  # that of integers rounds
            return _AFFINE
    return None


def row(g: Addend, q_pos: jax.Array, kv_pos: jax.Array) -> jax.Array:
    """g(t0, s) for a tile of queries at `[t, 1]` and keys at `[1, s]`."""
    return g(q_pos[:1] + q_pos.shape[0] // 2, kv_pos)


def column(g: Addend, start: Any, size: int, tile: int) -> jax.Array:
    """a of the queries of a block, lying `[1, size]`, each with the t0 of its tile."""
    middle = jnp.concatenate([jnp.full((1, tile), start + i + tile // 2) for i in range(0, size, tile)], axis=1)
    at, origin = g(start + iota((1, size), 1), middle), g(middle, middle)
    return jnp.where(at == -jnp.inf, 0, at - origin)  # then both are


def rows(reads: int, dtype: Any) -> int:
    """Rows below q^T for the gradients of so many numbers."""
    return 1 + reads * pieces(dtype)


def pieces(dtype: Any) -> int:
    """Of a float32, for a product that takes `dtype`."""
    return 3 if dtype == jnp.bfloat16 else 1


def parts(x: jax.Array, dtype: Any) -> list[jax.Array]:
    """Numbers that add up to x, none of which a product rounds."""
    found = []
    for _ in range(pieces(dtype)):
        found.append(x.astype(dtype).astype(jnp.float32))
        x = x - found[-1]
    return found
