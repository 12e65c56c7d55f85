"""The adapters of `van_lka` and `ela` on files of other shapes and options, made in float64 from the definition."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jattn.models.van import VANConfig
from tests.golden.harness import run, systems
from tests.models.plain import batch_norm, conv2d, gelu, layer_norm, random_state
from tests.models.test_torch_names import released_shapes
from tests.vision.test_efficient_local import slow as slow_ela
from tests.vision.test_large_kernel import slow as slow_attention


def _gradient(f, x):
    """Of f at x by central differences, which are exact for a polynomial of degree 2."""
    gradient, step = np.zeros_like(x), 1e-4
    for index in np.ndindex(*x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            ends.append(f(moved))
        gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def _write(path, meta, arrays):
    np.savez(path, meta=json.dumps(meta), **{name: np.asarray(a, np.float32) for name, a in arrays.items()})
    return path


def _draw(rng, *shape):
    """What is stored in float32 is what was computed with."""
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize(
    ("shape", "variants"),
    [
        ((2, 5, 3, 6), {"U": {"kernel_size": 3, "groups": "C//2", "num_group": 3, "eps": 0.1}}),
        (
            (1, 2, 7, 4),
            {
                "V": {"kernel_size": 7, "groups": "C", "num_group": 1},
                "W": {"kernel_size": 5, "groups": 2, "num_group": 4},
            },
        ),
    ],
)
def test_ela_on_other_files(tmp_path, shape, variants):
    rng = np.random.default_rng(3)
    channels = shape[-1]
    arrays = {"x": _draw(rng, *shape), "do": _draw(rng, *shape)}
    for name, variant in variants.items():
        groups = {"C": channels, "C//2": channels // 2}.get(variant["groups"], variant["groups"])
        taps = variant["kernel_size"]
        weights = [_draw(rng, taps, channels // groups, channels), _draw(rng, channels), _draw(rng, channels)]
        options = {"feature_groups": groups, "num_groups": variant["num_group"], "eps": variant.get("eps", 1e-5)}
        arrays |= dict(zip((f"{name}_{w}" for w in ("conv_kernel", "gn_scale", "gn_bias")), weights, strict=True))
        arrays[f"{name}_y"] = slow_ela(arrays["x"], *weights, **options)

        def loss(scale, x=arrays["x"], do=arrays["do"], weights=weights, options=options):
            return (slow_ela(x, weights[0], scale, weights[2], **options) * do).sum()

        arrays[f"{name}_d_gn_scale"] = _gradient(loss, weights[1])
    report = run(systems()["ela"], _write(tmp_path / "other.npz", {"variants": variants}, arrays))
    assert report.passed(strict=True), f"\n{report}"
    assert len(report.comparisons) == 2 * len(variants)


def _lka(rng, channels, near, far, dilation):
    names = [f"lka.{layer}.{part}" for layer in ("conv0", "conv_spatial", "conv1") for part in ("weight", "bias")]
    shapes = (near, near, 1, channels), (channels,), (far, far, 1, channels), (channels,), (1, 1, channels, channels)
    weights = [0.4 * _draw(rng, *shape) for shape in (*shapes, (channels,))]
    weights = [w.astype(np.float32).astype(np.float64) for w in weights]
    x, do = _draw(rng, 2, 7, 5, channels), _draw(rng, 2, 7, 5, channels)

    def loss(index):
        def f(array):
            given = [array if i == index else w for i, w in enumerate(weights)]
            return (x * slow_attention(x, given, dilation) * do).sum()

        return f

    arrays = dict(zip(names, weights, strict=True)) | {"lka_x": x, "lka_do": do}
    arrays["lka_y"] = x * slow_attention(x, weights, dilation)
    arrays["lka_d_conv_spatial"] = _gradient(loss(2), weights[2])
    arrays["lka_d_conv1_bias"] = _gradient(loss(5), weights[5])
    return arrays


def _van(w, x, depths):
    """The model in NumPy from a state dict in PyTorch's layout: its pooled features and logits."""

    def norm(name, x):
        return batch_norm(x, *(w[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")))

    def conv(name, x, **options):
        return conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    for stage, depth in enumerate(depths, start=1):
        stride, padding = (4, 3) if stage == 1 else (2, 1)
        x = norm(f"patch_embed{stage}.norm", conv(f"patch_embed{stage}.proj", x, stride=stride, padding=padding))
        for index in range(depth):
            block = f"block{stage}.{index}"
            y = norm(f"{block}.norm1", x)
            gate = f"{block}.attn.spatial_gating_unit"
            inside = gelu(conv(f"{block}.attn.proj_1", y))
            weights = [
                w[f"{gate}.{layer}.{part}"]
                for layer in ("conv0", "conv_spatial", "conv1")
                for part in ("weight", "bias")
            ]
            weights = [a.transpose(2, 3, 1, 0) if a.ndim == 4 else a for a in weights]
            y = y + conv(f"{block}.attn.proj_2", inside * slow_attention(inside, weights))
            x = x + w[f"{block}.layer_scale_1"] * y
            y = conv(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))
            depthwise = w[f"{block}.mlp.dwconv.dwconv.weight"][:, 0]
            padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
            near = sum(
                padded[:, i : i + y.shape[1], j : j + y.shape[2]] * depthwise[:, i, j] for i, j in np.ndindex(3, 3)
            )
            y = conv(f"{block}.mlp.fc2", gelu(near + w[f"{block}.mlp.dwconv.dwconv.bias"]))
            x = x + w[f"{block}.layer_scale_2"] * y
        x = layer_norm(x, w[f"norm{stage}.weight"], w[f"norm{stage}.bias"], eps=1e-6)
    features = x.mean((1, 2))
    return features, features @ w["head.weight"].T + w["head.bias"]


def test_van_on_other_files(tmp_path):
    """A model of three stages by itself, then an op of other sides by itself."""
    sizes = {"embed_dims": [6, 4, 10], "depths": [2, 1, 1], "mlp_ratios": [2, 3, 1]}
    config = VANConfig(
        num_classes=3, in_channels=2, widths=(6, 4, 10), depths=(2, 1, 1), mlp_ratios=(2, 3, 1), drop_path=0.0
    )
    shapes = {n: s for n, s in released_shapes(config).items() if not n.endswith("num_batches_tracked")}
    weights = {name: array.astype(np.float64) for name, array in random_state(shapes).items()}
    x = _draw(np.random.default_rng(5), 2, 21, 17, 2)
    features, logits = _van(weights, x, config.depths)
    turned = {
        f"model.{name}": a.transpose({2: (1, 0), 4: (2, 3, 1, 0)}.get(a.ndim, range(a.ndim)))
        for name, a in weights.items()
    }
    meta = {"config": {"model": sizes, "num_classes": 3, "bn_eps": 1e-5, "bn_momentum_torch": 0.1, "ln_eps": 1e-6}}
    arrays = turned | {"model_x": x, "model_features": features, "model_logits": logits}
    report = run(systems()["van_lka"], _write(tmp_path / "model.npz", meta, arrays))
    assert report.passed(strict=True), f"\n{report}"
    assert len(report.comparisons) == 2

    arrays = _lka(np.random.default_rng(7), 3, near=3, far=5, dilation=2)
    report = run(systems()["van_lka"], _write(tmp_path / "op.npz", {"config": {"dilation": 2}}, arrays))
    assert report.passed(strict=True), f"\n{report}"
    assert len(report.comparisons) == 3
