"""The signals that ask a run to save and stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def collected() -> Iterator[list[signal.Signals]]:
    """Collects the first SIGINT or SIGTERM, so that the loop can save; a second one has its usual effect."""
    received: list[signal.Signals] = []
    usual: dict[signal.Signals, Any] = {}

    def receive(number, _frame):
        received.append(signal.Signals(number))
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
        for name, handler in usual.items():
            signal.signal(name, handler)
