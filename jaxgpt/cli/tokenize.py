"""`jaxgpt tokenize`: turns text into a token file to train on."""

from __future__ import annotations

import argparse

from jaxgpt.cli.options import add_force
from jaxgpt.files import new_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("text", metavar="TEXT", help="a UTF-8 text file")
    parser.add_argument("out", metavar="OUT", help="the token file to write")
    add_force(parser, "replace OUT if it exists")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME_OR_PATH",
        help="gpt2 (the default), bytes, or a directory, file or hub name with a tokenizer, such as the model's own",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the token file and returns the exit code."""
    new_file(args.out, args.force)

    from jaxgpt.data import read_text

    tokens = read_text(args.text, args.tokenizer)
    tokens.save(args.out)
    print(f"{args.out}: {len(tokens.ids_N):,} tokens (tokenizer {tokens.tokenizer}, vocabulary {tokens.vocab_size:,})")
    return 0
