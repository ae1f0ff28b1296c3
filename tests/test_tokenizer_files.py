"""Tokenizers from files: exact ids for any vocabulary, names by content, and files that are damaged."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxgpt.tokenizer import builtin, files, restored

ALPHABET = list(builtin.gpt2_alphabet().values())
SPACE = ALPHABET[list(builtin.gpt2_alphabet()).index(32)]
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def described(merges, *, added=(), prefix=False, seed=None, first=(), **model):
    """A tokenizer.json with byte pairs; `seed` shuffles the ids, and the tokens in `first` come before all others."""
    tokens = list(dict.fromkeys([*first, *ALPHABET, *(left + right for left, right in merges)]))
    if seed is not None:
        random.Random(seed).shuffle(tokens)
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token(content, i, tokens, **flags) for i, (content, flags) in enumerate(added)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [f"{left} {right}" for left, right in merges],
            **model,
        },
    }


def token(content, i, tokens, **flags):
    """An added token: with its id in the vocabulary, or with the i-th after it."""
    new = [content] if content not in tokens else []
    place = tokens.index(content) if not new else len(tokens)
    tokens += new
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": place, "content": content, **plain, **flags}


def saved(tmp_path, description, **others):
    """A directory with a tokenizer.json, and other files by name without .json."""
    directory = tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}"
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    for name, content in others.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def plain_ids(description, text):
    """Hugging Face's byte pairs, written plainly: the earliest listed pair first, from left to right."""
    ranks = {tuple(merge.split(" ")): k for k, merge in enumerate(description["model"]["merges"])}
    ids, written = description["model"]["vocab"], builtin.gpt2_alphabet()
    result = []
    for piece in regex.findall(PATTERN, text):
        parts = [written[byte] for byte in piece.encode()]
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            i = next(i for i, pair in enumerate(itertools.pairwise(parts)) if pair == best)
            parts[i : i + 2] = ["".join(best)]
        result += [ids[part] for part in parts]
    return result


@st.composite
def merge_lists(draw):
    """Lists in which each pair comes after others that make its parts; many of the pairs can never occur."""
    tokens, merges = [*"abc", SPACE], []
    for _ in range(draw(st.integers(1, 14))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if pair not in merges:
            merges.append(pair)
            tokens.append("".join(pair))
    return merges


@settings(max_examples=100, deadline=None)
@given(merge_lists(), st.lists(st.text("abc ", max_size=12), min_size=1, max_size=6), st.integers(0, 5))
def test_byte_pairs_of_any_list_give_the_ids_of_a_plain_implementation(merges, texts, seed):
    description = described(merges, seed=seed)
    tokenizer = tokenizer_of(description)
    assume(tokenizer.content.kind == "bpe")  # not if a part can only be made by a pair that comes later
    for text in texts:
        ids = plain_ids(description, text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


def tokenizer_of(description):
    return restored(files._content(Path("tokenizer.json"), description, files._Beside()))
