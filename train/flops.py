"""Model FLOPs utilisation: the arithmetic of the model per second, over what the devices could do.

MFU = 3 * forward FLOPs per step / seconds / (devices * peak), recomputation not counted (Chowdhery et al. 2022, app.
B).
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 multiply-adds times two per second and chip, from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """What one device could do per second; on a CPU, what its best matrix product does now; `None` if unknown.

    The CPU's figure is for all of its cores, whatever the number of host devices they are divided into.
    """
    if device.platform != "cpu":
        return PEAK_FLOPS.get(device.device_kind)
    size = 1024
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / len(jax.local_devices())
