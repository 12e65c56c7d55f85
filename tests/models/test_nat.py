"""Neighborhood attention transformers against NumPy on released names, their dilations, images that are too small."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jattn.models.nat import NATConfig
from jattn.models.torch_names import load_torch
from jattn.models.vision import VARIANTS, build
from tests.models.plain import conv2d, gelu, layer_norm, neighborhood, random_state
from tests.models.test_vision import CONFIGS, structure

CLASSES, C = 5, 3
CONV = NATConfig(
    num_classes=CLASSES, in_channels=C, width=8, depths=(2, 1), num_heads=(2, 4), dilations=(2, 1), kernel_size=3,
    mlp_ratio=1.5, stem_stride=2, layer_scale=1e-5,
)  # fmt: skip
SWIN = dataclasses.replace(CONV, layout="swin", layer_scale=None)


def block_shapes(prefix, width, heads, config):
    hidden, offsets = int(config.mlp_ratio * width), 2 * config.kernel_size - 1
    shapes = {
        "norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,), "attn.rpb": (heads, offsets, offsets), "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
        "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (width, hidden),
        "mlp.fc2.bias": (width,),
    }  # fmt: skip
    if config.layer_scale is not None:
        shapes |= {"gamma1": (width,), "gamma2": (width,)}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def released_shapes(config):
    """Names and shapes as nat.py, dinats.py and isotropic.py define them, written out from those files."""
    conv, width = config.layout == "conv", config.width
    shapes = {"patch_embed.norm.weight": (width,), "patch_embed.norm.bias": (width,)}
    if conv:
        shapes |= {"patch_embed.proj.0.weight": (width // 2, config.in_channels, 3, 3)}
        shapes |= {"patch_embed.proj.0.bias": (width // 2,), "patch_embed.proj.1.bias": (width,)}
        shapes |= {"patch_embed.proj.1.weight": (width, width // 2, 3, 3)}
    else:
        side = config.stem_stride
        shapes |= {
            "patch_embed.proj.weight": (width, config.in_channels, side, side),
            "patch_embed.proj.bias": (width,),
        }
    stages = len(config.depths)
    for stage, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        name = f"{'levels' if conv else 'layers'}.{stage}"
        for index in range(depth):
            prefix = f"layers.{index}" if stages == 1 else f"{name}.blocks.{index}"
            shapes |= block_shapes(prefix, width, heads, config)
        if stage + 1 < stages:
            over, normal = ((2 * width, width, 3, 3), 2 * width) if conv else ((2 * width, 4 * width), 4 * width)
            shapes |= {f"{name}.downsample.reduction.weight": over}
            shapes |= {f"{name}.downsample.norm.{part}": (normal,) for part in ("weight", "bias")}
            width *= 2
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return shapes | {"head.weight": (config.num_classes, width), "head.bias": (config.num_classes,)}


def plain(config, w, x):
    """The model in NumPy from a state dict."""
    conv = config.layout == "conv"

    def norm(name, x):
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def dense(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def pad(x, multiple):
        return np.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, -x.shape[2] % multiple), (0, 0)))

    if conv:
        for index, stride in enumerate((min(config.stem_stride, 2), max(config.stem_stride // 2, 1))):
            name = f"patch_embed.proj.{index}"
            x = conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=stride, padding=1)
    else:
        name, side = "patch_embed.proj", config.stem_stride
        x = conv2d(pad(x, side), w[f"{name}.weight"], w[f"{name}.bias"], stride=side)
    x = norm("patch_embed.norm", x)
    for stage, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        level = f"{'levels' if conv else 'layers'}.{stage}"
        for index in range(depth):
            name = f"layers.{index}" if len(config.depths) == 1 else f"{level}.blocks.{index}"
            dilation = config.dilations[stage] if index % 2 else 1
            qkv = dense(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).reshape(*x.shape[:-1], 3, heads, -1)
            parts = np.moveaxis(qkv, -3, 0)
            out = neighborhood(*parts, w[f"{name}.attn.rpb"], config.kernel_size, dilation).reshape(x.shape)
            x = x + dense(f"{name}.attn.proj", out) * w.get(f"{name}.gamma1", 1.0)
            out = dense(f"{name}.mlp.fc2", gelu(dense(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))))
            x = x + out * w.get(f"{name}.gamma2", 1.0)
        down = f"{level}.downsample"
        if f"{down}.reduction.weight" in w and conv:
            x = norm(f"{down}.norm", conv2d(x, w[f"{down}.reduction.weight"], stride=2, padding=1))
        elif f"{down}.reduction.weight" in w:
            x = pad(x, 2)
            corners = x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]
            x = norm(f"{down}.norm", np.concatenate(corners, -1)) @ w[f"{down}.reduction.weight"].T
    return dense("head", norm("norm", x).mean((1, 2)))


@pytest.mark.parametrize(
    "config",
    [CONV, SWIN, dataclasses.replace(SWIN, depths=(3,), num_heads=(2,), dilations=(2,), stem_stride=3)],
    ids=["nat", "dinat_s", "isotropic"],
)
def test_is_the_definition_on_released_names(config):
    """Weights by the authors' names and in PyTorch's layout, through code that shares nothing with the models'."""
    config = dataclasses.replace(config, dtype="float64", param_dtype="float64")
    weights = {name: array.astype(np.float64) for name, array in random_state(released_shapes(config)).items()}
    x = np.random.default_rng(1).standard_normal((2, 23, 21, C))
    with jax.enable_x64(True):
        model = build(config, rngs=nnx.Rngs(0))
        nnx.update(model, load_torch(config, weights))
        got = np.asarray(jax.jit(model.__call__)(x))
    np.testing.assert_allclose(got, plain(config, weights, x), atol=1e-9)


@pytest.mark.parametrize("name", ["nat_mini", "nat_base", "dinat_large", "dinat_s_tiny", "dinat_isotropic_small"])
def test_released_shapes_fit_every_parameter(name):
    config = VARIANTS[name]
    count = sum(int(np.prod(shape)) for shape in released_shapes(config).values())
    assert count == sum(leaf.size for leaf in jax.tree.leaves(structure(config)[1]))


def test_released_weights_of_the_published_size_load():
    config = VARIANTS["nat_mini"]
    weights = random_state(released_shapes(config))
    loaded = load_torch(config, weights)
    assert jax.tree.structure(loaded) == jax.tree.structure(structure(config)[1])
    kernel = loaded["stages"][2]["blocks"][5]["attention"]["qkv"]["kernel"][...]
    np.testing.assert_array_equal(kernel, weights["levels.2.blocks.5.attn.qkv.weight"].T)


def test_dilations_alternate():
    config = VARIANTS["dinat_mini"]
    assert [config.block_dilations(stage) for stage in range(4)] == [
        (1, 8, 1), (1, 4, 1, 4), (1, 2, 1, 2, 1, 2), (1,) * 5,
    ]  # fmt: skip
    assert {d for stage in range(4) for d in VARIANTS["nat_mini"].block_dilations(stage)} == {1}
    config = VARIANTS["dinat_isotropic_small"]
    assert config.block_dilations(0) == (1, 2) * 6


@pytest.mark.parametrize(
    ("change", "least"),
    [
        ({}, 16 + 5),
        ({"stem_stride": 1}, 8 + 3),
        ({"dilations": None}, 1 + 2 * 4),
        ({"clamp_window": True}, 5),
        ({"layout": "swin"}, 16 + 5),
    ],
)
def test_the_least_image_is_the_least_that_runs(change, least):
    """`least` was worked out by hand: the side at which every window and its dilation fit its stage."""
    config = dataclasses.replace(CONFIGS["nat"], depths=(1, 2), dilations=(1, 2), stem_stride=2)
    config = dataclasses.replace(config, **change)
    assert config.least_side() == least
    graph, state = structure(config)

    def run(side):
        images = np.zeros((1, side, least + 3, 2), np.float32)
        return jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, images)

    assert run(least).shape == (1, 5)
    shrink = "" if config.clamp_window else ".*clamp_window=True"
    message = f"images: the windows of 3 tokens need {least} pixels along each side or more, got {least - 1} x{shrink}"
    with pytest.raises(ValueError, match=message):
        run(least - 1)


def test_published_models_run_on_224_pixels():
    assert VARIANTS["nat_mini"].least_side() == 193
    for name in ("dinat_mini", "dinat_s_tiny", "dinat_isotropic_small"):
        assert 193 <= VARIANTS[name].least_side() <= 224


def test_digits_of_8_by_8_pixels_fit():
    config = NATConfig(
        num_classes=10, in_channels=1, width=16, depths=(1, 1), num_heads=(2, 4), kernel_size=3, stem_stride=1
    )
    assert config.least_side() <= 8
    graph, state = structure(config)
    images = np.zeros((2, 8, 8, 1), np.float32)
    assert jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, images).shape == (2, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "patch"}, "layout: expected one of 'conv', 'swin', got 'patch'"),
        ({"stem_stride": 3}, "stem_stride: expected one of 1, 2, 4, got 3"),
        ({"width": 9}, "width: the first convolution has half of it, so it is even, got 9"),
        ({"dilations": (1, 2, 3)}, "dilations: expected one number for every stage, 2 as in depths, got 3"),
        ({"num_heads": (3, 4)}, "num_heads: a width of 8 does not divide by 3 heads"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        structure(dataclasses.replace(CONV, **change))


def test_a_variant_is_found_by_its_name():
    with pytest.raises(TypeError, match=r"config: expected one of .*, got str; VARIANTS\['nat_mini'\] is one"):
        build("nat_mini", rngs=nnx.Rngs(0))
