"""`pydoc_lm` with softmax attention in every layer: what `hedgehog_convert` begins with.

python -m train run softmax_lm
"""

import dataclasses

from train.config import RunConfig
from train.recipes import pydoc_lm


def config() -> RunConfig:
    base = pydoc_lm.config()
    return dataclasses.replace(base, model=dataclasses.replace(base.model, pattern=("softmax",), mixer_options={}))
