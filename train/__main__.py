"""The command line: `python -m train VERB ...`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from train.errors import UserError

USAGE = """\
python -m train VERB ...

  run RECIPE [--workdir D] [overrides]   train; goes on by itself when D holds a valid checkpoint
  compile RECIPE --topology T            whether it would fit chips that are not here, and what it would do there
  compare RECIPE --mixers A B            the same budget for several mixers and seeds: table, plot, JSON
                 --models A B            of images, for several models and folds
  sample WORKDIR [options]               write text with a trained model
  eval WORKDIR [options]                 the figures on held-out or other data
  export WORKDIR [options]               the weights as safetensors
  inspect WORKDIR                        what a checkpoint holds, whether it is whole, and which run made it
  launch slurm|gke|tpu_vm RECIPE         the script that runs it on many hosts, shown or submitted
  doctor                                 devices, versions, and which implementation each op would use, and why

Every verb answers --help. Recipes: {recipes}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 with one line on stderr when the user can mend it; 1 when no one reads stdout any more."""
    try:
        try:
            return _call(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as after `| head`; Python flushes again when it exits (documentation of `signal`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _call(arguments: list[str]) -> int:
    verbs: dict[str, Callable[[list[str]], int | None]] = {
        "run": _run,
        "compile": _module("compile"),
        "compare": _module("compare"),
        "sample": _sample,
        "eval": _eval,
        "export": _module("export"),
        "inspect": _module("inspect"),
        "launch": _module("launch"),
        "doctor": _doctor,
    }
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            from train.config import recipes

            print(USAGE.format(recipes=", ".join(recipes())), end="")
            return 0 if arguments else 2
        if arguments[0] not in verbs:
            raise UserError(f"no verb is called {arguments[0]!r}; there are {', '.join(verbs)}")
        return verbs[arguments[0]](arguments[1:]) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "train", "jattn", "pallas_kernels"):
            raise
        print(
            f"error: {missing} is not installed here ({sys.executable}); make setup, then .venv/bin/python -m train "
            f"{shlex.join(arguments)}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _module(name: str) -> Callable[[list[str]], int | None]:
    """The verb that is a module of its own, imported when it is called."""

    def verb(arguments: list[str]) -> int | None:
        import importlib

        return importlib.import_module(f"train.{name}").main(arguments)

    return verb


def _run(arguments: list[str]) -> None:
    started = time.monotonic()  # before the imports, which are a part of a person's three minutes
    from train import config, distributed

    if not arguments or arguments[0] in ("-h", "--help"):
        names = ", ".join(config.recipes())
        print(
            "usage: python -m train run RECIPE [--workdir D] [overrides]\n"
            f"recipes: {names}\n"
            "overrides: python -m train run RECIPE --help\n"
            "many hosts, the same command on each: --distributed auto (SLURM, GKE, Cloud TPU), or\n"
            "  --coordinator HOST:PORT --num-processes N --process-id I"
        )
        return
    recipe, arguments = arguments[0], arguments[1:]
    workdir, arguments = _take_workdir(arguments, Path("runs") / Path(recipe).stem)
    processes, arguments = distributed.take_flags(arguments)
    settings = config.parse_overrides(config.load_recipe(recipe), arguments)
    distributed.initialise(processes)
    from train import loop

    with distributed.together():
        loop.run(settings, workdir, started=started)


def _take_workdir(arguments: list[str], default: Path) -> tuple[Path, list[str]]:
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--workdir":
            rest = arguments[index + 1 :]
            if not equals:
                value, rest = "".join(rest[:1]), rest[1:]
            if not value or value.startswith("--"):
                raise UserError("--workdir: expected a folder after it")
            return Path(value), arguments[:index] + rest
    return default, arguments


def _take_run(arguments: list[str], verb: str) -> tuple[Path, list[str]]:
    """The folder of a run, which comes first, and the options after it."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"{verb}: expected the folder of a run first, as in python -m train {verb} runs/pydoc_lm")
    return Path(arguments[0]), arguments[1:]


@dataclasses.dataclass(frozen=True)
class _SampleOptions:
    """Write text with the model of a run, as it comes."""

    prompt: str = "The "
    """What the text continues."""
    tokens: int = 400
    """How many bytes to write."""
    temperature: float = 0.8
    """0 takes the likeliest byte every time."""
    top_p: float | None = 0.95
    """Keep the likeliest bytes that together reach this probability."""
    top_k: int | None = None
    """Keep the k likeliest bytes."""
    min_p: float | None = None
    """Keep bytes at least this fraction as likely as the likeliest."""
    seed: int = 0
    """The same seed gives the same text."""


def _sample(arguments: list[str]) -> None:
    from train.config import RunConfig, SampleConfig, parse_arguments, read_config
    from train.data.tokenizer import load_tokenizer
    from train.tasks.text import write_text
    from train.workdir import load

    if {"-h", "--help"} & {*arguments}:
        arguments = ["WORKDIR", "--help"]
    workdir, arguments = _take_run(arguments, "sample")
    options = parse_arguments(_SampleOptions, arguments, "sample WORKDIR")
    config = read_config(workdir / "config.json")
    if not isinstance(config, RunConfig):
        raise UserError(f"{workdir}: was trained on {config.task}, and sample writes text; eval gives its figures")
    if config.data.recall.task is not None:
        raise UserError(
            f"{workdir}: was trained on {config.data.recall.task}, which is no text; eval gives its accuracy"
        )
    _, program, state = load(workdir)
    tokenizer = load_tokenizer(config.data.tokenizer, workdir, None, config.model.vocab_size)
    sample = SampleConfig(
        (options.prompt,), options.tokens, options.temperature, options.top_p, options.top_k, options.min_p
    )
    config = dataclasses.replace(config, sample=sample)
    stream = _Utf8Printer()
    stream.write(options.prompt.encode())
    write_text(
        program.model(state.weights),
        config,
        tokenizer,
        options.prompt,
        seed=options.seed,
        on_token=lambda token: stream.write(tokenizer.decode([int(token[0])])),
    )
    print()


class _Utf8Printer:
    """Prints bytes as they come, a character as soon as it is whole."""

    def __init__(self) -> None:
        import codecs

        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, data: bytes) -> None:
        print(self._decoder.decode(data), end="", flush=True)


@dataclasses.dataclass(frozen=True)
class _EvalOptions:
    """The figures of a trained model."""

    data: tuple[str, ...] = ()
    """Files, folders or globs to score whole; without any, what the run itself held out, and its own sets."""
    field: str = "text"
    """Of text: which field of a JSONL line holds it."""


def _eval(arguments: list[str]) -> None:
    import json

    from train.config import parse_arguments
    from train.evaluate import score
    from train.workdir import load

    if {"-h", "--help"} & {*arguments}:
        arguments = ["WORKDIR", "--help"]
    workdir, arguments = _take_run(arguments, "eval")
    options = parse_arguments(_EvalOptions, arguments, "eval WORKDIR")
    config, program, state = load(workdir)
    task = program.task
    loaded = task.load(workdir)
    sets = {"data": task.given(loaded, options.data, options.field)} if options.data else loaded.evaluation
    rows = config.data.batch // config.data.accumulate
    scores = {name: score(program, state.weights, one, rows) for name, one in sets.items()}
    print(json.dumps({"step": int(state.step), **scores}))


def _doctor(arguments: list[str]) -> None:
    from train import doctor

    if arguments and arguments[0] not in ("-h", "--help"):
        raise UserError(f"doctor: takes no options, got {' '.join(arguments)}")
    if arguments:
        print(f"usage: python -m train doctor\n\n{doctor.doctor.__doc__}")
    else:
        doctor.doctor()


if __name__ == "__main__":
    sys.exit(main())
