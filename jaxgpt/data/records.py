"""Records to fine-tune on, as ids: a prompt, which is read, and the response, which is learned."""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxgpt.data.contents import Nothing, Template
from jaxgpt.data.documents import Piece, open_documents
from jaxgpt.data.tokens import Shard, Tokens, id_type, sha256
from jaxgpt.errors import DataError
from jaxgpt.tokenizer import Tokenizer, get_tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """The ids of records: those of a prompt and its response, and end-of-text.

    Attributes:
        ids_N: the ids of all.
        learned_N: bool: whether a model learns to predict the id, or only reads it.
        starts_R, ends_R: int64: where each record starts and ends in these.
    """

    ids_N: NDArray[np.unsignedinteger]
    learned_N: NDArray[np.bool_]
    starts_R: NDArray[np.int64]
    ends_R: NDArray[np.int64]

    def __len__(self) -> int:
        """How many ids there are, as of a row of ids."""
        return int((self.ends_R - self.starts_R).sum())

    @property
    def count(self) -> int:
        """How many records there are."""
        return len(self.ends_R)

    @property
    def longest(self) -> int:
        """The number of ids of the longest one."""
        return int((self.ends_R - self.starts_R).max(initial=0))

    def row(self, number: int, length: int) -> NDArray[np.int32]:
        """A record as int32 [length]: an id that is only read is its complement, ~id. Padding is ~0.

        One record lies in a row; it would be here that several are packed into one, if they are kept apart.
        """
        row = np.full(length, ~0, np.int32)
        of = slice(self.starts_R[number], self.ends_R[number])
        ids = self.ids_N[of].astype(np.int32)
        row[: len(ids)] = np.where(self.learned_N[of], ids, ~ids)
        return row

    def split(self, val_fraction: float) -> tuple[Records, Records]:
        """(train, validation): the latter is the last `val_fraction` of the records."""
        boundary = int(self.count * (1 - val_fraction))
        return self._part(slice(boundary)), self._part(slice(boundary, None))

    def _part(self, records: slice) -> Records:
        return dataclasses.replace(self, starts_R=self.starts_R[records], ends_R=self.ends_R[records])

    @classmethod
    def joined(cls, parts: Sequence[Records]) -> Records:
        """The records of several, one after another."""
        offsets = np.cumsum([0, *(len(part.ids_N) for part in parts)])[:-1]
        return cls(
            np.concatenate([part.ids_N for part in parts]),
            np.concatenate([part.learned_N for part in parts]),
            np.concatenate([part.starts_R + offset for part, offset in zip(parts, offsets, strict=True)]),
            np.concatenate([part.ends_R + offset for part, offset in zip(parts, offsets, strict=True)]),
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RecordTokens(Tokens):
    """`Tokens` of which `ids_N` and the splits are `Records`.

    Attributes:
        records: the records.
        template: what made their texts: see `Template`.
    """

    records: Records
    template: str

    @functools.cached_property
    def ids_N(self) -> Records:  # type: ignore[override]
        return self.records

    @functools.cached_property
    def identity(self) -> str:
        """What tells these records, and what is learned of them, from others."""
        digest = hashlib.sha256(super().identity.encode())
        digest.update(np.packbits(self.records.learned_N).tobytes())
        digest.update(self.records.ends_R.astype("<i8").tobytes())
        return digest.hexdigest()

    def split(self, val_fraction: float) -> tuple[Records, Records]:  # type: ignore[override]
        return self.records.split(val_fraction)


@dataclasses.dataclass
class LeftOut:
    """Records that are left out: which, how many, and where the first one is."""

    which: str
    count: int = 0
    first: str = ""

    def add(self, where: str) -> None:
        """Counts one more."""
        self.count, self.first = self.count + 1, self.first or where

    @property
    def notes(self) -> tuple[str, ...]:
        """For `Tokens.left_out`."""
        several = f"{self.count:,} record{'s' * (self.count > 1)} {self.which} (the first: {self.first})"
        return (several,) if self.count else ()


def record_keys(path: str | Path) -> list[str]:
    """The keys of the first good record of a file; none if it holds a plain text or tokens."""
    try:
        with open_documents(path, content=Nothing()) as documents:
            return documents.keys()
    except DataError:
        return []  # what is wrong with it is said where it is read as what it may be


def read_records(
    path: str | Path, tokenizer: str | Path, template: str, longest: int, *, skip_bad: bool = False
) -> RecordTokens:
    """Encodes the records of a file.

    Prompt and response are encoded apart, as when the response is generated: an empty prompt is the id that the
    tokenizer starts from. End-of-text follows the response, and is learned too.

    Args:
        path: the file: JSON or Parquet.
        tokenizer: anything that `get_tokenizer` takes.
        template: see `Template`.
        longest: the most ids that a record may have. Longer ones are left out: cut off, they would not teach where a
            response ends.
        skip_bad: whether to leave out also records that lack something instead of raising.

    Raises:
        DataError: if it cannot be read; for a record that lacks something; if the tokenizer has no end-of-text.
    """
    made_by = get_tokenizer(tokenizer)
    if made_by.end_of_text is None:
        raise DataError(f"{path}: a response ends in end-of-text, which tokenizer {made_by.name!r} does not have")
    ids, learned, ends = array.array("I"), bytearray(), array.array("q", [0])
    long, bad = LeftOut(f"of more than {longest:,} tokens"), LeftOut("without what the template needs")
    with open_documents(path, content=Template(template)) as documents:
        for piece in documents.pieces(made_by.find_cut, skip_bad=skip_bad):
            if piece.error:
                bad.add(piece.error)
                continue
            new = _encode(piece, made_by)
            ids.extend(new)
            learned.extend(bytes([_is_learned(piece)]) * len(new))
            if piece.last and len(ids) - ends[-1] > longest:
                del ids[ends[-1] :], learned[ends[-1] :]
                long.add(piece.where)
            elif piece.last:
                ends.append(len(ids))
    ids_N = np.frombuffer(ids, np.uint32).astype(id_type(made_by.vocab_size))
    bounds = np.frombuffer(ends, np.int64)
    return RecordTokens(
        (Shard(ids_N, sha256(ids_N), Path(path)),),
        made_by.name,
        made_by.vocab_size,
        (*long.notes, *bad.notes),
        records=Records(ids_N, np.frombuffer(learned, np.bool_), bounds[:-1], bounds[1:]),
        template=template,
    )


def _is_learned(piece: Piece) -> bool:
    """Whether the piece is a response: a `Template` gives what is read and what is learned in turns."""
    return piece.part % 2 == 1


def _encode(piece: Piece, tokenizer: Tokenizer) -> list[int]:
    try:
        ids = tokenizer.encode(piece.text)
    except DataError as error:
        raise DataError(f"{piece.where}: {error}") from None
    if _is_learned(piece):
        return [*ids, tokenizer.end_of_text]  # type: ignore[list-item]
    return ids or [tokenizer.start]  # type: ignore[list-item]
