"""A byte-level language model of CPython's own reference text, which every Python carries.

    python -m train run pydoc_lm

Two CPU cores, three minutes: 0.76 M parameters, half of the layers linear attention and half a window of softmax.
The run follows the clock, so a busy machine takes fewer steps and not more time.
"""

from jattn.models.lm import LMConfig
from train.config import DataConfig, OptimizerConfig, RunConfig, SampleConfig, ScheduleConfig


def config() -> RunConfig:
    return RunConfig(
        model=LMConfig(
            vocab_size=256,
            width=128,
            num_layers=4,
            pattern=("lightning", "sliding_window"),
            num_heads=4,
            mlp_width=320,
            mixer_options={"sliding_window": {"window": 128}},
        ),
        data=DataConfig(source=("pydoc",), context=512, batch=2),
        optimizer=OptimizerConfig(name="muon", matrix_learning_rate=0.03, learning_rate=0.006),
        # Start, compilation and training; sample text and report take what is left of three minutes.
        schedule=ScheduleConfig(seconds=155.0, warmup=0.03, decay="wsd", decay_fraction=0.6),
        sample=SampleConfig(prompts=("The ",), tokens=500),
        eval_every=None,
    )
