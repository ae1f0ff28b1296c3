"""`jaxgpt plan`: estimates a model's memory, time and communication on TPUs or GPUs, with none at hand."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from jaxgpt.accounting import format_bytes

MISSING = (
    "analytic estimate: the TPU compiler isn't installed, pip install 'jaxgpt[tpu]'. For the sizes of "
    "docs/scaling.md, training's memory is within {memory:.0%} of the compiler's and tokens/s within "
    "{tokens_per_s:.0%}; other models may be further off"
)
BY_FORMULA = (
    "by formula: nothing is compiled for GPUs. The formulas were fitted to programs for TPUs, and have been compared "
    "with no GPU's program and no measurement"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a preset's name, or a config file as for jaxgpt train")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="such as v5e:8x8, v5p:4x4x8, h100:8, or h100:4x8 (nodes)",
    )
    parser.add_argument(
        "--mesh", metavar="AXES", help="devices, such as fsdp=16,tensor=4; default: the config's, or fsdp=-1"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="rows per step; default: the config's, or one per part of the batch"
    )
    parser.add_argument(
        "--decode-batch", type=int, metavar="N", help="rows to decode, 0 for none; default: one per part of the batch"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field; see jaxgpt train --help"
    )
    parser.add_argument("--quick", action="store_true", help="compile with little optimisation: enough for memory only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Plans and prints. A model that does not fit is a result, with exit code 0.

    Raises:
        ConfigError: for an impossible slice, mesh or config.
    """
    from jaxgpt import planning

    topology = planning.Topology.parse(args.topology)
    config, chosen = planning.resolve(args.config, topology, args.mesh, args.set, args.batch)
    parts = planning.make_plan(config, topology, args.decode_batch, args.quick)
    report = {
        "model": args.config,
        "topology": topology.name,
        "chips": topology.size,
        "mesh": str(config.mesh),
        "batch": config.batch_size,
        "length": config.T,
        "chosen": chosen,
        "compiled": topology.platform == "tpu" and planning.compiler_available(),
        "quick": args.quick,
        "analytic_error": planning.ANALYTIC_ERROR,
        "attention": planning.attention(config, topology.platform),
        **parts,
    }
    print(json.dumps(report, indent=2) if args.json else _render(report, topology))
    return 0


def _render(report: dict[str, Any], topology: Any) -> str:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    with console.capture() as capture:
        if topology.platform == "gpu":
            console.print(BY_FORMULA, markup=False, soft_wrap=True)
        elif not report["compiled"]:
            console.print(MISSING.format(**report["analytic_error"]), markup=False, soft_wrap=True)
        chosen = ", ".join(f"{key} = {value}" for key, value in report["chosen"].items())
        chips = f"{report['chips']:,} chip{'s' if report['chips'] > 1 else ''}"
        console.print(
            f"{report['model']} on {report['topology']}, {chips}: mesh {report['mesh']}, "
            f"{report['batch']:,} x {report['length']:,} tokens per step"
            + (f"; chosen because the config does not say: {chosen}" if chosen else ""),
            soft_wrap=True,
            markup=False,
        )
        if report["compiled"] and report["quick"]:
            console.print("compiled quickly: HBM traffic, and times bound by it, are overestimated", soft_wrap=True)
        console.print(f"attention in training: {report['attention']}", markup=False)
        for name in ("training", "decoding"):
            if name in report:
                console.print(_table(name, report[name], topology))
                for way in ("compiled", "analytic"):
                    if reason := report[name].get(way, {}).get("does_not_fit"):
                        console.print(f"{name}: the compiler: {reason}", markup=False, soft_wrap=True)
        console.print(
            "All are per chip, except tokens/s. Overlapped: the largest of the three times; in turn: their sum. In "
            "a ring of n a chip sends: all-gather (n - 1) x its part, reduce-scatter and all-to-all (n - 1)/n x the "
            "whole, all-reduce 2 (n - 1)/n x the whole. MFU counts three forward passes per step.",
            soft_wrap=True,
        )
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _table(name: str, part: dict[str, Any], topology: Any) -> Any:
    from rich import box
    from rich.table import Table

    ways = [way for way in ("compiled", "analytic") if way in part]
    unit = "step" if name == "training" else "token per row"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(
        f"{name}, {part['tokens']:,} tokens {'per step' if name == 'training' else 'at a time'}", no_wrap=True
    )
    for way in ways:
        table.add_column(way, justify="right", no_wrap=True)

    def row(title: str, cell: Any) -> None:
        table.add_row(title, *("" if (value := cell(part[way])) is None else value for way in ways))

    def rows(title: str, group: str, show: Callable[[float], str]) -> None:
        for key in dict.fromkeys(key for way in ways for key in part[way].get(group, {})):
            row(title.format(key.replace("_", " ")), lambda way, key=key: _shown(way.get(group, {}).get(key), show))

    rows("{}", "memory_bytes", format_bytes)
    row(f"fits {format_bytes(topology.chip.hbm_bytes)}", lambda way: "yes" if way["fits"] else "NO")
    table.add_section()
    row(f"operations per {unit}", lambda way: _shown(way.get("flops"), "{:.3g}".format))
    row("read and written in HBM", lambda way: _shown(way.get("hbm_bytes"), format_bytes))
    if name == "decoding" and "compiled" in part:
        row("times the weights and the cache", lambda way: _shown(way.get("times_weights_and_cache"), "{:.2f}".format))
    rows("sent: {}", "wire_bytes", format_bytes)
    table.add_section()
    rows("ms: {}", "seconds", lambda seconds: f"{1000 * seconds:,.2f}")
    rows("tokens/s: {}", "tokens_per_s", "{:,.0f}".format)
    rows("MFU: {}", "mfu", "{:.1%}".format)
    return table


def _shown(value: float | None, show: Callable[[float], str]) -> str | None:
    return None if value is None else show(value)
