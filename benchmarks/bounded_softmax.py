"""Can a softmax do without its running maximum? The bound |q| max|k| in its place, against float64.

    b_t = scale log2(e) |q_t| max_s |k_s|  >=  u_ts        p = 2^(u - b)        l = sum p        o = (p v) / l

saves the maximum of every tile and the rescaling of what was summed. It fails where the bound is so far above the
largest logit that weights vanish, and l itself says whether that happened: below 2^-126 both formats lose a weight, S
of them are together at most S 2^-126, so that with l >= S 2^-114 no more than 2^-12 of l is lost, an eighth of what
rounding one weight to bfloat16 costs. A call is right if every row passes, and must be repeated with the running
maximum if one does not. l is the sum of rounded weights, as where matrix units sum them: the rounding of a weight that
stands alone then cancels, as it does with a running maximum, where that weight is 1.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Result

ROWS, KEYS, WIDTH, TILE = 256, 4096, 128, 512
SCALE = WIDTH**-0.5 * math.log2(math.e)
LEAST = KEYS * 2.0**-114


def inputs() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Queries, keys and which keys are hidden, by what is difficult about them."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((ROWS, WIDTH)), rng.standard_normal((KEYS, WIDTH))
    none = np.zeros(KEYS, bool)
    found = {f"normal, logits of deviation {size**2}": (size * q, size * k, none) for size in (1, 2, 4, 8)}
    found["queries and keys of norm sqrt(H)"] = (_normed(q), _normed(k), none)
    outlier = k.copy()
    outlier[7] *= 100
    found["one key 100 times as long"] = (q, outlier, none)
    found["the same key, hidden"] = (q, outlier, np.arange(KEYS) == 7)
    found["all keys opposite to all queries"] = (4 * (1 + 0.1 * q), -4 * (1 + 0.1 * k), none)
    found["queries that are keys"] = (4 * k[:ROWS], 4 * k, none)
    found["queries of lengths from 1/30 to 30"] = (q * np.geomspace(1 / 30, 30, ROWS)[:, None], k, none)
    return found


def _normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=1, keepdims=True))


@jax.jit
def running(q: jax.Array, k: jax.Array, v: jax.Array, hidden: jax.Array) -> jax.Array:
    """With the maximum of the tiles so far, as the kernels have it."""
    m, l, acc = jnp.full((ROWS, 1), -jnp.inf), jnp.zeros((ROWS, 1)), jnp.zeros((ROWS, WIDTH))
    for start in range(0, KEYS, TILE):
        u = _logits(q, k, hidden)[:, start : start + TILE]
        new = jnp.maximum(m, jnp.max(u, axis=1, keepdims=True))
        kept, p = jnp.exp2(m - new), jnp.exp2(u - new)
        p = p.astype(v.dtype)
        l = kept * l + jnp.sum(p, axis=1, keepdims=True, dtype=jnp.float32)
        acc = kept * acc + jnp.matmul(p, v[start : start + TILE], preferred_element_type=jnp.float32)
        m = new
    return acc / l


@jax.jit
def bounded(q: jax.Array, k: jax.Array, v: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Outputs, and which rows pass."""
    norms = [jnp.linalg.norm(x.astype(jnp.float32), axis=1) for x in (q, k)]
    # Rounded upwards by more than the sums of squares may have lost.
    bound = SCALE * (1 + 2.0**-12) * norms[0][:, None] * jnp.max(norms[1])
    p = jnp.exp2(_logits(q, k, hidden) - bound).astype(v.dtype)
    l = jnp.sum(p, axis=1, keepdims=True, dtype=jnp.float32)
    moved = jnp.matmul(p, v, preferred_element_type=jnp.float32)
    return moved / jnp.where(l > 0, l, 1), l[:, 0] >= LEAST


def _logits(q: jax.Array, k: jax.Array, hidden: jax.Array) -> jax.Array:
    u = SCALE * jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
    return jnp.where(hidden, -jnp.inf, u)


def truth(q: Any, k: Any, v: Any, hidden: np.ndarray) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    u = np.where(hidden, -np.inf, SCALE * (q @ k.T))
    p = np.exp2(u - u.max(axis=1, keepdims=True))
    return (p @ v) / p.sum(axis=1, keepdims=True)


def run() -> Result:
    v = jnp.asarray(np.random.default_rng(1).standard_normal((KEYS, WIDTH)), jnp.bfloat16)
    rows, worst = [], 0.0
    for name, (*pair, hidden) in inputs().items():
        q, k = (jnp.asarray(x, jnp.bfloat16) for x in pair)
        want = truth(q, k, v, hidden)
        out, passes = map(np.asarray, bounded(q, k, v, hidden))
        errors = [
            np.linalg.norm(np.asarray(x, np.float64) - want, axis=1) / np.linalg.norm(want, axis=1)
            for x in (out, running(q, k, v, hidden))
        ]
        row: dict[str, Any] = {"inputs": name, "rows that pass, %": 100 * passes.mean()}
        for label, error, chosen in (
            ("worst error, bound, rows that pass", errors[0], passes),
            ("worst error, running maximum, the same rows", errors[1], passes),
            ("worst error, bound, the other rows", errors[0], ~passes),
        ):
            row[label] = float(error[chosen].max()) if chosen.any() else None
        rows.append(row)
        if passes.any():
            worst = max(worst, float(errors[0][passes].max()))
    return Result(
        "Softmax with a bound in place of the running maximum, bfloat16, 4,096 keys of 128, errors against float64",
        rows,
        [("worst error of rows that pass", worst, 5e-3, "at most")],
    )
