"""How the work of a chip is cut up: blocks of a grid step, tiles inside it, and which units do what.

Chosen by what the compiler schedules (`python -m pallas_kernels.lab report --family block_sparse`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128
STRIP = 1024
"""The fewest keys that are worth a start of their own: 1024 take a fourteenth more than half of what 2048 do."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """A piece of a grid step whose scores are in registers or beside them at once; `lag` more are begun ahead of it."""

    q: int
    kv: int
    lag: int


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One grid step.

    Attributes:
      turned: tiles of full and of masked blocks, of as many queries, where a forward walk lays them with queries along
        the lanes; `None`: nowhere.
      strip: keys of a block that are looked at on their own where some of its masked pairs may be skipped.
      ones: row sums by a product with ones, where values leave half of a matrix unit empty.
      split: scaled queries as two bfloat16 halves, where the products of scores leave half of a matrix unit empty.
      vmem: bytes of on-chip memory that a kernel may take.
      resident: bytes of it for gradients of keys and values of a whole sequence.
    """

    block_q: int
    block_kv: int
    forward: Tile
    backward: Tile
    strip: int
    ones: bool
    split: bool
    vmem: int
    resident: int
    turned: tuple[Tile, Tile] | None = None

    @property
    def most(self) -> int:
        """Bytes of it for all that stays, beside the blocks of a grid step."""
        return self.vmem * 3 // 4


@dataclasses.dataclass(frozen=True)
class _Chip:
    block_q: int
    block_kv: int
    forward: Tile
    backward: Tile
    wide: bool  # matrix units of 256 x 256
    vmem: int
    resident: int
    overhead: float  # of a grid step, forward and backward, in the time of 512 x 512 pairs
    turned: tuple[Tile, Tile] | None = None


_LARGE: Any = {"vmem": 128 * 2**20, "resident": 64 * 2**20}
_V5 = _Chip(1024, 2048, Tile(512, 512, 1), Tile(256, 256, 2), wide=False, overhead=0.35, **_LARGE)
_V5P = dataclasses.replace(_V5, vmem=64 * 2**20, resident=40 * 2**20)
_V6 = _Chip(
    1024,
    2048,
    Tile(256, 512, 2),
    Tile(256, 256, 2),
    wide=True,
    overhead=1.1,
    turned=(Tile(256, 256, 6), Tile(256, 512, 3)),
    **_LARGE,
)
_V7 = dataclasses.replace(
    _V6, forward=Tile(256, 512, 1), turned=(Tile(256, 256, 5), Tile(256, 512, 3)), vmem=64 * 2**20, resident=32 * 2**20
)


def choose(
    q_len: int,
    kv_len: int,
    width: int,
    value_width: int,
    dtype: Any,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    kind: str | None = None,
) -> Tiling:
    """The cut for a problem.

    Args:
      block_q, block_kv: of lists that are there already; `None` chooses, within the lengths.
      kind: of the device, as JAX names it; `None` asks the device that is compiled for, where it is known.
    """
    chip = _chip(_kind() if kind is None else kind)
    narrow, less = jnp.dtype(dtype) == jnp.bfloat16, 1
    # Float32 products are six passes and wide heads several: as much more code, and compile time follows it.
    if not narrow or max(width, value_width) > LANES:
        less = 2
    block_q = block_q or _within(q_len, chip.block_q // less)
    block_kv = block_kv or _within(kv_len, chip.block_kv // less)

    def fitted(tile: Tile) -> Tile:
        return Tile(_divisor(block_q, tile.q), _divisor(block_kv, tile.kv), tile.lag if narrow else 1)

    forward, backward = fitted(chip.forward), fitted(chip.backward)
    turned = None
    if chip.turned and narrow and max(width, value_width) <= LANES:
        turned = fitted(chip.turned[0]), fitted(chip.turned[1])
    return Tiling(
        block_q=block_q,
        block_kv=block_kv,
        forward=forward,
        backward=backward,
        turned=turned,
        # Whole tiles of every walk.
        strip=_divisor(block_kv, STRIP, math.lcm(*(tile.kv for tile in (forward, backward, *(turned or ()))))),
        ones=chip.wide and narrow and value_width <= LANES,
        split=chip.wide and narrow and width <= LANES,
        vmem=chip.vmem * 7 // 8,
        resident=chip.resident,
    )


def candidates(q_len: int, kv_len: int, width: int, value_width: int, dtype: Any) -> list[tuple[int, int]]:
    """Sizes of blocks worth a try, largest first: small ones list a mask closely, large ones take few steps."""
    largest = choose(q_len, kv_len, width, value_width, dtype)
    sizes, block_q, block_kv = [], largest.block_q, largest.block_kv
    while (block_q, block_kv) not in sizes:
        sizes.append((block_q, block_kv))
        if block_kv >= block_q:
            block_kv = max(min(block_kv, 512), _whole(block_kv // 2))
        else:
            block_q = max(min(block_q, 512), _whole(block_q // 2))
    return sizes


def cost(steps: Any, block_q: Any, block_kv: Any) -> Any:
    """The time of so many grid steps, in that of 512 x 512 pairs; of numbers or arrays."""
    return steps * (block_q * block_kv / 512**2 + _chip(_kind()).overhead)


def room() -> int:
    """Bytes of on-chip memory for numbers of a head that logits get, beside which their gradients take as many."""
    return _chip(_kind()).vmem // 3


def _kind() -> str:
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else ""


def _chip(kind: str) -> _Chip:
    if "v6" in kind:
        return _V6
    if "7" in kind:
        return _V7
    return _V5P if kind in ("TPU v5", "TPU v5p") else _V5


def _within(length: int, block: int) -> int:
    """`block`, or the length in whole lanes if that is shorter, and in twice as many if it is long.

    Of an odd number of lanes tiles would be 128 keys: 1400 tokens take 1.7 to 1.9 times as long on v6e as in 1536.
    """
    return min(block, _whole(length) if length <= STRIP else -(-length // (2 * LANES)) * 2 * LANES)


def _whole(length: int) -> int:
    return -(-length // LANES) * LANES


def _divisor(block: int, most: int, unit: int = LANES) -> int:
    """The largest part of a block up to `most`, or else the smallest, that is whole `unit`s and divides it."""
    return max((size for size in range(unit, min(block, most) + 1, unit) if block % size == 0), default=unit)


LEAST = 16
"""Tensor cores of a GPU add up 16 products at a time."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One program on a GPU: its tiles of queries and keys, powers of two, and how many turns ahead its loop loads."""

    q: int
    kv: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The cut on a GPU: blocks of the lists, and programs forward, for the gradients of queries, and of keys."""

    block_q: int
    block_kv: int
    forward: Program
    queries: Program
    keys: Program


_NARROW = {
    64: (Program(128, 64, 4, 3), Program(128, 64, 8, 3), Program(64, 64, 4, 3)),
    128: (Program(128, 64, 8, 3), Program(128, 64, 8, 3), Program(64, 128, 8, 2)),
    256: (Program(128, 64, 8, 2), Program(128, 32, 8, 2), Program(32, 64, 8, 3)),
}
_FLOAT32 = {
    64: (Program(64, 32, 4, 2), Program(64, 32, 4, 2), Program(32, 64, 4, 2)),
    128: (Program(64, 16, 8, 2), Program(32, 32, 8, 2), Program(32, 32, 8, 2)),
}
MOST_PAIRS = 2**20
"""Of blocks: a list of each row with all of them takes 4 MiB, and so does its transpose."""


def widest(dtype: Any) -> int:
    """Channels of the widest heads whose products and sums fit the registers of a program on a GPU."""
    return max(_NARROW if jnp.dtype(dtype) == jnp.bfloat16 else _FLOAT32)


def largest_block(q_len: int, kv_len: int) -> int:
    """What the blocks have that are chosen on a GPU, of queries and keys alike, where they are not shorter."""
    size = 128
    while -(-q_len // size) * -(-kv_len // size) > MOST_PAIRS:
        size *= 2
    return size


def choose_blocks(
    q_len: int,
    kv_len: int,
    width: int,
    value_width: int,
    dtype: Any,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    shared: int | None = None,
) -> Blocks:
    """The cut of a problem on a GPU, read off registers and spills of the lab's report for H100.

    Args:
      block_q, block_kv: of lists that are there already; `None` chooses, within the lengths.
      shared: bytes of shared memory of a program; `None` asks the device.
    """

    def within(length: int) -> int:
        return min(largest_block(q_len, kv_len), _power(length))

    block_q, block_kv = block_q or within(q_len), block_kv or within(kv_len)
    by_width = _NARROW if jnp.dtype(dtype) == jnp.bfloat16 else _FLOAT32
    programs = next(found for most, found in by_width.items() if max(width, value_width) <= most)
    one, both = (sum(_power(size) for size in sizes) for sizes in ((width,), (width, value_width)))
    shared = _shared() if shared is None else shared
    fitted = []
    for program, held, by_key in zip(programs, (one, both, both), (False, False, True), strict=True):
        # A tile is the largest power of two that divides its block.
        q, kv = math.gcd(program.q, block_q), math.gcd(program.kv, block_kv)
        times = program.kv // kv if by_key else program.q // q
        program = Program(q, kv, max(4, program.warps // times), program.stages)
        bytes_of = (size * jnp.dtype(dtype).itemsize for size in (held, both))
        fitted.append(_fitted(program, *bytes_of, by_key=by_key, shared=shared))
    return Blocks(block_q, block_kv, *fitted)


def _fitted(program: Program, held: int, moved: int, *, by_key: bool, shared: int) -> Program:
    """A program that loads less ahead, then one with smaller tiles, until it fits the shared memory.

    Args:
      held, moved: bytes of a token that stays, and of one that the program walks over.
    """
    stays, walks = ("kv", "q") if by_key else ("q", "kv")
    while True:
        sizes = {name: getattr(program, name) for name in (stays, walks)}
        rows = 2048  # numbers of single tokens, such as their segments
        taken = sizes[stays] * held + program.stages * sizes[walks] * moved + rows
        if taken <= shared or max(sizes.values()) == LEAST:
            return program
        if program.stages > 2:
            program = dataclasses.replace(program, stages=program.stages - 1)
        elif sizes[stays] > 64 or sizes[walks] == LEAST:
            smaller: Any = {stays: sizes[stays] // 2, "warps": max(4, program.warps // 2)}
            program = dataclasses.replace(program, **smaller)
        else:
            smaller = {walks: sizes[walks] // 2}
            program = dataclasses.replace(program, **smaller)


def _power(size: int) -> int:
    """The next power of two that a tile can have."""
    return max(LEAST, 1 << (size - 1).bit_length())


def _shared() -> int:
    """Of the GPU that is here, by its compute capability; without one, of an H100."""
    here = jax.devices()[0] if jax.default_backend() == "gpu" else None
    kibibytes = {"7.5": 64, "8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99, "12.0": 99, "12.1": 99}
    return kibibytes.get(getattr(here, "compute_capability", ""), 227) << 10
