"""The progress that a run shows: a bar on a terminal and in a notebook with ipywidgets, plain lines elsewhere, all on
stderr."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxgpt.notebook import draws


class TrainProgress:
    """A context manager; call `update` once per logged step, `say` for anything else."""

    def __init__(self, steps: int, console: Console | None = None, quiet: bool = False):
        self._console = console or Console(stderr=True, highlight=False, quiet=quiet)
        self._steps = steps
        self._bar: Progress | None = None
        if (self._console.is_terminal or draws(self._console)) and not quiet:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[seen]}  {task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=steps, loss="?", seen="", rate="")

    def __enter__(self) -> TrainProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar:
            self._bar.refresh()  # in a notebook, stopping draws nothing
            self._bar.stop()

    def update(
        self,
        step: int,
        loss: float,
        tokens: int,
        tokens_per_second: float,
        seconds_left: float,
        utilisation: float | None = None,
    ) -> None:
        """Shows that `step` steps are done.

        Args:
            step: how many.
            loss: the last one's.
            tokens: seen so far.
            tokens_per_second: speed since the last call.
            seconds_left: until the last step, at that speed.
            utilisation: the share of the devices' peak (MFU), where it is known.
        """
        share = "" if utilisation is None else f"  MFU {utilisation:.1%}"
        seen, rate = f"{_short(tokens)} tokens", f"{tokens_per_second:,.0f} tokens/s{share}"
        if self._bar:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", seen=seen, rate=rate)
        else:
            left = f"{seconds_left / 60:.0f} min" if seconds_left >= 120 else f"{seconds_left:.0f} s"
            self.say(f"step {step}/{self._steps}  loss {loss:.4f}  {seen}  {rate}  {left} left")

    def say(self, text: str) -> None:
        """Prints a text, above the bar if there is one. Control characters, which an untrained model also writes, are
        replaced rather than sent to the terminal."""
        visible = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        self._console.print(visible, markup=False, soft_wrap=True)


def _short(count: int) -> str:
    """A count in three or four digits, such as 12.3M."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.{1 if count < 100 * size else 0}f}{unit}"
    return f"{count:,}"
