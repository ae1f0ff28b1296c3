"""A run's directory: what was run, on which data, and what it measured. Only one trainer may use it at a time.

DIR/run.json        the resolved config, where the data is and its hashes, what it started from, its id, versions
DIR/metrics.jsonl   one line per logged step or evaluation
DIR/checkpoints/    see checkpoints.py
DIR/tokenizer/      the files of the tokenizer, unless it is in the package
DIR/loss.png        the loss curves, if the extra [plot] is installed
DIR/tensorboard/    the metrics again, for TensorBoard, if requested; DIR/wandb/ likewise (see trackers.py)

DIR is on a disk or in a bucket (see storage.py).
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shlex
from collections.abc import Iterator, Sequence, Set
from typing import Any

from jaxgpt.checks import short_repr
from jaxgpt.data import Corpus, Reference, Source
from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.tokenizer import BUILTIN, NONE, get_tokenizer, is_built, tokenizer_in, write_tokenizer
from jaxgpt.training.checkpoints import Checkpoints
from jaxgpt.training.config import TrainConfig
from jaxgpt.training.storage import storage
from jaxgpt.training.trackers import TRACKERS, Tracker

# These do not change what a step computes, so they may differ when a run resumes; so may the mesh. (A run keeps to its
# `native_sequences`: `with_native_sequences`.)
_FREE_FIELDS = (
    "log_interval",
    "checkpoint_interval",
    "keep",
    "patience",
    "sample_tokens",
    "sample_prompt",
    "native_sequences",
)


class Run:
    """A run's directory; the module's docstring lists its files.

    Of several processes that train together, one `writes`; in the others, the methods that write do nothing.
    """

    def __init__(self, directory: str | os.PathLike[str], writes: bool = True):
        self.storage, self.writes = storage(directory), writes
        self.directory = self.storage.path
        self.checkpoints = self.directory / "checkpoints"
        self.metrics = self.directory / "metrics.jsonl"
        self.description = self.directory / "run.json"
        self.tokenizer = self.directory / "tokenizer"
        self._trackers: list[Tracker] = []

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the directory for one trainer, as its storage does.

        Raises:
            CheckpointError: if another process holds it.
        """
        with self.storage.locked() if self.writes else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def reading(self) -> Iterator[Checkpoints]:
        """The run's checkpoints, for reading while it may still be training.

        Raises:
            CheckpointError: if there are none yet.
        """
        nothing = CheckpointError(self.checkpoints, "no checkpoint yet")
        if not self.checkpoints.is_dir():
            raise nothing
        opened = Checkpoints(self.checkpoints, losses=self.val_losses(), read_only=True)
        with contextlib.closing(opened) as checkpoints:
            if not checkpoints.steps():
                raise nothing
            yield checkpoints

    def step(self, step: int | str) -> int:
        """The number of a step that has a checkpoint; "latest" is the last one, and "best" the one with the lowest
        validation loss (the latest, if none was evaluated).

        Raises:
            CheckpointError: if there is no such checkpoint.
        """
        with self.reading() as checkpoints:
            steps = checkpoints.steps()
            chosen: Any = {"latest": steps[-1], "best": checkpoints.best_step() or steps[-1]}.get(str(step), step)
            if chosen not in steps:
                raise CheckpointError(self.checkpoints, f"no checkpoint of step {step}; there are {steps}")
            return chosen

    def make(self) -> None:
        """Creates the directories."""
        if self.writes:
            self.storage.make(self.checkpoints)

    def check_shared(self) -> None:
        """Raises CheckpointError if this process does not see the directory that another has created."""
        if not self.storage.sees(self.checkpoints):
            raise CheckpointError(
                self.directory, "not seen by every process: all need the same directory, on a shared disk"
            )

    def check_new(self) -> None:
        """Raises CheckpointError if the directory already holds a run, unless that ended before it did anything."""
        measured = self.metrics.exists() and self.metrics.read_bytes()
        saved = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        if self.description.exists() and (measured or saved):
            raise CheckpointError(
                self.directory, f"holds a run already: {self.resume_command} continues it, or choose another --out"
            )

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.storage.name

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        return f"jaxgpt train --resume {shlex.quote(str(self.directory))}"

    def describe(self, config: TrainConfig, corpus: Corpus, init_from: str | None, base: str | None = None) -> None:
        """Writes run.json; `base` is the fingerprint of the parameters that adapters belong to."""
        if not self.writes:
            return
        if config.model.tokenizer not in (*BUILTIN, NONE):
            with self.storage.replacing(self.tokenizer, last="tokenizer.json") as directory:
                tokenizer = get_tokenizer(config.model.tokenizer)
                write_tokenizer(directory, tokenizer, context_length=config.model.context_length, own_ids=True)
        packages = ("jaxgpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
        description = {
            "id": self._id() or secrets.token_hex(8),
            "config": config.to_dict(),
            "init_from": init_from,
            **({} if base is None else {"base": base}),
            "data": {
                "sources": [_described(source) for source in corpus.sources],
                "validation": [_described(source) for source in corpus.validation],
            },
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "python": platform.python_version(),
        }
        self.storage.write(self.description, json.dumps(description, indent=2) + "\n")

    def config(self, overrides: Sequence[str] = ()) -> TrainConfig:
        """The config that the run was started with, with "key=value" strings applied as `--set` does. From here on, the
        name of its tokenizer is known.

        Raises:
            CheckpointError: if the tokenizer's files are missing, or are another's.
        """
        config = TrainConfig.from_dict(self._described("config"), str(self.description), overrides)
        name = config.model.tokenizer
        if name not in (*BUILTIN, NONE) and not is_built(name):
            with self.storage.reading(self.tokenizer) as directory:
                found = tokenizer_in(directory)
            if found is None or found.name != name:
                others = "none" if found is None or found.name == NONE else f"those of {found.name}"
                raise CheckpointError(self.tokenizer, f"expected the files of tokenizer {name}, not {others}")
        return config

    def init_from(self) -> str | None:
        """What the run was fine-tuned from, if anything."""
        return self._text("the path of init_from", self._described("init_from"))

    def check_base(self, base: str, source: str | None) -> None:
        """Raises CheckpointError, naming `source`, unless this is the fingerprint of the parameters that the run's
        adapters belong to."""
        if self._described("base") != base:
            raise CheckpointError(
                self.directory, f"its adapters belong to other parameters than those of {source}: has it changed since?"
            )

    def data(self, data: Any = None, validation: Any = None) -> tuple[Any, Any]:
        """(data, validation) to continue with: what is given or, where nothing is, what the run was started with.

        Raises:
            ConfigError: if the run does not know it, or something is no longer there.
        """
        data = self._sources("sources", "--data") if data is None else data
        return data, self._sources("validation", "--val-data") if validation is None else validation

    def _sources(self, key: str, option: str) -> list[Reference]:
        described = self._described("data")
        sources = described.get(key) if isinstance(described, dict) else None
        if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
            raise CheckpointError(self.description, f"damaged: the {key} of its data are {short_repr(sources)}")
        found = []
        for source in sources:
            path, weight = self._text("the path of data", source.get("path")), source.get("weight")
            if not isinstance(weight, (int, float, type(None))):
                raise CheckpointError(self.description, f"damaged: the weight of {path} is {short_repr(weight)}")
            if path is None:
                raise ConfigError(f"{self.description} does not say where the run's data is: give it ({option})")
            if not os.path.exists(path) and not glob.has_magic(path):
                raise ConfigError(f"the run's data is no longer at {path}: say where it is now ({option})")
            text_key = self._text("the text key of data", source.get("text_key"))
            special = source.get("allow_special", False)
            if not isinstance(special, bool):
                raise CheckpointError(self.description, f"damaged: allow_special of {path} is {short_repr(special)}")
            skip_bad = source.get("skip_bad") is True
            found.append(Reference(str(source.get("name")), path, weight, text_key, special, skip_bad))
        return found

    def check_config(self, config: TrainConfig, source: str) -> None:
        """Raises ConfigError, naming every difference, if a config file that names a new run is not this run's."""
        unset = frozenset() if config.template else {"template"}  # the data decides then
        if differences := self._differences(config, unset):
            raise ConfigError(
                f"{source} differs from the config of {self.directory}: {'; '.join(differences)}. Leave {source} out: "
                f"{self.resume_command} continues with the run's own"
            )

    def check_resume(self, config: TrainConfig, corpus: Corpus, init_from: str | None) -> None:
        """Compares config, data and starting point with the run's own. More steps are no difference.

        Raises:
            ConfigError: naming every difference.
        """
        longer = config.steps > self.config().steps
        differences, data = self._differences(config, {"steps"} if longer else frozenset()), self._described("data")
        for key, now in (("sources", corpus.sources), ("validation", corpus.validation)):
            before = data.get(key) if isinstance(data, dict) else None
            differences += _changed_sources(before, [_described(source) for source in now])
        # What adapters belong to is known by its content, so it may have moved.
        if self.init_from() != init_from and not config.lora.rank:
            differences.append(f"init-from: {short_repr(self.init_from())} before, {short_repr(init_from)} now")
        if differences:
            raise ConfigError(
                f"{self.directory} was run with other settings: {'; '.join(differences)}. Without them, "
                f"{self.resume_command} continues the run; a new --out starts another. (--force continues this one "
                "with what is given now: the result is then that of neither)"
            )

    def _differences(self, config: TrainConfig, free: Set[str] = frozenset()) -> list[str]:
        """Every field that changes what a run computes and that is not the run's own, except those that are `free`."""
        # Through a config, which knows the defaults of fields added after the run began.
        own = self.config()
        was, now = own.to_dict(), config.fill(own.model).to_dict()
        return [
            f"{table}.{name}: {short_repr(was[table].get(name))} before, {short_repr(value)} now"
            for table in ("model", "compute", "lora", "train")
            for name, value in now[table].items()
            if was[table].get(name) != value and name not in (*_FREE_FIELDS, *free)
        ]

    @contextlib.contextmanager
    def logging_to(self, names: Sequence[str], step: int, config: TrainConfig) -> Iterator[None]:
        """In this context `append` also writes to these of `trackers.TRACKERS`, from `step` on.

        Raises:
            ConfigError, MissingExtraError: if one cannot be used.
        """
        with contextlib.ExitStack() as opened:
            for name in names if self.writes else ():
                tracker = TRACKERS[name](self.directory, self.name, self._id(), step, config.to_dict())
                self._trackers.append(opened.enter_context(contextlib.closing(tracker)))
            yield

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl: "step" and its metrics; null for one that is not finite, as JSON has no NaN."""
        if not self.writes:
            return
        metrics = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self.storage.append(self.metrics, json.dumps(metrics) + "\n")
        for tracker in self._trackers:
            tracker.log(line["step"], {name: value for name, value in line.items() if name != "step"})

    def flush(self) -> None:
        """Makes the lines added so far outlast this process. Raises as the storage's `flush` does."""
        if self.writes:
            self.storage.flush()

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines after `step`, which a resumed run writes again, and a last line that a kill cut short."""
        if not self.writes:
            return
        lines = [line for line in self.read_metrics() if line["step"] <= step]
        self.storage.write(self.metrics, "".join(json.dumps(line) + "\n" for line in lines))

    def val_losses(self) -> dict[int, float]:
        """The validation losses so far, by step."""
        return {line["step"]: line["val_loss"] for line in self.read_metrics() if line.get("val_loss") is not None}

    def evaluated(self) -> list[int]:
        """The steps that were evaluated so far, those without a finite validation loss too."""
        return [line["step"] for line in self.read_metrics() if "val_loss" in line]

    def read_metrics(self) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl."""
        lines = []
        if self.metrics.exists():
            for text in self.metrics.read_bytes().decode(errors="replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    line = json.loads(text)
                    if (
                        isinstance(line, dict)
                        and type(line.get("step")) is int  # half a number is a number too
                        and all(map(_is_metric, line.values()))
                    ):
                        lines.append(line)
        return lines

    def _text(self, key: str, value: Any) -> str | None:
        if not isinstance(value, (str, type(None))):
            raise CheckpointError(self.description, f"damaged: {key} is {short_repr(value)}")
        return value

    def _id(self) -> str:
        """The id that trackers know the run by; '' for one that has none yet, or whose run.json is damaged."""
        with contextlib.suppress(CheckpointError, ConfigError):
            return self._text("id", self._described("id")) or ""
        return ""

    def _described(self, key: str) -> Any:
        if not self.description.exists():
            self.storage.check()
            raise CheckpointError(self.directory, "holds no run (no run.json)")
        description = self.storage.read_json(self.description)
        if not isinstance(description, dict) or key not in description:
            raise CheckpointError(self.description, f"damaged: it has no {key!r}")
        return description[key]


def _is_metric(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))


def _described(source: Source) -> dict[str, Any]:
    """A source in run.json."""
    validation = {} if source.validation is None else {"validation": source.validation.identity}
    return {
        "name": source.name,
        "path": source.path,
        "weight": source.weight,
        "text_key": source.text_key,
        "allow_special": source.allow_special,
        "skip_bad": source.skip_bad,
        "tokens": len(source.tokens.ids_N),
        "tokenizer": source.tokens.tokenizer,
        "identity": source.tokens.identity,
        **validation,
    }


def _changed_sources(before: Any, now: list[dict[str, Any]]) -> Iterator[str]:
    """Every difference between the sources of a run and those of now; names and paths do not count."""
    if not isinstance(before, list) or len(before) != len(now):
        yield f"data: {len(before) if isinstance(before, list) else 'unknown'} sources before, {len(now)} now"
        return
    for old, new in zip(before, now, strict=True):
        for key in ("identity", "validation", "weight"):
            if (was := old.get(key) if isinstance(old, dict) else None) != new.get(key):
                shown = [short_repr(value[:19] if isinstance(value, str) else value) for value in (was, new.get(key))]
                yield f"data {new['name']}: {key} {shown[0]} before, {shown[1]} now"
