"""Adapter of `sea`: every stage of a layer, one after the other, and the loss of the whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jattn.linear.sea import sea_attention, token_reach
from jattn.linear.sea_estimator import decode_rows, encode, performer_context, two_way_positions, value_input
from jattn.linear.sea_loss import sea_distillation_loss
from jattn.linear.sea_params import CausalCNN, Dense, Norm, SEAParams, TwoWayCNN
from jattn.linear.sea_selection import sea_interpolate
from jattn.linear.sea_sparse import kept_keys, sparse_weights
from tests.golden.adapters.linear import _prefixes, _present, _read
from tests.golden.harness import Case, Tolerance, adapter

TABLE = "param_v_eye_learned_causal"


@adapter(
    "sea",
    tolerances={
        "*mask_keep": Tolerance(0, "booleans"),
        "*performer_v": Tolerance(2e-6, "float32 rounding of a position among the channels in the reference"),
        "*performer_context": Tolerance(5e-6, "float32 rounding of exponentials and of a sum over all tokens"),
        "*est_*": Tolerance(2e-5, "float32 rounding through three LayerNorms and three layers of convolutions"),
        "*": Tolerance(5e-6, "float32 rounding through a sum over all tokens, a LayerNorm and a product"),
    },
    # Some selections have one implementation: `None` takes "xla" for the others.
    implementations=("reference", None),
)
def sea(case: Case) -> dict[str, Any]:
    """`[p]q, k, v, keep, ...` are a layer, causal if it has a table of positions; p names it in the configuration.

    No stage is fed what the file says of the stage before: each has all earlier ones in it.
    """
    outputs: dict[str, Any] = {}
    for prefix in _prefixes(case, "q", "k", "v"):
        outputs |= {prefix + name: output for name, output in _layer(case, prefix).items()}
    return _present(case, outputs)


def _layer(case: Case, prefix: str) -> dict[str, Any]:
    query, key, value = (_read(case, prefix + name) for name in "qkv")
    is_causal = prefix + TABLE in case
    params = _params(case, prefix)
    keep = jnp.asarray(case[prefix + "keep"], bool)
    names = ("teacher_scores", "teacher_context")
    teacher = [_read(case, prefix + name) for name in names] if prefix + "loss" in case else None
    config = case.meta["config"]
    config = {**config, **config.get(prefix.rstrip("_"), {})}
    budget = {"k_budget": config["k"], "k_oversample": config.get("k_oversample", 1.0)}
    # Queries of a causal layer come scaled.
    scale = 1.0 if is_causal else query.shape[-1] ** -0.5
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "k_flatten_dim": config["kdim"], **budget}

    @jax.jit
    def compute(query: Any, key: Any, value: Any, params: SEAParams, teacher: Any) -> dict[str, jax.Array]:
        value = jnp.where(keep[:, :, None, None], value, 0)
        mask = keep[:, None, None, :]
        positions = two_way_positions(keep, query.shape[-1])
        if params.positions is not None:
            positions = jnp.broadcast_to(params.positions[: query.shape[1]], positions.shape)
        values = value_input(value, positions, keep)
        context, _ = performer_context(query, key, values, params.projection, keep, is_causal=is_causal)
        encoding = encode(context, value, params)
        out, made = sea_attention(
            query,
            key,
            value,
            params,
            mask,
            return_intermediates=True,
            implementation=case.implementation,
            **options,
        )
        probabilities = jax.nn.softmax(made.estimate, axis=-1)
        reach = token_reach(keep, query, is_causal=is_causal)
        kept = kept_keys(made.cells, reach, **budget)
        gate = jnp.moveaxis(jax.nn.sigmoid(made.gates[..., 0]), 1, 2)[..., None]
        made_of_teacher = {}
        if teacher is not None:
            logits, output = teacher[0], teacher[1].reshape(out.shape)
            loss = sea_distillation_loss(query, key, value, params, logits, output, mask, **options)
            made_of_teacher = {"loss": loss}
        return made_of_teacher | {
            "performer_v": values,
            "performer_context": context,
            "enc": encoding,
            "dec_row": jnp.swapaxes(decode_rows(encoding, params, is_causal=is_causal), 1, 2),
            "est_score": made.estimate,
            "est_probs_m": probabilities,
            "est_probs_t": sea_interpolate(probabilities, reach, 0.0),
            "mask_keep": kept,
            "sparse_probs": gate * sparse_weights(query, key, kept, scale),
            "scales_logit": made.gates,
            "context": out.reshape(*out.shape[:2], -1),
        }

    return compute(query, key, value, params, teacher)


def _params(case: Case, prefix: str) -> SEAParams:
    """The official module's weights: linear layers [out, in], convolutions [out, in, rows, columns]."""

    def read(name: str) -> tuple[jax.Array, jax.Array]:
        name = f"{prefix}param_attention_predictor_{name}"
        return _read(case, f"{name}_weight"), _read(case, f"{name}_bias")

    def dense(name: str) -> Dense:
        weight, bias = read(name)
        if weight.ndim == 2:
            return Dense(weight.T, bias)
        # Of the 2 k - 1 rows of a causal convolution the last k - 1 would look ahead, and are masked.
        return Dense(jnp.transpose(weight, (2, 3, 1, 0))[: weight.shape[3]], bias)

    is_causal = prefix + TABLE in case
    cnn: CausalCNN | TwoWayCNN
    if is_causal:
        layers = (dense(f"cnn_1_net_{i}") for i in (0, 2, 5))
        cnn = CausalCNN(Norm(*read("cnn_0")), *layers, Norm(*read("cnn_2")))
    else:
        cnn = TwoWayCNN(*(dense(f"cnn_0_net_{i}") for i in (0, 2, 5)))
    return SEAParams(
        projection=_read(case, prefix + "performer_projection"),
        positions=_read(case, prefix + TABLE)[0, 0] if is_causal else None,
        encoder=dense("enc_0"),
        encoder_norm=Norm(*read("enc_1")),
        rows=dense("dec_row_0"),
        gates=dense("dec_scaler_0"),
        cnn=cnn,
    )
