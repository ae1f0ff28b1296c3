"""The signals that ask a run to save and stop."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

# Seconds within which a signal is the first one again. A service manager and Slurm signal all processes of a job at
# once, and the parent of `--restarts` then passes on what its child has had already.
_ECHO = 1.0


@contextlib.contextmanager
def collected() -> Iterator[list[signal.Signals]]:
    """Collects the first SIGINT or SIGTERM, so that the loop can save; a second one, a second or more later, has its
    usual effect."""
    received: list[signal.Signals] = []
    usual: dict[signal.Signals, Any] = {}
    last_echo = 0.0

    def receive(number, _frame):
        nonlocal last_echo
        if not received:
            last_echo = time.monotonic() + _ECHO
            received.append(signal.Signals(number))
        elif time.monotonic() >= last_echo:
            restore()
            signal.raise_signal(number)

    def restore():
        for name, handler in usual.items():
            signal.signal(name, handler)

    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            usual[name] = signal.signal(name, receive)
    except ValueError:
        pass  # only the main thread may handle signals; in others, the caller does
    try:
        yield received
    finally:
        restore()
