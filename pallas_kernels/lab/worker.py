"""The process that compilers run in: it compiles the cases it is asked for, reads their dumps, answers with JSON.

libtpu and XLA read their dump flags once, when they load, so with a dump a process compiles one program. A crash of the
compiler is the failure of one case.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from pallas_kernels.lab import chips, gpu, tpu, traffic
from pallas_kernels.lab.cases import Case, load
from pallas_kernels.lab.schedule import DumpError


def environment(target: str, dump: Path | None) -> dict[str, str]:
    """What the process of a case has in its environment; with `dump`, where the compiler writes what it did."""
    found = dict(os.environ, JAX_ENABLE_COMPILATION_CACHE="false", TF_CPP_MIN_LOG_LEVEL="3")
    found.pop("JAX_COMPILATION_CACHE_DIR", None)
    if dump is not None:
        added = tpu.environment(dump) if chips.CHIPS[target].is_tpu else gpu.environment(dump)
        for name, value in added.items():
            found[name] = f"{os.environ.get(name, '')} {value}".strip()
    return found


def measure(case: Case, target: str, dump: Path | None) -> dict[str, Any]:
    """Compile `case` for `target`; with `dump`, read the schedule that the compiler left there too.

    Raises:
      DumpError: the dump is missing or unknown.
      Exception: whatever the trace or the compiler raises.
    """
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

    chip = chips.CHIPS[target]
    device = chips.devices(chip.topology)[0]
    platform = "tpu" if chip.is_tpu else "cuda"
    # Without a sharding over the topology's devices jit compiles for the CPU, and says nothing.
    sharding = NamedSharding(Mesh([device], ("one",)), PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.arguments)
    cores = chip.cores if platform == "cuda" else getattr(device, "num_cores", 1)
    abstract = AbstractDevice(chip.kind, cores, platform)
    mesh = AbstractMesh((1,), ("one",), axis_types=(AxisType.Auto,), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(case.function).trace(*arguments)
        begin = time.perf_counter()
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
        seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    found: dict[str, Any] = {
        "compile_seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    if dump is None:
        return found
    program = compiled.as_text()
    if chip.is_tpu:
        kernels = tpu.kernels(dump, program, traced.jaxpr.jaxpr, chip)
        moved = sum(kernel["moved_bytes"] * kernel["calls"] for kernel in kernels)
        sources = {kernel["moved_from"] for kernel in kernels}
        times = [(kernel["seconds"], kernel["calls"]) for kernel in kernels]
        unknown = any(seconds is None for seconds, _ in times)
        found["seconds"] = None if unknown else sum(seconds * count for seconds, count in times)
    else:
        kernels = gpu.kernels(dump, program)
        moved = sum(call.bytes for called in gpu.pallas_calls(program) for call in called)
        sources = {traffic.OPERANDS}
    found |= {"moved_bytes": moved, "moved_from": " and ".join(sorted(sources)), "kernels": kernels}
    if case.minimum_bytes:
        found["moved_over_minimum"] = moved / case.minimum_bytes
        found["minimum_seconds"] = case.minimum_bytes / chip.hbm_bytes_per_second
        if found.get("seconds"):
            found["times_minimum"] = found["seconds"] / found["minimum_seconds"]
    return found


def main(source: str, target: str, dump: str) -> None:
    """Answer every case that is named on a line of the standard input with a line of JSON. `dump` may be empty."""
    # Compilers print what they like; their lines go where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    chips.prepare_environment()
    cases = load(source, target)
    for line in sys.stdin:
        try:
            found = measure(cases[line.rstrip("\n")], target, Path(dump) if dump else None)
        except DumpError as error:
            found = {"error": f"dump: {error}"}
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error).strip()}"}
        print(json.dumps(found), file=answers, flush=True)
    os._exit(0)  # libtpu's handlers at exit can hang


if __name__ == "__main__":
    main(*sys.argv[1:])
