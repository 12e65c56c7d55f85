"""Runs on many hosts, from one command: `python -m train launch TARGET RECIPE [options] [-- overrides]`.

    slurm    slurm.sbatch       a batch job, queued again when its time is over or it is preempted
    gke      gke_jobset.yaml    a JobSet on a slice of TPUs; its comments say what GPUs need
    tpu_vm   tpu_vm.sh          Cloud TPU VMs, without Kubernetes

Recipe and overrides are checked here, before anything waits in a queue. The script is then handed to `sbatch`,
`kubectl` or `bash`, or printed with --dry-run. All hosts share the run's folder: NFS, Lustre or Filestore.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import string
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from train.errors import UserError

USAGE = """\
usage: python -m train launch TARGET RECIPE [options] [-- overrides]
targets: {targets}
options: python -m train launch TARGET --help; overrides: python -m train run RECIPE --help"""


class Template(string.Template):
    """`%%{name}` stands for a value; `$` is the shell's."""

    delimiter = "%%"


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A Slurm job. Partition, account and the like: SBATCH_PARTITION, SBATCH_ACCOUNT ... in the environment."""

    workdir: str
    """The run's folder, on a file system that all nodes share."""
    nodes: int
    """How many."""
    gpus_per_node: int = 8
    """Also the processes of a node: one for each GPU."""
    cpus_per_task: int = 8
    """Cores of each process."""
    time: str = "24:00:00"
    """Limit of the job; the run saves two minutes before, and the job queues again."""
    dry_run: bool = False
    """Print the script instead of submitting it."""


@dataclasses.dataclass(frozen=True)
class Gke:
    """A JobSet on Google Kubernetes Engine, on one slice of TPUs."""

    workdir: str
    """The run's folder, in the pods; /runs is where the claim is mounted."""
    image: str
    """A container with a checkout in its working directory and `python` that has jattn[train,tpu]."""
    claim: str
    """The PersistentVolumeClaim (ReadWriteMany) that all pods share, such as one of Filestore."""
    accelerator: Literal["v4", "v5e", "v5p", "v6e", "tpu7x"]
    """Generation of the TPUs."""
    topology: str
    """Chips along each axis, as the node pool has it: 4x4x4 for v4, v5p and tpu7x, 16x16 for v5e and v6e."""
    chips_per_host: int = 4
    """8 for the machine types that end in -8t."""
    name: str | None = None
    """Of the JobSet; the recipe's by default."""
    dry_run: bool = False
    """Print the JobSet instead of applying it."""


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """Cloud TPU VMs, made if they are not there; a second start of the same command goes on."""

    workdir: str
    """The run's folder on the hosts, below /mnt/share."""
    share: str
    """HOST:/PATH of NFS (Filestore) that all hosts mount at /mnt/share."""
    zone: str
    """As in us-east5-a."""
    accelerator_type: str
    """As in v5p-32, v6e-64, v5litepod-16 or v4-32."""
    name: str | None = None
    """Of the TPU; the recipe's by default."""
    spot: bool = False
    """Cheaper, and may be taken away; start the same command then."""
    dry_run: bool = False
    """Print the script instead of running it; in it, DRY_RUN=1 prints the commands."""


_ACCELERATORS = {
    "v4": ("tpu-v4-podslice", 3),
    "v5e": ("tpu-v5-lite-podslice", 2),
    "v5p": ("tpu-v5p-slice", 3),
    "v6e": ("tpu-v6e-slice", 2),
    "tpu7x": ("tpu7x", 3),
}
"""GKE's name of the accelerator, and how many axes its topologies have."""

_RUNTIMES = {
    "v6e": "v2-alpha-tpuv6e",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v4": "tpu-ubuntu2204-base",
}
"""Software of a TPU VM, by the first part of its accelerator type."""


def main(arguments: list[str]) -> None:
    """`python -m train launch TARGET RECIPE [options] [-- overrides]`."""
    from train.config import load_recipe, parse_arguments, parse_overrides

    targets: dict[str, Any] = {"slurm": Slurm, "gke": Gke, "tpu_vm": TpuVm}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(targets=", ".join(targets)))
        return
    target, *words = arguments
    if target not in targets:
        raise UserError(f"launch: no target is called {target!r}; there are {', '.join(targets)}")
    cut = words.index("--") if "--" in words else len(words)
    words, overrides = words[:cut], words[cut + 1 :]
    if {"-h", "--help"} & {*words}:
        words = ["RECIPE", "--help"]
    elif not words or words[0].startswith("-"):
        raise UserError(f"launch: expected a recipe after {target}, as in python -m train launch {target} lm_1b")
    options = parse_arguments(targets[target], words[1:], f"launch {target} RECIPE")
    config = parse_overrides(load_recipe(words[0]), overrides)
    if config.schedule.steps is None:
        raise UserError(
            "schedule.seconds: each host has its own clock, so a run on many counts steps; give -- --schedule.steps N"
        )
    text = render(options, words[0], overrides)
    if options.dry_run:
        print(text, end="")
    elif target == "slurm":
        _start(["sbatch"], text)
    elif target == "gke":
        _start(["kubectl", "apply", "-f", "-"], text)
    else:
        _start(["bash", "-c", text], None)


def render(options: Slurm | Gke | TpuVm, recipe: str, overrides: list[str]) -> str:
    """The script that trains `recipe` with `overrides`.

    Raises:
      UserError: options that do not fit one another.
    """
    if not options.workdir.startswith("/"):
        raise UserError(f"workdir: expected an absolute path, which is the same on all hosts, got {options.workdir!r}")
    if any("\n" in word for word in [options.workdir, *overrides]):
        raise UserError("overrides: expected no line break in them")
    words = [recipe, "--workdir", options.workdir, "--distributed", "auto", *overrides]
    shared = {"workdir": shlex.quote(options.workdir), "arguments": shlex.join(words)}
    name = getattr(options, "name", None) or recipe.replace("_", "-")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise UserError(f"name: expected at most 40 small letters, digits and dashes, a letter first, got {name!r}")
    if isinstance(options, Slurm):
        for option in ("nodes", "gpus_per_node", "cpus_per_task"):
            if getattr(options, option) < 1:
                raise UserError(f"{option}: expected at least 1, got {getattr(options, option)}")
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", options.time):
            raise UserError(f"time: expected hours:minutes:seconds or days-hours, got {options.time!r}")
        own = {field: getattr(options, field) for field in ("nodes", "gpus_per_node", "cpus_per_task", "time")}
        return _fill("slurm.sbatch", shared | own | {"name": name})
    if isinstance(options, Gke):
        return _fill("gke_jobset.yaml", shared | _slice(options) | {"name": name})
    runtime = _RUNTIMES.get(options.accelerator_type.partition("-")[0])
    if runtime is None:
        raise UserError(
            f"accelerator_type: expected one of {', '.join(f'{kind}-N' for kind in _RUNTIMES)}, "
            f"got {options.accelerator_type!r}"
        )
    if not options.workdir.startswith("/mnt/share/"):
        raise UserError(f"workdir: expected a folder below /mnt/share, which all hosts share, got {options.workdir!r}")
    own = {field: shlex.quote(getattr(options, field)) for field in ("share", "zone", "accelerator_type")}
    return _fill("tpu_vm.sh", shared | own | {"name": name, "runtime": runtime, "spot": "--spot" * options.spot})


def _slice(options: Gke) -> dict[str, Any]:
    label, axes = _ACCELERATORS[options.accelerator]
    sizes = options.topology.split("x")
    if len(sizes) != axes or not all(size.isdecimal() and int(size) for size in sizes):
        wanted = "16x16" if axes == 2 else "4x4x4"
        raise UserError(
            f"topology: expected {axes} sizes as in {wanted} for {options.accelerator}, got {options.topology!r}"
        )
    chips = math.prod(map(int, sizes))
    per_host = min(chips, options.chips_per_host)
    if per_host < 1 or chips % per_host:
        raise UserError(
            f"chips_per_host: {options.chips_per_host} does not divide the {chips} chips of {options.topology}"
        )
    if not options.workdir.startswith("/runs/"):
        raise UserError(f"workdir: expected a folder below /runs, where the claim is mounted, got {options.workdir!r}")
    for name in ("image", "claim"):
        if not re.fullmatch(r"[\w./:@-]+", getattr(options, name)):
            raise UserError(f"{name}: {getattr(options, name)!r} is no name")
    return {
        "accelerator": label,
        "topology": options.topology,
        "hosts": chips // per_host,
        "chips_per_host": per_host,
        "image": options.image,
        "claim": options.claim,
    }


def _fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with exactly `values` in it."""
    found = Template((Path(__file__).parent / template).read_text(encoding="utf-8"))
    unused = values.keys() - {*found.get_identifiers()}
    assert not unused, f"{template} has no place for {unused}"
    return found.substitute(values)


def _start(command: list[str], text: str | None) -> None:
    try:
        code = subprocess.run(command, input=text, text=True, check=False).returncode
    except FileNotFoundError:
        raise UserError(f"launch: {command[0]} is not here; --dry-run prints the script, to be taken there") from None
    if code:
        raise UserError(f"launch: {command[0]} ended with code {code}; what it said is above")
