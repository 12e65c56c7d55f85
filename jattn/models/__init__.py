"""Models made of the library's layers."""

from jattn.models.generate import generate
from jattn.models.lm import LM, LMConfig

__all__ = ["LM", "LMConfig", "generate"]
