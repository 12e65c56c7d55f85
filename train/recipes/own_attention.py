"""A mask and a score function of one's own, in a language model: copy this file, change the ten lines, run the copy.

    python -m train run own_attention
    python -m train run my_attention.py --data.source my_folder

Local attention with a few tokens that all may read, and ALiBi with slopes that are trained (Press et al. 2022; there
they are fixed).
"""

import dataclasses

import jax.numpy as jnp

from jattn.masks import Sink, SlidingWindow
from train.config import RunConfig
from train.recipes import pydoc_lm

mask = SlidingWindow(127) | Sink(4)


def alibi(score, b, h, q_pos, kv_pos, slopes):
    return score + slopes[h] * (kv_pos - q_pos)


def slopes(num_heads):
    return 2.0 ** (-8 * jnp.arange(1, num_heads + 1) / num_heads)


def config() -> RunConfig:
    base = pydoc_lm.config()
    names = {"mask": "mask", "score_mod": "alibi", "score_parameters": "slopes"}
    own = {option: f"{__file__}:{name}" for option, name in names.items()}
    model = dataclasses.replace(
        base.model,
        pattern=("lightning", "block_sparse"),
        mixer_options={"block_sparse": {**own, "rope_theta": None}},
    )
    return dataclasses.replace(base, model=model)
