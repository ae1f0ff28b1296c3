"""The options shared by commands that run a model: which model, in which type, on which devices."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from jaxgpt.config import PARAM_DTYPES
from jaxgpt.tokenizer import NONE


def given(args: argparse.Namespace, *options: str) -> str:
    """The first of these options that was given, such as "--batch-size"; '' if none was.

    An option that has no effect in the mode that was chosen is an error: its user expects one.
    """
    for option in options:
        name = option.removeprefix("--").replace("-", "_")
        value = getattr(args, name)
        # Of those that take one value, `given` knows; others are flags and lists.
        if name in getattr(args, "given", ()) or value is True or (isinstance(value, list) and value):
            return option
    return ""


def add_force(parser: argparse.ArgumentParser, what: str) -> None:
    """Declares --force, without which the commands that write replace nothing."""
    parser.add_argument("--force", action="store_true", help=what)


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Declares --tokenizer, for models that came without one."""
    parser.add_argument(
        "--tokenizer",
        metavar="NAME_OR_PATH",
        help="the model's tokenizer, if it lies elsewhere: a directory, file or hub name, gpt2, bytes, or none",
    )


def tokenizer_note(out: str, format: str, tokenizer: str) -> str:
    """What a report of a written model says of a tokenizer that stayed behind; as a rule ''."""
    if format != "huggingface" or tokenizer == NONE or (Path(out) / "tokenizer.json").is_file():
        return ""
    return " (left out: it has ids that the model lacks)"


def add_text_key(parser: argparse.ArgumentParser) -> None:
    """Declares --text-key."""
    parser.add_argument(
        "--text-key",
        metavar="KEY",
        help="where records have their text: a key of JSON, a column of Parquet (text)",
    )


def add_allow_special(parser: argparse.ArgumentParser) -> None:
    """Declares --allow-special."""
    parser.add_argument(
        "--allow-special", action="store_true", help="special tokens in texts, such as <|endoftext|>, are tokens"
    )


def add_skip_bad(parser: argparse.ArgumentParser) -> None:
    """Declares --skip-bad."""
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out and count records that cannot be used instead of stopping"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --model, --tokenizer, --dtype and --mesh."""
    parser.add_argument(
        "--model",
        default="shakespeare",
        help="checkpoint file or directory, run directory, bundled name, or hub name[@REVISION] (%(default)s)",
    )
    add_tokenizer(parser)
    parser.add_argument(
        "--dtype",
        choices=PARAM_DTYPES,
        help="type of the parameters and of matrix products (int8: matrices only); default: as saved",
    )
    parser.add_argument("--mesh", metavar="AXES", help="devices, such as data=2,tensor=4 (default: one)")


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The (model, params) that these arguments ask for.

    Raises:
        CheckpointError, ConfigError, MissingExtraError, OSError: if the model cannot be read.
        ConfigError: also if the mesh cannot be made.
    """
    from jaxgpt.cpu import kernel
    from jaxgpt.generation import prepare
    from jaxgpt.parallel import MeshConfig, sharding
    from jaxgpt.training import load

    mesh = None if args.mesh is None else sharding.make_mesh(MeshConfig.parse(args.mesh))
    # Parameters that will be sharded must not first fill one device.
    with contextlib.nullcontext() if mesh is None else sharding.on_host():
        given = {"param_dtype": args.dtype, "tokenizer": args.tokenizer}
        stored = {name: value for name, value in given.items() if value is not None}
        model, params = prepare(*load(args.model, **stored), args.dtype)
    if kernel.builds_in_background():
        print(f"building the CPU kernel for later commands ({kernel.VARIABLE}=0: never)", file=sys.stderr)
    if mesh is not None:
        sharding.check(mesh, model.config)
        params = sharding.shard(params, mesh)
    return model, params
