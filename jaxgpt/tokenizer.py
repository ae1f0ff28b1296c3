"""Converts text to token ids and back, with data from inside the package: no network is needed."""

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

# GPT-2's pattern as tiktoken writes it: it gives the same pieces, and avoids backtracking where possible.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# What \s means in the pattern above (in Python's `re` it matches four more control characters).
_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LONG_SPACE_LENGTH = 10_000
_LONG_SPACE = re.compile(f"{_SPACE}(?<!{_SPACE}{_SPACE}){_SPACE}{{{_LONG_SPACE_LENGTH - 1},}}+")


class Tokenizer:
    """A vocabulary of byte strings, and the rule that splits text into them.

    Attributes:
        name: the name that `get_tokenizer` takes.
        vocab_size: number of ids, including the end-of-text token.
        end_of_text: id of `<|endoftext|>`, which is the last one.
    """

    def __init__(self, name: str, tokens: list[bytes], encode_text: Callable[[str], list[int]]):
        """`tokens` are the bytes of each id except the last, which is `END_OF_TEXT`'s; `encode_text` never returns
        that one."""
        self.name = name
        self.end_of_text = len(tokens)
        self.vocab_size = len(tokens) + 1
        self._tokens = [*tokens, END_OF_TEXT.encode()]
        self._encode_text = encode_text

    def __repr__(self) -> str:
        return f"get_tokenizer({self.name!r})"

    def __reduce__(self):  # tiktoken's tables cannot cross into another process, but their name can
        return get_tokenizer, (self.name,)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Returns the ids of `text`.

        `<|endoftext|>` in it is ordinary text, unless `allow_special` makes it the end-of-text token.
        Lone surrogates, which UTF-8 cannot represent, become U+FFFD.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes one text, not {short_repr(text)}")
        text = _well_formed(text)
        if not allow_special:
            return self._encode_text(text)
        first, *others = text.split(END_OF_TEXT)
        ids = self._encode_text(first)
        for part in others:
            ids += [self.end_of_text, *self._encode_text(part)]
        return ids

    def decode_bytes(self, ids: Iterable[int], *, placeholders: bool = False) -> bytes:
        """Returns the bytes of `ids`: a list of ints, or an integer array [T].

        With `placeholders`, an id beyond the vocabulary gives `<|50258|>`: a model may have more ids than its tokenizer
        has tokens, and what it drew must not be lost.

        Raises:
            ValueError: if an id is not an integer, or not in the vocabulary; says which one and where.
        """
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise TypeError(f"decode takes a row of token ids, not {short_repr(ids)}")
        ids_T = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if ids_T.ndim != 1:
            raise ValueError(f"token ids must be one row of integers, not an array of shape {ids_T.shape}")
        if not ids_T.size:
            return b""
        if not np.issubdtype(ids_T.dtype, np.integer):
            raise ValueError(f"token ids must be integers, not {ids_T.dtype}")
        outside = np.flatnonzero((ids_T < 0) | ((ids_T >= self.vocab_size) & (not placeholders)))
        if outside.size:
            where = outside[0]
            raise ValueError(
                f"token id {ids_T[where]} at position {where} is outside the {self.name!r} vocabulary, "
                f"0 to {self.vocab_size - 1}"
            )
        return b"".join([self._tokens[i] if i < self.vocab_size else b"<|%d|>" % i for i in ids_T.tolist()])

    def decode(self, ids: Iterable[int], *, placeholders: bool = False) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD. Otherwise as `decode_bytes`."""
        return self.decode_bytes(ids, placeholders=placeholders).decode("utf-8", errors="replace")


class StreamDecoder:
    """Decodes ids as they arrive, holding back the bytes of a character until it is complete.

    The pieces from `feed`, plus the last one from `finish`, concatenate to exactly what `Tokenizer.decode` returns for
    all the ids at once, with placeholders.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """Returns the text that `ids` complete, possibly ''. Raises as `Tokenizer.decode_bytes` does."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids, placeholders=True))

    def finish(self) -> str:
        """Returns U+FFFD for a character that was never completed, else ''; resets the decoder for new ids."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def get_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer called `name`, built once per process.

    "gpt2" is GPT-2's byte-pair encoding with 50,257 ids, which tiktoken builds from the merge table in this package.
    "bytes" has the 256 byte values and end-of-text.

    Raises:
        ConfigError: for an unknown name.
        DataError: if the merge table in the package is damaged.
    """
    if not isinstance(name, str) or name not in TOKENIZERS:
        raise ConfigError(
            f"no tokenizer {short_repr(name)}{did_you_mean(name, TOKENIZERS)} (known: {', '.join(TOKENIZERS)})"
        )
    return _built(name)


@functools.cache
def _built(name: str) -> Tokenizer:
    return _gpt2() if name == "gpt2" else _bytes()


def _bytes() -> Tokenizer:
    return Tokenizer("bytes", [bytes([i]) for i in range(256)], lambda text: list(text.encode()))


def _gpt2() -> Tokenizer:
    import tiktoken  # here, because "bytes" does not need it

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
    """The 50,256 tokens in order of rank: the single bytes, printable ones first, then one token per merge.

    The table has a version line, then one merge per line: two tokens separated by a space. Each byte is written as one
    character: itself if printable in Latin-1, else the next unused one from U+0100 on.
    """
    alphabet = gpt2_alphabet()
    # Translating all lines at once is several times faster than one by one. Line ends become U+0200 for the moment, to
    # distinguish them from the byte 10.
    bytes_of = {ord(character): byte for byte, character in alphabet.items()}
    text = gpt2_merges().translate({**bytes_of, ord(" "): None, ord("\n"): 0x200})
    merged = [token.encode("latin-1") for token in text.split("\u0200")[1:-1]]
    return [bytes([byte]) for byte in alphabet] + merged


def gpt2_alphabet() -> dict[int, str]:
    """Maps each byte, in order of rank, to the character that the merge table writes for it."""
    printable = [byte for byte in range(ord("!"), 256) if chr(byte).isprintable()]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def gpt2_merges() -> str:
    """Returns the merge table.

    Raises:
        DataError: if the package's file is not the released one.
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
    r"""Splits `text` where tiktoken splits it anyway, before the last character of a long run of whitespace.

    The ids do not change. To find that split, `\s+(?!\S)` would need one stack frame per character, and a megabyte of
    spaces overflows the stack of tiktoken's regular expression engine.
    """
    if len(text) < _LONG_SPACE_LENGTH:
        return [text]
    cuts = [match.end() - 1 for match in _LONG_SPACE.finditer(text) if match.end() < len(text)]
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
