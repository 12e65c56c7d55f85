"""Recall with attention, state space models and RNNs alike but for the mixer, at any size of the state.

    python -m train compare dsf_mqar --mixers softmax linear_transformer normalized_attention s6 ssd qlstm \\
        qlstm_reversed --model.head-dim 32

The comparison of Sieber et al. 2024, small: two layers of nothing but the mixer, no channel MLP for any (the released
configuration of normalised attention has one, the others have none). `model.head_dim` is the state expansion n: queries
and keys have n channels and S6 has n states for every channel of the width, while values keep the whole width. LRU,
qLSTM and RG-LRU have states of sizes of their own. Attention gets rotary positions in the place of learned ones.

Published: a vocabulary of 8192, (context, pairs) of (64, 4), (128, 8), (256, 16) and (512, 64), widths from 64 to 512
and n from 32 to 256.
"""

from jattn.models.lm import LMConfig
from train.config import DataConfig, OptimizerConfig, RecallConfig, RunConfig, ScheduleConfig

WIDTH = 64


def config() -> RunConfig:
    return RunConfig(
        model=LMConfig(
            vocab_size=512,
            width=WIDTH,
            num_layers=2,
            pattern=("softmax",),
            num_heads=1,
            head_dim=32,
            mlp="none",
            mixer_options={"softmax": {"value_dim": WIDTH, "qk_norm": False}},
        ),
        data=DataConfig(recall=RecallConfig(task="mqar", pairs=4, power=0.01), context=64, batch=64),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.01, weight_decay=0.1),
        schedule=ScheduleConfig(steps=3000, warmup=0.1, decay="cosine"),
        eval_every=250,
    )
