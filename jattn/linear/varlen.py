"""Sequences of different lengths one after another in one row, each with a state of its own before and after it.

    out[c_s : c_{s+1}], end_s = op(query[c_s : c_{s+1}], .., initial_state=start_s)          s = 0 .. S - 1

`segment_ids` packs sequences too, and costs nothing, but knows one state before the first and one after the last. Here
every sequence becomes a padded row of a batch, for S `max_length` tokens of work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jattn import checks
from jattn.linear import arguments
from jattn.linear.arguments import LinearState

PER_TOKEN = ("log_decay", "beta")  # what an op may have for every token besides query, key and value


def attend_varlen(
    op: Callable[..., Any],
    query: Float[Array, "1 T N H"],
    key: Float[Array, "1 T K H"],
    value: Float[Array, "1 T Kv V"],
    cu_seqlens: Int[Array, " S+1"],
    *,
    max_length: int,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    **options: Any,
) -> Any:
    """A linear op over packed sequences, as `cu_seqlens` asks for in flash-linear-attention.

    Args:
      op: `linear_attention`, `lightning_attention`, `retention`, `simple_gla`, `hedgehog_attention`, `delta_rule`,
        `gated_delta_rule`, `kda` or what else takes a padding `mask` and carries a state.
      query, key, value: one row with all tokens.
      cu_seqlens: where sequences begin, and where the last one ends: `[0, 3, 7]` are tokens 0 to 2 and 3 to 6. Two
        equal numbers are an empty sequence; tokens after the last number belong to none, and their outputs are 0.
      max_length: at least the length of the longest sequence; static, for shapes depend on it.
      initial_state: of every sequence, `S [S, Kv, H, V]`.
      return_state: also return the states after the sequences.
      options: the other arguments of `op`. `beta`, and `log_decay` unless it is `[K]`, are `[1, T, ..]` and packed as
        the queries are; all else is the same for every sequence.

    Returns:
      `[1, T, O, V]`, or `(that, LinearState)`.

    Raises:
      TypeError: a wrong dtype or type. ValueError: a wrong shape, offsets that decrease or leave the row, a sequence
      longer than `max_length` (while offsets are traced their values are not known and not checked), or what `op` says.
    """
    arguments.check_arrays(query=query, key=key, value=value, cu_seqlens=cu_seqlens)
    sizes = checks.bind_shapes(("query", query, "B T N H"), ("cu_seqlens", cu_seqlens, "ends"))
    checks.check_integer(cu_seqlens=cu_seqlens)
    checks.check_flags(return_state=return_state)
    longest = checks.check_count("max_length", max_length)
    length, count = sizes["T"], sizes["ends"] - 1
    if sizes["B"] != 1:
        raise ValueError(
            f"query: expected one row with all sequences, got {sizes['B']}; use a mask for rows of a batch"
        )
    gates = {name: options[name] for name in PER_TOKEN if getattr(options.get(name), "ndim", 0) > 1}
    layouts = ((name, x, "B T heads channels" if x.ndim == 4 else "B T heads") for name, x in gates.items())
    checks.bind_shapes(("key", key, "B T K H"), ("value", value, "B T Kv V"), *layouts, **sizes)
    if count < 1:
        raise ValueError(f"cu_seqlens: expected at least two numbers, got {sizes['ends']}")
    for name in ("mask", "segment_ids"):
        if options.get(name) is not None:
            raise ValueError(f"{name}: cu_seqlens says which tokens are a sequence; leave it out")
    message = f"expected offsets from 0 to T = {length} that do not decrease"
    checks.check_values("cu_seqlens", cu_seqlens, lambda x: (x[0] != 0) | (x[-1] > length) | (x[1:] < x[:-1]), message)
    checks.check_values(
        "max_length", cu_seqlens, lambda x: jnp.diff(x) > longest, f"{longest} is less than the longest sequence"
    )

    offsets = jnp.asarray(cu_seqlens)
    place = jnp.arange(longest)
    real = place < jnp.diff(offsets)[:, None]
    token = jnp.where(real, offsets[:-1, None] + place, 0)

    def rows(x: Any) -> Array:
        """[1, T, ..] -> [S, max_length, ..]"""
        return jnp.asarray(x)[0, token]

    out, state = op(
        rows(query),
        rows(key),
        rows(value),
        mask=real[:, None, None],
        initial_state=initial_state,
        return_state=True,
        **options | {name: rows(x) for name, x in gates.items()},
    )
    index = jnp.arange(length)
    sequence = jnp.clip(jnp.searchsorted(offsets, index, side="right") - 1, 0, count - 1)
    within = jnp.clip(index - offsets[sequence], 0, longest - 1)
    packed = jnp.where((index < offsets[-1])[:, None, None], out[sequence, within], 0)[None]
    return (packed, state) if return_state else packed
