"""Models made of the library's layers."""

from jattn.models.dit import ConditionCache, Conditions, DiT, DiTConfig, SubjectImage
from jattn.models.ela_resnet import ELAResNet, ELAResNetConfig
from jattn.models.flow_matching import (
    csas_timesteps,
    euler_sample,
    flow_matching_loss,
    logit_normal,
    logit_normal_pdf,
)
from jattn.models.generate import generate
from jattn.models.lm import LM, LMConfig
from jattn.models.nat import NAT, NATConfig
from jattn.models.torch_names import load_torch
from jattn.models.van import VAN, VANConfig
from jattn.models.vision import VARIANTS, build
from jattn.models.vit import ViT, ViTConfig

__all__ = [
    "ConditionCache",
    "Conditions",
    "DiT",
    "DiTConfig",
    "ELAResNet",
    "ELAResNetConfig",
    "LM",
    "LMConfig",
    "NAT",
    "NATConfig",
    "SubjectImage",
    "VAN",
    "VANConfig",
    "VARIANTS",
    "ViT",
    "ViTConfig",
    "build",
    "csas_timesteps",
    "euler_sample",
    "flow_matching_loss",
    "generate",
    "load_torch",
    "logit_normal",
    "logit_normal_pdf",
]
