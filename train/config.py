"""What a run is: frozen dataclasses, every field of which is a command-line override.

A recipe (`train/recipes/NAME.py`, or a file of the user's own) is a function `config()` that returns a `RunConfig`,
which trains on text, or an `ImageRunConfig` (`train.image_config`), which trains on images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import io
import itertools
import json
import os
import pkgutil
import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from jattn import catalog
from jattn.models.lm import LMConfig
from train.data.sources import VOCABULARY
from train.errors import UserError, user_errors
from train.values import check_least, check_ranges, check_types


@dataclasses.dataclass(frozen=True)
class RecallConfig:
    """Synthetic recall in place of text: the model must repeat what stands earlier in the sequence."""

    task: Literal["mqar", "copying", "induction"] | None = None
    """Multi-query associative recall, copying, or induction heads; with a task no text is read."""
    pairs: int = 8
    """Key-value pairs of "mqar"."""
    power: float = 0.01
    """Exponent of the gaps between a pair and its query in "mqar"; a small one puts many queries close."""
    copy_length: int = 32
    """Tokens to be copied."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes batches."""

    source: tuple[str, ...] = ("pydoc",)
    """"pydoc" (CPython's own reference text), or files, folders and globs of text or .jsonl."""
    weights: tuple[float, ...] = ()
    """Shares of the sources in the training tokens, one for each; without any, all documents are one text."""
    field: str = "text"
    """Which field of a JSONL line holds the text."""
    tokenizer: str | None = None
    """A tokenizer.json, "train" to train one of model.vocab_size on the text, or None: a token is a byte."""
    recall: RecallConfig = RecallConfig()
    context: int = 512
    """Tokens in a sequence."""
    batch: int = 8
    """Sequences in a step, over all devices."""
    accumulate: int = 1
    """Parts that a step cuts its batch into, one after the other, to need less memory."""
    holdout: float = 0.1
    """Fraction of the documents that is never trained on and gives the validation figure."""
    eval_sets: tuple[str, ...] = ()
    """Further texts to score, as name=files, folders or globs (several after commas)."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["muon", "adamw"] = "muon"
    """Muon orthogonalises the matrices of the layers and leaves the rest to Adam; AdamW treats all alike."""
    learning_rate: float = 0.006
    """Of Adam."""
    matrix_learning_rate: float = 0.03
    """Of Muon."""
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    momentum: float = 0.95
    """Of Muon."""
    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    ema: float | None = None
    """Decay per step of a running mean of the weights, which is then what is scored, sampled and exported."""

    @property
    def rates(self) -> str:
        """The learning rates that are in use, for messages."""
        return "optimizer.learning_rate" + " and optimizer.matrix_learning_rate" * (self.name == "muon")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What a run does about steps that go wrong."""

    max_nonfinite: int = 5
    """Updates in a row that are not finite, each of them skipped, before the run stops and keeps the batch."""
    spike_z: float | None = None
    """A loss so many standard deviations above the mean of the last `spike_window` is a spike: the run goes back to its
    last checkpoint and leaves out the batches since then. None switches the rule off."""
    spike_window: int = 100
    """Losses that mean and deviation are taken over."""
    max_rollbacks: int = 3
    """Times that a run may go back to the same checkpoint before it stops."""


@dataclasses.dataclass(frozen=True)
class ConversionConfig:
    """A start from the weights of another run, whose softmax layers become Hedgehog's or SEA's."""

    source: str | None = None
    """The folder of that run; None starts from random weights."""
    steps: int = 200
    """Batches from which what is new, Hedgehog's feature maps or SEA's estimator, learns the attention of the softmax
    layers, before the run itself begins; a schedule by seconds counts that time too."""
    learning_rate: float = 0.01
    """Of Adam for what is new; it falls to 0 along a cosine."""
    xent_factor: float = 1.0
    """Of the cross-entropy between the weights of softmax and Hedgehog's (the paper)."""
    mse_factor: float = 0.0
    """Of the squared error between the outputs of their heads (LoLCATs: 1000, and 0 for the other)."""


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate's factor over the run, and when the run ends: exactly one of `steps` and `seconds`."""

    steps: int | None = None
    seconds: float | None = None
    """Elapsed time of training, from the start of the process; the schedule follows the clock."""
    warmup: float = 0.03
    """Fraction of the run over which the factor rises from 0 to 1."""
    decay: Literal["linear", "cosine", "wsd"] = "wsd"
    """"linear" and "cosine" fall from the end of the warm-up; "wsd" stays at 1 and then falls linearly."""
    decay_fraction: float = 0.6
    """For "wsd": the last part of the run, in which the factor falls."""
    final: float = 0.0
    """The factor at the end."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; `data` takes what the others leave when it is -1."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text written at the end of a run and into its report."""

    prompts: tuple[str, ...] = ("The ",)
    tokens: int = 400
    temperature: float = 0.8
    top_p: float | None = 0.95
    top_k: int | None = None
    min_p: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every training run has, whatever it trains on."""

    task: ClassVar[str]
    """The module of `train.tasks` that does what is this run's own."""
    rows: ClassVar[str]
    """What a row of a batch is, for messages."""

    model: Any
    schedule: ScheduleConfig
    data: Any
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation, and so model.dtype, which cannot be given itself; master weights are float32. "auto" is
    bfloat16 where the device multiplies in it."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""
    log_every: int = 10
    """Steps between two rows of metrics.jsonl."""
    eval_every: int | None = 500
    """Steps between two validations; one is always made at the end."""
    save_every_seconds: float = 30.0
    """Time between two checkpoints; one is always made at the end."""
    keep_checkpoints: int = 3
    """How many of the newest stay; the one with the best validation figure stays besides."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a profiler trace, written to the folder `profile`."""

    def __post_init__(self) -> None:
        check_types(self)
        schedule, data = self.schedule, self.data
        if data.batch % max(data.accumulate, 1):
            raise UserError(
                f"data.batch: {data.batch} {self.rows} do not divide by data.accumulate = {data.accumulate}"
            )
        if self.model.param_dtype not in PARAM_DTYPES:
            raise UserError(
                f"model.param_dtype: expected one of {', '.join(PARAM_DTYPES)}, got {self.model.param_dtype!r}"
            )
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise UserError(
                f"profile_steps: expected first and last step, 1 <= first <= last, got {self.profile_steps}"
            )
        if (schedule.steps is None) == (schedule.seconds is None):
            raise UserError(
                f"schedule: expected one of steps and seconds, got {schedule.steps} and {schedule.seconds}; "
                "give one and leave out the other, or make it None"
            )
        check_least(
            ("schedule.steps", schedule.steps, 1),
            ("data.batch", data.batch, 1),
            ("data.accumulate", data.accumulate, 1),
            ("guard.max_nonfinite", self.guard.max_nonfinite, 1),
            ("guard.spike_window", self.guard.spike_window, 2),
            ("guard.max_rollbacks", self.guard.max_rollbacks, 1),
            ("log_every", self.log_every, 1),
            ("eval_every", self.eval_every, 1),
            ("keep_checkpoints", self.keep_checkpoints, 1),
        )
        check_ranges(
            self,
            {
                "(0, 1)": ("data.holdout",),
                "(0, 1) or None": ("optimizer.ema",),
                "[0, 1)": ("optimizer.b1", "optimizer.b2", "optimizer.momentum"),
                "[0, 1]": ("schedule.warmup", "schedule.decay_fraction", "schedule.final"),
                "[0, inf)": ("optimizer.learning_rate", "optimizer.matrix_learning_rate", "optimizer.weight_decay"),
                "(0, inf) or None": ("schedule.seconds", "guard.spike_z"),
                # Infinity is never.
                "[0, inf]": ("save_every_seconds",),
                "(0, inf]": ("optimizer.clip_norm",),
                # Traced as an int32.
                "[0, 2147483648)": ("seed",),
            },
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(CommonConfig):
    """One training run of a language model."""

    task: ClassVar[str] = "text"
    rows: ClassVar[str] = "sequences"

    model: LMConfig
    data: DataConfig = DataConfig()
    sample: SampleConfig = SampleConfig()
    conversion: ConversionConfig = ConversionConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        data, sample = self.data, self.sample
        if data.tokenizer is None and data.recall.task is None and self.model.vocab_size != VOCABULARY:
            raise UserError(
                f"model.vocab_size: a token is a byte, so expected {VOCABULARY}, got {self.model.vocab_size}; "
                f"data.tokenizer brings another vocabulary"
            )
        if data.weights and len(data.weights) != len(data.source):
            raise UserError(
                f"data.weights: expected one for each of {len(data.source)} sources, got {len(data.weights)}"
            )
        if not all(0 < weight < float("inf") for weight in data.weights):
            raise UserError(f"data.weights: expected positive numbers, got {data.weights}")
        check_least(
            ("data.context", data.context, 1),
            ("conversion.steps", self.conversion.steps, 0),
            ("sample.tokens", sample.tokens, 1),
            ("sample.top_k", sample.top_k, 1),
        )
        check_ranges(
            self,
            {
                "[0, inf)": (
                    "sample.temperature",
                    "conversion.learning_rate",
                    "conversion.xent_factor",
                    "conversion.mse_factor",
                ),
                "(0, 1] or None": ("sample.top_p", "sample.min_p"),
            },
        )
        for name, given in self.model.mixer_options.items():
            known = mixer_options(name)
            for option in given:
                if option not in known:
                    raise UserError(
                        f"model.mixer_options.{name}: has no option {option!r}; there are {', '.join(sorted(known))}"
                    )


CONFIGS = {"text": "train.config:RunConfig", "images": "train.image_config:ImageRunConfig"}
"""The configuration of each task, as module:class."""

PARAM_DTYPES = ("float32", "bfloat16")
"""Not float16, in which Adam's epsilon is 0 and the update of a weight without gradient 0 / 0."""

MIXER_FIELDS = (
    "self", "width", "num_heads", "num_kv_heads", "head_dim", "layer_index", "num_layers", "dtype", "param_dtype",
    "rngs",
)  # fmt: skip
"""What the constructor of a mixer is told by fields of the model."""


def mixer_options(name: str) -> set[str]:
    """The options of a mixer's constructor, without what the fields of the model tell it."""
    found: set[str] = set()
    layer: Any = catalog.get(name).load_layer()
    for kind in layer.__mro__:
        parameters = inspect.signature(kind.__init__).parameters.values()
        found |= {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):  # else the rest is its parent's
            break
    return found - {*MIXER_FIELDS}


def recipes() -> list[str]:
    """The names of the recipes there are."""
    package = importlib.import_module("train.recipes")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def load_recipe(name: str) -> CommonConfig:
    """The configuration that recipe `name` returns, one of `recipes()` or a file of the user's own."""
    made = _recipe(name).get("config")
    config = made() if callable(made) else made
    if not isinstance(config, CommonConfig):
        known = " or a ".join(where.replace(":", ".") for where in CONFIGS.values())
        raise UserError(f"recipe: {name} has no function config() that returns a {known}")
    return config


def load_models(name: str) -> dict[str, Any]:
    """The models that `compare` may put into the recipe: what its `models()` returns, by name; none without one."""
    models = _recipe(name).get("models")
    return models() if callable(models) else {}


def _recipe(name: str) -> Mapping[str, Any]:
    """What the recipe's file defines."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"recipe: there is no file {name}")
        return runpy.run_path(os.path.abspath(name))
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"no recipe is called {name!r}; {hint}, and a file of your own ends in .py")
    return vars(importlib.import_module(f"train.recipes.{name}"))


def parse_overrides[Config: CommonConfig](config: Config, arguments: list[str]) -> Config:
    """`config` with command-line overrides such as `--model.width 64`; `--help` prints them all and exits."""
    config = _without_options_of_others(config, arguments)
    arguments = _with_one_end(arguments)
    known = set(_flags(config))
    pattern = " ".join(_given(arguments, "--model.pattern") or ())
    if "," in pattern and "--model.pattern" in known:
        spaced = " ".join(pattern.replace(",", " ").split())
        raise UserError(f"--model.pattern: separate with spaces, as in --model.pattern {spaced}; got {pattern}")
    for argument in arguments:
        if not argument.startswith("--") or argument == "--help":
            continue
        flag = argument.split("=")[0].replace("_", "-")
        if flag == "--model.dtype":
            raise UserError(f"{flag}: follows from precision; use --precision float32 or --precision bfloat16")
        if flag not in known:
            raise UserError(f"no field is called {flag}; {_hint(flag, sorted(known))}")
    from tyro.conf import AvoidSubcommands  # a field of several types keeps the type that the recipe gave it

    return parse_arguments(AvoidSubcommands[type(config)], arguments, "run RECIPE", default=config)  # type: ignore[misc]


def _hint(flag: str, known: list[str]) -> str:
    """What to do about a `flag` that is not known."""
    options = "--model.mixer-options."
    if flag.startswith(options):
        own = ", ".join(name for name in known if name.startswith(options)) or "none"
        return (
            f"only what the recipe sets can be changed here ({own}); set others in mixer_options of a copy of its file"
        )
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "--help lists them"


def _given(arguments: list[str], flag: str) -> list[str] | None:
    """The values of `flag` among `arguments`; `None` when it is not there."""
    found: list[str] | None = None
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            later = itertools.takewhile(lambda word: not word.startswith("--"), arguments[place + 1 :])
            found = [value] if equals else list(later)
    return found


def _with_one_end(arguments: list[str]) -> list[str]:
    """`arguments` that give steps alone also drop the seconds of the recipe, and the other way round."""
    for given, other in itertools.permutations(("--schedule.steps", "--schedule.seconds")):
        if _given(arguments, given) not in (None, ["None"]) and _given(arguments, other) is None:
            return [*arguments, other, "None"]
    return arguments


def _without_options_of_others[Config: CommonConfig](config: Config, arguments: list[str]) -> Config:
    """`config` without the options of mixers that are in its recipe's pattern and not in the one that is asked for."""
    pattern = _given(arguments, "--model.pattern")
    model: Any = config.model
    if pattern is None or not getattr(model, "mixer_options", None):
        return config
    kept = {name: options for name, options in model.mixer_options.items() if name in pattern}
    return dataclasses.replace(config, model=dataclasses.replace(model, mixer_options=kept))


def parse_arguments(target: Callable[..., Any], arguments: list[str], verb: str, **options: Any) -> Any:
    """`target` called with the arguments of `python -m train VERB`; tyro's framed errors become one line."""
    import tyro

    frame = io.StringIO()
    try:
        asks = {"-h", "--help"} & {*arguments}
        with contextlib.redirect_stderr(frame), contextlib.nullcontext() if asks else _wide():
            return tyro.cli(target, args=arguments, prog=f"python -m train {verb}", **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_unframed(frame.getvalue())} (python -m train {verb} --help lists the options)") from None


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """A terminal in which no line of an error is cut, for what is cut within a word cannot be joined again."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _unframed(page: str) -> str:
    """What tyro says between its title and the next rule, drawn in lines or, where the encoding has none, in dashes."""
    said: list[str] = []
    for line in page.splitlines()[1:]:
        text = line.strip(" │")
        if text.strip("─-╰╯"):
            said.append(text)
        elif said:
            break
    return " ".join(said)


def _flags(value: Any, prefix: str = "--") -> Iterator[str]:
    """Every override there is, as tyro spells it."""
    fields: Mapping[str, Any]
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        fields = value
    for name, entry in fields.items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if dataclasses.is_dataclass(entry) or isinstance(entry, Mapping):
            yield from _flags(entry, f"{flag}.")
        else:
            yield flag
            if isinstance(entry, bool):
                yield f"{prefix}no-{name.replace('_', '-')}"


def as_json(config: CommonConfig) -> dict[str, Any]:
    """`config` as JSON, from which `from_json` makes it again.

    A run that is not of text says its "task", and a field of several types the "type" of its value.
    """
    task = {} if config.task == RunConfig.task else {"task": config.task}
    return task | _values(config)


def _values(value: Any) -> dict[str, Any]:
    hints = get_type_hints(type(value))
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        if dataclasses.is_dataclass(entry):
            mark = {"type": type(entry).__name__} if _kinds(hints[field.name]) else {}
            entry = mark | _values(entry)
        found[field.name] = entry
    return found


def _kinds(hint: Any) -> dict[str, Any]:
    """The dataclasses of a union by name."""
    return {kind.__name__: kind for kind in get_args(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


def from_json(values: Mapping[str, Any], where: str) -> CommonConfig:
    """The configuration that `as_json` described.

    Raises:
      UserError: an unknown task, type or field; it begins with `where`.
    """
    values = dict(values)
    task = values.pop("task", RunConfig.task)
    if task not in CONFIGS:
        raise UserError(f"{where}: no task is called {task!r}, there are {', '.join(CONFIGS)}")
    module, _, name = CONFIGS[task].partition(":")
    return _build(getattr(importlib.import_module(module), name), values, where)


def save_config(config: CommonConfig, path: Path) -> None:
    """Write `config` as JSON, whole or not at all."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(as_json(config), indent=2) + "\n")
    os.replace(draft, path)


def read_config(path: Path) -> CommonConfig:
    """The configuration that `save_config` wrote; an unknown key is an error that names it."""
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent}: holds no run (no {path.name}); start one with python -m train run") from None
    except ValueError as problem:
        raise UserError(f"{path}: is not JSON ({problem}); restore the file or start in another workdir") from None
    with user_errors(str(path)):
        return from_json(values, path.name)


def _build(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise UserError(f"{where}: {kind.__name__} has no field {unknown[0]!r}; it was written by another version")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where.partition(":")[0])
    if kinds := _kinds(hint):
        own = dict(value)
        name = own.pop("type", None)
        if name not in kinds:
            raise UserError(f"{where}: expected one of the types {', '.join(kinds)}, got {name}")
        return _build(kinds[name], own, where.partition(":")[0])
    return _tuples(value)


def _tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples again."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
