"""Chips that need not be here: what they can do, and devices of them to compile for.

Every figure is of one JAX device: a chip of v4 to v6e (on v4 and v5p its two cores work as one device), one of the two
cores of a tpu7x chip, one H100. Peak bf16 rate of a TPU:

    peak = 2 · mxu_width² · mxu_rows · mxus · cores · clock    FLOP/s

`mxus` and `mxu_rows` (rows of the streamed operand that an MXU takes in one cycle) are of one core; the clock is the
one that gives the published peak.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind; see the head of this module for what the figures count."""

    name: str
    kind: str  # JAX's name of it
    topology: str  # the smallest the compiler accepts
    clock_hz: float
    peak_flops: float  # bf16
    hbm_bytes: int
    hbm_bytes_per_second: float
    cores: int
    mxus: int  # of a core; 0 where there are none
    mxu_width: int
    mxu_rows: int
    branch_delay: int  # bundles that still run after a taken branch
    source: str

    @property
    def is_tpu(self) -> bool:
        return self.mxus > 0


_DOCS = "docs.cloud.google.com/tpu/docs"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", "v4:2x2x1", 1.05e9, 275e12, 32 * GIB, 1200e9, 2, 4, 128, 1, 1, f"{_DOCS}/v4"),
        Chip("v5e", "TPU v5 lite", "v5e:2x2", 1.5e9, 197e12, 16 * GIB, 819e9, 1, 4, 128, 1, 4, f"{_DOCS}/v5e"),
        Chip("v5p", "TPU v5", "v5p:2x2x1", 1.75e9, 459e12, 95 * GIB, 2765e9, 2, 4, 128, 1, 4, f"{_DOCS}/tpu7x"),
        Chip("v6e", "TPU v6 lite", "v6e:2x2", 1.75e9, 918e12, 32 * GIB, 1638e9, 1, 2, 256, 2, 4, f"{_DOCS}/tpu7x"),
        # Half of a chip's 2307 TFLOP/s, 192 GiB and 7380 GB/s.
        Chip("tpu7x", "TPU7x", "tpu7x:2x2x1", 2.2e9, 1153.5e12, 96 * GIB, 3690e9, 1, 2, 256, 2, 6, f"{_DOCS}/tpu7x"),
        Chip(
            "h100", "NVIDIA H100 80GB HBM3", "h100:1", 1.98e9, 989e12, 80 * GIB, 3352e9, 132, 0, 0, 0, 0,
            "NVIDIA H100 datasheet (SXM, dense bf16); clock, memory and bandwidth as XLA's description of it has them",
        ),
    )
}  # fmt: skip

# libtpu looks for the chips and the other hosts of a machine that is none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    # XLA takes a stack trace for many a step of a dump, and each of them would start a symbolizer: 7 times the time.
    "LLVM_DISABLE_SYMBOLIZATION": "1",
}
_SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_H100 = """\
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3" """


def prepare_environment() -> None:
    """Set what JAX and the compilers read when they load; this process computes on the CPU."""
    os.environ.update(_ENVIRONMENT)
    import jax

    jax.config.update("jax_platforms", "cpu")


def missing_compiler(topology: str) -> tuple[str, str] | None:
    """The module that compiling for `topology` lacks here and what to give to `pip install`, or `None`."""
    import jax

    needed, packages = ["libtpu"], "libtpu"
    if topology.startswith("h100"):
        needed = ["jax_cuda13_plugin", "nvidia"]
        packages = f"--no-deps jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} "
        packages += "nvidia-cuda-nvcc nvidia-nvvm"
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return (missing[0], packages) if missing else None


def devices(topology: str) -> list[jax.Device]:
    """Devices to compile for, as many as `topology` has; none of them need be there.

    Args:
      topology: `v5e:2x4`, `v5p:8x8x8` and so on as libtpu names them, `v5e-8`, or `h100:N`.

    Raises:
      ValueError: the compiler knows no such topology. The message is what stands after its name.
    """
    import jax
    from jax.experimental import topologies

    family, _, size = topology.partition(":")
    try:
        if family == "h100":
            if not re.fullmatch(r"\d+", size) or int(size) < 1 or (int(size) > 8 and int(size) % 8):
                raise ValueError("expected h100:N with N up to 8 or a multiple of 8")
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
        raise ValueError(f"is none that the compiler knows ({reason}); v5e:2x4, v5p:8x8x8 and h100:8 are") from None
