"""How the benchmarks measure."""

from __future__ import annotations

import contextlib
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np

import jattn
from benchmarks import __main__ as command
from benchmarks import fla_peer, kernels, linear, linear_gpu, measure

# Pages that the system clears while 64 MiB are taken a second time, filled, and given back.
FAULTS = """\
import ctypes, resource
from benchmarks.measure import keep_memory
libc, size = ctypes.CDLL(None), 64 << 20
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
libc.free.argtypes = (ctypes.c_void_p,)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = libc.malloc(size)
    libc.memset(memory, 1, size)
    libc.free(memory)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
keep_memory()
faults()
print(faults() if hasattr(libc, "mallopt") else 0)
"""


def test_memory_that_is_kept_is_not_cleared_again():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=root, capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 8


def test_the_benchmark_for_gpus_measures_what_it_says(monkeypatch):
    """Here with the XLA paths in the place of kernels, against each other and without a peer."""
    monkeypatch.setattr(fla_peer, "missing", lambda: "no peer")
    found = linear_gpu.run(((1, 48), (2, 32)), heads=2, width=16, kernels="reference", softmax="xla", repeat=1)
    assert [(row[""], row["way"]) for row in found.rows] == [
        (f"{form}, {size}", way)
        for size in ("1 x 48", "2 x 32")
        for form in linear_gpu.FORMS
        for way in linear_gpu.WAYS
    ]
    assert all(row["million tokens/s"] > 0 and row["x fla"] == "-" for row in found.rows)
    # The recurrence token by token, and the chunks of the XLA path.
    errors = [error for _, error, _, _ in found.targets]
    assert len(errors) == 8
    assert 0 < max(errors) < 1e-2
    assert found.met()


def test_every_case_of_kernels_runs_on_one():
    for dtype in kernels.LIMITS:
        for name, case in kernels.cases(kernels.LENGTH, kernels.GRID, 4, 64, dtype).items():
            (decision,) = jattn.explain(case.op, **case.arrays, **case.options)
            assert (decision.chosen["tpu"], decision.chosen["cuda"]) == ("pallas_tpu", "pallas_gpu"), (name, decision)


def test_kernels_are_compared_with_references(monkeypatch):
    """Here the XLA paths are; one that is wrong is seen."""
    small = {"length": 40, "grid": (8, 9), "heads": 2, "width": 8, "kernels": "xla"}
    found = kernels.run(**small, only="linear attention, decay of tokens*")
    assert [row["dtype"] for row in found.rows] == ["bfloat16"] * 2 + ["float32"] * 2
    assert found.met()
    monkeypatch.setattr(kernels, "LIMITS", {"float32": (1e-9, 1e-9)})
    assert not kernels.run(**small, only="linear attention, divided").met()


def test_a_benchmark_that_cannot_be_measured_here_says_why(capsys):
    assert command.main(["linear_gpu"]) == 2
    assert capsys.readouterr().err == "error: linear_gpu: a GPU is needed, jax sees cpu\n"


def test_benchmarks_that_cannot_be_measured_here_are_left_out_of_all(monkeypatch, capsys):
    found = [pkgutil.ModuleInfo(None, name, False) for name in ("kernels", "linear_gpu")]
    monkeypatch.setattr(command.pkgutil, "iter_modules", lambda _: found)
    assert command.main(["all"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line] == [
        "kernels: left out",
        "linear_gpu: left out",
    ]


def test_without_a_name_benchmarks_are_listed_and_none_is_run(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib, "import_module", None)
    assert (command.main([]), command.main(["--write"])) == (2, 2)
    bare = capsys.readouterr().out
    assert command.main(["--help"]) == command.main(["linear", "-h"]) == 0
    assert capsys.readouterr().out == bare
    assert f"  linear           {linear.__doc__.partition('\n')[0]}\n" in bare


def test_numbers_have_one_form_in_a_column():
    values = (4194, 4194.3, 16_780.4, 0.12343, 83.21, -2500.0, "-")
    assert [measure._text(value) for value in values] == [
        "4,194", "4,194", "16,780", "0.1234", "83.21", "-2,500", "-",
    ]  # fmt: skip


class Tensor(np.ndarray):
    """As much of PyTorch's as the peer uses."""

    clone = requires_grad_ = cpu = lambda self: self
    float = numpy = lambda self: self.astype(np.float32)


def test_the_peer_gets_the_operands_by_its_own_names(monkeypatch):
    seen = []

    def function(form):
        def run(q, k, v, g, scale, **beta):
            seen.append((form, g.ndim, [*beta], scale))
            return 2 * q, None

        return run

    names = "chunk_simple_gla", "chunk_gla", "chunk_gated_delta_rule", "chunk_kda"
    ops = types.SimpleNamespace(**{name: function(name) for name in names})
    torch = types.SimpleNamespace(
        from_dlpack=lambda x: np.asarray(x).view(Tensor),
        no_grad=contextlib.nullcontext,
        autograd=types.SimpleNamespace(grad=lambda out, operands, cotangent: (len(operands), out + cotangent)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "fla", types.SimpleNamespace(ops=ops))
    x = linear_gpu._operands(1, 5, 2, 3)
    cotangent = x.pop("cotangent")
    for form, (_, more) in linear_gpu.FORMS.items():
        peer = fla_peer.Peer(form, {name: x[name] for name in ("query", "key", "value", *more)}, cotangent, 0.5)
        count, out = peer.both()
        assert count == 3 + len(more)
        np.testing.assert_array_equal(out, 2 * x["query"] + cotangent)
        np.testing.assert_array_equal(peer.outputs(), 2 * np.asarray(x["query"], np.float32))
    assert seen[::2] == seen[1::2]
    assert seen[::2] == [
        (name, d, beta, 0.5) for name, d, beta in zip(names, (3, 4, 3, 4), ([], [], *[["beta"]] * 2), strict=True)
    ]
