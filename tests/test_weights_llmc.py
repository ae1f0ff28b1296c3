"""llm.c's .bin: values and refusals, with files that the code here writes from llm.c's description of them."""

from __future__ import annotations

import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, make_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_weights import BOOK, assert_same, book_tensors, run_convert, small

from jaxgpt.config import GPTConfig
from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.model.gpt import GPT
from jaxgpt.weights import formats as weights
from jaxgpt.weights import llmc

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TEXTLESS = TINY.replace(tokenizer="none", drop_rate=0.1)


# The format, written out by hand: this shares nothing with the table that it tests.


def llmc_file(config, params, padded=None, dtype="float32", **header):
    """The content of a file. Fields of the header are by number: `h1` is the version."""
    p = jax.tree.map(np.asarray, params)
    V, D, L = config.vocab_size, config.emb_dim, config.n_layers
    padded = -(-V // 128) * 128 if padded is None else padded
    blocks = [p[f"trf_blocks_{i}"] for i in range(L)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    tensors = [
        np.concatenate([p["tok_emb"]["weight"], np.full((padded - V, D), 9, np.float32)]),  # wte (Vp, C)
        p["pos_emb"]["weight"],  # wpe (maxT, C)
        stacked["norm1"]["scale"],  # ln1w (L, C)
        stacked["norm1"]["shift"],  # ln1b
        stacked["att"]["qkv"]["weight"].reshape(L, 3 * D, D),  # qkvw (L, 3*C, C)
        stacked["att"]["qkv"]["bias"].reshape(L, 3 * D),  # qkvb
        stacked["att"]["out_proj"]["weight"],  # attprojw (L, C, C)
        stacked["att"]["out_proj"]["bias"],  # attprojb
        stacked["norm2"]["scale"],  # ln2w
        stacked["norm2"]["shift"],  # ln2b
        stacked["ff"]["fc_in"]["weight"],  # fcw (L, 4*C, C)
        stacked["ff"]["fc_in"]["bias"],  # fcb
        stacked["ff"]["fc_out"]["weight"],  # fcprojw (L, C, 4*C)
        stacked["ff"]["fc_out"]["bias"],  # fcprojb
        p["final_norm"]["scale"],  # lnfw (C)
        p["final_norm"]["shift"],  # lnfb
    ]
    numbers = [20240326, {"float32": 3, "bfloat16": 5}[dtype], config.context_length, V, L, config.n_heads, D, padded]
    numbers += [0] * 248
    for name, value in header.items():
        numbers[int(name[1:])] = value
    return struct.pack("<256i", *numbers) + b"".join(np.asarray(t).astype(jnp.dtype(dtype)).tobytes() for t in tensors)


@settings(max_examples=2)
@given(config=small, seed=st.integers(0, 99), padded=st.integers(0, 9))
@example(config=TINY, seed=0, padded=31)
def test_llmc_file_gives_the_parameters_that_were_written(config, seed, padded, tmp_path):
    sizes = {name: getattr(config, name) for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")}
    config = GPTConfig(**sizes, tokenizer="none")
    _, params = make_model(config, seed)
    (tmp_path / "gpt2.bin").write_bytes(llmc_file(config, params, config.vocab_size + padded))
    loaded, got = weights.load(tmp_path / "gpt2.bin")
    assert loaded == GPT(config)
    assert_same(got, params)


def test_llmc_file_in_bfloat16_loads_under_any_name(tiny, tmp_path):
    (tmp_path / "model_00019560").write_bytes(llmc_file(TINY, tiny[1], dtype="bfloat16"))
    loaded, got = weights.load(tmp_path / "model_00019560", context_length=7)
    assert loaded == GPT(TEXTLESS.replace(context_length=7))
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), tiny[1])
    rounded["pos_emb"]["weight"] = rounded["pos_emb"]["weight"][:7]
    assert_same(got, rounded)


def test_llmc_file_in_the_commands(tiny, tmp_path):
    (tmp_path / "gpt2.bin").write_bytes(llmc_file(TINY, tiny[1]))
    assert run_convert(tmp_path / "gpt2.bin", tmp_path / "own") == 0
    loaded, got = weights.load(tmp_path / "own")
    assert loaded == GPT(TEXTLESS) == GPT(weights.load_config(tmp_path / "gpt2.bin"))
    assert_same(got, tiny[1])


def test_an_llmc_file_of_gpt2s_vocabulary_has_its_tokenizer(tmp_path):
    config = GPTConfig(emb_dim=1, n_heads=1, n_layers=1, context_length=1)
    (tmp_path / "gpt2.bin").write_bytes(llmc_file(config, make_model(config)[1]))
    assert weights.load_config(tmp_path / "gpt2.bin") == config


# --- what is refused


@pytest.mark.parametrize(
    ("header", "error", "match"),
    [
        ({"h1": 1}, CheckpointError, r"of version 1: expected 3 \(float32\) or 5"),
        ({"h1": -3}, CheckpointError, "of version -3"),
        ({"h1": 5}, CheckpointError, "copy or download it again"),
        ({"h2": 15}, CheckpointError, "bytes; it has"),
        ({"h2": 0}, ConfigError, "context_length"),
        ({"h3": 129}, CheckpointError, "128 rows for 129 ids"),
        ({"h3": 2**31 - 1}, ConfigError, "vocab_size"),
        ({"h4": 2**31 - 1}, ConfigError, "n_layers"),
        ({"h4": -1}, ConfigError, "n_layers"),
        ({"h5": 0}, ConfigError, "n_heads"),
        ({"h5": 7}, ConfigError, "emb_dim must be a multiple of n_heads"),
        ({"h6": 2**17}, ConfigError, "emb_dim must be a multiple of n_heads"),
        ({"h6": 3 * 2**15}, CheckpointError, "its header says 128 rows for 97 ids, and"),
        ({"h7": 127}, CheckpointError, "its header says 127 rows for 97 ids"),
        ({"h7": 96}, CheckpointError, "its header says 96 rows for 97 ids"),
        ({"h7": -(2**31)}, CheckpointError, "its header says -2,147,483,648 rows"),
        ({"h7": 2**31 - 1}, CheckpointError, "its header says 2,147,483,647 rows"),
    ],
)
def test_an_llmc_file_with_a_bad_header_is_refused(header, error, match, tiny, tmp_path):
    (tmp_path / "gpt2.bin").write_bytes(llmc_file(TINY, tiny[1], **header))
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match) as caught:
            weights.load(tmp_path / "gpt2.bin")
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(tmp_path / "gpt2.bin"))


def test_an_llmc_file_with_fewer_rows_than_ids_is_refused_even_if_it_is_as_long_as_that_says(tiny, tmp_path):
    content = llmc_file(TINY, tiny[1], padded=97, h7=96)
    (tmp_path / "gpt2.bin").write_bytes(content[: -4 * TINY.emb_dim])
    with pytest.raises(CheckpointError, match="96 rows for 97 ids"):
        weights.load(tmp_path / "gpt2.bin")


@pytest.mark.parametrize("change", [-1, -5000, 1, 4])
def test_an_llmc_file_of_another_length_is_refused(change, tiny, tmp_path):
    content = llmc_file(TINY, tiny[1])
    content = content[:change] if change < 0 else content + bytes(change)
    (tmp_path / "gpt2.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{len(content) - change:,} bytes; it has {len(content):,}: copy"):
        weights.load_config(tmp_path / "gpt2.bin")


def test_an_llmc_file_cut_in_its_header_is_refused(tiny, tmp_path):
    for length in (8, 31, 32, 1023):
        (tmp_path / "gpt2.bin").write_bytes(llmc_file(TINY, tiny[1])[:length])
        with pytest.raises(CheckpointError, match=rf"a file of llm.c of {length:,} bytes"):
            weights.load(tmp_path / "gpt2.bin")


def test_files_of_other_formats_are_not_taken_for_llmcs(tmp_path):
    tensors = book_tensors(make_model(BOOK)[1])
    # A safetensors file whose first number is nearly llm.c's: the length of its header.
    save_file(tensors, tmp_path / "book.safetensors")
    assert not llmc.recognises((tmp_path / "book.safetensors").read_bytes()[:32])
    header = struct.pack("<Q", 20240326) + b"{"
    assert not llmc.recognises(header)
    (tmp_path / "book.safetensors").write_bytes(header + b" " * 100)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        weights.load(tmp_path / "book.safetensors")
    for start in (b"", llmc.MAGIC, b"PK\3\4", b"\x80\2\x8a\n", b"\x82\xa6params", struct.pack("<i", 20240520)):
        assert not llmc.recognises(start.ljust(32, b"\1") if start != llmc.MAGIC else start)
