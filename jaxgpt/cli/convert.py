"""`jaxgpt convert SRC DST`: converts a checkpoint of any format to the project's own, Hugging Face's or llama.cpp's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxgpt.cli.options import add_force, add_tokenizer, tokenizer_note
from jaxgpt.config import PARAM_DTYPES
from jaxgpt.errors import ConfigError, require
from jaxgpt.files import new_directory, new_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument(
        "src", metavar="SRC", help="checkpoint file or directory, run directory, bundled name, or hub name[@REVISION]"
    )
    parser.add_argument("dst", metavar="DST", help="directory to write, or FILE.gguf (extra [gguf])")
    parser.add_argument("--format", choices=("jaxgpt", "huggingface"), help="of a directory (default: jaxgpt)")
    parser.add_argument(
        "--outtype", choices=("f32", "f16", "bf16", "q8_0"), help="type of the matrices in FILE.gguf (default: f32)"
    )
    parser.add_argument("--param-dtype", choices=PARAM_DTYPES, help="type to convert the parameters to")
    parser.add_argument("--n-heads", type=int, metavar="N", help="number of attention heads, if SRC does not say")
    add_tokenizer(parser)
    parser.add_argument("--check-finite", action="store_true", help="refuse NaN and infinite values")
    add_force(parser, "replace DST if it is a checkpoint")


def run(args: argparse.Namespace) -> int:
    """Converts, and reports on stderr what was written.

    Raises:
        CheckpointError, ConfigError, MissingExtraError: as from `jaxgpt.load`, `jaxgpt.save` and
            `jaxgpt.write_gguf`; also if DST exists without --force.
    """
    to_gguf = args.format is None and Path(args.dst).suffix.lower() == ".gguf"
    form, outtype = args.format or "jaxgpt", args.outtype or "f32"
    if to_gguf:
        new_file(args.dst, args.force)
        require("gguf", "gguf", f"writing {args.dst}")  # before a large model is read in vain
    elif args.outtype is not None:
        raise ConfigError(f"--outtype is for FILE.gguf: give DST such a name instead of {args.dst}, and no --format")
    else:
        new_directory(args.dst, args.force)

    from jaxgpt.accounting import count_parameters
    from jaxgpt.training import load
    from jaxgpt.weights import save, write_gguf

    given = {"n_heads": args.n_heads, "param_dtype": args.param_dtype, "tokenizer": args.tokenizer}
    overrides = {name: value for name, value in given.items() if value is not None}
    model, params = load(args.src, check_finite=args.check_finite, **overrides)
    if to_gguf:
        form = f"gguf ({outtype})"
        write_gguf(args.dst, model, params, outtype=outtype)
    else:
        save(args.dst, model, params, format=form)
    count = count_parameters(model.config).total
    tokenizer = model.config.tokenizer
    note = tokenizer_note(args.dst, form, tokenizer)
    print(f"{args.dst}: {form}, {count:,} parameters, tokenizer {tokenizer}{note}", file=sys.stderr)
    return 0
