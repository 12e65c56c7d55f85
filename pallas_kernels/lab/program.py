"""The kernels that a compiled program calls, read from the text of its module."""

from __future__ import annotations

import dataclasses
import math
import re

_CALL = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.-]+)\s*=\s*(.*?)\bcustom-call\((.*?)custom_call_target=\"([^\"]+)\"", re.M)
# Attributes may go over several lines, some of which begin with a bracket.
_NEXT = re.compile(r"^\s*(?:ROOT\s+)?%?[\w.-]+\s*=\s|^\}$", re.M)
_ENTRY = re.compile(r"^ENTRY\b.*?^\}$", re.M | re.S)
_BITS = {"pred": 8, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Call:
    """One custom call: its instruction's name, the bytes of its operands and results, and what follows its target."""

    name: str
    bytes: int
    attributes: str
    nested: bool  # in a loop or a branch of the program

    def notes(self) -> list[str]:
        return ["a call of it is in a loop or a branch of the program, and counted once"] if self.nested else []


def calls(program: str, target: str) -> list[Call]:
    """Custom calls of `program` whose target begins with `target`, in their order."""
    entry = _ENTRY.search(program)
    found = []
    for match in _CALL.finditer(program):
        name, results, before, called = match.groups()
        if called.startswith(target):
            end = _NEXT.search(program, match.end())
            after = program[match.end() : end.start() if end else None]
            operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", before + after)
            size = shape_bytes(results) + shape_bytes(operands[1] if operands else "")
            nested = entry is None or not entry.start() <= match.start() < entry.end()
            found.append(Call(name, size, after, nested))
    return found


def shape_bytes(text: str) -> int:
    """Bytes of all the arrays whose shapes, such as bf16[8,128], stand in `text`."""
    bits = 0
    for kind, dims in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", text):
        width = _BITS.get(kind) or int(re.sub(r"\D*(\d+).*", r"\1", kind))
        bits += width * math.prod(int(dim) for dim in dims.split(",") if dim)
    return bits // 8
