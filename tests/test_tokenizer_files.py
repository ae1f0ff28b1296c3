"""Tokenizers from files: exact ids for any vocabulary, names by content, travel with the model, and damaged files."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import random
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from helpers import make_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jaxgpt
from jaxgpt import hub, weights
from jaxgpt.cli import main
from jaxgpt.config import GPTConfig
from jaxgpt.data import Tokens, open_tokens
from jaxgpt.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from jaxgpt.generation import default_stop_ids, encode_prompt, generate, generate_text, stream
from jaxgpt.tokenizer import FILES, builtin, get_tokenizer, parsing, registry, restored, write_tokenizer
from jaxgpt.training import Run, load_config

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


@settings(max_examples=100)
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
    return restored(parsing.content_of(Path("tokenizer.json"), description, parsing.Beside()))


def spelling(*words):
    """Merges that make each word from left to right; a space before a word is part of it."""
    merges = {}
    for word in words:
        letters = word.replace(" ", SPACE)
        merges |= {(letters[:i], letters[i]): None for i in range(1, len(letters))}
    return list(merges)


def test_a_pair_that_can_never_occur_makes_no_token():
    # After b and c have merged, tiktoken would go on with a and bc, because abc is in its table.
    description = described([("b", "c"), ("a", "b"), ("ab", "c")])
    ids = description["model"]["vocab"]
    tokenizer = tokenizer_of(description)
    assert tokenizer.encode("abc") == [ids["a"], ids["bc"]]
    assert tokenizer.encode("ab") == [ids["ab"]]
    assert tokenizer.decode([ids["abc"]]) == "abc"
    bytes_of = {character: byte for byte, character in builtin.gpt2_alphabet().items()}
    ranks = {bytes(bytes_of[character] for character in token): i for token, i in ids.items()}
    naive = tiktoken.Encoding("naive", pat_str=builtin.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert naive.encode("abc") == [ids["abc"]]


def test_of_a_pair_that_is_listed_twice_the_last_counts():
    description = described([("a", "b"), ("b", "c"), ("a", "b")])
    description["model"]["merges"] = ["a b", "b c", "a b"]
    ids = description["model"]["vocab"]
    assert tokenizer_of(description).encode("abc") == [ids["a"], ids["bc"]]


def test_ids_in_any_order_are_the_files_own():
    merges = spelling("Guten", " Tag")
    plain, shuffled = described(merges), described(merges, seed=3, first=["<s>", "<pad>"])
    for description in (plain, shuffled):
        ids = description["model"]["vocab"]
        tokenizer = tokenizer_of(description)
        assert tokenizer.encode("Guten Tag") == [ids["Guten"], ids[f"{SPACE}Tag"]] != [38, 7809, 17467]
        assert tokenizer.decode(range(len(ids))) == "".join(
            tokenizer.decode_bytes([i]).decode("utf-8", errors="surrogateescape") for i in range(len(ids))
        ).encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")
    assert tokenizer_of(plain).name != tokenizer_of(shuffled).name


def test_a_space_goes_before_each_text_if_the_tokenizer_says_so():
    merges = [*spelling("one"), (SPACE, "one")]
    description = described(merges, prefix=True, added=[("<x>", {})])
    ids = description["model"]["vocab"]
    tokenizer, one = tokenizer_of(description), ids[f"{SPACE}one"]
    assert tokenizer.encode("one") == tokenizer.encode(" one") == [one]
    assert tokenizer.encode("one<x>one") == [one, tokenizer.vocab_size - 1, one]
    assert tokenizer.encode("\none") == [ids[SPACE], ids[ALPHABET[list(builtin.gpt2_alphabet()).index(10)]], ids["one"]]
    assert tokenizer.encode("") == []


ADDED = [
    ("<sp>", {"special": True}),
    ("<plain>", {}),
    ("<both>", {"lstrip": True, "rstrip": True}),
    ("word", {"single_word": True}),
    ("word2", {}),
    ("late", {"normalized": True}),
]


@pytest.mark.parametrize(
    ("text", "allowed", "parts"),
    [
        ("a<plain>b", False, ["a", "<plain>", "b"]),
        ("a<sp>b", False, ["a<sp>b"]),
        ("a<sp>b", True, ["a", "<sp>", "b"]),
        ("a  <both>\n b", False, ["a", "<both>", "b"]),
        ("<both>  <both>", False, ["<both>", "<both>"]),
        ("word", False, ["word"]),
        ("a word.", False, ["a ", "word", "."]),
        ("awords", False, ["awords"]),
        ("word\u0301", False, ["word\u0301"]),
        ("sword word3", False, ["sword word3"]),
        ("word2", False, ["word2"]),
        ("late<plain>late", False, ["late", "<plain>", "late"]),
        ("<pla<plain>in>", False, ["<pla", "<plain>", "in>"]),
        ("", True, []),
    ],
)
def test_added_tokens_are_found_as_they_are_written(text, allowed, parts):
    description = described([], added=ADDED)
    tokenizer = tokenizer_of(description)
    ids = {fields["content"]: fields["id"] for fields in description["added_tokens"]}
    found = parts != [text] or text in ("word", "word2")
    expected = [ids[part] if found and part in ids else part for part in parts]
    plain = tokenizer_of(described([]))
    flat = [i for part in expected for i in ([part] if isinstance(part, int) else plain_ids(described([]), part))]
    assert tokenizer.encode(text, allow_special=allowed) == flat
    assert plain.name == "bytes" or plain.vocab_size == 256
    for content, i in ids.items():
        assert tokenizer.decode([i]) == content


# --- files


def gpt2_files(directory, names):
    """GPT-2's vocabulary and merges, under other names."""
    directory.mkdir()
    write_tokenizer(directory, get_tokenizer("gpt2"), context_length=1024)
    for name, other in zip(("vocab.json", "merges.txt"), names, strict=True):
        (directory / name).rename(directory / other)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    return directory


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_the_files_of_gpt2_are_gpt2(names, tmp_path):
    assert get_tokenizer(gpt2_files(tmp_path / "files", names)) is get_tokenizer("gpt2")


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_what_is_written_of_a_tokenizer_in_the_package_is_that_tokenizer(name, tmp_path):
    write_tokenizer(tmp_path, get_tokenizer(name), context_length=8)
    assert get_tokenizer(tmp_path) is get_tokenizer(str(tmp_path / "tokenizer.json")) is get_tokenizer(name)
    options = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options | {"add_prefix_space": True}))
    assert get_tokenizer(tmp_path).name.startswith("bpe-")


GERMAN = described(
    spelling("Guten", " Tag"), first=["<s>", "</s>"], added=[("<s>", {"special": True}), ("</s>", {"special": True})]
)
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def slow_files(directory, description, **others):
    """The same tokenizer as vocab.json, merges.txt and the older files beside them."""
    directory.mkdir()
    model = description["model"]
    added = {fields["content"]: fields["id"] for fields in description["added_tokens"]}
    vocab = {token: i for token, i in model["vocab"].items() if token not in added or i < 2}
    merges = "\n".join(["#version: 0.2", *model["merges"], ""])
    for name, content in {"vocab": vocab, "added_tokens": added, "special_tokens_map": NAMED, **others}.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "merges.txt").write_text(merges, encoding="utf-8")
    return directory


def test_older_files_and_tokenizer_json_are_the_same_tokenizer(tmp_path):
    new = get_tokenizer(saved(tmp_path, GERMAN, tokenizer_config=NAMED | {"tokenizer_class": "GPT2Tokenizer"}))
    old = get_tokenizer(slow_files(tmp_path / "slow", GERMAN))
    assert new is old
    assert (new.start, new.end_of_text, new.stop_ids) == (0, 1, (1,))
    assert new.encode("<s>Guten Tag</s>", allow_special=True) == [0, *new.encode("Guten Tag"), 1]
    assert repr(new) == f"get_tokenizer({new.name!r})"
    assert eval(repr(new)) is new


def test_config_json_says_which_ids_start_and_end_a_text(tmp_path):
    config = {"model_type": "gpt2", "bos_token_id": 5, "eos_token_id": [1, 7, 99999]}
    several = get_tokenizer(
        saved(tmp_path, GERMAN, tokenizer_config=NAMED, config=config, generation_config={"eos_token_id": 9})
    )
    assert (several.start, several.end_of_text, several.stop_ids) == (5, 1, (1, 9, 7))
    beyond = {"bos_token_id": 50256, "eos_token_id": 50256}  # transformers' defaults, left as they were
    plain = get_tokenizer(saved(tmp_path, described(spelling("ab")), config=beyond))
    assert (plain.start, plain.end_of_text, plain.stop_ids) == (None, None, ())
    assert several.name != get_tokenizer(saved(tmp_path, GERMAN, tokenizer_config=NAMED)).name


@pytest.fixture
def characters(tmp_path):
    path = tmp_path / "letters" / "characters.json"
    path.parent.mkdir()
    path.write_text(json.dumps(["\n", " ", "a", "b", "é", "中"]), encoding="utf-8")
    return path


def test_characters_of_a_list_are_ids(characters):
    tokenizer = get_tokenizer(characters)
    assert tokenizer is get_tokenizer(characters.parent)
    assert tokenizer.encode("é a\n中") == [4, 1, 2, 0, 5]
    assert tokenizer.decode([5, 4, 9], placeholders=True) == "中é<|9|>"
    assert (tokenizer.end_of_text, tokenizer.start, tokenizer.stop_ids) == (None, None, ())
    with pytest.raises(DataError, match="the tokenizer has no character 'x': it knows 6, such as"):
        tokenizer.encode("axb")


def test_a_pickle_of_characters_is_never_loaded(tmp_path):
    class Dangerous:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Dangerous()))
    for path in (tmp_path / "meta.pkl", tmp_path):
        with pytest.raises(DataError, match=r"meta.pkl: a pickle, which is never loaded: write .* characters.json"):
            get_tokenizer(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("own_ids", [False, True])
def test_what_is_written_is_the_same_tokenizer(own_ids, tmp_path, characters):
    named = {"tokenizer_config": NAMED | {"tokenizer_class": "GPT2Tokenizer"}}
    config = {"config": {"bos_token_id": 5, "eos_token_id": [1, 7]}}
    added = described(spelling("ab"), seed=1, added=ADDED)
    added["post_processor"] = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    with_processor = saved(tmp_path, added)
    for source in (
        saved(tmp_path, GERMAN, **named),
        saved(tmp_path, GERMAN, **named, **config),
        saved(tmp_path, described(spelling("ab"), prefix=True)),
        with_processor,
        characters.parent,
    ):
        tokenizer, copied = get_tokenizer(source), tmp_path / f"copy of {source.name}"
        copied.mkdir()
        write_tokenizer(copied, tokenizer, context_length=8, own_ids=own_ids)
        if not own_ids and (source / "config.json").exists():
            (copied / "config.json").write_bytes((source / "config.json").read_bytes())
        assert get_tokenizer(copied) is tokenizer
        written = json.loads((copied / "tokenizer.json").read_text(encoding="utf-8"))
        assert ("post_processor" in written) == (source == with_processor)  # for other programs


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "bpe", "chars", "hf"])
def test_ids_without_a_token_get_one_for_other_programs_that_is_dropped_again(kind, tmp_path, characters):
    rules = {"normalizer": {"type": "NFC"}}
    tokenizer = {
        "gpt2": lambda: get_tokenizer("gpt2"),
        "bytes": lambda: get_tokenizer("bytes"),
        "bpe": lambda: get_tokenizer(saved(tmp_path, described(spelling("ab"), added=ADDED))),
        "chars": lambda: get_tokenizer(characters),
        "hf": lambda: get_tokenizer(saved(tmp_path, {**described([], first=["<s>"], added=[("<s>", {})]), **rules})),
    }[kind]()
    assert tokenizer.name.startswith(kind)
    size, out = tokenizer.vocab_size, tmp_path / "out"
    out.mkdir()
    write_tokenizer(out, tokenizer, context_length=8, vocab_size=size + 3, own_ids=True)
    vocabulary = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(size + 3))
    assert [vocabulary[f"<|{i}|>"] for i in range(size, size + 3)] == [size, size + 1, size + 2]
    assert get_tokenizer(out) is tokenizer
    if kind not in ("chars", "hf"):  # these have no older files
        assert json.loads((out / "vocab.json").read_text(encoding="utf-8")) == vocabulary
        (out / "tokenizer.json").unlink()
        assert get_tokenizer(out) is tokenizer


def test_tokens_of_its_own_are_no_placeholders(tmp_path):
    size = len(described([])["model"]["vocab"])
    own, out = described([], added=[(f"<|{size}|>", {}), (f"<|{size + 1}|>", {})]), tmp_path / "out"
    del own["added_tokens"][0]  # a token in the middle, not found in a text
    tokenizer = get_tokenizer(saved(tmp_path, own))
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.encode(f"<|{size + 1}|>") == [size + 1]
    taken = described([], first=[f"<|{size + 1}|>"])  # the text that a placeholder would have
    words = {**described([]), "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}  # makes it of a text
    beside = {**described([], added=[("<new>", {})]), "normalizer": {"type": "NFC"}}
    del beside["model"]["vocab"]["<new>"]  # its id would be another one
    for description in (taken, words, beside):
        tokenizer = get_tokenizer(saved(tmp_path, description))
        out.mkdir(exist_ok=True)
        write_tokenizer(out, tokenizer, context_length=8, vocab_size=tokenizer.vocab_size + 2)
        written = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        assert written == description["model"]["vocab"]


def test_a_tokenizer_carries_its_content_to_other_processes(tmp_path, monkeypatch):
    tokenizer = get_tokenizer(saved(tmp_path, GERMAN))
    assert copy.deepcopy(tokenizer) is tokenizer
    sent = pickle.dumps([tokenizer, get_tokenizer("gpt2")])
    monkeypatch.setattr(registry, "_built", {})  # as in a process that has read nothing
    with pytest.raises(ConfigError, match=f"{tokenizer.name} is known by its content, which this process has not read"):
        get_tokenizer(tokenizer.name)
    received, gpt2 = pickle.loads(sent)
    assert received is not tokenizer
    assert len({received, tokenizer, gpt2}) == 2  # the same content is the same tokenizer
    assert get_tokenizer(tokenizer.name) is received
    assert received.encode("Guten Tag") == tokenizer.encode("Guten Tag")
    assert gpt2 is get_tokenizer("gpt2")


def test_a_hub_name_fetches_the_tokenizer_alone(tmp_path, monkeypatch):
    directory = saved(tmp_path, GERMAN)
    asked = []

    def download(name, *, with_tensors):
        asked.append((name, with_tensors))
        return directory

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.chdir(tmp_path)
    assert get_tokenizer("someone/german-gpt2").encode("Guten") == [GERMAN["model"]["vocab"]["Guten"]]
    assert asked == [("someone/german-gpt2", False)]


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "OpenAIGPTTokenizer"])
def test_older_files_of_a_class_with_other_rules_are_refused(kind, tmp_path):
    directory = slow_files(tmp_path / "slow", GERMAN, tokenizer_config={"tokenizer_class": kind})
    with pytest.raises(DataError, match=f"merges.txt: says nothing of the rules of '{kind}': transformers' AutoTok"):
        get_tokenizer(directory)


# --- damaged files


def changed(**parts):
    """GERMAN with parts of its model changed."""
    description = copy.deepcopy(GERMAN)
    description["model"] |= parts
    return description


def vocabulary(**tokens):
    return {"vocab": {token: i for token, i in {**GERMAN["model"]["vocab"], **tokens}.items() if i is not None}}


BAD = {
    "an id of two tokens": (changed(**vocabulary(Guten=5)), "id 5 belongs to two tokens, .* and 'Guten'"),
    "an id that no token has": (
        changed(**vocabulary(new=400)),
        "no token has the id .*, although there are ids up to 400",
    ),
    "a huge id": (
        changed(**vocabulary(new=10**9)),
        "the id of 'new' is 1000000000: expected an integer below 16,777,216",
    ),
    "a negative id": (changed(**vocabulary(new=-1)), "the id of 'new' is -1"),
    "an id that is no integer": (changed(**vocabulary(new=1.5)), "the id of 'new' is 1.5"),
    "no vocabulary": (changed(vocab=7), "expected an object 'vocab'"),
    "merges of tokens without ids": (
        changed(merges=["G u", "x y"]),
        "the merge 'x y' needs the token 'xy', which has no id",
    ),
    "a merge of one token": (changed(merges=["G"]), "the merge 'G' is not two tokens"),
    "a merge of nothing": (changed(merges=[" u"]), "the merge ' u' is not two tokens"),
    "merges that are no list": (changed(merges={}), "expected a list 'merges'"),
    "no model": ({"model": []}, "expected an object 'model'"),
    "a lone surrogate": (changed(**vocabulary(**{"\ud800": len(GERMAN["model"]["vocab"])})), "a lone surrogate"),
    "added tokens that are no list": ({**GERMAN, "added_tokens": [1]}, "expected a list of objects 'added_tokens'"),
    "an added token with two ids": (
        {**GERMAN, "added_tokens": [{"id": 7, "content": "<s>"}]},
        "the id of the added token '<s>' is 7, and elsewhere 0",
    ),
    "an added token with another's id": (
        {**GERMAN, "added_tokens": [{"id": 0, "content": "<x>"}]},
        "id 0 belongs to two tokens, '<s>' and '<x>'",
    ),
    "an added token with a huge id": (
        {**GERMAN, "added_tokens": [{"id": 10**12, "content": "<x>"}]},
        "the id of the added token '<x>' is 1000000000000",
    ),
    "a flag that is none": (
        {**GERMAN, "added_tokens": [{"id": 0, "content": "<s>", "special": 1}]},
        "special of the added token '<s>' is 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_tokenizer_is_refused_by_what_is_wrong(case, tmp_path):
    description, message = BAD[case]
    with pytest.raises(DataError, match=message):
        get_tokenizer(saved(tmp_path, description))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"model": {"vocab": {"a": 0, "a": 1}}}', "key 'a' appears twice"),
        ('{"model": {"vocab": 1e999}}', "expected an object 'vocab'"),
        ("7", "expected a tokenizer.json"),
        ('["a", "bc"]', "entry 1 is 'bc': expected one character"),
        ('["a", "b", "a"]', "the character 'a' has two ids, 0 and 2"),
        ("[]", "expected a list of characters"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(content, message, tmp_path):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises((DataError, ConfigError), match=message):
        get_tokenizer(tmp_path / "file.json")


def test_a_directory_without_a_tokenizer_says_which_files_it_lacks(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"holds no tokenizer; expected one of: tokenizer.json; vocab.json and merges.txt"
    ):
        get_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(DataError, match=r"spiece.model: a SentencePiece model: transformers' AutoTokenizer"):
        get_tokenizer(tmp_path)


# --- other kinds, which need the extra [tokenizers]


def word_piece(tmp_path, **options):
    """The files of a Chinese GPT-2: BERT's vocabulary."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "中", "文", "gut", "##en", "."]
    directory = tmp_path / "chinese"
    directory.mkdir()
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **options}))
    return directory


def small(tokenizer, **fields):
    sizes = {"context_length": 16, "emb_dim": 8, "n_heads": 2, "n_layers": 1, "drop_rate": 0.0}
    return GPTConfig(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.name, **sizes | fields)


def test_threads_that_differ_in_special_tokens_do_not_meet(tmp_path, monkeypatch):
    class Library:
        encode_special_tokens = None

        def encode(self, text, add_special_tokens):
            before = self.encode_special_tokens
            time.sleep(0.05)  # the other thread's turn
            return types.SimpleNamespace(ids=[before, self.encode_special_tokens])

    tokenizer = get_tokenizer(word_piece(tmp_path))
    monkeypatch.setattr(tokenizer, "_library_or_error", Library())
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda allowed: tokenizer.encode("a", allow_special=allowed), [True, False])
    assert list(results) == [[False, False], [True, True]]


def test_without_the_library_ids_work_and_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr(registry, "_built", {})
    tokenizer = get_tokenizer(word_piece(tmp_path))
    assert (tokenizer.name[:3], tokenizer.vocab_size) == ("hf-", 10)
    model, params = make_model(small(tokenizer))
    weights.save(tmp_path / "model", model, params)
    model, params = weights.load(tmp_path / "model")
    assert len(generate(model, params, [[1, 2]], 3).new_tokens[0]) == 3
    assert tokenizer.count_bytes([1]) is None
    assert Tokens.from_ids([1, 2, 9], tokenizer.name).tokenizer == tokenizer.name
    reason = r"whose tokenizer is of the kind WordPiece needs 'tokenizers': pip install 'jaxgpt\[tokenizers\]'"
    for call in (
        lambda: tokenizer.encode("中"),
        lambda: tokenizer.decode([5]),
        lambda: generate_text(model, params, "中", 3),
        lambda: list(stream(model, params, [1, 2], 3)),
    ):
        with pytest.raises(MissingExtraError, match=reason):
            call()


def test_bert_s_word_pieces_come_from_vocab_txt(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = get_tokenizer(word_piece(tmp_path))
    assert tokenizer.encode("中文 Guten.[SEP]", allow_special=True) == [5, 6, 7, 8, 9, 3]
    assert tokenizer.decode([5, 6, 7, 8, 9, 12], placeholders=True) == "中 文 guten.<|12|>"
    assert tokenizer.count_bytes([5]) is None
    assert (tokenizer.end_of_text, tokenizer.stop_ids) == (None, ())


def test_byte_pairs_with_other_rules_are_the_librarys(tmp_path):
    others = {
        "out of order": described([("ab", "c"), ("a", "b")]),
        "ignores merges": described(spelling("ab"), ignore_merges=True),
        "lacks a byte": changed(vocab={}, merges=[]),
        "another pattern": {**described([]), "pre_tokenizer": {"type": "Whitespace"}},
        "normalized": {**described([]), "normalizer": {"type": "NFC"}},
    }
    for case, description in others.items():
        assert tokenizer_of_kind(description) == "hf", case
    assert tokenizer_of_kind(described([("a", "b"), ("ab", "c")])) == "bpe"


def tokenizer_of_kind(description):
    return parsing.content_of(Path("tokenizer.json"), description, parsing.Beside()).kind


# --- the tokenizer travels with its model


@pytest.fixture
def german(tmp_path):
    """A directory in Hugging Face's format, of a GPT-2 with its own vocabulary."""
    tokenizer = get_tokenizer(saved(tmp_path, GERMAN, tokenizer_config=NAMED | {"tokenizer_class": "GPT2Tokenizer"}))
    weights.save(tmp_path / "german", *make_model(small(tokenizer)), format="huggingface")
    return tmp_path / "german"


@pytest.fixture
def new_process(monkeypatch):
    """Makes this process forget every tokenizer."""

    def forget():
        monkeypatch.setattr(registry, "_built", {})

    return forget


def test_a_model_reads_text_by_the_tokenizer_beside_its_weights(german, new_process):
    new_process()
    model, params = jaxgpt.load(german)
    assert encode_prompt(model.config, "Guten Tag") != [38, 7809, 17467]
    ids = get_tokenizer(model.config.tokenizer).encode("Guten Tag")
    assert [GERMAN["model"]["vocab"][token] for token in ("Guten", f"{SPACE}Tag")] == ids
    drawn = generate(model, params, [ids], 4, stop_ids=[1]).new_tokens[0].tolist()
    text = get_tokenizer(german).decode([i for i in drawn if i != 1])
    assert generate_text(model, params, "Guten Tag", 4) == [f"Guten Tag{text}"]
    assert "".join(stream(model, params, "Guten Tag", 4)) == text
    assert encode_prompt(model.config, "") == [0]
    assert default_stop_ids(model.config) == (1,)
    assert default_stop_ids(model.config.replace(vocab_size=1)) == ()


@pytest.mark.parametrize("format", ["jaxgpt", "huggingface"])
def test_conversions_take_the_tokenizer_along(format, german, tmp_path, new_process, capsys):
    name = load_config(german).tokenizer
    new_process()
    assert main(["convert", str(german), str(tmp_path / "out"), "--format", format]) == 0
    assert f"tokenizer {name}" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "out"), "--format", format, "--force"]) == 0
    new_process()
    assert load_config(tmp_path / "out") == load_config(german)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert f"tokenizer {name}" in capsys.readouterr().out


def test_a_directory_of_ours_whose_tokenizer_is_lost_or_another_is_refused(german, tmp_path):
    weights.save(tmp_path / "own", *weights.load(german))
    other = get_tokenizer(saved(tmp_path, described(spelling("ab"))))
    write_tokenizer(tmp_path / "own", other, context_length=16)
    with pytest.raises(CheckpointError, match=f"names the tokenizer bpe-.*, and beside it lies {other.name}: restore"):
        weights.load(tmp_path / "own")
    for name in FILES:
        (tmp_path / "own" / name).unlink()
    with pytest.raises(CheckpointError, match=r"and beside it lies none: restore the tokenizer's files, or say which"):
        weights.load(tmp_path / "own")
    assert weights.load(tmp_path / "own", tokenizer="bytes")[0].config.tokenizer == "bytes"


def test_damaged_tokenizer_files_do_not_keep_the_weights_from_being_read(german):
    (german / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: expected an object 'model'"):
        weights.load(german)
    model = weights.load(german, tokenizer="none")[0]
    assert model.config.tokenizer == "none"
    for call in (
        lambda: encode_prompt(model.config, "Guten Tag"),
        lambda: encode_prompt(model.config, ""),
        lambda: get_tokenizer("none").encode("", allow_special=True),
    ):
        with pytest.raises(DataError, match=r"no tokenizer came with this model, so it takes ids and no text: put"):
            call()
    assert get_tokenizer("none").decode([5], placeholders=True) == "<|5|>"
    assert get_tokenizer("none").count_bytes([5]) is None
    assert Tokens.from_ids([5, 300], "none").vocab_size == 301


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [(65, "none"), (257, "none"), (50256, "none"), (50257, "gpt2"), (50304, "gpt2"), (50305, "none")],
)
def test_a_model_without_tokenizer_files_has_openais_only_at_its_size(vocab_size, name, tmp_path):
    sizes = {"n_positions": 8, "n_embd": 4, "n_head": 1, "n_layer": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": vocab_size, **sizes}))
    assert load_config(tmp_path).tokenizer == name
    (tmp_path / "spiece.model").write_bytes(b"")  # there is one, if only transformers can read it
    assert load_config(tmp_path).tokenizer == "none"


def test_a_character_model_takes_its_characters_when_it_is_loaded(characters, tmp_path, new_process):
    config = GPTConfig(vocab_size=6, context_length=16, emb_dim=64, n_heads=1, n_layers=1, drop_rate=0.0)
    model, params = make_model(config)
    weights.save(tmp_path / "model", model, params)
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "new"), "--tokenizer", str(characters)]) == 0
    new_process()
    loaded, params = weights.load(tmp_path / "new")
    assert encode_prompt(loaded.config, "é a") == [4, 1, 2]
    assert generate_text(loaded, params, "é a", 0) == ["é a"]
    with pytest.raises(ValueError, match=r"the prompt '' has no tokens, and tokenizer 'chars-.*' has none to start"):
        encode_prompt(loaded.config, "")


def test_token_files_name_their_tokenizer_by_content(german, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Guten Tag " * 9)
    assert main(["tokenize", str(tmp_path / "text.txt"), str(tmp_path / "tokens"), "--tokenizer", str(german)]) == 0
    config = load_config(german)
    assert f"(tokenizer {config.tokenizer}, vocabulary {config.vocab_size})" in capsys.readouterr().out
    tokens = open_tokens(tmp_path / "tokens", config)
    np.testing.assert_array_equal(tokens.ids_N, open_tokens(tmp_path / "text.txt", config).ids_N)
    with pytest.raises(DataError, match=f"made by tokenizer '{config.tokenizer}', but the model has 'gpt2'"):
        open_tokens(tmp_path / "tokens", GPTConfig())
    changed_ids = get_tokenizer(saved(tmp_path, described(spelling("Guten", " Tag"), seed=4)))
    with pytest.raises(DataError, match=f"but the model has '{changed_ids.name}'"):
        open_tokens(tmp_path / "tokens", config.replace(tokenizer=changed_ids.name))


def test_a_config_file_may_name_a_tokenizer_by_its_path(german, tmp_path):
    toml = tmp_path / "config.toml"
    toml.write_text(f"[model]\ntokenizer = {json.dumps(str(german))}\n")
    assert GPTConfig.from_file(toml).tokenizer == load_config(german).tokenizer
    toml.write_text('[model]\ntokenizer = "gpt-2"\n')
    with pytest.raises(ConfigError, match=r"config.toml.*: tokenizer: no tokenizer 'gpt-2'; did you mean 'gpt2'\?"):
        GPTConfig.from_file(toml)
    with pytest.raises(ConfigError, match=r"tokenizer must be gpt2, bytes, none, or .* not '/a/path'"):
        GPTConfig(tokenizer="/a/path")


@pytest.mark.exhaustive
def test_a_run_keeps_its_tokenizer(german, tmp_path, new_process, capsys):
    (tmp_path / "text.txt").write_text("Guten Tag, guten Tag. " * 40)
    name = load_config(german).tokenizer
    (tmp_path / "config.toml").write_text(
        f"[model]\nvocab_size = {load_config(german).vocab_size}\ncontext_length = 8\nemb_dim = 8\nn_heads = 2\n"
        "n_layers = 1\n[train]\nsteps = 2\nbatch_size = 2\nsample_tokens = 2\nsample_prompt = 'Guten Tag'\n"
    )
    run, arguments = tmp_path / "run", [str(tmp_path / "config.toml"), "--data", str(tmp_path / "text.txt")]
    chosen = ["--set", f"model.tokenizer={german}"]
    assert main(["train", *arguments, "--out", str(run), *chosen]) == 0
    assert f"tokenizer {name}" in capsys.readouterr().err
    tuned = tmp_path / "tuned"
    (tmp_path / "t.toml").write_text("[train]\nsteps = 1\nbatch_size = 2\n")
    assert (
        main(["train", str(tmp_path / "t.toml"), *arguments[1:], "--out", str(tuned), "--init-from", str(german)]) == 0
    )
    for path in german.iterdir():
        path.unlink()
    for directory in (run, tuned):
        new_process()
        assert main(["train", "--resume", str(directory), "--set", "steps=3"]) == 0
        assert Run(directory).config().model.tokenizer == name
        new_process()
        assert main(["export", str(directory), str(tmp_path / "out"), "--force"]) == 0
        new_process()
        assert load_config(tmp_path / "out").tokenizer == load_config(directory).tokenizer == name
        assert get_tokenizer(directory).name == name
        assert main(["generate", "--model", str(directory), "--prompt", "Guten Tag", "--max-new-tokens", "2"]) == 0
        assert "\nGuten Tag" in capsys.readouterr().out
    new_process()
    (run / "tokenizer" / "tokenizer.json").unlink()
    (run / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match=f"expected the files of tokenizer {name}, not none"):
        Run(run).config()
