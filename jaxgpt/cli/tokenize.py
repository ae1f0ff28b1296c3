"""`jaxgpt tokenize`: turns texts into token files to train on."""

from __future__ import annotations

import argparse
import sys

from jaxgpt.cli.options import add_allow_special, add_force, add_text_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a file with documents (text, JSON, both also as .gz or .zst, or Parquet), a directory or a pattern "
        "of such files",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the directory to write; if the command is interrupted, running it again continues there",
    )
    add_force(parser, "replace the token files in DIR")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME_OR_PATH",
        help="gpt2 (the default), bytes, or a directory, file or hub name with a tokenizer, such as the model's own",
    )
    add_text_key(parser)
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that encode; default: one per core, if there is enough to do",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens after which a token file is closed and the next begun (%(default)s)",
    )
    add_allow_special(parser)
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out and count records without a text instead of stopping"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the token files, shows how far it is, and returns the exit code."""
    from jaxgpt.data import MARKED, TEXT_KEY, tokenize
    from jaxgpt.files import local

    for path in (*args.sources, args.out):
        local(path)
    from jaxgpt.cli.progress import BytesProgress

    try:
        with BytesProgress() as progress:
            result = tokenize(
                args.sources,
                args.out,
                args.tokenizer,
                workers=args.workers,
                shard_tokens=args.shard_tokens,
                text_key=args.text_key or TEXT_KEY,
                allow_special=args.allow_special,
                skip_bad=args.skip_bad,
                force=args.force,
                report=progress.update,
            )
    except KeyboardInterrupt:
        print(f"interrupted: run the same command again to continue {args.out}", file=sys.stderr)
        raise
    index, counts = result.index, result.counts
    shards = f"{len(index.shards):,} file{'s' * (len(index.shards) > 1)}"
    kept = f", {result.kept:,} of them from before" if result.kept else ""
    between = (
        "end-of-text after each" if index.end_of_text is not None else "nothing between them: it has no end-of-text"
    )
    print(
        f"{args.out}: {index.tokens:,} tokens of {index.documents:,} document{'s' * (index.documents != 1)} in {shards}"
        f"{kept} (tokenizer {index.tokenizer}, vocabulary {index.vocab_size:,}; {between})"
    )
    if counts.empty:
        print(f"{counts.empty:,} empty documents were left out", file=sys.stderr)
    if counts.bad:
        print(f"{counts.bad:,} records without a text were left out, the first: {counts.first_bad}", file=sys.stderr)
    if counts.marked:
        print(f"note: a text {MARKED}", file=sys.stderr)
    return 0
