"""`jaxgpt train`: trains a model from a config file, or fine-tunes one."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import textwrap

from jaxgpt.files import local


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # otherwise the epilog becomes one paragraph
    parser.epilog = describe_settings(max(60, shutil.get_terminal_size().columns - 2))
    parser.add_argument(
        "config", metavar="CONFIG.toml", help="a file with the tables [model], [compute], [mesh] and [train]"
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="a token file, or a UTF-8 text")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run's directory")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field of the config; all are listed below",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last good checkpoint in DIR")
    parser.add_argument("--force", action="store_true", help="resume even if the config or the data differ")
    parser.add_argument("--tensorboard", action="store_true", help="also write the metrics for TensorBoard")
    parser.add_argument("--mesh", metavar="AXES", help="devices, such as data=2,fsdp=4,tensor=2; -1: all the others")
    parser.add_argument("--distributed", action="store_true", help="be one of several processes that train together")
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0; default: the cluster's, or loopback"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes; default: as the cluster says")
    parser.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    parser.add_argument(
        "--join-timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the others; default: %(default)s",
    )
    parser.add_argument("--init-from", metavar="MODEL", help="fine-tune: start from any model that jaxgpt.load takes")


def describe_settings(width: int) -> str:
    """Lists every field that --set takes, by table of the config file, in lines of at most `width` characters."""
    from jaxgpt.config import PRESETS
    from jaxgpt.fields import settings
    from jaxgpt.training import TABLES

    def entry(key: str, text: str) -> list[str]:
        first = f"  {key} ".ljust(28)
        return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * 28, break_on_hyphens=False)

    lines = ["fields of the config, as KEY of --set KEY=VALUE:"]
    for table, config in TABLES.items():
        lines += ["", f"[{table}]"]
        if table == "model":
            choices = f"one of {', '.join(PRESETS)}"
            lines += entry("model.preset", f"Published model to start from; other fields override it. ({choices})")
        for declared in settings(config):
            lines += entry(declared.name if table == "train" else f"{table}.{declared.name}", str(declared))
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Trains, and returns the exit code: 128 + the signal's number if a signal ended the run."""
    from jaxgpt.errors import ConfigError
    from jaxgpt.parallel import MeshConfig
    from jaxgpt.training import TrainConfig

    for path in (args.config, args.data, args.out):
        local(path)
    config = TrainConfig.from_file(args.config, args.set)
    if args.mesh is not None:
        config = dataclasses.replace(config, mesh=MeshConfig.parse(args.mesh))
    if args.distributed:
        from jaxgpt.parallel import distributed

        distributed.initialize(args.coordinator, args.processes, args.process, args.join_timeout)
    elif (args.coordinator, args.processes, args.process) != (None, None, None):
        raise ConfigError("--coordinator, --processes and --process belong to --distributed")
    from jaxgpt.training import train

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
