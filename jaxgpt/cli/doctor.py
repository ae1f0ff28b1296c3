"""`jaxgpt doctor`: checks that this installation works, and says how to fix what does not."""

from __future__ import annotations

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints what each check found; returns 1 if one of them failed, else 0."""
    from jaxgpt.measuring import examine

    results = []
    for result in examine():
        results.append(result)
        if not args.json:
            mark = {True: "ok  ", False: "FAIL", None: "skip"}[result.good]
            print(f"{mark}  {result.name}: {result.found}", flush=True)
            if result.advice:
                print(f"      what to do: {result.advice}")
    if args.json:
        print(json.dumps({"checks": [dataclasses.asdict(result) for result in results]}, indent=2))
    return 1 if any(result.good is False for result in results) else 0
