"""Chips that are not here: their names, their memory, and devices of them to compile for."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import TYPE_CHECKING

from train.errors import UserError

if TYPE_CHECKING:
    import jax

GIB = 1 << 30

# Memory of a device in bytes, by JAX's name of its kind. A TPU7x is two devices of half its 192 GiB.
MEMORY = {
    "TPU v4": 32 * GIB,
    "TPU v5 lite": 16 * GIB,
    "TPU v5": 95 * GIB,
    "TPU v6 lite": 32 * GIB,
    "TPU7x": 96 * GIB,
    "NVIDIA H100 80GB HBM3": 80 * GIB,
}

# libtpu looks for the chips and the other hosts of a machine that is none.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_H100 = """\
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3" """


def prepare(topology: str) -> None:
    """Set what JAX and the compilers read when they load; this process computes on the CPU.

    Raises:
      UserError: the compiler for `topology` is not installed.
    """
    os.environ.update(_TPU_ENVIRONMENT, JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
    import jax

    jax.config.update("jax_platforms", "cpu")
    needed, packages = ["libtpu"], "libtpu"
    if topology.startswith("h100"):
        needed = ["jax_cuda13_plugin", "nvidia"]
        packages = f"--no-deps jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} "
        packages += "nvidia-cuda-nvcc nvidia-nvvm"
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--topology {topology}: its compiler ({missing[0]}) is not installed; pip install {packages}")


def devices_of(topology: str) -> list[jax.Device]:
    """Devices to compile for, as many as the topology has; none of them need be there."""
    import jax
    from jax.experimental import topologies

    family, _, size = topology.partition(":")
    try:
        if family == "h100":
            if not re.fullmatch(r"[1-8]|\d+", size) or int(size) < 1 or (int(size) > 8 and int(size) % 8):
                raise UserError(f"--topology {topology}: expected h100:N with N up to 8 or a multiple of 8")
            hosts, each = (1, int(size)) if int(size) <= 8 else (int(size) // 8, 8)
            return topologies.get_topology_desc(
                platform="cuda", target_config=_H100, topology=f"1x{hosts}x{each}"
            ).devices
        by_chips = re.fullmatch(r"(v5e|v6e)-(\d+)", topology)
        if by_chips and int(by_chips[2]) in _SQUARES:
            topology = f"{by_chips[1]}:{_SQUARES[int(by_chips[2])]}"
        # The two cores of a v4 chip work as one device unless a program asks otherwise.
        options = {"chip_config_name": "megacore"} if family == "v4" else {}
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2].splitlines()[0]
        raise UserError(
            f"--topology {topology}: is none that the compiler knows ({reason}); v5e:2x4, v5p:8x8x8 and h100:8 are"
        ) from None
