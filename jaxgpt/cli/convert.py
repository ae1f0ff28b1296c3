"""`jaxgpt convert SRC DST`: converts a checkpoint of any format to the project's own or Hugging Face's."""

from __future__ import annotations

import argparse
import sys

from jaxgpt.cli.options import add_force, add_tokenizer, tokenizer_note
from jaxgpt.config import PARAM_DTYPES
from jaxgpt.files import new_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument(
        "src", metavar="SRC", help="checkpoint file or directory, run directory, bundled name, or hub name[@REVISION]"
    )
    parser.add_argument("dst", metavar="DST", help="directory to write")
    parser.add_argument("--format", choices=("jaxgpt", "huggingface"), default="jaxgpt", help="default: %(default)s")
    parser.add_argument("--param-dtype", choices=PARAM_DTYPES, help="type to convert the parameters to")
    parser.add_argument("--n-heads", type=int, metavar="N", help="number of attention heads, if SRC does not say")
    add_tokenizer(parser)
    parser.add_argument("--check-finite", action="store_true", help="refuse NaN and infinite values")
    add_force(parser, "replace DST if it is a checkpoint")


def run(args: argparse.Namespace) -> int:
    """Converts, and reports on stderr what was written.

    Raises:
        CheckpointError, ConfigError, MissingExtraError: as from `jaxgpt.load` and `jaxgpt.save`; also if DST
            exists without --force.
    """
    new_directory(args.dst, args.force)

    from jaxgpt.accounting import count_parameters
    from jaxgpt.training import load
    from jaxgpt.weights import save

    given = {"n_heads": args.n_heads, "param_dtype": args.param_dtype, "tokenizer": args.tokenizer}
    overrides = {name: value for name, value in given.items() if value is not None}
    model, params = load(args.src, check_finite=args.check_finite, **overrides)
    save(args.dst, model, params, format=args.format)
    count = count_parameters(model.config).total
    tokenizer = model.config.tokenizer
    note = tokenizer_note(args.dst, args.format, tokenizer)
    print(f"{args.dst}: {args.format}, {count:,} parameters, tokenizer {tokenizer}{note}", file=sys.stderr)
    return 0
