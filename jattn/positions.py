"""Position functions: rotary embedding, of places in a sequence and in a grid.

Channel pair i of a head is turned by the angle m * w_i at position m, w_i = theta ** (-2 i / D) (Su et al. 2021, eq.
34), so that the product of a query at m and a key at n depends on m - n only.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jattn import checks


def rotary_frequencies(rotary_dim: int, *, theta: float = 10_000.0, dtype: Any = jnp.float32) -> Float[Array, " half"]:
    """The `rotary_dim / 2` angular frequencies theta ** (-2 i / rotary_dim), radians per position."""
    if checks.check_count("rotary_dim", rotary_dim, minimum=2) % 2:
        raise ValueError(f"rotary_dim: expected an even number, got {rotary_dim}")
    if theta <= 0:
        raise ValueError(f"theta: expected a positive number, got {theta}")
    return theta ** (-jnp.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim)


def apply_rotary(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    *,
    theta: float = 10_000.0,
    rotary_dim: int | None = None,
    layout: Literal["half", "interleaved"] = "half",
) -> Float[Array, "B T N H"]:
    """Turn the first `rotary_dim` channels of every head by their position.

    Args:
      x: queries or keys.
      positions: integer position of every token; the batch may be 1.
      theta: base of the wavelengths.
      rotary_dim: how many channels turn; `None` means all H. The rest pass unchanged.
      layout: which channels form a pair: "half" joins i and i + rotary_dim / 2 (Llama, GPT-NeoX), "interleaved" joins
        2 i and 2 i + 1 (the paper, GPT-J). Weights made for one are wrong under the other.

    Returns:
      an array like `x`; angles, sines and products are made in float32 (float64 for float64 input).

    Raises:
      ValueError: shapes disagree, or `rotary_dim` is odd or larger than H.
      TypeError: `x` is not floating or `positions` not integer.
    """
    sizes = checks.bind_shapes(("x", x, "B T N H"))
    checks.check_floating(x=x)
    checks.check_integer(positions=positions)
    checks.check_broadcastable("positions", positions, (sizes["B"], sizes["T"]), "B T")
    checks.check_choice("layout", layout, ("half", "interleaved"))
    dim = sizes["H"] if rotary_dim is None else rotary_dim
    if dim > sizes["H"]:
        raise ValueError(f"rotary_dim: expected at most the head dim {sizes['H']}, got {dim}")
    dtype = checks.accumulator_dtype(x.dtype)
    angles = positions[..., None, None].astype(dtype) * rotary_frequencies(dim, theta=theta, dtype=dtype)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turning, rest = x[..., :dim], x[..., dim:]
    if layout == "half":
        a, b = jnp.split(turning.astype(dtype), 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    else:
        a, b = turning[..., 0::2].astype(dtype), turning[..., 1::2].astype(dtype)
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(turning.shape)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def apply_rotary_axes(
    x: Float[Array, "B T N H"], places: Int[Array, "B T A"], *, theta: float = 10_000.0
) -> Float[Array, "B T N H"]:
    """Rotary embedding of tokens on a grid of A axes: channels are shared out evenly, each share turns by one axis.

    Args:
      x: queries or keys; H is a multiple of 2 A.
      places: integer coordinates of every token; the batch may be 1.
      theta: base of the wavelengths, of every axis.

    Raises:
      ValueError: shapes disagree, or H does not divide into pairs of channels for each axis.
      TypeError: `x` is not floating or `places` not integer.
    """
    sizes = checks.bind_shapes(("x", x, "B T N H"), ("places", places, "rows T A"))
    checks.check_integer(places=places)
    checks.check_no_empty(sizes, "A")
    axes = sizes["A"]
    checks.check_broadcastable("places", places, (sizes["B"], sizes["T"], axes), "B T A")
    if sizes["H"] % (2 * axes):
        raise ValueError(
            f"x: each of {axes} axes turns pairs of channels, so a head dim that is a multiple of {2 * axes} is "
            f"needed, got {sizes['H']}"
        )
    shares = enumerate(jnp.split(x, axes, axis=-1))
    return jnp.concatenate([apply_rotary(share, places[..., i], theta=theta) for i, share in shares], axis=-1)
