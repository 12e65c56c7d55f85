"""Flax NNX layers that hold the parameters of the ops."""

from jattn.nn.batch_norm import BatchNorm
from jattn.nn.block_sparse import BlockSparseMixer
from jattn.nn.blocks import Block
from jattn.nn.cross_entropy import chunked_cross_entropy
from jattn.nn.delta import DeltaNetMixer, GatedDeltaNetMixer, KDAMixer
from jattn.nn.dit_block import DiTBlock
from jattn.nn.dsf import LinearTransformerMixer, NormalizedMixer, SoftmaxDSFMixer
from jattn.nn.dsf_recurrent import RGLRU, LRUMixer, QLSTMMixer, ReversedQLSTMMixer, RGLRUMixer, S6Mixer, SSDMixer
from jattn.nn.efficient_local import ELA
from jattn.nn.gated import HGRN2Mixer, RetNetMixer, SimpleGLAMixer
from jattn.nn.hedgehog import HedgehogMixer, convert_attention
from jattn.nn.kronecker import KroneckerMixer
from jattn.nn.large_kernel import LKA, VANAttention, VANBlock
from jattn.nn.linear import LightningMixer, LinearMixer
from jattn.nn.mamba2 import Mamba2Mixer
from jattn.nn.mixer import Mixer
from jattn.nn.mlp import MLP, SwiGLU
from jattn.nn.neighborhood import NeighborhoodAttention
from jattn.nn.neighborhood_mixer import NeighborhoodMixer
from jattn.nn.routing import RoutingMixer, RoutingState
from jattn.nn.sea import SEAMixer, convert_to_sea
from jattn.nn.short_conv import ShortConvolution
from jattn.nn.softmax import SlidingWindowMixer, SoftmaxMixer

__all__ = [
    "BatchNorm",
    "Block",
    "BlockSparseMixer",
    "DeltaNetMixer",
    "DiTBlock",
    "ELA",
    "GatedDeltaNetMixer",
    "HGRN2Mixer",
    "HedgehogMixer",
    "KDAMixer",
    "KroneckerMixer",
    "LKA",
    "LRUMixer",
    "LightningMixer",
    "LinearMixer",
    "LinearTransformerMixer",
    "MLP",
    "Mamba2Mixer",
    "Mixer",
    "NeighborhoodAttention",
    "NeighborhoodMixer",
    "NormalizedMixer",
    "QLSTMMixer",
    "RGLRU",
    "RGLRUMixer",
    "RetNetMixer",
    "ReversedQLSTMMixer",
    "RoutingMixer",
    "RoutingState",
    "S6Mixer",
    "SEAMixer",
    "SSDMixer",
    "ShortConvolution",
    "SimpleGLAMixer",
    "SlidingWindowMixer",
    "SoftmaxDSFMixer",
    "SoftmaxMixer",
    "SwiGLU",
    "VANAttention",
    "VANBlock",
    "chunked_cross_entropy",
    "convert_attention",
    "convert_to_sea",
]
