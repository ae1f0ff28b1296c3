"""The `jaxgpt` command: one module per subcommand, imported only when it is called."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from jaxgpt import startup
from jaxgpt.checks import did_you_mean, first_line
from jaxgpt.cli import completion
from jaxgpt.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    KernelError,
    MissingExtraError,
    OutOfMemoryError,
    TrainingError,
)
from jaxgpt.version import __version__

# name: (module with `add_arguments(parser)` and `run(args) -> int`, help). JAX may be imported only within `run`.
COMMANDS = {
    "generate": ("jaxgpt.cli.generate", "continue a text"),
    "inspect": ("jaxgpt.cli.inspect", "show a model's size and cost, and how it reads a text"),
    "convert": ("jaxgpt.cli.convert", "write a checkpoint in another layout"),
    "tokenize": ("jaxgpt.cli.tokenize", "turn texts into token files to train on"),
    "train": ("jaxgpt.cli.train", "train a model, or fine-tune one"),
    "plot": ("jaxgpt.cli.plot", "draw the training curves of one or more runs"),
    "evaluate": ("jaxgpt.cli.evaluate", "measure a model's loss on a text, or by benchmarks"),
    "benchmark": ("jaxgpt.cli.benchmark", "measure speed, and compare it with the machine's limits"),
    "doctor": ("jaxgpt.cli.doctor", "check that this installation works"),
    "plan": ("jaxgpt.cli.plan", "estimate what a model needs on TPUs or GPUs"),
    "build-kernel": ("jaxgpt.cli.build_kernel", "compile the CPU kernel that decodes faster"),
    "export": ("jaxgpt.cli.export", "make a loadable model from a training run"),
}

_USERS = (
    ConfigError,
    CheckpointError,
    DataError,
    MissingExtraError,
    TrainingError,
    KernelError,
    OutOfMemoryError,
    OSError,
)

# What shells report for a command that was ended by a closed pipe or Ctrl-C.
_CLOSED_PIPE, _INTERRUPTED = 141, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns the exit code.

    0 is success. 2 is a user error, reported in one line on stderr. 130 is Ctrl-C, and 141 means that the reader of
    stdout closed the pipe. A fault in the program itself is raised unchanged.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack what a model writes
    try:
        try:
            return _run(argv)
        finally:
            # Here, where a closed pipe can still be handled, and not at exit.
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return _CLOSED_PIPE
    except Exception as error:
        reason = startup.missing_platform() or _reason(error)
        if not reason:
            raise
        print(f"jaxgpt: error: {' '.join(reason.split())}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    # Options before the subcommand end the program, so if there is a subcommand it comes first.
    completes = completion.VARIABLE in os.environ
    chosen = completion.subcommand(COMMANDS) if completes else argv[0] if argv else None
    parser = argparse.ArgumentParser(prog="jaxgpt", description="GPT-2 in JAX: generate, train, convert, inspect.")
    parser.add_argument("--version", action="version", version=f"jaxgpt {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (path, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:
            subparser.register("action", None, _Once)
            module = import_module(path)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    if completes:
        completion.answer(parser, subparsers.choices.get(str(chosen), parser))
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse itself would show the usage of `jaxgpt`, not the subcommand's
        subparser = subparsers.choices.get(str(chosen), parser)
        options = [option for action in subparser._actions for option in action.option_strings]
        subparser.error(
            f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown[0].partition('=')[0], options)}"
        )
    if "jax" not in sys.modules:  # otherwise the process is not ours, and it is too late to configure JAX
        startup.configure()
    return args.run(args)


class _Once(argparse._StoreAction):
    """Stores an option's value, and refuses the option's second one, which would silently win."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = vars(namespace).setdefault("given", set())
        if option_string is not None and self.dest in given:
            parser.error(f"{option_string} was given twice")
        given.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


def _reason(error: Exception) -> str:
    """What to tell the user; '' for a fault in the program."""
    if _is_users(error):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        return f"{first_line(error)}: this needs more memory than there is"
    return ""


def _is_users(error: Exception) -> bool:
    """Whether `error` says what the user should change: the package's own errors, those that it raises when checking
    its arguments, and those of the file system. Any other is a fault, which needs its traceback."""
    if isinstance(error, _USERS):
        return True
    if not isinstance(error, (ValueError, FloatingPointError)):
        return False
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "jaxgpt"


def _discard_stdout() -> None:
    # Otherwise the interpreter's own flush at exit reports the closed pipe once more.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
