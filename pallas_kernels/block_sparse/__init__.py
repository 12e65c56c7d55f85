"""Softmax attention over listed pairs of blocks, with any mask and score function, as fused kernels."""

from pallas_kernels.block_sparse.attention import Platform, block_sparse_attention
from pallas_kernels.block_sparse.lists import BlockLists, WorkList
from pallas_kernels.block_sparse.relative import Relative
from pallas_kernels.block_sparse.tiling import Blocks, Program, Tile, Tiling, choose, choose_blocks
from pallas_kernels.block_sparse.windows import Windows

__all__ = [
    "BlockLists",
    "Blocks",
    "Platform",
    "Program",
    "Relative",
    "Tile",
    "Tiling",
    "Windows",
    "WorkList",
    "block_sparse_attention",
    "choose",
    "choose_blocks",
]
