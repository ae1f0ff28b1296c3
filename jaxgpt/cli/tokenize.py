"""`jaxgpt tokenize`: turns text into a token file to train on."""

from __future__ import annotations

import argparse

from jaxgpt.config import TOKENIZERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("text", metavar="TEXT", help="a UTF-8 text file")
    parser.add_argument("out", metavar="OUT", help="the token file to write")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="gpt2", help="default: gpt2")


def run(args: argparse.Namespace) -> int:
    """Writes the token file and returns the exit code."""
    from jaxgpt.training import read_text

    tokens = read_text(args.text, args.tokenizer)
    tokens.save(args.out)
    print(f"{args.out}: {len(tokens.ids_N):,} tokens ({args.tokenizer}, vocabulary {tokens.vocab_size:,})")
    return 0
