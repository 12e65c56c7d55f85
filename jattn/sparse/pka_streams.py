"""The tokens of a call of `jattn.sparse.pka`, and whether they fit together."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jattn.checks import (
    bind_shapes,
    check_array,
    check_choice,
    check_floating,
    check_grouped_heads,
    check_integer,
    check_no_empty,
    check_same_dtype,
    check_values,
)


class Stream(NamedTuple):
    """Tokens of one kind. `query` may be `None` for a condition whose own output is not wanted: one from a cache."""

    query: Float[Array, "B L N H"] | None
    key: Float[Array, "B L K H"]
    value: Float[Array, "B L K V"]


class Subject(NamedTuple):
    """A reference image and the text tokens that name it; `keyword_ids=None` for none, and then all tokens see it."""

    query: Float[Array, "B S N H"] | None
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    keyword_ids: Int[Array, "B W"] | None = None
    keyword_valid: Bool[Array, "B W"] | None = None


class Streams(NamedTuple):
    """All tokens of a call. Spatial conditions have as many as the image; each subject has a length of its own."""

    text: Stream
    image: Stream
    spatial: tuple[Stream, ...] = ()
    subjects: tuple[Subject, ...] = ()


class Outputs(NamedTuple):
    """`[B, L, N, V]` of every stream; `None` where it had no query."""

    text: Float[Array, "B M N V"]
    image: Float[Array, "B L N V"]
    spatial: tuple[Float[Array, "B L N V"] | None, ...]
    subjects: tuple[Float[Array, "B S N V"] | None, ...]


def check_streams(streams: Any) -> dict[str, int]:
    """The sizes B, M, L, N, K, H, V of streams that fit together."""
    if not isinstance(streams, Streams):
        raise TypeError(f"streams: expected jattn.sparse.pka_streams.Streams, got {type(streams).__name__}")
    for name, stream in (("text", streams.text), ("image", streams.image)):
        if not isinstance(stream, Stream):
            raise TypeError(f"streams.{name}: expected a Stream, got {type(stream).__name__}")
        if stream.query is None:
            raise ValueError(f"streams.{name}.query: only conditions may come without one")
    image, sizes = streams.image, dict[str, int]()
    for name, letter, stream in (("image", "L", image), ("text", "M", streams.text)):
        sizes = _check_stream(f"streams.{name}", stream, letter, image.query, sizes)
    check_no_empty(sizes, "BMLNKHV")
    check_grouped_heads(sizes["N"], sizes["K"])
    _check_group("spatial", streams.spatial, Stream)
    _check_group("subjects", streams.subjects, Subject)
    for i, stream in enumerate(streams.spatial):
        check_array(f"streams.spatial[{i}].key", stream.key)
        if stream.key.ndim == 4 and stream.key.shape[1] != sizes["L"]:
            raise ValueError(
                f"streams.spatial[{i}].key: {stream.key.shape[1]} tokens, and the image has {sizes['L']}; resize the "
                "condition to the image's grid"
            )
        _check_stream(f"streams.spatial[{i}]", stream, "L", image.query, sizes)
    for i, subject in enumerate(streams.subjects):
        found = _check_stream(f"streams.subjects[{i}]", subject, "S", image.query, sizes)
        check_no_empty(found, "S")
        check_keywords(f"streams.subjects[{i}].", subject.keyword_ids, subject.keyword_valid, sizes)
    return sizes


def _check_group(name: str, group: Any, kind: type) -> None:
    if not isinstance(group, (tuple, list)):
        raise TypeError(f"streams.{name}: expected a tuple of {kind.__name__}, got {type(group).__name__}")
    for i, stream in enumerate(group):
        if not isinstance(stream, kind):
            raise TypeError(f"streams.{name}[{i}]: expected a {kind.__name__}, got {type(stream).__name__}")


def _check_stream(name: str, stream: Any, letter: str, like: Any, sizes: dict[str, int]) -> dict[str, int]:
    arrays = {f"{name}.{field}": getattr(stream, field) for field in ("query", "key", "value")}
    for field in ("key", "value"):
        check_array(f"{name}.{field}", arrays[f"{name}.{field}"])
    letters = (f"B {letter} N H", f"B {letter} K H", f"B {letter} K V")
    found = bind_shapes(*((full, x, dims) for (full, x), dims in zip(arrays.items(), letters, strict=True)), **sizes)
    check_floating(**{"streams.image.query": like})
    check_same_dtype(**({"streams.image.query": like} | arrays))
    return found


def check_keywords(prefix: str, ids: Any, valid: Any, sizes: dict[str, int]) -> None:
    if ids is None:
        if valid is not None:
            raise ValueError(f"{prefix}keyword_valid: says which keyword_ids count, and there are none")
        return
    found = bind_shapes((f"{prefix}keyword_ids", ids, "B W"), B=sizes["B"])
    check_integer(**{f"{prefix}keyword_ids": ids})
    if valid is not None:
        check_mask(valid, "B W", f"{prefix}keyword_valid", B=sizes["B"], W=found["W"])
    if not any(isinstance(x, jax.core.Tracer) for x in (ids, valid)):
        outside = (np.asarray(ids) < 0) | (np.asarray(ids) >= sizes["M"])
        wrong = outside if valid is None else outside & np.asarray(valid)
        message = f"expected positions of the {sizes['M']} text tokens; say which are padding by keyword_valid"
        check_values(f"{prefix}keyword_ids", wrong, lambda x: x, message)


def check_mask(mask: Any, letters: str, name: str = "mask", **sizes: int) -> None:
    bind_shapes((name, mask, letters), **sizes)
    if mask.dtype != np.bool_:
        raise TypeError(f"{name}: expected booleans, got {mask.dtype}")


def check_rule(eps: Any, normalization: Any) -> None:
    check_choice("normalization", normalization, ("minmax", "softmax"))
    if isinstance(eps, bool) or not isinstance(eps, (int, float, np.number)):
        raise TypeError(f"eps: expected a static number, got {type(eps).__name__}")
    if not math.isfinite(eps):
        raise ValueError(f"eps: expected a finite number, got {eps}")
