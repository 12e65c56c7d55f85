"""Flax NNX layers that hold the parameters of the ops."""

from jattn.nn.blocks import Block
from jattn.nn.cross_entropy import chunked_cross_entropy
from jattn.nn.linear import LightningMixer, LinearMixer
from jattn.nn.mixer import Mixer
from jattn.nn.mlp import MLP, SwiGLU
from jattn.nn.softmax import SlidingWindowMixer, SoftmaxMixer

__all__ = [
    "MLP",
    "Block",
    "LightningMixer",
    "LinearMixer",
    "Mixer",
    "SlidingWindowMixer",
    "SoftmaxMixer",
    "SwiGLU",
    "chunked_cross_entropy",
]
