"""Multi-query associative recall, the synthetic task that tells attention from its cheaper relatives."""

from jattn.models.lm import LMConfig
from train.config import DataConfig, OptimizerConfig, RecallConfig, RunConfig, ScheduleConfig


def config() -> RunConfig:
    return RunConfig(
        model=LMConfig(vocab_size=512, width=64, num_layers=2, pattern=("softmax",), num_heads=1, mlp_width=128),
        data=DataConfig(recall=RecallConfig(task="mqar", pairs=4, power=0.01), context=64, batch=64),
        optimizer=OptimizerConfig(name="muon", matrix_learning_rate=0.03, learning_rate=0.02),
        schedule=ScheduleConfig(steps=500, warmup=0.1, decay="cosine"),
        eval_every=50,
    )
