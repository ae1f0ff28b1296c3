"""`jaxgpt plot`: draws the training curves of one or more runs."""

from __future__ import annotations

import argparse
import sys

from jaxgpt.cli.options import add_force
from jaxgpt.files import new_file

SUFFIXES = (".svg", ".png", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory, or its metrics.jsonl")
    parser.add_argument(
        "--out",
        default="curves.png",
        metavar="FILE",
        help="a .png, .svg or .pdf (default: %(default)s)",
    )
    add_force(parser, "replace FILE if it exists")
    parser.add_argument(
        "--x", choices=("tokens", "steps"), help="the x axis (default: tokens, if the runs say how many)"
    )
    parser.add_argument("--log-x", action="store_true", help="a logarithmic x axis")
    parser.add_argument("--log-loss", action="store_true", help="a logarithmic axis of the loss")
    parser.add_argument(
        "--smooth",
        type=float,
        default=0,
        metavar="STEPS",
        help="draw the training loss's moving average over it; a loss so many steps back weighs half",
    )
    parser.add_argument("--side-by-side", action="store_true", help="a column per run, with the same scales")


def run(args: argparse.Namespace) -> int:
    """Draws the curves, prints one line per run, and returns the exit code.

    Raises:
        ValueError: for any other type of file.
        DataError, ConfigError: if a run holds nothing to draw, or cannot be drawn against tokens; for a negative
            --smooth.
        MissingExtraError: without the extra [plot].
    """
    out = new_file(args.out, args.force)
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out must end with {', '.join(SUFFIXES)}, not {args.out!r}")

    from jaxgpt.pictures import style
    from jaxgpt.training import curves

    runs = curves.read_runs(args.runs)
    log = [axis for axis, wanted in (("x", args.log_x), ("loss", args.log_loss)) if wanted]
    style.save(curves.draw(runs, args.x, log=log, smooth=args.smooth, side_by_side=args.side_by_side), out)
    for curve in runs:
        print(f"{curve.name}: step {curve.last_step:,}{_losses(curve.points)}")
    print(f"drawn to {args.out}", file=sys.stderr)
    return 0


def _losses(points) -> str:
    text = ""
    if points["loss"]:
        text += f", training loss {points['loss'][max(points['loss'])]:.4f}"
    if validation := points["val_loss"]:
        best = min(validation, key=lambda step: validation[step])
        text += f", best validation loss {validation[best]:.4f} at step {best:,}"
    return text
