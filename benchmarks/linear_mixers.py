"""Every linear mixer beside softmax: bits per byte (recipe pydoc_lm), recall (recipe mqar), speed, bytes of state.

One seed each, so differences of a few hundredths are nothing. Runs go on in runs/benchmark_linear_mixers.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.measure import Result, interleaved, ratio
from benchmarks.mixers import compared, row
from jattn import catalog
from train.compare import with_mixer
from train.config import RunConfig, ScheduleConfig
from train.data.load import load_data
from train.data.pipeline import TrainData
from train.evaluate import place
from train.recipes import mqar, pydoc_lm
from train.sharding import make_mesh
from train.step import make_program, resolve_precision

MIXERS = (
    "softmax", "lightning", "retnet", "simple_gla", "mamba2", "linear", "hgrn2", "delta_rule", "gated_delta_rule",
    "kda", "hedgehog", "linear_transformer", "normalized_attention", "s6", "rglru", "qlstm_reversed",
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
    rows, over_softmax = [], _steps_over_softmax(text)
    for mixer in MIXERS:
        by_text, by_recall = row(on_text, mixer), row(on_recall, mixer)
        rows.append(
            {
                "mixer": mixer,
                "parameters": by_text["parameters"],
                "bits per byte": by_text["bits per byte"],
                "mqar accuracy": by_recall["accuracy"],
                "step over softmax's": over_softmax[mixer],
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


def _steps_over_softmax(config: RunConfig) -> dict[str, float]:
    """Time of a bare training step, all mixers taking turns in one process."""
    calls: dict[str, Callable[[], Any]] = {}
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder:
        data = TrainData(load_data(config, Path(folder)).windows, config.data.batch)
    with data.iterator() as batches:
        batch = next(batches)
    for mixer in MIXERS:
        program = make_program(resolve_precision(with_mixer(config, mixer)), mesh)
        state = {"now": program.init(1)}
        placed, request = place(batch, program), program.request(0)

        def step(
            program: Any = program, state: dict[str, Any] = state, placed: Any = placed, request: Any = request
        ) -> Any:
            state["now"], _ = program.step(state["now"], placed, np.float32(1), request)
            return state["now"]

        calls[mixer] = step
    seconds = interleaved(calls, rounds=15)
    return {mixer: ratio(seconds, mixer, "softmax") for mixer in MIXERS}


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
