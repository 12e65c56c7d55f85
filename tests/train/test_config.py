"""Recipes, overrides and config.json: what is typed is what is run, and what is mistyped is named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.masks import Causal, Sink, SlidingWindow
from jattn.models.lm import LMConfig
from train import config as configs
from train.__main__ import main
from train.config import MeshConfig, OptimizerConfig, load_recipe, parse_overrides, read_config, recipes, save_config
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
        (
            "--schedule.steps 5 --schedule.seconds 6",
            "schedule: expected one of steps and seconds, got 5 and 6.0; give one and leave out the other",
        ),
        ("--schedule.seconds None", "schedule: expected one of steps and seconds, got None and None"),
        ("--schedule.warmup 1.5", "schedule.warmup: expected a number in [0, 1], got 1.5"),
        ("--optimizer.learning-rate nan", "optimizer.learning_rate: expected a number in [0, inf), got nan"),
        ("--optimizer.matrix-learning-rate inf", "optimizer.matrix_learning_rate: expected a number in [0, inf), got"),
        ("--optimizer.weight-decay -0.1", "optimizer.weight_decay: expected a number in [0, inf), got -0.1"),
        ("--optimizer.b1 1", "optimizer.b1: expected a number in [0, 1), got 1.0"),
        ("--optimizer.b2 -1", "optimizer.b2: expected a number in [0, 1), got -1.0"),
        ("--optimizer.momentum 1", "optimizer.momentum: expected a number in [0, 1), got 1.0"),
        ("--optimizer.ema 0", "optimizer.ema: expected a number in (0, 1) or None, got 0.0"),
        ("--save-every-seconds -1", "save_every_seconds: expected a number in [0, inf], got -1.0"),
        ("--schedule.seconds inf", "schedule.seconds: expected a number in (0, inf) or None, got inf"),
        ("--conversion.learning-rate inf", "conversion.learning_rate: expected a number in [0, inf), got inf"),
        ("--seed 2147483648", "seed: expected a number in [0, 2147483648), got 2147483648"),
        ("--data.holdout 1", "data.holdout: expected a number in (0, 1), got 1.0"),
        ("--model.dtype float32", "--model.dtype: follows from precision; use --precision float32 or"),
        ("--model.param-dtype float16", "model.param_dtype: expected one of float32, bfloat16, got 'float16'"),
        ("--data.context 0", "data.context: expected at least 1, got 0"),
        ("--model.num-layers 5", "num_layers: 5 is no multiple of the pattern's length 2; 6 would be"),
        ("--model.pattern lightnin", "'lightnin'; did you mean 'lightning'?"),
        (
            "--model.pattern lightning,sliding_window",
            "--model.pattern: separate with spaces, as in --model.pattern lightning sliding_window; got lightning,",
        ),
        (
            "--model.pattern softmax lightning --model.mixer-options.softmax.rope-theta 10",
            "only what the recipe sets can be changed here (none); set others in mixer_options of a copy of its file",
        ),
        (
            "--model.mixer-options.sliding-window.windw 10",
            "can be changed here (--model.mixer-options.sliding-window.window); set others",
        ),
        ("--optimizer.clip-norm 0", "optimizer.clip_norm: expected a number in (0, inf], got 0.0"),
    ],
)
def test_overrides_that_cannot_be(arguments, message):
    with pytest.raises(UserError) as caught:
        parse_overrides(load_recipe("pydoc_lm"), arguments.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("columns", ["40", None])
def test_a_value_of_the_wrong_type_is_one_line_that_quotes_it_whole(columns, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    wide = "very/" * 30
    with pytest.raises(UserError, match=rf"--model\.width.*'{wide}'.*--help lists the options") as caught:
        parse_overrides(load_recipe("pydoc_lm"), ["--model.width", wide])
    assert "\n" not in str(caught.value)
    assert os.environ.get("COLUMNS") == columns


@pytest.mark.parametrize(("given", "other"), [("steps", "seconds"), ("seconds", "steps")])
def test_one_end_of_the_schedule_takes_the_place_of_the_recipes(given, other):
    recipe = load_recipe("pydoc_lm")
    recipe = dataclasses.replace(recipe, schedule=configs.ScheduleConfig(**{other: 7}))
    for words in ([f"--schedule.{given}", "5"], [f"--schedule.{given}=5"]):
        schedule = parse_overrides(recipe, words).schedule
        assert (getattr(schedule, given), getattr(schedule, other)) == (5, None)
    assert parse_overrides(recipe, [f"--schedule.{given}", "None"]) == recipe


def test_the_rates_in_use_are_named():
    assert OptimizerConfig().rates == "optimizer.learning_rate and optimizer.matrix_learning_rate"
    assert OptimizerConfig(name="adamw").rates == "optimizer.learning_rate"


@pytest.mark.parametrize(
    ("name", "option", "known"),
    [
        ("sliding_window", "windw", "qk_norm, rope_theta, use_bias, value_dim, window"),
        ("kda", "widht", "decay, decay_rank, gate, gate_bias, gate_rank, negative_eigenvalues, norm, .*, value_dim"),
        ("mamba2", "num_heads", "state_dim, taps"),
    ],
)
def test_an_option_that_a_mixer_does_not_have(name, option, known):
    model = LMConfig(pattern=(name,), mixer_options={name: {option: 3}})
    with pytest.raises(
        UserError, match=rf"^model\.mixer_options\.{name}: has no option '{option}'; there are {known}$"
    ):
        dataclasses.replace(load_recipe("pydoc_lm"), model=model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_recipe_has_no_dtype_beside_its_precision(dtype):
    recipe = load_recipe("pydoc_lm")
    own = dataclasses.replace(recipe, precision="float32", model=dataclasses.replace(recipe.model, dtype=dtype))
    with pytest.raises(
        UserError, match=f"model.dtype: follows from precision, which makes it float32 here, got {dtype}"
    ):
        resolve_precision(own)
    resolved = resolve_precision(dataclasses.replace(recipe, precision="bfloat16"))
    assert resolved.model.dtype == "bfloat16"
    assert resolve_precision(resolved) == resolved


@pytest.mark.parametrize(
    ("group", "name", "value", "message"),
    [
        ("optimizer", "name", "adam", "optimizer.name: expected Literal['muon', 'adamw'], got 'adam'"),
        ("schedule", "decay", "exp", "schedule.decay: expected Literal['linear', 'cosine', 'wsd'], got 'exp'"),
        ("schedule", "steps", 30.5, "schedule.steps: expected int | None, got 30.5"),
        ("data", "source", "folder", "data.source: expected tuple[str, ...], got 'folder'"),
        ("data", "weights", (True,), "data.weights: expected tuple[float, ...], got (True,)"),
        ("data", "recall", None, "data.recall: expected RecallConfig, got None"),
        (None, "precision", "fp16", "precision: expected Literal['auto', 'float32', 'bfloat16'], got 'fp16'"),
        (None, "profile_steps", (3,), "profile_steps: expected tuple[int, int] | None, got (3,)"),
        (None, "seed", True, "seed: expected int, got True"),
    ],
)
def test_a_recipe_with_a_value_of_another_type(group, name, value, message):
    recipe = load_recipe("pydoc_lm")
    changes = {name: value} if group is None else {group: dataclasses.replace(getattr(recipe, group), **{name: value})}
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(recipe, **changes)


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
