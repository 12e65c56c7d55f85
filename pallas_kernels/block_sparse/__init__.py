"""Softmax attention over listed pairs of blocks, with any mask and score function, as fused kernels."""

from pallas_kernels.block_sparse.attention import Platform, block_sparse_attention
from pallas_kernels.block_sparse.lists import WorkList
from pallas_kernels.block_sparse.tiling import Tile, Tiling, choose

__all__ = ["Platform", "Tile", "Tiling", "WorkList", "block_sparse_attention", "choose"]
