"""What the fields of a configuration may hold: checks that name the field, what came and what was wanted."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from train.errors import UserError


def check_types(config: Any, prefix: str = "") -> None:
    """Every field of `config` has a value of its type. A recipe is Python, which would take any."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _is_of(value, hints[field.name]):
            raise UserError(f"{prefix}{field.name}: expected {field.type}, got {value!r}")
        if dataclasses.is_dataclass(value):
            check_types(value, f"{prefix}{field.name}.")


def _is_of(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind is Literal:
        return value in inner
    if kind in (Union, UnionType):
        return any(_is_of(value, one) for one in inner)
    if kind is tuple and isinstance(value, tuple):
        wanted = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(value) == len(wanted) and all(map(_is_of, value, wanted))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def check_least(*entries: tuple[str, int | None, int]) -> None:
    """Each (name, value, least) has a value of at least `least`, or `None`."""
    for name, value, least in entries:
        if value is not None and value < least:
            raise UserError(f"{name}: expected at least {least}, got {value}")


def check_ranges(config: Any, ranges: Mapping[str, tuple[str, ...]]) -> None:
    """The fields of `config` named under an interval, such as "[0, 1)" or "(0, inf) or None", have values in it."""
    for wanted, names in ranges.items():
        interval = wanted.removesuffix(" or None")
        low, high = map(float, interval[1:-1].split(", "))
        ends = [end for end, bracket in ((low, interval[0]), (high, interval[-1])) if bracket in "[]"]
        for name in names:
            value = operator.attrgetter(name)(config)
            if not (value is None or low < value < high or value in ends):
                raise UserError(f"{name}: expected a number in {wanted}, got {value}")
