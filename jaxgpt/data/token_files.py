"""Token files: this project's and those of other programs, recognised by content.

| what | recognised by | tokenizer |
|---|---|---|
| this project's (`Tokens.save`) | a safetensors header | in the header |
| llm.c's and modded-nanogpt's shards, uint16 | the number 20240520 | gpt2 |
| llm.c's shards, uint32 | the number 20240801 | must be given |
| Megatron's .idx, with its .bin beside it | the word MMIDIDX | must be given |
| nanoGPT's .bin, uint16 | its name, and that it is not text | must be given |

Nothing is read but headers, and the size of every file must be exactly what its header says.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgpt.checks import first_line, short_repr
from jaxgpt.data.tokens import FORMAT, FileIds, Shard, Tokens
from jaxgpt.errors import DataError
from jaxgpt.tokenizer import get_tokenizer

# The first numbers of llm.c's headers: how the file begins, bytes per id, and the tokenizer that the format implies.
_LLMC = {(20240520, 1): ("<u2", "gpt2"), (20240801, 7): ("<u4", None)}
_LLMC_HEADER = 256 * 4
# Megatron's numbers for the types of ids.
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MEGATRON = b"MMIDIDX\0\0"


def open_token_file(path: Path, tokenizer: str | Path | None = None) -> Tokens | None:
    """Opens a file of token ids without reading them; None if it has none of the headers.

    Args:
        path: the file.
        tokenizer: what made the ids, for formats that do not say.

    Raises:
        DataError: if it cannot be read, is damaged, is a format that does not say what made its ids while `tokenizer`
            is not given either, or says something else.
    """
    start = read_bytes(path, 16)
    # A safetensors file starts with the header's length (8 bytes, so its last bytes are zeros) and a brace.
    if start[6:9] == b"\0\0{":
        return _open_ours(path, tokenizer)
    if len(start) >= 8 and (layout := _LLMC.get(struct.unpack("<2i", start[:8]))):
        return _open_llmc(path, *layout, tokenizer)
    if start.startswith(_MEGATRON):
        return _open_megatron(path, tokenizer)
    return None


def open_bare(path: Path, tokenizer: str | Path) -> Tokens:
    """Opens uint16 ids without a header, as nanoGPT writes them.

    Raises:
        DataError: if the file is empty, of an odd size, or begins as a file with a header or with wider ids does.
    """
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise DataError(f"{path}: {size:,} bytes are not uint16 ids")
    start = read_bytes(path, _LLMC_HEADER)
    if (zeros := start.count(0)) > 0.9 * _LLMC_HEADER:
        raise DataError(f"{path}: not bare ids: {zeros:,} of the first {_LLMC_HEADER:,} bytes are 0, as in a header")
    if len(start) >= 64 and not any(start[2::4] + start[3::4]):
        raise DataError(f"{path}: not uint16 ids: every second one would be 0, so these are 32-bit or 64-bit numbers")
    return _tokens(path, FileIds(path, "<u2", 0, size // 2), tokenizer)


def read_bytes(path: Path, size: int = -1) -> bytes:
    """The first bytes of a file, or all.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(size)
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None


def _tokens(path: Path, ids_N: FileIds, tokenizer: str | Path | None, what: str = "this format") -> Tokens:
    if not len(ids_N):
        raise DataError(f"{path}: holds no tokens")
    if tokenizer is None:
        raise DataError(f"{path}: {what} does not say which tokenizer made its ids: give it (--tokenizer NAME_OR_PATH)")
    made_by = get_tokenizer(tokenizer)
    return Tokens((Shard(ids_N, None, path),), made_by.name, made_by.vocab_size or 2**32)


def _open_ours(path: Path, tokenizer: str | Path | None) -> Tokens:
    try:
        with safe_open(path, framework="numpy") as file:  # checks the header against the file's size
            metadata = file.metadata() or {}
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged or not a token file: {first_line(error)}") from None
    facts = {"format", "tokenizer", "vocab_size", "count", "sha256"}
    if metadata.get("format") != FORMAT or names != ["ids"] or not facts <= set(metadata):
        raise DataError(f"{path}: a safetensors file, but not a token file: make one with `jaxgpt tokenize`")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))["ids"]
    types = {"U16": "<u2", "U32": "<u4"}
    if header["dtype"] not in types or [str(size) for size in header["shape"]] != [metadata["count"]]:
        claim = f"{header['dtype']}{short_repr(header['shape'])} is not {metadata['count'][:20]} ids"
        raise DataError(f"{path}: damaged: {claim}")
    if not re.fullmatch(r"[0-9]{1,9}", metadata["vocab_size"]):
        raise DataError(f"{path}: damaged: vocab_size {short_repr(metadata['vocab_size'])} is not a number")
    if metadata["count"] == "0":
        raise DataError(f"{path}: holds no tokens")
    name = metadata["tokenizer"]
    if tokenizer is not None and get_tokenizer(tokenizer).name != name:
        raise DataError(f"{path}: made by tokenizer {short_repr(name)}, not by {get_tokenizer(tokenizer).name!r}")
    ids_N = FileIds(path, types[header["dtype"]], 8 + length + header["data_offsets"][0], header["shape"][0])
    return Tokens((Shard(ids_N, metadata["sha256"], path),), name, int(metadata["vocab_size"]))


def _open_llmc(path: Path, dtype: str, implied: str | None, tokenizer: str | Path | None) -> Tokens:
    start, size = read_bytes(path, _LLMC_HEADER), path.stat().st_size
    if len(start) < _LLMC_HEADER:
        raise DataError(f"{path}: damaged: a header of {_LLMC_HEADER:,} bytes is cut short")
    count = struct.unpack("<3i", start[:12])[2]
    expected = _LLMC_HEADER + count * np.dtype(dtype).itemsize
    if count < 0 or size != expected:
        raise DataError(f"{path}: damaged: its header says {count:,} tokens, {expected:,} bytes, and it has {size:,}")
    return _tokens(path, FileIds(path, dtype, _LLMC_HEADER, count), tokenizer or implied, "llm.c's uint32 format")


def _open_megatron(path: Path, tokenizer: str | Path | None) -> Tokens:
    """Opens a Megatron data set by its .idx: magic, version, type, numbers of sequences and documents, then per
    sequence its length (int32) and its place in the .bin in bytes (int64), then the documents (int64)."""
    data = path.with_suffix(".bin")
    if not data.is_file():
        raise DataError(f"{path}: Megatron's index, without its {data.name}: expected it beside the index")
    head = read_bytes(path, 34)
    if len(head) < 34:
        raise DataError(f"{path}: damaged: the header is cut short")
    version, kind, sequences, documents = struct.unpack("<QBQQ", head[9:])
    if version != 1 or kind not in _MEGATRON_TYPES:
        raise DataError(f"{path}: Megatron's index of version {version} with ids of type {kind} is not read")
    size, least = path.stat().st_size, 34 + 12 * sequences + 8 * documents
    # Newer versions add a byte per sequence for its kind.
    if size not in (least, least + sequences):
        raise DataError(
            f"{path}: damaged: {sequences:,} sequences and {documents:,} documents do not fit {size:,} bytes"
        )
    width = np.dtype(_MEGATRON_TYPES[kind]).itemsize
    columns = FileIds(path, "<i4", 34, sequences), FileIds(path, "<i8", 34 + 4 * sequences, sequences)
    total = 0
    for start in range(0, sequences, 2**20):
        part = slice(start, start + 2**20)
        lengths, places = (np.asarray(column[part], np.int64) for column in columns)
        if lengths.min() < 0 or (places != width * (total + np.cumsum(lengths) - lengths)).any():
            raise DataError(f"{path}: damaged: its sequences do not follow one another in {data.name}")
        total += int(lengths.sum())
    end = data.stat().st_size
    if total * width != end:
        raise DataError(f"{data}: damaged: the index says {total:,} ids of {width} bytes, and it has {end:,} bytes")
    return _tokens(data, FileIds(data, _MEGATRON_TYPES[kind], 0, total), tokenizer, "Megatron's format")
