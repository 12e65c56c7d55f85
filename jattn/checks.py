"""Argument checks whose messages name the argument, what came, what was wanted and the way out.

Every public op runs these before any mathematics. A wrong shape or value is a `ValueError`, a wrong type or dtype a
`TypeError`; nothing is broadcast, cast or clipped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def accumulator_dtype(*dtypes: Any) -> Any:
    """The dtype of statistics, sums and states for operands of `dtypes`: float32, or float64 when an operand is."""
    return jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)


def check_array(name: str, x: Any) -> None:
    """`x` is a JAX or NumPy array (or a tracer of one); lists and Python numbers are refused rather than converted."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected an array, got {type(x).__name__}; wrap it in jnp.asarray(...)")


def bind_shapes(*specs: tuple[str, Any, str], **known: int) -> dict[str, int]:
    """Match arrays against dimension letters and return the size of every letter.

    Args:
      specs: `(name, array, "B T N H")` triples; an array that is `None` is left out. A digit stands for itself.
      known: letters whose size is already fixed.

    Raises:
      TypeError: an argument is not an array.
      ValueError: a rank or a size disagrees; the message says where the size was fixed.
    """
    sizes = dict(known)
    origin = dict.fromkeys(known, "an earlier argument")
    for name, x, letters in specs:
        if x is None:
            continue
        check_array(name, x)
        wanted = letters.split()
        if len(x.shape) != len(wanted):
            raise ValueError(
                f"{name}: expected {len(wanted)} dimensions [{', '.join(wanted)}], got shape {tuple(x.shape)}"
            )
        for letter, size in zip(wanted, x.shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            origin.setdefault(letter, name)
            if size != expected:
                why = "" if letter.isdigit() else f" as in {origin[letter]}"
                raise ValueError(
                    f"{name}: expected [{', '.join(wanted)}] with {letter} = {expected}{why}, got {tuple(x.shape)}"
                )
    return sizes


def check_floating(**arrays: Any) -> None:
    """Every array given has a real floating dtype."""
    for name, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{name}: expected a floating dtype, got {x.dtype}; cast it with {name}.astype(jnp.float32)"
            )


def check_same_dtype(**arrays: Any) -> None:
    """All arrays given share the dtype of the first; nothing is promoted in silence."""
    present = [(name, x) for name, x in arrays.items() if x is not None]
    for name, x in present[1:]:
        first_name, first = present[0]
        if x.dtype != first.dtype:
            raise TypeError(
                f"{name}: expected dtype {first.dtype} as in {first_name}, got {x.dtype}; "
                f"cast it with {name}.astype({first_name}.dtype)"
            )


def check_integer(**arrays: Any) -> None:
    """Every array given has an integer dtype."""
    for name, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name}: expected an integer dtype, got {x.dtype}")


def check_grouped_heads(query_heads: int, kv_heads: int) -> None:
    """`N` query heads share `K` key and value heads evenly."""
    if kv_heads == 0 or query_heads % kv_heads:
        raise ValueError(
            f"query: {query_heads} heads cannot be shared by {kv_heads} key and value heads; "
            f"the number of query heads must be a multiple of the number of key heads"
        )


def check_no_empty(sizes: Mapping[str, int], letters: Iterable[str]) -> None:
    """None of the named dimensions is zero."""
    for letter in letters:
        if sizes[letter] == 0:
            raise ValueError(f"dimension {letter} is 0; an attention op needs at least one element along it")


def check_choice(name: str, value: Any, options: Iterable[Any]) -> None:
    """`value` is one of `options`."""
    options = tuple(options)
    if not any(value is option or value == option for option in options):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")


def check_flags(**flags: Any) -> None:
    """Every value given is a Python or NumPy boolean; nothing else is taken for true or false."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name}: expected a static True or False, got {type(value).__name__}")


def check_count(name: str, value: Any, *, minimum: int = 1, maximum: int | None = None) -> int:
    """`value` is a Python or NumPy integer of at least `minimum`, at most `maximum` (no booleans, no tracers)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected a static integer, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name}: expected at most {maximum}, got {value}")
    return int(value)


def check_causal_lengths(query_length: int, key_length: int) -> None:
    """`is_causal=True` has one meaning only when both lengths agree."""
    if query_length != key_length:
        shift = key_length - query_length
        raise ValueError(
            f"is_causal: with {query_length} queries and {key_length} keys it has two readings; pass mask=Causal() if "
            f"both start at position 0, or mask=Causal(offset={shift}) if both end together"
        )


def check_values(name: str, x: Any, wrong: Callable[[Any], Any], message: str) -> None:
    """`wrong(x)` is true nowhere; while `x` is being traced its values are not known, and nothing is checked."""
    if x is None or isinstance(x, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        if np.any(wrong(x)):
            raise ValueError(f"{name}: {message}")


def check_broadcastable(name: str, x: Any, shape: tuple[int, ...], letters: str) -> None:
    """`x` has the rank of `shape` and each of its sizes is 1 or that of `shape`."""
    check_array(name, x)
    wanted = letters.split()
    if len(x.shape) != len(shape) or any(a not in (1, b) for a, b in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected [{', '.join(wanted)}] = {shape}, each size may be 1, got {tuple(x.shape)}")
