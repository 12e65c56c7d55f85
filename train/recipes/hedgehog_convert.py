"""A trained softmax model made linear: Hedgehog's feature maps learn its attention, then all weights are trained on.

    python -m train run softmax_lm
    python -m train run hedgehog_convert

Another run with softmax layers is named by `--conversion.source`; where its model is another one, the message has the
overrides to add. `conversion.json` in the folder has the losses of the maps, and the held-out figures of the softmax
model and of the converted one before it was trained on.
"""

import dataclasses

from train.config import ConversionConfig, OptimizerConfig, RunConfig, ScheduleConfig
from train.recipes import softmax_lm


def config() -> RunConfig:
    base = softmax_lm.config()
    maps = {"activation": "softmax_dim", "qk_norm": True, "rope_theta": 10_000.0}
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, pattern=("hedgehog",), mixer_options={"hedgehog": maps}),
        conversion=ConversionConfig(source="runs/softmax_lm"),
        optimizer=OptimizerConfig(name="muon", matrix_learning_rate=0.005, learning_rate=0.001),
        schedule=ScheduleConfig(steps=200, warmup=0.1, decay="linear"),
    )
