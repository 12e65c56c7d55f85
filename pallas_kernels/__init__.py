"""Fused attention kernels in Pallas, for TPU and GPU; each family is one function with one gradient."""
