"""PowerAttention: blocks nearby, the first ones, and those a power of two away (Chen et al. 2025, section 3).

A query at position p and a key at position s, D = p // b - s // b blocks apart, see each other if

    s <= p   and   ( s // b < sink   or   0 <= D < w   or   D is 0 or a power of two )

so a query visits at most sink + w + log2(S / b) + 1 blocks of keys and, layer upon layer, what those have seen: with
steps of powers of two a block D away is popcount(D) layers away, which makes every D <= 2^d reachable in d layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from jattn.checks import check_count
from jattn.dispatch import Choice
from jattn.dot_product import SegmentIds, check_query_key_value
from jattn.masks import Causal, Mask, NearBlocks, PowerOfTwo, Sink
from jattn.sparse.block_mask import BlockMask
from jattn.sparse.block_sparse import block_sparse_attention


def power_attention_mask(
    block_size: int = 256, window_blocks: int = 5, sink_blocks: int = 1, *, offset: int = 0
) -> Mask:
    """Who sees whom in PowerAttention, for `block_sparse_attention`, `dot_product_attention` or a picture.

    Args:
      block_size: b.
      window_blocks: w, how many blocks back from the query's own, itself included, are all seen.
      sink_blocks: how many of the first blocks every query sees.
      offset: the position of the first query minus that of the first key.

    Raises:
      ValueError, TypeError: a size that is not a static integer of at least 1 (0 for the sinks).
    """
    check_count("block_size", block_size)
    check_count("window_blocks", window_blocks)
    check_count("sink_blocks", sink_blocks, minimum=0)
    blocks = NearBlocks(block_size, window_blocks, offset) | PowerOfTwo(block_size, offset)
    return Causal(offset) & (Sink(sink_blocks * block_size) | blocks if sink_blocks else blocks)


def power_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    block_size: int = 256,
    window_blocks: int = 5,
    sink_blocks: int = 1,
    scale: float | None = None,
    segment_ids: SegmentIds = None,
    return_lse: bool = False,
    implementation: Choice = None,
) -> Any:
    """Exact softmax attention over `power_attention_mask`, in O(T b log(S / b)) time (Chen et al. 2025, section 3).

    No code of the authors is public: the pattern is that of the paper's text, and the defaults are the settings that
    others report of its experiments.

    Args:
      query: `[B, T, N, H]`; the last one stands at the position of the last key, so one query is a step of decoding and
        several are a chunk of a prefill.
      key: `[B, S, K, H]` with S >= T, from position 0 on; query head n reads key head `n // (N // K)`.
      value: `[B, S, K, V]`.
      block_size, window_blocks, sink_blocks: as in `power_attention_mask`.
      scale: of the logits; `None` is `H ** -0.5`.
      segment_ids: `[B, T]` for T = S, or `(query ids [B, T], key ids [B, S])`; only equal ids attend to each other.
        Blocks are counted from position 0 all the same.
      return_lse: return `(out, lse)`.
      implementation: as in `block_sparse_attention`.

    Returns:
      `out [B, T, N, V]` in the query's dtype, or `(out, lse [B, T, N])`, with gradients through both.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; more queries than keys.
    """
    sizes = check_query_key_value(query, key, value)
    q_len, kv_len = sizes["T"], sizes["S"]
    if q_len > kv_len:
        raise ValueError(
            f"query: {q_len} queries cannot end where {kv_len} keys end; pass the keys of every query, and of those "
            f"before them"
        )
    mask = power_attention_mask(block_size, window_blocks, sink_blocks, offset=kv_len - q_len)
    block = _listed_block(block_size)
    return block_sparse_attention(
        query,
        key,
        value,
        BlockMask.from_expr(mask, q_len, kv_len, min(block, q_len), min(block, kv_len)),
        scale=scale,
        segment_ids=segment_ids,
        return_lse=return_lse,
        implementation=implementation,
    )


def receptive_hops(max_distance: int, window_blocks: int) -> Int[np.ndarray, " D"]:
    """How many layers a block needs to hear of the one D blocks before it, for D = 0 .. max_distance; 0 for itself.

    Without sinks, which bring every block within one layer of the first ones only. Where a window of w <= 3 adds
    nothing to the powers of two, this is the number of ones in D.
    """
    check_count("max_distance", max_distance, minimum=0)
    check_count("window_blocks", window_blocks)
    near = range(1, min(window_blocks, max_distance + 1))
    steps = np.array(sorted({*near, *(1 << p for p in range(max_distance.bit_length()))}), int)
    hops = np.zeros(max_distance + 1, int)
    for distance in range(1, max_distance + 1):
        hops[distance] = 1 + hops[distance - steps[steps <= distance]].min()
    return hops


def _listed_block(block_size: int) -> int:
    """The size of the blocks in the lists: a divisor of `block_size`, so that all but the diagonal ones are full.

    It is at most 128, the tile of a kernel, unless the divisors up to there are too small to be worth a step.
    """
    divisor = max(d for d in range(1, min(block_size, 128) + 1) if block_size % d == 0)
    return divisor if divisor >= min(block_size, 32) else block_size
