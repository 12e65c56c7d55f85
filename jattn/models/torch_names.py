"""Released PyTorch weights for the image classifiers: which array is which parameter, and in which layout.

    dense W [out, in]            -> kernel [in, out]
    convolution [O, I, H, W]     -> kernel [H, W, I, O];   along a strip [O, I, k] -> [k, I, O]
    all else as it is

Names are those of the authors' state dicts: Visual-Attention-Network/VAN-Classification (models/van.py),
SHI-Labs/Neighborhood-Attention-Transformer (classification/nat.py, dinat.py, dinats.py, isotropic.py) and torchvision's
ResNet, whose bottlenecks hold ELA as `feat1` in Xuwei86/ELA_Code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.models.ela_resnet import ELAResNetConfig
from jattn.models.nat import NATConfig
from jattn.models.van import VANConfig
from jattn.models.vision import build

Path = tuple[Any, ...]

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# Which of our axes stands where in PyTorch's array, for kernels of dense layers, of strips and of images.
_ORDER = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}

_VAN_BLOCK = {
    "attention_norm": "norm1",
    "attention.proj_in": "attn.proj_1",
    "attention.lka.near": "attn.spatial_gating_unit.conv0",
    "attention.lka.far": "attn.spatial_gating_unit.conv_spatial",
    "attention.lka.mix": "attn.spatial_gating_unit.conv1",
    "attention.proj_out": "attn.proj_2",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.near": "mlp.dwconv.dwconv",
    "mlp.down": "mlp.fc2",
    "attention_scale": "layer_scale_1",
    "mlp_scale": "layer_scale_2",
}

_NAT_BLOCK = {
    "attention_norm": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.rel_pos_bias": "attn.rpb",
    "attention.out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "attention_scale": "gamma1",
    "mlp_scale": "gamma2",
}

_BOTTLENECK = {
    "narrow": "conv1",
    "narrow_norm": "bn1",
    "middle": "conv2",
    "middle_norm": "bn2",
    "attention.kernel": "feat1.conv.weight",
    "attention": "feat1.gn",
    "widen": "conv3",
    "widen_norm": "bn3",
    "shortcut": "downsample.0",
    "shortcut_norm": "downsample.1",
}


def load_torch(config: Any, state: Mapping[str, Any]) -> nnx.State:
    """The parameters and running statistics of `build(config)` from a released state dict.

        nnx.update(model, load_torch(config, state))

    Args:
      config: of a model that was released.
      state: arrays by name, as NumPy has them. Counters of batches, which no model here keeps, are passed over. Numbers
        are converted to the parameters' dtype.

    Raises:
      TypeError: of such a model there are no released weights that are known here.
      ValueError: arrays are missing, left over or of another shape; the message names them.
    """
    if type(config) not in _NAMES:
        kinds = ", ".join(kind.__name__ for kind in _NAMES)
        raise TypeError(f"config: names are known for {kinds}, got {type(config).__name__}")
    like = nnx.state(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    return fill(like, state, lambda path: _NAMES[type(config)](config, path))


def fill(like: nnx.State, state: Mapping[str, Any], name_of: Callable[[Path], str]) -> nnx.State:
    """`like`, arrays or their shapes, with the arrays of `state`; `name_of` gives each path its name there."""
    given = {name: np.asarray(array) for name, array in state.items() if not name.endswith("num_batches_tracked")}
    filled: dict[Any, Any] = {}
    problems, known = [], set()
    for path, variable in nnx.to_flat_state(like):
        name = name_of(path)
        known.add(name)
        order = _ORDER[len(variable.shape)] if path[-1] == "kernel" else tuple(range(len(variable.shape)))
        shape = tuple(variable.shape[axis] for axis in order)
        if name not in given:
            problems.append(f"{name} is missing")
        elif given[name].shape != shape:
            problems.append(f"{name} is {list(given[name].shape)}, wanted {list(shape)}")
        else:
            array = given[name].transpose(np.argsort(order))
            filled[path] = variable.replace(jnp.asarray(array, variable.dtype))
    problems += [f"{name} is left over" for name in given if name not in known]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"state: it does not fit the model: {'; '.join(problems[:8])}{more}")
    return nnx.from_flat_state(filled)


def van_name(config: VANConfig, path: Path) -> str:
    """As models/van.py has it: stages are counted from 1."""
    del config
    if path[0] == "head":
        return _named(path, {"head": "head"})
    stage, inside = int(path[1]) + 1, path[2:]
    if inside[0] == "blocks":
        return f"block{stage}.{inside[1]}.{van_block_name(inside[2:])}"
    return _named(
        inside, {"embed": f"patch_embed{stage}.proj", "embed_norm": f"patch_embed{stage}.norm", "norm": f"norm{stage}"}
    )


def van_block_name(path: Path) -> str:
    return _named(path, _VAN_BLOCK)


def nat_name(config: NATConfig, path: Path) -> str:
    """As nat.py and dinat.py have it, dinats.py in layout "swin", and isotropic.py where that has a single stage."""
    conv = config.layout == "conv"
    if path[0] == "embed":
        first = f"patch_embed.proj.{path[2]}" if conv else "patch_embed.proj"
        return _named(path[1:], {f"convolutions.{path[2]}": first, "norm": "patch_embed.norm"})
    if path[0] != "stages":
        return _named(path, {"norm": "norm", "head": "head"})
    stage, inside = f"{'levels' if conv else 'layers'}.{path[1]}", path[2:]
    if inside[0] == "downsample":
        return (
            f"{stage}.{_named(inside, {f'downsample.{part}': f'downsample.{part}' for part in ('reduction', 'norm')})}"
        )
    isotropic = not conv and len(config.depths) == 1
    block = f"layers.{inside[1]}" if isotropic else f"{stage}.blocks.{inside[1]}"
    return f"{block}.{_named(inside[2:], _NAT_BLOCK)}"


def resnet_name(config: ELAResNetConfig, path: Path) -> str:
    """As torchvision has it."""
    del config
    if path[0] != "stages":
        return _named(path, {"stem": "conv1", "stem_norm": "bn1", "head": "fc"})
    return f"layer{int(path[1]) + 1}.{path[2]}.{_named(path[3:], _BOTTLENECK)}"


def _named(path: Path, table: Mapping[str, str]) -> str:
    """The table's name of a parameter by itself, or of its layer with the leaf's name behind."""
    whole = ".".join(map(str, path))
    if whole in table:
        return table[whole]
    layer, _, leaf = whole.rpartition(".")
    return f"{table[layer]}.{_LEAVES[leaf]}"


_NAMES: Mapping[type, Callable[[Any, Path], str]] = {
    VANConfig: van_name,
    NATConfig: nat_name,
    ELAResNetConfig: resnet_name,
}
