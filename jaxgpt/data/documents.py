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
import functools
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxgpt.checks import first_line, short_repr
from jaxgpt.data.contents import LIMIT, TEXT_KEY, BadRecordError, Content, UnderKey
from jaxgpt.errors import DataError, require
from jaxgpt.files import local, not_text

# Characters after which a document is cut.
PIECE = 2**19

_JSON_LINES = re.compile(r".*\.(jsonl|ndjson)(\.\w+)?", re.IGNORECASE)
_JSON = re.compile(r".*\.json(\.\w+)?", re.IGNORECASE)
_JSON_ARRAY = re.compile(rb'\s*\[\s*\{\s*"')
# Bytes that a JSON array may have, because all of it is read at once.
_ARRAY_LIMIT = 2**30
_BUFFER, _BLOCK = 2**16, 2**20
_EXPECTED = "expected UTF-8 text, or a token file from `jaxgpt tokenize`"

# From a text and a place in it, the first place from there on where the text may be cut, if there is one: the parts
# then have the ids of the whole. See `Tokenizer.find_cut`.
FindCut = Callable[[str, int], int | None]


class Piece(NamedTuple):
    """A document, or a part of one.

    Attributes:
        source: the file that it is from.
        document: the number of the document in the file, from 0: of a record, that of its line or row.
        part: the number of this part of it, from 0.
        text: the text of the part.
        last: whether it is the last part.
        read: how many bytes of the file have been read.
        error: why a record is left out; it has no text then.
    """

    source: Documents
    document: int
    part: int
    text: str
    last: bool
    read: int
    error: str = ""

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return self.source.where(self.document)


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
        with _readable(path):
            documents = _recognise(path, content or UnderKey(text_key), stack)
        yield documents


def _recognise(path: str | Path, content: Content, stack: contextlib.ExitStack) -> Documents:
    raw: Any = stack.enter_context(local(path).open("rb", buffering=_BUFFER))
    if raw.peek(5).startswith(b"PAR1\x15"):
        return _Table(path, raw, content)
    file = _unpacked(path, raw, stack)
    head = file.peek(_BUFFER)
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
    return _Text(path, raw, file)


class Documents:
    """The documents of an open file.

    Attributes:
        path: the file.
        records: whether it holds records, and is not one text.
    """

    records = True

    def __init__(self, path: str | Path, raw: BinaryIO, whole: bool = False):
        self.path, self._raw, self._whole = path, raw, whole

    def keys(self) -> list[str]:
        """The keys of the first good record, or the columns of the table; none of a plain text. To be asked first."""
        return []

    def pieces(self, find_cut: FindCut, *, skip_bad: bool = False, start: tuple[int, int] = (0, 0)) -> Iterator[Piece]:
        """Yields the documents, cut where that does not change their ids.

        Args:
            find_cut: of the tokenizer, which says where that is.
            skip_bad: whether to leave out records without a text instead of raising.
            start: the document and the part of it to start with.

        Raises:
            DataError: for a record without a text, with its line or row; if the file is damaged, or has more than
                `LIMIT` bytes without a place to cut.
        """
        with _readable(self.path):
            for number, document in self._documents(start[0]):
                try:
                    parts = _mark_last(document()) if self._whole else _cut(document(), find_cut)
                    for part, (text, last) in enumerate(parts):
                        if (number, part) >= start:
                            yield Piece(self, number, part, text, last, self._read())
                except BadRecordError as error:
                    reason = f"{self.where(number)}: {error}"
                    if not skip_bad:
                        raise DataError(f"{reason} (--skip-bad leaves such records out)") from None
                    yield Piece(self, number, 0, "", True, self._read(), reason)
                except DataError as error:
                    raise DataError(f"{self.where(number)}: {error}") from None

    def where(self, document: int) -> str:
        """The place of a document, for messages."""
        return f"{self.path}, line {document + 1}"

    def _documents(self, start: int) -> Iterator[tuple[int, Callable[[], Iterable[str]]]]:
        """From number `start` on, the number of each document, and what gives its text, in blocks."""
        raise NotImplementedError

    def _read(self) -> int:
        return self._raw.tell() if self._raw.seekable() else 0


class _Text(Documents):
    records = False

    def __init__(self, path: str | Path, raw: BinaryIO, file: BinaryIO):
        super().__init__(path, raw)
        self._file = file

    def where(self, document: int) -> str:
        return str(self.path)

    def _documents(self, start: int) -> Iterator[tuple[int, Callable[[], Iterable[str]]]]:
        if start == 0:
            yield 0, self._blocks

    def _blocks(self) -> Iterator[str]:
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


class _Lines(Documents):
    def __init__(self, path: str | Path, raw: BinaryIO, file: BinaryIO, content: Content):
        super().__init__(path, raw, content.whole)
        self._file, self._content = file, content

    def keys(self) -> list[str]:
        for _, line, whole in self._lines():
            with contextlib.suppress(BadRecordError):
                return list(_object(self._parsed(line, whole)))
        return []

    def _documents(self, start: int) -> Iterator[tuple[int, Callable[[], Iterable[str]]]]:
        for number, line, whole in self._lines():
            if number >= start:
                yield number, lambda line=line, whole=whole: self._parts(self._parsed(line, whole))  # type: ignore[misc]

    def _lines(self) -> Iterator[tuple[int, bytes, bool]]:
        """Number and text of each line that is not blank, and whether that is all of it."""
        number = 0
        while line := self._file.readline(LIMIT):
            whole, end = len(line) < LIMIT or line.endswith(b"\n"), line
            while not whole and end and not end.endswith(b"\n"):
                end = self._file.readline(_BLOCK)
            if not line.isspace():
                yield number, line, whole
            number += 1

    def _parsed(self, line: bytes, whole: bool) -> Any:
        if not whole:
            raise BadRecordError(f"longer than {LIMIT:,} bytes, the most that a record may have")
        try:
            return json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"not JSON: {first_line(error)}") from None

    def _parts(self, parsed: Any) -> Iterable[str]:
        record = _object(parsed)
        if (key := self._content.missing(record)) is not None:
            raise BadRecordError(f"no key {key!r} ({self._content.hint}; there are {_known(record)})")
        return self._content.parts(record)


class _Array(_Lines):
    def where(self, document: int) -> str:
        return f"{self.path}, record {document + 1}"

    def keys(self) -> list[str]:
        return next((list(element) for element in self._elements if isinstance(element, dict)), [])

    def _documents(self, start: int) -> Iterator[tuple[int, Callable[[], Iterable[str]]]]:
        for number, element in enumerate(self._elements[start:], start):
            yield number, lambda element=element: self._parts(element)  # type: ignore[misc]

    @functools.cached_property
    def _elements(self) -> list[Any]:
        data = self._file.read(_ARRAY_LIMIT + 1)
        if len(data) > _ARRAY_LIMIT:
            raise DataError(
                f"{self.path}: a JSON array of more than {_ARRAY_LIMIT:,} bytes, all of which would be read at once: "
                "make JSON lines of it, with one record per line (jq -c '.[]')"
            )
        try:
            return json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: not a JSON array: {first_line(error)}") from None


def _object(parsed: Any) -> dict[str, Any]:
    if not isinstance(parsed, dict):
        raise BadRecordError(f"expected a JSON object, not {short_repr(parsed)}")
    return parsed


class _Table(Documents):
    def __init__(self, path: str | Path, raw: BinaryIO, content: Content):
        super().__init__(path, raw, content.whole)
        if not raw.seekable():
            raise DataError(f"{path}: Parquet cannot be read from a pipe: give the file")
        self._content = content
        parquet = require("pyarrow.parquet", "data", f"{path}, a Parquet file,")
        with _arrow(path):
            self._file = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_BLOCK)
            self._names = self._file.schema_arrow.names
        if (key := content.missing(self._names)) is not None:
            raise DataError(f"{path}: no column {key!r} ({content.hint}; there are {_known(self._names)})")

    def keys(self) -> list[str]:
        return self._names

    def where(self, document: int) -> str:
        return f"{self.path}, row {document + 1}"

    def _documents(self, start: int) -> Iterator[tuple[int, Callable[[], Iterable[str]]]]:
        columns = [name for name in self._names if name in self._content.keys]
        with _arrow(self.path):
            number, groups = 0, list(range(self._file.num_row_groups))
            while groups and number + (rows := self._file.metadata.row_group(groups[0]).num_rows) <= start:
                number += rows
                groups.pop(0)
            for batch in self._file.iter_batches(64, groups, columns, use_threads=False):
                for values in zip(*batch.columns, strict=True):
                    if number >= start:
                        row = dict(zip(batch.schema.names, values, strict=True))
                        yield number, lambda row=row: self._parts(row)  # type: ignore[misc]
                    number += 1

    def _parts(self, row: dict[str, Any]) -> Iterable[str]:
        record = {}
        for name, value in row.items():
            try:
                record[name] = value.as_py()
            except UnicodeDecodeError as error:
                raise BadRecordError(f"not UTF-8 text (byte {error.start} of {name!r})") from None
        return self._content.parts(record)


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


def _unpacked(path: str | Path, raw: Any, stack: contextlib.ExitStack) -> Any:
    """The file, or what it unpacks to if it is compressed."""
    head = raw.peek(4)
    if head.startswith(b"\x1f\x8b"):
        return stack.enter_context(gzip.GzipFile(fileobj=raw))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        if sys.version_info >= (3, 14):
            from compression import zstd

            return stack.enter_context(zstd.ZstdFile(raw))
        zstandard = require("zstandard", "data", f"{path}, which is compressed with zstd,")
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
        return io.BufferedReader(stack.enter_context(reader), _BUFFER)
    return raw


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Raises what goes wrong while a file is read or unpacked as a DataError."""
    try:
        yield
    except (DataError, ImportError):
        raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged: gzip cannot unpack it: {first_line(error)}") from None
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise DataError(f"{path}: damaged: zstd cannot unpack it: {first_line(error)}") from None


@contextlib.contextmanager
def _arrow(path: str | Path) -> Iterator[None]:
    """Raises what pyarrow says about a damaged file as a DataError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged: {first_line(error)}") from None
