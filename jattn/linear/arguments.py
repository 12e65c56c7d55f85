"""What the linear ops have in common: the state they carry, and the checks of their arguments."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jattn import checks

MIN_LOG_DECAY = -1e4


class LinearState(NamedTuple):
    """What a linear layer remembers: `S [B, K, H, V]` and, when normalised, `z [B, K, H]`; in the accumulator dtype."""

    S: Float[Array, "B K H V"]
    z: Float[Array, "B K H"] | None


def packed(state: LinearState | None, key: Array, value: Array, accumulator: Any) -> Array:
    """[S | z] in the accumulator dtype; zeros when there is no state yet."""
    # Zeros made from the operands lie on a mesh as these do, which the carry of a scan must do from its start.
    zeros = jnp.zeros_like(key[:, 0, :, :, None] * value[:, 0, :, None, :], dtype=accumulator)
    if state is None:
        # XLA's CPU backend (jaxlib 0.11.2 to 0.12.0.1) makes one YNNPACK call of the read of a constant state and what
        # follows it, and that call reads outside of its buffers: whole batches came out wrong.
        return jax.lax.optimization_barrier(zeros)
    return zeros + (state.S if state.z is None else jnp.concatenate([state.S, state.z[..., None]], axis=-1))


def clamp(log_decay: Array, accumulator: Any) -> Array:
    return jnp.maximum(log_decay.astype(accumulator), MIN_LOG_DECAY)


def without_padding(mask: Array, key: Array, value: Array, log_decay: Array) -> tuple[Array, Array, Array]:
    """Key, value and log decay that add nothing and decay nothing at the tokens that `mask` leaves out."""
    real = jnp.broadcast_to(mask[:, 0, 0, :, None], (*key.shape[:2], 1))
    key, value = (jnp.where(real[..., None], x, 0) for x in (key, value))
    return key, value, jnp.where(real if log_decay.ndim < 4 else real[..., None], log_decay, 0)


def segment_starts(segment_ids: Array | None, like: Array) -> Array:
    """[B, T] booleans: True at the first token of every segment but the first, whose state is the initial one."""
    if segment_ids is None:
        return jnp.zeros(like.shape[:2], bool)
    return segment_ids != jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)


def scale(given: float | None, default: float = 1.0) -> float:
    return default if given is None else number("scale", given)


def number(name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a Python number, got {type(x).__name__}")
    if not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return float(x)


def check_arrays(**arrays: Any) -> None:
    for name, x in arrays.items():
        checks.check_array(name, x)


def check_value_heads(queries: int, keys: int, values: int) -> None:
    """Heads of a delta rule: a state for every value head, shared by queries or sharing a key and its query."""
    if keys == 0 or values == 0 or values % keys:
        raise ValueError(f"value: {values} heads cannot share {keys} key heads; expected a multiple of the key heads")
    if queries != keys and queries % values:
        raise ValueError(
            f"query: {queries} heads cannot be shared by {values} value heads and {keys} key heads; "
            "expected a multiple of the value heads, or as many as key heads"
        )


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None:
        size = checks.check_count("chunk_size", chunk_size)
        if size & (size - 1):
            raise ValueError(
                f"chunk_size: expected a power of two, got {size}; the nearest are {1 << size.bit_length() - 1} and "
                f"{1 << size.bit_length()}"
            )


def check_log_decay(log_decay: Any, sizes: dict[str, int], layouts: tuple[str, ...]) -> None:
    if log_decay is None:
        return
    checks.check_array("log_decay", log_decay)
    checks.check_floating(log_decay=log_decay)
    wanted = [tuple(sizes[letter] for letter in layout.split()) for layout in layouts]
    if tuple(log_decay.shape) not in wanted:
        options = " or ".join(f"[{', '.join(a.split())}] = {b}" for a, b in zip(layouts, wanted, strict=True))
        raise ValueError(f"log_decay: expected {options}, got {tuple(log_decay.shape)}")
    message = (
        "expected logarithms of decays, at most 0, got positive numbers; pass jax.nn.log_sigmoid of a gate's logits"
    )
    checks.check_values("log_decay", log_decay, lambda x: x > 0, message)


def check_padding_mask(mask: Any, sizes: dict[str, int]) -> None:
    if mask is None:
        return
    wanted = (sizes["B"], 1, 1, sizes["S"])
    honours = (
        "linear attention has no scores to mask one by one: it honours key padding, a boolean array [B, 1, 1, S], and "
        "has is_causal= and segment_ids= for the rest"
    )
    if not isinstance(mask, (jax.Array, np.ndarray)):
        raise ValueError(f"mask: expected an array of shape {wanted}, got {type(mask).__name__}; {honours}")
    if mask.shape not in (wanted, (1, *wanted[1:])):
        raise ValueError(f"mask: expected the shape {wanted}, got {tuple(mask.shape)}; {honours}")
    if mask.dtype != bool:
        raise ValueError(f"mask: expected booleans, got {mask.dtype}; {honours}")


def check_segment_ids(segment_ids: Any, sizes: dict[str, int]) -> None:
    if segment_ids is None:
        return
    checks.bind_shapes(("segment_ids", segment_ids, "B T"), **sizes)
    checks.check_integer(segment_ids=segment_ids)
    message = "expected numbers that never decrease along time; number the packed sequences in order"
    checks.check_values("segment_ids", segment_ids, lambda x: x[:, 1:] < x[:, :-1], message)


def check_state(
    state: Any, query: Array, sizes: dict[str, int], normalize: bool, *, name: str = "initial_state", heads: str = "K"
) -> None:
    """`heads` is the letter in `sizes` of the heads that have a state."""
    if state is None:
        return
    if not isinstance(state, LinearState):
        raise TypeError(f"{name}: expected a LinearState(S, z), got {type(state).__name__}")
    checks.check_array(f"{name}.S", state.S)
    checks.bind_shapes((f"{name}.S", state.S, f"B {heads} H V"), (f"{name}.z", state.z, f"B {heads} H"), **sizes)
    if normalize != (state.z is not None):
        raise ValueError(
            f"{name}.z: normalize={normalize} {'needs' if normalize else 'has no use for'} the sum of keys [B, K, H], "
            f"got {None if state.z is None else tuple(state.z.shape)}"
        )
    accumulator = checks.accumulator_dtype(query.dtype)
    for field, x in zip("Sz", state, strict=True):
        if x is not None and x.dtype != accumulator:
            raise TypeError(f"{name}.{field}: expected dtype {accumulator}, in which states are kept, got {x.dtype}")
