"""A hybrid of 1.3 B parameters with a context of 32,768 tokens, for a pod of TPUs.

    python -m train compile lm_1b --topology v5p:8x8x8
    python -m train compile lm_1b --topology v6e:16x16 --mesh.fsdp 16 --mesh.tensor 4 --mesh.context 4
    python -m train run lm_1b --data.source 'text/*.jsonl'

Three of four layers are linear attention, the fourth is a window of softmax; a step is 64 sequences, 2.1 M tokens.
The tokenizer is trained on the text. `compile` needs neither text nor TPU and says whether a pod holds the run.
"""

from jattn.models.lm import LMConfig
from train.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, SampleConfig, ScheduleConfig


def config() -> RunConfig:
    return RunConfig(
        model=LMConfig(
            vocab_size=32768,
            width=2048,
            num_layers=24,
            pattern=("lightning", "lightning", "lightning", "sliding_window"),
            num_heads=16,
            mlp_width=5120,
            mixer_options={"lightning": {"gate_rank": 128}, "sliding_window": {"window": 1024}},
            remat="full",
        ),
        # No source: which text it is only you know.
        data=DataConfig(source=(), tokenizer="train", context=32768, batch=64, holdout=0.01),
        optimizer=OptimizerConfig(name="adamw", learning_rate=3e-4, weight_decay=0.1),
        schedule=ScheduleConfig(steps=20000, warmup=0.05, decay="cosine", final=0.1),
        mesh=MeshConfig(data=1, fsdp=8, tensor=8, context=8),
        precision="bfloat16",
        sample=SampleConfig(prompts=("The ",), tokens=500),
        eval_every=1000,
        save_every_seconds=600.0,
    )
