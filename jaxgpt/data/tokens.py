"""`Tokens`: a text as token ids, and the files that hold them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxgpt.checks import as_ids, brief, check_ids
from jaxgpt.errors import DataError
from jaxgpt.files import local, replacing_file
from jaxgpt.tokenizer import get_tokenizer

Ids = NDArray[np.integer]

FORMAT = "jaxgpt-tokens"


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
        return cls(ids_N, made_by.name, vocab_size, sha256(ids_N))

    def save(self, path: str | Path) -> None:
        """Writes a token file: safetensors with one tensor, "ids", and the other attributes as metadata.

        Raises:
            DataError: if it cannot be written.
        """
        metadata = {
            "format": FORMAT,
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


def sha256(ids_N: Ids) -> str:
    digest = hashlib.sha256()
    for i in range(0, len(ids_N), 2**20):
        digest.update(ids_N[i : i + 2**20].astype("<u4").tobytes())
    return digest.hexdigest()
