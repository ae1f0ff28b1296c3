"""`Tokens`: ids in memory or in files, as one row whatever the number of files."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxgpt.checks import as_ids, check_ids
from jaxgpt.errors import DataError
from jaxgpt.files import local, replacing_file
from jaxgpt.tokenizer import get_tokenizer

FORMAT = "jaxgpt-tokens"

# Ids that are hashed or checked at a time.
_PIECE = 2**20
# Files that are open at a time. A process may have 256 on macOS, 1,024 elsewhere.
_OPEN = 128


class Ids(Protocol):
    """A row of ids: an array [N], or anything of which a slice is one and `np.asarray` gives the ids."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Any: ...
    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray: ...


class Joined:
    """Several rows of ids as one. A slice is a view; `np.asarray` reads the ids."""

    def __init__(self, parts: Sequence[Ids]):
        self.parts = tuple(part for part in parts if len(part))
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, part: slice) -> Any:
        start, count = _cut(part, len(self))
        stop = start + count
        first, last = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._ends, stop)
        cut = []
        for i, ids in enumerate(self.parts[first : last + 1], first):
            offset = self._ends[i] - len(ids)
            cut.append(ids[max(0, start - offset) : max(0, stop - offset)])
        return cut[0] if len(cut) == 1 else Joined(cut)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        rows = [np.asarray(part) for part in self.parts]
        return np.asarray(np.concatenate(rows) if rows else np.zeros(0, np.uint16), *args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class FileIds:
    """Ids in a file, which are read when they are needed. A slice is a view; `np.asarray` reads the ids.

    They are not mapped into memory: a file that became shorter would end the process, not raise.

    Attributes:
        path: the file.
        dtype: the type of the ids in it.
        offset: of the first id, in bytes.
        count: how many there are.
    """

    path: Path
    dtype: str
    offset: int
    count: int
    whole: FileIds | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> FileIds:
        start, count = _cut(part, self.count)
        offset = self.offset + start * np.dtype(self.dtype).itemsize
        return FileIds(self.path, self.dtype, offset, count, self.whole or self)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        size = self.count * np.dtype(self.dtype).itemsize
        try:
            data = _opened(self.whole or self).read(self.offset, size)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise DataError(f"{self.path}: has become shorter since it was opened")
        return np.asarray(np.frombuffer(data, self.dtype), *args, **kwargs)


class _File:
    """A file that is open as long as this object is there: a thread may still read when another closes it."""

    def __init__(self, path: Path):
        self._descriptor: int | None = None
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        assert self._descriptor is not None
        parts, missing = [], size
        while missing and (part := os.pread(self._descriptor, min(missing, 2**30), offset)):
            parts.append(part)
            offset, missing = offset + len(part), missing - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@functools.lru_cache(maxsize=_OPEN)
def _opened(ids_N: FileIds) -> _File:
    return _File(ids_N.path)


def _cut(part: slice, size: int) -> tuple[int, int]:
    """(start, length) of a slice of a row of `size`."""
    if not isinstance(part, slice):
        raise TypeError("ids in files are taken as slices: np.asarray reads them all")
    start, stop, step = part.indices(size)
    if step != 1:
        raise ValueError("ids in files can be cut, not strided: np.asarray reads them")
    return start, max(0, stop - start)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Shard:
    """The ids of one text or file.

    Attributes:
        ids_N: the ids.
        sha256: of the ids as little-endian uint32, so that a text and a token file with the same ids agree; None where
            a format does not state it.
        path: the file; None for ids in memory.
        marked: whether a text that was encoded holds the text of end-of-text, as ordinary text.
    """

    ids_N: Ids
    sha256: str | None = None
    path: Path | None = None
    marked: bool = False

    def __repr__(self) -> str:
        return f"Shard({len(self.ids_N):,} tokens{'' if self.path is None else f' of {self.path}'})"

    def verify(self, vocab_size: int, stop: Callable[[], bool] = lambda: False) -> bool:
        """Reads all ids, and returns True; or False, as soon as `stop` does, for a thread that must end.

        Raises:
            DataError: if they do not have the hash that is stated, or one is outside the vocabulary.
        """
        where, digest, start, outside = str(self.path or "the tokens"), hashlib.sha256(), 0, None
        for piece in pieces(self.ids_N):
            if stop():
                return False
            digest.update(piece.astype("<u4").tobytes())
            outside = outside or out_of_range(piece, vocab_size, where, start)
            start += len(piece)
        if self.sha256 is not None and digest.hexdigest() != self.sha256:
            raise DataError(f"{where}: damaged: the ids do not have the sha256 that its header states")
        if outside is not None:
            raise outside
        return True

    @property
    def identity(self) -> str:
        """What tells these ids from others without reading them all: the hash that is stated or, where none is, one of
        their number and of the first, middle and last thousand."""
        if self.sha256 is not None:
            return self.sha256
        count = len(self.ids_N)
        digest = hashlib.sha256(str(count).encode())
        for start in (0, count // 2, max(0, count - 1000)):
            digest.update(np.asarray(self.ids_N[start : start + 1000]).astype("<u4").tobytes())
        return f"sample {digest.hexdigest()}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tokens:
    """A text as token ids.

    Attributes:
        shards: the ids, in one piece or in several that follow one another.
        tokenizer: name of the tokenizer that made them.
        vocab_size: ids are below this.
        left_out: records of the files that are not among these, and why.
    """

    shards: tuple[Shard, ...]
    tokenizer: str
    vocab_size: int
    left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        several = f" in {len(self.shards):,} shards" if len(self.shards) > 1 else ""
        return (
            f"Tokens({len(self.ids_N):,} tokens{several}, tokenizer={self.tokenizer!r}, vocab_size={self.vocab_size})"
        )

    @classmethod
    def from_text(cls, text: str, tokenizer: str | Path) -> Tokens:
        """Encodes a text with a tokenizer, anything that `get_tokenizer` takes."""
        return cls.from_ids(get_tokenizer(tokenizer).encode(text), tokenizer)

    @classmethod
    def from_ids(cls, ids: Any, tokenizer: str | Path) -> Tokens:
        """Takes ids that the tokenizer has made; of "none", any ids.

        Raises:
            TypeError, ValueError: for anything but one row of ids of that tokenizer.
        """
        made_by = get_tokenizer(tokenizer)
        vocab_size = made_by.vocab_size or 1 + int(np.max(as_ids(ids, "ids"), initial=0))
        ids_N = check_ids(as_ids(ids, "ids"), "ids", vocab_size).astype(id_type(vocab_size))
        return cls((Shard(ids_N, sha256(ids_N)),), made_by.name, vocab_size)

    @functools.cached_property
    def ids_N(self) -> Ids:
        """The ids of all shards: an array, or a view of what is in files."""
        rows = [shard.ids_N for shard in self.shards]
        return rows[0] if len(rows) == 1 else Joined(rows)

    @functools.cached_property
    def identity(self) -> str:
        """What tells these ids from others, wherever they lie: the hash of a single shard, or one of all of theirs."""
        if len(self.shards) == 1:
            return self.shards[0].identity
        lines = (f"{shard.identity} {len(shard.ids_N)}\n" for shard in self.shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes a token file: see `writing`.

        Raises:
            DataError: if it cannot be written.
        """
        with writing(path, self.tokenizer, self.vocab_size) as writer:
            for piece in pieces(self.ids_N):
                writer.write(piece)

    def split(self, val_fraction: float) -> tuple[Ids, Ids]:
        """(train, validation): the validation split is the last `val_fraction` of the tokens."""
        boundary = int(len(self.ids_N) * (1 - val_fraction))
        return self.ids_N[:boundary], self.ids_N[boundary:]


class TokenWriter:
    """Writes the ids of a token file one after another; made by `writing`.

    Attributes:
        count: how many ids have been written.
        sha256: their hash, after `finish`.
    """

    def __init__(self, file: BinaryIO, tokenizer: str, vocab_size: int):
        self.count, self.sha256 = 0, ""
        self._file, self._tokenizer, self._vocab_size = file, tokenizer, vocab_size
        self._type = np.dtype(id_type(vocab_size)).newbyteorder("<")
        self._digest = hashlib.sha256()
        file.write(self._header())

    def write(self, ids_N: NDArray[np.integer]) -> None:
        """Appends ids."""
        self._digest.update(ids_N.astype("<u4"))
        self._file.write(ids_N.astype(self._type, copy=False))
        self.count += len(ids_N)

    def finish(self) -> None:
        """Writes the header."""
        self.sha256 = self._digest.hexdigest()
        self._file.seek(0)
        self._file.write(self._header())

    def _header(self) -> bytes:
        """The header of what has been written so far: always of one size, since it is written first and last."""
        metadata = {
            "format": FORMAT,
            "tokenizer": self._tokenizer,
            "vocab_size": str(self._vocab_size),
            "count": str(self.count),
            "sha256": self.sha256,
        }
        ids = {
            "dtype": f"U{8 * self._type.itemsize}",
            "shape": [self.count],
            "data_offsets": [0, self.count * self._type.itemsize],
        }
        header = json.dumps({"__metadata__": metadata, "ids": ids}).encode().ljust(512 + 16 * len(self._tokenizer))
        return len(header).to_bytes(8, "little") + header


@contextlib.contextmanager
def writing(path: str | Path, tokenizer: str, vocab_size: int) -> Iterator[TokenWriter]:
    """Writes a token file, a safetensors file with one tensor, "ids", and the rest as metadata. It is there once the
    block ends without an error.

    Raises:
        DataError: if it cannot be written.
    """
    try:
        with replacing_file(local(path)) as partial, partial.open("wb") as file:
            writer = TokenWriter(file, tokenizer, vocab_size)
            yield writer
            writer.finish()
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}") from None


def id_type(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type of a token file that holds all ids of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def out_of_range(ids_N: NDArray[np.integer], vocab_size: int, where: str, start: int) -> DataError | None:
    """The error about an id outside the vocabulary, with its place, if there is one; `start` is that of the first."""
    outside = np.flatnonzero((ids_N < 0) | (ids_N >= vocab_size))
    if not outside.size:
        return None
    i = int(outside[0])
    return DataError(f"{where}: id {ids_N[i]} at {start + i} is outside the vocabulary: 0 to {vocab_size - 1}")


def sha256(ids_N: Ids) -> str:
    """The hash of ids, as little-endian uint32."""
    digest = hashlib.sha256()
    for piece in pieces(ids_N):
        digest.update(piece.astype("<u4").tobytes())
    return digest.hexdigest()


def pieces(ids_N: Ids, size: int = _PIECE) -> Iterator[NDArray[np.integer]]:
    """The ids, `size` at a time."""
    for start in range(0, len(ids_N), size):
        yield np.asarray(ids_N[start : start + size])
