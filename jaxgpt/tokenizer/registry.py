"""`get_tokenizer`, and the tokenizers that this process has built, by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxgpt import hub
from jaxgpt.checks import did_you_mean, short_repr
from jaxgpt.errors import ConfigError, DataError
from jaxgpt.files import local
from jaxgpt.tokenizer import builtin, bytepairs, characters, files, library
from jaxgpt.tokenizer.content import Content
from jaxgpt.tokenizer.names import BUILTIN, NONE, is_name
from jaxgpt.tokenizer.vocabulary import Tokenizer, id_array

_built: dict[str, Tokenizer] = {}
# Those that are known without files.
_KNOWN = {**{name: builtin.content(name) for name in BUILTIN}, NONE: Content(NONE, {}, 0, None, None, ())}


def get_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Returns a tokenizer by name or from files; equal files give the same object within a process.

    Args:
        name_or_path: one of

            - "gpt2", GPT-2's byte-pair encoding with 50,257 ids, or "bytes", the 256 byte values and end-of-text;
            - the name of a tokenizer that this process has read, such as a loaded model's `config.tokenizer`;
            - a directory with `tokenizer.json`; with `vocab.json` and `merges.txt`, or OpenAI's `encoder.json` and
              `vocab.bpe`; with BERT's `vocab.txt`; or with `characters.json`, a list of the characters of a model that
              reads single ones, such as nanoGPT's. Beside these, `added_tokens.json`, `special_tokens_map.json`,
              `tokenizer_config.json`, and the special ids in `config.json` and `generation_config.json` count;
            - a `tokenizer.json` or `characters.json` itself;
            - the name of a model on the Hugging Face hub, of which only such files are downloaded.

    Byte-level byte pairs with GPT-2's pattern become a tiktoken encoding with the same ids. All other kinds need
    Hugging Face's `tokenizers` (the extra [tokenizers]) for text.

    Raises:
        ConfigError: for an unknown name, and for a file that is not JSON.
        DataError: if there are no such files, or they describe no tokenizer; says what is wrong.
        CheckpointError, MissingExtraError: if a download fails, or needs the extra [hub].
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ConfigError(f"no tokenizer {short_repr(name_or_path)} (known: {', '.join(BUILTIN)}, or a path)")
    if is_name(name_or_path):
        return _named(str(name_or_path))
    path = local(name_or_path)
    try:
        there = path.exists()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if there:
        return restored(files.read(path))
    name = os.fspath(name_or_path)
    hint = "" if "/" in name else did_you_mean(name, BUILTIN)
    if hint or not hub.is_name(name) or path.suffix in (".json", ".txt", ".bpe", ".model", ".pkl"):
        raise ConfigError(
            f"no tokenizer {short_repr(name)}{hint} (known: {', '.join(BUILTIN)}; or give a directory with its files)"
        )
    return restored(files.read(hub.download(name, with_tensors=False)))


def tokenizer_in(directory: Path) -> Tokenizer | None:
    """The tokenizer whose files lie in a model's directory: None if there are none, and "none" if there are such that
    cannot be used alone. Raises as `get_tokenizer` does."""
    if files.are_in(directory):
        return restored(files.read(directory))
    return _named(NONE) if files.traces_are_in(directory) else None


def is_built(name: str) -> bool:
    """Whether `get_tokenizer` knows this name already."""
    return name in _built


def restored(content: Content) -> Tokenizer:
    """The tokenizer of a content, which may come from another process."""
    if content.name not in _built:
        _built.setdefault(content.name, _BUILD[content.kind](content))  # another thread may have been first
    return _built[content.name]


def _named(name: str) -> Tokenizer:
    if name in _KNOWN:
        return restored(_KNOWN[name])
    if name in _built:
        return _built[name]
    raise ConfigError(
        f"the tokenizer {name} is known by its content, which this process has not read: load its model, or call "
        "get_tokenizer(directory) with its files, first"
    )


class _NoTokenizer(Tokenizer):
    def __init__(self, content: Content):
        super().__init__(content, [], lambda text: id_array([]))

    def _ids(self, text: str, allow_special: bool) -> NDArray[np.uint32]:
        raise DataError(
            "no tokenizer came with this model, so it takes ids and no text: put its tokenizer.json, or its vocab.json "
            "and merges.txt, beside the weights, or load it with tokenizer=PATH (--tokenizer PATH)"
        )


# What builds each kind.
_BUILD: dict[str, Callable[[Content], Tokenizer]] = {
    **dict.fromkeys(BUILTIN, lambda content: builtin.build(content.kind)),
    NONE: _NoTokenizer,
    "bpe": bytepairs.build,
    "chars": characters.build,
    "hf": library.build,
}
