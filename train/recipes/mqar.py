"""Multi-query associative recall, the synthetic task that tells attention from its cheaper relatives."""

from jattn.models.lm import LMConfig
from train.config import DataConfig, OptimizerConfig, RecallConfig, RunConfig, ScheduleConfig


def config() -> RunConfig:
    return RunConfig(
        model=LMConfig(
            vocab_size=512,
            width=64,
            num_layers=2,
            pattern=("softmax",),
            num_heads=1,
            mlp_width=128,
            mixer_options={"softmax": {"rope_theta": 10000.0}},
        ),
        data=DataConfig(recall=RecallConfig(task="mqar", pairs=4), context=64, batch=64),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.003),
        schedule=ScheduleConfig(steps=1000, warmup=0.1, decay="cosine"),
        eval_every=100,
    )
