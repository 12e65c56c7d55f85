"""Runs on images as a person makes them: commands typed, processes killed, bits compared, figures counted again."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jattn.models.lm import count_parameters
from jattn.models.vision import ELAResNetConfig, NATConfig, VANConfig, ViTConfig, build
from tests.train.runs import assert_same_bits, final_arrays, finish, rows, sealed, start, wait_for
from tests.train.test_report import _Page
from train import compile as ahead
from train import loop
from train.__main__ import main
from train.baselines import logistic_baseline
from train.config import (
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
    as_json,
    load_models,
    load_recipe,
    parse_overrides,
    read_config,
    save_config,
)
from train.errors import UserError
from train.evaluate import place
from train.image_config import AugmentConfig, ImageDataConfig, ImageRunConfig
from train.recipes import digits_nat
from train.sharding import make_mesh
from train.step import make_program

# A recipe of one's own, whose model has BatchNorm and leaves branches out by chance.
RECIPE = """
from jattn.models.vision import VANConfig, ViTConfig
from train.config import OptimizerConfig, ScheduleConfig
from train.image_config import AugmentConfig, ImageDataConfig, ImageRunConfig

def config():
    return ImageRunConfig(
        model=models()["van"],
        data=ImageDataConfig(batch=16, augment=AugmentConfig(crop=1, operations=1, mixup=0.2)),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.01, ema=0.9),
        schedule=ScheduleConfig(steps=24), label_smoothing=0.1, eval_every=10, log_every=5, save_every_seconds=0,
    )

def models():
    small = dict(num_classes=10, in_channels=1)
    return {
        "van": VANConfig(
            **small, widths=(4, 8), depths=(1, 1), mlp_ratios=(1, 1), stem_stride=2, kernel=3, dilation=1, drop_path=0.3
        ),
        "vit": ViTConfig(**small, patch=2, width=8, num_layers=1, num_heads=2, mlp_width=8),
    }
"""
VAN = VANConfig(
    num_classes=10, in_channels=1, widths=(4, 8), depths=(1, 1), mlp_ratios=(1, 1), stem_stride=2, kernel=3, dilation=1
)  # fmt: skip
CONFIG = ImageRunConfig(
    model=VAN,
    schedule=ScheduleConfig(steps=10),
    data=ImageDataConfig(batch=8),
    optimizer=OptimizerConfig(name="adamw", learning_rate=0.01, ema=0.9),
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("images") / "whole"
    output = finish(f"run {recipe} --workdir {workdir}")
    assert re.search(
        r"held-out images are taken for what they are, logistic regression on the pixels 9\d\.\d\d%;", output
    )
    assert "1,438 images of 10 classes to train on, 359 held out, 16 images a step" in output
    return workdir


# What a run leaves


def test_a_run_leaves_figures_that_agree(whole):
    summary = json.loads((whole / "summary.json").read_text())
    confusion = np.array(summary["confusion"])
    assert confusion.sum() == summary["images"]["held_out"] == 359
    assert summary["val_accuracy"] == pytest.approx(np.trace(confusion) / 359)
    assert summary["evaluation"]["held_out"]["accuracy"] == summary["val_accuracy"]
    config = read_config(whole / "config.json")
    digits = digits_nat.config()
    found = loop.task_of(dataclasses.replace(digits, data=config.data)).load(whole)
    np.testing.assert_array_equal(confusion.sum(1), np.bincount(found.held_out.labels))
    assert summary["normalisation"]["mean"] == pytest.approx([found.training.images.mean()], rel=1e-5)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines if "val_accuracy" in row] == [10, 20, 24]
    assert [row["step"] for row in lines if "loss" in row] == [5, 10, 15, 20, 24]
    assert all("images_per_second" in row and "bits_per_byte" not in row for row in lines if "loss" in row)
    best = max((row for row in lines if "val_accuracy" in row), key=lambda row: row["val_accuracy"])
    assert summary["best"] == {"step": best["step"], "val_accuracy": best["val_accuracy"]}


def test_the_report_has_the_picture(whole):
    summary = json.loads((whole / "summary.json").read_text())
    text = (whole / "report.html").read_text()
    page = _Page(text)
    assert f"{summary['val_accuracy']:.2%}" in page.text
    assert "accuracy on held-out images" in page.text
    assert "bits per byte" not in page.text.lower()
    picture = text[text.index('aria-label="Confusion matrix"') :].partition("</svg>")[0]
    drawn = [int(number) for number in re.findall(r'central" font-size="11"[^>]*>(\d+)<', picture)]
    assert drawn == [count for row in summary["confusion"] for count in row if count]
    assert text.count("<svg") >= 5
    assert "logistic regression on the pixels" in page.text


def test_verbs_read_an_image_run(whole, tmp_path, capsys):
    summary = json.loads((whole / "summary.json").read_text())
    assert main(["eval", str(whole)]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["held_out"]["accuracy"] == pytest.approx(summary["val_accuracy"])
    # Other images, of some of the classes: 30 of the digits themselves.
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez(tmp_path / "some.npz", images=digits.images[:30] / 16, labels=digits.target[:30] % 5 + 5)
    assert main(["eval", str(whole), "--data", str(tmp_path / "some.npz")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"]["accuracy"] <= 1
    np.savez(tmp_path / "other.npz", images=digits.images[:30] / 16, labels=np.repeat(["x", "1"], 15))
    assert main(["eval", str(whole), "--data", str(tmp_path / "other.npz")]) == 2
    assert "has classes that the run does not know (x); it knows 0, 1" in capsys.readouterr().err
    assert main(["sample", str(whole)]) == 2
    assert "was trained on images, and sample writes text; eval gives its figures" in capsys.readouterr().err
    assert main(["inspect", str(whole)]) == 0
    assert "statistics" in capsys.readouterr().out
    assert main(["export", str(whole), "--output", str(tmp_path / "w.safetensors")]) == 0
    arrays = safetensors.numpy.load_file(tmp_path / "w.safetensors")
    newest = final_arrays(whole)
    means = [name for name in arrays if name.endswith("norm.mean")]
    assert means
    for name in means:
        np.testing.assert_array_equal(arrays[name], newest[f"average/{name.replace('.', '/')}/value"])


def test_a_kill_and_a_signal_end_with_the_same_bits(whole, recipe, tmp_path):
    """With BatchNorm, an average, branches left out by chance and mixed images."""
    words = f"run {recipe} --workdir {tmp_path}"
    process = start(words)
    wait_for(lambda: sealed(tmp_path), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "summary.json").exists()
    assert "goes on from step" in finish(words)
    assert_same_bits(tmp_path, whole)
    assert rows(tmp_path) == rows(whole)
    arrays = final_arrays(whole)
    assert any(name.startswith("statistics/") for name in arrays)
    assert {name for name in arrays if name.startswith("average/") and name.endswith("norm/mean/value")}


def test_other_images_are_not_the_same_run(whole, recipe, tmp_path, capsys):
    assert main(["run", str(recipe), "--workdir", str(whole), "--data.fold", "1"]) == 2
    assert "data.fold was 0 and is now 1" in capsys.readouterr().err
    assert main(["run", "pydoc_lm", "--workdir", str(whole)]) == 2
    assert "task was 'images' and is now None" in capsys.readouterr().err
    # With the record bent to agree, the images themselves are compared.
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"fold": 0', '"fold": 1'))
    assert main(["run", str(recipe), "--workdir", str(tmp_path), "--data.fold", "1"]) == 2
    assert "the held-out images are not those that this run was scored on" in capsys.readouterr().err


# The step


def batch(seed=0, count=8):
    rng = np.random.default_rng(seed)
    targets = np.eye(10, dtype=np.float32)[rng.integers(0, 10, count)]
    images = rng.standard_normal((count, 8, 8, 1)).astype(np.float32) + 2 * targets[:, :8, None, None]
    return {"images": images, "targets": targets, "weights": np.ones(count, np.float32)}


def run(config, devices=1, steps=3, batches=None):
    program = make_program(config, make_mesh(config.mesh, jax.devices()[:devices]))
    state, losses = program.init(0), []
    for index in range(steps):
        given = batch(index) if batches is None else batches[index]
        state, metrics = program.step(state, place(given, program), np.float32(1), program.request(0))
        losses.append(float(metrics["loss"]))
    return state, losses, program


@pytest.fixture(scope="module")
def alone():
    return run(dataclasses.replace(CONFIG, model=dataclasses.replace(VAN, drop_path=0.5)))


def test_eight_devices_change_where_and_not_what(alone):
    """BatchNorm's statistics are those of the global batch, of which a device has one image.

    They are compared before an update: biases in front of a norm have no gradient but rounding, which Adam magnifies.
    """
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(VAN, drop_path=0.5))
    _, losses, _ = run(config, devices=8)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    state, expected = (run(config, devices=devices, steps=1)[0] for devices in (8, 1))
    for ours, theirs in zip(jax.tree.leaves(state.statistics), jax.tree.leaves(expected.statistics), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_first_statistics_are_those_of_the_first_batch():
    """By the definition of BatchNorm, in float64: running mean = 0.1 mean of what the first layer gives."""
    state, _, program = run(CONFIG, steps=1)
    model = program.model(program.init(0).weights)
    stage = model.stages[0]
    made = np.asarray(stage.embed(jnp.asarray(batch(0)["images"])), np.float64)
    after = program.model(state._replace(average=None).weights).stages[0].embed_norm
    np.testing.assert_allclose(after.mean[...], 0.1 * made.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after.var[...], 0.9 + 0.1 * made.var((0, 1, 2), ddof=1), rtol=1e-4)


def test_an_update_that_is_not_finite_changes_no_statistics():
    bad = batch(1)
    bad["images"] = bad["images"] * np.nan
    state, losses, _ = run(CONFIG, steps=2, batches=[batch(0), bad])
    expected, _, _ = run(CONFIG, steps=1)
    assert np.isnan(losses[1])
    assert int(state.skipped) == 1
    for part in ("parameters", "statistics", "average", "optimizer"):
        for one, two in zip(*(jax.tree.leaves(getattr(s, part)) for s in (state, expected)), strict=True):
            np.testing.assert_array_equal(one, two, err_msg=part)


def test_the_average_has_the_statistics_too():
    states = [run(CONFIG, steps=steps)[0] for steps in (0, 1, 2)]
    d = 2 / 11
    for name in ("statistics",):
        before, after = (
            {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(s.average)} for s in states[1:]
        )
        new = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(getattr(states[2], name))}
        for path, x in new.items():
            np.testing.assert_allclose(after[path], d * before[path] + (1 - d) * x, rtol=1e-5, atol=1e-6)
        assert len(new) >= 4


def test_chance_is_another_at_each_step_and_the_same_again():
    """Branches left out: the same batch and weights, another step, another loss."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(VAN, drop_path=0.5))
    program = make_program(config, make_mesh(MeshConfig(), jax.devices()[:1]))

    def loss(step):
        state = program.init(0)
        state = state._replace(step=jnp.int32(step))
        return float(program.step(state, place(batch(), program), np.float32(1), program.request(0))[1]["loss"])

    losses = [loss(step) for step in range(6)]
    assert len(set(losses)) > 1
    assert losses == [loss(step) for step in range(6)]


def test_accumulation_takes_the_gradient_of_the_whole_batch():
    """Where the rows do not touch one another; BatchNorm's do, within their part."""
    vit = ViTConfig(num_classes=10, in_channels=1, patch=2, width=8, num_layers=1, num_heads=2, mlp_width=8)
    config = dataclasses.replace(CONFIG, model=vit)
    parts = dataclasses.replace(config, data=dataclasses.replace(config.data, accumulate=4))
    (state, losses, _), (expected, wanted, _) = run(parts), run(config)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert state.statistics is None
    for one, two in zip(jax.tree.leaves(state.parameters), jax.tree.leaves(expected.parameters), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-3)
    _, losses, _ = run(dataclasses.replace(CONFIG, data=parts.data))
    assert np.isfinite(losses).all()


def test_the_loss_is_its_definition(alone):
    """Smoothed cross-entropy and weights, in float64 from the model's own logits; evaluation without smoothing."""
    config = dataclasses.replace(CONFIG, label_smoothing=0.3)
    program = make_program(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    weights, given = program.init(0).weights, batch()
    given["weights"] = np.array([1, 0, 1, 1, 0, 1, 1, 1], np.float32)
    given["targets"][0] = 0.25 * given["targets"][0] + 0.075
    model = program.model(weights)
    graph, arrays = nnx.split(model)
    logits = np.asarray(nnx.merge(graph, arrays, copy=True)(given["images"], train=True, key=jax.random.key(0)), float)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -((0.7 * given["targets"] + 0.03) * log_p).sum(-1)
    total, count = program.task.loss(nnx.merge(graph, arrays, copy=True), given, jax.random.key(0))
    assert float(total) == pytest.approx((wanted * given["weights"]).sum(), rel=1e-5)
    assert float(count) == 6
    sums = program.evaluate(weights, place(given, program))
    logits = np.asarray(model(given["images"]), float)
    assert float(sums["confusion"].sum()) == pytest.approx(6)
    columns = np.asarray(sums["confusion"]).sum(0)
    np.testing.assert_allclose(columns, np.bincount(logits.argmax(-1), given["weights"], minlength=10), atol=1e-6)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert float(sums["loss"]) == pytest.approx(
        -((given["targets"] * log_p).sum(-1) * given["weights"]).sum(), rel=1e-5
    )


def test_logistic_regression_counts_what_is_right():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pixels = (rng.standard_normal((60, 5)) * 0.01 + 3 * np.eye(3, 5)[labels]).astype(np.float32)
    (accuracy,) = logistic_baseline(
        pixels[:40], labels[:40], pixels[40:], np.where(np.arange(20) < 5, -1, labels[40:])
    ).values()
    assert accuracy == 0.75


# Configurations


@pytest.mark.parametrize(
    "model", [VAN, ViTConfig(), NATConfig(dilations=(1, 2, 1, 1)), ELAResNetConfig(attention=None)]
)
def test_a_configuration_survives_json_with_its_model(model, tmp_path):
    config = dataclasses.replace(CONFIG, model=model)
    save_config(config, tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["task"], written["model"]["type"]) == ("images", type(model).__name__)
    for name, value, message in (
        ("task", "sounds", "no task is called 'sounds', there are text, images"),
        ("model", {"type": "VGG"}, "expected one of the types ViTConfig, .*, got VGG"),
        ("data", {"colour": 3}, "ImageDataConfig has no field 'colour'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(written | {name: value}))
        with pytest.raises(UserError, match=message):
            read_config(tmp_path / "config.json")
    assert "task" not in as_json(load_recipe("pydoc_lm"))


def test_overrides_reach_the_model_and_the_augmentation(capsys):
    words = "--model.width 16 --model.depths 1 1 --data.augment.mixup 0.5 --data.size 16 24 --label-smoothing 0.2"
    config = parse_overrides(load_recipe("digits_nat"), words.split())
    assert isinstance(config, ImageRunConfig)
    assert isinstance(config.model, NATConfig)
    assert (config.model.width, config.model.depths, config.model.kernel_size) == (16, (1, 1), 3)
    assert (config.data.augment, config.data.size) == (AugmentConfig(operations=2, mixup=0.5), (16, 24))
    with pytest.raises(UserError, match=r"no field is called --model.widht; did you mean --model.width"):
        parse_overrides(config, ["--model.widht", "3"])
    with pytest.raises(SystemExit):
        main(["run", "digits_nat", "--help"])
    shown = capsys.readouterr().out
    assert "--model.kernel-size" in shown
    assert "--data.augment.cutmix" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data.holdout 0", "data.holdout: expected a number in (0, 1), got 0.0"),
        ("--data.fold 5", "data.fold: with data.holdout = 0.2 the last is 4, got 5"),
        ("--data.batch 0", "data.batch: expected at least 1, got 0"),
        ("--data.batch 9 --data.accumulate 2", "data.batch: 9 images do not divide by data.accumulate = 2"),
        ("--data.size 0 8", "data.size: expected at least 1, got 0"),
        ("--data.augment.mixup -1", "data.augment.mixup: expected a number in [0, inf), got -1.0"),
        ("--data.augment.magnitude 2", "data.augment.magnitude: expected a number in [0, 1], got 2.0"),
        ("--label-smoothing 1.5", "label_smoothing: expected a number in [0, 1], got 1.5"),
        ("--optimizer.name muon", "optimizer.name: image models are trained by adamw, got muon"),
        ("--data.batch 60", "data.batch: 60 images do not divide over data x fsdp = 8 devices"),
        ("--mesh.tensor 2", "mesh.tensor: an image model is whole on every device, so expected 1, got 2"),
        ("--data.source nowhere", "nowhere: no such folder; --data.source names digits"),
        ("--model.num-classes 7", "model.num_classes: digits has 10 classes, got 7"),
    ],
)
def test_bad_input_is_one_line_and_code_2(words, message, tmp_path, capsys):
    assert main(["run", "digits_nat", *words.split(), "--workdir", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1


# Other verbs


def test_compile_says_whether_it_fits(monkeypatch, recipe, tmp_path, capsys):
    monkeypatch.setattr(ahead, "prepare", lambda topology: None)
    monkeypatch.setattr(ahead, "devices_of", lambda topology: jax.devices())
    monkeypatch.setitem(ahead.MEMORY, "cpu", 1 << 30)
    ahead.main([str(recipe), "--topology", "host"])
    shown = capsys.readouterr().out
    assert "16 images a step" in shown
    assert "all-reduce" in shown
    monkeypatch.setitem(ahead.MEMORY, "cpu", 1 << 10)
    with pytest.raises(SystemExit):
        ahead.main([str(recipe), "--topology", "host"])
    offered = capsys.readouterr().out.partition("any of these needs less:")[2]
    assert "--data.accumulate 2   the batch in parts, 1 images a device" in offered
    assert "tensor" not in offered


def test_models_are_compared_over_folds(recipe, tmp_path, capsys):
    words = f"compare {recipe} --models vit van --folds 2 --schedule.steps 3 --workdir {tmp_path}"
    assert main(words.split()) == 0
    result = json.loads((tmp_path / "comparison.json").read_text())
    assert (result["folds"], result["headline"], result["failed"]) == ([0, 1], "accuracy", {})
    for run_ in result["runs"]:
        settings = json.loads((tmp_path / run_["workdir"] / "config.json").read_text())
        assert settings["data"]["fold"] == run_["fold"]
        assert settings["model"]["type"] == {"vit": "ViTConfig", "van": "VANConfig"}[run_["model"]]
        summary = json.loads((tmp_path / run_["workdir"] / "summary.json").read_text())
        assert summary["val_accuracy"] == run_["accuracy"]
    for model, figures in result["models"].items():
        finished = [run_["accuracy"] for run_ in result["runs"] if run_["model"] == model]
        assert figures["accuracy"]["mean"] == pytest.approx(np.mean(finished))
        assert figures["params"]["std"] == 0
    shown = capsys.readouterr().out
    assert "2 fold(s), held-out figures" in " ".join(shown.split())
    assert "images/s" in shown
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "digits_nat --models nat vgg",
            "--models: the recipe knows no 'vgg'; its models() has nat, van, ela_resnet, vit",
        ),
        ("digits_nat --mixers softmax", "--mixers: digits_nat trains on images; --models is for it"),
        ("digits_nat --models nat --seeds 3", "--seeds: digits_nat trains on images"),
        ("pydoc_lm --models nat", "--models: pydoc_lm trains on text; --mixers is for it"),
        ("digits_nat --models nat --model.width 3", "--model.width: is what a comparison varies"),
        ("digits_nat --models nat --folds 6", "data.fold: with data.holdout = 0.2 the last is 4, got 5"),
        ("digits_nat", "--models: expected at least one model, got none"),
    ],
)
def test_comparisons_that_cannot_be(words, message, tmp_path, capsys):
    assert main(["compare", *words.split(), "--workdir", str(tmp_path / "d")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_the_models_of_the_recipe_have_equal_parameters_and_fit_its_images():
    counts = {}
    for name, model in load_models("digits_nat").items():
        made = nnx.eval_shape(lambda model=model: build(model, rngs=nnx.Rngs(params=jax.random.key(0))))
        counts[name] = count_parameters(made)
        logits = nnx.eval_shape(lambda model=model: build(model, rngs=nnx.Rngs(0))(jnp.zeros((3, 8, 8, 1))))
        assert logits.shape == (3, 10)
    assert max(counts.values()) < 1.01 * min(counts.values())
    assert load_recipe("digits_nat").model == load_models("digits_nat")["nat"]
