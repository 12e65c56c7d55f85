"""Adapter of `hedgehog`: feature maps, attention with them, and its distillation from softmax."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from jattn.dot_product import dot_product_attention
from jattn.linear.arguments import LinearState
from jattn.linear.distillation import attention_distillation_loss
from jattn.linear.hedgehog import hedgehog_attention, hedgehog_attention_step, hedgehog_feature_map
from tests.golden.adapters.linear import _own_or_shared, _prefixes, _present
from tests.golden.harness import Case, Tolerance, adapter

PHI = re.compile(r"(?P<p>.*_)?phi_(?P<of>[qk])_(?P<f>exp_dim|softmax_dim|exp|softmax_joint)(?P<half>_half)?")


@adapter(
    "hedgehog",
    tolerances={
        "*phi_*": Tolerance(2e-6, "float32 rounding of one product over H and of an exponential in the reference"),
        "*dW*": Tolerance(1e-5, "float32 rounding through the reference's automatic differentiation"),
        "*": Tolerance(2e-6, "float32 rounding of a softmax and of sums over all earlier tokens in the reference"),
    },
    implementations=("reference", "xla"),
)
def hedgehog(case: Case) -> dict[str, Any]:
    """`[p]q, k, v, Wq, Wk` are a layer; without its own arrays a prefix takes those without.

    Features are `phi_{q,k}_{activation}[_half]`; the rest carries `_bidir` where it is not causal. The maps of the
    attention are LoLCATs' `softmax_dim` unless the configuration names another `activation`.
    """
    outputs: dict[str, Any] = {}
    for prefix in _prefixes(case, "q", "k", "v"):
        outputs |= _features(case, prefix)
        for ending in ("", "_bidir"):
            outputs |= _layer(case, prefix, ending)
    return _present(case, outputs)


def _features(case: Case, prefix: str) -> dict[str, Any]:
    given = _own_or_shared(case, prefix, "q", "k", "Wq", "Wk", "bq", "bk")
    eps = case.meta["config"].get("eps", 1e-12)
    outputs: dict[str, Any] = {}
    for name in case:
        found = PHI.fullmatch(name)
        if found is None or (found["p"] or "") != prefix:
            continue
        of = found["of"]
        outputs[name] = hedgehog_feature_map(
            given[of],
            given["W" + of],
            given.get("b" + of),
            activation=found["f"],  # type: ignore[arg-type]
            fullspace=found["half"] is None,
            eps=eps,
        )
    for of in "qk":
        own = prefix + "phi_" + of
        outputs[f"{own}_exp_negation_identity"] = hedgehog_feature_map(given[of], activation="exp")
        if own + "_softmax_dim_temp" in case:
            temp = float(case[prefix + "temp" if prefix + "temp" in case else "temp"])
            outputs[f"{own}_softmax_dim_temp"] = hedgehog_feature_map(given[of], temp=temp, eps=eps)
        if own + "_softmax_joint2" in case:
            # One layer y = x W^T + b, shared by all heads.
            joint = _own_or_shared(case, prefix, "joint_weight", "joint_bias")
            heads = given[of].shape[2]
            weight, bias = (
                jnp.broadcast_to(x, (heads, *x.shape)) for x in (joint["joint_weight"].T, joint["joint_bias"])
            )
            outputs[f"{own}_softmax_joint2"] = hedgehog_feature_map(given[of], weight, bias, activation="softmax_joint")
    return outputs


def _layer(case: Case, prefix: str, ending: str) -> dict[str, Any]:
    """Outputs, weights and losses; the weights are what is read from values that are one-hot."""
    given = _own_or_shared(case, prefix, "q", "k", "v", "Wq", "Wk", "bq", "bk")
    query, key, value = (given[name] for name in "qkv")
    config = case.meta["config"]
    is_causal = ending == ""
    options: dict[str, Any] = {
        "query_bias": given.get("bq"),
        "key_bias": given.get("bk"),
        "activation": config.get("activation", "softmax_dim"),
        "eps": config.get("eps", 1e-12),
    }
    one_hot = jnp.broadcast_to(jnp.eye(key.shape[1])[:, None], (*key.shape[:3], key.shape[1]))
    both = jnp.concatenate([value, one_hot], axis=-1)

    def distance(weights: Any, kind: str) -> jax.Array:
        factors = {"xent_factor": float(kind == "xent"), "mse_factor": float(kind == "mse")}
        block = max(1, query.shape[1] // 3)
        return attention_distillation_loss(
            query, key, value, *weights, is_causal=is_causal, block_size=block, **factors, **options
        )

    @jax.jit
    def compute(weights: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        made: dict[str, jax.Array] = {}
        settings: dict[str, Any] = {"is_causal": is_causal, "implementation": case.implementation}
        outputs = {
            "true": dot_product_attention(query, key, both, **settings),
            "pred": hedgehog_attention(query, key, both, *weights, **settings, **options),
        }
        for name, out in outputs.items():
            y, attention = jnp.split(out, [value.shape[-1]], axis=-1)
            made |= {f"y_{name}": y, f"attn_{name}": jnp.moveaxis(attention, 1, 2)}
        made["y_linear"] = _steps(given, options) if is_causal else made["y_pred"]
        for kind in ("xent", "mse"):
            loss, (d_query, d_key) = jax.value_and_grad(distance)(weights, kind)
            made |= {f"loss_{kind}": loss, f"dWq_{kind}": d_query, f"dWk_{kind}": d_key}
        return made

    return {prefix + name + ending: output for name, output in compute((given["Wq"], given["Wk"])).items()}


def _steps(given: dict[str, jax.Array], options: dict[str, Any]) -> jax.Array:
    """The causal output, token by token."""
    query, key, value = (jnp.moveaxis(given[name], 1, 0) for name in "qkv")
    shape = (key.shape[1], given["Wk"].shape[0], 2 * given["Wk"].shape[2])
    empty = LinearState(jnp.zeros((*shape, value.shape[-1])), jnp.zeros(shape))

    def step(state: LinearState, token: tuple[jax.Array, ...]) -> tuple[LinearState, jax.Array]:
        out, state = hedgehog_attention_step(*token, state, given["Wq"], given["Wk"], **options)
        return state, out

    _, out = jax.lax.scan(step, empty, (query, key, value))
    return jnp.moveaxis(out, 0, 1)
