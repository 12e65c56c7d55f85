"""Adapter of `van_lka`: the op, a block in both modes, and whole models of the visual attention network."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.models.torch_names import fill, load_torch, van_block_name
from jattn.models.van import VAN, VANConfig
from jattn.nn.batch_norm import BatchNorm
from jattn.nn.large_kernel import VANBlock
from jattn.vision.large_kernel import large_kernel_attention
from tests.golden.adapters.linear import _present
from tests.golden.harness import Case, Tolerance, adapter

LAYERS = ("conv0", "conv_spatial", "conv1")
WIDE: dict[str, Any] = {"dtype": jnp.dtype("float64"), "param_dtype": jnp.dtype("float64")}


@adapter(
    "van_lka",
    tolerances={
        "*_d*": Tolerance(2e-6, "float32 rounding of the stored inputs through sums over the image"),
        "*": Tolerance(2e-6, "float32 rounding of the stored weights and inputs through four stages"),
    },
)
def van_lka(case: Case) -> dict[str, Any]:
    """Weights are `lka.`, `block.` and `model.` with the authors' names behind, convolutions in HWIO.

    The dilation is 3 as in the released code unless the configuration names another; the sides of kernels, depths and
    widths are those of the arrays and the configuration.
    """
    outputs: dict[str, Any] = {}
    if "lka_x" in case:
        outputs |= _lka(case)
    if "block_x" in case:
        outputs |= _block(case)
    if "model_x" in case:
        outputs |= _model(case)
    return _present(case, outputs)


def _lka(case: Case) -> dict[str, Any]:
    x, weight = case["lka_x"].astype(np.float64), case["lka_do"].astype(np.float64)
    weights = [case[f"lka.{layer}.{part}"].astype(np.float64) for layer in LAYERS for part in ("weight", "bias")]

    def out(x: Any, weights: list[Any]) -> jax.Array:
        return large_kernel_attention(x, *weights, dilation=case.meta["config"].get("dilation", 3))

    def loss(x: Any, weights: list[Any]) -> jax.Array:
        return jnp.sum(out(x, weights) * weight)

    d_x, d_weights = jax.jit(jax.grad(loss, (0, 1)))(x, weights)
    names = [f"lka_d_{layer}{part}" for layer in LAYERS for part in ("", "_bias")]
    return {"lka_y": out(x, weights), "lka_dx": d_x} | dict(zip(names, d_weights, strict=True))


def _block(case: Case) -> dict[str, Any]:
    config, x = case.meta["config"], case["block_x"].astype(np.float64)
    channels = x.shape[-1]
    sizes = {"channels": channels, "hidden": int(channels * config["block_mlp_ratio"])}
    made = VANBlock(**sizes, **_attention(case, "block.attn."), **WIDE, rngs=nnx.Rngs(0))
    nnx.update(made, fill(nnx.state(made), _torch_layout(case, "block."), van_block_name))
    block: Any = _options(made, case)
    outputs = {
        "block_attn_y": block.attention(x),
        "block_mlp_y": block.mlp(x),
        "block_y_eval": block(x),
        "block_y_train": block(x, train=True),
    }
    for name, norm in (("norm1", block.attention_norm), ("norm2", block.mlp_norm)):
        outputs |= {f"block_{name}_running_{part}_after": getattr(norm, part)[...] for part in ("mean", "var")}
    return outputs


def _model(case: Case) -> dict[str, Any]:
    given, x = case.meta["config"]["model"], case["model_x"].astype(np.float64)
    config = VANConfig(
        num_classes=case.meta["config"]["num_classes"],
        in_channels=x.shape[-1],
        widths=tuple(given["embed_dims"]),
        depths=tuple(given["depths"]),
        mlp_ratios=tuple(given["mlp_ratios"]),
        drop_path=0.0,
        dtype="float64",
        param_dtype="float64",
        **_attention(case, "model.block1.0.attn."),
    )
    model = VAN(config, rngs=nnx.Rngs(0))
    nnx.update(model, load_torch(config, _torch_layout(case, "model.")))
    model = _options(model, case)
    features = model.features(x)[-1]
    return {"model_features": jnp.mean(features, axis=(1, 2)), "model_logits": model(x)}


def _attention(case: Case, prefix: str) -> dict[str, Any]:
    """The kernel that the arrays stand for: K is what ceil(K / d) taps can be at least, more gives the same."""
    dilation = case.meta["config"].get("dilation", 3)
    taps = case[f"{prefix}spatial_gating_unit.conv_spatial.weight"].shape[0]
    return {"kernel": dilation * (taps - 1) + 1, "dilation": dilation}


def _torch_layout(case: Case, prefix: str) -> dict[str, np.ndarray]:
    """The state dict as PyTorch has it."""
    order = {2: (1, 0), 4: (3, 2, 0, 1)}
    arrays = {name.removeprefix(prefix): case[name].astype(np.float64) for name in case if name.startswith(prefix)}
    return {name: array.transpose(order.get(array.ndim, range(array.ndim))) for name, array in arrays.items()}


def _options(module: Any, case: Case) -> Any:
    """The module with the file's constants of its norms."""
    config = case.meta["config"]
    for _, part in nnx.iter_modules(module):
        if isinstance(part, BatchNorm):
            part.eps, part.momentum = config["bn_eps"], config["bn_momentum_torch"]
        elif isinstance(part, nnx.LayerNorm):
            part.epsilon = config["ln_eps"]
    return module
