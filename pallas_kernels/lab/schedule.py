"""The schedule of one TPU kernel, from two files of libtpu's dump, as a tree of regions.

A TPU core issues one bundle of instructions a cycle unless it stalls, so bundles are cycles. With u(r) the bundles (and
slots of every unit) that stand in region r itself, and t(c) the turns of its children, one run of r costs

    cost(r) = u(r) + sum over children c:  t(c) · cost(c)

where t is a loop's trip count and 1 or 0 for what a forward branch may skip. Both files are of the schedule before the
last pass, which takes empty bundles out and leaves the waiting to the hardware: after it, bundles are code size.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

UNITS = ("MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")
_BUNDLE = re.compile(r"\s*(?:0x)?([0-9a-f]+)\s+(?:[A-Z]{2})?\s*:[\s>]*(\{.*)")
_BRANCH = re.compile(r"\bsbr\.rel\s+(?:\(!?(%p\w+)\)\s+)?target bundleno = (\d+)")


class DumpError(Exception):
    """A dump that is missing or is not what this reader knows; the case that met it fails."""


@dataclasses.dataclass
class Region:
    """Bundles first..last: a loop, or what a forward branch may skip."""

    first: int
    last: int
    loop: bool
    trips: int = 1
    of_grid: bool = False
    counted: bool = True  # trips are known
    children: list[Region] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """`used[i]` is 1 and the slots of every unit in bundle i; `notes` say which loops and branches are not counted."""

    capacity: dict[str, int]
    used: np.ndarray
    root: Region
    notes: tuple[str, ...]

    def own(self, region: Region) -> np.ndarray:
        return self.used[region.first : region.last + 1].sum(axis=0)

    def cost(self, region: Region, runs: Callable[[Region], bool] = lambda child: True) -> np.ndarray:
        """Bundles and slots of one run of `region`, children that do not satisfy `runs` left out."""
        total = self.own(region)
        for child in region.children:
            total = total - self.own(child)
            if runs(child):
                total = total + child.trips * self.cost(child, runs)
        return total


def read(bundles: str, utilization: str, branch_delay: int) -> Schedule:
    """Join the two files of a kernel.

    Args:
      bundles: text of `*-packed-bundles-post-ra.txt`.
      utilization: text of `*-pre-delay_hlo-static-per-bundle-utilization.txt`.
      branch_delay: bundles that still run after a taken branch.

    Raises:
      DumpError: either file has another layout, or they disagree.
    """
    capacity, slots = _utilization(utilization)
    texts = _bundles(bundles)
    if len(texts) != len(slots):
        raise DumpError(f"{len(texts)} bundles but {len(slots)} rows of utilization")
    root, notes = _control_flow(texts, branch_delay)
    used = np.concatenate([np.ones((len(slots), 1), np.int64), slots], axis=1)
    return Schedule(capacity, used, root, tuple(notes))


def _utilization(text: str) -> tuple[dict[str, int], np.ndarray]:
    lines = text.splitlines()
    if len(lines) < 5 or "CAPA" not in lines[0] or "UTILIZATION" not in lines[3]:
        raise DumpError("the utilization file has an unknown head")
    names = [name.strip() for name in lines[1].split(",")]
    if missing := [unit for unit in UNITS if unit not in names]:
        raise DumpError(f"the utilization file has no column {', '.join(missing)}")
    rows = [line.split() for line in lines[4:] if line.strip()]
    if any(len(row) != len(names) for row in rows):
        raise DumpError(f"a row of the utilization file has not {len(names)} numbers")
    columns = [names.index(unit) for unit in UNITS]
    capacity = [int(lines[2].split()[column]) for column in columns]
    return dict(zip(UNITS, capacity, strict=True)), np.array(rows, np.int64)[:, columns]


def _bundles(text: str) -> list[str]:
    """The bundles in order; the text of one may go over several lines."""
    found: list[list[str]] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match and int(match[1], 16) == len(found):
            found.append([match[2]])
        elif found:
            found[-1].append(line)
    if not found:
        raise DumpError("the bundles file has no bundles")
    return [" ".join(lines) for lines in found]


def _control_flow(bundles: list[str], delay: int) -> tuple[Region, list[str]]:
    """A backward branch closes a loop; a forward one may skip the bundles from its last delay slot to its target."""
    definitions = _definitions(bundles)
    regions, notes = [], []
    # A pipeline needs a turn more than it has steps to fill, if blocks are copied in, and one to drain, if out.
    copied = sum(any(f"{way} window allocation" in text for text in bundles) for way in ("input", "output"))
    for here, text in enumerate(bundles):
        branches = _BRANCH.findall(text)
        if len(branches) != len(re.findall(r"\bsbr\.", text)):
            raise DumpError(f"bundle {here:#x} has a branch of an unknown form")
        for predicate, target in branches:
            first, after = int(target), min(here + delay, len(bundles) - 1)
            if first > len(bundles):
                raise DumpError(f"bundle {here:#x} branches to {first:#x}, after the last")
            if first <= here:
                of_grid = "iteration index, stage" in bundles[first]
                trips = _trips(definitions, predicate)
                if trips is None:
                    notes.append(
                        f"the trips of the loop at bundle {first:#x} are only known on the device: counted once"
                    )
                elif of_grid:
                    trips = max(1, trips - copied)
                regions.append(Region(first, after, True, trips or 1, of_grid, trips is not None))
            elif first - 1 > after:
                regions.append(Region(after + 1, first - 1, False))
    root = Region(0, len(bundles) - 1, False)
    open_regions = [root]
    for region in sorted(regions, key=lambda region: (region.first, -region.last)):
        while region.first > open_regions[-1].last:
            open_regions.pop()
        parent = open_regions[-1]
        if region.last > parent.last + delay + 1 and not parent.loop:
            notes.append(f"a branch skips from bundle {region.first:#x} past the end of another: never taken here")
            continue
        region.last = min(region.last, parent.last)  # delay slots may reach past the end of the parent
        parent.children.append(region)
        open_regions.append(region)
    return root, notes


def _definitions(bundles: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Every scalar and predicate value by its number: what computes it from what, guards left out.

    A value that was spilled comes back as `sld` of its slot; it is then the value stored there, where only one was.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    spilled: dict[str, set[str]] = {}
    for bundle in bundles:
        for part in re.sub(r"/\*.*?\*/", "", bundle).strip(" {}").split(";;"):
            if match := re.match(r"\s*(%[sp]\d+)_\w+\s*=\s*([\w.]+)\s+(.*)", part):
                operands = re.sub(r"\([^)]*\),?", "", match[3]).split(",")
                found.setdefault(match[1], (match[2], [_number(operand.strip()) for operand in operands]))
            elif match := re.match(r"\s*%\d+ = sst (\[smem:\[#\w+\]\]) (%s\w+)", part):
                spilled.setdefault(match[1], set()).add(_number(match[2]))
    for value, (operation, operands) in found.items():
        stored = spilled.get(operands[0], set()) if operation == "sld" else set()
        if len(stored) == 1:
            found[value] = found.get(next(iter(stored)), ("", []))
    return found


def _number(operand: str) -> str:
    return operand.partition("_")[0] if operand.startswith("%") else operand


def _constant(operand: str) -> int | None:
    if not re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", operand):
        return None
    value = int(operand, 0)
    return value - (1 << 32) if value >= 1 << 31 else value


def _trips(definitions: dict[str, tuple[str, list[str]]], predicate: str) -> int | None:
    """Turns of the loop that is left once `predicate` holds, if its start, step and bound are constants."""

    def constant(operand: str) -> int | None:
        operation, operands = definitions.get(operand, ("", [operand]))
        return _constant(operands[0]) if operands and operation in ("", "smov.u32") else None

    test, compared = definitions.get(_number(predicate), ("", []))
    if not test.startswith("scmp.") or len(compared) != 2:
        return None
    counter, bound = compared
    addition, addends = definitions.get(counter, ("", []))
    if addition != "sadd.s32":
        return None
    steps = [value for value in map(_constant, addends) if value is not None]
    phis = [definitions[addend] for addend in addends if definitions.get(addend, ("",))[0] == "sphi"]
    start = constant(phis[0][1][0]) if phis else None
    end, relation = constant(bound), test.split(".")[1]
    if len(steps) != 1 or not steps[0] or start is None or end is None:
        return None
    distance = (end - start) / steps[0]
    if relation not in ("ge", "gt", "le", "lt", "eq") or distance < 0:
        return None
    return max(1, math.ceil(distance) if relation in ("ge", "le", "eq") else math.floor(distance) + 1)
