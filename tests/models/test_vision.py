"""What all image classifiers share: the contract of `jattn.models.vision`, held by a small one of each kind."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from jattn.models.ela_resnet import ELAResNetConfig
from jattn.models.nat import NATConfig
from jattn.models.van import VANConfig
from jattn.models.vision import VARIANTS, build
from jattn.models.vit import ViTConfig
from jattn.nn.layout import Layout, use_layout
from tests.counting import products

B, H, W, C, CLASSES = 3, 14, 22, 2, 5
NAT = NATConfig(
    num_classes=CLASSES, in_channels=C, width=8, depths=(1, 2), num_heads=(1, 2), dilations=(1, 2), kernel_size=3,
    stem_stride=1, layer_scale=0.5, drop_path=0.5,
)  # fmt: skip
CONFIGS = {
    "vit": ViTConfig(
        num_classes=CLASSES, in_channels=C, patch=2, width=12, num_layers=3, num_heads=3, mlp_width=20, layer_scale=0.5,
        drop_path=0.5,
    ),
    "nat": NAT,
    "dinat_s": dataclasses.replace(NAT, layout="swin", layer_scale=None),
    "van": VANConfig(
        num_classes=CLASSES, in_channels=C, widths=(6, 10), depths=(1, 2), mlp_ratios=(2, 3), stem_stride=2,
        drop_path=0.5,
    ),
    "ela_resnet": ELAResNetConfig(
        num_classes=CLASSES, in_channels=C, widths=(16, 32), depths=(1, 2), attention="L", stem_stride=1, stem_width=8
    ),
}  # fmt: skip
RANDOM = ("vit", "nat", "dinat_s", "van")
NORMALISED = ("van", "ela_resnet")
every_model = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def structure(config):
    return nnx.split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))


@functools.cache
def variables(config, seed=0):
    """Random weights and running statistics, so that every part of a model matters."""
    rng = np.random.default_rng(seed)

    def draw(path, variable):
        x = 0.3 * rng.standard_normal(variable.shape)
        return jnp.asarray(0.5 + np.abs(x) if "var" in str(path[-1]) + str(path[-2]) else x, variable.dtype)

    return jax.tree_util.tree_map_with_path(draw, structure(config)[1])


def inputs(seed=0, height=H, width=W):
    return np.random.default_rng(seed).standard_normal((B, height, width, C)).astype(np.float32)


@functools.cache
def program(config, train):
    def run(state, images, key=None):
        model = nnx.merge(structure(config)[0], state)
        logits = model(images, train=train, key=key)
        return logits, nnx.state(model, nnx.BatchStat)

    return jax.jit(run)


def call(config, images, *, train=False, key=None):
    """Logits, and running statistics after them."""
    return program(config, train)(variables(config), images, key)


@every_model
def test_logits_and_a_pyramid(name):
    config = CONFIGS[name]
    logits, _ = call(config, inputs())
    features = jax.jit(lambda state, x: nnx.merge(structure(config)[0], state).features(x))(variables(config), inputs())
    assert logits.shape == (B, CLASSES)
    assert logits.dtype == jnp.float32
    assert len(features) == len(getattr(config, "depths", (1,)))
    sides = [feature.shape[1:3] for feature in features]
    assert sides == sorted(sides, reverse=True)
    for (rows, columns), (fewer, less) in itertools.pairwise(sides):
        assert (fewer, less) == ((rows + 1) // 2, (columns + 1) // 2)
    # The head reads the last map, by the mean over its places.
    model = nnx.merge(structure(config)[0], variables(config))
    last = model.norm(features[-1]) if isinstance(config, NATConfig) else features[-1]
    want = last.mean((1, 2)) @ model.head.kernel[...] + model.head.bias[...]
    np.testing.assert_allclose(logits, want, atol=1e-4)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


@every_model
def test_rows_are_independent(name):
    first, other = inputs(), inputs(1)
    both, *_ = call(CONFIGS[name], first)
    mixed, *_ = call(CONFIGS[name], np.concatenate([first[:1], other[1:]]))
    np.testing.assert_allclose(mixed[0], both[0], atol=1e-5)
    assert np.abs(mixed[1:] - both[1:]).max() > 1e-3


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_is_the_keys(name):
    config, images = CONFIGS[name], inputs()
    plain, *_ = call(config, images)
    np.testing.assert_array_equal(call(config, images, key=jax.random.key(0))[0], plain)
    first, again, other = (call(config, images, train=True, key=jax.random.key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(again, first)
    assert np.abs(other - first).max() > 1e-3
    with pytest.raises(ValueError, match=r"key: in training .* \(drop_path = 0.5\); pass a jax.random.key"):
        jax.eval_shape(lambda: call(config, images, train=True))


@pytest.mark.parametrize("name", ["vit", "nat", "van"])
def test_every_branch_is_left_out_by_itself(name):
    """Of three blocks at rates 0, 0.25 and 0.5, four branches may be missing: 512 equal rows meet all 16 models."""
    stages: dict[str, dict] = {
        "vit": {},
        "nat": {"depths": (1, 1, 1), "num_heads": (1, 2, 4), "dilations": None},
        "van": {"depths": (1, 1, 1), "widths": (6, 10, 4), "mlp_ratios": (2, 3, 1)},
    }
    config = dataclasses.replace(CONFIGS[name], **stages[name])
    images = np.broadcast_to(inputs(height=12, width=12)[:1], (512, 12, 12, C))
    logits, _ = call(config, images, train=True, key=jax.random.key(0))
    assert len(np.unique(np.round(logits / np.ptp(logits, axis=0), 3), axis=0)) == 16


@every_model
def test_every_parameter_learns(name):
    config = CONFIGS[name]
    graph, state = structure(config)[0], variables(config)
    weights, statistics = nnx.split_state(state, nnx.Param, nnx.BatchStat)

    @jax.jit
    def gradient(weights):
        return jax.grad(lambda w: jnp.mean(nnx.merge(graph, w, statistics)(inputs()) ** 2))(weights)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(weights)):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf), jax.tree_util.keystr(path)


@every_model
def test_statistics_follow_training_only(name):
    config = CONFIGS[name]
    before = nnx.filter_state(variables(config), nnx.BatchStat)
    *_, same = call(config, inputs())
    *_, after = call(config, inputs(), train=True, key=jax.random.key(0))
    assert bool(jax.tree.leaves(before)) == (name in NORMALISED)
    for old, kept, new in zip(*map(jax.tree.leaves, (before, same, after)), strict=True):
        np.testing.assert_array_equal(kept, old)
        assert np.abs(new - old).min() > 0
    assert {type(v) for _, v in nnx.to_flat_state(structure(config)[1])} <= {nnx.Param, nnx.BatchStat}


@every_model
def test_bfloat16_computation_keeps_float32_variables(name):
    config = CONFIGS[name]
    half = dataclasses.replace(config, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(structure(half)[1])} == {jnp.dtype("float32")}
    want, *_ = call(config, inputs())
    got, _ = call(half, inputs())
    assert got.dtype == jnp.float32
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 0.05


def convolutions(function, *x):
    """Multiply-adds times two of all convolutions, from the shapes in the traced program."""
    total = 0
    for equation in jax.make_jaxpr(function)(*x).jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            taps = kernel.size // kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * taps
    return total


@pytest.mark.parametrize("name", ["vit", "van", "ela_resnet"])
def test_flops_are_those_of_the_program(name):
    config = CONFIGS[name]
    model = nnx.merge(structure(config)[0], variables(config))
    for height, width in ((H, W), (16, 12)):
        images = inputs(height=height, width=width)
        traced = products(model.__call__, images) + convolutions(model.__call__, images)
        assert model.flops(B, height, width) == traced
        assert isinstance(model.flops(B, height, width), int)


@pytest.mark.parametrize("name", ["vit", "nat", "van", "ela_resnet"])
def test_on_a_mesh(name):
    """Split by rows, statistics are those of the whole batch."""
    config, key = CONFIGS[name], jax.random.key(0)
    images = np.concatenate([inputs(), inputs(1)])[:4]
    graph, state = structure(config)[0], variables(config)

    def run(state, images):
        model = nnx.merge(graph, state)
        return model(images, train=True, key=key), nnx.state(model, nnx.BatchStat)

    want = jax.jit(run)(state, images)
    mesh = jax.make_mesh((2, 2, 2, 1), ("data", "fsdp", "tensor", "context"), (AxisType.Auto,) * 4)
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    with use_layout(Layout(mesh, batch=("data", "fsdp"), heads="tensor", context="context")):
        got = jax.jit(run)(state, jax.device_put(images, rows))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@every_model
def test_input_errors(name):
    config, images = CONFIGS[name], inputs()
    model = nnx.merge(structure(config)[0], variables(config))

    def refuse(message, images, error=ValueError):
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda: model(images))

    refuse(r"images: expected 4 dimensions \[B, H, W, C\], got shape \(14, 22, 2\)", images[0])
    refuse("images: expected .* with C = 2", np.concatenate([images] * 2, axis=-1))
    refuse("images: expected a floating dtype, got uint8; cast it", images.astype(np.uint8), TypeError)
    refuse("dimension H is 0", images[:, :0])


def test_configurations_that_fit_no_model():
    with pytest.raises(
        TypeError, match="config: expected one of ViTConfig, NATConfig, VANConfig, ELAResNetConfig, got"
    ):
        build("nat_mini", rngs=nnx.Rngs(0))
    for name, config in CONFIGS.items():
        with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
            dataclasses.replace(config, num_classes=0)
        if name in RANDOM:
            with pytest.raises(ValueError, match=r"drop_path: expected a chance .* 1, got 1\.0"):
                dataclasses.replace(config, drop_path=1.0)


@pytest.mark.parametrize("name", ["nat", "van", "ela_resnet"])
def test_stages_are_described_alike(name):
    config = CONFIGS[name]
    with pytest.raises(ValueError, match=r".*: expected one number for every stage, \d as in \w+, got \d"):
        dataclasses.replace(config, depths=(1, 2, 1))
    with pytest.raises(ValueError, match=r"depths: expected a tuple of one number or more, .* got 3"):
        dataclasses.replace(config, depths=3)
    with pytest.raises(ValueError, match=r"depths\[1\]: expected at least 1, got 0"):
        dataclasses.replace(config, depths=(1, 0))


PUBLISHED = {
    # name: millions of parameters as printed, of multiply-adds in thousands of millions for 224 x 224
    "nat_mini": ("20.0", 2.7), "nat_tiny": ("27.9", 4.3), "nat_small": ("50.7", 7.8), "nat_base": ("89.8", 13.7),
    "dinat_mini": ("20", 2.7), "dinat_tiny": ("28", 4.3), "dinat_small": ("51", 7.8), "dinat_base": ("90", 13.7),
    "dinat_large": ("200.9", 30.6), "dinat_s_tiny": ("28", 4.5), "dinat_s_small": ("50", 8.7),
    "dinat_s_base": ("88", 15.4), "dinat_s_large": ("197", 34.5), "nat_isotropic_small": ("22", 4.3),
    "nat_isotropic_base": ("86", 16.9), "dinat_isotropic_small": ("22", 4.3), "dinat_isotropic_base": ("86", 16.9),
    "van_b0": ("4.106", 0.9), "van_b1": ("13.862", 2.5), "van_b2": ("26.578", 5.0), "van_b3": ("44.766", 9.0),
    "van_b4": ("60.283", 12.2), "van_b5": ("89.968", 17.2), "van_b6": ("199.829", 38.4), "resnet50": ("25.557", 4.1),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """No array is made. The authors count the multiply-adds with tools that differ by a percent."""
    parameters, work = PUBLISHED[name]
    graph, state = structure(VARIANTS[name])
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.Param))) / 1e6
    decimals = len(parameters.partition(".")[2])
    assert f"{size:.{decimals}f}" == parameters
    assert nnx.merge(graph, state).flops(1, 224, 224) / 2e9 == pytest.approx(work, rel=0.01, abs=0.05)


def test_every_variant_is_published_or_checked_by_itself():
    assert set(VARIANTS) - set(PUBLISHED) == {f"ela_resnet50_{v}" for v in "tbsl"} | {
        f"vit_{size}" for size in ("tiny", "small", "base")
    }
