"""Opens tensor files without trusting them, and reads and writes them one tensor at a time.

The safetensors library validates a file; this module then reads the bytes straight into one array per tensor. The
library's readers would map the whole file into memory in addition to the arrays, and its NumPy reader lacks bfloat16.
"""

from __future__ import annotations

import functools
import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgpt.checks import first_line, short_repr
from jaxgpt.errors import CheckpointError, require
from jaxgpt.textfile import without_duplicates

# The dtypes that a parameter may have in a file: NumPy's name to safetensors' name.
FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TYPES = {**FLOATS, "int8": "I8"}

# Bytes. The deepest model that a config allows needs half of this. Parsed, a header takes about 20 times its size.
HEADER_LIMIT = 2**24

# How a file of torch.save begins in its format from before PyTorch 1.6: a number as a pickle, before other pickles.
_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class Tensor(NamedTuple):
    """A tensor that has not been read yet.

    Attributes:
        shape: its shape.
        dtype: NumPy's name for its type, or the file's name for a type that is not in `TYPES`.
        read: returns it as an array that shares no memory with the file.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def beginning(path: Path) -> bytes:
    """The first bytes of a file that should hold tensors, 32 at most.

    Raises:
        CheckpointError: if it is missing, not a file, or cannot be read, or is a pointer of Git LFS to the file.
    """
    if not path.is_file():  # opening a pipe could block forever
        raise CheckpointError(path, "is not a file" if path.exists() else "no such file")
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error}") from None
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(path, "a pointer of Git LFS instead of the file: run 'git lfs pull' in its repository")
    return start


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file by name; reads only its header.

    Raises:
        CheckpointError: if the file is missing, truncated or malformed.
    """
    beginning(path)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > HEADER_LIMIT:
                raise ValueError(f"a header of {size:,} bytes is longer than any model's")
            with safe_open(path, framework="numpy"):
                pass  # opening checks the header's length, and that offsets neither overlap, leave gaps nor overrun
            header = json.loads(file.read(size), object_pairs_hook=without_duplicates)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            path,
            f"not a readable safetensors file: {first_line(error)} (if it was copied or downloaded, do that again)",
        ) from None
    header.pop("__metadata__", None)
    names = {code: name for name, code in TYPES.items()}
    tensors = {}
    for name, entry in header.items():
        shape, dtype = tuple(entry["shape"]), names.get(entry["dtype"], entry["dtype"])
        begin, end = entry["data_offsets"]
        read = functools.partial(read_pieces, path, ((8 + size + begin, end - begin),), dtype, shape)
        tensors[name] = Tensor(shape, dtype, read)
    return tensors


def read_pieces(path: Path, pieces: Sequence[tuple[int, int]], dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an array whose bytes are those of `pieces`, each (offset, size), of a file.

    Raises:
        CheckpointError: if the file cannot be read, or has become shorter.
    """
    data = np.empty(sum(size for _, size in pieces), np.uint8)
    done = 0
    try:
        with path.open("rb") as file:
            for offset, size in pieces:
                file.seek(offset)
                done += file.readinto(data[done : done + size])
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error}") from None
    if done != data.size:
        raise CheckpointError(path, "has become shorter while it was being read")
    return data.view(jnp.dtype(dtype)).reshape(shape)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, holding one tensor at a time in memory."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + math.prod(tensor.shape) * jnp.dtype(tensor.dtype).itemsize
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format requires aligned data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8))


def load_torch(path: Path) -> Any:
    """Loads what `torch.save` wrote to `path`, with its tensors memory-mapped. Executes nothing from the file.

    A file in the format from before PyTorch 1.6 cannot be mapped: its tensors are read at once.

    Raises:
        CheckpointError: if torch refuses the file, as it does if the file holds anything but plain data.
        MissingExtraError: without PyTorch.
    """
    start = beginning(path)
    old = start.startswith(_BEFORE_1_6)
    if start.startswith(b"\x80") and not old:
        raise CheckpointError(path, "a bare pickle, which is never loaded: save it again with torch.save")
    if not (old or start.startswith(b"PK\x03\x04")):
        raise CheckpointError(path, f"not a file that torch.save writes: it begins with {start[:8]!r}")
    torch = require("torch", "torch", f"reading {path}")
    try:
        if old:
            with _Clipped(path) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        if not compressed:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch does not wrap what its parsers raise
        raise CheckpointError(
            path, f"torch.load(weights_only=True) refused it: {type(error).__name__}: {first_line(error)}"
        ) from None
    raise CheckpointError(path, "a compressed archive, which could unpack to any size: torch.save writes none")


class _Clipped(io.BufferedReader):
    """A file for torch's unpickler, which believes the lengths in it: no read asks for more than is left, as Python
    would allocate it. It hides its descriptor, or torch would also try its oldest format, a tar archive."""

    def __init__(self, path: Path):
        super().__init__(path.open("rb", buffering=0))
        self.size = path.stat().st_size

    def read(self, size: int | None = -1) -> bytes:
        left = self.size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))

    def fileno(self) -> int:
        raise io.UnsupportedOperation


def open_torch(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a state dict that `torch.save` wrote to `path`.

    Raises:
        CheckpointError, MissingExtraError: as `load_torch` and `tensors_of` do.
    """
    state = load_torch(path)
    if not isinstance(state, dict):
        raise CheckpointError(path, f"expected a state dict, not {type(state).__name__}")
    return tensors_of(path, state)


def tensors_of(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of a state dict that came from `open_safetensors` or `load_torch`.

    Raises:
        CheckpointError: if a value is not a plain dense tensor, or claims more elements than the file can hold.
    """
    if all(isinstance(value, Tensor) for value in state.values()):
        return dict(state)
    import torch

    def read(tensor: torch.Tensor) -> np.ndarray:
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        if tensor.dtype == torch.bfloat16:  # NumPy does not have it, so `tensor.numpy()` refuses it
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    limit = path.stat().st_size
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise CheckpointError(path, f"the state dict's entry {short_repr(name)} is not a dense tensor")
        if value.device.type != "cpu" or value.numel() * value.element_size() > limit:
            raise CheckpointError(
                path, f"the tensor {short_repr(name)} {short_repr(tuple(value.shape))} has no data in the file"
            )
        dtype = str(value.dtype).removeprefix("torch.")
        tensors[name] = Tensor(tuple(value.shape), dtype, functools.partial(read, value))
    return tensors


def without_prefix(path: Path, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the same tensors, with `prefix` removed from the names that have it.

    Raises:
        CheckpointError: if a name exists both with and without the prefix.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if short in result:
            raise CheckpointError(
                path, f"the tensor {short_repr(short)} appears twice, with and without the prefix {prefix!r}"
            )
        result[short] = tensor
    return result
