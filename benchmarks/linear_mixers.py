"""Every linear mixer beside softmax: bits per byte (recipe pydoc_lm), recall (recipe mqar), speed, bytes of state.

One seed each, so differences of a few hundredths are nothing. Runs go on in runs/benchmark_linear_mixers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from benchmarks.measure import Result
from benchmarks.mixers import compared, row
from jattn import catalog
from train.config import ScheduleConfig
from train.recipes import mqar, pydoc_lm

MIXERS = (
    "softmax", "lightning", "retnet", "simple_gla", "linear", "hgrn2", "delta_rule", "gated_delta_rule", "kda",
    "hedgehog", "linear_transformer", "normalized_attention", "s6", "rglru", "qlstm_reversed",
)  # fmt: skip
TEXT_STEPS = 200
WORKDIR = Path("runs/benchmark_linear_mixers")


def run() -> Result:
    text = dataclasses.replace(pydoc_lm.config(), schedule=ScheduleConfig(steps=TEXT_STEPS))
    text = dataclasses.replace(text, model=dataclasses.replace(text.model, mixer_options={}))
    recall = mqar.config()
    on_text, on_recall = (
        compared(recipe, config, MIXERS, 1, WORKDIR, f"linear_mixers_{recipe}")
        for recipe, config in (("pydoc_lm", text), ("mqar", recall))
    )
    rows = []
    for mixer in MIXERS:
        by_text, by_recall = row(on_text, mixer), row(on_recall, mixer)
        rows.append(
            {
                "mixer": mixer,
                "parameters": by_text["parameters"],
                "bits per byte": by_text["bits per byte"],
                "mqar accuracy": by_recall["accuracy"],
                "tokens/s": by_text["tokens/s"],
                "state bytes": _state_bytes(mixer, text.model, text.data.context),
            }
        )
    softmax = next(row for row in rows if row["mixer"] == "softmax")
    return Result(
        f"One seed; pydoc_lm for {TEXT_STEPS} steps, mqar as it is; state of one layer and row after "
        f"{text.data.context} tokens",
        rows,
        [("accuracy of softmax on mqar", softmax["mqar accuracy"], 0.99, "at least")],
    )


def _state_bytes(mixer: str, model: Any, length: int) -> int:
    """Of one layer for one row of `length` tokens, float32."""
    layer = catalog.get(mixer).load_layer()

    def state() -> Any:
        built = layer(
            model.width,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            layer_index=0,
            num_layers=model.num_layers,
            rngs=nnx.Rngs(0),
        )
        return built.init_state(1, length, "float32")

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(state)))
