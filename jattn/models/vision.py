"""Image classifiers by their configuration: `build(config, rngs=...)`, and `VARIANTS`, the published ones by name.

All of them keep one contract:

    logits  = model(images, train=False, key=None)            [B, H, W, C] -> [B, classes]
    pyramid = model.features(images, train=False, key=None)   a tuple of [B, h, w, c], finest first
    flops   = model.flops(batch, height, width)               multiply-adds times two of a forward call

All that is trained is an `nnx.Param`. Running statistics of BatchNorm are `nnx.BatchStat`s, brought up to date in place
when training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

from jattn.models import ela_resnet, nat, van, vit
from jattn.models.ela_resnet import ELAResNet, ELAResNetConfig
from jattn.models.nat import NAT, NATConfig
from jattn.models.van import VAN, VANConfig
from jattn.models.vit import ViT, ViTConfig

Config = ViTConfig | NATConfig | VANConfig | ELAResNetConfig

_MODELS: Mapping[type, Callable[..., nnx.Module]] = {
    ViTConfig: ViT,
    NATConfig: NAT,
    VANConfig: VAN,
    ELAResNetConfig: ELAResNet,
}


def build(config: Config, *, rngs: nnx.Rngs) -> Any:
    """The model that `config` describes.

    Raises:
      TypeError: not a configuration of one of these models.
    """
    if type(config) not in _MODELS:
        names = ", ".join(kind.__name__ for kind in _MODELS)
        by_name = f"; VARIANTS[{config!r}] is one" if isinstance(config, str) and config in VARIANTS else ""
        raise TypeError(f"config: expected one of {names}, got {type(config).__name__}{by_name}")
    return _MODELS[type(config)](config, rngs=rngs)


VARIANTS: Mapping[str, Config] = MappingProxyType(
    {**vit.VARIANTS, **nat.VARIANTS, **van.VARIANTS, **ela_resnet.VARIANTS}
)
"""Configurations for ImageNet, by name."""
