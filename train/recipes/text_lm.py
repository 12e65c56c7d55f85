"""A byte-level language model of your own text.

    python -m train run text_lm --data.source my_folder
    python -m train run text_lm --data.source 'notes/*.md' books.jsonl --schedule.steps 5000 --workdir runs/books

Files, folders (walked), globs and .jsonl (`--data.field` names the field) are read; every tenth document is held out.
The default is 2000 steps of 4096 bytes. No figure is promised: it depends on your text, and the run prints its own.
"""

from jattn.models.lm import LMConfig
from train.config import DataConfig, OptimizerConfig, RunConfig, SampleConfig, ScheduleConfig


def config() -> RunConfig:
    return RunConfig(
        model=LMConfig(
            vocab_size=256,
            width=256,
            num_layers=6,
            pattern=("lightning", "lightning", "sliding_window"),
            num_heads=4,
            mlp_width=704,
            mixer_options={"sliding_window": {"window": 256}},
        ),
        # No source: which text it is only you know.
        data=DataConfig(source=(), context=1024, batch=4),
        optimizer=OptimizerConfig(name="muon", matrix_learning_rate=0.02, learning_rate=0.004),
        schedule=ScheduleConfig(steps=2000, warmup=0.03, decay="wsd", decay_fraction=0.6),
        sample=SampleConfig(prompts=("\n",), tokens=500),
        eval_every=200,
    )
