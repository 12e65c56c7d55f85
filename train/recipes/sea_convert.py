"""A trained softmax model that reads few keys: SEA's estimator learns where its attention lies, then all is trained on.

    python -m train run softmax_lm
    python -m train run sea_convert

Another run with softmax layers is named by `--conversion.source`; where its model is another one, the message has the
overrides to add. `conversion.json` in the folder has the losses of the estimator, and the held-out figures of the
softmax model and of the converted one before it was trained on.
"""

import dataclasses

from train.config import ConversionConfig, OptimizerConfig, RunConfig, ScheduleConfig
from train.recipes import softmax_lm


def config() -> RunConfig:
    base = softmax_lm.config()
    estimator = {"k_budget": 32, "predictor_length": 64, "max_length": base.data.context}
    rotary = {"qk_norm": True, "rope_theta": 10_000.0}
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, pattern=("sea",), mixer_options={"sea": {**estimator, **rotary}}),
        conversion=ConversionConfig(source="runs/softmax_lm"),
        optimizer=OptimizerConfig(name="muon", matrix_learning_rate=0.005, learning_rate=0.001),
        schedule=ScheduleConfig(steps=200, warmup=0.1, decay="linear"),
    )
