"""Chips that are not here: their names, their memory, and devices of them to compile for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pallas_kernels.lab import chips
from pallas_kernels.lab.chips import GIB as GIB
from train.errors import UserError

if TYPE_CHECKING:
    import jax

# Memory of a device in bytes, by JAX's name of its kind.
MEMORY = {chip.kind: chip.hbm_bytes for chip in chips.CHIPS.values()}


def prepare(topology: str) -> None:
    """Set what JAX and the compilers read when they load; this process computes on the CPU.

    Raises:
      UserError: no chip is called so, or the compiler for `topology` is not installed.
    """
    name = re.split("[:-]", topology)[0]
    if name not in chips.CHIPS:
        raise UserError(
            f"--topology {topology}: no chip is called {name!r}; there are {', '.join(chips.CHIPS)}, as in v5e:2x4, "
            "v5p:8x8x8 or h100:8"
        )
    chips.prepare_environment()
    if missing := chips.missing_compiler(topology):
        module, packages = missing
        raise UserError(
            f"--topology {topology}: its compiler ({module}) is not installed here; the environment of make lab has it "
            f"(.venv-lab/bin/python -m train compile ...), or pip install {packages}"
        )


def devices_of(topology: str) -> list[jax.Device]:
    """Devices to compile for, as many as the topology has; none of them need be there."""
    try:
        return chips.devices(topology)
    except ValueError as error:
        raise UserError(f"--topology {topology}: {error}") from None
