"""Documents: the texts in a file, read a piece at a time.

| a file with | recognised by | documents |
|---|---|---|
| plain text | UTF-8 | one, the whole file |
| JSON lines | an object in the first line, or a name in `.jsonl` | one per line, under a key |
| a JSON array | an object as its first element | one per element, under a key |
| Parquet | its first bytes | one per row, in a column (extra `[data]`) |

`jaxgpt.data.contents` documents what is taken from the records of the last three.

Text and JSON may be compressed with gzip or zstd (extra `[data]`, before Python 3.14).
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxgpt.checks import first_line, short_repr
from jaxgpt.data.contents import LIMIT, TEXT_KEY, BadRecordError, Content, UnderKey
from jaxgpt.data.unpacking import BUFFER, readable, unpacked
from jaxgpt.errors import DataError, require
from jaxgpt.files import local, not_text

# Characters after which a document is cut, and bytes after which records are not read together.
PIECE = 2**19
# Rows of a table that are read together, at most.
_ROWS = 256

_JSON_LINES = re.compile(r".*\.(jsonl|ndjson)(\.\w+)?", re.IGNORECASE)
_JSON = re.compile(r".*\.json(\.\w+)?", re.IGNORECASE)
_JSON_ARRAY = re.compile(rb'\s*\[\s*\{\s*"')
# Bytes that a JSON array may have, because all of it is read at once.
_ARRAY_LIMIT = 2**30
_BLOCK = 2**20
_EXPECTED = "expected UTF-8 text, or a token file from `jaxgpt tokenize`"

# From a text and a place in it, the first place from there on where the text may be cut, if there is one: the parts
# then have the ids of the whole. See `Tokenizer.find_cut`.
FindCut = Callable[[str, int], int | None]


class Piece(NamedTuple):
    """A document, or a part of one.

    Attributes:
        where: its place, for messages.
        part: the number of this part of it, from 0.
        text: the text of the part.
        last: whether it is the last part.
        error: why a record is left out; it has no text then.
    """

    where: str
    part: int
    text: str
    last: bool
    error: str = ""


class Place(NamedTuple):
    """How far a file has been read.

    Attributes:
        path: the file.
        blocks: how many of its blocks.
        read: how many of its bytes.
    """

    path: str | Path
    blocks: int
    read: int


@dataclasses.dataclass(frozen=True)
class Block:
    """What is read of a file at a time: several records, or a part of a text. Only `pieces` parses it, which another
    process may do.

    Attributes:
        end: where it ends.
        first: the number of its first record in the file, or of the part of the text, from 0.
        raw: what was read.
        content: what is taken from a record.
    """

    end: Place
    first: int
    raw: Any
    content: Content

    unit = ""

    def pieces(self, find_cut: FindCut, *, skip_bad: bool = False) -> Iterator[Piece]:
        """Yields the documents, cut where that does not change their ids.

        Args:
            find_cut: of the tokenizer, which says where that is.
            skip_bad: whether to leave out records without a text instead of raising.

        Raises:
            DataError: for a record without a text, with its line or row; if a text has more than `LIMIT` characters
                without a place to cut.
        """
        for number, raw in self.records():
            where = f"{self.end.path}, {self.unit} {number + 1}"
            try:
                texts = self.content.parts(self.parsed(raw))
                parts = _mark_last(texts) if self.content.whole else _cut(texts, find_cut)
                for part, (text, last) in enumerate(parts):
                    yield Piece(where, part, text, last)
            except BadRecordError as error:
                reason = f"{where}: {error}"
                if not skip_bad:
                    raise DataError(f"{reason} (--skip-bad leaves such records out)") from None
                yield Piece(where, 0, "", True, reason)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None

    def records(self) -> Iterator[tuple[int, Any]]:
        """The number of each record, and the record, not parsed."""
        return enumerate(self.raw, self.first)

    def parsed(self, raw: Any) -> dict[str, Any]:
        """A record; raises BadRecordError if it is none, or lacks a key."""
        raise NotImplementedError


@contextlib.contextmanager
def open_documents(path: str | Path, text_key: str = TEXT_KEY, content: Content | None = None) -> Iterator[Documents]:
    """Opens a file, or a pipe, for its documents.

    Args:
        path: the file.
        text_key: where a record has its text: the key in a JSON object, the column in a table.
        content: what is taken from a record instead.

    Raises:
        DataError: if it cannot be read, or is none of the formats of this module.
        MissingExtraError: if it needs the extra [data].
    """
    with contextlib.ExitStack() as stack:
        with readable(path):
            documents = _recognise(path, content or UnderKey(text_key), stack)
        yield documents


def _recognise(path: str | Path, content: Content, stack: contextlib.ExitStack) -> Documents:
    raw: Any = stack.enter_context(local(path).open("rb", buffering=BUFFER))
    if raw.peek(5).startswith(b"PAR1\x15"):
        return _Table(path, raw, content)
    file = unpacked(path, raw, stack)
    head = file.peek(BUFFER)
    name, start = os.path.basename(path), head.removeprefix(codecs.BOM_UTF8)
    if _JSON_ARRAY.match(start):
        return _Array(path, raw, file, content)
    if _is_json_lines(name, head):
        return _Lines(path, raw, file, content)
    if reason := not_text(head):
        raise DataError(f"{path}: {reason}; {_EXPECTED}")
    if _JSON.fullmatch(name) and start.lstrip().startswith(b"{"):
        raise DataError(
            f"{path}: one JSON object over several lines: expected an array of records, or JSON lines, with one record "
            "per line"
        )
    return _Text(path, raw, file, content)


class Documents:
    """The documents of an open file.

    Attributes:
        path: the file.
        records: whether it holds records, and is not one text.
    """

    records = True
    _block: type[Block]

    def __init__(self, path: str | Path, raw: BinaryIO, file: Any, content: Content):
        self.path, self._raw, self._file, self._content = path, raw, file, content

    def keys(self) -> list[str]:
        """The keys of the first good record, or the columns of the table; none of a plain text. To be asked first."""
        return []

    def blocks(self, find_cut: FindCut) -> Iterator[Block]:
        """Reads the file, some documents at a time: always the same ones together.

        Raises:
            DataError: if the file is damaged, or a text has more than `LIMIT` characters without a place to cut.
        """
        with readable(self.path):
            for count, (first, raw) in enumerate(self._blocks(find_cut), 1):
                read = self._raw.tell() if self._raw.seekable() else 0
                yield self._block(Place(self.path, count, read), first, raw, self._content)

    def pieces(self, find_cut: FindCut, *, skip_bad: bool = False) -> Iterator[Piece]:
        """The pieces of all blocks."""
        for block in self.blocks(find_cut):
            yield from block.pieces(find_cut, skip_bad=skip_bad)

    def _blocks(self, find_cut: FindCut) -> Iterator[tuple[int, Any]]:
        """`first` and `raw` of each block."""
        raise NotImplementedError


class _TextBlock(Block):
    def pieces(self, find_cut: FindCut, *, skip_bad: bool = False) -> Iterator[Piece]:
        text, last = self.raw
        yield Piece(str(self.end.path), self.first, text, last)


class _Text(Documents):
    records = False
    _block = _TextBlock

    def _blocks(self, find_cut: FindCut) -> Iterator[tuple[int, Any]]:
        try:
            yield from enumerate(_cut(self._decoded(), find_cut))
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None

    def _decoded(self) -> Iterator[str]:
        decoder, done, block = codecs.getincrementaldecoder("utf-8-sig")(), 0, b" "
        while block:
            block = self._file.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                wrong = done - pending + error.start
                raise DataError(f"not UTF-8 text (byte {wrong}); {_EXPECTED}") from None
            done += len(block)


class _ElementBlock(Block):
    unit = "record"

    def parsed(self, raw: Any) -> dict[str, Any]:
        if not isinstance(raw, dict):
            raise BadRecordError(f"expected a JSON object, not {short_repr(raw)}")
        if (key := self.content.missing(raw)) is not None:
            raise BadRecordError(f"no key {key!r} ({self.content.hint}; there are {_known(raw)})")
        return raw


class _LineBlock(_ElementBlock):
    unit = "line"

    def records(self) -> Iterator[tuple[int, bytes]]:
        lines = enumerate(self.raw.split(b"\n"), self.first)
        return ((number, line) for number, line in lines if line and not line.isspace())

    def parsed(self, raw: bytes) -> dict[str, Any]:
        if len(raw) >= LIMIT:
            raise BadRecordError(f"longer than {LIMIT:,} bytes, the most that a record may have")
        try:
            record = json.loads(raw.removeprefix(codecs.BOM_UTF8).decode())
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"not JSON: {first_line(error)}") from None
        return super().parsed(record)


class _Lines(Documents):
    _block = _LineBlock

    def keys(self) -> list[str]:
        for block in self.blocks(lambda text, start: None):
            for _, raw in block.records():
                with contextlib.suppress(BadRecordError):
                    return list(block.parsed(raw))
        return []

    def _blocks(self, find_cut: FindCut) -> Iterator[tuple[int, Any]]:
        number = 0
        while lines := self._file.read(PIECE):
            if not lines.endswith(b"\n"):
                lines += self._file.readline(LIMIT)
            yield number, lines
            number += lines.count(b"\n")
            if not lines.endswith(b"\n"):  # the last one is too long, or it is that of the file
                while (rest := self._file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                    pass
                number += 1


class _Array(Documents):
    _block = _ElementBlock

    def keys(self) -> list[str]:
        return next((list(element) for element in self._elements() if isinstance(element, dict)), [])

    def _blocks(self, find_cut: FindCut) -> Iterator[tuple[int, Any]]:
        elements = self._elements()
        together = max(1, len(elements) * PIECE // self._size)
        for first in range(0, len(elements), together):
            yield first, elements[first : first + together]

    def _elements(self) -> list[Any]:
        data = self._file.read(_ARRAY_LIMIT + 1)
        if len(data) > _ARRAY_LIMIT:
            raise DataError(
                f"{self.path}: a JSON array of more than {_ARRAY_LIMIT:,} bytes, all of which would be read at once: "
                "make JSON lines of it, with one record per line (jq -c '.[]')"
            )
        self._size = len(data)
        try:
            return json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: not a JSON array: {first_line(error)}") from None


class _RowBlock(Block):
    unit = "row"

    def records(self) -> Iterator[tuple[int, Any]]:
        return enumerate(zip(*self.raw.columns, strict=True), self.first)

    def parsed(self, raw: Any) -> dict[str, Any]:
        record = {}
        for name, value in zip(self.raw.schema.names, raw, strict=True):
            try:
                record[name] = value.as_py()
            except UnicodeDecodeError as error:
                raise BadRecordError(f"not UTF-8 text (byte {error.start} of {name!r})") from None
        return record


class _Table(Documents):
    _block = _RowBlock

    def __init__(self, path: str | Path, raw: BinaryIO, content: Content):
        if not raw.seekable():
            raise DataError(f"{path}: Parquet cannot be read from a pipe: give the file")
        parquet = require("pyarrow.parquet", "data", f"{path}, a Parquet file,")
        with _arrow(path):
            super().__init__(path, raw, parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_BLOCK), content)
            self._names = self._file.schema_arrow.names
        if (key := content.missing(self._names)) is not None:
            raise DataError(f"{path}: no column {key!r} ({content.hint}; there are {_known(self._names)})")

    def keys(self) -> list[str]:
        return self._names

    def _blocks(self, find_cut: FindCut) -> Iterator[tuple[int, Any]]:
        columns = [name for name in self._names if name in self._content.keys]
        with _arrow(self.path):
            number = 0
            for i in range(self._file.num_row_groups):
                group = self._file.metadata.row_group(i)
                chunks = [chunk for chunk in map(group.column, range(group.num_columns)) if _column(chunk) in columns]
                size = sum(chunk.total_uncompressed_size for chunk in chunks)
                together = max(1, min(_ROWS, group.num_rows * PIECE // max(1, size)))
                for batch in self._file.iter_batches(together, [i], columns, use_threads=False):
                    yield number, batch
                    number += batch.num_rows


def _column(chunk: Any) -> str:
    """The column that a part of a Parquet file belongs to."""
    return chunk.path_in_schema.partition(".")[0]


def _known(keys: Iterable[str]) -> str:
    return ", ".join(short_repr(key) for key in list(keys)[:10]) or "none"


def _cut(blocks: Iterable[str], find_cut: FindCut) -> Iterator[tuple[str, bool]]:
    """(text, whether it is the last) of pieces of `PIECE` characters or, if it cannot be cut there, a little more."""
    pending, searched = "", PIECE
    for block in blocks:
        pending += block
        while len(pending) > PIECE and (place := find_cut(pending, max(searched, PIECE))) is not None:
            yield pending[:place], False
            pending, searched = pending[place:], PIECE
        searched = len(pending)
        if len(pending) > LIMIT:
            raise DataError(
                f"a text of more than {LIMIT:,} characters, without a place where this tokenizer allows to cut it"
            )
    yield pending, True


def _mark_last(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(text, whether it is the last) of each part."""
    *others, last = parts
    return iter([*((part, False) for part in others), (last, True)])


def _is_json_lines(name: str, head: bytes) -> bool:
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not head.startswith(b"{"):
        return _JSON_LINES.fullmatch(name) is not None and not not_text(head)
    if _JSON_LINES.fullmatch(name):
        return True
    line, end, _ = head.partition(b"\n")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return not end and re.match(rb'\{\s*"', line) is not None  # a first record longer than what was looked at


@contextlib.contextmanager
def _arrow(path: str | Path) -> Iterator[None]:
    """Raises what pyarrow says about a damaged file as a DataError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged: {first_line(error)}") from None
