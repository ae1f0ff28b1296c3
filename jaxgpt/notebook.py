"""A bar for long work in a notebook. Elsewhere nothing is shown."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Seconds that work takes before it has a bar.
AFTER = 2.0

_has_bar: ContextVar[bool] = ContextVar("_has_bar", default=False)


def draws(console: Console) -> bool:
    """Whether rich can draw a bar in this notebook: it does so in a widget; without that package it would warn, and
    draw nothing."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


@contextlib.contextmanager
def only_bar() -> Iterator[None]:
    """A context in which `bar` shows nothing, for work that has a bar of its own."""
    token = _has_bar.set(True)
    try:
        yield
    finally:
        _has_bar.reset(token)


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A context of some work; call what it yields with how much is done, and how much there is.

    If the work takes more than `AFTER` seconds, and is not a part of other work with a bar, a notebook with ipywidgets
    shows a bar, until the work ends.
    """
    if _has_bar.get() or "IPython" not in sys.modules:
        yield lambda done, total: None
        return
    shown = _Bar(what)
    try:
        with only_bar():
            yield shown.update
    finally:
        shown.close()


class _Bar:
    def __init__(self, what: str):
        self._what, self._start = what, time.monotonic()
        self._progress: Progress | None = None

    def update(self, done: int, total: int) -> None:
        if self._progress is None and done < total and time.monotonic() - self._start >= AFTER:
            self._progress = self._open(total)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done)

    def _open(self, total: int) -> Progress | None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if not draws(console):
            return None
        columns = TextColumn(self._what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()
        progress = Progress(*columns, console=console)
        progress.add_task(self._what, total=total)
        progress.start()
        return progress

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            widget = self._progress.live.ipy_widget
            if widget is not None:  # rich's own `transient` also displays an empty line
                widget.close()
