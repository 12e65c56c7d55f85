"""Adapters of the linear recurrences: `lightning_attention2`, `gla` and `gated_delta_rule`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.linear.delta_rule import delta_rule
from jattn.linear.lightning import lightning_attention, lightning_slopes
from jattn.linear.recurrence import LinearState, linear_attention
from jattn.nn.linear import LightningMixer
from tests.golden.harness import Case, Tolerance, adapter

# The references ran in float32; what is computed here in float64 differs by their rounding.
OUTPUT = Tolerance(2e-6, "float32 rounding of a sum over all earlier tokens in the reference")
GRADIENT = Tolerance(1e-5, "float32 rounding through the reference's automatic differentiation")


def _read(case: Case, name: str) -> jax.Array:
    return jnp.asarray(case[name], jnp.float64)


def _present(case: Case, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those outputs that the file has something to compare with."""
    return {name: output for name, output in outputs.items() if name in case}


def _prefixes(case: Case, *names: str) -> list[str]:
    """Every prefix p, empty or ending in "_", such that the file has p + name for all `names`."""
    candidates = (key.removesuffix(names[0]) for key in case if key.endswith(names[0]))
    return [p for p in candidates if (p == "" or p.endswith("_")) and all(p + name in case for name in names)]


def _own_or_shared(case: Case, prefix: str, *names: str) -> dict[str, jax.Array]:
    """Those of the arrays that the file has, under the prefix or, where it has none of its own, without."""
    keys = {name: prefix + name if prefix + name in case else name for name in names}
    return {name: _read(case, key) for name, key in keys.items() if key in case}


def _value_and_gradients(
    op: Callable[[Mapping[str, jax.Array]], tuple[jax.Array, LinearState]],
    inputs: Mapping[str, jax.Array],
    cotangent: jax.Array | None,
    end: jax.Array | None,
) -> tuple[tuple[jax.Array, LinearState], Mapping[str, jax.Array]]:
    """`op(inputs)` and the gradients of <out, cotangent> + <S, end>: none without a cotangent; the end may be 0."""

    @jax.jit
    def both(inputs):
        (out, state), pull_back = jax.vjp(op, inputs)
        if cotangent is None:
            return (out, state), {}
        zeros = jax.tree.map(jnp.zeros_like, state)
        (gradients,) = pull_back((cotangent, zeros if end is None else zeros._replace(S=end)))
        return (out, state), gradients

    return both(inputs)


@adapter(
    "lightning_attention2",
    tolerances={
        "*slopes*": Tolerance(1e-7, "float32 rounding of a single number"),
        "*_y": Tolerance(2e-5, "float32 rounding through four projections, a LayerNorm and a gate in the reference"),
        "*d[qkv]": GRADIENT,
        "*": OUTPUT,
    },
    implementations=("reference", "xla"),
)
def lightning_attention2(case: Case) -> dict[str, Any]:
    """`[p]q, k, v, slopes` are a call of the op, `slopes_N` a table of N heads, `[p]x, q_proj_weight, ...` a layer."""
    outputs: dict[str, Any] = {}
    for prefix in _prefixes(case, "q", "k", "v"):
        inputs = {name: _read(case, prefix + name) for name in "qkv"}
        slopes = _read(case, prefix + "slopes")
        cotangent = _read(case, prefix + "do") if prefix + "do" in case else None

        def op(given: Mapping[str, jax.Array], slopes: jax.Array | None = slopes) -> tuple[jax.Array, LinearState]:
            query, key, value = (given[name] for name in "qkv")
            return lightning_attention(query, key, value, slopes, return_state=True, implementation=case.implementation)

        (out, state), gradients = _value_and_gradients(op, inputs, cotangent, None)
        outputs |= {prefix + "o": out, prefix + "final_state": state.S, prefix + "o_no_decay": op(inputs, None)[0]}
        outputs |= {f"{prefix}d{name}": gradient for name, gradient in gradients.items()}
    for name in case:
        if table := re.fullmatch(r"slopes_(\d+)", name):
            outputs[name] = lightning_slopes(int(table[1]), variant="repo")
    for prefix in _prefixes(case, "x", "q_proj_weight"):
        outputs |= _tnl_layer(case, prefix)
    return _present(case, outputs)


def _linear(case: Case, name: str) -> nnx.Linear:
    """The layer whose weight [out, in] and, it may be, bias [out] are in the file."""
    weight = _read(case, name + "_weight").T
    biased = name + "_bias" in case
    layer = nnx.Linear(*weight.shape, use_bias=biased, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    layer.kernel[...] = weight
    if biased and layer.bias is not None:
        layer.bias[...] = _read(case, name + "_bias")
    return layer


def _tnl_layer(case: Case, prefix: str) -> dict[str, Any]:
    """TransNormerLLM's layer; its options are in the configuration under "module", or under the prefix's own name."""
    configs = case.meta["config"]
    config = configs.get(prefix.rstrip("_"), configs.get("module"))
    x = _read(case, prefix + "x")
    mixer = LightningMixer(
        x.shape[-1],
        num_heads=config["num_heads"],
        layer_index=config["layer_idx"],
        num_layers=config["num_layers"],
        slope_variant="repo",
        norm="layernorm",
        gate_rank=x.shape[-1] // config["num_heads"],
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    projections = mixer.projections
    projections.query, projections.key, projections.value, projections.out = (
        _linear(case, f"{prefix}{name}_proj") for name in "qkvo"
    )
    mixer.gate.down, mixer.gate.up = (_linear(case, f"{prefix}output_gate_{place}") for place in (0, 1))
    norm: Any = mixer.norm
    norm.scale[...] = _read(case, prefix + "norm_weight")
    norm.bias[...] = _read(case, prefix + "norm_bias")
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return {prefix + "y": mixer(x, positions=positions)[0], prefix + "slopes": mixer.slopes[...]}


@adapter(
    "gla",
    tolerances={"*d[qkvghz]*": GRADIENT, "*": OUTPUT},
    implementations=("reference", "xla"),
)
def gla(case: Case) -> dict[str, Any]:
    """Gated linear attention, `simple_*` with one gate per head, `norm_*` with a normaliser and no gate.

    q, k, v, h0 and the cotangents do and dht serve all three, unless a case has its own.
    """
    scale = case.meta["config"].get("simple_and_norm_scale")
    outputs: dict[str, Any] = {}
    for prefix in _prefixes(case, "gk"):
        outputs |= _recurrence(case, prefix, gate="gk", scale=None)
    for prefix in _prefixes(case, "g"):
        outputs |= _recurrence(case, prefix, gate="g", scale=scale)
    if any(name.startswith("norm_") for name in case):
        outputs |= _recurrence(case, "norm_", gate=None, scale=scale)
    return _present(case, outputs)


def _recurrence(case: Case, prefix: str, *, gate: str | None, scale: float | None) -> dict[str, Any]:
    """One call of `linear_attention` and the gradients of <o, do> + <ht, dht>; of <o, do> alone where normalised."""
    normalize = gate is None
    inputs = _own_or_shared(case, prefix, "q", "k", "v", "h0", "z0" if gate is None else gate)
    ends = _own_or_shared(case, prefix, "do", *(() if normalize else ("dht",)))
    scale = inputs["q"].shape[-1] ** -0.5 if scale is None else scale

    def op(given: Mapping[str, jax.Array]) -> tuple[jax.Array, LinearState]:
        query, key, value = (given[name] for name in ("q", "k", "v"))
        batch, _, heads, dim = key.shape
        start = given.get("h0", jnp.zeros((batch, heads, dim, value.shape[-1])))
        norm = given["z0"][:, 0] if "z0" in given else jnp.zeros((batch, heads, dim))  # stored as [B, 1, N, K]
        return linear_attention(
            query,
            key,
            value,
            None if gate is None else given[gate],
            scale=scale,
            normalize=normalize,
            eps=1e-10,
            initial_state=LinearState(start, norm if normalize else None),
            return_state=True,
            implementation=case.implementation,
        )

    (out, state), gradients = _value_and_gradients(op, inputs, ends.get("do"), ends.get("dht"))
    outputs = {"o": out, "ht": state.S} if state.z is None else {"o": out, "S": state.S, "z": state.z[:, None]}
    outputs |= {"d" + name: gradient for name, gradient in gradients.items()}
    return {prefix + name: output for name, output in outputs.items()}


@adapter(
    "gated_delta_rule",
    tolerances={"*d[qkvgh]*": GRADIENT, "*dbeta": GRADIENT, "*": OUTPUT},
    implementations=("reference", "xla"),
)
def gated_delta_rule(case: Case) -> dict[str, Any]:
    """The gated delta rule, `kda_*` with a gate per key channel, `delta_*` without one.

    q, k, v, beta, h0 and the cotangents do and dht serve all three, unless a case has its own.
    """
    outputs: dict[str, Any] = {}
    for prefix in _prefixes(case, "o"):
        inputs = _own_or_shared(case, prefix, "q", "k", "v", "beta", "h0")
        if prefix + "g" in case:
            inputs["g"] = _read(case, prefix + "g")
        # Without gates the reference takes no scale.
        scale = case.meta["config"].get("scale") if "g" in inputs else None

        def op(given: Mapping[str, jax.Array], scale: float | None = scale) -> tuple[jax.Array, LinearState]:
            return delta_rule(
                given["q"],
                given["k"],
                given["v"],
                given["beta"],
                given.get("g"),
                scale=scale,
                initial_state=LinearState(given["h0"], None) if "h0" in given else None,
                return_state=True,
                implementation=case.implementation,
            )

        ends = _own_or_shared(case, prefix, "do", "dht")
        (out, state), gradients = _value_and_gradients(op, inputs, ends.get("do"), ends.get("dht"))
        outputs |= {prefix + "o": out, prefix + "ht": state.S}
        outputs |= {f"{prefix}d{name}": gradient for name, gradient in gradients.items()}
    return _present(case, outputs)
