"""What a compiled program sends between devices, read from its optimised HLO text.

A program is a set of computations that name one another. What is reachable from the body of a `while` runs once for
every turn of it, so a collective runs prod(turns of the loops around it) times a step, and the scan over a model's
layers is such a loop. Nothing here needs a device or JAX.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_HEADER = re.compile(r"(?:ENTRY )?%?(\S+) \(.*\{$")
# "..., body=%a, calls={%b, %c}": every computation that an instruction runs.
_CALLED = re.compile(r"\b(\w+)=(?:%([\w.-]+)|\{(%[\w.-]+(?:, ?%[\w.-]+)*)\})")
_CALLERS = {
    "body", "condition", "calls", "to_apply", "branch_computations", "called_computations", "true_computation",
    "false_computation",
}  # fmt: skip
_COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?%?\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_WHILE = re.compile(r"^\s+(?:ROOT )?%?\S+ = .* while\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_KNOWN_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
_INTEGER = re.compile(r"= [su](?:32|64)\[\]\S* constant\((\d+)\)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`.
      shapes: of its results on one device.
      bytes: of its results on one device, for one execution.
      depth: how many loops it lies in.
      times: executions in a step; a loop whose turns the text does not tell counts once.
      source: the JAX operation it was made for, or "".
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    depth: int
    times: int
    source: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind: instructions inside and outside of loops, executions and bytes of a step."""

    kind: str
    inside: int
    outside: int
    times: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """Every collective of a program, in the order of the text.

    Args:
      text: `compiled.as_text()`.
    """
    computations = _computations(text)
    calls = {
        name: [called for line in body for called in _calls(line, computations)] for name, body in computations.items()
    }
    found = []
    loops = _loops(computations, calls)
    for name, body in computations.items():
        for line in body:
            match = _COLLECTIVE.match(line)
            if match is None or name not in loops:
                continue
            arrays = _results(match[1], started=match[3] is not None and match[2] != "all-reduce")
            source = _OP_NAME.search(line)
            depth, times = loops[name]
            found.append(
                Collective(
                    kind=match[2],
                    shapes=tuple(shape for _, shape in arrays),
                    bytes=sum(math.ceil(math.prod(shape) * _bits(dtype) / 8) for dtype, shape in arrays),
                    depth=depth,
                    times=times,
                    source=source[1] if source else "",
                )
            )
    return found


def traffic(found: Iterable[Collective]) -> list[Traffic]:
    """The collectives by kind, the kinds that do not occur left out."""
    rows = []
    for kind in KINDS:
        same = [one for one in found if one.kind == kind]
        if same:
            inside = sum(one.depth > 0 for one in same)
            moved = sum(one.times * one.bytes for one in same)
            rows.append(Traffic(kind, inside, len(same) - inside, sum(one.times for one in same), moved))
    return rows


def weight_gathers(
    found: Iterable[Collective], stacked: Iterable[tuple[tuple[int, ...], Sequence[int]]]
) -> tuple[list[Collective], list[Collective]]:
    """The all-gathers that make whole weights of scanned layers: of one unit inside a loop, of a stack anywhere.

    The second list is empty where the program never holds all layers' weights at once, as FSDP must not. Such a gather
    may lie in a loop as well: accumulation over parts of a batch puts the scan over layers into one.

    Args:
      found: from `collectives`.
      stacked: shape `[num_units, ...]` of every stacked parameter, and for each dimension the number of devices that
        it is split over. A gather over some of the mesh axes counts: any split dimension may have become whole.

    Returns:
      (gathers of one unit's weight, gathers of a whole stack).
    """
    units, one, whole = set(), set(), set()
    for shape, devices in stacked:
        units.add(shape[0])
        for size in _partly_gathered(shape, devices):
            whole.add(size)
            one.add(size // shape[0])
    gathers = [gather for gather in found if gather.kind == "all-gather"]

    def makes(gather: Collective, sizes: set[int]) -> bool:
        return any(math.prod(shape) in sizes for shape in gather.shapes)

    def keeps_units(gather: Collective) -> bool:
        return any(units & set(shape) for shape in gather.shapes)

    return (
        [gather for gather in gathers if gather.depth and makes(gather, one)],
        [gather for gather in gathers if makes(gather, whole) and keeps_units(gather)],
    )


def _partly_gathered(shape: tuple[int, ...], devices: Sequence[int]) -> set[int]:
    """Elements per device after at least one split dimension was made whole."""
    split = [count for count in devices if count > 1]
    total = math.prod(shape)
    rests = {1}
    for count in split:
        rests |= {rest * count for rest in rests}
    return {total // rest for rest in rests if rest != math.prod(split)}


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation by its name; the entry's name is ""."""
    computations: dict[str, list[str]] = {}
    body: list[str] | None = None
    for line in text.splitlines():
        if line.startswith("}"):
            body = None
        elif body is not None:
            body.append(line)
        elif not line.startswith((" ", "HloModule")) and (header := _HEADER.match(line)):
            body = computations.setdefault("" if line.startswith("ENTRY ") else header[1], [])
    return computations


def _calls(line: str, computations: dict[str, list[str]]) -> list[tuple[str, int, int]]:
    """(computation, loops entered, turns) for everything that an instruction runs."""
    called = [
        (match[1], name.strip().lstrip("%"))
        for match in _CALLED.finditer(line)
        if match[1] in _CALLERS
        for name in (match[2] or match[3]).split(",")
    ]
    if not _WHILE.match(line):
        return [(name, 0, 1) for _, name in called]
    turns = _turns(line, computations[dict(called)["condition"]])
    return [(name, 1, turns) for _, name in called]


def _turns(line: str, condition: list[str]) -> int:
    """How often a loop runs: as the compiler notes it, or the one bound that the condition compares with."""
    known = _KNOWN_TRIPS.search(line)
    if known:
        return int(known[1])
    bounds = {int(match[1]) for instruction in condition if (match := _INTEGER.search(instruction))}
    return bounds.pop() if len(bounds) == 1 else 1


def _loops(
    computations: dict[str, list[str]], calls: dict[str, list[tuple[str, int, int]]]
) -> dict[str, tuple[int, int]]:
    """(loops around it, executions in a step) of every computation that the entry reaches."""
    reached: dict[str, tuple[int, int]] = {}
    # A computation may have many callers: it counts under the one that runs it most.
    waiting = [("", 0, 1)]
    while waiting:
        name, depth, times = waiting.pop()
        if name not in computations or reached.get(name, (-1, 0)) >= (depth, times):
            continue
        reached[name] = (depth, times)
        waiting += [(called, depth + deeper, times * turns) for called, deeper, turns in calls[name]]
    return reached


def _results(kind: str, *, started: bool) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of the arrays that a collective makes; one that only starts lists its operands before them."""
    arrays = [(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _ARRAY.findall(kind)]
    if not started:
        return arrays
    # Beside them stand the counters by which the devices agree.
    arrays = [array for array in arrays if array != ("u32", ())]
    return arrays[len(arrays) // 2 :]


def _bits(dtype: str) -> int:
    """Of one element: the first number in a dtype's name; a boolean takes a byte."""
    return 8 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
