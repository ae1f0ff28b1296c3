"""`TrainConfig`: everything a training run depends on besides its data, in one frozen dataclass and one TOML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.checks import check_type, did_you_mean, short_repr
from jaxgpt.config import GPTConfig
from jaxgpt.errors import ConfigError
from jaxgpt.parallel.mesh import MeshConfig
from jaxgpt.textfile import parse_value, read_toml

OPTIMIZERS = ("adamw", "muon")
WINDOWS = ("random", "sliding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: the model.
        mesh: the devices it runs on.
        steps: optimiser steps.
        batch_size: windows an optimiser step.
        accumulate: micro-batches that `batch_size` is processed in; the result equals the one big batch.
        length: tokens a window; 0 means the model's context.
        windows: "random" windows, or the book's "sliding" ones: every `stride`-th window once an epoch, shuffled.
        stride: distance between sliding windows; 0 means `length`.
        val_fraction: the last part of the tokens, kept for validation.
        seed: of the initial parameters, the batches, dropout and samples.
        optimizer: "adamw", or "muon" for the blocks' matrices with AdamW for all else.
        learning_rate: peak of AdamW's.
        matrix_learning_rate: peak of Muon's, in units of AdamW's (updates scaled to an RMS of 0.2).
        warmup_steps: linear warm-up from 0.
        final_learning_rate: fraction of the peak left at the last step, after a cosine.
        beta1, beta2, weight_decay: AdamW's; decay acts on matrices only.
        clip_norm: gradients are scaled down to this global norm; 0 switches that off.
        average_decay: decay of the exponential moving average of the parameters, which evaluation, samples and
            exports then use; 0 switches it off.
        loss_chunk: positions a chunk of the loss, so that logits [B, T, V] never exist; 0 for one chunk.
        log_interval, eval_interval, checkpoint_interval: in steps; evaluation and a checkpoint come with the last
            step too.
        eval_windows: validation windows an evaluation; 0 means the whole validation split.
        sample_tokens: length of the text sampled at each evaluation; 0 for none.
        sample_prompt: what it starts with.
        keep: how many of the latest checkpoints stay, besides the best: an evaluation that improves on all before
            it is followed by a checkpoint, whatever the interval.
        bad_steps: after this many steps in a row with a loss or gradient that is not finite, the run stops.
    """

    model: GPTConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    length: int = 0
    windows: str = "random"
    stride: int = 0
    val_fraction: float = 0.1
    seed: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 6e-4
    matrix_learning_rate: float = 6e-4
    warmup_steps: int = 100
    final_learning_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    average_decay: float = 0.0
    loss_chunk: int = 0
    log_interval: int = 10
    eval_interval: int = 250
    eval_windows: int = 0
    sample_tokens: int = 0
    sample_prompt: str = ""
    checkpoint_interval: int = 250
    keep: int = 2
    bad_steps: int = 3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name not in _TABLES:
                self._check(field)
        if self.batch_size % self.accumulate:
            raise ConfigError(f"accumulate must divide batch_size: {self.batch_size} / {self.accumulate}")
        if self.length > self.model.context_length:
            raise ConfigError(f"length {self.length} is beyond model.context_length {self.model.context_length}")
        if self.model.param_dtype != "float32":
            raise ConfigError(
                "model.param_dtype must be float32 to train: in a shorter type small updates are lost to rounding"
            )
        if self.warmup_steps >= self.steps:
            raise ConfigError(f"warmup_steps must be below steps: {self.warmup_steps} of {self.steps}")

    def _check(self, field: dataclasses.Field) -> None:
        name, value = field.name, getattr(self, field.name)
        check_type(name, value, str(field.type))
        low, high = _RANGES.get(name, (0, math.inf))
        if field.type != "str" and not low <= value <= high:
            raise ConfigError(f"{name} must be from {low} to {high}, not {short_repr(value)}")
        if value not in _CHOICES.get(name, (value,)):
            choices, hint = _CHOICES[name], did_you_mean(value, _CHOICES[name])
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {short_repr(value)}{hint}")

    @property
    def window(self) -> int:
        """Tokens a window, T."""
        return self.length or self.model.context_length

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any], source: str = "config") -> TrainConfig:
        """Builds a config from `{"model": {...}, "train": {...}, "mesh": {...}}`; unknown keys are errors.

        Raises:
            ConfigError: naming `source` and the unknown key or the invalid field.
        """
        if not isinstance(tables, Mapping):
            raise ConfigError(f"{source}: expected tables, not {short_repr(tables)}")
        tables = dict(tables)
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise ConfigError(f"{source}: {name} must be a table, not {short_repr(table)}")
        model = GPTConfig.from_fields(tables.pop("model", {}), source=f"{source} [model]")
        mesh = MeshConfig.from_dict(tables.pop("mesh", {}), source=f"{source} [mesh]")
        train = tables.pop("train", {})
        known = [field.name for field in dataclasses.fields(cls) if field.name not in _TABLES]
        for key in tables:
            raise ConfigError(f"{source}: unknown table {short_repr(key)}{did_you_mean(key, (*_TABLES, 'train'))}")
        for key in train:
            if key not in known:
                raise ConfigError(f"{source} [train]: unknown key {short_repr(key)}{did_you_mean(key, known)}")
        try:
            return cls(model=model, mesh=mesh, **train)
        except ConfigError as error:
            raise ConfigError(f"{source} [train]: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Reads the `[model]`, `[train]` and `[mesh]` tables of a TOML file.

        Args:
            path: the file.
            overrides: "key=value" strings, as given to `--set`; keys of the model are written "model.key", and
                the mesh's "mesh.key".

        Raises:
            ConfigError: if the file or an override cannot be used.
        """
        return cls.from_dict(override(read_toml(path), overrides), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the form that `from_dict` takes."""
        train = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _TABLES}
        return {"model": self.model.to_dict(), "train": train, "mesh": dataclasses.asdict(self.mesh)}


def override(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tables of a config file with the "key=value" strings of `--set` in them (see `TrainConfig.from_file`).

    Raises:
        ConfigError: for anything else than "key=value", and for a table that there is not.
    """
    result: dict[str, Any] = {"model": {}, "train": {}, "mesh": {}}
    result |= {name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, not {text!r}")
        table, _, name = key.strip().rpartition(".")
        if table not in ("", "train", *_TABLES):
            raise ConfigError(f"--set: no table {table!r} in {key!r}; use model.{name} or {name}")
        if isinstance(result[table or "train"], dict):  # if not, from_dict says so
            result[table or "train"][name] = parse_value(value.strip())
    return result


# Fields that are tables of their own.
_TABLES = ("model", "mesh")
_CHOICES = {"optimizer": OPTIMIZERS, "windows": WINDOWS}
_RANGES = {
    "steps": (1, 10**9),
    "batch_size": (1, 10**6),
    "accumulate": (1, 10**6),
    "val_fraction": (0, 0.9),
    "seed": (0, 2**32 - 1),
    "final_learning_rate": (0, 1),
    "beta1": (0, 0.99999),
    "beta2": (0, 0.99999),
    "average_decay": (0, 0.99999),
    "log_interval": (1, 10**9),
    "eval_interval": (1, 10**9),
    "checkpoint_interval": (1, 10**9),
    "keep": (1, 1000),
    "bad_steps": (1, 1000),
}
