"""The progress of work on files: a bar on a terminal, a line now and then elsewhere, all on stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxgpt.data import Report

# Seconds between two lines, where there is no terminal.
_BETWEEN_LINES = 10


class BytesProgress:
    """A context manager; call `update` once per report."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._start = self._line = time.monotonic()
        self._first = -1  # bytes of the first report, which an earlier command may have read
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.fields[done]}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", done="", rate="")

    def __enter__(self) -> BytesProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar:
            self._bar.stop()

    def update(self, report: Report) -> None:
        """Shows how far `tokenize` is."""
        now = time.monotonic()
        self._first = report.read if self._first < 0 else self._first
        done = f"{report.read / 1e6:,.0f} of {report.total / 1e6:,.0f} MB"
        rate = f"{report.tokens:,} tokens  {report.size / 1e6 / max(now - self._start, 1e-6):,.1f} MB/s"
        if self._bar:
            self._bar.update(self._task, total=report.total, completed=report.read, done=done, rate=rate)
        elif now - self._line >= _BETWEEN_LINES:
            self._line = now
            speed = (report.read - self._first) / max(now - self._start, 1e-6)
            left = f"  {(report.total - report.read) / speed:,.0f} s left" if speed else ""
            self._console.print(f"{done}  {rate}{left}", markup=False, soft_wrap=True)
