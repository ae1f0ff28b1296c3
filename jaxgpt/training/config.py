"""`TrainConfig`: everything a training run depends on besides its data, in one frozen dataclass and one TOML file."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.accounting import LINEAR_LAYERS
from jaxgpt.checks import did_you_mean, short_repr
from jaxgpt.config import PRESETS, ComputeConfig, GPTConfig
from jaxgpt.data import Template
from jaxgpt.errors import ConfigError
from jaxgpt.fields import SYNONYMS, check, check_keys, documented, from_table, setting, settings, to_table
from jaxgpt.files import local
from jaxgpt.parallel import MeshConfig
from jaxgpt.textfile import parse_value, read_toml


@documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, which are trained in place of the model that a run starts from (`jaxgpt.lora`)."""

    rank: int = setting(
        0, low=0, high=2**16, help="Rank of the adapters, such as 8 or 16; 0 trains the parameters themselves."
    )
    alpha: float = setting(
        0.0, low=0, help="The product of an adapter's two matrices counts alpha / rank times; 0 means once."
    )
    matrices: str = setting(
        LINEAR_LAYERS,
        help="Which matrices get an adapter: patterns of paths, separated by commas, where * stands for any text. By "
        "default all linear layers of the blocks; out_head, tok_emb and pos_emb can be added.",
    )

    def __post_init__(self):
        check(self, prefix="lora.")
        if not self.rank and (self.alpha or self.matrices != LINEAR_LAYERS):
            raise ConfigError("the other fields of lora need a lora.rank, such as 8 or 16")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str) -> LoraConfig:
        """Builds one from plain values; unknown keys are errors that name `source`."""
        return from_table(cls, fields, source)


@documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: the `model`, how to `compute` it, the `mesh` of devices it runs on, `lora` adapters, and the
    settings below.

    In a config file, `model`, `compute`, `mesh` and `lora` are separate tables beside `[train]`. A run that starts from
    a checkpoint needs no `model`; the fields of one that is given, or set in a file, must agree with the checkpoint's.
    """

    model: GPTConfig = None  # type: ignore[assignment]  # __post_init__ fills it in
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    lora: LoraConfig = LoraConfig()
    # The fields of `model` that nobody set, with their values. A checkpoint to start from decides them; it must not
    # contradict the others.
    model_defaults: frozenset[tuple[str, Any]] = dataclasses.field(default=frozenset(), compare=False, repr=False)
    steps: int = setting(1000, low=1, high=10**9, help="Optimizer steps.")
    batch_size: int = setting(8, low=1, high=10**6, help="Sequences per optimizer step.")
    grad_accumulation: int = setting(
        1,
        low=1,
        high=10**6,
        help="Micro-batches per batch, to save memory; must divide batch_size. The result is that of the whole batch.",
    )
    init_from: str = setting(
        "", help="Model to start from: anything that jaxgpt.load takes, which --init-from overrides; empty: a new one."
    )
    seq_len: int = setting(0, low=0, help="Tokens per sequence; 0 means the model's context_length.")
    sequences: str = setting(
        "random",
        choices=("random", "sliding"),
        help="Where sequences start: at random positions, or, as in the book, every stride tokens (sliding), each once "
        "per epoch in shuffled order.",
    )
    stride: int = setting(
        0, low=0, help="Tokens from the start of one sliding sequence to the next; 0 means the length of a sequence."
    )
    separate_documents: bool = setting(
        False,
        help="Whether documents that share a sequence are kept apart: attention and positions restart at each "
        "end-of-text, so that no document's loss depends on another. Validation follows the same rule.",
    )
    template: str = setting(
        "",
        help="How records become a prompt and the response that is learned: a format string over their keys that ends "
        "in {response}, or, for the turns of a chat, one with {role} that ends in {content}; empty: by their keys, "
        "'{prompt}{response}' or '### {role}:\\n{content}', or else as texts. Each record is one sequence.",
    )
    val_fraction: float = setting(
        0.1, low=0, high=0.9, help="Fraction of the tokens, taken from the end, to keep for validation."
    )
    seed: int = setting(
        0, low=0, high=2**32 - 1, help="Seed of the initial parameters, the batches, dropout and the samples."
    )
    optimizer: str = setting(
        "adamw",
        choices=("adamw", "muon"),
        help="With muon, Muon updates the blocks' matrices, and AdamW the rest.",
    )
    freeze: str = setting(
        "",
        help="Which parameters stay as they are, without gradients and optimizer state: patterns of paths, separated "
        "by commas, where * stands for any text, such as 'tok_emb, pos_emb, trf_blocks_0'.",
    )
    learning_rate: float = setting(6e-4, low=0, help="Peak learning rate of AdamW.")
    matrix_learning_rate: float = setting(
        6e-4, low=0, help="Peak learning rate of Muon, in units of AdamW's: updates are scaled to an RMS of 0.2."
    )
    warmup_steps: int = setting(
        100,
        low=0,
        help="Steps of linear warm-up, from peak / (warmup_steps + 1). If the run has no more steps, a tenth of them.",
    )
    final_learning_rate: float = setting(
        0.1, low=0, high=1, help="Fraction of the peak that a cosine decays to at the last step."
    )
    beta1: float = setting(0.9, low=0, high=0.99999, help="Decay of AdamW's running mean of the gradients.")
    beta2: float = setting(0.95, low=0, high=0.99999, help="Decay of AdamW's running mean of the squared gradients.")
    weight_decay: float = setting(0.1, low=0, help="Weight decay; applies to matrices only.")
    clip_norm: float = setting(1.0, low=0, help="Gradients are scaled down to this global norm; 0 turns clipping off.")
    ema_decay: float = setting(
        0.0,
        low=0,
        high=0.99999,
        help="Decay of an exponential moving average of the parameters, which evaluation, samples and exports then "
        "use; 0 turns it off.",
    )
    loss_chunk: int = setting(
        0,
        low=0,
        help="Positions per chunk of the loss, so that the logits [B, T, V] never exist as a whole; 0 means one chunk.",
    )
    log_interval: int = setting(
        10,
        low=1,
        high=10**9,
        help="Steps from one logged step to the next. On one CPU, also the most steps that one program does.",
    )
    eval_interval: int = setting(
        250, low=1, high=10**9, help="Steps from one evaluation to the next; the last step is always evaluated."
    )
    eval_sequences: int = setting(
        0, low=0, help="Validation sequences per evaluation, spread evenly over the split; 0 means all of it."
    )
    patience: int = setting(
        0,
        low=0,
        high=10**6,
        help="The run stops early after this many evaluations in a row without a new lowest validation loss; 0 means "
        "never.",
    )
    sample_tokens: int = setting(0, low=0, help="Tokens of text sampled at each evaluation; 0 means none.")
    sample_prompt: str = setting("", help="Text that the sample starts with.")
    checkpoint_interval: int = setting(
        250, low=1, high=10**9, help="Steps from one checkpoint to the next; the last step always has one."
    )
    keep: int = setting(
        2,
        low=1,
        high=1000,
        help="How many of the latest checkpoints to keep, besides the best one. A new best evaluation is followed by a "
        "checkpoint, whatever the interval.",
    )
    bad_steps: int = setting(
        3,
        low=1,
        high=1000,
        help="The run stops after this many steps in a row with a loss or gradient that is not finite.",
    )

    def __post_init__(self):
        if self.model is None:
            object.__setattr__(self, "model", GPTConfig())
            object.__setattr__(self, "model_defaults", frozenset(self.model.to_dict().items()))
        for name, kind in (
            ("model", GPTConfig),
            ("compute", ComputeConfig),
            ("mesh", MeshConfig),
            ("lora", LoraConfig),
        ):
            if not isinstance(value := getattr(self, name), kind):
                preset = ", such as GPTConfig.preset('gpt2')" if kind is GPTConfig else ""
                raise ConfigError(f"{name} must be a {kind.__name__}{preset}, not {short_repr(value)}")
        check(self)
        if self.template:
            Template(self.template)
        if self.batch_size % self.grad_accumulation:
            raise ConfigError(f"grad_accumulation must divide batch_size: {self.batch_size} / {self.grad_accumulation}")
        if self.seq_len > self.model.context_length:
            raise ConfigError(
                f"seq_len {short_repr(self.seq_len)} is beyond model.context_length {self.model.context_length}: "
                "seq_len=0 takes all of it"
            )
        # Adapters are float32 whatever the model's type is, which is frozen.
        if self.compute.param_dtype not in ("float32", *["bfloat16"] * bool(self.lora.rank)):
            raise ConfigError(
                "compute.param_dtype must be float32 to train: in a shorter type, small updates are lost to rounding "
                "(of lora, which trains adapters beside a frozen model, it may be bfloat16)"
            )
        if self.lora.rank and self.freeze:
            raise ConfigError("freeze is not for lora, which trains nothing but adapters: lora.matrices says of what")
        if self.lora.rank and self.optimizer != "adamw":
            raise ConfigError(f"optimizer must be adamw for lora, not {self.optimizer}, which is for whole matrices")

    @property
    def warmup(self) -> int:
        """Steps of warm-up: `warmup_steps`, or a tenth of a run that is not longer than that."""
        return self.warmup_steps if self.warmup_steps < self.steps else self.steps // 10

    @property
    def T(self) -> int:
        """Tokens per sequence, T."""
        return self.seq_len or self.model.context_length

    def is_set(self, name: str) -> bool:
        """Whether a field of `model` was set, rather than left at its default."""
        return (name, getattr(self.model, name)) not in self.model_defaults

    def fill(self, model: GPTConfig, keep: Container[str] = ()) -> TrainConfig:
        """A copy in which the fields of `model` that nobody set are those of another model, except those to `keep`."""
        own, other = self.model.to_dict(), model.to_dict()
        fields = {name: own[name] if self.is_set(name) or name in keep else other[name] for name in own}
        return dataclasses.replace(self, model=GPTConfig.from_dict(fields), model_defaults=frozenset())

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any], source: str = "config", overrides: Sequence[str] = ()) -> TrainConfig:
        """Builds a config from tables by name: "model", "compute", "mesh", "lora" and "train".

        Args:
            tables: the tables.
            source: where they are from, for errors.
            overrides: "key=value" strings, as given to `--set`; keys of the other tables are written "model.key",
                "compute.key", "mesh.key" and "lora.key".

        Raises:
            ConfigError: naming the unknown key or the invalid field, and `source` or the override at fault.
        """
        if overrides:
            try:
                return cls.from_dict(override(tables, overrides), source=f"--set {' '.join(overrides)}")
            except ConfigError:
                cls.from_dict(tables, source)  # if the tables alone are at fault, they are blamed
                raise
        check_tables(tables, source)
        table = tables.get("model", {})
        model = GPTConfig.from_fields(table, source=f"{source} [model]")
        given = {*table, *PRESETS.get(table.get("preset"), {})}
        defaults = frozenset((name, value) for name, value in model.to_dict().items() if name not in given)
        compute = ComputeConfig.from_dict(tables.get("compute", {}), source=f"{source} [compute]")
        mesh = MeshConfig.from_dict(tables.get("mesh", {}), source=f"{source} [mesh]")
        lora = LoraConfig.from_dict(tables.get("lora", {}), source=f"{source} [lora]")
        others = {"model": model, "model_defaults": defaults, "compute": compute, "mesh": mesh, "lora": lora}
        return from_table(cls, tables.get("train", {}), f"{source} [train]", **others)

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Reads the tables of a TOML file, or of a recipe by its name (those of configs/), and applies `overrides` as
        `from_dict` does.

        Raises:
            ConfigError: if the file or an override cannot be used.
        """
        return cls.from_dict(read_toml(_recipe(path)), str(path), overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the form that `from_dict` takes."""
        others = {name: to_table(getattr(self, name)) for name in TABLES if name != "train"}
        return {**others, "train": to_table(self)}


# The configs that come with the package: in a checkout, and in a wheel.
_RECIPES = Path(__file__).parents[2] / "configs", Path(__file__).parents[1] / "configs"


def _recipe(path: str | Path) -> str | Path:
    """The file of a recipe, if `path` is the name of one; a file of that name takes precedence.

    Raises:
        ConfigError: for a bare name that is neither; names the nearest recipe.
    """
    if not isinstance(path, str) or not re.fullmatch(r"[\w-]+(\.\d[\w-]*)*", path) or os.path.exists(local(path)):
        return path
    known = recipes()
    if path not in known:
        raise ConfigError(f"{path}: no such file or recipe{did_you_mean(path, known)} (recipes: {', '.join(known)})")
    return known[path]


def recipes() -> dict[str, Path]:
    """The files of configs/ by the names that `TrainConfig.from_file` takes."""
    return {file.stem: file for folder in _RECIPES for file in sorted(folder.glob("*.toml"))}


# The tables of a config file, and the class that declares the fields of each.
TABLES: dict[str, type] = {
    "model": GPTConfig,
    "compute": ComputeConfig,
    "mesh": MeshConfig,
    "lora": LoraConfig,
    "train": TrainConfig,
}


def check_tables(tables: Any, source: str) -> None:
    """Raises ConfigError, naming `source`, unless these are tables of `TABLES`, and no field is in the wrong one."""
    if not isinstance(tables, Mapping):
        raise ConfigError(f"{source}: expected tables, not {short_repr(tables)}")
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"{source}: {short_repr(name)} must be a table, not {short_repr(table)}")
        if name not in TABLES:
            raise ConfigError(f"{source}: unknown table {short_repr(name)}{did_you_mean(name, TABLES)}")
        for key in table:
            _check_place(name, key, source)


def _check_place(table: str, key: Any, source: str) -> None:
    """Raises ConfigError for a key that is a field of another table, or that other programs call such a field."""
    fields = {name: {declared.name for declared in settings(cls)} for name, cls in TABLES.items()}
    if key in fields[table] or SYNONYMS.get(key) in fields[table]:
        return  # `from_table` suggests the latter
    for meant in (key, SYNONYMS.get(key)):
        for other in (other for other in TABLES if meant in fields[other]):
            typed = meant if other == "train" else f"{other}.{meant}"
            raise ConfigError(
                f"{source} [{table}]: unknown key {short_repr(key)}; did you mean {meant} of [{other}] "
                f"(--set {typed}=...)?"
            )


def override(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tables of a config file with the "key=value" strings of `--set` applied (see `TrainConfig.from_dict`).

    Raises:
        ConfigError: for anything but "key=value", for an unknown table or key, for a key given twice, and for a value
            that the field alone does not allow.
    """
    result: dict[str, Any] = {name: {} for name in TABLES}
    result |= {name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()}
    given: set[tuple[str, str]] = set()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, not {text!r}")
        table, _, name = key.strip().rpartition(".")
        if table not in ("", *TABLES):
            raise ConfigError(f"--set: no table {table!r} in {key!r}; the tables are {', '.join(TABLES)}")
        if (place := (table or "train", name)) in given:
            raise ConfigError(f"--set {key.strip()} was given twice")
        given.add(place)
        parsed = parse_value(value.strip())
        if parsed == value.strip() and (escape := re.search(r"\\[nt]", value)):
            # Only in quotes is it one character: here a prompt would silently have a backslash and a letter.
            raise ConfigError(
                f"--set {key.strip()}: {escape[0]} is a line break or a tab only in a quoted text: "
                f"--set '{key.strip()}=\"...\"'"
            )
        _check_alone(table or "train", name, parsed, f"--set {text}")
        if isinstance(result[table or "train"], dict):  # if not, from_dict says so
            result[table or "train"][name] = parsed
    return result


def _check_alone(table: str, name: str, value: Any, source: str) -> None:
    """Raises ConfigError unless a table has this field, and the field can have this value, whatever the others are."""
    _check_place(table, name, source)
    if table == "model" and name == "preset":
        return
    cls = TABLES[table]
    check_keys(cls, [name], f"{source} [{table}]")
    declared = next(declared for declared in settings(cls) if declared.name == name)
    if not (value is None and declared.derived):
        declared.check(value, prefix=f"{source} [{table}]: ")
