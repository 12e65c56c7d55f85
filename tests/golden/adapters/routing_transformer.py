"""Adapter of `routing_transformer`: clusters, attention, loss, gradients and one step of k-means."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.sparse.kmeans import KMeansState, kmeans_apply, kmeans_sums
from jattn.sparse.routing import routing_attention
from tests.golden.harness import Case, Tolerance, adapter


@adapter(
    "routing_transformer",
    tolerances={
        "*_indices": Tolerance(0.0, "integers"),
        "*": Tolerance(1e-12, "float64 on both sides"),
    },
    implementations=("reference", "xla"),
)
def routing_transformer(case: Case) -> dict[str, Any]:
    """Each case of the file has a name, sizes and options in the meta, and its arrays."""
    outputs: dict[str, Any] = {}
    for config in case.meta["cases"]:
        computed = _case(case, config, config["case"] + "_")
        outputs |= {name: array for name, array in computed.items() if name in case}
    return outputs


def _case(case: Case, config: Any, prefix: str) -> dict[str, Any]:
    def read(name: str, dtype: Any = jnp.float64) -> jax.Array | None:
        return jnp.asarray(case[prefix + name], dtype) if prefix + name in case else None

    variant = config.get("variant", "lucid")
    # What comes from elsewhere is never shared.
    has_context = config.get("receives_context", False)
    shared = config["shared_qk"] and not has_context
    arrays = {"query": read("q"), "key": read("k"), "value": read("v")}
    if shared:
        arrays["key"] = None
    if variant == "lucid":  # there may be none of them
        arrays |= {"mem_key": read("mem_key"), "mem_value": read("mem_value")}
    q_real, kv_real = read("query_mask", bool), read("key_mask", bool)
    if not has_context:
        kv_real = q_real
    means = read("means")
    options: dict[str, Any] = {
        "window_size": config["window_size"], "variant": variant, "is_causal": config["causal"], "share_qk": shared,
        "mask": None if kv_real is None else kv_real[:, None, None], "query_mask": None if shared else q_real,
        # Both released codes rank the tokens that are not real too.
        "padding": "routed",
        "context_window_size": config["context_window_size"] if has_context else None,
        "commitment": config["commitment"], "return_aux": True, "implementation": case.implementation,
    }  # fmt: skip

    def loss(arrays: dict[str, Any], d_out: Any) -> Any:
        out, aux = routing_attention(**arrays, means=means, **options)
        return jnp.sum(out * d_out) + aux.loss, (out, aux)

    d_out = read("do")
    has_gradients = d_out is not None
    d_out = jnp.zeros((), jnp.float64) if d_out is None else d_out
    gradients, (out, aux) = jax.jit(jax.grad(loss, has_aux=True))(arrays, d_out)
    computed = {
        "out": out, "aux_loss": aux.loss, "q_indices": aux.query_members, "kv_indices": aux.key_members,
    }  # fmt: skip
    if has_gradients:
        names = {"query": "dq", "key": "dk", "value": "dv", "mem_key": "dmem_key", "mem_value": "dmem_value"}
        computed |= {name: gradients[array] for array, name in names.items() if gradients.get(array) is not None}
    computed |= _means(config, means, [arrays["query"]] if shared else [arrays["query"], arrays["key"]], variant)
    return {prefix + name: array for name, array in computed.items()}


def _means(config: Any, means: Any, tokens: list[Any], variant: Any) -> dict[str, Any]:
    """The means after tokens: of all together in the third party's code, of one kind after another in the authors'."""
    if variant == "lucid":
        parts = [kmeans_sums(means, x, variant="lucid") for x in tokens]
        sums = jax.tree.map(lambda *part: sum(part), *parts)
        after = {"batch_means": 0.0, "means_after_ema": config["ema_decay"]}
        return {name: kmeans_apply(KMeansState(means), sums, decay=decay).means for name, decay in after.items()}
    state = KMeansState(means, jnp.zeros_like(means[..., 0]), means)
    for x in tokens:
        state = kmeans_apply(state, kmeans_sums(state.means, x, variant="google"), decay=config["ema_decay"])
    return {"means_after_ema": state.means, "ema_count_after": state.counts, "ema_means_after": state.totals}
