"""Causal linear recurrences as fused kernels: the additive one, `linear_attention`, and `delta_rule`."""

from pallas_kernels.entry import Platform
from pallas_kernels.linear import additive, delta
from pallas_kernels.linear.additive import linear_attention
from pallas_kernels.linear.call import Call
from pallas_kernels.linear.delta import delta_rule
from pallas_kernels.linear.normalized import normalized_linear_attention

__all__ = ["Call", "Platform", "additive", "delta", "delta_rule", "linear_attention", "normalized_linear_attention"]
