"""Thousands of damaged and hostile files: every reader returns what the file holds or raises an error that it
documents, in bounded memory, and executes nothing. Each case is seeded with its number, so failures reproduce."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import tarfile
import tracemalloc
import zipfile

import jax
import msgpack as packer
import numpy as np
import pytest
from flax import serialization
from helpers import TINY, make_model, to_toml
from safetensors.numpy import save_file
from test_sources import WRITERS
from test_tokenizer_files import SPACE, described, saved, slow_files
from test_weights import (
    BOOK,
    INDEX,
    book_tensors,
    flax_tree,
    hf_config,
    hf_tensors,
    nanogpt_checkpoint,
    write_flax,
    write_hf,
    write_shards,
)
from test_weights_bad_input import Canary
from test_weights_llmc import llmc_file
from test_weights_openai import SMALL, block, bundle, openai_tensors, table, write_openai

from jaxgpt import hub
from jaxgpt.config import GPTConfig
from jaxgpt.data import Corpus, Source, Tokens, open_corpus, open_tokens, tokenize
from jaxgpt.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from jaxgpt.textfile import read_json, read_toml
from jaxgpt.tokenizer import get_tokenizer, registry
from jaxgpt.training.checkpoints import Checkpoints
from jaxgpt.training.config import TrainConfig
from jaxgpt.training.run_directory import Run
from jaxgpt.weights import formats as weights

pytestmark = pytest.mark.usefixtures("compiled_quickly")

DOCUMENTED = (CheckpointError, ConfigError, DataError)
# Limit on the memory of Python and NumPy; a good file of that size takes a few hundred kilobytes.
MEMORY = 32e6
BYTES = TINY.replace(vocab_size=257, tokenizer="bytes")
TRAIN = TrainConfig(model=BYTES, steps=8, warmup_steps=2)

ODD = [
    None, True, False, -1, 0, 1, 2, 3, 24, 255, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, -(2**63), 0.5, 2.0, -0.0,
    1e308, float("nan"), float("inf"), "", "a", "F32", "F16", "I8", "F4", "BOOL", "a\0b", "\ud800", "\u202e",
    "é" * 300, "x" * 20_000, "../../elsewhere.safetensors", "/etc/passwd", "model.safetensors", [], [[]], [0, 0],
    [0, 2**40], [2**40, 2**40], [8, 0], [-1, 5], [1.0, 2.0], ["1"], {}, {"a": 1}, list(range(1000)),
]  # fmt: skip


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@contextlib.contextmanager
def watched(case, seconds=20):
    """Fails if the block uses more than `MEMORY`, or takes far longer than any case should."""

    def give_up(*_):
        pytest.fail(f"{case}: still not finished")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY, case
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refused(read, case):
    """Whether `read` raised a documented error with a readable message; fails if it raises anything else."""
    try:
        read()
    except DOCUMENTED as error:
        message = str(error)
        assert 10 < len(message) < 10_000, case
        message.encode()  # no lone surrogates: it can be printed
        return True
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__} is not documented") from error
    return False


def fuzz(cases, path, mutate, read):
    """Reads `cases` mutations of the file at `path` and returns how many were refused; restores the file."""
    good, count = path.read_bytes(), 0
    with watched(path.name, seconds=300):
        for case in range(cases):
            path.write_bytes(mutate(good, random.Random(case)))
            count += refused(read, f"{path.name}, case {case}")
    path.write_bytes(good)
    assert not refused(read, "the undamaged file")
    return count


# --- mutations


def any_bytes(good, rng, limit=None):
    """Makes one to three random edits in the first `limit` bytes: changes, deletes or repeats bytes, or truncates."""
    content, limit = bytearray(good), limit or len(good)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(limit), rng.randint(1, 8)
        kind = rng.randrange(6)
        if kind <= 1:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            content[at : at + length] = rng.choice([b"\0", b"\xff"]) * length
        elif kind == 3:
            del content[at : at + length]
        elif kind == 4:
            content[at:at] = content[at : at + 4 * length]
        else:
            del content[at:]
        if not content:
            break
    return bytes(content)


def header_bytes(good, rng):
    return any_bytes(good, rng, limit=8 + int.from_bytes(good[:8], "little"))


def structure_bytes(good, rng):
    """Makes one or two edits around the names and types in a msgpack file, where its structure is."""
    content = bytearray(good)
    for _ in range(rng.randint(1, 2)):
        at = rng.choice([found.start() for found in re.finditer(rb"[a-z_]{3,}\d*", content)] or [0])
        at = max(0, at + rng.randint(-8, 12))
        kind = rng.randrange(5)
        if kind <= 1:
            content[at : at + 1] = bytes([rng.choice([*range(0x80, 0xE0), 0, 1, 2, 0xFF])])
        elif kind == 2:
            content[at : at + rng.randint(1, 4)] = rng.choice([b"\xff", b"\0"]) * rng.randint(1, 4)
        elif kind == 3:
            content[at:at] = rng.choice([b"\xdf", b"\xdd", b"\xc9", b"\xc6", b"\xdb"]) + rng.randbytes(4)
        else:
            content[at:at] = b"\x81\xa1a" * rng.choice([1, 30, 5000])
    return bytes(content)


def any_json(tree, rng):
    """Text of a JSON tree in which one or two places hold something odd, or are missing, moved or duplicated."""
    tree, twice = copy.deepcopy(tree), None
    for _ in range(rng.randint(1, 2)):
        parent, key = None, None
        node = tree
        while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.8):
            parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = parent[key]
        kind = rng.randrange(10)
        if parent is None or kind == 9:
            return json.dumps(rng.choice([*ODD, nested(500)]))
        if kind == 8 and isinstance(parent, dict):
            twice = (key, parent[key])
        elif kind == 7:
            del parent[key]
        elif kind == 6 and isinstance(parent, dict):
            parent[str(rng.choice(ODD))] = parent.pop(key)
        elif kind == 5:
            parent[key] = nested(rng.choice([5, 100, 400]))
        elif kind == 4 and isinstance(node, int):
            parent[key] = node + rng.choice([-8, -1, 1, 4, 2**20, 2**40, 2**62])
        else:
            parent[key] = rng.choice(ODD)
    text = json.dumps(tree)
    if twice and isinstance(tree, dict):
        text = f"{{{json.dumps(twice[0])}: {json.dumps(twice[1])}, {text[1:]}"
    return text


def header_json(good, rng):
    """Changes the structure of a safetensors header. Its length stays right; sometimes that or the data is not."""
    size = int.from_bytes(good[:8], "little")
    text = any_json(json.loads(good[8 : 8 + size]), rng).encode()
    length = (
        len(text) if rng.random() < 0.95 else rng.choice([0, 1, len(text) - 1, len(text) + 8, 2**32, 2**62, 2**64 - 1])
    )
    return struct.pack("<Q", length) + text + good[8 + size :]


def json_file(good, rng):
    return any_json(json.loads(good), rng).encode() if rng.random() < 0.7 else any_bytes(good, rng)


TOML_VALUES = [
    "-1", "0", "9" * 30, "9" * 5000, f"0x{'f' * 5000}", "1e999", "nan", "-inf", "1.5", '"x"', "[]", "{}", "true",
    "1979-05-27T07:32:00Z", "07:32:00", "[" * 2000, "{a=" * 500, '"\\ud800"', "'''", f'"{"x" * 5000}"',
]  # fmt: skip
TOML_LINES = [
    "{key} = {value}", "{line}\n{line}", "", "{key}.a.b = {value}", "[{key}]", "[[{key}]]", "{long}a = 1",
    "x = {{{longer}a = 1}}", "[model.{long}a]", "preset = {value}", '"a\\u0000" = {value}', "[mesh]\n{key} = {value}",
]  # fmt: skip


def toml_file(good, rng):
    """Replaces a line or two, or edits random bytes."""
    if rng.random() < 0.2:
        return any_bytes(good, rng)
    lines = good.decode().splitlines()
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines))
        lines[at] = rng.choice(TOML_LINES).format(
            line=lines[at],
            key=lines[at].partition(" = ")[0],
            value=rng.choice(TOML_VALUES),
            long="a." * 250,
            longer="a." * 30_000,
        )
    return "\n".join(lines).encode()


# --- checkpoints


@pytest.fixture(scope="module")
def params():
    return make_model(TINY)[1]


def loads(path, params=None, **options):
    """A reader that must return a whole model if it succeeds."""

    def read():
        model, got = weights.load(path, **options)
        assert params is None or jax.tree.structure(got) == jax.tree.structure(params)
        assert model.config.emb_dim == got["tok_emb"]["weight"].shape[1]

    return read


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mutate", "cases"), [(header_bytes, 400), (header_json, 600)])
def test_own_directory_with_a_damaged_header(mutate, cases, params, tmp_path):
    weights.save(tmp_path / "model", make_model(TINY)[0], params)
    count = fuzz(cases, tmp_path / "model" / "model.safetensors", mutate, loads(tmp_path / "model", params))
    assert count > 0.9 * cases


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mutate", "cases"), [(header_bytes, 200), (header_json, 400)])
def test_hugging_face_directory_with_a_damaged_header(mutate, cases, params, tmp_path):
    write_hf(tmp_path, TINY, hf_tensors(params))
    assert fuzz(cases, tmp_path / "model.safetensors", mutate, loads(tmp_path, params)) > 0.8 * cases


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mutate", "cases"), [(header_bytes, 200), (header_json, 400)])
def test_book_file_with_a_damaged_header(mutate, cases, tmp_path):
    save_file(book_tensors(make_model(BOOK)[1]), tmp_path / "book.safetensors")
    count = fuzz(cases, tmp_path / "book.safetensors", mutate, loads(tmp_path / "book.safetensors", n_heads=3))
    assert count > 0.8 * cases


@pytest.mark.exhaustive
def test_damaged_index_of_shards(params, tmp_path):
    write_shards(tmp_path, TINY, hf_tensors(params))
    assert fuzz(800, tmp_path / INDEX, json_file, loads(tmp_path, params)) > 500


@pytest.mark.parametrize("format", ["jaxgpt", "huggingface"])
def test_damaged_config_json(format, params, tmp_path):
    weights.save(tmp_path / "model", make_model(TINY)[0], params, format=format)
    read = functools.partial(weights.load_config, tmp_path / "model")
    assert fuzz(800, tmp_path / "model" / "config.json", json_file, read) > 400


def test_truncated_at_any_byte(params, tmp_path):
    weights.save(tmp_path / "model", make_model(TINY)[0], params)
    path = tmp_path / "model" / "model.safetensors"
    good = path.read_bytes()
    with watched(path.name):
        for length in [*range(300), *range(300, len(good), 997)]:
            path.write_bytes(good[:length])
            assert refused(loads(tmp_path / "model"), length), length


def zipped(entries, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(entries):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def torch_file(good, rng):
    """Edits the archive, or the pickle in it."""
    if rng.random() < 0.4:
        return any_bytes(good, rng)
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    entries[name] = any_bytes(entries[name], rng)
    return zipped(entries)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mutate", "cases"), [(any_bytes, 300), (structure_bytes, 1500)])
def test_damaged_flax_msgpack(mutate, cases, tmp_path):
    config = GPTConfig(vocab_size=5, context_length=4, emb_dim=2, n_heads=1, n_layers=1)
    small = make_model(config)[1]
    write_flax(tmp_path, config, flax_tree(small))
    assert fuzz(cases, tmp_path / "flax_model.msgpack", mutate, loads(tmp_path, small)) > 0.5 * cases


@pytest.mark.exhaustive
def test_damaged_chunks_in_a_flax_msgpack(tmp_path, monkeypatch):
    config = GPTConfig(vocab_size=5, context_length=4, emb_dim=2, n_heads=1, n_layers=1)
    small = make_model(config)[1]
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    write_flax(tmp_path, config, flax_tree(small))
    assert fuzz(600, tmp_path / "flax_model.msgpack", structure_bytes, loads(tmp_path, small)) > 450


def test_a_flax_msgpack_truncated_at_any_byte(params, tmp_path):
    path = write_flax(tmp_path, TINY, flax_tree(params)) / "flax_model.msgpack"
    good = path.read_bytes()
    with watched(path.name):
        for length in [*range(100), *range(100, len(good), 997)]:
            path.write_bytes(good[:length])
            assert refused(loads(tmp_path), length), length


def index_entries(items, rng):
    """An index with the right checksums, in which names, values, a block or the block of places have been edited."""
    items, blocks = list(items), []
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(items))
        name, value = items[at]
        kind = rng.randrange(4)
        if kind == 0:
            items[at] = any_bytes(name or b"a", rng), value
        elif kind == 1:
            items[at] = name, any_bytes(value, rng)
        elif kind == 2:
            items.insert(rng.randrange(len(items)), items[at])
        else:
            del items[at]
    size = rng.choice([3, 1000])
    blocks = [block(items[i : i + size]) for i in range(0, len(items), size)]
    if rng.random() < 0.3:
        at = rng.randrange(len(blocks))
        blocks[at] = any_bytes(blocks[at], rng)
    return table(blocks)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("entries", "cases"), [(False, 400), (True, 1500)])
def test_damaged_tensorflow_index(entries, cases, tmp_path):
    small = make_model(SMALL)[1]
    write_openai(tmp_path, SMALL, small)
    items = bundle(tmp_path / "model.ckpt", openai_tensors(small))

    def mutate(good, rng):
        return index_entries(items, rng) if entries else any_bytes(good, rng)

    assert fuzz(cases, tmp_path / "model.ckpt.index", mutate, loads(tmp_path, small)) > 0.9 * cases


def test_a_tensorflow_index_truncated_at_any_byte(tmp_path):
    path = write_openai(tmp_path, SMALL, make_model(SMALL)[1]) / "model.ckpt.index"
    good = path.read_bytes()
    with watched(path.name):
        for length in [*range(0, len(good), 13), *range(len(good) - 50, len(good))]:
            path.write_bytes(good[:length])
            assert refused(loads(tmp_path), length), length


@pytest.mark.parametrize("name", ["hparams.json", "checkpoint"])
def test_damaged_files_beside_a_tensorflow_checkpoint(name, tmp_path):
    write_openai(tmp_path, SMALL, make_model(SMALL)[1])
    mutate = json_file if name == "hparams.json" else any_bytes
    read = functools.partial(weights.load_config, tmp_path)
    assert fuzz(200, tmp_path / name, mutate, read) > (100 if name == "hparams.json" else 25)


@pytest.mark.exhaustive
def test_damaged_llmc_header(tmp_path):
    small = make_model(SMALL)[1]
    (tmp_path / "gpt2.bin").write_bytes(llmc_file(SMALL, small))
    mutate = functools.partial(any_bytes, limit=32)
    assert fuzz(1000, tmp_path / "gpt2.bin", mutate, loads(tmp_path / "gpt2.bin", small)) > 900


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.filterwarnings("ignore")  # torch's warnings about damaged files
def test_damaged_pytorch_bin(old, params, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(array)) for name, array in hf_tensors(params).items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    # The old format begins with its pickles.
    mutate = functools.partial(any_bytes, limit=4000) if old else torch_file
    assert fuzz(200, tmp_path / "pytorch_model.bin", mutate, loads(tmp_path, params)) > 100


@pytest.mark.parametrize("kind", ["book", "nanogpt"])
@pytest.mark.filterwarnings("ignore")  # torch's warnings about damaged files
def test_damaged_torch_file(kind, params, tmp_path):
    torch = pytest.importorskip("torch")
    if kind == "book":
        content = {name: torch.from_numpy(array) for name, array in book_tensors(make_model(BOOK)[1]).items()}
    else:
        content = nanogpt_checkpoint(TINY, params)
    torch.save(content, tmp_path / "model.pt")
    options = {"n_heads": 3} if kind == "book" else {}
    assert fuzz(200, tmp_path / "model.pt", torch_file, loads(tmp_path / "model.pt", **options)) > 100


def test_a_torch_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    pytest.importorskip("torch")
    content = pickle.dumps({"tok_emb.weight": "x" * 200_000_000}, protocol=2)
    (tmp_path / "bomb.pt").write_bytes(zipped({"a/data.pkl": content, "a/version": b"3"}, zipfile.ZIP_DEFLATED))
    del content
    assert (tmp_path / "bomb.pt").stat().st_size < 1e6
    with watched("bomb"), pytest.raises(CheckpointError, match="compressed archive"):
        weights.load(tmp_path / "bomb.pt")


def test_a_torch_file_of_lists_within_lists_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    content = nanogpt_checkpoint(TINY, make_model(TINY)[1])
    laughs = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]  # 2^60 of them, if written out
    for change in ({"n_layer": laughs}, {"unknown": laughs}, {"vocab_size": {1: laughs}}):
        torch.save({**content, "model_args": content["model_args"] | change}, tmp_path / "ckpt.pt")
        with watched("laughs"), pytest.raises(ConfigError, match="model_args"):
            weights.load(tmp_path / "ckpt.pt")


# --- tokenizers


def reads_text(path):
    """A reader that must encode a text and decode all ids if it succeeds."""

    def read():
        registry._built.clear()
        tokenizer = get_tokenizer(path)
        with contextlib.suppress(MissingExtraError):
            ids = tokenizer.encode("ab <s>é", allow_special=True)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode(range(min(tokenizer.vocab_size, 1000)))
        repr(tokenizer), tokenizer.stop_ids, tokenizer.text_ids

    return read


TOKENIZER = described(
    [("a", "b"), (SPACE, "ab")],
    seed=1,
    first=["<s>", "</s>"],
    added=[("<s>", {"special": True}), ("new", {"lstrip": True, "single_word": True})],
)
BESIDE = {
    "tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_prefix_space": True, "x": [1]},
    "special_tokens_map": {"eos_token": {"content": "</s>", "rstrip": False}, "additional_special_tokens": ["<s>"]},
    "added_tokens": {"new": 260},
    "config": {"model_type": "gpt2", "bos_token_id": 3, "eos_token_id": [4, 5]},
    "generation_config": {"eos_token_id": 6},
    "tokenizer_config_of_ours": {"jaxgpt_ids": {"end_of_text": 1, "start": None, "stop_ids": [1, 2]}},
    "tokenizer_config_of_transformers": {"added_tokens_decoder": {"260": {"content": "new", "special": False}}},
}


@pytest.mark.parametrize("name", [None, *BESIDE])
def test_damaged_tokenizer_files(name, tmp_path):
    directory = saved(tmp_path, TOKENIZER)
    damaged = directory / f"{(name or 'tokenizer').partition('_of_')[0]}.json"
    for other, content in BESIDE.items():
        if "_of_" not in other or other == name:
            (directory / f"{other.partition('_of_')[0]}.json").write_text(json.dumps(content))
    cases = 250 if name is None else 60
    assert fuzz(cases, damaged, json_file, reads_text(directory)) > cases // 10


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "vocab.txt", "characters.json"])
def test_damaged_older_tokenizer_files(name, tmp_path):
    if name in ("vocab.json", "merges.txt"):
        slow_files(tmp_path / "files", TOKENIZER)
    else:
        (tmp_path / "files").mkdir()
        (tmp_path / "files" / "vocab.txt").write_text("[PAD]\n[UNK]\na\nb\n##b\n")
        if name == "characters.json":
            (tmp_path / "files" / "vocab.txt").unlink()
            (tmp_path / "files" / name).write_text(json.dumps(["a", "b", " ", "<", ">", "s", "é"]))
    mutate = json_file if name.endswith(".json") else any_bytes
    assert fuzz(60, tmp_path / "files" / name, mutate, reads_text(tmp_path / "files")) > 10


def test_a_tokenizer_that_would_take_quadratic_work_or_memory_is_quick(tmp_path):
    chain = [("a" * i, "a") for i in range(1, 1500)]  # tokens of up to 1,500 bytes, all of which are reachable
    doubled = [("b" * 2**i, "b" * 2**i) for i in range(15)]
    many = [(f"<{i}>", {"lstrip": True}) for i in range(3000)]
    directory = saved(tmp_path, described(chain + doubled, added=many))
    with watched("chains", seconds=60):
        tokenizer = get_tokenizer(directory)
        text = "a" * 3000 + "b" * 40_000 + "<1>" * 3000 + " " * 20_000
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")


# --- config files, token files, runs


def refuse(name):
    raise CheckpointError(name, "no such model on the hub")


@pytest.mark.exhaustive
def test_damaged_config_toml(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda name, **_: refuse(name))  # names of tokenizers may be names there
    path = tmp_path / "config.toml"
    path.write_text(to_toml(TRAIN.to_dict()))

    def read():
        with contextlib.suppress(ConfigError):
            GPTConfig.from_file(path)
        assert isinstance(TrainConfig.from_file(path, ["model.n_layers=2", "steps=9"]), TrainConfig)

    assert fuzz(300, path, toml_file, read) > 180


@pytest.mark.parametrize(("mutate", "cases"), [(header_bytes, 400), (header_json, 600)])
def test_damaged_token_file(mutate, cases, tmp_path):
    path = tmp_path / "text.tokens"
    Tokens.from_text("The cat sat on the mat. " * 9, "bytes").save(path)

    def read():
        tokens = open_tokens(path, BYTES)
        assert np.max(tokens.ids_N, initial=0) < 257
        tokens.split(0.1)

    assert fuzz(cases, path, mutate, read) > 0.5 * cases


@pytest.mark.parametrize("name", ["index.json", "progress.json"])
def test_damaged_index_or_progress_of_token_shards(name, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgpt.data.documents.PIECE", 80)
    out = tmp_path / "out"
    (tmp_path / "a.jsonl").write_text('{"text": "The cat sat on the mat. "}\n' * 9)
    write, calls = functools.partial(tokenize, [tmp_path / "a.jsonl"], out, "bytes", shard_tokens=60), iter(range(9))

    def stop(_):
        if next(calls) == 2:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        write(report=stop if name == "progress.json" else lambda _: None)
    good = {file.name: file.read_bytes() for file in out.iterdir()}
    assert (len(good), name in good) == (4, True)

    def read():
        if name == "index.json":
            assert len(open_tokens(out, BYTES).ids_N) <= 9 * 25
            return
        try:
            write()
        finally:
            damaged = (out / name).read_bytes() if (out / name).exists() else b""
            for file in out.iterdir():
                file.unlink()
            for kept, data in good.items():
                (out / kept).write_bytes(data if kept != name else damaged)

    assert fuzz(300, out / name, json_file, read) > 150


@pytest.mark.parametrize("program", ["llm.c", "Megatron"])
def test_damaged_token_file_of_another_program(program, tmp_path):
    write, name, _ = WRITERS[program]
    write(tmp_path)

    def read():
        # What is left of a short file may be a text.
        assert len(open_tokens(tmp_path / name, GPTConfig(), "gpt2").ids_N) <= 100

    assert fuzz(300, tmp_path / name, functools.partial(any_bytes, limit=40), read) > 150


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_damaged_run_directory(name, tmp_path):
    tokens = Tokens.from_text("The cat sat on the mat. " * 9, "bytes")
    (tmp_path / "text").write_text("The cat sat on the mat. ")
    corpus = Corpus((Source("text", tokens, 0.5, path=str(tmp_path / "text")),))
    run = Run(tmp_path)
    run.describe(TRAIN, corpus, None)
    for step in range(1, 5):
        run.append({"step": step, "loss": 5.0 / step, "val_loss": 6.0 / step})

    def mutate(good, rng):
        if name == "run.json":
            return json_file(good, rng)
        lines = good.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        lines[at] = json_file(lines[at], rng) + b"\n"
        return b"".join(lines)

    def read():
        run.check_resume(TRAIN, corpus, None)
        open_corpus(run.data()[0], BYTES)
        losses = run.val_losses()
        assert min(losses.values(), default=0.0) < 1e400
        run.truncate_metrics(3)

    refusals = fuzz(600, tmp_path / name, mutate, read)
    # Incomplete lines of metrics are skipped, not refused.
    assert refusals > 300 if name == "run.json" else refusals == 0


@pytest.mark.filterwarnings("ignore")  # from orbax's threads, about files that they cannot read
def test_damaged_training_checkpoint(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    state = {"a": np.arange(30, dtype=np.float32), "b": {"c": np.arange(6, dtype=np.int32)}}
    abstract = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, state))
    with contextlib.closing(Checkpoints(tmp_path / "good")) as checkpoints:
        checkpoints.save(1, state)
    files = sorted(path.relative_to(tmp_path / "good") for path in (tmp_path / "good").rglob("*") if path.is_file())
    count = 0
    for case in range(60):
        rng = random.Random(case)
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        path = tmp_path / "bad" / rng.choice(files)
        content = path.read_bytes()
        path.unlink()
        if content and rng.random() < 0.8:
            path.write_bytes(any_bytes(content, rng))

        def read(case=case):
            with contextlib.closing(Checkpoints(tmp_path / "bad", read_only=True)) as checkpoints:
                got = checkpoints.restore(1, abstract)
            assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(state))), case

        # Memory is not watched: orbax's threads outlive the call, and `tracemalloc` must not be stopped while they run.
        count += refused(read, f"{path}, case {case}")
    assert count > 10


# --- paths that are not files

READERS = {
    "load": weights.load,
    "load_config": weights.load_config,
    "open_tokens": lambda path: open_tokens(path, BYTES),
    "GPTConfig": GPTConfig.from_file,
    "TrainConfig": TrainConfig.from_file,
    "read_json": read_json,
    "read_toml": read_toml,
    "Run": lambda path: Run(path).config(),
}


def place(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "loop of links":
        path.symlink_to(path.name)
    elif kind == "link to nothing":
        path.symlink_to("nothing")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse giant":
        with path.open("wb") as file:
            file.write(struct.pack("<Q", 2**35) + b'{"')
            file.truncate(2**37)


KINDS = ["pipe", "directory", "empty", "loop of links", "link to nothing", "device", "sparse giant"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_file_is_refused_and_not_waited_for(kind, params, tmp_path):
    names = ["model", "model.pt", "model.toml", "model.json", "text.tokens"]
    for name in names:
        place(kind, tmp_path / name)
        for reader, read in READERS.items():
            if kind == "empty" and reader in ("open_tokens", "read_toml", "TrainConfig"):
                continue  # neither text nor settings
            if kind == "sparse giant" and reader == "open_tokens":
                continue  # a text of any size may be read
            with watched(f"{reader} of {kind} {name}"):
                assert refused(lambda read=read, name=name: read(tmp_path / name), f"{reader} of {kind} {name}")
    for part in ("config.json", "model.safetensors", INDEX, "flax_model.msgpack", "pytorch_model.bin"):
        directory = write_shards_or_not(part, tmp_path / part.replace(".", "_"), params)
        (directory / part).unlink(missing_ok=True)
        place(kind, directory / part)
        with watched(part):
            assert refused(lambda directory=directory: weights.load(directory), f"{kind} {part}")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_file_is_refused_in_an_openai_directory(kind, tmp_path):
    for part in ("hparams.json", "checkpoint", "model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        if (part, kind) == ("checkpoint", "directory"):
            continue  # another program's, and the only checkpoint is read
        directory = write_openai(tmp_path / part, SMALL, make_model(SMALL)[1])
        (directory / part).unlink()
        place(kind, directory / part)
        with watched(part):
            assert refused(lambda directory=directory: weights.load(directory), f"{kind} {part}")


def write_shards_or_not(part, directory, params):
    directory.mkdir()
    if part == INDEX:
        write_shards(directory, TINY, hf_tensors(params))
    else:
        write_hf(directory, TINY, hf_tensors(params))
    if part not in ("config.json", "model.safetensors", INDEX):
        (directory / "model.safetensors").unlink()
    return directory


def test_names_that_no_file_can_have_are_refused():
    for name in ("a" * 300, "a\0b", "~no-such-user/model", "/" * 300 + "a", "a/" * 2100):
        for reader in ("load", "load_config", "GPTConfig", "TrainConfig", "open_tokens"):
            assert refused(lambda name=name, reader=reader: READERS[reader](name), f"{reader} of {name[:20]}")


# --- pickles


def pickles(canary):
    """The same malicious object in every format from which Python's libraries unpickle."""
    bad = Canary(canary)
    yield from (pickle.dumps(bad, protocol=protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1))
    for save in (
        lambda file: np.save(file, np.array([bad], object)),
        lambda file: np.savez(file, a=np.array([bad], object)),
    ):
        file = io.BytesIO()
        save(file)
        yield file.getvalue()
    yield zipped({"archive/data.pkl": pickle.dumps(bad, protocol=2), "archive/version": b"3"})
    yield zipped(
        {"archive/data.pkl": pickle.dumps(bad, protocol=2), "archive/constants.pkl": pickle.dumps(bad, protocol=2)}
    )
    # torch's format before 1.6: a magic number, a version, facts about the machine, the content, the names of storages.
    old = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, bad, []]
    yield b"".join(pickle.dumps(item, protocol=2) for item in old)
    yield tarred({name: pickle.dumps(bad, protocol=2) for name in ("storages", "tensors", "pickle")})
    yield packer.packb({"a": packer.ExtType(1, pickle.dumps(bad, protocol=2)), "nd": True, "kind": b"O"})


@pytest.mark.filterwarnings("ignore")  # torch's warnings about archives that it did not write
def test_no_pickle_is_ever_executed(params, tmp_path):
    canary, count = tmp_path / "canary", 0
    directory = tmp_path / "model"
    files = [
        tmp_path / f"model{suffix}"
        for suffix in (".pt", ".pth", ".bin", ".npz", ".npy", ".ckpt", ".safetensors", ".toml", ".json", "")
    ]
    parts = [directory / name for name in ("config.json", "model.safetensors", INDEX, "pytorch_model.bin", "run.json")]
    for content in pickles(canary):
        for path in (*files[:-1], *parts):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            write_hf(directory, TINY, hf_tensors(params))
            if path in parts:
                (directory / "model.safetensors").unlink()
            path.write_bytes(content)
            for read in READERS.values():
                with contextlib.suppress(*DOCUMENTED, ImportError):
                    read(path.parent if path in parts else path)
                assert not canary.exists(), path.name
                count += 1
    assert count > 1000
    with pytest.raises(TypeError):
        os.mkdir(*Canary(canary).__reduce__()[1], 0, 0)
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # the object really was dangerous
