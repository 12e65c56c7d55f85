"""Adapter of `hyper_attention`: the authors' float64 run, which counts samples of the own block and pads by zeros."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jattn.sparse.hyper import angular_lsh_hash, hyper_attention
from tests.golden.harness import Case, Tolerance, adapter


@adapter(
    "hyper_attention",
    tolerances={
        "*_hash_[qk]": Tolerance(0.0, "integers"),
        "*_out_excl": Tolerance(1e-6, "the reference is stored in float32"),
        "*_d[qkv]": Tolerance(1e-6, "the reference's gradients are stored in float32"),
        "*_lse*": Tolerance(1e-12, "float64 on both sides; the reference adds an eps of float64 inside of a logarithm"),
        "*": Tolerance(1e-12, "float64 on both sides"),
    },
    implementations=("reference", "xla"),
)
def hyper_attention_(case: Case) -> dict[str, Any]:
    """Each case of the file has a name, sizes and options in the meta, and its arrays."""
    outputs: dict[str, Any] = {}
    for config in case.meta["cases"]:
        prefix = config["case"] + "_"
        query, key, value, proj_dir = (jnp.asarray(case[prefix + n], jnp.float64) for n in ("q", "k", "v", "proj_dir"))
        attend = functools.partial(
            hyper_attention, proj_dir=proj_dir,
            sampled=tuple(case[f"{prefix}sampled_{i}"] for i in range(config["n_sampled_calls"])),
            is_causal=config["causal"], block_size=config["block_size"], sample_size=config["sample_size"],
            min_seq_len=config["min_seq_len"], scale=config["scale"], ragged=config.get("ragged", "zero_pad"),
            return_lse=True, implementation=case.implementation,
        )  # fmt: skip
        out, pull_back, lse = jax.vjp(functools.partial(attend, exclude_block=False), query, key, value, has_aux=True)
        out_excl, lse_excl = attend(query, key, value, exclude_block=True)
        computed = {"out": out, "lse": lse, "out_excl": out_excl, "lse_excl": lse_excl}
        computed |= {f"hash_{name}": angular_lsh_hash(x, proj_dir) for name, x in (("q", query), ("k", key))}
        if prefix + "do" in case:
            d_out = jnp.asarray(case[prefix + "do"], jnp.float64)
            computed |= dict(zip(("dq", "dk", "dv"), pull_back(d_out), strict=True))
        outputs |= {prefix + name: array for name, array in computed.items() if prefix + name in case}
    return outputs
