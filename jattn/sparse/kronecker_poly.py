"""Kronecker attention in near-linear time, with a polynomial in place of exp (Alman and Song 2023, section 4).

With P(x) = sum_a c_a x^a up to degree g and multi-indices alpha over the H channels, |alpha| <= g:

    P(scale sum_h q_h k^1_h ... k^m_h) = sum_alpha U_alpha(q) (k^1)^alpha ... (k^m)^alpha
    U_alpha(q) = c_|alpha| |alpha|! / alpha!  scale^|alpha|  q^alpha

and the sums over the keys of different factors come apart: with A^f_alpha = sum_j (k^f_j)^alpha v^f_j and
B^f_alpha = sum_j (k^f_j)^alpha,

    o_i = sum_alpha U_alpha(q_i) A^1_alpha * ... * A^m_alpha  /  sum_alpha U_alpha(q_i) B^1_alpha ... B^m_alpha

in O((T + S) r (H + V)) time, with r = binomial(H + g, g) multi-indices. Causally A and B are sums up to i, for the keys
that i may read are a product set. Not exact for exp: the error is that of P, and small where logits are.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jattn.checks import accumulator_dtype, check_causal_lengths, check_count, check_flags
from jattn.dispatch import over_mesh
from jattn.dot_product import make_score
from jattn.sparse.kronecker import check_factors, factors_of

NUMBERS_AT_ONCE = 2**20


def kronecker_attention_poly(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"] | Sequence[Float[Array, "B S K H"]],
    value: Float[Array, "B S K V"] | Sequence[Float[Array, "B S K V"]],
    *,
    degree: int,
    scale: float | None = None,
    coefficients: Sequence[float] | None = None,
    is_causal: bool = False,
) -> Float[Array, "B T N V"]:
    """Kronecker attention with the weights P(logit) instead of exp(logit).

    Args:
      query, key, value, scale, is_causal: as in `kronecker_attention`.
      degree: g, even: an even Taylor polynomial of exp is positive, and so is what is divided by. `poly_degree` says
        which one a bound on the entries needs. Time and memory grow with binomial(H + g, g): H = 4 and g = 6 make 210,
        H = 8 and g = 4 make 495.
      coefficients: c_0 .. c_g; `None` is Taylor's 1 / a!.

    Returns:
      `[B, T, N, V]`. Gradients reach the query and every factor.

    Raises:
      ValueError, TypeError: as in `kronecker_attention`; an odd degree, or coefficients of another number.
    """
    check_flags(is_causal=is_causal)
    keys, values = factors_of("key", key), factors_of("value", value)
    sizes, lengths = check_factors(query, keys, values)
    if is_causal:
        for length in lengths:
            check_causal_lengths(sizes["T"], length)
    check_count("degree", degree, minimum=0)
    if degree % 2:
        raise ValueError(
            f"degree: expected an even number, got {degree}; an odd polynomial can be 0 or less, and so can the sum of "
            f"weights that is divided by"
        )
    c = [1 / math.factorial(a) for a in range(degree + 1)] if coefficients is None else list(coefficients)
    if len(c) != degree + 1:
        raise ValueError(f"coefficients: expected {degree + 1} for a polynomial of degree {degree}, got {len(c)}")
    scale = make_score(1 / sizes["H"] if scale is None else scale, None, sizes["H"]).scale
    acc = accumulator_dtype(query.dtype)
    indices = multi_indices(sizes["H"], degree)
    totals = [sum(index) for index in indices]
    # |alpha|! / alpha! is how often a product of channels occurs in a power of a sum.
    weights = [
        c[a] * scale**a * math.factorial(a) / math.prod(math.factorial(n) for n in index)
        for a, index in zip(totals, indices, strict=True)
    ]
    group = sizes["N"] // sizes["K"]
    by_head = query.astype(acc).reshape(*query.shape[:2], sizes["K"], group, sizes["H"])
    asked = jnp.asarray(weights, acc) * monomials(by_head, indices)  # [B, T, K, G, r]
    if not is_causal:
        sums = [_sums(k.astype(acc), v.astype(acc), indices) for k, v in zip(keys, values, strict=True)]
        A, B = (math.prod(parts[1:], start=parts[0]) for parts in zip(*sums, strict=True))
        out = jnp.einsum("btkgr,bkrv->btkgv", asked, A) / jnp.einsum("btkgr,bkr->btkg", asked, B)[..., None]
        return out.reshape(*query.shape[:3], -1).astype(query.dtype)
    rows = P(*jax.typeof(query).sharding.spec[:3])
    out = over_mesh(functools.partial(_causal, indices), rows, asked, keys, values)
    return out.reshape(*query.shape[:3], -1).astype(query.dtype)


def _sums(key: Array, value: Array, indices: Sequence[tuple[int, ...]]) -> tuple[Array, Array]:
    """A `[B, K, r, V]` and B `[B, K, r]` of a factor."""
    features = monomials(key, indices)
    return jnp.einsum("bskr,bskv->bkrv", features, value), jnp.sum(features, axis=1)


def _causal(
    indices: Sequence[tuple[int, ...]], asked: Array, keys: tuple[Array, ...], values: tuple[Array, ...]
) -> Array:
    """`[B, T, K, G, V]`, a few tokens at a time, from the sums before them and those up to each of them."""
    batch, length, kv_heads, _, rank = asked.shape
    width = values[0].shape[3]
    chunk = max(1, min(length, NUMBERS_AT_ONCE // (batch * kv_heads * rank * width)))
    count = math.ceil(length / chunk)
    acc = asked.dtype

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def step(before: list[tuple[Array, Array]], piece: Any) -> tuple[list[tuple[Array, Array]], Array]:
        asked, keys, values = piece
        until = []
        for (A, B), key, value in zip(before, keys, values, strict=True):
            features = monomials(key.astype(acc), indices)
            pairs = features[..., None] * value.astype(acc)[:, :, :, None]
            until.append((A[:, None] + jnp.cumsum(pairs, axis=1), B[:, None] + jnp.cumsum(features, axis=1)))
        after = [(A[:, -1], B[:, -1]) for A, B in until]
        A, B = (math.prod(parts[1:], start=parts[0]) for parts in zip(*until, strict=True))
        out = jnp.einsum("bckgr,bckrv->bckgv", asked, A) / jnp.einsum("bckgr,bckr->bckg", asked, B)[..., None]
        return after, out

    start = [(jnp.zeros((batch, kv_heads, rank, width), acc), jnp.zeros((batch, kv_heads, rank), acc)) for _ in keys]
    _, out = jax.lax.scan(step, start, (cut(asked), [cut(k) for k in keys], [cut(v) for v in values]))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :length]


def multi_indices(channels: int, degree: int) -> list[tuple[int, ...]]:
    """All tuples of `channels` counts with a sum of at most `degree`, by sum."""
    chosen = (
        channels_chosen
        for total in range(degree + 1)
        for channels_chosen in itertools.combinations_with_replacement(range(channels), total)
    )
    return [tuple(each.count(channel) for channel in range(channels)) for each in chosen]


def monomials(x: Float[Array, "*batch H"], indices: Sequence[tuple[int, ...]]) -> Float[Array, "*batch r"]:
    """`x^alpha` for every multi-index, each a product of an earlier one and a channel."""
    place = {index: i for i, index in enumerate(indices)}
    columns: list[Array] = []
    for index in indices:
        if not any(index):
            columns.append(jnp.ones_like(x[..., 0]))
            continue
        channel = next(h for h, count in enumerate(index) if count)
        parent = tuple(count - (h == channel) for h, count in enumerate(index))
        columns.append(columns[place[parent]] * x[..., channel])
    return jnp.stack(columns, axis=-1)


def khatri_rao(a: Float[Array, "*batch S1 H"], b: Float[Array, "*batch S2 H"]) -> Float[Array, "*batch S1S2 H"]:
    """The column-wise Kronecker product: row `j S2 + l` is `a_j * b_l`."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"b: expected {a.shape[-1]} columns as in a, got {b.shape[-1]}")
    product = a[..., :, None, :] * b[..., None, :, :]
    return product.reshape(*product.shape[:-3], -1, product.shape[-1])


def poly_degree(bound: float, eps: float, head_dim: int, *, factors: int = 2, scale: float | None = None) -> int:
    """The least even degree whose Taylor remainder is at most eps of every weight.

        R = scale H bound^(factors + 1)        R^(g + 1) e^R / (g + 1)!  <=  eps e^(-R)

    Args:
      bound: of the absolute entries of query and keys.
      eps: relative error of a weight; `scale` is 1 / H unless given.

    Raises:
      ValueError: a bound or eps that is not positive and finite.
    """
    for name, number in (("bound", bound), ("eps", eps)):
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{name}: expected a positive, finite number, got {number}")
    check_count("head_dim", head_dim)
    check_count("factors", factors)
    R = abs((1 / head_dim if scale is None else scale) * head_dim * bound ** (factors + 1))
    degree = 0
    while (degree + 1) * math.log(R) + 2 * R - math.lgamma(degree + 2) > math.log(eps):
        degree += 2
    return degree
