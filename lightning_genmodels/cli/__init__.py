"""The command ``genmodels``. Help and listings do not import PyTorch, which takes seconds."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from lightning_genmodels import __version__
from lightning_genmodels.errors import GenmodelsError
from lightning_genmodels.training import signals

TRAINER_COMMANDS = ("fit", "validate", "test")

SUMMARIES = {
    "fit": "train a model: Lightning's Trainer.fit",
    "validate": "validate a model: Lightning's Trainer.validate",
    "test": "test a model: Lightning's Trainer.test",
    "sample": "draw images",
    "log_prob": "print how likely images are: log-probabilities in nats, exact or a lower bound",
    "encode": "write the codes of images",
    "complete": "draw what is missing from images, given the rest",
    "interpolate": "draw images between latent points",
    "app": "open the models in a browser",
    "evaluate": "measure a trained model: the protocol behind every published figure",
    "export": "turn a checkpoint into weights to share",
    "curves": "draw learning curves of runs",
    "audit": "check theorems that a model must satisfy",
    "verify": "recompute published figures, image by image",
    "publish": "upload weights to the Hugging Face Hub, with a card",
    "list": "list models and trained weights",
    "recipes": "list recipes, or copy one",
}
"""What each command does."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``genmodels`` and of ``recipes/train.py``; user errors end it with one line and status 2."""
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(f"genmodels {__version__}")
    elif args in ([], ["-h"], ["--help"]):
        print(_usage())
    elif args == ["list"]:
        print(listing())
    elif args in (["recipes"], ["recipes", "ls"]):
        print("\n".join(sorted(recipes())))
    else:
        _run(args)


def listing() -> str:
    """Models, and the trained weights of each."""
    from lightning_genmodels.weights.names import list_models
    from lightning_genmodels.weights.records import list_weights

    lines = [f"{model:20} {', '.join(list_weights(model)) or 'no trained weights yet'}" for model in list_models()]
    return "\n".join(lines)


def recipes() -> dict[str, Path]:
    """The files of all recipes by name; they lie inside an installed package, and beside it in a checkout."""
    package = Path(__file__).parents[1]
    folder = next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())
    return {path.stem: path for path in folder.glob("*.yaml")}


def _usage() -> str:
    commands = "\n".join(f"  {name:12} {summary}" for name, summary in SUMMARIES.items())
    return (
        "usage: genmodels [-h] [--version] command ...\n\nTrained generative models of binary images.\n\n"
        f"commands, each with its own --help:\n{commands}"
    )


def _run(args: list[str]) -> None:
    with signals.listening() if args[0] == "fit" else nullcontext():
        _run_command(args)


def _run_command(args: list[str]) -> None:
    from lightning_genmodels.system import reuse_freed_memory, set_matmul_precision

    reuse_freed_memory()
    set_matmul_precision()
    try:
        if args[0] in TRAINER_COMMANDS:
            from lightning_genmodels.cli.train import TrainingCLI

            TrainingCLI(args)
        else:
            from lightning_genmodels.cli.commands import run

            run(args)
    except KeyboardInterrupt as error:
        sys.stderr.write(f"genmodels: interrupted; {error if error.args else 'nothing was written'}\n")
        raise SystemExit(130) from error
    except BrokenPipeError as error:  # a reader such as head has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
        raise SystemExit(141) from error  # as a shell reports SIGPIPE
    except argparse.ArgumentError as error:
        command = f"genmodels {args[0]}" if args[0] in SUMMARIES else "genmodels"
        sys.stderr.write(f"genmodels: error: {_one_line(error)}; {command} --help lists what there is\n")
        raise SystemExit(2) from error
    except UnicodeDecodeError as error:
        sys.stderr.write(f"genmodels: error: expected a configuration in YAML, got a file that is no text: {error}\n")
        raise SystemExit(2) from error
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, GenmodelsError):
            cause = cause.__cause__  # the parser wraps what a constructor raises
        if (
            cause is None and type(error).__name__ == "MisconfigurationException"
        ):  # Lightning's, of the Trainer's options
            cause = error
        if cause is None:
            raise
        line = " ".join(str(cause).split())
        sys.stderr.write(f"genmodels: error: {line}\n")
        raise SystemExit(2) from error


def _one_line(error: argparse.ArgumentError) -> str:
    """A parser's error in one line: the option, what was expected and what was given."""
    text = " ".join(str(error).split())
    inner = re.search(r"Problem with given class_path .*?: (Parser key .*?)(?: - Expected|$)", text)
    text = re.sub(r"<class '([^']*)'>", r"\1", inner[1] if inner else text)
    one = re.fullmatch(r'Parser key "([^"]+)": Expected an? (.*?)\. Got value: (.*)', text)
    if one is not None:
        return f"--{one[1]}: expected {one[2]}, got {one[3]}"
    several = re.fullmatch(r'Parser key "([^"]+)": .*? Errors: (.*) Given value type: .* Given value: (.*)', text)
    if several is not None:
        expected = " or ".join(re.findall(r"Expected an? (.*?)(?= - |$|\. )", several[2]))
        return f"--{several[1]}: expected {expected}, got {several[3]}"
    return text
