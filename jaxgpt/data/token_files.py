"""Opens token files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgpt.checks import first_line, short_repr
from jaxgpt.config import GPTConfig
from jaxgpt.data.tokens import FORMAT, Ids, Tokens, sha256
from jaxgpt.errors import DataError
from jaxgpt.files import decode_text, local


def open_tokens(path: str | Path, config: GPTConfig) -> Tokens:
    """Opens a token file (memory-mapped), or encodes a UTF-8 text file with the config's tokenizer.

    Raises:
        DataError: if the file cannot be read, is damaged, was made by another tokenizer, or holds ids outside
            the model's vocabulary.
    """
    path = local(path)
    if os.path.exists(path) and not path.is_file():  # it is read twice, and opening a pipe could block indefinitely
        raise DataError(f"{path}: is not a file (`jaxgpt tokenize` reads pipes)")
    start = _read_bytes(path, 9)
    # A safetensors file starts with the header's length (8 bytes, so its last bytes are zeros) and a brace.
    tokens = _open_token_file(path) if start[6:] == b"\0\0{" else read_text(path, config.tokenizer)
    check_tokens(tokens, config, str(path))
    return tokens


def check_tokens(tokens: Tokens, config: GPTConfig, source: str) -> None:
    """Raises DataError, naming `source`, unless a model can read these tokens."""
    if tokens.tokenizer != config.tokenizer:
        raise DataError(
            f"{source}: made by tokenizer {short_repr(tokens.tokenizer)}, but the model has {config.tokenizer!r}: "
            "tokenize the text again with the model's"
        )
    highest = int(tokens.ids_N.max(initial=0))
    if highest >= config.vocab_size:
        where = int(np.argmax(tokens.ids_N >= config.vocab_size))
        raise DataError(f"{source}: id {tokens.ids_N[where]} at {where} is not below vocab_size={config.vocab_size}")


def read_text(path: str | Path, tokenizer: str | Path) -> Tokens:
    """Encodes a text file.

    Raises:
        DataError: if it cannot be read or is not UTF-8 text; says what it looks like.
    """
    data = _read_bytes(local(path))
    try:
        text = decode_text(data)
    except ValueError as error:
        raise DataError(f"{path}: {error}; expected UTF-8 text, or a token file from `jaxgpt tokenize`") from None
    return Tokens.from_text(text, tokenizer)


def _read_bytes(path: Path, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None


def _open_token_file(path: Path) -> Tokens:
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
    dtypes = {"U16": np.uint16, "U32": np.uint32}
    if header["dtype"] not in dtypes or [str(size) for size in header["shape"]] != [metadata["count"]]:
        claim = f"{header['dtype']}{short_repr(header['shape'])} is not {metadata['count'][:20]} ids"
        raise DataError(f"{path}: damaged: {claim}")
    if not re.fullmatch(r"[0-9]{1,9}", metadata["vocab_size"]):
        raise DataError(f"{path}: damaged: vocab_size {short_repr(metadata['vocab_size'])} is not a number")
    if metadata["count"] == "0":
        raise DataError(f"{path}: holds no tokens")
    ids_N: Ids = np.memmap(
        path, dtypes[header["dtype"]], "r", offset=8 + length + header["data_offsets"][0], shape=tuple(header["shape"])
    )
    if sha256(ids_N) != metadata["sha256"]:
        raise DataError(f"{path}: damaged: the ids do not have the sha256 that its header states")
    return Tokens(ids_N, metadata["tokenizer"], int(metadata["vocab_size"]), metadata["sha256"])
