"""The optimisers: Muon for the matrices of the layers with Adam for the rest, or AdamW for all.

Learning rates are those at the top of the schedule; the step multiplies updates by the schedule's factor.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from train.config import OptimizerConfig
from train.sharding import path_name

# Kernels inside the stack of units are matrices, one for each unit; embeddings and heads are tables of vectors, which
# Adam serves better (Jordan et al. 2024).
_MATRIX = re.compile(r"units/.*/kernel")


def matrices(parameters: Any) -> Any:
    """Muon's view of each parameter: dimension numbers of a stacked matrix, or `None` for Adam."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: MuonDimensionNumbers(-2, -1) if _MATRIX.fullmatch(path_name(path)) else None, parameters
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The transformation from gradients to updates, clipping included."""
    if config.name == "muon":
        update = muon(
            config.matrix_learning_rate,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            adam_learning_rate=config.learning_rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=matrices,
        )
    else:
        update = optax.adamw(config.learning_rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
