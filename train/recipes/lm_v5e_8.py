"""A hybrid of 0.3 B parameters for one host of eight TPU v5e, 16 GB each.

    python -m train compile lm_v5e_8 --topology v5e:2x4
    python -m train run lm_v5e_8 --data.source 'text/*.jsonl'

Weights and optimiser are split over the eight chips, and so is the batch. The tokenizer is trained on the text.
"""

from jattn.models.lm import LMConfig
from train.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, SampleConfig, ScheduleConfig


def config() -> RunConfig:
    return RunConfig(
        model=LMConfig(
            vocab_size=32768,
            width=1024,
            num_layers=20,
            pattern=("lightning", "lightning", "lightning", "sliding_window"),
            num_heads=8,
            mlp_width=2816,
            mixer_options={"lightning": {"gate_rank": 128}, "sliding_window": {"window": 512}},
            remat="full",
        ),
        # No source: which text it is only you know.
        data=DataConfig(source=(), tokenizer="train", context=4096, batch=32, holdout=0.01),
        optimizer=OptimizerConfig(name="adamw", learning_rate=6e-4, weight_decay=0.1),
        schedule=ScheduleConfig(steps=20000, warmup=0.05, decay="cosine", final=0.1),
        mesh=MeshConfig(data=1, fsdp=8),
        precision="bfloat16",
        sample=SampleConfig(prompts=("The ",), tokens=500),
        eval_every=1000,
        save_every_seconds=600.0,
    )
