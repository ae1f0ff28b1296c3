"""The tokenizers: GPT-2's ids, difficult texts, and decoding piece by piece."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from helpers import grid
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

import jaxgpt
from jaxgpt.errors import ConfigError, DataError
from jaxgpt.tokenizer import BUILTIN, StreamDecoder, builtin, get_tokenizer

ASSETS = Path(jaxgpt.__file__).parent / "assets" / "gpt2"

# Texts, and the ids that OpenAI's own encoder returns.
KNOWN_IDS = {
    "The cat sat on the mat": [464, 3797, 3332, 319, 262, 2603],
    "Hello, I am": [15496, 11, 314, 716],
    "Every effort moves you": [6109, 3626, 6100, 345],
    "Every day holds a": [6109, 1110, 6622, 257],
    "Akwirw ier": [33901, 86, 343, 86, 220, 959],
    "This is some text": [1212, 318, 617, 2420],
}


@functools.cache
def merge_ranks() -> dict[tuple[str, str], int]:
    lines = (ASSETS / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    return {(pair[0], pair[1]): i for i, pair in enumerate(line.split() for line in lines)}


def reference_encode(text: str) -> list[int]:
    """GPT-2's encoder, written plainly: the paper's pattern, then merge by merge, on the merge table's characters."""
    printable = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
    order = printable + [byte for byte in range(256) if byte not in printable]
    written = {byte: chr(byte) if i < len(printable) else chr(256 + i - len(printable)) for i, byte in enumerate(order)}
    ranks = merge_ranks()
    ids = {written[byte]: i for i, byte in enumerate(order)} | {a + b: 256 + i for (a, b), i in ranks.items()}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    result = []
    for piece in regex.findall(pattern, text):
        parts = [written[byte] for byte in piece.encode()]
        while True:
            pairs = [pair for pair in itertools.pairwise(parts) if pair in ranks]
            if not pairs:
                break
            best, i, merged = min(pairs, key=ranks.__getitem__), 0, []
            while i < len(parts):
                taken = 2 if tuple(parts[i : i + 2]) == best else 1
                merged.append("".join(parts[i : i + taken]))
                i += taken
            parts = merged
        result += [ids[part] for part in parts]
    return result


# Any text, including lone surrogates, with extra of what the pattern treats specially.
texts = st.lists(
    st.one_of(
        st.text(st.characters(), max_size=8),
        st.sampled_from(["\ud83d", "\ude42", "\udc00\ud800"]),
        st.sampled_from(
            [" ", "  ", "\n\n", "\t", "'ll", "'", "don't", "<|endoftext|>", "é", "🙂", "中文", "\u3000", "12"]
        ),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize(("text", "ids"), KNOWN_IDS.items())
def test_gpt2_gives_openais_ids(text, ids):
    gpt2 = get_tokenizer("gpt2")
    assert gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text


def well_formed(text: str) -> str:
    """The text as UTF-8 can represent it: adjacent surrogates form one character, any other becomes U+FFFD."""
    text = re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda pair: json.loads(json.dumps(pair[0])), text)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


@settings(max_examples=30)
@given(texts)
def test_gpt2_equals_a_plain_implementation(text):
    assert get_tokenizer("gpt2").encode(text) == reference_encode(well_formed(text))


@given(texts, st.booleans())
@example("", True)
@example("a\ud800b\udc00 \ud83d\ude42 \ud83d", False)
def test_any_text_comes_back(text, allow_special):
    for name in BUILTIN:
        tokenizer = get_tokenizer(name)
        ids = tokenizer.encode(text, allow_special=allow_special)
        text = well_formed(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_sizes_and_end_of_text():
    gpt2, byte = get_tokenizer("gpt2"), get_tokenizer("bytes")
    assert (gpt2.name, gpt2.vocab_size, gpt2.end_of_text) == ("gpt2", 50257, 50256)
    assert (byte.name, byte.vocab_size, byte.end_of_text) == ("bytes", 257, 256)
    assert gpt2.decode([0]) == "!"
    assert eval(repr(gpt2)) is gpt2


def test_bytes_are_their_own_ids():
    assert get_tokenizer("bytes").encode("aé\n") == [97, 0xC3, 0xA9, 10]


@pytest.mark.parametrize("name", BUILTIN)
def test_end_of_text_typed_by_a_user_is_text_unless_allowed(name):
    tokenizer = get_tokenizer(name)
    text = "one<|endoftext|>two<|endoftext|>"
    assert tokenizer.end_of_text not in tokenizer.encode(text)
    expected = [*tokenizer.encode("one"), tokenizer.end_of_text, *tokenizer.encode("two"), tokenizer.end_of_text]
    assert tokenizer.encode(text, allow_special=True) == expected
    assert tokenizer.decode(expected) == text


@grid(1, end=["", "x"], unit=["a", "中", "!", "0", "é", " ", "\n", " \n", "\u3000", "\0"])
def test_a_megabyte_of_one_character_comes_back(unit, end):
    text = unit * (1_000_000 // len(unit.encode())) + end  # quadratic work would take hours
    for name in BUILTIN:
        tokenizer = get_tokenizer(name)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@grid(
    1,
    end=["", "x", " x", "\nx", "1", "'s", "\x1f", "\x1fx"],
    space=[" ", "\n", "\t", "\u3000", "\x85", " \r\n", "\x1c", "\u200b"],
)
def test_cutting_long_whitespace_changes_no_id(space, end):
    tokens = builtin.gpt2_tokens()
    uncut = _tiktokens_encoding()
    assert len(tokens) == 50256
    for extra in (0, 1, 2):
        text = "word" + (space * 10_000)[: 9_998 + extra] + end
        for whole in (text, text + " and more", text + text):
            assert get_tokenizer("gpt2").encode(whole) == uncut.encode_ordinary(whole)


@functools.cache
def _tiktokens_encoding() -> tiktoken.Encoding:
    """What `tiktoken.get_encoding("gpt2")` builds once it has fetched the table."""
    ranks = {token: i for i, token in enumerate(builtin.gpt2_tokens())}
    return tiktoken.Encoding("tiktoken's", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def test_any_text_has_the_ids_that_tiktoken_gives_it():
    want, ours = _tiktokens_encoding().encode_ordinary, get_tokenizer("gpt2").encode
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for start in range(0, len(characters), 500):
        text = "".join(f"a{character} {character}1{character}" for character in characters[start : start + 500])
        assert ours(text) == want(text)
    rng = random.Random(3)
    parts = [
        *" \n\t\r'sdmtlvre01Aaé北\u3000\x85\xa0\u2028\x1c.,!-<|>",
        "'s",
        "'ll",
        "'VE",
        "<|endoftext|>",
        "  ",
        "\n\n",
    ]
    for _ in range(5000):
        text = "".join(rng.choice(characters if rng.random() < 0.1 else parts) for _ in range(rng.randint(0, 40)))
        assert ours(text) == want(text), text


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("bad", [-1, 50257])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(name, bad):
    with pytest.raises(ValueError, match=f"token id {bad} at position 2 is outside the '{name}' vocabulary"):
        get_tokenizer(name).decode([1, 2, bad, 3])


def test_placeholders_stand_for_ids_beyond_the_vocabulary():
    gpt2 = get_tokenizer("gpt2")
    assert gpt2.decode([0, 50258, 50256], placeholders=True) == "!<|50258|><|endoftext|>"
    assert get_tokenizer("bytes").decode([0xE2, 257, 65], placeholders=True) == "\ufffd<|257|>A"
    with pytest.raises(ValueError, match="token id -1 at position 1"):
        gpt2.decode([50258, -1], placeholders=True)


@pytest.mark.parametrize("ids", [[1.0], np.array([True]), [[1, 2]], np.array(5), ["a"]])
def test_ids_that_are_not_a_row_of_integers_are_refused(ids):
    with pytest.raises(ValueError, match="token ids must be"):
        get_tokenizer("bytes").decode(ids)


def test_ids_may_be_an_array_or_an_iterator():
    tokenizer = get_tokenizer("bytes")
    assert tokenizer.decode(np.array([72, 105], np.uint16)) == "Hi"
    assert tokenizer.decode(iter([72, 105])) == "Hi"
    assert tokenizer.decode([]) == ""


@given(st.sampled_from(BUILTIN), st.lists(st.lists(st.integers(0, 258), max_size=4), max_size=12))
def test_streamed_pieces_join_to_the_whole(name, chunks):
    # Any ids, so invalid UTF-8 too.
    tokenizer = get_tokenizer(name)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(chunk) for chunk in chunks]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(
        [i for chunk in chunks for i in chunk], placeholders=True
    )


@given(st.sampled_from(BUILTIN), st.text())
def test_streaming_holds_a_character_back_until_it_is_whole(name, text):
    tokenizer = get_tokenizer(name)
    decoder = StreamDecoder(tokenizer)
    streamed = ""
    for i in tokenizer.encode(text):
        streamed += decoder.feed([i])
        assert text.startswith(streamed)
    assert streamed == text
    assert decoder.finish() == ""


def test_a_character_that_never_completes_ends_as_a_replacement():
    decoder = StreamDecoder(get_tokenizer("bytes"))
    assert decoder.feed(list("🙂".encode())[:3]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.feed(list(b"ok")) == "ok"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no tokenizer 'gpt-2'; did you mean 'gpt2'\? \(known: gpt2, bytes; "):
        get_tokenizer("gpt-2")


def test_the_same_name_gives_the_same_object():
    assert get_tokenizer("gpt2") is get_tokenizer("gpt2")


def test_a_damaged_or_missing_merge_table_is_refused(tmp_path, monkeypatch):
    table = tmp_path / "assets" / "gpt2" / "vocab.bpe"
    monkeypatch.setattr(builtin, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match="the package is damaged; reinstall jaxgpt"):
        builtin.build("gpt2")
    table.parent.mkdir(parents=True)
    good = (ASSETS / "vocab.bpe").read_bytes()
    table.write_bytes(good.replace(b"h e", b"e h", 1))
    with pytest.raises(DataError, match=r"expected sha256 1ce1664773.* the package is damaged; reinstall jaxgpt"):
        builtin.build("gpt2")
    table.write_bytes(good)
    assert builtin.build("gpt2").encode("the") == [1169]


def test_the_merge_table_is_openais_and_carries_its_licence():
    digest = hashlib.sha256((ASSETS / "vocab.bpe").read_bytes()).hexdigest()
    assert digest == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert "Software Copyright (c) 2019 OpenAI" in (ASSETS / "LICENSE").read_text(encoding="utf-8")


def test_building_touches_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert builtin.build("gpt2").encode("Hello, I am") == KNOWN_IDS["Hello, I am"]
