"""`Tokenizer`: text to ids and back; and its decoder for ids that arrive one by one."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jaxgpt.checks import short_repr
from jaxgpt.tokenizer.content import AddedToken, Content, placeholder

# What \s means to tiktoken and to Hugging Face's tokenizers (in Python's `re` it matches four more control characters).
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

# Where a piece ends under GPT-2's pattern, whatever else the text holds: see `Tokenizer.find_cut`.
_CUT = re.compile(f"[^{SPACES}](?=[ \n])")


# The ids of a text.
EncodeText = Callable[[str], NDArray[np.uint32]]


class Tokenizer:
    """A vocabulary of byte strings, and the rule that splits text into them.

    Pickled or copied, it carries its content to the other process, where its name is then known too.

    Attributes:
        name: the name that `get_tokenizer` takes, and configs and token files store.
        vocab_size: number of ids.
        end_of_text: id of the token that ends a text and separates texts; None if there is none.
        start: id that an empty prompt starts from; None if there is none.
        stop_ids: the ids at which generation ends by default.
        content: what it was built from.
    """

    def __init__(self, content: Content, tokens: Sequence[bytes | None], encode_text: EncodeText):
        """`tokens` are the bytes of each id (None: unknown), and `encode_text` gives the ids of a text that holds no
        added token."""
        self.content = content
        self.name = content.name
        self.vocab_size = content.vocab_size
        self.end_of_text = content.end_of_text
        self.start = content.end_of_text if content.start is None else content.start
        self.stop_ids = content.stop_ids
        self._tokens = tokens
        self._encode_text = encode_text
        self._added = AddedTokens(content.added)
        self._divisible = content.kind in ("gpt2", "bytes", "chars", "bpe") and not (
            (content.kind == "bpe" and content.description["pre_tokenizer"]["add_prefix_space"])
            or any(token.rstrip or set(token.content) & set(SPACES) for token in content.added)
        )

    def __repr__(self) -> str:
        return f"get_tokenizer({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and other.name == self.name  # which says what the content is

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self):  # the tables of the libraries cannot cross into another process, but the content can
        from jaxgpt.tokenizer import restored

        return restored, (self.content,)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Returns the ids of `text`, without any token around it.

        Special tokens in it, such as `<|endoftext|>`, are ordinary text, unless `allow_special` makes them tokens
        (transformers' `split_special_tokens=False`, which is its default). Added tokens that are not special always
        are. Lone surrogates, which UTF-8 cannot represent, become U+FFFD.

        Raises:
            DataError: if the tokenizer has no id for a part of the text, or is that of a model that came without one.
            MissingExtraError: if it needs Hugging Face's library, which is not installed.
        """
        return self.encode_array(text, allow_special=allow_special).tolist()

    def encode_array(self, text: str, *, allow_special: bool = False) -> NDArray[np.uint32]:
        """The ids [T] that `encode` returns, as an array: for long texts, whose list takes time to make."""
        if not isinstance(text, str):
            raise TypeError(f"encode takes one text, not {short_repr(text)}")
        return self._ids(_well_formed(text), allow_special)

    def decode_bytes(self, ids: Iterable[int], *, placeholders: bool = False) -> bytes:
        """Returns the bytes of `ids`: a list of ints, or an integer array [T].

        With `placeholders`, an id beyond the vocabulary gives `<|50258|>`: a model may have more ids than its tokenizer
        has tokens, and what it drew must not be lost.

        Raises:
            ValueError: if an id is not an integer, or not in the vocabulary; says which one and where.
        """
        row = self._checked(ids, placeholders)
        return b"".join([self._token(i) for i in row])

    def decode(self, ids: Iterable[int], *, placeholders: bool = False) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD. Otherwise as `decode_bytes`."""
        return self.decode_bytes(ids, placeholders=placeholders).decode("utf-8", errors="replace")

    def count_bytes(self, ids: Iterable[int]) -> int | None:
        """How many bytes of text `ids` stand for; None if one is not in the vocabulary, or if the bytes of single
        tokens do not add up to those of the text."""
        row = self._checked(ids, placeholders=True)
        known = all(i < self.vocab_size and self._tokens[i] is not None for i in set(row))
        return len(self.decode_bytes(row)) if known else None

    def find_cut(self, text: str, start: int) -> int | None:
        """The first place from `start` on where a text may be cut: the ids of the two parts, encoded one by one, are
        those of the whole. None if there is none, or if the tokenizer's rules do not say.

        That is a place before a space or a line end, and after anything but whitespace. No alternative of GPT-2's
        pattern goes on from other characters to whitespace, so one piece ends there and another begins. The first part
        has the same pieces up to there, because only `\\s++$` and `\\s+(?!\\S)` look at what follows, after whitespace,
        and the first part does not end in any; the second, because the pattern does not look back.
        """
        match = _CUT.search(text, max(0, start - 1)) if self._divisible else None
        return None if match is None else match.end()

    @property
    def text_ids(self) -> int:
        """The ids of ordinary text, without special tokens, are below this."""
        special = {token.id for token in self.content.added if token.special}
        return 1 + max((i for i in range(self.vocab_size) if i not in special), default=-1)

    def _ids(self, text: str, allow_special: bool) -> NDArray[np.uint32]:
        """The ids of a text without lone surrogates."""
        parts = self._added.split(text, allow_special)
        return joined([id_array([part]) if isinstance(part, int) else self._encode_text(part) for part in parts])

    def incremental(self) -> IncrementalDecoder:
        """Returns the state of a `StreamDecoder`."""
        return _Utf8Decoder(self)

    def _token(self, i: int) -> bytes:
        token = self._tokens[i] if i < self.vocab_size else None
        return placeholder(i).encode() if token is None else token

    def _checked(self, ids: Iterable[int], placeholders: bool) -> list[int]:
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise TypeError(f"decode takes a row of token ids, not {short_repr(ids)}")
        ids_T = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if ids_T.ndim != 1:
            raise ValueError(f"token ids must be one row of integers, not an array of shape {ids_T.shape}")
        if not ids_T.size:
            return []
        if not np.issubdtype(ids_T.dtype, np.integer):
            raise ValueError(f"token ids must be integers, not {ids_T.dtype}")
        outside = np.flatnonzero((ids_T < 0) | ((ids_T >= self.vocab_size) & (not placeholders)))
        if outside.size:
            where = outside[0]
            raise ValueError(
                f"token id {ids_T[where]} at position {where} is outside the {self.name!r} vocabulary, "
                f"0 to {self.vocab_size - 1}"
            )
        return ids_T.tolist()


def id_array(ids: Sequence[int]) -> NDArray[np.uint32]:
    """A row of ids as an array."""
    return np.array(ids, np.uint32)


def joined(rows: Sequence[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    """One row of several."""
    return rows[0] if len(rows) == 1 else np.concatenate([id_array([]), *rows])


class IncrementalDecoder(Protocol):
    """Decodes ids as they arrive; what `feed` and `finish` return joins to what `Tokenizer.decode` returns."""

    def feed(self, ids: Iterable[int]) -> str: ...
    def finish(self) -> str: ...


class _Utf8Decoder:
    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes(ids, placeholders=True))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class StreamDecoder:
    """Decodes ids as they arrive, holding back text that ids to come may still change, such as the bytes of a character
    until it is complete.

    The pieces from `feed`, plus the last one from `finish`, concatenate to exactly what `Tokenizer.decode` returns for
    all the ids at once, with placeholders.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = tokenizer.incremental()

    def feed(self, ids: Iterable[int]) -> str:
        """Returns the text that `ids` complete, possibly ''. Raises as `Tokenizer.decode_bytes` does."""
        return self._decoder.feed(ids)

    def finish(self) -> str:
        """Returns what was held back, as a rule ''; a character that was never completed is U+FFFD. Resets the decoder
        for new ids."""
        rest = self._decoder.finish()
        self._decoder = self._tokenizer.incremental()
        return rest


class AddedTokens:
    """Finds added tokens in a text, by the rules of Hugging Face's tokenizers.

    Tokens that are not `normalized` come first; those that are, are looked for in what is left. Of several that match
    at one place, the longest is taken.
    """

    def __init__(self, tokens: Sequence[AddedToken]):
        self._stages = []
        for normalized in (False, True):
            # Two tokens may have the same text, if a file says so; the later one counts.
            stage = {token.content: token for token in tokens if token.normalized == normalized}
            if stage:
                longest_first = sorted(stage, key=len, reverse=True)
                self._stages.append((stage, re.compile("|".join(map(re.escape, longest_first)))))

    def split(self, text: str, allow_special: bool) -> Iterator[str | int]:
        """The ids of the added tokens in `text`, and the texts between them, none of which is empty."""
        parts: list[str | int] = [text]
        for stage, pattern in self._stages:
            if not allow_special and all(token.special for token in stage.values()):
                continue  # all that it could find is ordinary text
            parts = [
                piece
                for part in parts
                for piece in ([part] if isinstance(part, int) else _split(part, stage, pattern, allow_special))
            ]
        return (part for part in parts if part != "")


def _split(
    text: str, stage: dict[str, AddedToken], pattern: re.Pattern[str], allow_special: bool
) -> Iterator[str | int]:
    done = 0
    for match in pattern.finditer(text):
        token, (start, stop) = stage[match[0]], match.span()
        if token.special and not allow_special:
            continue
        if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])):
            continue
        while token.lstrip and start > done and text[start - 1] in SPACES:
            start -= 1
        while token.rstrip and stop < len(text) and text[stop] in SPACES:
            stop += 1
        if done < start:
            yield text[done:start]
        yield token.id
        done = stop
    yield text[done:]


def _is_word(character: str) -> bool:
    r"""Whether a character (or none) is matched by \w as Unicode defines it: UTS #18, annex C."""
    if not character:
        return False
    category = unicodedata.category(character)
    circled = "\u24b6" <= character <= "\u24e9" or "\U0001f130" <= character <= "\U0001f189"
    return (
        category[0] in "LM"
        or category in ("Nd", "Nl", "Pc")
        or character in "\u200c\u200d"
        or (circled and category == "So")
    )


def _well_formed(text: str) -> str:
    if text.isascii():
        return text
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
