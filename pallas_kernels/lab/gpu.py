"""An XLA:GPU dump as figures: what ptxas makes of every Pallas kernel, and which tensor-core path it takes.

Registers and spills are ptxas's own. Instructions are counted in the text of the PTX, whatever their loops: `wgmma` is
Hopper's asynchronous matrix product, `mma.sync` the older one, which cannot reach its rate.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from pallas_kernels.lab.program import Call, calls
from pallas_kernels.lab.schedule import DumpError

_LAUNCH = re.compile(r"(\S+) grid: \[[\d, ]+\] threads: \[[\d, ]+\]\s+shared_memory: (\d+) bytes")
_COUNTS = {"wgmma": r"\bwgmma\.mma_async\b", "mma_sync": r"\bmma\.sync\b"}


def environment(folder: Path) -> dict[str, str]:
    """What makes XLA and Mosaic GPU write their PTX to `folder`."""
    mosaic = folder / "mosaic_gpu"
    mosaic.mkdir(exist_ok=True)
    return {
        "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_emitter_re=.*",
        "MOSAIC_GPU_DUMP_TO": str(mosaic),
        "MOSAIC_GPU_DUMP_PTX": "1",
    }


def pallas_calls(program: str) -> tuple[list[Call], list[Call]]:
    """Calls of Triton's and of Mosaic GPU's kernels in the text of a compiled module."""
    return calls(program, "__gpu$xla.gpu.triton"), calls(program, "mosaic_gpu")


def kernels(folder: Path, program: str) -> list[dict[str, Any]]:
    """Figures of every Pallas kernel that a program calls; of equal ones once.

    Raises:
      DumpError: the program calls no kernel, or the dump lacks one or is not what this reader knows.
    """
    triton, mosaic = pallas_calls(program)
    if not triton and not mosaic:
        raise DumpError("the program calls no Pallas kernel")
    return (_triton(folder, triton) if triton else []) + (_mosaic(folder, mosaic) if mosaic else [])


def _triton(folder: Path, triton: list[Call]) -> list[dict[str, Any]]:
    """XLA names a kernel as its `pallas_call`, with __1 and so on where kernels of one name differ."""
    sequences = list(folder.glob("*.thunk_sequence.txt"))
    if len(sequences) != 1:
        raise DumpError(f"{len(sequences)} thunk_sequence files in the dump, expected 1")
    launches = _LAUNCH.findall(sequences[0].read_text())
    entries = {name: path for path in sorted(folder.glob("*.ptx")) for name in _entries(path.read_text())}
    named: dict[str, list[str]] = {}
    for call in triton:
        said = re.search(r'\bname = "([^"]+)"', call.attributes)
        if said is None:
            raise DumpError(f"{call.name} does not say which Triton kernel it calls")
        named.setdefault(said[1], []).extend(call.notes())
    found = []
    for name, notes in named.items():
        sizes = {entry: int(size) for entry, size in launches if re.fullmatch(rf"{re.escape(name)}(__\d+)?", entry)}
        if not sizes:
            raise DumpError(f"kernel {name} is not among the launches of the program")
        for at, (entry, size) in enumerate(sizes.items()):
            if entry not in entries:
                raise DumpError(f"kernel {entry}: no PTX among the {len(entries)} of the dump")
            found.append({"name": entry, **_ptx(entries[entry], entry, size), "notes": [] if at else notes[:1]})
    return found


def _mosaic(folder: Path, mosaic: list[Call]) -> list[dict[str, Any]]:
    paths = sorted((folder / "mosaic_gpu").rglob("*.ptx"))
    if not paths:
        raise DumpError("kernels of Mosaic GPU are called, but it wrote no PTX")
    notes = [note for call in mosaic for note in call.notes()]
    found = []
    for path in paths:
        launch = path.with_suffix(".after_layout_inference.txt")
        shared = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", launch.read_text() if launch.exists() else "")
        if shared is None:
            raise DumpError(f"kernel {path.stem}: its launch is not in the dump")
        found += [
            {"name": path.stem, **_ptx(path, entry, int(shared[1])), "notes": notes[:1]}
            for entry in _entries(path.read_text())
        ]
    return found


def _entries(text: str) -> list[str]:
    return re.findall(r"\.entry\s+([\w$]+)", text)


def _ptx(path: Path, entry: str, dynamic: int) -> dict[str, Any]:
    command = [_ptxas(), "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
    ran = subprocess.run(command, capture_output=True, text=True)
    log = ran.stdout + ran.stderr
    if ran.returncode:
        raise DumpError(f"ptxas refuses {path.name}: {log.strip()[:200]}")
    return figures(path.read_text(errors="replace"), log, entry, dynamic)


def _ptxas() -> str:
    installed = sorted(Path(sysconfig.get_paths()["purelib"], "nvidia").glob("*/bin/ptxas"))
    found = str(installed[0]) if installed else shutil.which("ptxas")
    if found is None:
        raise DumpError("no ptxas: pip install nvidia-cuda-nvcc")
    return found


def figures(ptx: str, log: str, entry: str, dynamic: int) -> dict[str, Any]:
    """Of one kernel, from its PTX and what `ptxas -v` said of it.

    Args:
      dynamic: bytes of shared memory that a launch asks for.
    """
    said = re.search(rf"Compiling entry function '{re.escape(entry)}'(.*?)(?=Compiling entry function|\Z)", log, re.S)
    said_of = said[1] if said else ""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said_of)
    registers = re.search(r"Used (\d+) registers", said_of)
    static = re.search(r"(\d+) bytes smem", said_of)
    body = re.search(rf"\.entry\s+{re.escape(entry)}\b(.*?)(?=\.entry\s|\Z)", ptx, re.S)
    if not (spills and registers and body):
        raise DumpError(f"kernel {entry}: ptxas says it in an unknown form: {log.strip()[:200]!r}")
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", body[1])
    code = re.sub(r"//.*", "", body[1])
    found: dict[str, Any] = {
        "registers": int(registers[1]),
        "spill_store_bytes": int(spills[1]),
        "spill_load_bytes": int(spills[2]),
        "shared_bytes": dynamic + (int(static[1]) if static else 0),
        "threads": int(threads[1]) if threads else None,
    }
    return found | {name: len(re.findall(pattern, code)) for name, pattern in _COUNTS.items()}
