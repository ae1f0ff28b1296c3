"""`jaxgpt inspect`: shows a model's parameter tree and costs, from its config alone, and what it does with a text."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgpt import accounting
from jaxgpt.accounting import MIB
from jaxgpt.cli.options import add_force
from jaxgpt.config import PARAM_DTYPES, PRESETS, GPTConfig
from jaxgpt.errors import ConfigError
from jaxgpt.files import new_directory

# Table 2 of Radford et al. 2019, by (n_layers, emb_dim).
_PAPER_NAMES = {(12, 768): "117M", (24, 1024): "345M", (36, 1280): "762M", (48, 1600): "1542M"}

# Of the LoRA adapters whose memory is shown.
_RANK = 16

# Wide enough for every row of the largest preset, for output that does not go to a terminal.
_PIPED_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="a preset's name, a .toml or .json config file, or a checkpoint to load"
    )
    parser.add_argument("--all", action="store_true", help="list every block, instead of one for all")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--batch", type=int, default=1, help="rows, to count operations and cache (default: 1)")
    parser.add_argument(
        "--length", type=int, help="tokens per row, to count operations and cache (default: the context)"
    )

    parser.add_argument(
        "--prompt", metavar="TEXT", help="load the model, and show what each block would predict on this text"
    )
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="with --prompt: what another model with the same tokenizer makes of it, side by side",
    )
    parser.add_argument(
        "--plot",
        metavar="DIR",
        help="write pictures, and one page with all of them, DIR/index.html: the architecture and, with --prompt, the "
        "attention, the next tokens and the logit lens (extra: plot)",
    )
    add_force(parser, "write pictures into DIR even if it holds files, and replace those of the same names")


def run(args: argparse.Namespace) -> int:
    """Prints the report and returns the exit code."""
    if args.plot is not None:
        new_directory(args.plot, args.force)
    elif args.force:
        raise ConfigError("--force belongs to --plot, which writes: without it nothing is written")
    if args.all and args.json:
        raise ConfigError("--all and --json exclude each other: JSON has every block anyway")
    if args.against is not None and args.prompt is None:
        raise ConfigError("--against compares what two models make of a text: give it (--prompt TEXT)")
    config, inside = (resolve_config(args.model), None) if args.prompt is None else read(args.model, args.prompt)
    other = None
    if args.against is not None:
        other_config, other = read(args.against, args.prompt)
        if other_config.tokenizer != config.tokenizer:
            raise ConfigError(
                f"--against {args.against} has tokenizer {other_config.tokenizer}, and {args.model} has "
                f"{config.tokenizer}: only models with the same tokenizer read the same ids"
            )
    report = make_report(config, args.batch, config.context_length if args.length is None else args.length)
    if inside is not None:
        report["inside"] = inside_report(config, args.prompt, inside)
    if other is not None:
        report["against"] = {"model": args.against, **inside_report(config, args.prompt, other)}
    if args.plot is not None:
        from jaxgpt.pictures import write_comparison, write_pictures

        name = Path(args.model).resolve().name
        if inside is None or other is None:
            page, *pictures = write_pictures(args.plot, name, config, inside, args.prompt)
        else:
            names = (args.model, args.against)  # in full, because two checkpoints often have one name
            page, *pictures = write_comparison(args.plot, names, config, (inside, other), args.prompt)
        print(f"{page} shows {len(pictures)} picture{'s' * (len(pictures) != 1)}, beside it as PNG", file=sys.stderr)
    if args.json:
        print(json.dumps({"model": args.model, **report}, indent=2))
    else:
        print(_render(args.model, config, report, expand=args.all), end="")
    return 0


def resolve_config(name: str) -> GPTConfig:
    """The config of a preset, a config file, or anything that `jaxgpt.load` takes. Reads no weights.

    Raises:
        ConfigError: if a config file is invalid, or `name` is none of these.
        CheckpointError: if a checkpoint is invalid.
    """
    if name in PRESETS:
        return GPTConfig.preset(name)
    if Path(name).suffix in (".toml", ".json"):
        return GPTConfig.from_file(name)
    from jaxgpt.training import load_config

    return load_config(name)


def read(name: str, prompt: str) -> tuple[GPTConfig, Any]:
    """Loads a model and runs it on a prompt: its config, and the `jaxgpt.interpret.Inside`.

    Raises:
        ConfigError: for a model without weights.
        CheckpointError, MissingExtraError: if the model cannot be loaded.
        ValueError: for a prompt beyond the context, or with tokens that the model does not have.
    """
    # The presets of GPT-2 itself have the hub's names, and load from there.
    preset = name in PRESETS and not name.startswith("gpt2") and not Path(name).exists()
    if preset or Path(name).suffix in (".toml", ".json"):
        raise ConfigError(
            f"{name} is a config without weights, and --prompt needs a model that can read: shakespeare, gpt2, or the "
            "path of a checkpoint"
        )
    from jaxgpt.generation import encode_prompt
    from jaxgpt.interpret import look_inside
    from jaxgpt.training import load

    model, params = load(name)
    return model.config, look_inside(model, params, encode_prompt(model.config, prompt))


def inside_report(config: GPTConfig, prompt: str, inside: Any) -> dict[str, Any]:
    """The model's predictions for the prompt, as plain values: the likeliest next tokens at each position, and the same
    after each block, where "after_block" null means the embeddings; the last block's are the model's."""
    from jaxgpt.interpret import token_labels
    from jaxgpt.tokenizer import get_tokenizer

    tokenizer = get_tokenizer(config.tokenizer)

    def tokens(ids: Any, probabilities: Any) -> list[dict[str, Any]]:
        return [
            {"id": int(i), "token": label, "probability": float(p)}
            for i, label, p in zip(ids, token_labels(tokenizer, ids), probabilities, strict=True)
        ]

    predicted = [
        [tokens(ids_K, p_K) for ids_K, p_K in zip(*place, strict=True)]
        for place in zip(inside.top_ids_NxTxK, inside.top_probabilities_NxTxK, strict=True)
    ]
    came = tokens(inside.ids_T[1:], inside.true_probabilities_NxS[-1])
    labels = token_labels(tokenizer, inside.ids_T)
    return {
        "prompt": prompt,
        "positions": [
            {"id": int(i), "token": label, "next": tops, "came_next": after}
            for i, label, tops, after in zip(inside.ids_T, labels, predicted[-1], [*came, None], strict=True)
        ],
        "lens": [
            {"after_block": n - 1 if n else None, "positions": positions} for n, positions in enumerate(predicted)
        ],
    }


def make_report(config: GPTConfig, batch: int, length: int) -> dict[str, Any]:
    """All numbers, as plain values ready for JSON. Sizes are in bytes, and work in single operations.

    Raises:
        ValueError: if `batch` or `length` is not positive, or `length` is beyond the context.
    """
    counts = accounting.count_parameters(config)
    forward = accounting.forward_flops(config, batch, length)
    training = accounting.training_flops(config, batch, length)
    adapters = accounting.count_adapters(config, _RANK)
    return {
        "config": config.to_dict(),
        "parameters": {
            "total": counts.total,
            "without_embeddings": counts.without_embeddings,
            "by_component": vars(counts),
        },
        "parameter_bytes": {dtype: accounting.parameter_bytes(config, dtype) for dtype in accounting.DTYPE_BYTES},
        "batch": batch,
        "length": length,
        "forward_flops": {**vars(forward), "total": forward.total},
        "training_flops": {**vars(training), "total": training.total},
        "training_bytes": {
            "whole": accounting.training_bytes(config),
            f"lora_rank_{_RANK}": accounting.training_bytes(config, adapters, adapters),
            f"lora_rank_{_RANK}_bfloat16": accounting.training_bytes(config, adapters, adapters, "bfloat16"),
        },
        "cache_bytes": {dtype: accounting.cache_bytes(config, batch, length, dtype) for dtype in PARAM_DTYPES},
        "tree": [
            {"path": path, "shape": list(shape), "parameters": math.prod(shape)}
            for path, shape in accounting.parameter_shapes(config).items()
        ],
    }


def notes(config: GPTConfig) -> Iterator[str]:
    """Explains counts that differ from what a reader expects."""
    counts = accounting.count_parameters(config)
    if config.tie_embeddings:
        head = config.vocab_size * config.emb_dim
        yield (
            f"The output head is tok_emb itself, which is counted once. A separate matrix, as in the book-* presets, "
            f"would add {head:,}: {counts.total + head:,} in all."
        )
    else:
        yield (
            f"The output head is a separate matrix. With it tied to tok_emb, as in OpenAI's GPT-2, the count would be "
            f"{counts.total - counts.out_head:,}; names such as 124M mean that one."
        )
    yield "1 MiB is 1,048,576 bytes; the book prints the same numbers as MB."
    if config.banded_layers:
        yield (
            "Attention is dense in layers 0, 2, ... and banded in 1, 3, ..., where a query sees "
            f"{config.attention_window} positions: there the operations count only those, not the whole length."
        )
    paper = _PAPER_NAMES.get((config.n_layers, config.emb_dim))
    if paper and (config.vocab_size, config.context_length) == (50257, 1024):
        yield f"The GPT-2 paper calls this size {paper}: an early miscount by its authors."


def _render(name: str, config: GPTConfig, report: dict[str, Any], expand: bool) -> str:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
    # Captured, so that only one plain `print` can meet a closed pipe.
    with console.capture() as capture:
        console.print(
            f"{name}: n_layers {config.n_layers}, emb_dim {config.emb_dim:,}, n_heads {config.n_heads}, "
            f"context_length {config.context_length:,}, vocab_size {config.vocab_size:,}, tokenizer {config.tokenizer}",
            markup=False,
        )
        console.print(_tree_table(config, report, expand))
        console.print(_totals_table(report))
        for note in notes(config):
            console.print(f"\n{note}")
        if "inside" in report:
            for title, table in _inside_tables(report["inside"], console.width):
                console.print(f"\n{title}")
                console.print(table)
        if "against" in report:
            for model, read_by in ((name, report["inside"]), (report["against"]["model"], report["against"])):
                console.print(f"{_bits(read_by)}: {model}", markup=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _bits(inside: dict[str, Any]) -> str:
    """The mean surprise at the tokens of the text after the first."""
    came = [position["came_next"]["probability"] for position in inside["positions"] if position["came_next"]]
    if not came:
        return "no token to predict"
    bits = [-math.log2(p) if p else math.inf for p in came]
    return f"{sum(bits) / len(bits):.3f} bits per token of the text"


def _tree_table(config: GPTConfig, report: dict[str, Any], expand: bool) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("component", no_wrap=True)
    for header in ("shape", "parameters", "share"):
        table.add_column(header, justify="right", no_wrap=True)
    total = report["parameters"]["total"]
    L = config.n_layers
    in_blocks = sum(leaf["parameters"] for leaf in report["tree"] if leaf["path"].startswith("trf_blocks_"))
    for leaf in report["tree"]:
        block, _, rest = leaf["path"].partition("/")
        shape, size = " x ".join(f"{n:,}" for n in leaf["shape"]), leaf["parameters"]
        if expand or not block.startswith("trf_blocks_"):
            table.add_row(leaf["path"], shape, f"{size:,}", f"{size / total:.2%}")
        elif block == "trf_blocks_0":
            if rest == "norm1/scale":
                blocks = f"trf_blocks_0 to {L - 1}, each:" if L > 1 else "trf_blocks_0:"
                table.add_row(blocks, "", f"{in_blocks:,}", f"{in_blocks / total:.2%}")
            table.add_row(f"  {rest}", shape, f"{L} x {size:,}", f"{L * size / total:.2%}")
    table.add_section()
    table.add_row("total", "", f"{total:,}", "100.00%")
    return table


def _totals_table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    for component, size in report["parameters"]["by_component"].items():
        grid.add_row(component, f"{size:,}")
    grid.add_row("all but embeddings and head", f"{report['parameters']['without_embeddings']:,}")
    for dtype, size in report["parameter_bytes"].items():
        grid.add_row(f"parameters in {dtype}", f"{size / MIB:,.2f} MiB")
    for title, size in zip(
        ("training, without activations", f"the same with LoRA of rank {_RANK}", "the same beside a bfloat16 model"),
        report["training_bytes"].values(),
        strict=True,
    ):
        grid.add_row(title, f"{size / MIB:,.2f} MiB")
    rows = f"{report['batch']} x {report['length']:,}"
    for title, key in (("forward pass", "forward_flops"), ("training step without remat", "training_flops")):
        flops = report[key]
        grid.add_row(f"{title}, {rows}, linear layers", f"{flops['linear']:,} FLOPs")
        grid.add_row(f"{title}, {rows}, attention", f"{flops['attention']:,} FLOPs")
    for dtype, size in report["cache_bytes"].items():
        grid.add_row(f"key/value cache, {rows}, {dtype}", f"{size / MIB:,.2f} MiB")
    return grid


def _inside_tables(inside: dict[str, Any], line: int) -> Iterator[tuple[str, Any]]:
    """Titles and tables, with as many of the likeliest tokens as fit on a line."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    positions, lens = inside["positions"], inside["lens"]
    likeliest = [token for place in lens for tops in place["positions"] for token in tops]
    width = min(9, max(len(token["token"]) for token in (*likeliest, *positions)))
    gap = 3  # between columns
    cell = max(width + len(" 100%"), len("likeliest")) + gap
    fits = (line + gap - len("999") - gap - width - gap) // cell - 1  # one column is "came next"
    ranks = ["likeliest", *(f"no. {i}" for i in range(2, len(positions[0]["next"]) + 1))][: max(1, fits)]

    def cells(tokens: list[dict[str, Any]]) -> list[Text]:
        # Text, because rich would read markup in a plain string.
        return [Text(f"{token['token']:<{width}.{width}} {token['probability']:>4.0%}") for token in tokens]

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right")
    for header in ("token", *ranks, "came next"):
        table.add_column(header, no_wrap=True)
    for i, position in enumerate(positions):
        came = [position["came_next"]] if position["came_next"] else []
        token = Text(f"{position['token']:.{width}}")
        table.add_row(str(i), token, *cells(position["next"][: len(ranks)]), *cells(came))
    yield "What the model expects after each token:", table
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("after", *ranks):
        table.add_column(header, no_wrap=True)
    for place in lens:
        block = place["after_block"]
        name = "the embeddings" if block is None else f"block {block}"
        table.add_row(name, *cells(place["positions"][-1][: len(ranks)]))
    yield "The logit lens at the last token; the last block's predictions are the model's:", table
