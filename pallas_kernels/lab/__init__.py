"""A meter for kernels: compile them for TPU and H100 with neither present, and read what the compiler scheduled.

    python -m pallas_kernels.lab report --module my_kernels.py:cases --targets v5e,v6e

`cases(target)` returns `{name: Case}`.
"""

from pallas_kernels.lab.cases import Case

__all__ = ["Case"]
