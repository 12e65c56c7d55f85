"""The command line: `python -m train VERB ...`."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from train.errors import UserError

USAGE = """\
python -m train VERB ...

  run RECIPE [--workdir D] [overrides]   train; goes on by itself when D holds a valid checkpoint
  sample WORKDIR [options]               write text with a trained model
  eval WORKDIR [options]                 bits per byte on held-out or other text
  doctor                                 devices, versions, and which implementation each op would use, and why

Every verb answers --help. Recipes: {recipes}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, or 2 with one line on stderr when the user can mend it."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    verbs: dict[str, Callable[[list[str]], None]] = {"run": _run, "sample": _sample, "eval": _eval, "doctor": _doctor}
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            from train.config import recipes

            print(USAGE.format(recipes=", ".join(recipes())), end="")
            return 0 if arguments else 2
        if arguments[0] not in verbs:
            raise UserError(f"no verb is called {arguments[0]!r}; there are {', '.join(verbs)}")
        verbs[arguments[0]](list(arguments[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _run(arguments: list[str]) -> None:
    started = time.monotonic()  # before the imports, which are a part of a person's three minutes
    from train import config, loop

    if not arguments or arguments[0] in ("-h", "--help"):
        names = ", ".join(config.recipes())
        print(
            "usage: python -m train run RECIPE [--workdir D] [overrides]\n"
            f"recipes: {names}\noverrides: python -m train run RECIPE --help"
        )
        return
    recipe, arguments = arguments[0], arguments[1:]
    workdir, arguments = _take_workdir(arguments, Path("runs") / recipe)
    loop.run(config.parse_overrides(config.load_recipe(recipe), arguments), workdir, started=started)


def _take_workdir(arguments: list[str], default: Path) -> tuple[Path, list[str]]:
    for index, argument in enumerate(arguments):
        if argument.startswith("--workdir="):
            return Path(argument.removeprefix("--workdir=")), arguments[:index] + arguments[index + 1 :]
        if argument == "--workdir":
            if index + 1 == len(arguments):
                raise UserError("--workdir: expected a folder after it")
            return Path(arguments[index + 1]), arguments[:index] + arguments[index + 2 :]
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
    from train import loop
    from train.config import SampleConfig, parse_arguments

    if {"-h", "--help"} & {*arguments}:
        arguments = ["WORKDIR", "--help"]
    workdir, arguments = _take_run(arguments, "sample")
    options = parse_arguments(_SampleOptions, arguments, "sample WORKDIR")
    config, program, state = loop.load(workdir)
    sample = SampleConfig(
        (options.prompt,), options.tokens, options.temperature, options.top_p, options.top_k, options.min_p
    )
    config = dataclasses.replace(config, sample=sample)
    stream = _Utf8Printer()
    stream.write(options.prompt.encode())
    loop.write_text(
        program.model(state.parameters),
        config,
        options.prompt,
        seed=options.seed,
        on_token=lambda token: stream.write(bytes([int(token[0])])),
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
    """Bits per byte of a trained model."""

    data: tuple[str, ...] = ()
    """Files, folders or globs to score whole; without any, the run's own held-out documents."""
    field: str = "text"
    """Which field of a JSONL line holds the text."""


def _eval(arguments: list[str]) -> None:
    import json

    from train import evaluate, loop
    from train.config import parse_arguments
    from train.data.sources import read_documents, split_by_document

    if {"-h", "--help"} & {*arguments}:
        arguments = ["WORKDIR", "--help"]
    workdir, arguments = _take_run(arguments, "eval")
    options = parse_arguments(_EvalOptions, arguments, "eval WORKDIR")
    config, program, state = loop.load(workdir)
    if options.data:
        documents = read_documents(options.data, options.field)
    else:
        documents = split_by_document(read_documents(config.data.source, config.data.field), config.data.holdout)[1]
    bits = evaluate.bits_per_byte(program, state.parameters, documents, config.data)
    print(json.dumps({"bits_per_byte": bits, "documents": len(documents), "step": int(state.step)}))


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
