"""The command line: `python -m train VERB ...`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

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
    return 0


def _run(arguments: list[str]) -> None:
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
    loop.run(config.parse_overrides(config.load_recipe(recipe), arguments), workdir)


def _take_workdir(arguments: list[str], default: Path) -> tuple[Path, list[str]]:
    for index, argument in enumerate(arguments):
        if argument.startswith("--workdir="):
            return Path(argument.removeprefix("--workdir=")), arguments[:index] + arguments[index + 1 :]
        if argument == "--workdir":
            if index + 1 == len(arguments):
                raise UserError("--workdir: expected a folder after it")
            return Path(arguments[index + 1]), arguments[:index] + arguments[index + 2 :]
    return default, arguments


def _sample(arguments: list[str]) -> None:
    import dataclasses

    import tyro

    from train import loop
    from train.config import SampleConfig

    def sample(
        workdir: Annotated[Path, tyro.conf.Positional],
        prompt: str = "The ",
        tokens: int = 400,
        temperature: float = 0.8,
        top_p: float | None = 0.95,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int = 0,
    ) -> None:
        """Write text with the model of a run, as it comes.

        Args:
            workdir: the folder of the run.
            prompt: what the text continues.
            tokens: how many bytes to write.
            temperature: 0 takes the likeliest byte every time.
            top_p: keep the likeliest bytes that together reach this probability.
            top_k: keep the k likeliest bytes.
            min_p: keep bytes at least this fraction as likely as the likeliest.
            seed: the same seed gives the same text.
        """
        config, program, state = loop.load(workdir)
        options = SampleConfig((prompt,), tokens, temperature, top_p, top_k, min_p)
        stream = _Utf8Printer()
        stream.write(prompt.encode())
        loop.write_text(
            program.model(state.parameters),
            dataclasses.replace(config, sample=options),
            prompt,
            seed=seed,
            on_token=lambda token: stream.write(bytes([int(token[0])])),
        )
        print()

    _cli(sample, "sample", arguments)


class _Utf8Printer:
    """Prints bytes as they come, a character as soon as it is whole."""

    def __init__(self) -> None:
        import codecs

        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, data: bytes) -> None:
        print(self._decoder.decode(data), end="", flush=True)


def _eval(arguments: list[str]) -> None:
    import json

    import tyro

    from train import evaluate, loop
    from train.data.sources import read_documents, split_by_document

    def evaluate_run(
        workdir: Annotated[Path, tyro.conf.Positional],
        data: tuple[str, ...] = (),
        field: str = "text",
    ) -> None:
        """Bits per byte of a trained model.

        Args:
            workdir: the folder of the run.
            data: files, folders or globs to score whole; without any, the run's own held-out documents.
            field: which field of a JSONL line holds the text.
        """
        config, program, state = loop.load(workdir)
        if data:
            documents = read_documents(data, field)
        else:
            documents = split_by_document(read_documents(config.data.source, config.data.field), config.data.holdout)[1]
        bits = evaluate.bits_per_byte(program, state.parameters, documents, config.data)
        print(json.dumps({"bits_per_byte": bits, "documents": len(documents), "step": int(state.step)}))

    _cli(evaluate_run, "eval", arguments)


def _doctor(arguments: list[str]) -> None:
    from train import doctor

    _cli(doctor.doctor, "doctor", arguments)


def _cli(function: Callable[..., Any], verb: str, arguments: list[str]) -> None:
    import tyro

    tyro.cli(function, args=arguments, prog=f"python -m train {verb}")


if __name__ == "__main__":
    sys.exit(main())
