"""Adapter of `dsf`: the layers of the dynamical systems framework, and states and eigenvalues of their systems."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.linear.dsf import dsf_eigenvalues, dsf_scan
from jattn.nn.dsf import LinearTransformerMixer, NormalizedMixer, SoftmaxDSFMixer, numbered
from jattn.nn.dsf_recurrent import RGLRU, QLSTMMixer, ReversedQLSTMMixer, S6Mixer, SSDMixer
from tests.golden.harness import Case, Tolerance, adapter


def _float64() -> dict[str, Any]:
    """Options of a layer. Made anew: random numbers may not be drawn from a stream of another trace."""
    return {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}


def _read(case: Case, name: str) -> jax.Array:
    return jnp.asarray(case[name], jnp.float64)


def _linear(case: Case, name: str) -> nnx.Linear:
    """The layer whose weight [out, in] and, it may be, bias [out] are in the file."""
    weight = _read(case, name + "_weight").T
    layer = nnx.Linear(*weight.shape, use_bias=name + "_bias" in case, **_float64())
    layer.kernel[...] = weight
    if layer.bias is not None:
        layer.bias[...] = _read(case, name + "_bias")
    return layer


def _prefixes(case: Case, layer: str) -> Iterator[str]:
    """Every prefix p, "LAYER_" itself or more in front of it, of a layer whose output p + "y" is in the file."""
    for name in case:
        if name == f"{layer}_y" or name.endswith(f"_{layer}_y"):
            yield name.removesuffix("y")


def _input(case: Case, prefix: str) -> jax.Array:
    """The layer's own input or the one that all layers of the file share."""
    return _read(case, prefix + "x" if prefix + "x" in case else "x")


def _option(case: Case, prefix: str, name: str, default: Any = None) -> Any:
    """An option of the layer: its own where the configuration has one under the layer's name, else the file's."""
    config = case.meta["config"]
    return config.get(prefix.rstrip("_"), {}).get(name, config.get(name, default))


@adapter(
    "dsf",
    tolerances={
        "*norm_dsf_lambda": Tolerance(1e-6, "float32 rounding of exp of a difference of two logits"),
        "*dsf_final_state": Tolerance(2e-6, "float32 rounding of a sum over all earlier tokens in the reference"),
        "*rglru_y": Tolerance(2e-6, "float32 rounding of two gates and a sum over all earlier tokens in the reference"),
        "*": Tolerance(5e-6, "float32 rounding through the reference's projections and a sum over all earlier tokens"),
    },
    uncovered={
        "*ssd_dt_proj_weight": "the released layer makes this matrix and never multiplies by it",
        "*qlstm_alpha": "the released layer makes this exponent and, unless reversed, never raises to it",
    },
)
def dsf(case: Case) -> dict[str, Any]:
    """`LAYER_*` are weights and output of a layer on the input x; what is in front of LAYER tells cases apart."""
    outputs: dict[str, Any] = {}
    for layer, compute in _LAYERS.items():
        for prefix in _prefixes(case, layer):
            outputs |= {prefix + name: output for name, output in compute(case, prefix).items()}
    return {name: output for name, output in outputs.items() if name in case}


def _attention(case: Case, prefix: str, make: Any, heads: int, **options: Any) -> tuple[Any, jax.Array]:
    """The mixer `make` with the file's projections, and its input."""
    x = _input(case, prefix)
    both = _linear(case, prefix + "Wqk")  # queries beside keys
    width = both.out_features // 2
    sizes = {"head_dim": width // heads, "value_dim": case[prefix + "Wv_weight"].shape[0] // heads}
    options |= {"rope_theta": None, "use_bias": both.bias is not None}
    mixer = make(x.shape[-1], num_heads=heads, **sizes, **options, **_float64())
    p = mixer.projections
    for layer, part in ((p.query, slice(0, width)), (p.key, slice(width, None))):
        layer.kernel[...] = both.kernel[:, part]
        if both.bias is not None:
            layer.bias[...] = both.bias[part]
    p.value, p.out = _linear(case, prefix + "Wv"), _linear(case, prefix + "out_proj")
    return mixer, x


def _softmax(case: Case, prefix: str) -> dict[str, Any]:
    mixer, x = _attention(case, prefix, SoftmaxDSFMixer, _option(case, prefix, "num_heads"))
    return {"y": mixer(x, positions=numbered(x))[0]}


def _linear_attention(case: Case, prefix: str) -> dict[str, Any]:
    mixer, x = _attention(case, prefix, LinearTransformerMixer, _option(case, prefix, "num_heads"))
    return {"y": mixer(x, positions=numbered(x))[0]}


def _normalized(case: Case, prefix: str) -> dict[str, Any]:
    eta = _linear(case, prefix + "Wn")
    normalizer = _option(case, prefix, "normalizer", "exp")
    mixer, x = _attention(case, prefix, NormalizedMixer, eta.out_features, normalizer=normalizer)
    mixer.eta = eta
    system = mixer.as_dsf(x)
    _, state = dsf_scan(system, return_state=True)
    lam = dsf_eigenvalues(system)[..., 0, 0]
    return {"y": mixer(x, positions=numbered(x))[0], "dsf_lambda": lam, "dsf_final_state": state}


def _s6(case: Case, prefix: str) -> dict[str, Any]:
    x, A_log = _input(case, prefix), _read(case, prefix + "A_log")
    make = SSDMixer if A_log.size == 1 else S6Mixer
    x_proj = _linear(case, prefix + "x_proj")
    dt_bias = _read(case, prefix + "dt_proj_bias")
    rank = 1 if make is SSDMixer else _linear(case, prefix + "dt_proj").in_features
    mixer = make(x.shape[-1], head_dim=(x_proj.out_features - rank) // 2, **_float64())
    mixer.rank = rank
    mixer.x_proj, mixer.out_proj = x_proj, _linear(case, prefix + "out_proj")
    if mixer.dt_proj is not None:
        mixer.dt_proj.kernel = nnx.Param(_read(case, prefix + "dt_proj_weight").T)
    mixer.dt_bias[...], mixer.D[...] = dt_bias, _read(case, prefix + "D")
    mixer.A_log[...] = A_log.reshape(mixer.A_log.shape)
    y, state = mixer(x, positions=numbered(x), state=mixer.init_state(x.shape[0], x.shape[1], x.dtype))
    return {"y": y, "dsf_final_state": state}


def _qlstm(case: Case, prefix: str) -> dict[str, Any]:
    x, weight = _input(case, prefix), _read(case, prefix + "conv_weight")  # [C, 1, taps], the token itself last
    is_reversed = prefix.endswith("rev_")
    expand = weight.shape[0] // x.shape[-1]
    mixer = (ReversedQLSTMMixer if is_reversed else QLSTMMixer)(
        x.shape[-1], expand=expand, taps=weight.shape[2], **_float64()
    )
    mixer.in_proj, mixer.gates, mixer.out_proj = (_linear(case, prefix + n) for n in ("input", "gates", "output"))
    mixer.convolution.kernel[...] = weight[:, 0, ::-1].T
    mixer.convolution.bias[...] = _read(case, prefix + "conv_bias")
    if is_reversed:
        mixer.alpha[...] = _read(case, prefix + "alpha").reshape(())
    return {"y": mixer(x, positions=numbered(x))[0]}


def _rglru(case: Case, prefix: str) -> dict[str, Any]:
    x, blocks = _input(case, prefix), case[prefix + "input_gate_weight"].shape[0]
    layer = RGLRU(x.shape[-1], blocks, **_float64())
    for gate, name in ((layer.write_gate, "input_gate"), (layer.recurrence_gate, "recurrent_gate")):
        gate.kernel[...] = _read(case, f"{prefix}{name}_weight")
        gate.bias[...] = _read(case, f"{prefix}{name}_bias")
    layer.decay[...] = _read(case, prefix + "recurrent_param")
    starts = jnp.broadcast_to(jnp.asarray(case[prefix + "position_ids"]) == 0, x.shape[:2])
    return {"y": dsf_scan(layer.as_dsf(x, starts))[:, :, 0]}


_LAYERS = {
    "softmax": _softmax,
    "linear": _linear_attention,
    "norm": _normalized,
    "s6": _s6,
    "ssd": _s6,
    "qlstm": _qlstm,
    "qlstm_rev": _qlstm,
    "rglru": _rglru,
}
