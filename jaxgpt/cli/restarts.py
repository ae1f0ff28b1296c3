"""`jaxgpt train --restarts`: a run that continues from its last checkpoint when its process is lost."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from typing import Any

# Exit codes of a process that failed, or was killed, for other reasons than bad input or the user's wish: another
# attempt may succeed.
_LOST = (1, *(128 + number for number in (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)))
# Seconds between two attempts.
_PAUSE = 1.0


def supervise(args: argparse.Namespace) -> int | None:
    """Returns None in a child process, which is to run the command; and in this one, once that ends, its exit code.

    If the child is lost, there is a new one, up to `args.restarts` times, whose arguments continue the run. Signals
    that end a run are passed on to the child. Must be called before JAX has started, because it forks.
    """
    for left in range(args.restarts, -1, -1):
        child = os.fork()
        if child == 0:
            return None
        code = _exit_code(child)
        if code not in _LOST or left == 0:
            return code
        print(
            f"jaxgpt: the process ended with exit code {code}; restarts left: {left - 1}", file=sys.stderr, flush=True
        )
        if args.out is not None and _began(args.out):
            args.resume, args.out = args.out, None
            args.config, args.set, args.data, args.val_data = None, [], None, None  # the run knows them
        time.sleep(_PAUSE)
    raise AssertionError("the last child's exit code is returned")


def _began(out: str) -> bool:
    """Whether a run was described in this directory. A child asks, because a bucket's clients start threads, which do
    not survive a fork."""
    child = os.fork()
    if child == 0:
        try:
            from jaxgpt.training import storage

            os._exit(0 if (storage.storage(out).path / "run.json").exists() else 1)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _exit_code(child: int) -> int:
    """Waits for a child process; 128 + the signal's number if a signal ended it."""

    def pass_on(number: int, _frame: Any) -> None:
        if number != signal.SIGINT:  # a terminal sends that to both
            os.kill(child, number)

    usual = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
