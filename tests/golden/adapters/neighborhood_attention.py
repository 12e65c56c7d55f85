"""Adapter of `neighborhood_attention`: NATTEN's masks, attention with gradients, and merging of partial results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.dot_product import merge_attentions
from jattn.neighborhood.neighborhood import neighborhood_attention
from jattn.neighborhood.window import Neighborhood
from tests.golden.harness import Case, Tolerance, adapter

INPUTS = {"q": "dq", "k": "dk", "v": "dv"} | {f"additional_{x}": f"d_additional_{x}" for x in ("keys", "values")}
"""Arrays and their gradients."""


@adapter(
    "neighborhood_attention",
    tolerances={
        "*_mask": Tolerance(0.0, "booleans"),
        "merge_*": Tolerance(1e-6, "merged by the reference in float32"),
        "*": Tolerance(2e-7, "float64 on both sides, stored as float32"),
    },
    implementations=("reference", "xla"),
)
def neighborhood(case: Case) -> dict[str, Any]:
    """Each case of the file has a number, the options of the call in the meta, and its arrays."""
    outputs: dict[str, Any] = {}
    for config in case.meta["cases"]:
        prefix = f"c{config['case']}_"
        options = {name: tuple(config[name]) for name in ("kernel_size", "stride", "dilation", "is_causal")}
        grid = tuple(config["shape"])
        names = [name for name in INPUTS if prefix + name in case]
        arrays = [jnp.asarray(case[prefix + name], jnp.float64) for name in names]

        def attend(*arrays: Any, options: Any = options, config: Any = config) -> Any:
            query, key, value, *additional = arrays
            beyond = dict(zip(("additional_keys", "additional_values"), additional, strict=False))
            return neighborhood_attention(
                query, key, value, **options, **beyond, scale=config["scale"], return_lse=True,
                implementation=case.implementation,
            )  # fmt: skip

        out, pull_back, lse = jax.vjp(attend, *arrays, has_aux=True)
        gradients = pull_back(jnp.asarray(case[prefix + "do"], jnp.float64))
        computed = {"out": out, "lse": lse, "mask": Neighborhood(**options).dense(grid).astype("uint8")}
        computed |= {INPUTS[name]: gradient for name, gradient in zip(names, gradients, strict=True)}
        outputs |= {prefix + name: array for name, array in computed.items() if prefix + name in case}
    if "merge_outs" in case:
        out, lse = merge_attentions(*(list(jnp.asarray(case[f"merge_{name}"])) for name in ("outs", "lses")))
        outputs |= {"merge_out": out, "merge_lse": lse}
    return outputs
