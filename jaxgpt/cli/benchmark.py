"""`jaxgpt benchmark`: a table of speeds, each with the limit that the machine sets."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from jaxgpt.config import PRESETS
from jaxgpt.files import new_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("--preset", choices=PRESETS, default="gpt2", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--only", action="append", metavar="PART", help="only the workloads whose name contains PART; may be repeated"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also run PyTorch, CTranslate2, llama.cpp and others, alternating (extra: bench)",
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="keep the best of N processes per row")
    parser.add_argument("--profile", metavar="DIR", help="write traces, and print the costliest operations of each row")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measures each workload in a separate process, and prints the results. Progress goes to stderr.

    Raises:
        ValueError: if --only matches nothing, or --rounds is below 1.
        ConfigError: if --profile is no directory's path.
        MissingExtraError: for --peers if none is installed.
    """
    from jaxgpt import planning
    from jaxgpt.cpu import kernel, sequences
    from jaxgpt.errors import MissingExtraError
    from jaxgpt.measuring import benchmark, workloads
    from jaxgpt.measuring import peers as benchmark_peers

    # Traces have the date in their names, so they replace none that are there.
    profile = None if args.profile is None else new_directory(args.profile, force=True)
    if args.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, not {args.rounds}")
    # Not asked here: this process must not hold a device that the others need.
    device = benchmark.run_in_process("jaxgpt.measuring.benchmark", "device", args.preset)
    platform = device["platform"]
    everything = workloads.workloads(args.preset, platform)
    measurable = [work for work in everything if work.kind not in workloads.LIMITS]
    chosen = [work for work in measurable if not args.only or any(part in work.name for part in args.only)]
    if not chosen and args.only != ["start"]:
        names = ", ".join(work.name for work in measurable)
        raise ValueError(f"--only {' '.join(args.only)} matches none of {names}, start")
    if args.peers and chosen and not any(benchmark_peers.available(work) for work in chosen):
        raise MissingExtraError("torch", "bench", "jaxgpt benchmark --peers")

    if platform == "cpu" and kernel.can_build():
        print(f"building the CPU kernel ({kernel.VARIABLE}=0: never)", file=sys.stderr)
        kernel.build_once()

    if not kernel.available():  # which lookup needs
        chosen = [work for work in chosen if work.kind not in ("copy", "mislead")]

    def measured(module: str, name: str, *arguments: str, timeout: float = benchmark.LONGEST) -> dict[str, Any]:
        # Each result is told at once: all of them may take an hour, and this may be stopped before.
        print(f"{name} {' '.join(arguments)}".strip(), end="", file=sys.stderr, flush=True)
        try:
            result = benchmark.run_in_process(module, name, args.preset, *arguments, timeout=timeout)
        except RuntimeError:
            print(": failed", file=sys.stderr)
            raise
        print(f": {1000 * result['seconds']:,.1f} ms", file=sys.stderr)
        return result

    took = {
        work.name: measured("jaxgpt.measuring.benchmark", work.name)["seconds"]
        for work in everything
        if work.kind in workloads.LIMITS
    }
    read, flops, launch = benchmark.limit_rates(took, platform)
    report: dict[str, Any] = {
        "preset": args.preset,
        "platform": platform,
        "device": benchmark.processor() if platform == "cpu" else device["device"],
        "processor": benchmark.processor(),
        "read_bytes_per_s": read,
        "matmul_flops_per_s": flops,
        "launch_seconds": launch,
        "native_kernel": kernel.available(),
        "native_sequences": sequences.preferred("float32"),
        "missing_peers": {},
        "rows": [],
    }
    for work in chosen if args.peers else []:
        report["missing_peers"] |= benchmark_peers.missing(work)
    for work in chosen:
        runs: dict[str, list[dict[str, Any]]] = {"jaxgpt": []}
        for peer in benchmark_peers.available(work) if args.peers else []:
            runs[peer] = []
        failures: dict[str, str] = {}
        patience = benchmark.LONGEST
        for _ in range(args.rounds):  # alternating, so that a busy moment affects all of them
            for program, results in runs.items():
                if program in failures:
                    continue
                module, extra = "jaxgpt.measuring.peers", [program]
                if work.platform != "cpu":
                    extra.append(work.platform)
                if program == "jaxgpt":
                    module, extra = (
                        "jaxgpt.measuring.benchmark",
                        [str(profile / work.name)] if profile else [],
                    )
                began = time.perf_counter()
                try:
                    results.append(measured(module, work.name, *extra, timeout=patience))
                    if program == "jaxgpt":
                        # PyTorch takes many minutes in bfloat16 on a processor without units for it.
                        patience = max(300.0, 10 * (time.perf_counter() - began))
                except RuntimeError as error:  # the other rows still count
                    failures[program] = str(error)
        best = {program: min(runs[program], key=lambda run: run["seconds"]) for program in runs if runs[program]}
        bound = workloads.limit(work, read, flops)
        assert bound is not None
        rates = {program: work.tokens / result["seconds"] for program, result in best.items()}
        report["rows"].append(
            {
                "work": work.name,
                "tokens_per_s": rates,
                "ms": 1000 * best["jaxgpt"]["seconds"] if "jaxgpt" in best else None,
                "limit_tokens_per_s": bound[0],
                "formula": bound[1],
                "peak_bytes": {program: result["peak_bytes"] for program, result in best.items()},
                "costliest": best.get("jaxgpt", {}).get("costliest", []),
                "attention": best.get("jaxgpt", {}).get("attention"),
                "failures": failures,
            }
        )
    if not args.only or "start" in args.only:
        print("start", file=sys.stderr)
        report["start_seconds"] = dict(zip(("cold", "compiled"), benchmark.cold_and_warm_start(), strict=True))
    if any(work.kind == "feed" for work in chosen):
        report["host_takes_tokens_per_s"] = planning.host_takes(args.preset)
    print(json.dumps(report, indent=2) if args.json else _table(report))
    return 0


def _peers(row: dict[str, Any]) -> list[str]:
    """The peers that were measured, the fastest first."""
    rates = row["tokens_per_s"]
    return sorted(rates.keys() - {"jaxgpt"}, key=rates.__getitem__, reverse=True)


def _table(report: dict[str, Any]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from jaxgpt import planning

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("workload", no_wrap=True)
    with_peers = any(_peers(row) for row in report["rows"])
    for header in ("tokens/s", "ms", "% of limit", "peak GB", *(("x best peer",) if with_peers else ())):
        table.add_column(header, justify="right", no_wrap=True)
    for row in report["rows"]:
        if "jaxgpt" not in row["tokens_per_s"]:
            table.add_row(row["work"], "failed")
            continue
        rate, peers = row["tokens_per_s"]["jaxgpt"], _peers(row)
        ratio = f"{rate / row['tokens_per_s'][peers[0]]:.2f} ({peers[0]})" if peers else ""
        share, peak = rate / row["limit_tokens_per_s"], row["peak_bytes"]["jaxgpt"] / 1e9
        table.add_row(row["work"], f"{rate:,.1f}", f"{row['ms']:,.0f}", f"{share:.0%}", f"{peak:.1f}", ratio)
    matmul = ", ".join(
        f"{flops / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, flops in report["matmul_flops_per_s"].items()
    )
    with console.capture() as capture:
        kernel = "in use" if report["native_kernel"] else "not in use (jaxgpt build-kernel)"
        if report["native_sequences"]:
            kernel += ", for whole sequences too"
        console.print(
            f"{report['preset']} on {report['device']}. "
            f"Limits: reading {report['read_bytes_per_s'] / 1e9:,.1f} GB/s; matrix product {matmul}; starting a "
            f"program and waiting for it {1e6 * report['launch_seconds']:,.0f} µs."
            + (f" Native kernel: {kernel}." if report["platform"] == "cpu" else ""),
            soft_wrap=True,
        )
        if report["rows"]:
            console.print(table)
        for row in report["rows"]:
            if peers := _peers(row):
                told = (
                    f"{peer} {row['tokens_per_s'][peer]:,.1f} ({row['peak_bytes'][peer] / 1e9:.1f} GB)"
                    for peer in peers
                )
                console.print(f"peers in {row['work']}, tokens/s (peak): {', '.join(told)}", soft_wrap=True)
        for peer, lack in report["missing_peers"].items():
            console.print(f"not compared with {peer}: {lack}", soft_wrap=True)
        for formula in dict.fromkeys(row["formula"] for row in report["rows"]):
            workloads = ", ".join(row["work"] for row in report["rows"] if row["formula"] == formula)
            console.print(f"limit of {workloads}: {formula}", soft_wrap=True)
        if "host_takes_tokens_per_s" in report:
            console.print(
                f"feed: batches of a token file. A host of a pod takes at most "
                f"{report['host_takes_tokens_per_s']:,.0f} tokens/s of them (training on {planning.HOST})",
                soft_wrap=True,
            )
        for backend in dict.fromkeys(row["attention"] for row in report["rows"] if row["attention"]):
            workloads = ", ".join(row["work"] for row in report["rows"] if row["attention"] == backend)
            console.print(f"attention of {workloads}: {backend}", soft_wrap=True)
        if "start_seconds" in report:
            seconds = report["start_seconds"]
            console.print(
                f"first text of the bundled model: {seconds['cold']:.1f} s in a cold process, "
                f"{seconds['compiled']:.1f} s with the compile cache"
            )
        for row in report["rows"]:
            for program, reason in row["failures"].items():
                console.print(f"{row['work']}, {program} failed: {reason}", markup=False, soft_wrap=True)
        for row in report["rows"]:
            if row["costliest"]:
                console.print(f"\n{row['work']}, costliest operations:")
                for name, ms in row["costliest"]:
                    console.print(f"{ms:10.2f} ms  {name}", markup=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
