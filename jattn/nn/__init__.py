"""Flax NNX layers that hold the parameters of the ops."""

from jattn.nn.blocks import Block
from jattn.nn.cross_entropy import chunked_cross_entropy
from jattn.nn.delta import DeltaNetMixer, GatedDeltaNetMixer, KDAMixer
from jattn.nn.gated import HGRN2Mixer, RetNetMixer, SimpleGLAMixer
from jattn.nn.linear import LightningMixer, LinearMixer
from jattn.nn.mixer import Mixer
from jattn.nn.mlp import MLP, SwiGLU
from jattn.nn.short_conv import ShortConvolution
from jattn.nn.softmax import SlidingWindowMixer, SoftmaxMixer

__all__ = [
    "MLP",
    "Block",
    "DeltaNetMixer",
    "GatedDeltaNetMixer",
    "HGRN2Mixer",
    "KDAMixer",
    "LightningMixer",
    "LinearMixer",
    "Mixer",
    "RetNetMixer",
    "ShortConvolution",
    "SimpleGLAMixer",
    "SlidingWindowMixer",
    "SoftmaxMixer",
    "SwiGLU",
    "chunked_cross_entropy",
]
