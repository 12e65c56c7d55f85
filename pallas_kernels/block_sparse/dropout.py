"""Which probabilities dropout takes: a hash of a seed and of where the pair is, the same bits on every machine."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def factors(
    seed: Int[Array, ""], batch: Any, head: Any, q_pos: Any, kv_pos: Any, rate: float, dtype: Any
) -> Float[Array, ...]:
    """0 with probability `rate` and else 1 / (1 - rate).

    The integers broadcast against each other; they are read modulo 2^32, and so is the arithmetic, in signed numbers,
    for some kernels have no others. `mix` is the finaliser lowbias32 of Chris Wellons' hash prospector.
    """

    def mix(x: Array) -> Array:
        x = (x ^ jax.lax.shift_right_logical(x, jnp.full_like(x, 16))) * _signed(0x7FEB352D)
        x = (x ^ jax.lax.shift_right_logical(x, jnp.full_like(x, 15))) * _signed(0x846CA68B)
        return x ^ jax.lax.shift_right_logical(x, jnp.full_like(x, 16))

    bits: Any = _signed(0x9E3779B9)
    for place in (seed, batch, head, q_pos, kv_pos):  # the larger arrays come last: all pairs need one `mix` only
        bits = mix(bits * _signed(0x9E3779B9) + jnp.asarray(place).astype(jnp.int32))
    # Signed numbers are in the order of unsigned ones whose highest bit is turned over.
    bound = min(round(rate * 2**32), 2**32 - 1)
    return jnp.where(bits ^ _signed(1 << 31) < _signed(bound ^ 1 << 31), 0, jnp.asarray(1 / (1 - rate), dtype))


def _signed(bits: int) -> Any:
    return jnp.int32(np.uint32(bits).view(np.int32))
