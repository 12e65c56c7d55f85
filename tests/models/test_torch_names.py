"""Loading released weights: what is missing, left over or misshapen is named; layouts are turned, values kept."""

import jax
import numpy as np
import pytest
from flax import nnx

from jattn.models.torch_names import load_torch
from jattn.models.van import VANConfig
from jattn.models.vision import VARIANTS
from jattn.models.vit import ViTConfig
from tests.models.plain import random_state
from tests.models.test_vision import structure

SMALL = VANConfig(num_classes=5, in_channels=2, widths=(6, 10), depths=(1, 2), mlp_ratios=(2, 3))


def released_shapes(config):
    """Names and shapes as models/van.py defines them, written out from that file."""
    shapes, before = {}, config.in_channels
    norms = {}
    for stage, (width, depth, ratio) in enumerate(
        zip(config.widths, config.depths, config.mlp_ratios, strict=True), start=1
    ):
        kernel, hidden = 7 if stage == 1 else 3, ratio * width
        shapes |= {f"patch_embed{stage}.proj.weight": (width, before, kernel, kernel)}
        shapes |= {f"patch_embed{stage}.proj.bias": (width,)}
        norms |= {f"patch_embed{stage}.norm": width}
        for index in range(depth):
            block = f"block{stage}.{index}"
            convolutions = {
                "attn.proj_1": (width, width, 1, 1), "attn.proj_2": (width, width, 1, 1),
                "attn.spatial_gating_unit.conv0": (width, 1, 5, 5),
                "attn.spatial_gating_unit.conv_spatial": (width, 1, 7, 7),
                "attn.spatial_gating_unit.conv1": (width, width, 1, 1), "mlp.fc1": (hidden, width, 1, 1),
                "mlp.dwconv.dwconv": (hidden, 1, 3, 3), "mlp.fc2": (width, hidden, 1, 1),
            }  # fmt: skip
            for name, shape in convolutions.items():
                shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
            shapes |= {f"{block}.layer_scale_{branch}": (width,) for branch in (1, 2)}
            norms |= {f"{block}.norm{branch}": width for branch in (1, 2)}
        shapes |= {f"norm{stage}.{part}": (width,) for part in ("weight", "bias")}
        before = width
    for name, width in norms.items():
        shapes |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes |= {f"{name}.num_batches_tracked": ()}
    return shapes | {"head.weight": (config.num_classes, before), "head.bias": (config.num_classes,)}


@pytest.mark.parametrize("config", [SMALL, VARIANTS["van_b0"]], ids=["small", "van_b0"])
def test_every_array_finds_its_place(config):
    weights = random_state(released_shapes(config))
    loaded = load_torch(config, weights)
    assert jax.tree.structure(loaded) == jax.tree.structure(structure(config)[1])
    # Every value arrives once, wherever it is put.
    kept = [array.ravel() for name, array in weights.items() if not name.endswith("num_batches_tracked")]
    got = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(loaded)]
    np.testing.assert_array_equal(np.sort(np.concatenate(got)), np.sort(np.concatenate(kept)))
    block = loaded["stages"][1]["blocks"][1]
    name = "block2.1.attn.spatial_gating_unit.conv_spatial.weight"
    np.testing.assert_array_equal(
        block["attention"]["lka"]["far"]["kernel"][...][:, :, 0], weights[name][:, 0].T.swapaxes(0, 1)
    )
    np.testing.assert_array_equal(block["mlp"]["up"]["kernel"][0, 0], weights["block2.1.mlp.fc1.weight"][..., 0, 0].T)
    np.testing.assert_array_equal(block["mlp_norm"]["var"][...], weights["block2.1.norm2.running_var"])
    np.testing.assert_array_equal(loaded["head"]["kernel"][...], weights["head.weight"].T)


def test_what_does_not_fit_is_named():
    weights = random_state(released_shapes(SMALL))

    def refuse(message, weights):
        with pytest.raises(ValueError, match=message):
            load_torch(SMALL, weights)

    less = {name: array for name, array in weights.items() if name != "norm1.bias"}
    refuse(r"^state: it does not fit the model: norm1\.bias is missing$", less)
    refuse(r"model: block1\.0\.gamma is left over$", weights | {"block1.0.gamma": np.zeros(3)})
    name = "block2.0.mlp.dwconv.dwconv.weight"
    refuse(rf"{name} is \[3, 3, 1, 30\], wanted \[30, 1, 3, 3\]", weights | {name: np.zeros((3, 3, 1, 30))})
    refuse(r"head\.weight is \[5, 7\], wanted \[5, 10\]", weights | {"head.weight": np.zeros((5, 7))})
    refuse(r"is missing; .*; and \d+ more$", {})


def test_numbers_take_the_parameters_dtype():
    weights = {name: array.astype(np.float16) for name, array in random_state(released_shapes(SMALL)).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(load_torch(SMALL, weights))} == {np.dtype("float32")}


def test_models_that_were_not_released():
    with pytest.raises(
        TypeError, match="config: names are known for VANConfig, NATConfig, ELAResNetConfig, got ViTConfig"
    ):
        load_torch(ViTConfig(), {})


def test_the_state_updates_a_model():
    model = nnx.merge(*structure(SMALL))
    weights = random_state(released_shapes(SMALL))
    nnx.update(model, load_torch(SMALL, weights))
    np.testing.assert_array_equal(model.stages[0].blocks[0].mlp_scale[...], weights["block1.0.layer_scale_2"])
