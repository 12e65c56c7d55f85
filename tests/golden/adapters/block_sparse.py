"""Adapter of `block_sparse`: PyTorch's FlexAttention with its block lists."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.sparse.block_mask import BlockMask
from jattn.sparse.block_sparse import block_sparse_attention
from tests.golden.harness import Case, Tolerance, adapter


@adapter(
    "block_sparse",
    tolerances={
        "*_num_blocks": Tolerance(0.0, "integers"),
        "*_indices": Tolerance(0.0, "integers"),
        "*_d[qkv]": Tolerance(1e-6, "the reference's gradients are float32"),
        "*": Tolerance(1e-12, "float64 on both sides"),
    },
    implementations=("reference", "xla"),
)
def block_sparse(case: Case) -> dict[str, Any]:
    """Each case of the file has a name, `BLOCK_SIZE`, `logits_soft_cap` and `scale` in the meta, and its arrays."""
    outputs: dict[str, Any] = {}
    for config in case.meta["cases"]:
        prefix = config["case"] + "_"
        block_mask = BlockMask.from_dense(case[prefix + "mask"], *config["BLOCK_SIZE"])
        query, key, value, d_out = (jnp.asarray(case[prefix + name], jnp.float64) for name in ("q", "k", "v", "do"))

        def attend(query: Any, key: Any, value: Any, block_mask: Any = block_mask, config: Any = config) -> Any:
            return block_sparse_attention(
                query, key, value, block_mask, scale=config["scale"], logits_soft_cap=config["logits_soft_cap"],
                return_lse=True, implementation=case.implementation,
            )  # fmt: skip

        out, pull_back, lse = jax.vjp(attend, query, key, value, has_aux=True)
        computed = {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), pull_back(d_out), strict=True))
        computed |= _pytorch_lists(
            "kv", block_mask.kv_idx, block_mask.n_partial, block_mask.n_total, block_mask.q_idx.shape[2]
        )
        computed |= _pytorch_lists(
            "q", block_mask.q_idx, block_mask.qn_partial, block_mask.qn_total, block_mask.kv_idx.shape[2]
        )
        outputs |= {prefix + name: array for name, array in computed.items() if prefix + name in case}
    return outputs


def _pytorch_lists(name: str, idx: Any, n_partial: Any, n_total: Any, columns: int) -> dict[str, np.ndarray]:
    """Partial and full blocks apart, each list followed by all the blocks that it does not have, ascending."""
    parts = {f"{name}_": (0 * n_total, n_partial), f"full_{name}_": (n_partial, n_total)}
    lists = {}
    for part, (start, stop) in parts.items():
        full = np.empty((*n_total.shape, columns), np.int32)
        for at in np.ndindex(n_total.shape):
            own = idx[at][start[at] : stop[at]]
            full[at] = [*own, *np.setdiff1d(np.arange(columns), own)]
        lists |= {part + "num_blocks": stop - start, part + "indices": full}
    return lists
