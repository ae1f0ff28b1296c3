"""Training curves of one or several runs, from their metrics.jsonl."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from jaxgpt.errors import ConfigError, DataError
from jaxgpt.pictures import style
from jaxgpt.training.run_directory import Run

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
    run = Run(path, writes=False)
    return Run(run.directory.parent, writes=False) if run.directory.name == run.metrics.name else run


def smoothed(values: Mapping[int, float], half_life: float) -> dict[int, float]:
    """The exponential moving average of a metric by step, in which a value `half_life` steps back weighs half. Each is
    divided by the sum of its weights, so that the first are not drawn towards 0, and steps may be unevenly apart."""
    result: dict[int, float] = {}
    total = weight = 0.0
    last = 0
    for step, value in values.items():
        kept = 0.5 ** ((step - last) / half_life)
        total, weight, last = kept * total + value, kept * weight + 1, step
        result[step] = total / weight
    return result


@style.styled
def draw(
    runs: Sequence[Curves],
    x: str | None = None,
    panels: Sequence[str] = tuple(PANELS),
    *,
    log: Collection[str] = (),
    smooth: float = 0,
    side_by_side: bool = False,
) -> Figure:
    """One figure of all runs: training loss thin, validation loss thick; the other panels below.

    Args:
        runs: at least one.
        x: "tokens" or "steps"; default: tokens if every run says how many it reads per step.
        panels: which of `PANELS`.
        log: which axes are logarithmic: "x" and "loss", or either.
        smooth: half-life in steps of the moving average of the training loss, drawn over the losses themselves, which
            turn pale; 0 draws none.
        side_by_side: a column per run, with the same scales, in place of all runs in one.

    Raises:
        ConfigError: for tokens if a run does not say how many; for another x; for another axis to be logarithmic; for a
            `smooth` that is not a number from 0 on.
    """
    if others := set(log) - {"x", "loss"}:
        raise ConfigError(f"log must be of x and loss, not {', '.join(sorted(map(str, others)))}")
    if not 0 <= smooth < math.inf:
        raise ConfigError(f"smooth must be a number of steps from 0 on, not {smooth!r}")
    unknown = [run.name for run in runs if run.tokens_per_step is None]
    x = x or ("steps" if unknown else "tokens")
    if x not in AXES:
        raise ConfigError(f"x must be one of {', '.join(AXES)}, not {x!r}")
    if x == "tokens" and unknown:
        raise ConfigError(
            f"{unknown[0]} has no run.json that says how many tokens it reads per step: draw it against steps"
        )
    heights = [3.4 if panel == "loss" else 1.5 for panel in panels]
    columns = [[(i, run)] for i, run in enumerate(runs)] if side_by_side else [list(enumerate(runs))]
    figure = Figure(figsize=(max(8, 4.5 * len(columns)), sum(heights) + 0.6), layout="constrained")
    grid = figure.subplots(len(panels), len(columns), sharex=True, sharey="row", squeeze=False, height_ratios=heights)
    for row, panel in zip(grid, panels, strict=True):
        label, keys = PANELS[panel]
        row[0].set_ylabel(label)
        for axes, shown in zip(row, columns, strict=True):
            for i, run in shown:
                scale = run.tokens_per_step if x == "tokens" and run.tokens_per_step else 1
                for key in keys:
                    values, pale = run.points[key], bool(smooth) and key == "loss"
                    _line(axes, values, scale, key, i, len(shown), pale)
                    if pale:
                        _line(axes, smoothed(values, smooth), scale, key, i, len(shown))
            axes.grid(alpha=0.25, linewidth=0.6, color=style.MUTED)
            axes.set_axisbelow(True)
            if panel == "loss" and "loss" in log:
                axes.set_yscale("log")
                # A loss seldom spans a power of ten, so the numbers between are the ones that help.
                for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                    set_formatter(StrMethodFormatter("{x:g}"))
                axes.grid(which="minor", alpha=0.25, linewidth=0.6, color=style.MUTED, axis="y")
            if panel == "speed":
                axes.set_ylim(bottom=0)
                axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in grid[-1]:
        axes.set_xlabel(x)
        if "x" in log:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes, shown in zip(grid[0], columns, strict=True):
        _legend(figure, axes, [run for _, run in shown])
    return figure


def _line(axes: Axes, values: Mapping[int, float], scale: int, key: str, i: int, runs: int, pale: bool = False) -> None:
    xs, ys = [step * scale for step in values], list(values.values())
    colour, dashes = _look(i if runs > 1 else 0)
    if key == "val_loss":
        colour = style.COLOURS[1] if runs == 1 else colour
        axes.plot(xs, ys, color=colour, linestyle=dashes, linewidth=2, marker="o", markersize=3.5, zorder=3)
    else:
        alpha = 0.25 if pale else 0.55 if key == "loss" and runs > 1 else 1
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
