"""The ResNet with efficient local attention against NumPy on torchvision's names, and its parameters."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jattn.models.ela_resnet import ELAResNetConfig
from jattn.models.torch_names import load_torch
from jattn.models.vision import VARIANTS, build
from jattn.vision.efficient_local import VARIANTS as SETTINGS
from tests.models.plain import batch_norm, conv2d, max_pool, random_state
from tests.models.test_vision import structure
from tests.vision.test_efficient_local import slow as slow_ela

C, CLASSES = 3, 5
SMALL = ELAResNetConfig(
    num_classes=CLASSES, in_channels=C, widths=(16, 32), depths=(2, 1), attention="S", stem_width=6
)  # fmt: skip


def released_shapes(config):
    """As torchvision's resnet.py names them, with ELA as `feat1` in its bottlenecks."""
    kernel = 3 if config.stem_stride == 1 else 7
    shapes = {"conv1.weight": (config.stem_width, config.in_channels, kernel, kernel)}
    norms = {"bn1": config.stem_width}
    before = config.stem_width
    for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        for index in range(depth):
            name = f"layer{stage + 1}.{index}"
            shapes |= {f"{name}.conv1.weight": (width, before, 1, 1), f"{name}.conv2.weight": (width, width, 3, 3)}
            shapes |= {f"{name}.conv3.weight": (4 * width, width, 1, 1)}
            norms |= {f"{name}.bn1": width, f"{name}.bn2": width, f"{name}.bn3": 4 * width}
            if config.attention is not None:
                taps, group, _ = SETTINGS[config.attention]
                shapes |= {f"{name}.feat1.conv.weight": (width, group, taps)}
                shapes |= {f"{name}.feat1.gn.{part}": (width,) for part in ("weight", "bias")}
            if index == 0:
                shapes |= {f"{name}.downsample.0.weight": (4 * width, before, 1, 1)}
                norms |= {f"{name}.downsample.1": 4 * width}
            before = 4 * width
    for name, width in norms.items():
        shapes |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {"fc.weight": (config.num_classes, before), "fc.bias": (config.num_classes,)}


def plain(config, w, x):
    """The model in NumPy from a state dict."""

    def norm(name, x):
        return batch_norm(x, *(w[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")))

    def relu(x):
        return np.maximum(x, 0)

    kernel, stride = (3, 1) if config.stem_stride == 1 else (7, 2)
    x = relu(norm("bn1", conv2d(x, w["conv1.weight"], stride=stride, padding=kernel // 2)))
    if config.stem_stride == 4:
        x = max_pool(x)
    for stage, depth in enumerate(config.depths):
        for index in range(depth):
            name, stride = f"layer{stage + 1}.{index}", 2 if stage and not index else 1
            y = relu(norm(f"{name}.bn1", conv2d(x, w[f"{name}.conv1.weight"])))
            y = relu(norm(f"{name}.bn2", conv2d(y, w[f"{name}.conv2.weight"], stride=stride, padding=1)))
            if config.attention is not None:
                _, width, groups = SETTINGS[config.attention]
                weights = (w[f"{name}.feat1.{part}"] for part in ("conv.weight", "gn.weight", "gn.bias"))
                kernel, scale, bias = weights
                options = {"feature_groups": y.shape[-1] // width, "num_groups": groups}
                gated = slow_ela(y, kernel.transpose(2, 1, 0), scale, bias, **options)
                y = y + gated if config.shortcut else gated
            y = norm(f"{name}.bn3", conv2d(y, w[f"{name}.conv3.weight"]))
            if f"{name}.downsample.0.weight" in w:
                x = norm(f"{name}.downsample.1", conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride))
            x = relu(x + y)
    return x.mean((1, 2)) @ w["fc.weight"].T + w["fc.bias"]


@pytest.mark.parametrize(
    "change",
    [{}, {"attention": "B", "shortcut": True, "stem_stride": 2}, {"attention": None, "stem_stride": 1}],
    ids=["ela", "shortcut", "plain"],
)
def test_is_the_definition_on_released_names(change):
    config = dataclasses.replace(SMALL, dtype="float64", param_dtype="float64", **change)
    weights = {name: array.astype(np.float64) for name, array in random_state(released_shapes(config)).items()}
    x = np.random.default_rng(1).standard_normal((2, 13, 17, C))
    with jax.enable_x64(True):
        model = build(config, rngs=nnx.Rngs(0))
        nnx.update(model, load_torch(config, weights | {"bn1.num_batches_tracked": np.array(7)}))
        got = np.asarray(jax.jit(model.__call__)(x))
    want = plain(config, weights, x)
    np.testing.assert_allclose(got, want, atol=1e-9 * np.abs(want).max())
    assert np.abs(want).max() > 0.1


def test_parameters_of_resnet50():
    config = VARIANTS["resnet50"]
    parameters, statistics = nnx.split_state(structure(config)[1], nnx.Param, nnx.BatchStat)
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == 25_557_032
    shapes = released_shapes(config)
    running = sum(int(np.prod(shape)) for name, shape in shapes.items() if "running" in name)
    assert running == sum(leaf.size for leaf in jax.tree.leaves(statistics))


@pytest.mark.parametrize("variant", ["T", "B", "S", "L"])
def test_parameters_of_the_attention(variant):
    """k C (C / g) + 2 C in each of 16 bottlenecks."""
    state = nnx.filter_state(structure(VARIANTS[f"ela_resnet50_{variant.lower()}"])[1], nnx.Param)
    taps, width = {"T": (5, 1), "B": (7, 1), "S": (5, 8), "L": (7, 8)}[variant]
    blocks = {64: 3, 128: 4, 256: 6, 512: 3}
    extra = sum(count * (taps * width + 2) * channels for channels, count in blocks.items())
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 25_557_032 + extra


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"widths": (24, 32)},
            r"widths: ELA-S normalises .* needs multiples of 16, got \(24, 32\)",
        ),
        ({"attention": "M"}, "attention: expected one of 'T', 'B', 'S', 'L', None, got 'M'"),
        ({"stem_stride": 3}, "stem_stride: expected one of 1, 2, 4, got 3"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
