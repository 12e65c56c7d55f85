"""Online k-means over directions: how the Routing Transformer decides which tokens meet (Roy et al. 2020, algorithm 1).

Every head n has C means mu_c. A token x is turned into a direction and scored against them:

    xhat = (x - mean(x)) / sqrt(var(x) + 1e-6)  ("google")    or    x / max(|x|, 1e-12)  ("lucid")
    sigma_c = <xhat, mu_c>                      nearest(x) = argmax_c sigma_c
    members(c) = the w tokens of the largest sigma_c

Scores are computed in float32 at the highest precision that a device has, for a rank is decided by the last bits. The
means learn from the tokens that are nearest to them, not from their members. With decay d, "google" averages counts and
sums, "lucid" takes one step of Lloyd's algorithm on the sphere, S_c being the sum of the xhat nearest to c:

    n_c <- d n_c + (1 - d) |nearest c|    s_c <- d s_c + (1 - d) S_c    mu_c <- s_c / n~_c,
        n~_c = (n_c + 1e-5) / (n + C 1e-5) n  with  n = sum_c n_c                                       ("google")
    mu_c <- d mu_c + (1 - d) S_c / |S_c|  where any token is nearest                                    ("lucid")
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32, Key

from jattn.checks import (
    accumulator_dtype,
    bind_shapes,
    check_array,
    check_choice,
    check_count,
    check_floating,
    check_no_empty,
)
from jattn.dispatch import over_mesh

Variant = Literal["google", "lucid"]
VARIANTS: tuple[Variant, ...] = ("google", "lucid")
_LAYER_NORM_EPS = 1e-6
_SMALLEST_NORM = 1e-12
_SMOOTHING = 1e-5


class KMeansState(NamedTuple):
    """What k-means carries from one update to the next, in float32 or wider.

    Attributes:
      means: mu, what tokens are scored by.
      counts: n_c, tokens per update, averaged; `None` in a state of "lucid".
      totals: s_c, sums of directions, averaged; `None` in a state of "lucid".
    """

    means: Float[Array, "N C H"]
    counts: Float[Array, "N C"] | None = None
    totals: Float[Array, "N C H"] | None = None


class KMeansSums(NamedTuple):
    """How many tokens are nearest to each mean and the sum of their directions; sums of parts of a batch add up."""

    counts: Float[Array, "N C"]
    totals: Float[Array, "N C H"]


def kmeans_init(
    rng: Key[Array, ""], num_heads: int, num_clusters: int, head_dim: int, *, init_count: int = 0, dtype: Any = None
) -> KMeansState:
    """A state of "google": normalised random directions.

    Args:
      rng: a `jax.random.key`.
      num_heads, num_clusters, head_dim: N, C and H.
      init_count: how many tokens stand behind a mean at the start. 0 is the released code, whose sums begin at the
        means all the same: after its first update the old mean still weighs `d / (1 - d)` tokens that are not counted,
        so a mean that c tokens are nearest to is off by `d / ((1 - d) c)` times its old self, and one that got none
        grows until the smoothing of 1e-5 stops it, and then wins every comparison on its side. With 1 what is summed is
        counted, and a mean without tokens stays where it is.
      dtype: of the state, float32 (`None`) or float64.

    Raises:
      ValueError, TypeError: a size that is not a static positive integer; another count.
    """
    shape = [
        check_count(name, size)
        for name, size in (("num_heads", num_heads), ("num_clusters", num_clusters), ("head_dim", head_dim))
    ]
    check_choice("init_count", init_count, (0, 1))
    dtype = accumulator_dtype(jnp.float32 if dtype is None else dtype)
    means = directions(jax.random.normal(rng, shape, dtype), "google")
    return KMeansState(means, jnp.full(shape[:2], init_count, dtype), means)


def kmeans_init_lloyd(
    rng: Key[Array, ""], x: Float[Array, "B T N H"], num_clusters: int, *, iterations: int = 10
) -> KMeansState:
    """A state of "lucid": the directions of C random tokens, the same ones for all heads, after steps of Lloyd's.

    Differs from the released code, which here alone sums tokens as they are: it weighs them by their length.

    Args:
      rng: a `jax.random.key`.
      x: the tokens of a batch.
      num_clusters: C, at most the B T tokens that there are.
      iterations: how many steps.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option.
    """
    sizes = _check_tokens(x)
    check_count("num_clusters", num_clusters)
    check_count("iterations", iterations, minimum=0)
    tokens = sizes["B"] * sizes["T"]
    if num_clusters > tokens:
        raise ValueError(f"num_clusters: expected at most the {tokens} tokens of x, got {num_clusters}")
    hat = directions(jax.lax.stop_gradient(x), "lucid")
    chosen = jax.random.permutation(rng, tokens)[:num_clusters]
    state = KMeansState(jnp.swapaxes(hat.reshape(tokens, *hat.shape[2:])[chosen], 0, 1))

    def step(_: Any, state: KMeansState) -> KMeansState:
        return kmeans_update(state, x, variant="lucid", decay=0.0)

    return jax.lax.fori_loop(0, iterations, step, state)


def kmeans_update(
    state: KMeansState,
    x: Float[Array, "B T K H"],
    *,
    variant: Variant = "google",
    decay: float = 0.999,
    mask: Bool[Array, "B T"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> KMeansState:
    """The state after a batch of tokens: `kmeans_apply` of their `kmeans_sums`. A pure function; no gradient passes it.

    The released codes feed queries and, unless those are the keys, keys. "google" does so one after the other: call
    this twice. "lucid" takes them together: add up the sums of both and apply them once.

    Args:
      state: from `kmeans_init` or `kmeans_init_lloyd`.
      x: tokens, not normalised; means of head n learn from head `n // (N // K)`.
      variant: which definition; it has to be that of the state.
      decay: d, how much of the old stays; from 0 to 1.
      mask: True for the tokens that count. Tokens without a direction (all entries equal) do not count in "google".
      axis_name: inside `shard_map` or `vmap`, the axes over which the batch is split: sums go over all of it.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a state of the other variant.
    """
    check_choice("variant", variant, VARIANTS)
    if (state.counts is None or state.totals is None) != (variant == "lucid"):
        start = "kmeans_init" if variant == "google" else "kmeans_init_lloyd, or KMeansState(means)"
        raise ValueError(f"state: does not fit variant={variant!r}; begin with {start}")
    sums = kmeans_sums(state.means, x, variant=variant, mask=mask)
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    return kmeans_apply(state, sums, decay=decay)


def kmeans_sums(
    means: Float[Array, "N C H"],
    x: Float[Array, "B T K H"],
    *,
    variant: Variant = "google",
    mask: Bool[Array, "B T"] | None = None,
) -> KMeansSums:
    """What an update needs of a batch; sums of several batches, or over the devices that hold one, may be added.

    Args and errors are those of `kmeans_update`.
    """
    check_choice("variant", variant, VARIANTS)
    check_means(means, _check_tokens(x))
    if mask is not None:
        check_token_mask("mask", mask, x.shape[0], x.shape[1])
    return _sums(means, x, mask, variant=variant)


def kmeans_apply(state: KMeansState, sums: KMeansSums, *, decay: float = 0.999) -> KMeansState:
    """The state after the tokens of `sums`, as the variant of the state has it; see the top of this file.

    Differs from the released code of "google" where no token was ever counted: the means stay, there they are 0 / 0.

    Raises:
      ValueError, TypeError: `decay` is not a static number from 0 to 1.
    """
    if isinstance(decay, bool) or not isinstance(decay, (int, float, np.number)):
        raise TypeError(f"decay: expected a static number, got {type(decay).__name__}")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a number from 0 to 1, got {decay}")
    return _applied(state, sums, decay)


def directions(x: Float[Array, "*batch H"], variant: Variant) -> Float[Array, "*batch H"]:
    """xhat in the accumulator dtype, for any length of x that its dtype holds."""
    x = x.astype(accumulator_dtype(x.dtype))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    # Both are the same for x / unit with another epsilon, and squares of that do not overflow.
    if variant == "google":
        unit = jnp.maximum(largest, 1)
        x = x / unit
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + _LAYER_NORM_EPS / unit**2)
    unit = jnp.maximum(largest, _SMALLEST_NORM)
    x = x / unit
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), (_SMALLEST_NORM / unit) ** 2))


def route_scores(hat: Float[Array, "B T K H"], means: Float[Array, "N C H"]) -> Float[Array, "B N C T"]:
    """sigma: head n scores the directions of head `n // (N // K)`. A constant to all derivatives."""
    batch, length, kv_heads, _ = hat.shape
    by_head = means.astype(hat.dtype).reshape(kv_heads, -1, *means.shape[1:])
    hat, by_head = jax.lax.stop_gradient((hat, by_head))
    scores = jnp.einsum("btkh,kgch->bkgct", hat, by_head, precision="highest")
    return scores.reshape(batch, *means.shape[:2], length)


def cluster_members(
    scores: Float[Array, "B N C T"], window: int, real: Bool[Array, "B T"] | None, *, by_position: bool
) -> Int32[Array, "B N C w"]:
    """Which tokens are in each cluster: `w = min(window, T)` places, best first (the earlier of equals) or by position.

    Tokens that are not real are in none, and a place that none of the others takes holds T.
    """
    length = scores.shape[-1]
    if real is not None:
        scores = jnp.where(real[:, None, None], scores, -jnp.inf)
    _, index = jax.lax.top_k(scores, min(window, length))
    if real is not None:
        index = jnp.where(real[jnp.arange(len(real))[:, None, None, None], index], index, length)
    return jnp.sort(index, axis=-1) if by_position else index


def commitment_error(
    hat: Float[Array, "B T K H"],
    scores: Float[Array, "B N C T"],
    means: Float[Array, "N C H"],
    real: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of (xhat - mu_nearest)^2 over the real tokens, heads and channels, and how many terms it has.

    The gradient reaches `hat` only.
    """
    batch, length, kv_heads, head_dim = hat.shape
    nearest = jnp.argmax(scores, axis=2)
    chosen = jax.lax.stop_gradient(means).astype(hat.dtype)[jnp.arange(len(means))[:, None], nearest]
    chosen = chosen.reshape(batch, kv_heads, -1, length, head_dim)
    error = jnp.sum((jnp.swapaxes(hat, 1, 2)[:, :, None] - chosen) ** 2, axis=(1, 2, 4))
    terms = jnp.asarray(len(means) * head_dim, hat.dtype)
    if real is None:
        return jnp.sum(error), terms * batch * length
    return jnp.sum(jnp.where(real, error, 0)), terms * jnp.sum(real)


# Compiled as one even when they are called eagerly, which else would compile every operation by itself.
@functools.partial(jax.jit, static_argnames="variant")
def _sums(means: Array, x: Array, mask: Array | None, *, variant: Variant) -> KMeansSums:
    return over_mesh(functools.partial(_sum_up, variant), KMeansSums(P(), P()), means, x, mask)  # type: ignore[arg-type]


def _sum_up(variant: Variant, means: Array, x: Array, mask: Array | None) -> KMeansSums:
    hat = directions(jax.lax.stop_gradient(x), variant)
    real = None if mask is None else mask[:, :, None]
    if variant == "google":
        directed = jnp.any(hat != 0, axis=-1)
        real = directed if real is None else real & directed
    if real is not None:  # a token that does not count may hold anything
        hat = jnp.where(real[..., None], hat, 0)
    scores = route_scores(hat, means)
    heads, clusters = scores.shape[1:3]
    nearest = jnp.argmax(scores, axis=2).reshape(x.shape[0], x.shape[2], -1, x.shape[1])
    hot = jax.nn.one_hot(nearest, clusters, axis=3, dtype=hat.dtype)
    if real is not None:
        hot = jnp.where(jnp.swapaxes(real, 1, 2)[:, :, None, None], hot, 0)
    totals = jnp.einsum("bkgct,btkh->kgch", hot, hat, precision="highest")
    return KMeansSums(jnp.sum(hot, axis=(0, 4)).reshape(heads, clusters), totals.reshape(heads, clusters, -1))


@jax.jit
def _applied(state: KMeansState, sums: KMeansSums, decay: Any) -> KMeansState:
    means, counts, totals = state
    new = KMeansSums(*(part.astype(means.dtype) for part in sums))
    if counts is None or totals is None:
        step = decay * means + (1 - decay) * directions(new.totals, "lucid")
        return KMeansState(jnp.where(new.counts[..., None] > 0, step, means))
    counts = decay * counts + (1 - decay) * new.counts
    totals = decay * totals + (1 - decay) * new.totals
    n = jnp.sum(counts, axis=-1, keepdims=True)
    smooth = (counts + _SMOOTHING) / (n + counts.shape[-1] * _SMOOTHING) * n
    moved = totals / jnp.where(n > 0, smooth, 1)[..., None]
    return KMeansState(jnp.where(n[..., None] > 0, moved, means), counts, totals)


def check_means(means: Any, sizes: dict[str, int]) -> None:
    """`means` is `[N, C, H]` for tokens of K heads and H channels, and no clusters are missing."""
    known = {"H": sizes["H"]} | ({"N": sizes["N"]} if "N" in sizes else {})
    found = bind_shapes(("means", means, "N C H"), **known)
    check_floating(means=means)
    if found["C"] == 0 or found["N"] == 0:
        raise ValueError(f"means: expected at least one cluster, got {tuple(means.shape)}")
    if found["N"] % sizes["K"]:
        raise ValueError(f"means: expected a multiple of the {sizes['K']} heads of x, got {found['N']} heads")


def check_token_mask(name: str, mask: Any, batch: int, length: int) -> None:
    """`mask` is boolean and `[B, T]`."""
    check_array(name, mask)
    if mask.shape != (batch, length) or mask.dtype != jnp.bool_:
        raise ValueError(
            f"{name}: expected booleans [B, T] = {(batch, length)}, True for real tokens, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )


def _check_tokens(x: Any) -> dict[str, int]:
    sizes = bind_shapes(("x", x, "B T K H"))
    check_floating(x=x)
    check_no_empty(sizes, "BTKH")
    return sizes
