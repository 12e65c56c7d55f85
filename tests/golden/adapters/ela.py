"""Adapter of `ela`: the four variants of efficient local attention and their gradients."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.vision.efficient_local import ela as op
from tests.golden.adapters.linear import _present
from tests.golden.harness import Case, Tolerance, adapter

WEIGHTS = ("conv_kernel", "gn_scale", "gn_bias")


@adapter(
    "ela",
    tolerances={"*": Tolerance(2e-6, "float32 rounding of the stored inputs, through a normalisation over a strip")},
)
def ela(case: Case) -> dict[str, Any]:
    """Every entry of the meta's `variants` prefixes arrays; its `groups` are "C" or "C//n"."""
    outputs: dict[str, Any] = {}
    for name, variant in case.meta["variants"].items():
        x, weight = (case[part if part in case else f"{name}_{part}"].astype(np.float64) for part in ("x", "do"))
        weights = [case[f"{name}_{part}"].astype(np.float64) for part in WEIGHTS]
        options = {"feature_groups": _groups(variant["groups"], x.shape[-1]), "num_groups": variant["num_group"]}
        if "eps" in variant:
            options["eps"] = variant["eps"]

        def loss(x: Any, *weights: Any, options: Any = options, weight: Any = weight) -> jax.Array:
            return jnp.sum(op(x, *weights, **options) * weight)

        gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(x, *weights)
        made = {"y": op(x, *weights, **options), "dx": gradients[0]}
        made |= {f"d_{part}": grad for part, grad in zip(WEIGHTS, gradients[1:], strict=True)}
        outputs |= {f"{name}_{part}": array for part, array in made.items()}
    return _present(case, outputs)


def _groups(text: str | int, channels: int) -> int:
    """ "C", "C//n" or a number."""
    found = re.fullmatch(r"C(?://(\d+))?", str(text))
    return int(text) if found is None else channels // int(found[1] or 1)
