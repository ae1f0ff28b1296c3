"""The tokenizers in the package, GPT-2's and bytes: no file of the user's and no network is needed."""

from __future__ import annotations

import functools
import hashlib
import re
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt.errors import DataError
from jaxgpt.tokenizer.content import AddedToken, Content
from jaxgpt.tokenizer.names import BUILTIN
from jaxgpt.tokenizer.vocabulary import SPACES, EncodeText, Tokenizer, joined

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_IDS = {"gpt2": 50256, "bytes": 256}

_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# GPT-2's pattern, in a form that gives the same pieces and takes two thirds of the time of tiktoken's own form: its
# engine hands a group without lookahead or possessive repeats to an automaton, and backtracks only for whitespace.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"

_LONG_SPACE_LENGTH = 10_000
_LONG_SPACE_SAMPLE = 1000
_LONG_SPACE_SAMPLED = re.compile(f"[{SPACES}]{{{_LONG_SPACE_LENGTH // _LONG_SPACE_SAMPLE}}}")
_LONG_SPACE = re.compile(f"[{SPACES}](?<![{SPACES}][{SPACES}])[{SPACES}]{{{_LONG_SPACE_LENGTH - 1},}}+")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def build(name: str) -> Tokenizer:
    """Builds "gpt2" or "bytes"; raises DataError if the merge table in the package is damaged."""
    return _gpt2() if name == "gpt2" else _bytes()


def _bytes() -> Tokenizer:
    tokens = [bytes([i]) for i in range(256)]

    def encode(text: str) -> NDArray[np.uint32]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    return Tokenizer(content("bytes"), [*tokens, END_OF_TEXT.encode()], encode)


def _gpt2() -> Tokenizer:
    tokens = gpt2_tokens()
    encode = gpt2_encoder({token: i for i, token in enumerate(tokens)})
    return Tokenizer(content("gpt2"), [*tokens, END_OF_TEXT.encode()], encode)


def content(name: str) -> Content:
    """The content of "gpt2" or "bytes", with as much of a description as it takes to build them."""
    end_of_text = _END_OF_TEXT_IDS[name]
    added = {"added_tokens": [AddedToken(end_of_text, END_OF_TEXT, special=True)._asdict()]}
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return Content(name, added, end_of_text + 1, end_of_text, None, (end_of_text,), named)


def gpt2_encoder(ranks: dict[bytes, int]) -> EncodeText:
    """Returns tiktoken's encoder of ordinary text: GPT-2's pattern, then merges in order of rank."""
    import tiktoken  # here, because "bytes" does not need it

    # encode_to_numpy makes no list of Python's ints on the way to the array. It also looks for special tokens, which
    # are ordinary text here; but it must have one to look for, or it finds the empty text, everywhere.
    special = {END_OF_TEXT: len(ranks)}
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(text: str) -> NDArray[np.uint32]:
        parts = _cut_long_spaces(text)
        return joined([encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])

    return encode


def gpt2_tokens() -> list[bytes]:
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


@functools.cache
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


def description(name: str) -> dict[str, Any]:
    """The content of a tokenizer.json. Bytes are a byte-pair encoding without merges, whose ids follow the bytes'
    values and not GPT-2's order."""
    alphabet = gpt2_alphabet()
    merges = [merge for merge in gpt2_merges().split("\n")[1:] if merge] if name == "gpt2" else []
    first = list(alphabet) if name == "gpt2" else range(256)
    tokens = [*(alphabet[byte] for byte in first), *(merge.replace(" ", "") for merge in merges)]
    return byte_level({token: i for i, token in enumerate(tokens)}, merges, content(name).added)


def description_of(content: Content) -> dict[str, Any]:
    """The content of a tokenizer.json for any content, also for those in the package."""
    return description(content.kind) if content.kind in BUILTIN else content.description


def byte_level(
    vocabulary: dict[str, int], merges: list[str], added: list[AddedToken], add_prefix_space: bool = False
) -> dict[str, Any]:
    """The content of a tokenizer.json with byte pairs and GPT-2's pattern, in one form for all that do the same: the
    vocabulary holds the added tokens too, and where all of these or none are `normalized`, which only says what is
    looked for first if nothing normalizes a text, none is."""
    if all(token.normalized for token in added):
        added = [token._replace(normalized=False) for token in added]
    vocabulary = vocabulary | {token.content: token.id for token in added}
    return {
        "version": "1.0",
        "added_tokens": [token._asdict() for token in added],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": add_prefix_space},
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])), "merges": merges},
    }


def _cut_long_spaces(text: str) -> list[str]:
    r"""Splits `text` where tiktoken splits it anyway, before the last character of a long run of whitespace.

    The ids do not change. To find that split, `\s+(?!\S)` would need one stack frame per character, and a megabyte of
    spaces overflows the stack of tiktoken's regular expression engine.
    """
    # Looking at every character takes a tenth of the time that encoding does.
    if not _LONG_SPACE_SAMPLED.search(text[::_LONG_SPACE_SAMPLE]):
        return [text]
    cuts = [match.end() - 1 for match in _LONG_SPACE.finditer(text) if match.end() < len(text)]
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
