"""`jaxgpt train`: trains a model from a config file, fine-tunes one, or continues a run."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import textwrap
from typing import TYPE_CHECKING

from jaxgpt.cli.options import add_allow_special, add_skip_bad, add_text_key, given
from jaxgpt.cli.restarts import supervise
from jaxgpt.files import local

if TYPE_CHECKING:
    from jaxgpt.training import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    from jaxgpt.training import TRACKERS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # otherwise the epilog becomes one paragraph
    parser.epilog = describe_settings(max(60, shutil.get_terminal_size().columns - 2))
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="a recipe's name, such as finetune-gpt2, or a file with the tables [model], [compute], [mesh], [lora] and "
        "[train]; a run that is resumed has its own",
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="[NAME=]PATH[:WEIGHT]",
        help="a file of texts (plain, JSON, Parquet), of prompts with responses or chats (the latter two), or of "
        "tokens (jaxgpt's, llm.c's, nanoGPT's, Megatron's .idx), a directory, such as `jaxgpt tokenize` writes, or a "
        "pattern of files; "
        "given several times, a mixture: by size, or by weights. A run that is resumed knows where its data is",
    )
    parser.add_argument(
        "--val-data",
        action="append",
        metavar="[NAME=]PATH",
        help="what to validate on; default: the val files of a directory, or else the last val_fraction of each source",
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME_OR_PATH", help="what made the ids of token files that do not say, such as gpt2"
    )
    add_text_key(parser)
    add_allow_special(parser)
    add_skip_bad(parser)
    parser.add_argument(
        "--verify", action="store_true", help="read all data before the first step, to check its hashes and ids"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--out", metavar="DIR", help="start a run, whose directory this will be; on a disk, or gs://BUCKET/NAME"
    )
    where.add_argument(
        "--resume",
        metavar="RUN",
        help="continue the run in this directory from its last good checkpoint, with its own config and data; "
        "--set steps=N trains it longer",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field of the config; all are listed below",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the config, the tokens, the first batch and the memory of a step, which is compiled; write nothing",
    )
    parser.add_argument("--force", action="store_true", help="resume even if the config or the data differ")
    parser.add_argument(
        "--log-to",
        action="append",
        default=[],
        choices=TRACKERS,
        metavar="TRACKER",
        help=f"also log the metrics to one of {', '.join(TRACKERS)}, each of which is an extra; may be repeated",
    )
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
    parser.add_argument(
        "--stall-timeout",
        type=int,
        default=600,
        metavar="SECONDS",
        help="of several processes: end this one if a step has not ended after so long, or another has given no sign "
        "of life (for that, at most 100); default: %(default)s",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="if the process is killed or fails for other reasons than bad input, continue from the last checkpoint in "
        "a new one, up to N times",
    )
    parser.add_argument("--init-from", metavar="MODEL", help="fine-tune: start from any model that jaxgpt.load takes")


def describe_settings(width: int) -> str:
    """Lists every field that --set takes, by table of the config file, in lines of at most `width` characters."""
    from jaxgpt.config import PRESETS
    from jaxgpt.fields import settings
    from jaxgpt.training import TABLES

    def entry(key: str, text: str) -> list[str]:
        indent = " " * 28
        first, *more = textwrap.wrap(
            text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
        label = f"  {key} "
        # As argparse does: a key that is too long for its column has a line of its own.
        start = [label.rstrip(), first] if len(label) > len(indent) else [label.ljust(len(indent)) + first.lstrip()]
        return [*start, *more]

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
    """Trains, and returns the exit code: 128 + the signal's number if a signal ended the run.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError, MissingExtraError: as from `jaxgpt.train`; also if the
            arguments neither start a run nor continue one.
    """
    from jaxgpt.errors import ConfigError
    from jaxgpt.parallel import MeshConfig
    from jaxgpt.training import storage

    for path in filter(None, (args.config, *(args.data or ()), *(args.val_data or ()))):
        local(path)
    if args.restarts < 0:
        raise ConfigError(f"--restarts must be 0 or more, not {args.restarts}")
    if args.restarts and not args.dry_run and (code := supervise(args)) is not None:
        return code
    directory = args.resume if args.out is None else args.out
    storage.storage(directory)  # what it needs must be there before other processes are waited for
    config = configure(args)
    if args.mesh is not None:
        config = dataclasses.replace(config, mesh=MeshConfig.parse(args.mesh))
    if args.distributed:
        from jaxgpt.parallel import distributed

        distributed.initialize(
            args.coordinator, args.processes, args.process, args.join_timeout, stall_timeout=args.stall_timeout
        )
    elif option := given(args, "--coordinator", "--processes", "--process", "--join-timeout", "--stall-timeout"):
        raise ConfigError(f"{option} belongs to --distributed")
    if args.force and args.resume is None:
        raise ConfigError("--force belongs to --resume: a new run needs a directory without one")
    if args.dry_run:
        from jaxgpt.training import dry_run

        if args.resume is not None or args.distributed:
            raise ConfigError("--dry-run is for a new run, in one process: give --out, and not --distributed")
        if option := given(args, "--verify", "--log-to"):
            raise ConfigError(f"{option} has no effect with --dry-run, which trains nothing and writes nothing")
        paragraphs = dry_run(
            config,
            args.data,
            val_data=args.val_data,
            tokenizer=args.tokenizer,
            text_key=args.text_key,
            allow_special=args.allow_special,
            skip_bad=args.skip_bad,
            init_from=args.init_from,
        )
        for paragraph in paragraphs:
            print(paragraph, flush=True)
        return 0
    from jaxgpt.training import train

    result = train(
        config,
        args.data,
        directory,
        val_data=args.val_data,
        tokenizer=args.tokenizer,
        text_key=args.text_key,
        allow_special=args.allow_special,
        skip_bad=args.skip_bad,
        verify=args.verify,
        resume=args.resume is not None,
        force=args.force,
        init_from=args.init_from,
        log_to=args.log_to,
    )
    return 128 + result.stopped_by if result.stopped_by else 0


def configure(args: argparse.Namespace) -> TrainConfig:
    """The config that the arguments ask for: a file's, or that of the run to resume, with the fields of --set."""
    from jaxgpt.errors import ConfigError
    from jaxgpt.training import TrainConfig

    if args.resume is not None and (args.config is None or not args.force):
        from jaxgpt.training import Run

        run = Run(args.resume)
        if args.config is not None:
            run.check_config(TrainConfig.from_file(args.config), args.config)
        return run.config(args.set)
    if args.config is None or (args.data is None and args.resume is None):
        raise ConfigError("a new run needs CONFIG and --data FILE; --resume RUN continues one")
    return TrainConfig.from_file(args.config, args.set)
