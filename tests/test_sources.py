"""What a model is trained on: token files of every program, many files as one row, mixtures, and their order."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import struct
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.cli import main
from jaxgpt.config import GPTConfig
from jaxgpt.data import Joined, Mixture, Shard, Source, Tokens, open_corpus, open_tokens, verification
from jaxgpt.errors import ConfigError, DataError
from jaxgpt.training import TrainConfig, load_config, train
from jaxgpt.training.batches import BLOCK, ReadAhead, batch, check_enough, permute, shares

GPT2 = GPTConfig(context_length=8, emb_dim=8, n_heads=2, n_layers=1)
BYTES = GPT2.replace(vocab_size=257, tokenizer="bytes")
CONFIG = TrainConfig(model=BYTES, batch_size=4, warmup_steps=0, seed=3, sequences="sliding")
IDS = np.arange(1000, 1100)


def write_llmc(path, ids, magic=20240520, version=1, dtype="<u2", count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids).astype(dtype).tobytes())


def write_megatron(path, ids, lengths, kind=8, dtype="<u2"):
    """Writes PATH.idx and PATH.bin as Megatron's indexed_dataset.py does, one document per sequence."""
    lengths = np.asarray(lengths)
    places = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, kind, len(lengths), len(lengths) + 1)
    tables = lengths.astype("<i4").tobytes() + places.astype("<i8").tobytes()
    path.with_suffix(".idx").write_bytes(head + tables + np.arange(len(lengths) + 1).astype("<i8").tobytes())
    path.with_suffix(".bin").write_bytes(np.asarray(ids).astype(dtype).tobytes())


# How each program's files are written, and what the user must say of them.
WRITERS = {
    "llm.c": (lambda path: write_llmc(path / "a.bin", IDS), "a.bin", None),
    "llm.c, uint32": (lambda path: write_llmc(path / "a.bin", IDS, 20240801, 7, "<u4"), "a.bin", "gpt2"),
    "nanoGPT": (lambda path: (path / "train.bin").write_bytes(IDS.astype("<u2").tobytes()), "train.bin", "gpt2"),
    "Megatron": (lambda path: write_megatron(path / "a", IDS, [30, 0, 70]), "a.idx", "gpt2"),
    "Megatron, int32": (lambda path: write_megatron(path / "a", IDS, [100], 4, "<i4"), "a.idx", "gpt2"),
    "ours": (lambda path: Tokens.from_ids(IDS, "gpt2").save(path / "a.tokens"), "a.tokens", None),
}


@pytest.mark.parametrize("program", WRITERS)
def test_token_files_of_other_programs_are_read(program, tmp_path):
    write, name, tokenizer = WRITERS[program]
    write(tmp_path)
    tokens = open_tokens(tmp_path / name, GPT2, tokenizer)
    np.testing.assert_array_equal(np.asarray(tokens.ids_N), IDS)
    assert tokens.tokenizer == "gpt2"
    if tokenizer is not None:
        with pytest.raises(DataError, match=r"which tokenizer made (its ids|them).*--tokenizer NAME_OR_PATH"):
            open_tokens(tmp_path / name, GPT2)
    # Alone in a directory, they are what the directory means.
    np.testing.assert_array_equal(np.asarray(open_tokens(tmp_path, GPT2, tokenizer).ids_N), IDS)


def truncate(path, size):
    os.truncate(path, path.stat().st_size + size)


def index(path, at, form, value):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("program", "damage", "message"),
    [
        ("llm.c", lambda path: truncate(path / "a.bin", -1), "header says 100 tokens, 1,224 bytes, and it has 1,223"),
        ("llm.c", lambda path: truncate(path / "a.bin", 2), "header says 100 tokens"),
        ("llm.c", lambda path: truncate(path / "a.bin", -300), "header of 1,024 bytes is cut short"),
        ("llm.c", lambda path: index(path / "a.bin", 8, "<i", -1), "header says -1 tokens"),
        ("llm.c", lambda path: index(path / "a.bin", 8, "<i", 2**31 - 1), "header says 2,147,483,647 tokens"),
        ("llm.c", lambda path: write_llmc(path / "a.bin", []), "holds no tokens"),
        ("llm.c", lambda path: write_llmc(path / "a.bin", [5, 50257]), "id 50257 at 1 is outside the vocabulary"),
        ("nanoGPT", lambda path: truncate(path / "train.bin", -1), "199 bytes are not uint16 ids"),
        ("nanoGPT", lambda path: write_llmc(path / "train.bin", IDS, 20240526), "not bare ids: .* as in a header"),
        ("Megatron", lambda path: (path / "a.bin").unlink(), "expected it beside the index"),
        ("Megatron", lambda path: truncate(path / "a.bin", -2), "says 100 ids of 2 bytes, and it has 198"),
        ("Megatron", lambda path: truncate(path / "a.idx", -1), "3 sequences and 4 documents do not fit"),
        ("Megatron", lambda path: truncate(path / "a.idx", -70), "the header is cut short"),
        ("Megatron", lambda path: index(path / "a.idx", 9, "<Q", 2), "of version 2"),
        ("Megatron", lambda path: index(path / "a.idx", 17, "<B", 6), "ids of type 6"),
        ("Megatron", lambda path: index(path / "a.idx", 18, "<Q", 10**18), "do not fit"),
        ("Megatron", lambda path: index(path / "a.idx", 34, "<i", -1), "do not follow one another"),
        ("Megatron", lambda path: index(path / "a.idx", 46, "<q", 2), "do not follow one another"),
        ("Megatron", lambda path: write_megatron(path / "a", IDS, [70, -30, 60]), "do not follow one another"),
        ("Megatron, int32", lambda path: index(path / "a.bin", 8, "<i", -5), "id -5 at 2 is outside the vocabulary"),
        ("ours", lambda path: truncate(path / "a.tokens", -1), "damaged"),
    ],
)
def test_damaged_files_of_other_programs_are_refused_by_name(program, damage, message, tmp_path):
    write, name, tokenizer = WRITERS[program]
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        open_tokens(tmp_path / name, GPT2, tokenizer)
    assert str(tmp_path) in str(error.value)


@given(st.lists(st.integers(0, 5), max_size=6), st.data())
def test_several_rows_are_one(lengths, data):
    ends = np.cumsum([0, *lengths])
    whole = np.arange(ends[-1])
    joined = Joined(np.split(whole, ends[1:-1]))
    assert len(joined) == len(whole)
    cut = st.one_of(st.none(), st.integers(-40, 40))
    part = slice(data.draw(cut), data.draw(cut))
    np.testing.assert_array_equal(np.asarray(joined[part]), whole[part])
    inner = slice(data.draw(cut), data.draw(cut))
    np.testing.assert_array_equal(np.asarray(joined[part][inner]), whole[part][inner])


def test_many_shards_are_one_row_and_few_are_open_at_a_time(tmp_path, monkeypatch):
    for i in range(300):
        write_llmc(tmp_path / f"fineweb_train_{i:06}.bin", np.full(10, i))
    tokens = open_corpus(tmp_path, GPT2).sources[0].tokens
    before = len(os.listdir("/proc/self/fd"))
    np.testing.assert_array_equal(np.asarray(tokens.ids_N), np.repeat(np.arange(300), 10))
    assert len(os.listdir("/proc/self/fd")) <= before + 128
    # A file that has been read from stays open.
    opened, usual = [], os.open
    monkeypatch.setattr(os, "open", lambda *args: opened.append(args) or usual(*args))
    for i in range(10):
        np.asarray(tokens.ids_N[10 + i : 15 + i])
    assert len(opened) == 2
    # A sequence may begin in one file and end in another.
    np.testing.assert_array_equal(np.asarray(tokens.ids_N[1995:2003]), [199] * 5 + [200] * 3)


def test_a_directory_comes_with_its_validation_split(tmp_path):
    write_llmc(tmp_path / "fineweb_val_000000.bin", IDS[:40])
    write_llmc(tmp_path / "fineweb_train_000001.bin", IDS[:60])
    write_llmc(tmp_path / "fineweb_train_000002.bin", IDS[60:])
    corpus = open_corpus(tmp_path, GPT2)
    mixture, val_N = corpus.split(0.5)
    np.testing.assert_array_equal(np.asarray(mixture.ids[0]), IDS)
    assert [len(shard.ids_N) for shard in corpus.shards] == [60, 40, 40]  # the last are validated on
    np.testing.assert_array_equal(np.asarray(val_N), IDS[:40])
    # A pattern says itself what is meant.
    train_N, val_N = open_corpus(str(tmp_path / "*_train_*.bin"), GPT2).split(0.1)
    assert (len(train_N), len(val_N)) == (90, 10)
    # To validate on it means its validation split, not what it trains on.
    train_N, val_N = open_corpus(tmp_path, GPT2, validation=[tmp_path]).split(0.1)
    np.testing.assert_array_equal(np.asarray(val_N), IDS[:40])
    given = open_corpus(tmp_path, GPT2, validation=tmp_path / "fineweb_train_000002.bin")
    np.testing.assert_array_equal(np.asarray(given.split(0.1)[1]), IDS[60:])


def test_what_is_not_training_data_in_a_directory_is_left_out(tmp_path):
    """As nanoGPT's prepare.py leaves one: the text is what train.bin and val.bin were made from."""
    for name, ids in (("train.bin", IDS), ("val.bin", IDS[:40])):
        (tmp_path / name).write_bytes(ids.astype("<u2").tobytes())
    for name in ("input.txt", "prepare.py", "readme.md", "meta.pkl", "._train.bin", ".DS_Store"):
        (tmp_path / name).write_text("To be, or not to be")
    (tmp_path / "more.txt").mkdir()
    source = open_corpus(tmp_path, GPT2, tokenizer="gpt2").sources[0]
    np.testing.assert_array_equal(np.asarray(source.tokens.ids_N), IDS)
    assert len(source.validation.ids_N) == 40
    assert source.left_out == ("input.txt (a text beside token files)",)


def test_a_test_split_is_not_trained_on(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for split in ("train", "valid", "test", "latest"):
        (tmp_path / "deep" / "er" / f"wiki.{split}.TXT").write_text(split)
    # The pattern reaches subdirectories too.
    for data in (tmp_path / "deep" / "er", f"{tmp_path}/**/*.TXT"):
        source = open_corpus(data, BYTES).sources[0]
        # End-of-text, id 256, follows each of several texts.
        assert bytes(np.asarray(source.tokens.ids_N, np.uint8)) == b"latest\0train\0"
        assert bytes(np.asarray(source.validation.ids_N, np.uint8)) == b"valid"
        assert source.left_out == ("wiki.test.TXT (a test split)",)
    alone = open_corpus(tmp_path / "deep" / "er" / "wiki.test.TXT", BYTES).sources[0]
    assert bytes(np.asarray(alone.tokens.ids_N, np.uint8)) == b"test"


@pytest.mark.parametrize(("kind", "dtype"), [(4, "<i4"), (8, "<u2")])
def test_megatrons_ids_are_read_as_their_index_says_also_by_their_own_name(kind, dtype, tmp_path):
    write_megatron(tmp_path / "a", IDS, [100], kind, dtype)
    for name in ("a.bin", "*.bin"):
        tokens = open_tokens(str(tmp_path / name), GPT2, "gpt2")
        np.testing.assert_array_equal(np.asarray(tokens.ids_N), IDS)


def test_megatrons_index_may_be_long_and_tell_the_mode_of_each_sequence(tmp_path):
    count = 2**20 + 5
    write_megatron(tmp_path / "a", np.arange(count) % 500, np.ones(count, int))
    with (tmp_path / "a.idx").open("ab") as file:
        file.write(bytes(count))
    tokens = open_corpus(tmp_path / "a.idx", GPT2, tokenizer="gpt2").sources[0].tokens
    np.testing.assert_array_equal(np.asarray(tokens.ids_N[-9:]), np.arange(count - 9, count) % 500)


def test_the_tokenizer_can_be_said_where_a_file_does_not_state_it(tmp_path):
    write_llmc(tmp_path / "a.bin", IDS % 256)  # llm.c has one tokenizer; forks of it have others
    assert open_tokens(tmp_path / "a.bin", BYTES, "bytes").tokenizer == "bytes"
    Tokens.from_ids(IDS, "gpt2").save(tmp_path / "a.tokens")
    with pytest.raises(DataError, match=r"a.tokens: made by tokenizer 'gpt2', not by 'bytes'"):
        open_tokens(tmp_path / "a.tokens", GPT2, "bytes")


@pytest.mark.parametrize("dtype", ["<u4", "<i8"])
def test_wider_ids_without_a_header_are_refused(dtype, tmp_path):
    (tmp_path / "a.bin").write_bytes(IDS.astype(dtype).tobytes())
    with pytest.raises(DataError, match=r"a.bin: not uint16 ids: every second one would be 0"):
        open_tokens(tmp_path / "a.bin", GPT2, "gpt2")


def test_a_file_is_read_whole_or_not_at_all(tmp_path, monkeypatch):
    Tokens.from_ids(IDS, "gpt2").save(tmp_path / "a.tokens")
    ids_N = open_tokens(tmp_path / "a.tokens", GPT2).ids_N
    usual = os.pread
    with monkeypatch.context() as patch:  # a system may give less than was asked for
        patch.setattr(os, "pread", lambda descriptor, size, offset: usual(descriptor, min(size, 3), offset))
        np.testing.assert_array_equal(np.asarray(ids_N[10:]), IDS[10:])
    truncate(tmp_path / "a.tokens", -2)
    with pytest.raises(DataError, match=r"a.tokens: has become shorter since it was opened"):
        np.asarray(ids_N)


def test_what_tells_a_corpus_from_others(tmp_path):
    def identity(ids, **given):
        write_llmc(tmp_path / "a.bin", ids)
        return open_corpus(tmp_path / "a.bin", GPT2, **given).identity

    whole = np.arange(9000)
    identities = {identity(whole), identity(whole[:-1])}
    for place in (0, 999, 4500, 8000, 8999):  # without a stated hash, not every id counts
        identities.add(identity(np.where(whole == place, 7777, whole)))
    Tokens.from_ids(whole, "gpt2").save(tmp_path / "val.tokens")
    identities.add(identity(whole, validation=tmp_path / "val.tokens"))
    identities.add(identity(whole, validation=tmp_path / "a.bin"))
    a, b = Tokens.from_ids([1, 2, 3], "gpt2"), Tokens.from_ids([4, 5], "gpt2")
    for sources in ((a, None), (b, None)), ((b, None), (a, None)), ((a, 1), (b, 2)), ((a, 2), (b, 1)):
        made = [Source(str(i), tokens, weight) for i, (tokens, weight) in enumerate(sources)]
        identities.add(open_corpus(made, GPT2).identity)
    for validation in (a, b):
        identities.add(open_corpus([Source("a", a, validation=validation)], GPT2).identity)
    assert len(identities) == 15
    write_llmc(tmp_path / "b.bin", whole)  # elsewhere, they are the same
    assert identity(whole) == open_corpus(tmp_path / "b.bin", GPT2).identity


def test_ids_in_files_are_taken_as_slices(tmp_path):
    Tokens.from_ids(IDS, "gpt2").save(tmp_path / "a.tokens")
    with pytest.raises(TypeError, match=r"are taken as slices: np.asarray reads them all"):
        open_tokens(tmp_path / "a.tokens", GPT2).ids_N[3]
    with pytest.raises(ValueError, match="cut, not strided"):
        open_tokens(tmp_path / "a.tokens", GPT2).ids_N[::2]


@pytest.mark.parametrize(
    ("given", "name", "weight"),
    [
        ("{}/a.txt", "a.txt", None),
        ("{}/a.txt:0.7", "a.txt", 0.7),
        ("verse={}/a.txt:2e-1", "verse", 0.2),
        ("verse={}/*.txt", "verse", None),
        ("{}/odd=name:3", "odd=name:3", None),  # a path that exists is one
        ("{}/odd=name:3:4", "odd=name:3", 4.0),
    ],
)
def test_sources_are_written_as_name_path_and_weight(given, name, weight, tmp_path):
    for file in ("a.txt", "odd=name:3"):
        (tmp_path / file).write_text("To be, or not to be")
    source = open_corpus(given.format(tmp_path), BYTES).sources[0]
    assert (source.name, source.weight) == (name, weight)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a.txt:0"], "weight must be a number above 0, not 0.0"),
        (["a.txt:-1"], "weight must be a number above 0, not -1.0"),
        (["a.txt:nan"], "weight must be a number above 0, not nan"),
        (["a.txt:1.2.3"], r"a\.txt:1\.2\.3: cannot be read: No such file"),
        (["a.txt:1", "b.txt"], "a.txt has a weight and b.txt has none"),
        (["a.txt", "a.txt"], "two sources have the name 'a.txt'"),
        (["absent.txt"], "absent.txt: cannot be read: No such file"),
        (["absent-*.txt"], "no file has such a name"),
        (["empty"], "a directory without data: expected files that end in"),
        (["links"], "links/b.txt: cannot be read: No such file"),  # a missing file is not passed over
        (["links/*"], "links/b.txt: cannot be read: No such file"),
        ([], "there is no data to train on"),
        (["mixed"], "were made by different tokenizers, (bytes and gpt2|gpt2 and bytes)"),
        (["gpt2.tokens"], "made by tokenizer 'gpt2', but the model has 'bytes'"),
        (["noise.bin"], "has no header that says what it holds.*--tokenizer"),
        (["text", "noise.gz"], "noise.gz: damaged: gzip cannot unpack it"),
    ],
)
def test_data_that_cannot_be_used_is_refused_by_name(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "text"):
        (tmp_path / name).write_text("To be, or not to be")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    Tokens.from_text("To be", "bytes").save(tmp_path / "mixed" / "a.tokens")
    for path in (tmp_path / "mixed" / "b.tokens", tmp_path / "gpt2.tokens"):
        Tokens.from_text("To be", "gpt2").save(path)
    (tmp_path / "links").mkdir()
    for name, target in (("a.txt", tmp_path / "a.txt"), ("b.txt", tmp_path / "absent")):
        (tmp_path / "links" / name).symlink_to(target)
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    (tmp_path / "noise.gz").write_bytes(b"\x1f\x8b" + bytes(20))
    with pytest.raises(DataError, match=message):
        open_corpus(data, BYTES)


def test_a_validation_split_has_the_models_tokenizer_too_and_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    Tokens.from_text("To be", "bytes").save("corpus/train.tokens")
    assert open_corpus("corpus", BYTES).sources[0].path == str(tmp_path / "corpus")
    Tokens.from_text("To be", "gpt2").save("corpus/val.tokens")
    with pytest.raises(DataError, match="corpus: made by tokenizer 'gpt2', but the model has 'bytes'"):
        open_corpus("corpus", BYTES)


def test_validation_data_has_no_weight(tmp_path):
    (tmp_path / "a.txt").write_text("To be")
    with pytest.raises(DataError, match="read once, so it has no weight"):
        open_corpus(tmp_path / "a.txt", BYTES, validation=f"{tmp_path}/a.txt:2")
    with pytest.raises(DataError, match="a weight is for one of several sources to train on"):
        open_tokens(f"{tmp_path}/a.txt:2", BYTES)


@pytest.mark.parametrize("key", [(0,), (1, 2, 3)])
def test_the_order_of_an_epoch_is_a_permutation(key):
    for n in (*range(1, 200), 1000, 4096, 4097):
        assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))
    # Any part of it, however large the whole, is the same part.
    some = np.array([0, 1, 10**11, 3 * 10**11 - 1])
    np.testing.assert_array_equal(permute(some, 3 * 10**11, key)[2:], permute(some[2:], 3 * 10**11, key))


def test_the_order_looks_random():
    """Each place is as likely as any other for the first index, and neighbours do not stay together."""
    n, draws = 24, 4800
    first = collections.Counter(int(permute(np.array([0]), n, (seed,))[0]) for seed in range(draws))
    expected = draws / n
    chi_squared = sum((first[place] - expected) ** 2 / expected for place in range(n))
    assert chi_squared < 53  # of 23 degrees of freedom: exceeded once in 3,000 times
    order = permute(np.arange(10_000), 10_000, (7,))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert (np.diff(order) == 1).sum() < 10


def test_shares_are_by_largest_remainder():
    assert shares((1.0, 1.0, 1.0)).tolist() == [1366, 1365, 1365]
    assert shares((0.7, 0.3)).sum() == BLOCK
    mixture = Mixture(("large", "small"), (np.arange(99), np.arange(99)), (10**6, 1.0))
    with pytest.raises(DataError, match="small would get less than one of 4,096 sequences"):
        check_enough(mixture, CONFIG, "training")


@pytest.mark.parametrize("sequences", ["sliding", "random"])
def test_a_mixture_takes_its_share_of_every_source(sequences):
    # Of two sources, the ids tell which a row is from; 20 and 10 sequences per epoch.
    mixture = Mixture(("low", "high"), (np.arange(161) % 100, 100 + np.arange(81) % 100), (3.0, 1.0))
    config = dataclasses.replace(CONFIG, batch_size=64, sequences=sequences)
    rows = np.concatenate([batch(mixture, config, step) for step in range(2 * BLOCK // 64)])
    high = rows[:, 0] >= 100
    assert high[:BLOCK].sum() == high[BLOCK:].sum() == BLOCK // 4
    assert (rows[0 : BLOCK - 64, 0] != rows[64:BLOCK, 0]).any()
    assert not np.array_equal(high[:BLOCK], high[BLOCK:])
    if sequences == "sliding":  # every epoch of a source has each sequence once
        starts = rows[high][:, 0] - 100
        for epoch in range(len(starts) // 10):
            assert sorted(starts[10 * epoch : 10 * epoch + 10].tolist()) == list(range(0, 80, 8))
        assert starts[:10].tolist() != starts[10:20].tolist()
    parts = [batch(mixture, config, 70, slice(i, i + 16)) for i in range(0, 64, 16)]
    np.testing.assert_array_equal(np.concatenate(parts), batch(mixture, config, 70))


@pytest.mark.parametrize("sequences", ["sliding", "random"])
def test_sources_and_seeds_have_orders_of_their_own(sequences):
    """Each row tells its source and place: of equal sources, places differ, and of other seeds, the sources too."""
    mixture = Mixture(("low", "high"), (np.arange(100), 100 + np.arange(100)), (1.0, 1.0))
    orders = []
    for seed in (0, 1):
        config = dataclasses.replace(CONFIG, sequences=sequences, seed=seed)
        first_B = np.concatenate([batch(mixture, config, step)[:, 0] for step in range(8)])
        orders.append((first_B[first_B < 100][:8].tolist(), (first_B[first_B >= 100] - 100)[:8].tolist()))
        orders.append((first_B >= 100).tolist())
    assert orders[0][0] != orders[0][1]
    assert orders[0] != orders[2]
    assert orders[1] != orders[3]


def test_without_weights_a_mixture_is_by_size():
    large, small = Tokens.from_ids(IDS, "gpt2"), Tokens.from_ids(IDS[:50], "gpt2")
    mixture, val_N = open_corpus([Source("large", large), Source("small", small)], GPT2).split(0.2)
    assert (mixture.weights, len(val_N)) == ((80.0, 40.0), 30)


def test_every_source_must_fill_a_sequence():
    mixture = Mixture(("long", "short"), (np.arange(99), np.arange(8)), (1.0, 1.0))
    with pytest.raises(DataError, match="the training split of short has 8 tokens; sequences of 8 need one more"):
        check_enough(mixture, CONFIG, "training")


def test_an_id_outside_the_vocabulary_is_found_in_the_batch_that_holds_it():
    ids_N = np.arange(241)
    ids_N[77] = 300
    with pytest.raises(DataError, match=r"the data: id 300 at 77 is outside the vocabulary: 0 to 256"):
        [batch(ids_N, CONFIG, step) for step in range(8)]
    mixture = Mixture(("good", "bad"), (ids_N[:70], ids_N[70:]), (1.0, 1.0))
    with pytest.raises(DataError, match=r"bad: id 300 at 7 is outside the vocabulary: 0 to 256"):
        [batch(mixture, CONFIG, step) for step in range(30)]


@pytest.mark.parametrize("wrong", [2**32 + 5, -(2**32)])
def test_an_id_of_64_bits_does_not_wrap_into_the_vocabulary(wrong, tmp_path):
    ids_N = np.arange(240)
    ids_N[77] = wrong
    write_megatron(tmp_path / "a", ids_N, [240], 5, "<i8")
    mixture, _ = open_corpus(tmp_path / "a.idx", BYTES, tokenizer="bytes").split(0.0)
    with pytest.raises(DataError, match=rf"id {wrong} at 77 is outside the vocabulary: 0 to 256"):
        [batch(mixture, CONFIG, step) for step in range(8)]


def test_batches_read_ahead_are_those_read_at_once():
    read, seen = [], []

    def rows(step, part):
        read.append((step, part.start))
        return np.full(4, step)

    ahead = ReadAhead(rows, steps=5)
    for step in range(5):
        seen.append(int(ahead(step)[0]))
        ahead(step, slice(2, 4))
        # Of either part, the next two steps are being read; none beyond the last.
        assert sorted(waiting[0] for waiting in ahead._waiting) == sorted(2 * [*range(step + 1, min(step + 3, 5))])
    ahead.close()
    assert seen == [0, 1, 2, 3, 4]
    assert sorted(read, key=str) == sorted([(step, part) for step in range(5) for part in (None, 2)], key=str)


def test_an_error_in_reading_ahead_is_raised_at_its_step():
    def rows(step, part):
        if step == 2:
            raise DataError("has become shorter")
        return np.full(4, step)

    with contextlib.closing(ReadAhead(rows, steps=5)) as ahead:
        assert [int(ahead(step)[0]) for step in (0, 1)] == [0, 1]
        with pytest.raises(DataError, match="has become shorter"):
            ahead(2)


RUN = dataclasses.replace(
    CONFIG, steps=6, batch_size=2, final_learning_rate=1.0, eval_interval=3, checkpoint_interval=2, log_interval=1
)


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Tokens.from_ids(rng.integers(0, 256, 50), "bytes").save(tmp_path / name / f"{i}.tokens")
    return tmp_path


def test_a_mixture_resumes_bit_for_bit_also_after_its_shards_moved(shards):
    data = [f"one={shards}/one:0.75", f"two={shards}/two:0.25"]
    whole = train(RUN, data, shards / "whole")
    train(dataclasses.replace(RUN, steps=3), data, shards / "part")
    (shards / "one").rename(shards / "moved")
    with pytest.raises(ConfigError, match=r"no longer at .*one: say where it is now \(--data\)"):
        train(RUN, None, shards / "part", resume=True)
    with pytest.raises(ConfigError, match=r"data two: weight 0.25 before, 0.5 now"):
        train(RUN, [f"one={shards}/moved:0.75", f"two={shards}/two:0.5"], shards / "part", resume=True)
    with pytest.raises(ConfigError, match=r"data moved: identity .* before, .* now"):
        train(RUN, [f"{shards}/two:0.75", f"{shards}/moved:0.25"], shards / "part", resume=True)
    resumed = train(RUN, [f"{shards}/moved:0.75", f"{shards}/two:0.25"], shards / "part", resume=True)
    assert resumed.val_loss == whole.val_loss
    for a, b in zip(*([*_leaves(result.params)] for result in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)


def _leaves(tree):
    import jax

    return map(np.asarray, jax.tree.leaves(tree))


def test_a_corpus_is_verified_beside_the_training(shards, monkeypatch):
    path = shards / "two" / "1.tokens"
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(DataError, match=r"two/1.tokens: damaged: the ids do not have the sha256"):
        train(RUN, [str(shards / "one"), str(shards / "two")], shards / "at-once")
    assert not (shards / "at-once" / "run.json").exists()
    monkeypatch.setattr(verification, "AT_ONCE", 0)
    with pytest.raises(DataError, match=r"two/1.tokens: damaged: the ids do not have the sha256"):
        train(dataclasses.replace(RUN, steps=10**4), [str(shards / "one"), str(shards / "two")], shards / "aside")
    assert (shards / "aside" / "run.json").exists()
    with pytest.raises(DataError, match="sha256"):
        train(RUN, [str(shards / "one"), str(shards / "two")], shards / "verify", verify=True)
    assert not (shards / "verify" / "run.json").exists()


def test_the_end_of_a_run_ends_its_verification(shards, monkeypatch):
    monkeypatch.setattr(verification, "AT_ONCE", 0)
    corpus = open_corpus([str(shards / "one"), str(shards / "two")], BYTES)
    assert verification.Verification(corpus, 257, at_once=True).unread == 0
    read, asked = verification.Verification(corpus, 257), []
    assert read.unread == 6
    monkeypatch.setattr(read._stop, "is_set", lambda: asked.append(True) or len(asked) > 2)
    with read.running():
        pass
    assert read.unread == 4
    assert not any(thread.name == "verification" for thread in threading.enumerate())
    assert [verification.Verification(corpus, 257, part=(i, 4)).unread for i in range(4)] == [2, 2, 1, 1]
    small = verification.Verification(corpus, 5)
    small._read_aside()
    with pytest.raises(DataError, match="outside the vocabulary: 0 to 4"):
        small.check()
    # A long shard is not read to its end first.
    long, asked = Shard(np.zeros(3 * 2**20, np.uint16)), []
    assert not long.verify(257, lambda: asked.append(True) or len(asked) > 2)
    assert len(asked) == 3
    with pytest.raises(DataError, match="the tokens: id 300 at 1048579 is outside"):
        Shard(np.append(np.zeros(2**20 + 3, np.uint16), np.uint16(300))).verify(257)


def test_the_command_trains_on_a_mixture_and_says_what_it_validates_on(shards, capsys):
    rng = np.random.default_rng(1)
    config = shards / "run.toml"
    config.write_text(
        "[model]\nvocab_size = 50257\ncontext_length = 8\nemb_dim = 8\nn_heads = 2\nn_layers = 1\n"
        "[train]\nsteps = 2\nbatch_size = 2\nwarmup_steps = 0\n"
    )
    data = shards / "gpt2"
    data.mkdir()
    for name, size in (("train.bin", 200), ("val.bin", 40)):
        (data / name).write_bytes(rng.integers(0, 50257, size).astype("<u2").tobytes())
    write_llmc(shards / "web.bin", rng.integers(0, 50257, 300))
    words = ["train", str(config), "--data", f"openwebtext={data}:2", "--data", f"{shards}/web.bin:1"]
    assert main([*words, "--out", str(shards / "refused")]) == 2
    assert "--tokenizer NAME_OR_PATH" in capsys.readouterr().err
    assert main([*words, "--tokenizer", "gpt2", "--out", str(shards / "run")]) == 0
    told = capsys.readouterr()
    assert "openwebtext: its validation split (40 tokens) is what the run validates on" in told.out + told.err
    assert "470 tokens to train on, 70 to validate" in told.out + told.err
    # Which tokenizer made the ids is known by now.
    assert main(["train", "--resume", str(shards / "run"), "--set", "steps=3"]) == 0
    assert load_config(shards / "run").vocab_size == 50257
    words = ["evaluate", "--model", str(shards / "run"), "--data", str(data / "val.bin"), "--tokenizer", "gpt2"]
    assert main(words) == 0
    assert "over 39 tokens" in capsys.readouterr().out


def test_sources_made_in_python_are_named_in_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verification, "AT_ONCE", 0)
    monkeypatch.setattr(verification.Verification, "_read", lambda self: None)  # as if it had no time
    tokens = Tokens.from_text("To be, or not to be, that is the question", "bytes")
    with pytest.raises(DataError, match="verse: a weight must be a number above 0, not -1"):
        Source("verse", tokens, -1)
    train(
        dataclasses.replace(RUN, steps=1), [Source("verse", tokens, 0.5), Source("more", tokens, 0.5)], tmp_path / "a"
    )
    told = capsys.readouterr()
    assert "verified while training: all shards but 2; --verify reads them all first" in told.out + told.err
    with pytest.raises(ConfigError, match=r"does not say where the run's data is: give it \(--data\)"):
        train(None, None, tmp_path / "a", resume=True)
