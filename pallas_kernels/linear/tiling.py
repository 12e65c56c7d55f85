"""How the kernels cut a problem up.

A grid step holds `chunks` chunks of `heads` heads. More of both gives the scheduler more independent products, until
values no longer fit the registers; more chunks also mean fewer states to keep for the backward pass. Chosen with
`python -m pallas_kernels.lab report --family linear` for v5e, v5p, v6e and tpu7x at H = V = 128.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128
UNITS = 32
"""(chunk, head) units of a backward step, written out one by one: compile time follows them."""
LAG = 3
VMEM = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One grid step of the backward walk: `chunks` chunks of `chunk` tokens, for `heads` key heads.

    Attributes:
      lag: how many (chunk, head) units ahead the scores are computed.
      times: a step of the forward walk, whose units are smaller, is so many of the backward walk's.
      vmem: bytes of on-chip memory that the kernel may take.
    """

    chunk: int
    chunks: int
    heads: int
    lag: int
    times: int = 1
    vmem: int = VMEM

    @property
    def tokens(self) -> int:
        return self.chunk * self.chunks

    @property
    def forward(self) -> Tiling:
        """The forward walk's step."""
        return dataclasses.replace(self, chunks=self.chunks * self.times, times=1)


def choose(
    batch: int,
    length: int,
    heads: int,
    group: int,
    width: int,
    value_width: int,
    dtype: Any,
    *,
    shared: int = 1,
    of_channels: bool = False,
    cores: int | None = None,
) -> Tiling:
    """The cut for a problem: as many heads as fill whole lanes, fit and leave no core idle; then as many chunks.

    Args:
      shared: heads that have one query and key head.
      of_channels: for decays of channels, whose units are several times the work.
      cores: of a device; `None` asks the device that is compiled for, where it is known.
    """
    chunk, size = LANES, jnp.dtype(dtype).itemsize
    cores = cores or _cores()
    most = min(heads, 8)
    possible = [
        n for n in range(shared, most + 1, shared) if heads % n == 0 and _whole(heads, n, shared, width, value_width)
    ]
    busy = [n for n in possible if batch * (heads // n) % cores == 0]
    together = max(busy or possible or [heads])
    # A float32 product is six passes of the matrix unit, and as much code.
    units = (UNITS if size == 2 else UNITS // 4) // (2 if of_channels else 1)
    chunks = max(min(units // (together * group), -(-length // chunk)), 1)

    def taken(chunks: int) -> int:
        """Bytes of a backward step, the larger one: operands and results twice, for the next ones are on their way."""
        tokens = chunk * chunks * together * (group * (2 * width + value_width) + 2 * width + 2 * value_width)
        return 2 * size * tokens + 4 * together * width * value_width * (chunks + 6)

    while chunks > 1 and taken(chunks) > VMEM // 2:
        chunks -= 1
    # Operands and results of a backward step's tokens, of which the forward walk has no others.
    a_token = size * (group + 1) * (width + value_width) + (4 * width if of_channels else 0)
    times = min(2, -(-length // (chunk * chunks)), VMEM // 2 // (2 * chunk * chunks * together * a_token))
    return Tiling(chunk, chunks, together, LAG, max(times, 1))


def _cores() -> int:
    """Two on TPU v4 and v5p, whose programs are shared out over both."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        kind = described.device_kind
    else:
        kind = jax.devices()[0].device_kind if jax.default_backend() == "tpu" else ""
    return 2 if kind in ("TPU v4", "TPU v5", "TPU v5p") else 1


def _whole(heads: int, together: int, shared: int, width: int, value_width: int) -> bool:
    """Whether blocks of `together` heads are whole tiles of lanes, or all heads."""
    return together == heads or (together // shared * width % LANES == 0 and together * value_width % LANES == 0)


def check(width: int, value_width: int, dtype: Any, blocks: Tiling | None) -> None:
    """Raises `NotImplementedError` where no cut fits the memory of a core, `ValueError` for one that cannot be."""
    if blocks is not None and (blocks.chunk < 8 or blocks.chunk & (blocks.chunk - 1)):
        raise ValueError(f"blocks.chunk: expected a power of two from 8, got {blocks.chunk}")
    # One head, one chunk: blocks twice, state, its gradient and the state at the step's start.
    one = 2 * jnp.dtype(dtype).itemsize * LANES * (4 * width + 4 * value_width) + 4 * 8 * width * value_width
    if one > VMEM:
        raise NotImplementedError(
            f"a state of {width} x {value_width} does not fit the kernel's {VMEM >> 20} MiB; heads of 1024 x 1024 do"
        )
