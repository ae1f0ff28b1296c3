"""`jaxgpt export`: writes a training run's checkpoint as a loadable model."""

from __future__ import annotations

import argparse

from jaxgpt.cli.options import add_force, tokenizer_note
from jaxgpt.config import PARAM_DTYPES
from jaxgpt.errors import CheckpointError
from jaxgpt.files import new_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("run_directory", metavar="DIR", help="the run's directory, --out of jaxgpt train")
    parser.add_argument("out", metavar="OUT", help="the directory to write")
    parser.add_argument("--format", choices=("jaxgpt", "huggingface"), default="jaxgpt", help="default: jaxgpt")
    parser.add_argument(
        "--step",
        default="best",
        help="a step that has a checkpoint, 'best' (lowest validation loss, the default) or 'latest'",
    )
    add_force(parser, "replace OUT if it is a checkpoint")
    parser.add_argument("--param-dtype", choices=PARAM_DTYPES, default="float32", help="default: float32")


def run(args: argparse.Namespace) -> int:
    """Writes the model and returns the exit code."""
    new_directory(args.out, args.force)

    from jaxgpt.training import load_run
    from jaxgpt.weights import save

    step, model, params = load_run(args.run_directory, _step(args), param_dtype=args.param_dtype)
    save(args.out, model, params, format=args.format)
    tokenizer = model.config.tokenizer
    note = tokenizer_note(args.out, args.format, tokenizer)
    print(f"{args.out}: step {step} of {args.run_directory}, as {args.format}, tokenizer {tokenizer}{note}")
    return 0


def _step(args: argparse.Namespace) -> str | int:
    if args.step in ("best", "latest"):
        return args.step
    if not args.step.isdigit():
        raise CheckpointError(args.run_directory, f"--step takes a number, 'best' or 'latest', not {args.step!r}")
    return int(args.step)
