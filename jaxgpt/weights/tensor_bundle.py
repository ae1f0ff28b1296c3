"""Opens TensorFlow's checkpoints, without TensorFlow: PREFIX.index, and PREFIX.data-00000-of-00001 or several of these.

The data files hold bare tensors. The index is a sorted table in LevelDB's format, from names to protocol buffers that
say where each tensor is (`BundleEntryProto` in TensorFlow's tensor_bundle.proto); the empty name has the header. A
table consists of blocks, each with a checksum, and ends with a footer that locates the block which lists the others.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt.checks import first_line, short_repr
from jaxgpt.errors import CheckpointError
from jaxgpt.weights.crc32c import crc32c, masked
from jaxgpt.weights.tensors import HEADER_LIMIT, TYPES, Tensor, beginning, read_pieces

_SLICES = "is not supported: save the model with variables that are not partitioned"
_FOOTER, _MAGIC = 48, (0xDB4775248B80FB57).to_bytes(8, "little")
_TRAILER = 5  # a block is followed by a byte for its compression, and a checksum of it and that byte
_MOST_AXES = 254  # TensorFlow's own limit
# TensorFlow's numbers of types, by NumPy's names.
_DTYPES = {
    1: "float32", 2: "float64", 14: "bfloat16", 19: "float16",
    3: "int32", 4: "uint8", 5: "int16", 6: "int8", 7: "string", 9: "int64", 10: "bool", 17: "uint16",
    22: "uint32", 23: "uint64",
}  # fmt: skip


class _Entry(NamedTuple):
    """Where a tensor is, and the masked CRC-32C of its bytes."""

    shape: tuple[int, ...]
    dtype: str
    shard: int
    offset: int
    size: int
    crc: int


def is_index(path: str) -> bool:
    """Whether there is a file at `path` that ends as the index of a checkpoint does."""
    if not os.path.isfile(path):  # opening a pipe could block forever
        return False
    try:
        with open(path, "rb") as file:
            file.seek(-len(_MAGIC), os.SEEK_END)
            return file.read() == _MAGIC
    except OSError:
        return False


def open_bundle(prefix: Path) -> dict[str, Tensor]:
    """Returns the tensors of the checkpoint whose files' names begin with `prefix`, by name. Reads only the index; a
    tensor's checksum is compared when it is read.

    Raises:
        CheckpointError: if a file is missing, or the index is malformed or places tensors where the data files end or
            where others are.
    """
    index = prefix.with_name(f"{prefix.name}.index")
    beginning(index)
    try:
        size = index.stat().st_size
        if size > HEADER_LIMIT:
            raise ValueError(f"it has {size:,} bytes, more than any model's")
        count, entries = _entries(index.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            index,
            f"not a readable index of a TensorFlow checkpoint: {first_line(error)} (if it was copied or downloaded, do "
            "that again)",
        ) from None
    tensors: dict[str, Tensor] = {}
    by_shard = sorted(entries.items(), key=lambda item: item[1][2:5])
    for shard, group in itertools.groupby(by_shard, key=lambda item: item[1].shard):
        path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{count:05d}")
        beginning(path)
        placed = dict(group)
        _check_places(index, path, placed)
        for name, entry in placed.items():
            tensors[name] = Tensor(entry.shape, entry.dtype, functools.partial(_read, path, name, entry))
    return tensors


def _check_places(index: Path, path: Path, entries: dict[str, _Entry]) -> None:
    """Raises CheckpointError unless the tensors, which come by their offsets, lie within the file and apart."""
    size, end, before = path.stat().st_size, 0, ""
    for name, entry in entries.items():
        if entry.offset + entry.size > size:
            raise CheckpointError(
                path,
                f"has {size:,} bytes, and {index.name} places {short_repr(name)} at {entry.offset:,} to "
                f"{entry.offset + entry.size:,}: copy or download both again",
            )
        if entry.size and entry.offset < end:
            raise CheckpointError(index, f"places {short_repr(before)} and {short_repr(name)} in the same bytes")
        end, before = max(end, entry.offset + entry.size), name


def _read(path: Path, name: str, entry: _Entry) -> np.ndarray:
    array = read_pieces(path, ((entry.offset, entry.size),), entry.dtype, entry.shape)
    if masked(crc32c(array.reshape(-1).view(np.uint8))) != entry.crc:
        raise CheckpointError(
            path, f"the tensor {short_repr(name)} is damaged: its checksum is another. Copy or download the file again"
        )
    return array


def _entries(table: bytes) -> tuple[int, dict[str, _Entry]]:
    """The number of data files, and the tensors in an index; raises ValueError for what cannot be read."""
    items = _Table(table).items()
    key, value = next(items, (b"-", b""))
    if key:
        raise ValueError("it has no header")
    header = _Message(value)
    version = _Message(header.content(3))
    if header.number(2):
        raise ValueError("it was written on a big-endian machine, which is not supported")
    if version.number(2) > 1:
        raise ValueError("a later TensorFlow wrote it in another way")
    entries = {}
    for key, value in items:
        if key.startswith(b"\0"):  # how the names of slices begin, before the tensors' own
            raise ValueError(f"it stores a tensor in slices, which {_SLICES}")
        name = key.decode()
        entries[name] = entry = _entry(name, _Message(value))
        if entry.shard >= header.number(1):
            raise ValueError(f"{short_repr(name)} is in data file {entry.shard}, of {header.number(1)}")
    return header.number(1), entries


def _entry(name: str, fields: _Message) -> _Entry:
    if fields.all(7, bytes):
        raise ValueError(f"{short_repr(name)} is stored in slices, which {_SLICES}")
    code, shape = fields.number(1), _Message(fields.content(2))
    sizes = tuple(_Message(axis).number(1) for axis in shape.all(2, bytes))
    dtype = _DTYPES.get(code, f"TensorFlow's type {code}")
    if code == 0 or shape.number(3) or len(sizes) > _MOST_AXES or any(size >= 2**63 for size in sizes):
        raise ValueError(f"{short_repr(name)} has no proper type or shape")
    entry = _Entry(sizes, dtype, fields.number(3), fields.number(4), fields.number(5), fields.number(6))
    if dtype in TYPES and entry.size != math.prod(sizes) * jnp.dtype(dtype).itemsize:
        raise ValueError(f"{short_repr(name)}, {short_repr(list(sizes))} of {dtype}, has {entry.size:,} bytes")
    return entry


# The table, and protocol buffers. All of this raises ValueError for what it cannot read.


class _Cursor:
    """Reads numbers and bytes one after another."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def left(self) -> int:
        """How many bytes are left."""
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.left():
            raise ValueError("it ends in the middle of an item")
        self.at += count
        return self.data[self.at - count : self.at]

    def fixed(self, width: int) -> int:
        """A number of that many bytes."""
        return int.from_bytes(self.take(width), "little")

    def varint(self) -> int:
        """A number of 64 bits in groups of 7, lowest first; the high bit of a byte says that another follows."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128 and value < 2**64:
                return value
        raise ValueError("it has a number of more than 64 bits")

    def text(self) -> bytes:
        """Bytes that follow their length."""
        return self.take(self.varint())


class _Message:
    """The fields of a protocol buffer, by number."""

    def __init__(self, data: bytes):
        self.fields: dict[int, list[int | bytes]] = {}
        cursor = _Cursor(data)
        readers: dict[int, Callable[[], int | bytes]] = {
            0: cursor.varint,
            1: lambda: cursor.fixed(8),
            2: cursor.text,
            5: lambda: cursor.fixed(4),
        }
        while cursor.left():
            number, wire = divmod(cursor.varint(), 8)
            if wire not in readers:
                raise ValueError(f"it has a field of the wire type {wire}")
            self.fields.setdefault(number, []).append(readers[wire]())

    def all(self, number: int, kind: type) -> list[Any]:
        """The values of a field, which must be of this type."""
        values = self.fields.get(number, [])
        if not all(isinstance(value, kind) for value in values):
            raise ValueError(f"the field {number} of an entry is of the wrong type")
        return values

    def number(self, number: int) -> int:
        """The value of a field that is a number, 0 by default."""
        return [0, *self.all(number, int)][-1]

    def content(self, number: int) -> bytes:
        """The value of a field that is bytes, empty by default."""
        return [b"", *self.all(number, bytes)][-1]


class _Table:
    """A sorted table of keys and values."""

    def __init__(self, data: bytes):
        if len(data) < _FOOTER or not data.endswith(_MAGIC):
            raise ValueError("it does not end as an index does")
        self.data, self.taken = data, 0

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yields the keys, which increase, and the values."""
        footer = _Cursor(self.data[-_FOOTER:])
        footer.varint(), footer.varint()  # the place of a block that is always empty
        before, end = None, 0
        for _, handle in self.block(footer.varint(), footer.varint()):
            cursor = _Cursor(handle)
            offset, size = cursor.varint(), cursor.varint()
            if offset < end:  # or one block could be read again and again
                raise ValueError("its blocks overlap")
            end = offset + size + _TRAILER
            for key, value in self.block(offset, size):
                if before is not None and key <= before:
                    names = [short_repr(name.decode(errors="replace")) for name in (key, before)]
                    raise ValueError(f"its names are out of order: {names[0]} follows {names[1]}")
                yield key, value
                before = key

    def block(self, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
        """Yields the keys and values of a block. A key says how many bytes it has in common with the one before."""
        end = offset + size
        if end + _TRAILER > len(self.data) - _FOOTER:
            raise ValueError(f"it has {len(self.data):,} bytes, and a block at {offset:,} to {end:,}")
        compression, crc = self.data[end], int.from_bytes(self.data[end + 1 : end + _TRAILER], "little")
        if masked(crc32c(self.data[offset : end + 1])) != crc:
            raise ValueError(f"the checksum of its block at {offset:,} is another")
        if compression:
            kind = "Snappy" if compression == 1 else f"method {compression}"
            raise ValueError(f"it is compressed with {kind}, which is not supported: TensorFlow itself writes none")
        # At the end is a list of entries whose keys are whole, and its length. It only serves to search.
        starts = int.from_bytes(self.data[max(offset, end - 4) : end], "little")
        if 4 * starts + 4 > size:
            raise ValueError(f"its block at {offset:,} has {size:,} bytes, and claims {starts:,} points to search from")
        cursor, key = _Cursor(self.data[offset : end - 4 * starts - 4]), b""
        while cursor.left():
            shared, unshared, length = cursor.varint(), cursor.varint(), cursor.varint()
            if shared > len(key):
                raise ValueError("it has a name that begins with more of the former one than that has")
            self.taken += shared + unshared + 32  # a few bytes may stand for a long name, or be one of many entries
            if self.taken > HEADER_LIMIT:
                raise ValueError(f"its entries need more than {HEADER_LIMIT:,} bytes, as no model's do")
            key = key[:shared] + cursor.take(unshared)
            yield key, cursor.take(length)
