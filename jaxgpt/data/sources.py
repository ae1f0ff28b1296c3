"""What a model is trained on, opened: sources, one or a mixture of several. `opening.py` makes them of files."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxgpt.data.contents import TEXT_KEY
from jaxgpt.data.records import Records, RecordTokens
from jaxgpt.data.tokens import Ids, Joined, Shard, Tokens
from jaxgpt.errors import DataError


class Reference(NamedTuple):
    """Where a source is, and how it is read (see `Source`)."""

    name: str
    path: str
    weight: float | None
    text_key: str | None = None
    allow_special: bool = False
    skip_bad: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Attributes:
        name: its name in messages and in run.json.
        tokens: its ids.
        weight: its share of the sequences, relative to the other sources' weights; None for that of its size, in
            tokens or in records.
        validation: the validation split that came with it, if one did.
        path: where it is; None for tokens made in Python.
        left_out: what is not used, each with the reason: files in its directory, and records.
        text_key: where a record of JSON or Parquet has its text; None for records that are read by a template.
        allow_special: whether special tokens in its texts are tokens.
        skip_bad: whether records that cannot be used are left out.
    """

    name: str
    tokens: Tokens
    weight: float | None = None
    validation: Tokens | None = None
    path: str | None = None
    left_out: tuple[str, ...] = ()
    text_key: str | None = TEXT_KEY
    allow_special: bool = False
    skip_bad: bool = False

    def __post_init__(self):
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"{self.name}: a weight must be a number above 0, not {self.weight!r}")

    @property
    def template(self) -> str:
        """What its records are read by; "" for texts and tokens."""
        return template_of(self.tokens)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The sources of a run.

    Attributes:
        sources: what is trained on.
        validation: what is validated on, if that is not the end of each source.
    """

    sources: tuple[Source, ...]
    validation: tuple[Source, ...] = ()

    @property
    def identity(self) -> str:
        """What tells these ids, in this mixture, from others, wherever they lie."""
        if len(self.sources) == 1 and not self.validation and self.sources[0].validation is None:
            return self.sources[0].tokens.identity
        parts = [
            (source.weight, source.tokens.identity, source.validation and source.validation.identity)
            for source in self.sources
        ]
        validation = [source.tokens.identity for source in self.validation]
        return hashlib.sha256(repr((parts, validation)).encode()).hexdigest()

    @property
    def tokens(self) -> list[Tokens]:
        """Those of all sources and of all that is validated on."""
        tokens = [source.tokens for source in (*self.sources, *self.validation)]
        return tokens + [source.validation for source in self.sources if source.validation is not None]

    @property
    def shards(self) -> list[Shard]:
        """All shards, those of the validation too."""
        return [shard for one in self.tokens for shard in one.shards]

    @property
    def template(self) -> str:
        """What the records of all sources are read by; "" for texts and tokens."""
        return self.sources[0].template

    def split(self, val_fraction: float) -> tuple[Mixture, Ids | Records]:
        """(what to train on, what to validate on): the latter is the validation that was given or came along or, of a
        source that has none, the last `val_fraction` of its ids."""
        train: list[Ids | Records] = []
        val: list[Ids | Records] = [source.tokens.ids_N for source in self.validation]
        for source in self.sources:
            if self.validation or source.validation is not None:
                train.append(source.tokens.ids_N)
                val += [] if source.validation is None or self.validation else [source.validation.ids_N]
            else:
                first, last = source.tokens.split(val_fraction)
                train.append(first)
                val.append(last)
        names = tuple(source.name for source in self.sources)
        weights = tuple(
            float(ids.count if isinstance(ids, Records) else len(ids)) if source.weight is None else source.weight
            for source, ids in zip(self.sources, train, strict=True)
        )
        return Mixture(names, tuple(train), weights), val[0] if len(val) == 1 else _one(val)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rows of ids, or records, to draw sequences from.

    Attributes:
        names: of the sources.
        ids: the row of each, or its records.
        weights: the share of each in the sequences, relative to the others'.
    """

    names: tuple[str, ...]
    ids: tuple[Ids | Records, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, ids_N: Ids | Records) -> Mixture:
        """That of a single source."""
        return cls(("the data",), (ids_N,), (1.0,))

    def __len__(self) -> int:
        return sum(map(len, self.ids))


def _one(parts: Sequence[Ids | Records]) -> Ids | Records:
    """The rows or the records of several sources as one."""
    records = [part for part in parts if isinstance(part, Records)]
    return Records.joined(records) if records else Joined([part for part in parts if not isinstance(part, Records)])


def template_of(tokens: Tokens) -> str:
    """What records are read by; "" for texts and tokens."""
    return tokens.template if isinstance(tokens, RecordTokens) else ""


def kind_of(tokens: Tokens) -> str:
    """What tokens are of, for messages."""
    return f"records for the template {template_of(tokens)!r}" if template_of(tokens) else "text or tokens"
