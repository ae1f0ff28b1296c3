"""Declares the fields of config dataclasses: each field's default, allowed values and meaning, written once.

    @documented
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Paper:
        \"\"\"A sheet of paper.\"\"\"

        columns: int = setting(80, low=1, high=400, help="Characters per line.")

        def __post_init__(self):
            check(self)

The checks, the class's docstring and `jaxgpt train --help` all come from these declarations.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any, TypeVar

from jaxgpt.checks import check_type, did_you_mean, html_table, short_repr
from jaxgpt.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One field as declared with `setting`.

    Attributes:
        default: the default value.
        help: what the field means, in full sentences.
        low, high: inclusive bounds of the range.
        above, below: exclusive bounds of the range.
        also: one more allowed value, outside the range.
        choices: all allowed values of a field that is a name.
        words: the range in words, if the numbers would say too much.
        derived: the value that the dataclass substitutes for the default None, in words.
        name: the field's name.
        type: "int", "float", "bool" or "str", as annotated.
    """

    default: Any = None
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    also: int | None = None
    choices: tuple[str, ...] = ()
    words: str = ""
    derived: str = ""
    name: str = ""
    type: str = ""

    @property
    def allowed(self) -> str:
        """The condition on the value beyond its type, such as "from 1 to 8"; empty if there is none."""
        if self.words or self.choices:
            return self.words or f"one of {', '.join(self.choices)}"
        if self.low is not None and self.high is not None:
            return f"from {self.low} to {self.high}"
        if self.low is not None and self.below is None:
            return f"{self.low} or more"
        ends = {"at least": self.low, "above": self.above, "below": self.below, "at most": self.high}
        return " and ".join(f"{side} {end}" for side, end in ends.items() if end is not None)

    @property
    def default_text(self) -> str:
        """The default as typed on the command line, or what it is derived from."""
        bare = self.derived or (self.default if isinstance(self.default, str) else "")
        return bare or json.dumps(self.default)

    def __str__(self) -> str:
        """The meaning, the default and the allowed values."""
        return f"{self.help} ({'; '.join(filter(None, [f'default: {self.default_text}', self.allowed]))})"

    def check(self, value: Any, prefix: str = "") -> None:
        """Raises a ConfigError that names the field, prefixed with `prefix`, unless `value` is allowed."""
        name = prefix + self.name
        if not self.choices:
            check_type(name, value, self.type)
        if not self._allows(value):
            hint = did_you_mean(value, self.choices)
            raise ConfigError(f"{name} must be {self.allowed}, not {short_repr(value)}{hint}")

    def _allows(self, value: Any) -> bool:
        if self.choices:
            return isinstance(value, str) and value in self.choices
        return value == self.also or (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def setting(default: Any = None, **declared: Any) -> Any:
    """Declares a dataclass's field; the keywords are the attributes of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(default=default, **declared)})


def settings(cls: type) -> list[Setting]:
    """The fields of a dataclass that are declared with `setting`, in order; fields that hold other tables are not."""
    return [
        dataclasses.replace(field.metadata["setting"], name=field.name, type=str(field.type))
        for field in dataclasses.fields(cls)
        if "setting" in field.metadata
    ]


def check(config: Any, only: Container[str] | None = None, prefix: str = "") -> None:
    """Raises a ConfigError for the first setting (of all, or of those in `only`) whose value is not allowed."""
    for declared in settings(type(config)):
        if only is None or declared.name in only:
            declared.check(getattr(config, declared.name), prefix)


# What other programs call some fields: of nanoGPT, transformers, the book, and in common speech.
SYNONYMS = {
    "lr": "learning_rate",
    "max_lr": "learning_rate",
    "min_lr": "final_learning_rate",
    "max_iters": "steps",
    "max_steps": "steps",
    "num_steps": "steps",
    "iters": "steps",
    "warmup": "warmup_steps",
    "warmup_iters": "warmup_steps",
    "gradient_accumulation_steps": "grad_accumulation",
    "grad_clip": "clip_norm",
    "max_grad_norm": "clip_norm",
    "save_steps": "checkpoint_interval",
    "eval_steps": "eval_interval",
    "log_steps": "log_interval",
    "logging_steps": "log_interval",
    "max_seq_len": "seq_len",
    "sequence_length": "seq_len",
    "ema": "ema_decay",
    "wd": "weight_decay",
    "early_stopping_patience": "patience",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "target_modules": "matrices",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "per_device_train_batch_size": "batch_size",
    "n_layer": "n_layers",
    "num_layers": "n_layers",
    "num_hidden_layers": "n_layers",
    "n_head": "n_heads",
    "num_heads": "n_heads",
    "num_attention_heads": "n_heads",
    "n_embd": "emb_dim",
    "d_model": "emb_dim",
    "hidden_size": "emb_dim",
    "n_inner": "ffn_dim",
    "d_ff": "ffn_dim",
    "block_size": "context_length",
    "n_ctx": "context_length",
    "n_positions": "context_length",
    "max_position_embeddings": "context_length",
    "dropout": "drop_rate",
    "tie_word_embeddings": "tie_embeddings",
    "precision": "dtype",
    "torch_dtype": "dtype",
    "fp16": "dtype",
    "bf16": "dtype",
    "gradient_checkpointing": "remat",
}


def field_hint(key: Any, known: Collection[str]) -> str:
    """Returns '; did you mean X?' for the known field that `key` probably means, or ''."""
    meant = SYNONYMS.get(key) if isinstance(key, str) else None
    return f"; did you mean {meant!r}?" if meant in known else did_you_mean(key, known)


def check_keys(cls: type, keys: Iterable[Any], source: str) -> None:
    """Raises a ConfigError that names `source` for the first key that is no setting of the dataclass."""
    known = [declared.name for declared in settings(cls)]
    for key in keys:
        if key not in known:
            raise ConfigError(f"{source}: unknown key {short_repr(key)}{field_hint(key, known)}")


def from_table(cls: type[T], table: Mapping[str, Any], source: str, **others: Any) -> T:
    """Builds a dataclass from plain values, such as a table of a config file, and `others`, fields not declared with
    `setting`.

    Raises:
        ConfigError: naming `source`, and the unknown key or the invalid field.
    """
    check_keys(cls, table, source)
    try:
        return cls(**table, **others)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def to_table(config: Any) -> dict[str, Any]:
    """Returns the settings of a dataclass instance as plain values, in the form that `from_table` takes."""
    return {declared.name: getattr(config, declared.name) for declared in settings(type(config))}


def documented(cls: type[T]) -> type[T]:
    """A class decorator that appends the settings to the docstring, as its "Attributes:" section, and shows an instance
    as a table in a notebook: the settings that differ from their defaults in bold, and tables of settings below."""
    lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:"]
    for declared in settings(cls):
        lines += textwrap.wrap(
            f"    {declared.name}: {declared}", 110, subsequent_indent=" " * 8, break_on_hyphens=False
        )
    cls.__doc__ = "\n".join(lines)
    cls._repr_html_ = _to_html  # type: ignore[attr-defined]
    return cls


def _to_html(config: Any) -> str:
    values = to_table(config)
    changed = {s.name for s in settings(type(config)) if s.default is not None and values[s.name] != s.default}
    tables = [html_table(type(config).__name__, [(name, repr(value)) for name, value in values.items()], changed)]
    inner = [getattr(config, field.name) for field in dataclasses.fields(config) if "setting" not in field.metadata]
    return "".join([*tables, *(_to_html(value) for value in inner if dataclasses.is_dataclass(value))])
