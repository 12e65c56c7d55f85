"""Softmax attention over listed pairs of blocks by the fused kernels, for every op that is one walk over such lists."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jattn.blockwise import Operands
from jattn.dispatch import Implementation
from jattn.masks import Full, Mask
from jattn.softmax_tile import Score
from jattn.sparse.block_mask import BlockMask
from jattn.split_keys import attend_parts, parts_of
from pallas_kernels.block_sparse import attention as kernel
from pallas_kernels.block_sparse import lists as kernel_lists
from pallas_kernels.block_sparse import tiling


def fused_attention(
    platform: kernel.Platform, operands: Operands, kv_bias: Array | None, lists: BlockMask | None, *,
    static_mask: BlockMask | Mask | None, score: Score, score_mod: Callable[..., Array] | None, dropout_rate: float,
) -> tuple[Array, Array]:  # fmt: skip
    """Walks of a fused kernel over the lists, with the sizes of blocks that suit the chip."""
    x, on_gpu = operands, platform in kernel.GPU
    block_mask: Any = static_mask if lists is None else lists
    parts = 1
    # Numbers for distances are the same for all rows of a batch, and parts of the keys are rows of one.
    if on_gpu and not _is_by_distance(platform, x, score_mod):
        parts = parts_of(x, block_mask, score.soft_cap, dropout_rate)
    if parts > 1:

        def attend(x: Operands, kv_bias: Any, block_mask: BlockMask, score_mod: Any) -> tuple[Array, Array]:
            options: Any = {"score": score, "score_mod": score_mod, "dropout_rate": dropout_rate}
            return fused_attention(platform, x, kv_bias, None, static_mask=block_mask, **options)

        return attend_parts(attend, parts, x, kv_bias, block_mask, score_mod)
    if isinstance(block_mask, Mask):
        block_mask = _gpu_blocks(block_mask, x) if on_gpu else _blocks(block_mask, x)
    if x.q_segments is not None and x.kv_segments is not None:
        block_mask = block_mask.refine_segments(x.q_segments, x.kv_segments)
    by_row: Any
    by_col: Any
    if on_gpu:
        by_row = kernel_lists.BlockLists(block_mask.kv_idx, block_mask.n_partial, block_mask.n_total)
        by_col = kernel_lists.BlockLists(block_mask.q_idx, block_mask.qn_partial, block_mask.qn_total)
    else:
        by_row, by_col = block_mask.work_list(), block_mask.work_list(transposed=True)
    return kernel.block_sparse_attention(
        x.query,
        x.key,
        x.value,
        by_row,
        by_col,
        element=_element(block_mask),
        interval=_rule(block_mask).interval,
        score_mod=score_mod,
        captured=x.captured or (),
        q_segment_ids=x.q_segments,
        kv_segment_ids=x.kv_segments,
        sinks=x.sinks,
        kv_bias=kv_bias,
        scale=score.scale,
        soft_cap=score.soft_cap,
        dropout_rate=dropout_rate,
        dropout_seed=x.seed,
        block_q=block_mask.block_q,
        block_kv=block_mask.block_kv,
        platform=platform,
    )


def _is_by_distance(platform: kernel.Platform, x: Operands, score_mod: Callable[..., Array] | None) -> bool:
    lengths = x.query.shape[1], x.key.shape[1]
    return kernel.form(score_mod, x.captured or (), lengths=lengths, platform=platform).by_distance


def _blocks(mask: Mask, x: Operands) -> BlockMask:
    """The blocks of a symbolic mask, of the size that takes least time of those whose lists fit scalar memory."""
    lengths = x.query.shape[1], x.key.shape[1]
    sizes = tiling.candidates(*lengths, x.query.shape[3], x.value.shape[3], x.query.dtype)
    rows = 1
    if x.q_segments is not None:  # every row has lists of its own then, and few segments fill wide blocks
        rows, sizes = x.query.shape[0], [size for size in sizes if size[1] <= 1024]
    masks = [BlockMask.from_expr(mask, *lengths, *size) for size in sizes]
    fitting = [each for each in masks if rows * each.num_steps * 4 <= kernel_lists.BUDGET] or masks[:1]
    return min(fitting, key=lambda each: tiling.cost(each.num_steps, each.block_q, each.block_kv))


def _gpu_blocks(mask: Mask, x: Operands) -> BlockMask:
    lengths = x.query.shape[1], x.key.shape[1]
    cut = tiling.choose_blocks(*lengths, x.query.shape[3], x.value.shape[3], x.query.dtype)
    return BlockMask.from_expr(mask, *lengths, cut.block_q, cut.block_kv)


def _rule(mask: Any) -> Mask:
    """The rule of partial blocks."""
    rule = mask.mask if isinstance(mask, BlockMask) else mask
    return Full() if rule is None else rule


def _element(mask: Any) -> Callable[..., Any] | None:
    rule = _rule(mask)
    return None if rule == Full() else rule.elem


def check_fused(
    platform: kernel.Platform, operands: Operands, kv_bias: Array | None, lists: BlockMask | None, *,
    static_mask: BlockMask | Mask | None, score_mod: Callable[..., Array] | None, dropout_rate: float, **options: Any,
) -> None:  # fmt: skip
    """Raises `NotImplementedError` with the reason where the kernel does not do a call."""
    x, mask = operands, static_mask if lists is None else lists
    least = tiling.LEAST if platform in kernel.GPU else tiling.LANES
    sizes: dict[str, Any] = {"block_q": least, "block_kv": least}
    if platform in kernel.GPU:
        sizes = dict.fromkeys(sizes, tiling.largest_block(x.query.shape[1], x.key.shape[1]))
    if isinstance(mask, BlockMask):
        if mask.bank is not None:
            raise NotImplementedError("the kernel asks a symbolic mask in partial blocks; these have a bank")
        sizes = {"block_q": mask.block_q, "block_kv": mask.block_kv}
        if any(size % least for size in sizes.values()):
            raise NotImplementedError(f"the kernel has blocks of a multiple of {least}, not {sizes}")
    if not all(isinstance(each, (jax.Array, np.ndarray)) for each in x.captured or ()):
        raise NotImplementedError("the kernel reads captured arrays, not trees of them")
    functions: Any = {"element": _element(mask), "score_mod": score_mod, "captured": x.captured or ()}
    kernel.check(x.query, x.key, x.value, platform=platform, **functions, **sizes)


def fused_softmax(platform: kernel.Platform, operands: Operands, *, mask: Mask, score: Score) -> tuple[Array, Array]:
    """The walk over the blocks of a symbolic mask."""
    options: Any = {"score_mod": None, "dropout_rate": 0.0}
    return fused_attention(platform, operands, None, None, static_mask=mask, score=score, **options)


def check_fused_softmax(platform: kernel.Platform, operands: Operands, *, mask: Mask, score: Score) -> None:
    """Raises `NotImplementedError` with the reason where the kernel does not do a call."""
    for name in ("bias", "mask"):
        if getattr(operands, name) is not None:
            raise NotImplementedError(
                f"{name}: the kernel reads no array with an entry for every pair; symbolic masks it evaluates"
            )
    options: Any = {"score_mod": None, "dropout_rate": 0.0}
    check_fused(platform, operands, None, None, static_mask=mask, score=score, **options)


class Kernels(NamedTuple):
    """An op's entries for its `implementation=`."""

    tpu: Implementation
    gpu: Implementation
    interpret: Implementation


def kernels(run: Callable[..., Any], check: Callable[..., None]) -> Kernels:
    """The kernels of an op: `run(platform, ...)`, and `check(platform, ...)` that says what they do not do."""
    names: dict[str, kernel.Platform] = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "interpret": "interpret"}
    return Kernels(
        *(
            Implementation(name, functools.partial(run, platform), functools.partial(check, platform))
            for name, platform in names.items()
        )
    )
