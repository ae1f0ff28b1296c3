"""Opens the msgpack files of Flax (`flax.serialization.to_bytes`): nested maps whose leaves are arrays.

An array is an extension of type 1 that holds a shape, the name of a dtype, and bytes. One of more than 1 GiB is a map
of consecutive chunks instead. Flax's own reader holds the whole file and all arrays in memory, and allocates before it
checks; this module walks over the maps, notes where each array's bytes are, and leaves them in the file.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp

from jaxgpt.checks import first_line, short_repr
from jaxgpt.errors import CheckpointError
from jaxgpt.weights.tensors import HEADER_LIMIT, TYPES, Tensor, beginning, read_pieces

CHUNKED = "__msgpack_chunked_array__"
_NDARRAY = 1
_DEEPEST = 32

# The first byte of an item says its kind and, in its low bits or in the bytes that follow, its length or value.
# Kinds that Flax writes for a tree of arrays, in ranges of that byte: (first, last, kind).
_SHORT = ((0x00, 0x7F, "integer"), (0x80, 0x8F, "map"), (0x90, 0x9F, "array"), (0xA0, 0xBF, "text"))
# The same by that byte: (kind, number of bytes that hold the length or value).
_LONG = {
    0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4),
    0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4),
    0xCC: ("integer", 1), 0xCD: ("integer", 2), 0xCE: ("integer", 4), 0xCF: ("integer", 8),
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class _Array(NamedTuple):
    """Where an array is in the file: its bytes are `pieces`, each (offset, size)."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[int, int], ...]


def open_msgpack(path: Path) -> dict[str, Tensor]:
    """Returns the arrays of a Flax msgpack file by their keys, joined by "/". Reads only what is not an array.

    Raises:
        CheckpointError: if the file is missing, truncated or malformed, or holds anything but maps of arrays.
    """
    beginning(path)
    tensors: dict[str, Tensor] = {}
    try:
        with path.open("rb") as file:
            walk = _Walk(file)
            tree = walk.item()
            if walk.left():
                raise ValueError(f"{walk.left():,} bytes follow its end")
        for name, array in _arrays(tree, ""):
            if name in tensors:
                raise ValueError(f"it has two arrays {short_repr(name)}")
            read = functools.partial(read_pieces, path, array.pieces, array.dtype, array.shape)
            tensors[name] = Tensor(array.shape, array.dtype, read)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            path,
            f"not a readable msgpack file of Flax: {first_line(error)} (if it was copied or downloaded, do that again)",
        ) from None
    return tensors


def _arrays(tree: Any, name: str) -> Iterator[tuple[str, _Array]]:
    """Yields the arrays in a tree of maps with their names."""
    if isinstance(tree, dict) and CHUNKED in tree:
        yield name, _joined(tree, name)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _arrays(value, f"{name}/{key}" if name else key)
    elif isinstance(tree, _Array):
        yield name, tree
    else:
        raise ValueError(f"expected an array at {short_repr(name)}, not {short_repr(tree)}")


def _joined(chunked: dict[str, Any], name: str) -> _Array:
    """The array whose chunks, flattened, are in a map."""

    def values(key: str, kind: type) -> list[Any]:
        given = chunked.get(key)
        listed = [given.get(str(i)) for i in range(len(given))] if isinstance(given, dict) else [None]
        if not all(type(value) is kind for value in listed):
            raise ValueError(f"the chunked array {short_repr(name)} has no proper {key!r}")
        return listed

    shape, chunks = values("shape", int), values("chunks", _Array)
    dtypes = {chunk.dtype for chunk in chunks}
    if len(dtypes) != 1:
        raise ValueError(f"the chunked array {short_repr(name)} has chunks of {len(dtypes)} types")
    return _checked(_Array(tuple(shape), dtypes.pop(), tuple(piece for chunk in chunks for piece in chunk.pieces)))


def _checked(array: _Array) -> _Array:
    """The same array; raises ValueError if its bytes are not as many as its shape needs."""
    size = sum(size for _, size in array.pieces)
    if array.dtype in TYPES and size != math.prod(array.shape) * jnp.dtype(array.dtype).itemsize:
        raise ValueError(f"an array {short_repr(list(array.shape))} of {array.dtype} has {size:,} bytes")
    return array


class _Walk:
    """Reads a file item by item, except the bytes of arrays. Every method raises ValueError for what it cannot read."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.taken = 0

    def left(self) -> int:
        """How many bytes are left."""
        return self.size - self.file.tell()

    def take(self, count: int) -> bytes:
        """The next bytes. All that are taken from one file are limited, as its map of names is held in memory."""
        self.taken += count
        if self.taken > HEADER_LIMIT:
            raise ValueError(f"it has more than {HEADER_LIMIT:,} bytes beside its arrays, as no model's has")
        if count > self.left():
            raise ValueError("it ends in the middle of an item")
        return self.file.read(count)

    def head(self) -> tuple[str, int]:
        """The next item's kind, and its length or, of an integer, its value."""
        code = self.take(1)[0]
        for first, last, kind in _SHORT:
            if first <= code <= last:
                return kind, code - first
        if code in _FIXED_EXTENSIONS:
            return "extension", _FIXED_EXTENSIONS[code]
        if code in (0xC2, 0xC3):
            return "boolean", code - 0xC2
        if code not in _LONG:
            raise ValueError(f"expected a map or an array, not an item of msgpack's type 0x{code:02x}")
        kind, width = _LONG[code]
        return kind, int.from_bytes(self.take(width), "big")

    def expect(self, kind: str) -> int:
        """The length (or value) of the next item, which must be of this kind."""
        found, count = self.head()
        if found != kind:
            raise ValueError(f"expected {kind} where it has {found}")
        return count

    def text(self) -> str:
        """The next item, which must be text."""
        return self.take(self.expect("text")).decode()

    def item(self, depth: int = 0) -> Any:
        """The next item: a dict, an `_Array`, an integer or a boolean."""
        kind, count = self.head()
        if kind == "extension":
            return self.array(count)
        if kind in ("integer", "boolean"):
            return count if kind == "integer" else bool(count)
        if kind != "map":
            raise ValueError(f"expected a map or an array, not {kind}")
        if depth == _DEEPEST:
            raise ValueError(f"its maps are nested more than {_DEEPEST} deep")
        result: dict[str, Any] = {}
        for _ in range(count):
            key = self.text()
            if key in result:
                raise ValueError(f"it has the key {short_repr(key)} twice")
            result[key] = self.item(depth + 1)
        return result

    def array(self, count: int) -> _Array:
        """An extension of `count` bytes, which must be an array. Its own bytes are skipped."""
        code = int.from_bytes(self.take(1), "big", signed=True)
        if code != _NDARRAY:
            raise ValueError(f"it has an extension of type {code}, which is not an array")
        if count > self.left():
            raise ValueError(f"it claims an array of {count:,} bytes, and has {self.left():,} left")
        end = self.file.tell() + count
        if self.expect("array") != 3:
            raise ValueError("an array must consist of a shape, a dtype and bytes")
        shape = tuple(self.expect("integer") for _ in range(self.expect("array")))
        name, size = self.text(), self.expect("bytes")
        dtype = name if name in TYPES else short_repr(name).strip("'")
        start = self.file.tell()
        if start + size != end:
            raise ValueError(f"an array of {count:,} bytes claims {size:,} for its values")
        self.file.seek(end)
        return _checked(_Array(shape, dtype, ((start, size),)))
