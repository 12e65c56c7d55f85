"""Recipes, overrides and config.json: what is typed is what is run, and what is mistyped is named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.masks import Causal, Sink, SlidingWindow
from train import config as configs
from train.__main__ import main
from train.config import MeshConfig, load_recipe, parse_overrides, read_config, recipes, save_config
from train.errors import UserError
from train.sharding import make_mesh
from train.step import make_program, resolve_precision


@pytest.mark.parametrize("name", recipes())
def test_recipes_load_and_survive_json(name, tmp_path):
    config = load_recipe(name)
    save_config(config, tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == config


def _words(*lines):
    return [word for line in lines for word in line.split()]


def test_overrides_are_typed_and_nested():
    config = parse_overrides(
        load_recipe("pydoc_lm"),
        _words(
            "--model.width 64 --model.pattern lightning sliding_window --schedule.seconds None --schedule.steps 5",
            "--model.mixer-options.sliding-window.window 32 --data.source a b",
            "--optimizer.learning_rate 0.5 --precision float32",
        ),
    )
    assert config.model.width == 64
    assert config.model.mixer_options == {"sliding_window": {"window": 32}}
    assert (config.schedule.steps, config.schedule.seconds) == (5, None)
    assert config.data.source == ("a", "b")
    assert config.optimizer.learning_rate == 0.5
    untouched = dataclasses.replace(config, data=load_recipe("pydoc_lm").data)
    assert untouched.data == load_recipe("pydoc_lm").data


@pytest.mark.parametrize("words", ["--model.pattern softmax", "--model.pattern=softmax"])
def test_another_pattern_leaves_the_options_of_its_mixers(words):
    recipe = load_recipe("pydoc_lm")
    config = parse_overrides(recipe, words.split())
    assert config.model == dataclasses.replace(recipe.model, pattern=("softmax",), mixer_options={})
    window = "--model.mixer-options.sliding-window.window 32"
    turned = parse_overrides(recipe, f"--model.pattern sliding_window lightning {window}".split())
    assert turned.model.mixer_options == {"sliding_window": {"window": 32}}
    alone = parse_overrides(recipe, ["--model.pattern=sliding_window"])
    assert alone.model.mixer_options == recipe.model.mixer_options
    with pytest.raises(UserError, match=r"no field is called --model\.mixer-options\.sliding-window\.window"):
        parse_overrides(recipe, f"{words} {window}".split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.witdh 64", "no field is called --model.witdh; did you mean --model.width?"),
        ("--schedule.steps 5", "schedule: give one of steps and seconds, got 5 and 155.0"),
        ("--schedule.warmup 1.5", "schedule.warmup: expected a fraction in [0, 1], got 1.5"),
        ("--data.context 0", "data.context: expected at least 1, got 0"),
        ("--model.num-layers 5", "num_layers: 5 is no multiple of the pattern's length 2; 6 would be"),
        ("--model.pattern lightnin", "'lightnin'; did you mean 'lightning'?"),
        ("--optimizer.clip-norm 0", "optimizer.clip_norm: expected a positive number, got 0.0"),
    ],
)
def test_overrides_that_cannot_be(arguments, message):
    with pytest.raises(UserError) as caught:
        parse_overrides(load_recipe("pydoc_lm"), arguments.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_of_the_wrong_type_is_one_line():
    with pytest.raises(UserError, match=r"--model\.width.*--help lists the options") as caught:
        parse_overrides(load_recipe("pydoc_lm"), ["--model.width", "wide"])
    assert "\n" not in str(caught.value)


def test_help_lists_the_fields(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", "pydoc_lm", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--schedule.seconds" in shown
    assert "Muon orthogonalises" in shown


def test_config_files_of_another_version_or_none(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="holds no run"):
        read_config(path)
    save_config(load_recipe("pydoc_lm"), path)
    content = json.loads(path.read_text())
    content["model"]["depth"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="LMConfig has no field 'depth'"):
        read_config(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_config(path)


def test_every_field_has_a_flag():
    """The list that finds mistyped overrides is complete: each flag of it is taken by the parser."""
    flags = set(configs._flags(load_recipe("pydoc_lm")))
    assert {"--model.mixer-options.sliding-window.window", "--data.source", "--seed", "--model.tied"} <= flags
    assert len(flags) > 45


def test_a_copied_recipe_is_a_recipe_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(configs.__file__).parent / "recipes" / "own_attention.py").read_text()
    Path("mine.py").write_text(text.replace("Sink(4)", "Sink(2)"))
    small = "--model.width 32 --model.num-heads 2 --model.num-layers 2 --model.mlp-width 32 --data.context 64"
    save_config(
        parse_overrides(load_recipe("mine.py"), [*small.split(), "--precision", "float32"]), Path("config.json")
    )
    config = read_config(Path("config.json"))  # as `sample` and a run that goes on read it
    assert config.model.mixer_options["block_sparse"]["mask"] == f"{tmp_path}/mine.py:mask"
    program = make_program(resolve_precision(config), make_mesh(MeshConfig(), jax.devices()[:1]))
    state = program.init(0)
    mixer = program.model(state.parameters).units.blocks[1].mixer
    assert mixer.mask == Causal() & (SlidingWindow(127) | Sink(2))
    before = np.asarray(mixer.score_parameters[0][...])
    np.testing.assert_allclose(before, [[1 / 16, 1 / 256]])
    tokens = jax.random.randint(jax.random.key(0), (2, 64), 0, 256)
    batch = dict.fromkeys(("tokens", "targets"), tokens)
    batch |= {
        "positions": jnp.tile(jnp.arange(64), (2, 1)),
        "segment_ids": jnp.ones((2, 64), int),
        "weights": jnp.ones((2, 64)),
    }
    for _ in range(3):  # the head and the output projections start at zero, so slopes learn from the third step on
        state, metrics = program.step(state, batch, jnp.float32(1), program.request(0))
    assert np.isfinite(metrics["loss"])
    after = np.asarray(program.model(state.parameters).units.blocks[1].mixer.score_parameters[0][...])
    assert np.all(after != before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "recipe: there is no file mine.py"),
        ("x = 1", "mine.py has no function config()"),
        ("config = 3", "RunConfig"),
    ],
    ids=["none", "empty", "other"],
)
def test_a_file_that_is_no_recipe(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("mine.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe("mine.py")
