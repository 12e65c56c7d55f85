"""Models made of the library's layers."""

from jattn.models.dit import ConditionCache, Conditions, DiT, DiTConfig, SubjectImage
from jattn.models.flow_matching import (
    csas_timesteps,
    euler_sample,
    flow_matching_loss,
    logit_normal,
    logit_normal_pdf,
)
from jattn.models.generate import generate
from jattn.models.lm import LM, LMConfig

__all__ = [
    "LM",
    "ConditionCache",
    "Conditions",
    "DiT",
    "DiTConfig",
    "LMConfig",
    "SubjectImage",
    "csas_timesteps",
    "euler_sample",
    "flow_matching_loss",
    "generate",
    "logit_normal",
    "logit_normal_pdf",
]
