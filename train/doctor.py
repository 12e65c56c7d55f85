"""`python -m train doctor`: devices, versions, and which implementation each op would use here, and why."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import jattn
from jattn.catalog import CATALOG
from train.workdir import environment


def doctor() -> None:
    """Show what this machine offers and what each op of the catalog would run on it."""
    for name, value in environment().items():
        print(f"{name:<18}{value}")
    print()
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((1, 1024, 8, 128), dtype)
        for entry in CATALOG:
            for decision in jattn.explain(_call(entry), x, x, x):
                print(f"{entry.name}: {decision}")


def _call(entry: jattn.catalog.Entry):
    """The entry's op with its example options, as a function of query, key and value."""
    op, options = entry.load_op(), dict(entry.example)
    return lambda query, key, value: op(query, key, value, **options)
