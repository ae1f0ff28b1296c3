"""Where a run's metrics are shown besides metrics.jsonl: programs of others, each with an extra of its own.

| name | library | where it writes |
|---|---|---|
| `tensorboard` | tensorboardX | DIR/tensorboard |
| `wandb` | Weights & Biases | the account that `wandb login` knows; with WANDB_MODE=offline, DIR/wandb only |
| `trackio` | trackio | its own directory, TRACKIO_DIR |

A run in a bucket has no DIR for files that grow: it cannot log to TensorBoard, and DIR/wandb is ./wandb.

The environment variables of each library hold, such as WANDB_PROJECT. A run that is resumed goes on in the tracker's
own run. What was logged after the last checkpoint is then logged again: TensorBoard replaces it, Weights & Biases keeps
the first, and trackio both; they are equal.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.checks import did_you_mean, first_line
from jaxgpt.errors import ConfigError, require

# Of Weights & Biases and of trackio, unless the user names another.
_PROJECT = "jaxgpt"


class Tracker:
    """One of `TRACKERS`, opened for a run.

    Args:
        directory: the run's; a `Path` unless it is in a bucket.
        run_name: the directory's own name.
        run_id: what tells the run from all others.
        step: the step that it starts or goes on from.
        config: its config, as plain values.

    Attributes:
        library: the name of the library's module.
    """

    library: str

    def __init__(self, directory: Any, run_name: str, run_id: str, step: int, config: dict[str, Any]):
        raise NotImplementedError

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of a step, of which others may follow."""
        raise NotImplementedError

    def close(self) -> None:
        """Writes what has not been written yet."""
        raise NotImplementedError


class TensorBoard(Tracker):
    library = "tensorboardX"

    def __init__(self, directory: Any, run_name: str, run_id: str, step: int, config: dict[str, Any]):
        self._writer = _library("tensorboard").SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb(Tracker):
    library = "wandb"

    def __init__(self, directory: Any, run_name: str, run_id: str, step: int, config: dict[str, Any]):
        library = _library("wandb")
        try:
            self._run = library.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=os.environ.get("WANDB_NAME", run_name),
                id=run_id,
                resume="allow",
                dir=str(directory) if isinstance(directory, Path) else None,
                config=config,
            )
        except library.Error as error:
            raise ConfigError(
                f"wandb did not start: {first_line(error)} (with WANDB_MODE=offline it needs no account and no network)"
            ) from None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(Tracker):
    library = "trackio"

    def __init__(self, directory: Any, run_name: str, run_id: str, step: int, config: dict[str, Any]):
        # To trackio, runs of one name are one run.
        name, project = f"{run_name}-{run_id}", os.environ.get("TRACKIO_PROJECT", _PROJECT)
        self._library = _library("trackio")
        self._library.init(project, name=name, resume="allow", config=config)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._library.log(metrics, step=step)

    def close(self) -> None:
        self._library.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def check(names: Sequence[str], directory: Any) -> None:
    """Raises ConfigError for a name that is not in `TRACKERS`, that is given twice or that cannot log a run in this
    directory, and MissingExtraError for one whose library is not installed."""
    for i, name in enumerate(names):
        if name not in TRACKERS:
            raise ConfigError(
                f"log_to: no tracker {name!r}{did_you_mean(name, TRACKERS)} (there are {', '.join(TRACKERS)})"
            )
        if name in names[:i]:
            raise ConfigError(f"log_to names {name} twice")
        if name == "tensorboard" and not isinstance(directory, Path):
            raise ConfigError(
                f"log_to: tensorboard adds to files, which {directory} has none of: log to wandb or trackio, or draw "
                "metrics.jsonl with jaxgpt plot"
            )
        _library(name)


def _library(name: str) -> Any:
    return require(TRACKERS[name].library, name, f"logging to {name}")
