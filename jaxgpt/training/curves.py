"""Training curves of one or several runs, from their metrics.jsonl."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from jaxgpt.errors import ConfigError, DataError
from jaxgpt.files import local
from jaxgpt.pictures import style
from jaxgpt.training.run_directory import Run
from jaxgpt.training.storage import bucket_url

AXES = ("tokens", "steps")
# Per panel: its axis label, and the metrics of metrics.jsonl that it draws.
PANELS = {
    "loss": ("loss, nats per token", ("loss", "val_loss")),
    "learning_rate": ("learning rate", ("learning_rate",)),
    "speed": ("tokens per second", ("tokens_per_second",)),
}
# When the colours run out, runs differ by their dashes.
_DASHES = ("-", "--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class Curves:
    """What a run measured.

    Attributes:
        name: the run's name.
        points: per metric ("loss", "val_loss", "learning_rate", "tokens_per_second") its values by step, in order.
        tokens_per_step: tokens read per step; None if the run does not say.
    """

    name: str
    points: Mapping[str, Mapping[int, float]]
    tokens_per_step: int | None = None

    @property
    def last_step(self) -> int:
        """The last step measured."""
        return max(step for values in self.points.values() for step in values)


def from_metrics(name: str, lines: Iterable[Mapping[str, Any]], tokens_per_step: int | None = None) -> Curves:
    """Curves from the lines of metrics.jsonl. Where the steps go back, a run was resumed, and what it had measured from
    there on is replaced. Values that are not finite are left out."""
    points: dict[str, dict[int, float]] = {key: {} for _, keys in PANELS.values() for key in keys}
    last = -1
    for line in lines:
        step = line["step"]
        if step < last:
            points = {key: {s: v for s, v in values.items() if s < step} for key, values in points.items()}
        last = step
        for key, values in points.items():
            value = line.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                values[step] = float(value)
    return Curves(name, points, tokens_per_step)


def read_runs(paths: Sequence[str | Path]) -> list[Curves]:
    """The curves of run directories, or of their metrics.jsonl, named after the directory.

    Raises:
        DataError: naming a path that holds no metrics, or none that can be drawn.
    """
    found = [_run(path) for path in paths]
    names = [run.name for run in found]
    runs = []
    for run, name in zip(found, names, strict=True):
        if not run.metrics.is_file():
            raise DataError(f"{run.directory}: expected a run's directory, with a metrics.jsonl in it")
        try:
            config = run.config()
            tokens_per_step = config.batch_size * config.T
        except ValueError:  # no run.json, or a damaged one: then the x axis is in steps
            tokens_per_step = None
        curves = from_metrics(
            name if names.count(name) == 1 else str(run.directory), run.read_metrics(), tokens_per_step
        )
        if not any(curves.points.values()):
            raise DataError(f"{run.metrics}: holds no metrics to draw: has the run logged a step yet?")
        runs.append(curves)
    return runs


def _run(path: str | Path) -> Run:
    if url := bucket_url(path):
        return Run(url.removesuffix("/metrics.jsonl"), writes=False)
    path = local(path)
    return Run(path.parent if path.name == "metrics.jsonl" else path, writes=False)


@style.styled
def draw(runs: Sequence[Curves], x: str | None = None, panels: Sequence[str] = tuple(PANELS)) -> Figure:
    """One figure of all runs: training loss thin, validation loss thick; the other panels below.

    Args:
        runs: at least one.
        x: "tokens" or "steps"; default: tokens if every run says how many it reads per step.
        panels: which of `PANELS`.

    Raises:
        ConfigError: for tokens if a run does not say how many; for another x.
    """
    unknown = [run.name for run in runs if run.tokens_per_step is None]
    x = x or ("steps" if unknown else "tokens")
    if x not in AXES:
        raise ConfigError(f"x must be one of {', '.join(AXES)}, not {x!r}")
    if x == "tokens" and unknown:
        raise ConfigError(
            f"{unknown[0]} has no run.json that says how many tokens it reads per step: draw it against steps"
        )
    heights = [3.4 if panel == "loss" else 1.5 for panel in panels]
    figure = Figure(figsize=(8, sum(heights) + 0.6), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        label, keys = PANELS[panel]
        for i, run in enumerate(runs):
            for key in keys:
                values = run.points[key]
                scale = run.tokens_per_step if x == "tokens" and run.tokens_per_step else 1
                _line(axes, [step * scale for step in values], list(values.values()), key, i, len(runs))
        axes.set_ylabel(label)
        axes.grid(alpha=0.25, linewidth=0.6, color=style.MUTED)
        axes.set_axisbelow(True)
    grid[-1].set_xlabel(x)
    grid[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes, panel in zip(grid, panels, strict=True):
        if panel == "speed":
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(figure, grid[0], runs)
    return figure


def _line(axes: Axes, xs: list[int], ys: list[float], key: str, i: int, runs: int) -> None:
    colour, dashes = _look(i)
    if key == "val_loss":
        colour = style.COLOURS[1] if runs == 1 else colour
        axes.plot(xs, ys, color=colour, linestyle=dashes, linewidth=2, marker="o", markersize=3.5, zorder=3)
    else:
        alpha = 0.55 if key == "loss" and runs > 1 else 1
        # One point makes no line.
        axes.plot(xs, ys, color=colour, linestyle=dashes, linewidth=1, alpha=alpha, marker="." if len(xs) == 1 else "")


def _legend(figure: Figure, axes: Axes, runs: Sequence[Curves]) -> None:
    validated = any(run.points["val_loss"] for run in runs)
    both = style.COLOURS[:2] if len(runs) == 1 else (style.MUTED, style.MUTED)
    kinds = [Line2D([], [], color=both[0], linewidth=1, label="training")]
    if validated:
        kinds.append(Line2D([], [], color=both[1], linewidth=2, marker="o", markersize=3.5, label="validation"))
    axes.add_artist(axes.legend(handles=kinds, loc="upper right"))
    if len(runs) == 1:
        axes.set_title(style.drawable(runs[0].name, 80), loc="left", fontweight="bold")
        return
    handles = []
    for i, run in enumerate(runs):
        colour, dashes = _look(i)
        handles.append(Line2D([], [], color=colour, linestyle=dashes, linewidth=2, label=style.drawable(run.name, 60)))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(runs), 3), fontsize=8)


def _look(i: int) -> tuple[str, Any]:
    return style.COLOURS[i % len(style.COLOURS)], _DASHES[i // len(style.COLOURS) % len(_DASHES)]
