"""Tokenizers of any other kind (WordPiece, unigram, byte pairs with other rules), which Hugging Face's library runs."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt.checks import first_line
from jaxgpt.errors import DataError, MissingExtraError, require
from jaxgpt.tokenizer.content import Content, placeholder
from jaxgpt.tokenizer.vocabulary import IncrementalDecoder, Tokenizer, id_array


def build(content: Content) -> Tokenizer:
    """Builds the tokenizer of any tokenizer.json. Without the extra [tokenizers] it can only count ids, and raises the
    MissingExtraError when it is given text or ids.

    Raises:
        DataError: if the library refuses the description.
    """
    try:
        return _LibraryTokenizer(content, _load(content))
    except MissingExtraError as error:
        return _LibraryTokenizer(content, error)


def _load(content: Content) -> Any:
    model = content.description["model"]
    kind = model.get("type") or "another kind than byte-level BPE"
    library = require("tokenizers", "tokenizers", f"text for a model whose tokenizer is of the kind {kind}")
    tokenizer = _calling(lambda: library.Tokenizer.from_str(json.dumps(content.description)))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _calling(function: Any) -> Any:
    """Calls the library; whatever it raises, also where its own code stops in the middle, becomes a DataError."""
    try:
        return function()
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise DataError(f"Hugging Face's tokenizers refused this tokenizer or text: {first_line(error)}") from None


class _LibraryTokenizer(Tokenizer):
    def __init__(self, content: Content, library: Any):
        super().__init__(content, [], lambda text: id_array([]))
        self._library_or_error = library
        self._lock = threading.Lock()

    @property
    def library(self) -> Any:
        if isinstance(self._library_or_error, MissingExtraError):
            raise self._library_or_error
        return self._library_or_error

    def decode_bytes(self, ids: Iterable[int], *, placeholders: bool = False) -> bytes:
        return self.decode(ids, placeholders=placeholders).encode()

    def decode(self, ids: Iterable[int], *, placeholders: bool = False) -> str:
        known = itertools.groupby(self._checked(ids, placeholders), key=lambda i: i < self.vocab_size)
        return "".join(
            self.known_text(list(row)) if inside else "".join(map(placeholder, row)) for inside, row in known
        )

    def known_text(self, ids: list[int]) -> str:
        """The text of ids that are all in the vocabulary."""
        library = self.library
        return _calling(lambda: library.decode(ids, skip_special_tokens=False))

    def count_bytes(self, ids: Iterable[int]) -> int | None:
        return None

    def incremental(self) -> IncrementalDecoder:
        return _LibraryDecoder(self)

    def _ids(self, text: str, allow_special: bool) -> NDArray[np.uint32]:
        library = self.library
        with self._lock:  # another thread may want it otherwise
            library.encode_special_tokens = not allow_special
            return id_array(_calling(lambda: library.encode(text, add_special_tokens=False).ids))


class _LibraryDecoder:
    """Decodes all ids again each time, and returns what has come to the text that more ids cannot change."""

    def __init__(self, tokenizer: _LibraryTokenizer):
        self._tokenizer = tokenizer
        self._stable, self._fallback = _stability(tokenizer.content.description.get("decoder"))
        self._ids: list[int] = []
        self._given = 0  # characters of their text

    def feed(self, ids: Iterable[int]) -> str:
        text = ""
        for i in self._tokenizer._checked(ids, placeholders=True):
            if i < self._tokenizer.vocab_size:
                self._ids.append(i)
            else:
                text += f"{self.finish()}{placeholder(i)}"
        return text + self._new(final=False)

    def finish(self) -> str:
        text = self._new(final=True)
        self._ids, self._given = [], 0
        return text

    def _new(self, final: bool) -> str:
        if not self._ids or not (final or self._stable):
            return ""
        ids = self._ids
        if not final and self._fallback:
            # If one byte of a run is wrong, the library writes U+FFFD for each byte of the run.
            length = len(ids)
            while length and re.fullmatch(
                "<0x[0-9A-F]{2}>", self._tokenizer.library.id_to_token(ids[length - 1]) or ""
            ):
                length -= 1
            ids = ids[:length]
        text = self._tokenizer.known_text(ids)
        new = (text if final else text.rstrip("\ufffd"))[self._given :]
        self._given += len(new)
        return new


def _stability(decoder: Any) -> tuple[bool, bool]:
    """Whether the text of some ids, less U+FFFD at its end, is the start of the text of more, and whether that holds
    only without single bytes at their end."""
    if decoder is None:
        return True, False  # tokens with spaces between them
    parts = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    joined = fallback = False
    for part in parts:
        kind = part.get("type")
        whole_text = kind == "Replace" or (kind == "Strip" and part.get("stop", 0) > 0)
        if kind not in (
            "ByteLevel",
            "WordPiece",
            "Metaspace",
            "BPEDecoder",
            "ByteFallback",
            "Fuse",
            "Replace",
            "Strip",
        ):
            return False, False
        if joined and whole_text:
            return False, False  # it may look across the ends of tokens
        joined = joined or kind in ("ByteLevel", "Fuse")
        fallback = fallback or kind == "ByteFallback"
    return True, fallback
