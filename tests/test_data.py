"""Token files and batches."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxgpt.config import GPTConfig
from jaxgpt.data import Shard, Tokens, open_tokens, read_text
from jaxgpt.errors import DataError
from jaxgpt.training.batches import batch, check_enough, count_sequences
from jaxgpt.training.config import TrainConfig

BYTES = GPTConfig(vocab_size=257, context_length=8, emb_dim=8, n_heads=2, n_layers=1, tokenizer="bytes")
CONFIG = TrainConfig(model=BYTES, batch_size=4, warmup_steps=0, seed=3)
TEXT = "The cat sat on the mat; the dog did not. " * 8


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "text.tokens"
    Tokens.from_text(TEXT, "bytes").save(path)
    return path


def test_token_file_and_text_open_to_the_same_tokens(tmp_path, token_file):
    text_file = tmp_path / "text.txt"
    text_file.write_text(TEXT, encoding="utf-8")
    from_text, from_file = open_tokens(text_file, BYTES), open_tokens(token_file, BYTES)
    np.testing.assert_array_equal(from_file.ids_N, list(TEXT.encode()))
    np.testing.assert_array_equal(from_file.ids_N, from_text.ids_N)
    assert from_file.identity == from_text.identity


def test_gpt2_ids_fit_uint16_and_larger_vocabularies_get_uint32(tmp_path):
    assert Tokens.from_text("Hello, I am", "gpt2").ids_N.dtype == np.uint16
    path = tmp_path / "wide.tokens"
    Tokens((Shard(np.array([1, 70000], np.uint32)),), "gpt2", 80000).save(path)
    assert np.asarray(open_tokens(path, GPTConfig(vocab_size=80000)).ids_N).dtype == np.uint32


def test_a_token_file_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(DataError, match=r"a\.tokens: cannot be written"):
        Tokens.from_text(TEXT, "bytes").save(tmp_path / "nowhere" / "a.tokens")


def test_split_keeps_the_last_part_for_validation():
    tokens = Tokens.from_text("abcdefghij", "bytes")
    train_N, val_N = tokens.split(0.1)
    assert bytes(train_N.astype(np.uint8)) == b"abcdefghi"
    assert bytes(val_N.astype(np.uint8)) == b"j"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "damaged"),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "sha256"),
        (lambda raw: raw[:40], "damaged"),
    ],
)
def test_damaged_token_file_is_refused_at_open(token_file, damage, message):
    token_file.write_bytes(damage(token_file.read_bytes()))
    with pytest.raises(DataError, match=message):
        open_tokens(token_file, BYTES)


def test_token_file_of_another_tokenizer_is_refused_at_open(token_file):
    with pytest.raises(DataError, match=r"'bytes'.*'gpt2'"):
        open_tokens(token_file, GPTConfig())


def test_ids_beyond_the_vocabulary_are_refused_at_open(token_file):
    with pytest.raises(DataError, match=r"id 116 at 6 is outside the vocabulary: 0 to 104") as error:
        open_tokens(token_file, BYTES.replace(vocab_size=105))
    assert max(TEXT.encode()[:6]) < 105 <= TEXT.encode()[6] == 116
    assert str(token_file) in str(error.value)


def test_safetensors_of_another_kind_is_not_a_token_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"ids": np.zeros(4, np.float32)}, path)
    with pytest.raises(DataError, match="jaxgpt tokenize"):
        open_tokens(path, BYTES)


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        (np.zeros(3, np.float32), {}, r"F32\[3\] is not 3 ids"),
        (np.zeros((3, 1), np.uint16), {}, r"U16\[3, 1\] is not 3 ids"),
        (np.zeros(3, np.uint16), {"count": "4"}, r"U16\[3\] is not 4 ids"),
        (np.zeros(3, np.uint16), {"vocab_size": "many"}, "vocab_size 'many' is not a number"),
        (np.zeros(3, np.uint16), {"tokenizer": "x" * 10_000}, "made by tokenizer 'xxx"),
        (np.zeros(0, np.uint16), {"count": "0"}, "holds no tokens"),
    ],
)
def test_token_file_whose_header_lies_is_refused_at_open(ids, changes, message, tmp_path):
    facts = {"format": "jaxgpt-tokens", "tokenizer": "bytes", "vocab_size": "257", "count": "3"}
    digest = hashlib.sha256(bytes(12)).hexdigest()
    save_file({"ids": ids}, tmp_path / "a.tokens", {**facts, "sha256": digest, **changes})
    with pytest.raises(DataError, match=message) as error:
        open_tokens(tmp_path / "a.tokens", BYTES)
    assert len(str(error.value)) < 1000


def test_binary_file_and_missing_file_are_refused(tmp_path):
    path = tmp_path / "noise"
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(DataError, match="UTF-8"):
        open_tokens(path, BYTES)
    with pytest.raises(DataError, match="cannot be read"):
        open_tokens(tmp_path / "absent", BYTES)


@pytest.mark.parametrize("sequences", ["random", "sliding"])
def test_rows_read_apart_are_those_of_the_whole_batch(sequences):
    ids_N = np.arange(200)
    config = dataclasses.replace(CONFIG, sequences=sequences)
    whole = batch(ids_N, config, step=7)
    assert whole.shape == (4, 9)
    for shards in (2, 4):
        rows = len(whole) // shards
        parts = [batch(ids_N, config, 7, slice(i * rows, (i + 1) * rows)) for i in range(shards)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("sequences", ["random", "sliding"])
def test_batches_depend_on_seed_and_step_alone(sequences):
    ids_N = np.arange(500) % 257
    config = dataclasses.replace(CONFIG, sequences=sequences)
    np.testing.assert_array_equal(batch(ids_N, config, 5), batch(ids_N, config, 5))
    assert not np.array_equal(batch(ids_N, config, 5), batch(ids_N, config, 6))
    assert not np.array_equal(batch(ids_N, config, 5), batch(ids_N, dataclasses.replace(config, seed=4), 5))
    # Every sequence is a run of consecutive tokens.
    assert (np.diff(batch(ids_N, config, 5), axis=1) % 257 == 1).all()


def test_random_windows_reach_both_ends():
    ids_N = np.arange(12)  # sequences of 9 start at 0, 1, 2 or 3
    starts = {int(row[0]) for step in range(50) for row in batch(ids_N, CONFIG, step)}
    assert starts == {0, 1, 2, 3}


def test_sliding_windows_cover_an_epoch_once_and_reshuffle():
    ids_N = np.arange(8 * 12 + 1)
    config = dataclasses.replace(CONFIG, sequences="sliding")
    epochs = [np.concatenate([batch(ids_N, config, 3 * epoch + i)[:, 0] for i in range(3)]) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 96, 8))
    assert list(epochs[0]) != list(epochs[1])


def test_sliding_windows_are_the_books():
    # 5,145 tokens split at 0.9, sequences of 256, two per batch: 9 training batches and 1 validation batch.
    assert count_sequences(int(5145 * 0.9), 256, 256) // 2 == 9
    assert count_sequences(5145 - int(5145 * 0.9), 256, 256) // 2 == 1
    assert count_sequences(10, 4, 1) == 6


def test_split_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="training split has 8 tokens"):
        check_enough(np.arange(8), CONFIG, "training")
    with pytest.raises(DataError, match="2 sliding sequences, too few for batch_size=4"):
        check_enough(np.arange(20), dataclasses.replace(CONFIG, sequences="sliding"), "training")
    check_enough(np.arange(9), CONFIG, "training")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_text_is_read_from_a_pipe_but_never_a_token_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read_text, pipe, "bytes")
        pipe.write_text(TEXT, encoding="utf-8")
        assert bytes(reading.result().ids_N.astype(np.uint8)) == TEXT.encode()
    with pytest.raises(DataError, match=r"is not a file \(`jaxgpt tokenize` reads pipes\)"):
        open_tokens(pipe, BYTES)
