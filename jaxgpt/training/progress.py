"""The progress that a run shows: a bar on a terminal, plain lines elsewhere, all on stderr."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainProgress:
    """A context manager; call `update` once per logged step, `say` for anything else."""

    def __init__(self, steps: int, console: Console | None = None, quiet: bool = False):
        self._console = console or Console(stderr=True, highlight=False, quiet=quiet)
        self._steps = steps
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=steps, loss="?", rate="?")

    def __enter__(self) -> TrainProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Shows that `step` steps are done."""
        if self._bar:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=f"{tokens_per_second:,.0f}")
        else:
            left = f"{seconds_left / 60:.0f} min" if seconds_left >= 120 else f"{seconds_left:.0f} s"
            self.say(f"step {step}/{self._steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left} left")

    def say(self, text: str) -> None:
        """Prints a text, above the bar if there is one. Control characters, which an untrained model also writes, are
        replaced rather than sent to the terminal."""
        visible = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        self._console.print(visible, markup=False, soft_wrap=True)
