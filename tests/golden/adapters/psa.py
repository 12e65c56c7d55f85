"""Adapter of `psa`: the authors' choice of levels and their legacy kernel, which read right at every block size."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.sparse.psa import psa_attention
from jattn.sparse.psa_importance import psa_importance_antidiagonal, psa_importance_sampling, psa_similarity
from jattn.sparse.psa_levels import psa_levels, psa_similarity_cap
from tests.golden.harness import Case, Tolerance, adapter


@adapter(
    "psa",
    tolerances={
        "lvl*": Tolerance(0.0, "integers"),
        "sim_cap": Tolerance(0.0, "integers"),
        "*": Tolerance(1e-6, "the reference is computed in float32"),
    },
    implementations=("reference", "xla"),
)
def psa(case: Case) -> dict[str, Any]:
    """Each part of the file has its options in the meta under `info`; a file may lack parts."""
    info = case.meta["info"]
    parts = {"imp": _sampling, "levels": _levels, "sim": _similarity, "att": _attention, "xattn": _antidiagonal}
    parts["grad"] = _gradients
    outputs = {name: array for key in parts if key in info for name, array in parts[key](case, info[key]).items()}
    return {name: array for name, array in outputs.items() if name in case}


def _wide(case: Case, *names: str) -> list[Any]:
    return [jnp.asarray(case[name], jnp.float64) for name in names]


def _sampling(case: Case, config: Any) -> dict[str, Any]:
    """The tokens in the file are the samples already, so a block is all of its samples."""
    query, key = _wide(case, "imp_q", "imp_k")
    blocks = config["keep_m"], config["keep_n"]
    sampled = tuple(
        np.broadcast_to(np.arange(block), (x.shape[0], x.shape[2], block))
        for x, block in zip((query, key), blocks, strict=True)
    )
    scores = psa_importance_sampling(
        query, key, sampled=sampled, block_q=blocks[0], block_kv=blocks[1], scale=config["scale"]
    )
    return {"imp_scores": scores}


def _levels(case: Case, configs: Any) -> dict[str, Any]:
    outputs = {}
    for config in configs:
        is_causal = config.get("causal", False)
        blocks = dict.fromkeys(("block_q", "block_kv"), config["block_size" if is_causal else "block_n"])
        tiles = {} if is_causal else {"tile": config["tile_n"], "min_full_ratio": config["min_full_ratio"]}
        outputs[config["key"]] = psa_levels(
            *_wide(case, config["key"].rpartition("_")[0] + "_scores"),
            rule=config["mode"], is_causal=is_causal, text_length=config["text_length"],
            mask_ratios={int(level): tuple(bounds) for level, bounds in config["mask_ratios"].items()},
            **blocks, **tiles,
        )  # fmt: skip
    return outputs


def _similarity(case: Case, config: Any) -> dict[str, Any]:
    (key,) = _wide(case, "sim_k")
    cap = psa_similarity_cap(key, config["block"], tuple(config["thresholds"]))
    return {"sim_values": psa_similarity(key, config["block"]), "sim_cap": cap}


def _antidiagonal(case: Case, config: Any) -> dict[str, Any]:
    scores = psa_importance_antidiagonal(
        *_wide(case, "xat_q", "xat_k"),
        block_q=config["block"], block_kv=config["block"], stride=config["stride"], is_causal=config["causal"],
    )  # fmt: skip
    return {"xat_scores": scores}


def _attend(case: Case, config: Any, levels: str) -> Any:
    return functools.partial(
        psa_attention, levels=case[levels], block_q=config["block"], block_kv=config["block"], scale=config["scale"],
        implementation=case.implementation,
    )  # fmt: skip


def _attention(case: Case, config: Any) -> dict[str, Any]:
    x = _wide(case, "att_q", "att_k", "att_v")
    outputs = {"att_out": _attend(case, config, "att_levels")(*x)}
    if "att_levels_causal" in case:
        outputs["att_out_causal"] = _attend(case, config, "att_levels_causal")(*x, is_causal=True)
    return outputs


def _gradients(case: Case, config: Any) -> dict[str, Any]:
    """Of the file's rows only."""
    rows = case["grd_rows"]
    out, pull_back = jax.vjp(_attend(case, config, "grd_levels"), *_wide(case, "grd_q", "grd_k", "grd_v"))
    gradients = pull_back(*_wide(case, "grd_do"))
    names = ("out", "dq", "dk", "dv")
    return {f"grd_{name}": x[:, rows] for name, x in zip(names, (out, *gradients), strict=True)}
