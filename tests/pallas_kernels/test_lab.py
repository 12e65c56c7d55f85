"""The meter for kernels around its compilers: chips, cases, commands, failures and tables."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pallas_kernels.lab import anchors, cases, chips, runner, schedule, table, tpu, traffic
from pallas_kernels.lab.__main__ import main

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("chip", [chip for chip in chips.CHIPS.values() if chip.is_tpu], ids=lambda chip: chip.name)
def test_the_clock_of_a_chip_gives_its_published_rate(chip):
    rate = 2 * chip.mxu_width**2 * chip.mxu_rows * chip.mxus * chip.cores * chip.clock_hz
    assert rate == pytest.approx(chip.peak_flops, rel=3e-3)


def test_chips_are_distinct_and_have_a_source():
    found = list(chips.CHIPS.values())
    assert len({chip.kind for chip in found}) == len(found)
    assert all(chip.source and chip.topology.startswith(chip.name) for chip in found)
    # Bytes and bandwidth as jax has them, which rounds.
    bandwidths = {chip.name: chip.hbm_bytes_per_second for chip in found}
    assert bandwidths["v5e"] == pytest.approx(8.2e11, rel=2e-2)
    assert bandwidths["tpu7x"] == pytest.approx(7.4e12 / 2, rel=2e-2)
    assert all(5e11 < bandwidth < 8e12 for bandwidth in bandwidths.values())


MODULE = """\
import jax, jax.numpy as jnp
from pallas_kernels.lab import Case
from beside import SHAPE

def cases(target):
    return {"sine": Case(jnp.sin, (jax.ShapeDtypeStruct(SHAPE, jnp.float32),), 8 * 15, "on " + target)}

def listed(target):
    return [1]

def bare(target):
    return {"sine": (jnp.sin, ())}

def nothing(target):
    return {}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text("SHAPE = (3, 5)\n")
    (tmp_path / "mine.py").write_text(MODULE)
    return str(tmp_path / "mine.py")


def test_cases_of_a_file(module):
    found = cases.load(module, "v6e")
    assert cases.load(f"{module}:cases", "v6e").keys() == found.keys() == {"sine"}
    case = found["sine"]
    assert (case.arguments[0].shape, case.minimum_bytes, case.note) == ((3, 5), 120, "on v6e")
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.note = "other"
    assert cases.load(f"{module}:nothing", "v5e") == {}


def test_cases_of_a_module():
    found = cases.load("pallas_kernels.lab.anchors", "v5e")
    assert set(found) == {f"{way} {blocks}" for way in ("forward", "gradient") for blocks in ("512", "512x2048/512")}
    assert found["forward 512"].minimum_bytes == 4 * 2 * 8 * 4096 * 128
    assert set(anchors.cases("h100")) == {"forward triton", "gradient triton"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}:listed", r"listed\('v5e'\) gave \[1\], expected \{name: Case\}"),
        ("{}:bare", "case 'sine' is .*, expected Case"),
        ("{}:absent", r"has no function absent\(target\)"),
        ("absent/mine.py", "absent/mine.py: no such file"),
        ("no_such_package.cases", "no such module, and no path that ends in .py"),
    ],
)
def test_a_source_of_cases_that_is_none(source, message, module):
    with pytest.raises(cases.UsageError, match=message):
        cases.load(source.format(module), "v5e")


def test_families_are_the_folders_with_cases(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "__file__", str(tmp_path / "lab" / "cases.py"))
    for name in ("linear", "lab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cases.py").touch()
    (tmp_path / "decode").mkdir()
    assert main(["report", "--family"]) == 0
    assert capsys.readouterr().out == "linear\n"
    assert cases.family_source("linear") == "pallas_kernels.linear.cases:cases"
    with pytest.raises(cases.UsageError, match="--family decode: has no cases; there are linear"):
        cases.family_source("decode")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "v9"], "--targets v9: expected some of v4,v5e"),
        (["--targets", ","], "--targets ,: expected some of"),
        (["--targets", "v5e", "--only", "cos*"], r"no case for v5e matches --only cos\*; there are \['sine'\]"),
        (["--targets", "v5e", "--module", "absent.py"], "absent.py: no such file"),
    ],
)
def test_a_command_that_cannot_be_carried_out_is_one_line(arguments, message, module, capsys, monkeypatch):
    monkeypatch.setattr(chips, "missing_compiler", lambda topology: None)
    assert main(["compile", "--module", module, *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


@pytest.mark.parametrize(("target", "package"), [("v5e", "pip install libtpu"), ("h100", "jax-cuda13-plugin==")])
def test_a_missing_compiler_is_named(target, package, module, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["compile", "--module", module, "--targets", target]) == 2
    assert package in capsys.readouterr().err


CRASHES = """\
import os, sys
import jax.numpy as jnp
from pallas_kernels.lab import Case
if sys.argv[0].endswith("worker.py"):
    print("F0102 12:00:00 compiler.cc:1] Check failed: tile\\nlast words", flush=True)
    os._exit(3)

def cases(target):
    return {"dies": Case(jnp.sin, ())}
"""


def test_a_compiler_that_dies_is_the_failure_of_a_case(tmp_path, monkeypatch):
    (tmp_path / "crash.py").write_text(CRASHES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = str(tmp_path / "crash.py")
    (row,) = runner.run(source, {"v5e": cases.load(source, "v5e")}, report=False)
    assert row["error"].startswith("the compiler's process ended with code 3: F0102 ")
    assert (row["target"], row["case"]) == ("v5e", "dies")
    monkeypatch.setattr(runner, "_SECONDS", 0.01)
    (row,) = runner.run(source, {"v5e": cases.load(source, "v5e")}, report=False)
    assert row["error"] == "took longer than 0.01 s"


def measured(target, name, **figures):
    kernel = {"name": name + ".1", "calls": 1, "moved_bytes": 3 << 20, "moved_from": traffic.BLOCKS}
    row = {"target": target, "case": name, "note": "", "minimum_bytes": 1 << 20, "compile_seconds": 1.25,
           "temporary_bytes": 5 << 10, "moved_bytes": 3 << 20, "moved_from": traffic.BLOCKS, "moved_over_minimum": 3.0,
           "minimum_seconds": 1e-6, "seconds": 2.5e-6, "times_minimum": 2.5}  # fmt: skip
    texts = [(FIXTURES / f"loops.{kind}.txt").read_text() for kind in ("bundles", "utilization")]
    read = schedule.read(texts[0], texts[1], chips.CHIPS["v5e"].branch_delay)
    return row | {"kernels": [kernel | tpu.figures(read, chips.CHIPS["v5e"]) | figures]}


def shown(rows, report):
    text = io.StringIO()
    table.show(rows, Console(file=text, width=160), report=report)
    return text.getvalue()


def test_the_table_of_a_report():
    failed = {"target": "v5e", "case": "wide", "note": "a remark", "minimum_bytes": None, "error": "dump: no files"}
    text = shown([measured("v5e", "turn"), measured("v5e", "more", complete=False, calls=2), failed], True)
    lines = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if line.strip()}
    # In two of the ten bundles one of four slots is in use.
    assert lines["turn"].startswith("turn turn.1 10 5% ▁▁▁▃▃▁▁▁▁▁ 100 4% ")
    assert lines["turn"].endswith(" 3 0.2 2.5 3.0 MiB 3.00x 5.0 KiB")
    assert "more.1 x2" in lines["more"]
    assert ">0.2" in lines["more"]
    assert "wide on v5e: dump: no files" in text
    assert "wide on v5e: a remark" in text
    assert "step x steps / clock" in text


def test_a_program_of_two_kernels_has_a_sum():
    row = measured("v5e", "turn")
    row["kernels"] *= 2
    lines = [" ".join(line.split()) for line in shown([row], True).splitlines()]
    assert "turn together 2.5 2.5 3.0 MiB 3.00x 5.0 KiB" in lines


def test_the_table_of_a_gpu():
    kernel = {"name": "turn", "notes": ["a call of it is in a loop"], "registers": 255, "spill_store_bytes": 104}
    kernel |= {"spill_load_bytes": 92, "shared_bytes": 32784, "threads": 256, "wgmma": 2, "mma_sync": 0}
    row = measured("h100", "turn") | {"kernels": [kernel], "moved_from": traffic.OPERANDS}
    text = shown([row], True)
    assert "turn turn 255 104 32784 256 2 0 ~3.0 MiB 3.00x 1 5.0 KiB" in [
        " ".join(x.split()) for x in text.splitlines()
    ]
    assert "turn on h100: turn: a call of it is in a loop" in text


def test_the_verdicts_of_compile():
    failed = {"target": "v6e", "case": "turn", "note": "", "minimum_bytes": None, "error": "ValueError: bad\ntrace"}
    text = shown([measured("v5e", "turn"), failed], False)
    assert "turn 1.2 s no" in [" ".join(line.split()) for line in text.splitlines()]
    assert "turn on v6e: ValueError: bad" in text
    assert "trace" not in text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "JaxRuntimeError: RESOURCE_EXHAUSTED: Allocation (size=268435456) would exceed memory (size=134217728), "
            "space=vmem",
            "VMEM overflow: JaxRuntimeError: RESOURCE_EXHAUSTED: Allocation",
        ),
        ("Lowering failed:\n\n  at a line\nNot implemented: unsupported shape cast\n", "Not implemented: unsupported"),
        ("ValueError: no tile\nmore", "ValueError: no tile"),
        ("", "no reason given"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(error, said):
    assert table.reason(error).startswith(said)
    assert "\n" not in table.reason(error)


def test_json_holds_every_row(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chips, "missing_compiler", lambda topology: None)
    rows = [measured("v6e", "sine"), measured("v5e", "sine")]
    monkeypatch.setattr(runner, "run", lambda source, chosen, report: iter(rows))
    path = tmp_path / "figures.json"
    assert main(["report", "--module", module, "--targets", "v5e,v6e", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["source"] == module
    assert [row["target"] for row in found["rows"]] == ["v5e", "v6e"]
    assert found["rows"][0]["kernels"][0]["step_bundles"] == 100
    progress = capsys.readouterr().err
    assert "[2/2] sine on v5e: compiled in 1.2 s" in progress
    rows.append({"target": "v6e", "case": "sine", "note": "", "minimum_bytes": None, "error": "none"})
    assert main(["report", "--module", module, "--targets", "v5e,v6e"]) == 1
