"""`jaxgpt evaluate`: measures a model's loss on a whole text."""

from __future__ import annotations

import argparse
import dataclasses
import json

from jaxgpt.cli.options import add_model_arguments, load_model
from jaxgpt.files import local


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="a token file, or a UTF-8 text")
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        help="tokens from one sequence's start to the next (default: the context, so none overlap)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per call (default: 8)")
    parser.add_argument(
        "--last-fraction",
        type=float,
        metavar="F",
        help="use only the last fraction F of the tokens, such as a validation split",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the metrics and returns the exit code."""
    from jaxgpt.data import open_tokens
    from jaxgpt.parallel import memory_errors
    from jaxgpt.training import evaluate

    local(args.data)
    model, params = load_model(args)
    tokens = open_tokens(args.data, model.config, args.tokenizer)
    if args.last_fraction is not None and not 0 < args.last_fraction <= 1:
        raise ValueError(f"--last-fraction must be above 0 and at most 1, not {args.last_fraction}")
    ids_N = tokens.ids_N if args.last_fraction is None else tokens.split(args.last_fraction)[1]
    with memory_errors("lower --batch-size, or choose a --dtype of fewer bytes"):
        result = evaluate(model, params, ids_N, stride=args.stride, batch_size=args.batch_size)
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f} bits per byte   "
        print(
            f"loss {result.loss:.4f} nats per token   perplexity {result.perplexity:.3f}   "
            f"{bits}over {result.tokens:,} tokens"
        )
    return 0
