"""Text to token ids and back, from data inside the package: nothing here touches the network."""

from __future__ import annotations

import codecs
import functools
import hashlib
import re
from collections.abc import Callable, Iterable
from importlib.resources import files

import numpy as np

from jaxgpt.checks import did_you_mean, short_repr
from jaxgpt.config import TOKENIZERS
from jaxgpt.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"

_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# GPT-2's pattern as tiktoken writes it: the same pieces, but without backtracking where that can be avoided.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# What \s means in the pattern above (in Python's own it means four control characters more).
_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LONG_SPACE_LENGTH = 10_000
_LONG_SPACE = re.compile(f"{_SPACE}(?<!{_SPACE}{_SPACE}){_SPACE}{{{_LONG_SPACE_LENGTH - 1},}}+")


class Tokenizer:
    """A vocabulary of byte strings, and the rule that cuts text into them.

    Attributes:
        name: what `get_tokenizer` calls it.
        vocab_size: number of ids, the end-of-text token included.
        end_of_text: id of `<|endoftext|>`, the last one.
    """

    def __init__(self, name: str, tokens: list[bytes], encode_text: Callable[[str], list[int]]):
        """`tokens` are the bytes of each id but the last, which `END_OF_TEXT` gets; `encode_text` never returns it."""
        self.name = name
        self.end_of_text = len(tokens)
        self.vocab_size = len(tokens) + 1
        self._tokens = [*tokens, END_OF_TEXT.encode()]
        self._encode_text = encode_text

    def __repr__(self) -> str:
        return f"get_tokenizer({self.name!r})"

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids of `text`.

        `<|endoftext|>` in it is text like any other, unless `allow_special` makes it the end-of-text token.
        Lone surrogates, which no UTF-8 can carry, become U+FFFD.
        """
        text = _well_formed(text)
        if not allow_special:
            return self._encode_text(text)
        first, *others = text.split(END_OF_TEXT)
        ids = self._encode_text(first)
        for part in others:
            ids += [self.end_of_text, *self._encode_text(part)]
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`: a list of ints, or an integer array [T].

        Raises:
            ValueError: if an id is not an integer, or not in the vocabulary; it says which and where.
        """
        ids_T = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if ids_T.ndim != 1:
            raise ValueError(f"token ids must be one row of integers, not an array of shape {ids_T.shape}")
        if not ids_T.size:
            return b""
        if not np.issubdtype(ids_T.dtype, np.integer):
            raise ValueError(f"token ids must be integers, not {ids_T.dtype}")
        outside = np.flatnonzero((ids_T < 0) | (ids_T >= self.vocab_size))
        if outside.size:
            where = outside[0]
            raise ValueError(
                f"token id {ids_T[where]} at position {where} is outside the {self.name!r} vocabulary, "
                f"0 to {self.vocab_size - 1}"
            )
        return b"".join([self._tokens[i] for i in ids_T.tolist()])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Errors as in `decode_bytes`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class StreamDecoder:
    """Decodes ids as they come, holding back the bytes of a character until it is whole.

    The pieces from `feed`, and the last from `finish`, join to exactly what `Tokenizer.decode` gives for all
    the ids at once.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete, maybe ''. Errors as in `Tokenizer.decode_bytes`."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """U+FFFD for a character that was never completed, else ''. The decoder can then be used anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, built once a process.

    "gpt2" is GPT-2's byte-pair encoding, 50,257 ids, by tiktoken from the merge table in this package. "bytes"
    is the 256 byte values and end-of-text.

    Raises:
        ConfigError: for an unknown name.
        DataError: if the merge table in the package is damaged.
    """
    if name not in TOKENIZERS:
        raise ConfigError(
            f"no tokenizer {short_repr(name)}{did_you_mean(name, TOKENIZERS)} (known: {', '.join(TOKENIZERS)})"
        )
    return _gpt2() if name == "gpt2" else _bytes()


def _bytes() -> Tokenizer:
    return Tokenizer("bytes", [bytes([i]) for i in range(256)], lambda text: list(text.encode()))


def _gpt2() -> Tokenizer:
    import tiktoken  # here, because "bytes" does without it

    tokens = _gpt2_tokens()
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=_GPT2_PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
        explicit_n_vocab=len(tokens) + 1,
    )

    def encode_text(text: str) -> list[int]:
        ids: list[int] = []
        for part in _cut_long_spaces(text):
            ids += encoding.encode_ordinary(part)
        return ids

    return Tokenizer("gpt2", tokens, encode_text)


def _gpt2_tokens() -> list[bytes]:
    """The 50,256 tokens in order of rank: the single bytes, those that print first, then one token a merge.

    The table is a version line, then one merge a line: two tokens and a space between, each byte written as one
    character: itself if it prints in Latin-1, else the next from U+0100 on.
    """
    alphabet = gpt2_alphabet()
    # All lines at once is several times faster than one by one. A line end, U+0200 for the moment, must be told
    # from the byte 10.
    bytes_of = {ord(character): byte for byte, character in alphabet.items()}
    text = gpt2_merges().translate({**bytes_of, ord(" "): None, ord("\n"): 0x200})
    merged = [token.encode("latin-1") for token in text.split("\u0200")[1:-1]]
    return [bytes([byte]) for byte in alphabet] + merged


def gpt2_alphabet() -> dict[int, str]:
    """By byte, in order of rank, the character by which the merge table writes it."""
    printable = [byte for byte in range(ord("!"), 256) if chr(byte).isprintable()]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def gpt2_merges() -> str:
    """The merge table.

    Raises:
        DataError: if the package's file is not the one that was released.
    """
    path = files("jaxgpt").joinpath("assets", "gpt2", "vocab.bpe")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}): the package is damaged; reinstall jaxgpt") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != _MERGES_SHA256:
        raise DataError(
            f"{path}: expected sha256 {_MERGES_SHA256}, found {digest}: the package is damaged; reinstall jaxgpt"
        )
    return data.decode("utf-8")


def _well_formed(text: str) -> str:
    if text.isascii():
        return text
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def _cut_long_spaces(text: str) -> list[str]:
    r"""Cuts `text` where tiktoken cuts it anyway, in a long run of whitespace before its last character.

    The ids do not change, but `\s+(?!\S)` would need one frame a character to find that cut, and overflows the
    stack of tiktoken's regular expression engine in a megabyte of spaces.
    """
    if len(text) < _LONG_SPACE_LENGTH:
        return [text]
    cuts = [match.end() - 1 for match in _LONG_SPACE.finditer(text) if match.end() < len(text)]
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
