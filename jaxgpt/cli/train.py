"""`jaxgpt train`: train a model from a config file, or fine-tune one."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("config", metavar="CONFIG.toml", help="a file with [model] and [train] tables")
    parser.add_argument("--data", required=True, metavar="FILE", help="a token file, or a UTF-8 text")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run's directory")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field; a model's is model.KEY"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last good checkpoint in DIR")
    parser.add_argument("--force", action="store_true", help="resume though the config or the data differ")
    parser.add_argument("--tensorboard", action="store_true", help="write the metrics for TensorBoard too")
    parser.add_argument("--init-from", metavar="MODEL", help="fine-tune: start from anything that loads")


def run(args: argparse.Namespace) -> int:
    """Trains, and returns the exit code: 128 + the signal's number if one ended the run."""
    from jaxgpt.train_config import TrainConfig
    from jaxgpt.trainer import train

    config = TrainConfig.from_file(args.config, args.set)
    result = train(
        config,
        args.data,
        args.out,
        resume=args.resume,
        force=args.force,
        init_from=args.init_from,
        tensorboard=args.tensorboard,
    )
    return 128 + result.stopped_by if result.stopped_by else 0
