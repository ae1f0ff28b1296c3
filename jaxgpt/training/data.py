"""Token files, and batches that are a pure function of (seed, step, shard): there is no iterator to save or lose."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxgpt.checks import as_ids, brief, check_ids, first_line, short_repr
from jaxgpt.config import GPTConfig
from jaxgpt.errors import DataError
from jaxgpt.files import decode_text, local, replacing_file
from jaxgpt.tokenizer import get_tokenizer
from jaxgpt.training.config import TrainConfig

Ids = NDArray[np.integer]

_FORMAT = "jaxgpt-tokens"


@brief
@dataclasses.dataclass(frozen=True)
class Tokens:
    """A text as token ids.

    Attributes:
        ids_N: the ids, uint16 or uint32; memory-mapped if they come from a token file.
        tokenizer: name of the tokenizer that made them.
        vocab_size: ids are below this.
        sha256: of the ids as little-endian uint32, so that a text and a token file with the same ids agree.
    """

    ids_N: Ids
    tokenizer: str
    vocab_size: int
    sha256: str

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
        ids_N: Ids = check_ids(as_ids(ids, "ids"), "ids", vocab_size).astype(
            np.uint16 if vocab_size <= 2**16 else np.uint32
        )
        return cls(ids_N, made_by.name, vocab_size, _hash(ids_N))

    def save(self, path: str | Path) -> None:
        """Writes a token file: safetensors with one tensor, "ids", and the other attributes as metadata.

        Raises:
            DataError: if it cannot be written.
        """
        metadata = {
            "format": _FORMAT,
            "tokenizer": self.tokenizer,
            "vocab_size": str(self.vocab_size),
            "count": str(len(self.ids_N)),
            "sha256": self.sha256,
        }
        try:
            with replacing_file(local(path)) as partial:
                save_file({"ids": np.ascontiguousarray(self.ids_N)}, partial, metadata)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: cannot be written: {error}") from None

    def split(self, val_fraction: float) -> tuple[Ids, Ids]:
        """(train, validation): the validation split is the last `val_fraction` of the tokens."""
        boundary = int(len(self.ids_N) * (1 - val_fraction))
        return self.ids_N[:boundary], self.ids_N[boundary:]


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
    if metadata.get("format") != _FORMAT or names != ["ids"] or not facts <= set(metadata):
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
    if _hash(ids_N) != metadata["sha256"]:
        raise DataError(f"{path}: damaged: the ids do not have the sha256 that its header states")
    return Tokens(ids_N, metadata["tokenizer"], int(metadata["vocab_size"]), metadata["sha256"])


def _hash(ids_N: Ids) -> str:
    digest = hashlib.sha256()
    for i in range(0, len(ids_N), 2**20):
        digest.update(ids_N[i : i + 2**20].astype("<u4").tobytes())
    return digest.hexdigest()


def sequence_starts(n_tokens: int, seq_len: int, stride: int) -> NDArray[np.int64]:
    """Where sliding sequences start, as in the book: every `stride`-th token with `seq_len` + 1 tokens left."""
    return np.arange(0, n_tokens - seq_len, stride, dtype=np.int64)


def batch(ids_N: Ids, config: TrainConfig, step: int, rows: slice = slice(None)) -> NDArray[np.int32]:
    """The sequences of one step: int32 [`batch_size`, T + 1]; inputs are [:, :-1], labels [:, 1:].

    A pure function of its arguments. A process that needs only some rows reads only those, and gets the same ones
    whichever process reads the others.

    Args:
        ids_N: the training tokens.
        config: seed, batch size, length and choice of the sequences.
        step: counts optimizer steps from 0.
        rows: which sequences of the batch.
    """
    starts = _starts(len(ids_N), config, step)[rows]
    return ids_N[starts[:, None] + np.arange(config.T + 1)].astype(np.int32)


def _starts(n_tokens: int, config: TrainConfig, step: int) -> NDArray[np.int64]:
    if config.sequences == "random":
        generator = np.random.Generator(np.random.Philox(key=[config.seed, step]))
        return generator.integers(0, n_tokens - config.T, config.batch_size)
    starts = sequence_starts(n_tokens, config.T, config.stride or config.T)
    # Sequences that do not fill a batch are left out, as with the book's drop_last.
    epoch, index = divmod(step, len(starts) // config.batch_size)
    return starts[_order(len(starts), config.seed, epoch)[index * config.batch_size :][: config.batch_size]]


@functools.lru_cache(maxsize=2)  # an epoch has many steps
def _order(n_sequences: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_sequences)


def check_enough(n_tokens: int, config: TrainConfig, split: str) -> None:
    """Raises DataError if the split cannot fill one batch (training) or one sequence (validation)."""
    if n_tokens <= config.T:
        raise DataError(f"the {split} split has {n_tokens} tokens; sequences of {config.T} need one more than that")
    if split == "training" and config.sequences == "sliding":
        sequences = len(sequence_starts(n_tokens, config.T, config.stride or config.T))
        if sequences < config.batch_size:
            raise DataError(
                f"the {split} split has {sequences} sliding sequences, too few for batch_size={config.batch_size}"
            )
