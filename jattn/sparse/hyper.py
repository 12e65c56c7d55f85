"""HyperAttention: near-linear softmax attention by sorting alike vectors together (Han et al. 2023, algorithms 1 to 4).

A vector x is hashed to bin(x) = sum_r 2^r [<x, w_r> > 0] with random directions w_r. Queries and keys are each sorted
by the ranks of their bins and cut into equally many blocks. Query t attends to the keys of its own block, and the rest
is estimated from m keys c_1 .. c_m, drawn with replacement from all S:

    a_ts = [s in the block of t] + (S / m) sum_i [c_i = s][s not in the block of t]
    lse_t = log sum_s a_ts exp(z_ts)        o_t = sum_s a_ts exp(z_ts - lse_t) v_s

so that exp(lse_t) is unbiased. Causal attention halves the sequence: each half is causal attention of half the length,
and the second half sees all of the first by the above, down to a length that is computed exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32, Key

from jattn.blockwise import Operands
from jattn.checks import (
    accumulator_dtype,
    bind_shapes,
    check_array,
    check_causal_lengths,
    check_choice,
    check_count,
    check_flags,
    check_floating,
    check_integer,
    check_values,
)
from jattn.dispatch import Choice, Implementation, dispatch, over_mesh
from jattn.dot_product import (
    check_query_key_value,
    dense_attention,
    dot_product_attention,
    make_score,
    merge_attentions,
)
from jattn.masks import FULL, Full
from jattn.softmax_tile import Score
from jattn.sparse.block_mask import BlockMask
from jattn.sparse.block_sparse import block_sparse_attention

BucketOrder = Literal["gray", "inverse_gray"]


def hyper_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    rng: int | Key[Array, ""] | None = None,
    proj_dir: Float[Array, "H R"] | None = None,
    sampled: Sequence[Int[Array, "B N m"]] | None = None,
    mask: Bool[Array, "B 1 1 S"] | None = None,
    is_causal: bool = False,
    lsh_num_projs: int = 7,
    block_size: int = 256,
    sample_size: int = 256,
    min_seq_len: int = 4096,
    scale: float | None = None,
    exclude_block: bool = True,
    bucket_order: BucketOrder = "gray",
    ragged: Literal["mask", "zero_pad"] = "mask",
    return_lse: bool = False,
    implementation: Choice = None,
) -> Any:
    """An estimate of softmax attention in O(T (b + m) log T) time (Han et al. 2023; code insuhan/hyper-attn).

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; query head n reads key head `n // (N // K)`.
      value: `[B, S, K, V]`.
      rng: what directions and samples are drawn with: a seed of 32 bits or `jax.random.key(...)`. It may be `None` if
        both are given. Samples differ by batch row and head; inside `vmap` or `shard_map` a call draws as one alone.
      proj_dir: `[H, R]`, the directions of the hash, for all heads; `None` draws them from a normal distribution.
      sampled: for each estimate, in the order of the calls, indices of SORTED keys; `None` draws them. Causal attention
        visits the shortest pieces first; an estimate of 2^i pieces a row has `[B, N 2^i, m]`, head n and piece j at
        n 2^i + j.
      mask: which keys are real: `[B, 1, 1, S]` or `[1, 1, 1, S]`, True for those. The others rank behind all, are not
        drawn, and do not count in S / m.
      is_causal: for T = S. Gradients, keys and values never reach an earlier output; a later query may move an earlier
        one of its half to another block, here as in the released code, since queries are sorted among each other.
      lsh_num_projs: R, when `proj_dir` is `None`; at most 30.
      block_size: b, of keys; a block of queries has `ceil(ceil(T / b) b / ceil(S / b))`.
      sample_size: m; 0 leaves the estimate out.
      min_seq_len: shorter sequences are computed exactly; causal ones also of this length.
      scale: of the logits; `None` is `H ** -0.5`.
      exclude_block: True leaves out samples of the query's own block (the paper; the released code in bfloat16). False
        counts them twice (the released code in float32, whose lse is too high on average).
      bucket_order: "gray" ranks bin i as `i ^ (i >> 1)` (the released code); with "inverse_gray" that is the bin of
        rank i, so that neighbours differ in one bit (the paper).
      ragged: "mask" leaves the last block of keys short where b does not divide S; "zero_pad" fills it with zeros that
        take part in the softmax (the released code).
      return_lse: return `(out, lse)`.
      implementation: "xla" (sorts, and walks blocks) or "reference" (all `T x S` weights at once; forward mode too).

    Returns:
      `out [B, T, N, V]` in the query's dtype, or `(out, lse [B, T, N])` in float32 (float64 for float64). Gradients
      reach query, key and value through both; orders and samples are constants. The released code's bfloat16 path
      takes the weights of the merge for constants too.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; nothing to draw with; a wrong number of samples.
    """
    sizes = check_query_key_value(query, key, value)
    check_flags(is_causal=is_causal, exclude_block=exclude_block, return_lse=return_lse)
    if is_causal:
        check_causal_lengths(sizes["T"], sizes["S"])
    _check_mask(mask, sizes)
    if check_count("lsh_num_projs", lsh_num_projs) > 30:
        raise ValueError(f"lsh_num_projs: expected at most 30, a bin is an integer of 32 bits, got {lsh_num_projs}")
    check_choice("bucket_order", bucket_order, ("gray", "inverse_gray"))
    check_choice("ragged", ragged, ("mask", "zero_pad"))
    plan = _Plan(
        is_causal=bool(is_causal),
        block_size=check_count("block_size", block_size),
        sample_size=check_count("sample_size", sample_size, minimum=0),
        min_seq_len=check_count("min_seq_len", min_seq_len),
        score=make_score(scale, None, sizes["H"]),
        exclude_block=bool(exclude_block),
        bucket_order=bucket_order,
        zero_pad=ragged == "zero_pad",
    )
    calls = _sampling_calls(plan, sizes["T"], sizes["S"])
    if sampled is not None:
        _check_sampled(sampled, calls, sizes, plan)
    random = _key(rng)
    if proj_dir is not None:
        bind_shapes(("proj_dir", proj_dir, "H R"), H=sizes["H"])
        check_floating(proj_dir=proj_dir)
        if not 1 <= proj_dir.shape[1] <= 30:
            raise ValueError(f"proj_dir: expected 1 to 30 directions, got {proj_dir.shape[1]}")
    elif random is None:
        raise ValueError("rng: nothing to draw directions with; pass a seed, a jax.random.key, or proj_dir")
    else:
        acc = accumulator_dtype(query.dtype)
        proj_dir = jax.random.normal(jax.random.fold_in(random, 0), (sizes["H"], lsh_num_projs), acc)
    draws: tuple[Any, ...] = ()
    if sampled is not None:
        draws = tuple(sampled)
    elif calls and random is None:
        raise ValueError("rng: nothing to draw samples with; pass a seed, a jax.random.key, or sampled")
    elif random is not None:
        draws = tuple(jax.random.fold_in(random, 1 + i) for i in range(len(calls)))
    real = None if mask is None else jnp.broadcast_to(jnp.asarray(mask)[:, 0, 0], (sizes["B"], sizes["S"]))
    out, lse = dispatch(
        "hyper_attention", _IMPLEMENTATIONS, implementation, query, key, value, real, proj_dir, draws, plan=plan
    )
    return (out, lse) if return_lse else out


def angular_lsh_hash(
    x: Float[Array, "*batch H"], proj_dir: Float[Array, "H R"], bucket_order: BucketOrder = "gray"
) -> Int32[Array, "*batch"]:
    """The rank of the bin of each vector: R signs of projections, as in `hyper_attention`; a zero vector has rank 0."""
    check_array("x", x)
    bind_shapes(("proj_dir", proj_dir, "H R"), H=x.shape[-1])
    check_floating(x=x, proj_dir=proj_dir)
    check_choice("bucket_order", bucket_order, ("gray", "inverse_gray"))
    acc = accumulator_dtype(x.dtype, proj_dir.dtype)
    bits = jnp.einsum("...h,hr->...r", x, proj_dir, preferred_element_type=acc) > 0
    bins = jnp.sum(bits.astype(jnp.int32) << jnp.arange(proj_dir.shape[1], dtype=jnp.int32), axis=-1, dtype=jnp.int32)
    if bucket_order == "gray":
        return bins ^ (bins >> 1)
    for shift in (1, 2, 4, 8, 16):  # the inverse: bit r is the parity of the bits from r on
        bins = bins ^ (bins >> shift)
    return bins


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call."""

    is_causal: bool
    block_size: int
    sample_size: int
    min_seq_len: int
    score: Score
    exclude_block: bool
    bucket_order: BucketOrder
    zero_pad: bool

    def blocks(self, q_len: int, kv_len: int) -> tuple[int, int]:
        """How many blocks there are, and the size of those of the queries."""
        blocks = math.ceil(kv_len / self.block_size)
        return blocks, math.ceil(math.ceil(q_len / self.block_size) * self.block_size / blocks)

    def samples(self, q_len: int, kv_len: int) -> bool:
        """Whether attention without a causal mask estimates anything at these lengths."""
        many = q_len > self.blocks(q_len, kv_len)[1] and kv_len > self.block_size
        return q_len >= self.min_seq_len and self.sample_size > 0 and many


@dataclasses.dataclass(frozen=True)
class _Elsewhere:
    """A score function that masks the sampled keys of the query's own block; equal ones share a compilation."""

    block_q: int
    block_kv: int

    def __call__(self, score: Array, b: Array, h: Array, q_pos: Array, kv_pos: Array, samples: Array) -> Array:
        return jnp.where(q_pos // self.block_q == samples[b, h, kv_pos] // self.block_kv, -jnp.inf, score)


def _sampling_calls(plan: _Plan, q_len: int, kv_len: int) -> list[tuple[int, int]]:
    """`(pieces of a row, keys of a piece)` of every estimate, in the order in which they are made."""
    if not plan.is_causal:
        return [(1, kv_len)] if plan.samples(q_len, kv_len) else []
    calls, pieces = [], 1
    while q_len > plan.min_seq_len:
        q_len = math.ceil(q_len / 2)
        calls += [(pieces, q_len)] if plan.samples(q_len, q_len) else []
        pieces *= 2
    return calls[::-1]


@functools.partial(jax.jit, static_argnames="plan")
def _sorted_blocks(
    query: Array, key: Array, value: Array, real: Array | None, proj_dir: Array, draws: tuple[Any, ...], *, plan: _Plan
) -> tuple[Array, Array]:
    rows = P(*jax.typeof(query).sharding.spec[:3])
    return over_mesh(functools.partial(_attend, plan), (rows, rows), query, key, value, real, proj_dir, draws)


@functools.partial(jax.jit, static_argnames="plan")
def _dense(
    query: Array, key: Array, value: Array, real: Array | None, proj_dir: Array, draws: tuple[Any, ...], *, plan: _Plan
) -> tuple[Array, Array]:
    rows = P(*jax.typeof(query).sharding.spec[:3])
    return over_mesh(functools.partial(_weighted, plan), (rows, rows), query, key, value, real, proj_dir, draws)


def _attend(
    plan: _Plan, query: Array, key: Array, value: Array, real: Array | None, proj_dir: Array, draws: tuple[Any, ...]
) -> tuple[Array, Array]:
    core = _causal if plan.is_causal else _core
    return core(plan, query, key, value, real, proj_dir, iter(draws))


def _causal(
    plan: _Plan, query: Array, key: Array, value: Array, real: Array | None, proj_dir: Array, draws: Iterator[Any]
) -> tuple[Array, Array]:
    length = query.shape[1]
    if length <= plan.min_seq_len:
        return _exact(plan, query, key, value, real, is_causal=True)
    query, key, value, real = _even(query), _even(key), _even(value), _even(real)
    near = _causal(plan, _halves(query), _halves(key), _halves(value), _halves(real), proj_dir, draws)
    out, lse = (x.reshape(*query.shape[:3], *x.shape[3:]) for x in near)
    half = query.shape[1] // 2
    before = None if real is None else real[:, :half]
    far = _core(plan, query[:, half:], key[:, :half], value[:, :half], before, proj_dir, draws)
    late = merge_attentions([out[:, half:], far[0]], [lse[:, half:], far[1]])
    out, lse = (jnp.concatenate([x[:, :half], y], axis=1)[:, :length] for x, y in zip((out, lse), late, strict=True))
    return out, lse


def _core(
    plan: _Plan, query: Array, key: Array, value: Array, real: Array | None, proj_dir: Array, draws: Iterator[Any]
) -> tuple[Array, Array]:
    """Every query attends to every key."""
    (_, q_len, heads, _), kv_len = query.shape, key.shape[1]
    if q_len < plan.min_seq_len:
        return _exact(plan, query, key, value, real, is_causal=False)
    q_order, kv_order = _orders(plan, query, key, real, proj_dir)
    blocks, block_q = plan.blocks(q_len, kv_len)
    query, key, value = _take(query, q_order), _take(key, kv_order), _take(value, kv_order)
    bias = None if real is None else _bias(query, jnp.take_along_axis(real[..., None], kv_order, axis=1))
    options: dict[str, Any] = {"scale": plan.score.scale, "return_lse": True, "implementation": "xla"}

    pads = blocks * plan.block_size - kv_len if plan.zero_pad else 0
    near_key, near_value = (jnp.pad(x, [(0, 0), (0, pads), (0, 0), (0, 0)]) for x in (key, value))
    lists = BlockMask.from_map(
        FULL * np.eye(math.ceil(q_len / block_q), blocks, dtype=np.int8), q_len, kv_len + pads, block_q, plan.block_size
    )
    near_bias = None if bias is None else jnp.pad(bias, [(0, 0), (0, 0), (0, pads)])
    out, lse = block_sparse_attention(query, near_key, near_value, lists, kv_bias=near_bias, **options)

    if plan.samples(q_len, kv_len):
        samples, log_weight = _samples(plan, next(draws), query, kv_len, real)
        row = jnp.arange(query.shape[0])[:, None, None]
        head = jnp.arange(heads) // (heads // key.shape[2])
        at = row, jnp.swapaxes(samples, 1, 2), head
        far, far_lse = block_sparse_attention(
            query, key[at], value[at], Full(),
            score_mod=_Elsewhere(block_q, plan.block_size) if plan.exclude_block else None,
            captured=(samples,) if plan.exclude_block else (),
            kv_bias=None if bias is None else bias[row, head[:, None], samples], **options,
        )  # fmt: skip
        out, lse = merge_attentions([out, far], [lse, far_lse + log_weight])
    back = jnp.argsort(q_order, axis=1)
    return _take(out, back), jnp.take_along_axis(lse, back, axis=1)


def _exact(
    plan: _Plan, query: Array, key: Array, value: Array, real: Array | None, *, is_causal: bool
) -> tuple[Array, Array]:
    return dot_product_attention(
        query, key, value, mask=None if real is None else real[:, None, None], is_causal=is_causal,
        scale=plan.score.scale, return_lse=True, implementation="xla",
    )  # fmt: skip


def _orders(plan: _Plan, query: Array, key: Array, real: Array | None, proj_dir: Array) -> tuple[Array, Array]:
    """Which queries `[B, T, N]` and which keys `[B, S, K]` come first, second, ... by rank; ties stay as they are."""
    ranks = [angular_lsh_hash(jax.lax.stop_gradient(x), proj_dir, plan.bucket_order) for x in (query, key)]
    if real is not None:
        ranks[1] = jnp.where(real[..., None], ranks[1], 2 ** proj_dir.shape[1])
    q_order, kv_order = (jnp.argsort(rank, axis=1, stable=True) for rank in ranks)
    return q_order, kv_order


def _samples(
    plan: _Plan, draw: Array, query: Array, kv_len: int, real: Array | None
) -> tuple[Int[Array, "B N m"], Float[Array, "#B 1 1"]]:
    """Indices of sorted keys, given or drawn, and the logarithm of how many keys each stands for."""
    batch, _, heads, _ = query.shape
    count = jnp.full((1, 1, 1), kv_len) if real is None else jnp.sum(real, axis=1)[:, None, None]
    if jnp.issubdtype(draw.dtype, jax.dtypes.prng_key):
        samples = jax.random.randint(draw, (batch, heads, plan.sample_size), 0, jnp.maximum(count, 1))
    else:  # the pieces of a row, which are heads there, are rows of the batch here
        samples = draw.reshape(draw.shape[0], heads, -1, plan.sample_size)
        samples = jnp.swapaxes(samples, 1, 2).reshape(batch, heads, plan.sample_size)
    return samples, jnp.log(count.astype(accumulator_dtype(query.dtype)) / plan.sample_size)


def _take(x: Array, order: Int[Array, "B T N"]) -> Array:
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _bias(query: Array, real: Bool[Array, "B S K"]) -> Float[Array, "B K S"]:
    """-inf for the keys that are not real."""
    zero = jnp.zeros((), accumulator_dtype(query.dtype))
    return jnp.where(jnp.swapaxes(real, 1, 2), zero, -jnp.inf)


def _even(x: Any) -> Any:
    """With a row of zeros at the end if the length is odd; such a key is not real. `None` stays it."""
    if x is None or x.shape[1] % 2 == 0:
        return x
    return jnp.pad(x, [(0, int(axis == 1)) for axis in range(x.ndim)])


def _halves(x: Any) -> Any:
    """`[B, 2 h, ...]` as `[2 B, h, ...]`; `None` stays it."""
    return None if x is None else x.reshape(2 * x.shape[0], x.shape[1] // 2, *x.shape[2:])


def _weighted(
    plan: _Plan, query: Array, key: Array, value: Array, real: Array | None, proj_dir: Array, draws: tuple[Any, ...]
) -> tuple[Array, Array]:
    """One dense softmax in which a key counts as often as the blocks and the samples say."""
    weights = _causal_weights if plan.is_causal else _core_weights
    how_often, zeros = weights(plan, query, key, real, proj_dir, iter(draws))
    # All the zero vectors that a query sees are one more key, of value 0.
    key, value = (jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in (key, value))
    bias = jnp.log(jnp.concatenate([how_often, zeros[..., None]], axis=-1))
    return dense_attention(Operands(query, key, value, bias=bias), mask=Full(), score=plan.score)


def _causal_weights(
    plan: _Plan, query: Array, key: Array, real: Array | None, proj_dir: Array, draws: Iterator[Any]
) -> tuple[Array, Array]:
    """How often query t counts key s `[B, N, T, S]`, and how many zero vectors it sees `[B, N, T]`."""
    batch, length, heads, _ = query.shape
    acc = accumulator_dtype(query.dtype)
    if length <= plan.min_seq_len:
        seen = jnp.tri(length, dtype=acc) * (1 if real is None else real[:, None, None])
        return jnp.broadcast_to(seen, (batch, heads, length, length)), jnp.zeros((batch, heads, length), acc)
    query, key, real = _even(query), _even(key), _even(real)
    near = _causal_weights(plan, _halves(query), _halves(key), _halves(real), proj_dir, draws)
    own, zeros = (x.reshape(batch, 2, *x.shape[1:]) for x in near)
    half = query.shape[1] // 2
    before = None if real is None else real[:, :half]
    far, far_zeros = _core_weights(plan, query[:, half:], key[:, :half], before, proj_dir, draws)
    weights = jnp.block([[own[:, 0], jnp.zeros_like(far)], [far, own[:, 1]]])
    zeros = jnp.concatenate([zeros[:, 0], zeros[:, 1] + far_zeros], axis=-1)
    return weights[..., :length, :length], zeros[..., :length]


def _core_weights(
    plan: _Plan, query: Array, key: Array, real: Array | None, proj_dir: Array, draws: Iterator[Any]
) -> tuple[Array, Array]:
    (batch, q_len, heads, _), kv_len = query.shape, key.shape[1]
    acc = accumulator_dtype(query.dtype)
    seen = jnp.ones((batch, 1, 1, kv_len), acc) if real is None else real[:, None, None].astype(acc)
    if q_len < plan.min_seq_len:
        full = jnp.broadcast_to(seen, (batch, heads, q_len, kv_len))
        return full, jnp.zeros((batch, heads, q_len), acc)
    orders = _orders(plan, query, key, real, proj_dir)
    q_rank, kv_rank = (jnp.moveaxis(jnp.argsort(order, axis=1), 1, 2) for order in orders)
    kv_rank = jnp.repeat(kv_rank, heads // kv_rank.shape[1], axis=1)
    blocks, block_q = plan.blocks(q_len, kv_len)
    own = q_rank[..., None] // block_q == kv_rank[:, :, None] // plan.block_size
    weights = own.astype(acc)
    if plan.samples(q_len, kv_len):
        samples, log_weight = _samples(plan, next(draws), query, kv_len, real)
        drawn = jnp.sum(samples[..., None] == kv_rank[:, :, None], axis=2)[:, :, None]
        drawn = drawn * jnp.exp(log_weight)[..., None]
        weights = weights + (jnp.where(own, 0, drawn) if plan.exclude_block else drawn)
    zeros = (blocks * plan.block_size - kv_len if plan.zero_pad else 0) * (q_rank // block_q == blocks - 1)
    return weights.astype(acc) * seen, zeros.astype(acc)


def _key(rng: Any) -> Any:
    if rng is None:
        return None
    if isinstance(rng, jax.Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        if rng.shape != ():
            raise ValueError(f"rng: expected one key, got shape {tuple(rng.shape)}")
        return rng
    if isinstance(rng, bool) or not isinstance(rng, (int, np.integer)):
        raise TypeError(f"rng: expected a seed or a jax.random.key(...), got {type(rng).__name__}")
    if not 0 <= rng < 2**32:
        raise ValueError(f"rng: expected a seed of 32 bits, 0 to {2**32 - 1}, got {rng}")
    return jax.random.key(np.uint32(rng))


def _check_mask(mask: Any, sizes: dict[str, int]) -> None:
    if mask is None:
        return
    wanted = (sizes["B"], 1, 1, sizes["S"])
    check_array("mask", mask)
    if mask.shape not in (wanted, (1, *wanted[1:])) or mask.dtype != np.bool_:
        raise ValueError(
            f"mask: expected booleans [B, 1, 1, S] = {wanted}, got {mask.dtype}{list(mask.shape)}; sorted keys can be "
            f"left out for all queries alike, and is_causal is another argument"
        )


def _check_sampled(sampled: Any, calls: list[tuple[int, int]], sizes: dict[str, int], plan: _Plan) -> None:
    if not isinstance(sampled, (tuple, list)):
        raise TypeError(f"sampled: expected a tuple of arrays, got {type(sampled).__name__}; write (array,) for one")
    if len(sampled) != len(calls):
        raise ValueError(f"sampled: this call makes {len(calls)} estimates, got samples for {len(sampled)}")
    for i, (array, (pieces, kv_len)) in enumerate(zip(sampled, calls, strict=True)):
        name = f"sampled[{i}]"
        bind_shapes((name, array, "B heads m"), B=sizes["B"], heads=sizes["N"] * pieces, m=plan.sample_size)
        check_integer(**{name: array})
        outside = functools.partial(_outside, kv_len)
        check_values(name, array, outside, f"expected indices of sorted keys, 0 to {kv_len - 1}")


def _outside(kv_len: int, x: Any) -> Any:
    return (x < 0) | (x >= kv_len)


# Fastest first. Called as `run(query, key, value, real, proj_dir, draws, *, plan)`; `draws` has a key or an array of
# indices for each estimate, in the order of the calls.
_IMPLEMENTATIONS = (
    Implementation("xla", _sorted_blocks),
    Implementation("reference", _dense),
)
