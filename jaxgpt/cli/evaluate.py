"""`jaxgpt evaluate`: measures a model's loss on a whole text, or its results in published benchmarks."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from jaxgpt.cli.options import (
    add_allow_special,
    add_model_arguments,
    add_skip_bad,
    add_text_key,
    given,
    load_model,
)
from jaxgpt.files import local


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data",
        metavar="FILE",
        help="texts (plain, JSON, Parquet), records, of which only the responses count, or tokens: a file, a "
        "directory, or a pattern of files",
    )
    what.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME=FILE",
        help="benchmarks on files that you have: hellaswag=hellaswag_val.jsonl, hellaswag_llmc=(the same, or llm.c's "
        ".bin), lambada_openai=lambada_test.jsonl, wikitext=, wikitext_verbatim= or wikitext_guide=wiki.test.raw; a "
        "name without a file is a task of lm-evaluation-harness (extra: eval), which downloads its data",
    )
    add_text_key(parser)
    add_allow_special(parser)
    add_skip_bad(parser)
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        help="tokens from one sequence's start to the next, for --data and wikitext_guide (default: the length of a "
        "sequence, so none overlap)",
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        default=0,
        metavar="N",
        help="with --data: tokens that a sequence reads, each of which predicts the next (default: the context)",
    )
    parser.add_argument(
        "--template", default="", help="with --data: how records become prompt and response (see `jaxgpt train --help`)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="with --data: sequences per call (default: 8)")
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="with --tasks: about how many tokens per call (default: %(default)s)",
    )
    parser.add_argument(
        "--last-fraction",
        type=float,
        metavar="F",
        help="with --data: use only the last fraction F of the tokens, such as a validation split",
    )
    parser.add_argument(
        "--separate-documents",
        action="store_true",
        help="with --data: restart attention and positions at each end-of-text, as a run with separate_documents does",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="with --tasks: only the first N examples of each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the metrics and returns the exit code."""
    return _run_tasks(args) if args.tasks else _run_text(args)


def _run_text(args: argparse.Namespace) -> int:
    from jaxgpt.data import MARKED, open_tokens
    from jaxgpt.parallel import memory_errors
    from jaxgpt.training import evaluate

    if option := given(args, "--limit", "--batch-tokens"):
        advice = {"--limit": "--last-fraction takes a part of a text", "--batch-tokens": "--data has --batch-size"}
        raise ValueError(f"{option} belongs to --tasks: {advice[option]}")
    local(args.data)
    model, params = load_model(args)
    tokens = open_tokens(
        args.data,
        model.config,
        args.tokenizer,
        text_key=args.text_key,
        allow_special=args.allow_special,
        template=args.template,
        longest=args.seq_len + 1 if args.seq_len else None,
        skip_bad=args.skip_bad,
    )
    for note in tokens.left_out:
        print(f"left out: {note}", file=sys.stderr)
    if any(shard.marked for shard in tokens.shards):
        print(f"note: {args.data} {MARKED}", file=sys.stderr)
    if args.last_fraction is not None and not 0 < args.last_fraction <= 1:
        raise ValueError(f"--last-fraction must be above 0 and at most 1, not {args.last_fraction}")
    ids_N = tokens.ids_N if args.last_fraction is None else tokens.split(args.last_fraction)[1]
    with memory_errors("lower --batch-size, or choose a --dtype of fewer bytes"):
        result = evaluate(
            model,
            params,
            ids_N,
            seq_len=args.seq_len,
            stride=args.stride,
            batch_size=args.batch_size,
            separate_documents=args.separate_documents,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f} bits per byte   "
        print(
            f"loss {result.loss:.4f} nats per token   perplexity {result.perplexity:.3f}   "
            f"{bits}over {result.tokens:,} tokens"
        )
    return 0


def _run_tasks(args: argparse.Namespace) -> int:
    from jaxgpt.parallel import memory_errors
    from jaxgpt.scoring import check_task, check_tasks, run_harness, run_task

    if option := given(
        args,
        "--seq-len",
        "--last-fraction",
        "--separate-documents",
        "--batch-size",
        "--text-key",
        "--allow-special",
        "--skip-bad",
        "--template",
    ):
        advice = ": --tasks have --batch-tokens" if option == "--batch-size" else ""
        raise ValueError(f"{option} belongs to --data{advice}")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be 1 or more, not {args.limit}")
    built_in, others = parse_tasks(args.tasks)
    if args.stride and "wikitext_guide" not in built_in:
        raise ValueError("--stride belongs to --data and to the task wikitext_guide")
    for name, path in built_in.items():
        check_task(name, path)
    if others:
        check_tasks(others)
    model, params = load_model(args)
    printed: dict[str, Any] = {}
    with memory_errors("lower --batch-tokens, or choose a --dtype of fewer bytes"):
        for name, path in built_in.items():
            with _Progress(name) as show:
                result = run_task(
                    model,
                    params,
                    name,
                    path,
                    limit=args.limit,
                    stride=args.stride if name == "wikitext_guide" else 0,
                    batch_tokens=args.batch_tokens,
                    progress=show,
                )
            printed[name] = dataclasses.asdict(result)
            if not args.json:
                title = f"{name}: {result.variant} ({result.examples:,} examples of {result.file})"
                _show(title, result.metrics, result.published)
        if others:
            results = run_harness(model, params, others, limit=args.limit, batch_tokens=args.batch_tokens)
            for name, metrics in results.items():
                printed[name] = {"variant": "lm-evaluation-harness", "metrics": metrics}
                if not args.json:
                    _show(f"{name}: as lm-evaluation-harness defines it", metrics)
    if args.json:
        print(json.dumps(printed))
    return 0


def _show(title: str, metrics: dict[str, float], published: Sequence[Any] = ()) -> None:
    print(title)
    for metric, value in metrics.items():
        print(f"    {metric:<16} {value:>9.4f}")
        for figure in published:
            if figure.metric == metric:
                print(f"        GPT-2: {figure}")


def parse_tasks(entries: list[str]) -> tuple[dict[str, str], list[str]]:
    """(files by built-in task, tasks of lm-evaluation-harness) of entries NAME=FILE and NAME, which commas may join.

    Raises:
        ValueError: for an empty name or file, and for a task given twice.
    """
    built_in: dict[str, str] = {}
    others: list[str] = []
    for entry in ",".join(entries).split(","):
        name, given, path = entry.partition("=")
        if not name or (given and not path):
            raise ValueError(f"--tasks takes NAME=FILE or NAME, not {entry!r}")
        if name in built_in or name in others:
            raise ValueError(f"--tasks names {name} twice")
        if given:
            built_in[name] = path
        else:
            others.append(name)
    return built_in, others


class _Progress:
    """A bar on a terminal, nothing elsewhere; called with how much is done, and how much there is."""

    def __init__(self, name: str):
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task(name, total=None)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
