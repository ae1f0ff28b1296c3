"""Directories of token files with an index, as `jaxgpt tokenize` writes them.

`index.json` holds the tokenizer, the id that ends each document, and of each shard its name, tokens, documents and
sha256. It is written last: a directory without one is not complete.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.checks import short_repr
from jaxgpt.data.token_files import open_token_file
from jaxgpt.data.tokens import Tokens
from jaxgpt.errors import ConfigError, DataError
from jaxgpt.files import write_text
from jaxgpt.textfile import read_json

FORMAT = "jaxgpt-token-shards"
INDEX, PROGRESS = "index.json", "progress.json"

_SHARD = re.compile(r"shard-\d{6,9}\.tokens")
_NUMBER = 2**63


class ShardEntry(NamedTuple):
    """A shard in an index.

    Attributes:
        file: its name.
        tokens: how many ids it has.
        documents: how many documents end in it.
        sha256: of its ids, as its own header states it.
    """

    file: str
    tokens: int
    documents: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The index of a directory of shards.

    Attributes:
        tokenizer: the name of the tokenizer that made the ids.
        vocab_size: ids are below this.
        end_of_text: the id that follows each document; None if the tokenizer has none.
        shards: the shards, in order; only a long document may run across them.
    """

    tokenizer: str
    vocab_size: int
    end_of_text: int | None
    shards: tuple[ShardEntry, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    def write(self, directory: Path) -> None:
        """Writes the index, whole or not at all."""
        end_of_text = None if self.end_of_text is None else {"id": self.end_of_text, "place": "after"}
        content = {
            "format": FORMAT,
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "end_of_text": end_of_text,
            "shards": [shard._asdict() for shard in self.shards],
        }
        write_text(directory / INDEX, json.dumps(content, indent=1) + "\n")


def shard_name(number: int) -> str:
    """The name of a shard's file."""
    return f"shard-{number:06}.tokens"


def read_index(directory: Path) -> ShardIndex | None:
    """Reads a directory's index; None if it is not one that `jaxgpt tokenize` wrote.

    Raises:
        DataError: if the index is damaged, or the directory not complete.
    """
    path = directory / INDEX
    if not path.exists():
        if (directory / PROGRESS).exists():
            raise DataError(f"{directory}: not complete: the same `jaxgpt tokenize` command again continues it")
        return None
    try:
        content = read_json(path)
    except ConfigError as error:
        raise DataError(str(error)) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    end_of_text = content.get("end_of_text", {})
    if isinstance(end_of_text, dict):
        end_of_text = end_of_text.get("id", "")
    good = (
        isinstance(content.get("tokenizer"), str)
        and is_count(content.get("vocab_size"))
        and (end_of_text is None or is_count(end_of_text))
        and content.get("shards")
    )
    if not good:
        raise DataError(f"{path}: damaged: it does not hold what `jaxgpt tokenize` writes")
    shards = read_entries(content["shards"], path)
    return ShardIndex(content["tokenizer"], content["vocab_size"], end_of_text, shards)


def read_entries(given: Any, path: Path) -> tuple[ShardEntry, ...]:
    """The shards in a file of JSON.

    Raises:
        DataError: if they are not what is written there.
    """
    kinds = {"file": str, "tokens": int, "documents": int, "sha256": str}
    for number, shard in enumerate(given if isinstance(given, list) else [given]):
        good = isinstance(shard, dict) and {name: type(value) for name, value in shard.items()} == kinds
        if (
            not good
            or not _SHARD.fullmatch(shard["file"])
            or not all(map(is_count, (shard["tokens"], shard["documents"])))
        ):
            raise DataError(f"{path}: damaged: shard {number} is {short_repr(shard)}")
    return tuple(ShardEntry(**shard) for shard in given)


def open_shard(directory: Path, shard: ShardEntry, tokenizer: str, listed_in: str = INDEX) -> Tokens:
    """Opens a shard without reading it.

    Raises:
        DataError: if it is missing, damaged, or another one than the file says that lists it.
    """
    path = directory / shard.file
    if not path.is_file():
        raise DataError(f"{path}: missing: {listed_in} lists it, with {shard.tokens:,} tokens")
    tokens = open_token_file(path)
    if tokens is None:
        raise DataError(f"{path}: damaged: not a token file")
    held = tokens.tokenizer, len(tokens.ids_N), tokens.shards[0].sha256
    if held != (tokenizer, shard.tokens, shard.sha256):
        raise DataError(
            f"{path}: not the shard that {listed_in} lists: {held[1]:,} tokens of {short_repr(held[0])} with sha256 "
            f"{short_repr(held[2])}, not {shard.tokens:,} of {short_repr(tokenizer)} with {short_repr(shard.sha256)}"
        )
    return tokens


def remove_shards(directory: Path) -> None:
    """Removes what `jaxgpt tokenize` writes, and nothing else: first the index, which says that the rest is there."""
    for name in (INDEX, PROGRESS):
        (directory / name).unlink(missing_ok=True)
    for file in directory.iterdir():
        if _SHARD.fullmatch(file.name):
            file.unlink()
    remove_partial(directory)


def remove_partial(directory: Path) -> None:
    """Removes the files that a killed process did not finish."""
    for file in directory.glob(".*.partial"):
        if file.name.startswith((".shard-", f".{INDEX}", f".{PROGRESS}")):
            file.unlink()


def is_count(value: Any) -> bool:
    """Whether this is a number of things."""
    return type(value) is int and 0 <= value < _NUMBER
