"""OpenAI's TensorFlow directory: values and refusals, with files that the code here writes from their description. See
test_goldens.py for one that TensorFlow wrote, and test_fuzz.py for random damage."""

from __future__ import annotations

import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, make_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer_files import gpt2_files
from test_weights import assert_same, run_convert, small

from jaxgpt.cli import main
from jaxgpt.config import GPTConfig
from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.model.gpt import GPT
from jaxgpt.weights import crc32c, tensor_bundle
from jaxgpt.weights import formats as weights
from jaxgpt.weights.crc32c import A, B, C

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SMALL = GPTConfig(vocab_size=5, context_length=4, emb_dim=2, n_heads=1, n_layers=1, tokenizer="none")
DATA = "model.ckpt.data-00000-of-00001"


# The formats, written out by hand: this shares nothing with the code under test.


@functools.cache
def crc_table():
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    return table.tolist()


def plain_crc(data):
    table, crc = crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked_crc(data):
    crc = plain_crc(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def field(number, value):
    """A field of a protocol buffer: a number, or bytes (or text) after their length."""
    if isinstance(value, int):
        return varint(8 * number) + varint(value)
    return varint(8 * number + 2) + varint(len(value)) + bytes(value)


def entry(dtype=1, shape=(), shard=0, offset=0, size=4, crc=0, more=b""):
    axes = b"".join(field(2, field(1, axis)) for axis in shape)
    parts = field(1, dtype), field(2, axes), field(3, shard), field(4, offset), field(5, size)
    return b"".join(parts) + varint(8 * 6 + 5) + crc.to_bytes(4, "little") + more


def header(shards=1, endianness=0, min_consumer=0):
    version = field(1, 1) + field(2, min_consumer)
    return (b"", field(1, shards) + field(2, endianness) + field(3, version))


def block(items, interval=16):
    """A block of a table: keys without what they share with the last one, except every 16th."""
    out, starts, last = b"", [], b""
    for i, (key, value) in enumerate(items):
        shared = 0
        if i % interval == 0:
            starts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    starts = starts or [0]
    return out + b"".join(start.to_bytes(4, "little") for start in [*starts, len(starts)])


def table(blocks, compression=0):
    """A table of blocks: with their checksums, an empty block, a block of their places, and a footer."""
    out, places = b"", []
    for content in [*blocks, block([])]:
        places.append(varint(len(out)) + varint(len(content)))
        content += bytes([compression])
        out += content + masked_crc(content).to_bytes(4, "little")
    *places, empty = places
    content = block([(b"%09d" % i, place) for i, place in enumerate(places)], interval=1) + b"\0"
    listed = varint(len(out)) + varint(len(content) - 1)
    out += content + masked_crc(content).to_bytes(4, "little")
    return out + (empty + listed).ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


CODES = {"float32": 1, "float64": 2, "int64": 9, "bfloat16": 14, "float16": 19}


def bundle(prefix, tensors, shards=1, per_block=1000):
    """Writes the tensors, by name, as TensorFlow's `Saver` does, spread over data files and blocks; returns the items
    of the index."""
    files, items = [b""] * shards, []
    for i, name in enumerate(sorted(tensors)):
        data = tensors[name].tobytes()
        place = {"shard": i % shards, "offset": len(files[i % shards]), "size": len(data), "crc": masked_crc(data)}
        items.append((name.encode(), entry(CODES[tensors[name].dtype.name], tensors[name].shape, **place)))
        files[i % shards] += data
    for i, content in enumerate(files):
        prefix.with_name(f"{prefix.name}.data-{i:05d}-of-{shards:05d}").write_bytes(content)
    items = [header(shards), *items]
    blocks = [block(items[i : i + per_block]) for i in range(0, len(items), per_block)]
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(blocks))
    return items


def openai_tensors(params):
    p = jax.tree.map(np.asarray, params)
    out = {"model/wte": p["tok_emb"]["weight"], "model/wpe": p["pos_emb"]["weight"]}
    for i in range(len([name for name in p if name.startswith("trf_blocks_")])):
        b, h = p[f"trf_blocks_{i}"], f"model/h{i}/"
        q, k, v = b["att"]["qkv"]["weight"]
        out[h + "attn/c_attn/w"] = np.concatenate([q.T, k.T, v.T], axis=1)[None]
        out[h + "attn/c_attn/b"] = np.concatenate(list(b["att"]["qkv"]["bias"]))
        for theirs, ours in (
            ("attn/c_proj", b["att"]["out_proj"]),
            ("mlp/c_fc", b["ff"]["fc_in"]),
            ("mlp/c_proj", b["ff"]["fc_out"]),
        ):
            out[f"{h}{theirs}/w"], out[f"{h}{theirs}/b"] = ours["weight"].T[None], ours["bias"]
        for theirs, ours in (("ln_1", b["norm1"]), ("ln_2", b["norm2"])):
            out[f"{h}{theirs}/g"], out[f"{h}{theirs}/b"] = ours["scale"], ours["shift"]
    out["model/ln_f/g"], out["model/ln_f/b"] = p["final_norm"]["scale"], p["final_norm"]["shift"]
    return out


def hparams(config):
    return {
        "n_vocab": config.vocab_size,
        "n_ctx": config.context_length,
        "n_embd": config.emb_dim,
        "n_head": config.n_heads,
        "n_layer": config.n_layers,
    }


def write_openai(directory, config, params, name="model.ckpt", **options):
    directory.mkdir(exist_ok=True)
    (directory / "hparams.json").write_text(json.dumps(hparams(config)))
    (directory / "checkpoint").write_text(f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n')
    bundle(directory / name, openai_tensors(params), **options)
    return directory


# --- the checksum


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        pytest.param(bytes(32), 0x8A9136AA, id="zeros"),  # these four: RFC 3720, appendix B.4
        pytest.param(b"\xff" * 32, 0x62A8AB43, id="ones"),
        pytest.param(bytes(range(32)), 0x46DD794E, id="increasing"),
        pytest.param(bytes(range(31, -1, -1)), 0x113FDB5C, id="decreasing"),
        pytest.param(b"123456789", 0xE3069283, id="digits"),
        pytest.param(b"", 0, id="nothing"),
    ],
)
def test_checksum_of_published_vectors(data, crc):
    assert crc32c.crc32c(data) == plain_crc(data) == crc


@settings(max_examples=10)
@given(size=st.integers(0, 10_000), seed=st.integers(0, 9))
@example(size=8 * A - 4, seed=0)
@example(size=8 * A + 9, seed=0)
@example(size=2**20 + 8, seed=1)
@example(size=2**20 + 8 * (2 * A - 1) + 7, seed=2)
def test_checksum_of_any_bytes(size, seed):
    data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    assert crc32c.crc32c(data) == plain_crc(data.tobytes())
    assert crc32c.masked(crc32c.crc32c(data)) == masked_crc(data.tobytes())


def test_the_four_terms_are_a_multiple_of_the_checksums_polynomial():
    P = 0x11EDC6F41  # bit i is that of x^i
    remainder = 1 << A | 1 << B | 1 << C | 1
    while remainder.bit_length() >= P.bit_length():
        remainder ^= P << remainder.bit_length() - P.bit_length()
    assert remainder == 0


# --- what is read


@settings(max_examples=2)
@given(config=small, seed=st.integers(0, 99), shards=st.integers(1, 3), per_block=st.integers(1, 40))
@example(config=TINY, seed=0, shards=1, per_block=1000)
def test_openai_directory_gives_the_parameters_that_were_written(config, seed, shards, per_block, tmp_path):
    sizes = {name: getattr(config, name) for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")}
    config = GPTConfig(**sizes, tokenizer="none")
    _, params = make_model(config, seed)
    directory = write_openai(tmp_path / "openai", config, params, f"model-{seed}", shards=shards, per_block=per_block)
    loaded, got = weights.load(directory, check_finite=True)
    assert loaded == GPT(config)
    assert_same(got, params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_openai_directory_of_another_type_loads(dtype, tmp_path):
    _, params = make_model(SMALL)
    write_openai(tmp_path, SMALL, params)
    tensors = {name: array.astype(jnp.dtype(dtype)) for name, array in openai_tensors(params).items()}
    bundle(tmp_path / "model.ckpt", tensors)
    rounded = jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf).astype(jnp.dtype(dtype)).astype(np.float32)), params
    )
    assert_same(weights.load(tmp_path)[1], rounded)


def test_an_optimizers_state_is_not_read(tmp_path):
    _, params = make_model(SMALL)
    write_openai(tmp_path, SMALL, params)
    tensors = openai_tensors(params)
    state = {f"{name}/{slot}": array for name, array in tensors.items() for slot in ("Adam", "Adam_1", "Momentum")}
    state |= dict.fromkeys(("beta1_power", "model/beta2_power", "beta1_power_1"), np.float32(0.9))
    items = bundle(tmp_path / "model.ckpt", tensors | state | {"global_step": np.int64(3)})
    assert len(items) == 4 * len(tensors) + 5
    assert_same(weights.load(tmp_path)[1], params)


def test_the_checkpoint_that_is_named_is_read(tmp_path):
    _, old = make_model(SMALL)
    _, new = make_model(SMALL, 1)
    write_openai(tmp_path, SMALL, old, "model-500")
    write_openai(tmp_path, SMALL, new, "model-1000")
    assert_same(weights.load(tmp_path)[1], new)
    for text in (
        'all_model_checkpoint_paths: "model-1000"\nmodel_checkpoint_path: "model-500"',
        'model_checkpoint_path:"/x/y/model-500"',
    ):
        (tmp_path / "checkpoint").write_text(text)
        assert_same(weights.load(tmp_path)[1], old)
    (tmp_path / "checkpoint").unlink()
    with pytest.raises(CheckpointError, match=r"it has 2, and no file 'checkpoint' that names one"):
        weights.load(tmp_path)
    (tmp_path / "model-500.index").unlink()
    assert_same(weights.load(tmp_path)[1], new)


def test_the_tokenizer_of_an_openai_directory_is_used(tmp_path):
    directory = gpt2_files(tmp_path / "openai", ("encoder.json", "vocab.bpe"))
    write_openai(directory, SMALL, make_model(SMALL)[1])
    assert weights.load_config(directory).tokenizer == "gpt2"
    (directory / "vocab.bpe").unlink()
    assert weights.load_config(directory).tokenizer == "none"


def test_openai_directory_in_the_commands(tmp_path, capsys):
    _, params = make_model(SMALL)
    directory = write_openai(tmp_path / "openai", SMALL, params)
    assert run_convert(directory, tmp_path / "own", "--check-finite") == 0
    loaded, got = weights.load(tmp_path / "own")
    assert loaded == GPT(SMALL)
    assert_same(got, params)
    (directory / DATA).unlink()
    assert weights.load_config(directory) == SMALL
    assert main(["inspect", str(directory)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "n_layers 1, emb_dim 2, n_heads 1, context_length 4, vocab_size 5, tokenizer none" in shown


# --- what is refused

F32 = {"offset": 0, "size": 8, "shape": (2,), "crc": masked_crc(bytes(8))}
A_BLOCK = block([header(), (b"a", entry(**F32))])
HANDLE = varint(0) + varint(len(A_BLOCK))


def one(value, key=b"a"):
    return table([block([header(), (key, value)])])


def listing(entries, content=A_BLOCK):
    """A table whose block of places is any."""
    out = content + b"\0"
    out += masked_crc(out).to_bytes(4, "little")
    places = block(entries, interval=1)
    end = out + places + b"\0" + masked_crc(places + b"\0").to_bytes(4, "little")
    return end + (b"\0\0" + varint(len(out)) + varint(len(places))).ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def names_that_grow(count, length):
    """A block in which each name has all of the one before, so that few bytes stand for many."""
    value = entry(**F32)
    out = block([header(), (b"a" * length, value)])[:-8]
    for i in range(count):
        out += varint(length + i) + varint(1) + varint(len(value)) + b"a" + value
    return out + bytes(4) + (1).to_bytes(4, "little")


BAD_INDEX = {
    "nothing": (b"", "does not end as an index does"),
    "another file": (b"\x89PNG\r\n\x1a\n" * 10, "does not end as an index does"),
    "a footer alone": (bytes(40) + bytes.fromhex("57fb808b247547db"), "has 48 bytes, and a block at 0 to 0"),
    "a footer of ones": (b"\xff" * 40 + bytes.fromhex("57fb808b247547db"), "more than 64 bits"),
    "no entries": (table([]), "has no header"),
    "no header": (table([block([(b"a", entry(**F32))])]), "has no header"),
    "a header twice": (table([block([header(), header()])]), "out of order: '' follows ''"),
    "an empty name": (table([block([header()]), block([(b"", entry(**F32))])]), "out of order: '' follows ''"),
    "names out of order": (
        table([block([header(), (b"b", entry(**F32)), (b"a", entry(**F32))])]),
        "out of order: 'a' follows 'b'",
    ),
    "a name twice": (table([block([header(), (b"a", entry(**F32))]), block([(b"a", entry(**F32))])]), "out of order"),
    "a name that is not UTF-8": (one(entry(**F32), b"\xff"), "utf-8"),
    "more of a name than there is": (table([b"\5\1\0a" + bytes(4) + b"\1\0\0\0"]), "more of the former one"),
    "names that grow": (table([names_that_grow(300, 60_000)]), "entries need more than 16,777,216 bytes"),
    "a name beyond the block": (table([b"\0\x7f\0a" + bytes(4) + b"\1\0\0\0"]), "ends in the middle"),
    "a value beyond the block": (table([b"\0\1\x7fa" + bytes(4) + b"\1\0\0\0"]), "ends in the middle"),
    "2^32 starts": (table([b"\0\0\0\xff\xff\xff\xff"]), "has 7 bytes, and claims 4,294,967,295 points to search from"),
    "an empty block": (table([b""]), "has 0 bytes, and claims 0 points"),
    "another checksum": (one(entry(**F32)).replace(b"a", b"b", 1), "the checksum of its block at 0 is another"),
    "Snappy": (table([A_BLOCK], compression=1), "compressed with Snappy, which is not supported"),
    "zstd": (table([A_BLOCK], compression=2), "compressed with method 2"),
    "a block beyond the file": (listing([(b"z", varint(2**40) + varint(9))]), "a block at 1,099,511,627,776"),
    "a block of 2^63 bytes": (listing([(b"z", varint(0) + varint(2**63))]), "a block at 0 to 9,223,"),
    "a place without a size": (listing([(b"z", b"\0")]), "ends in the middle"),
    "a block listed twice": (listing([(b"y", HANDLE), (b"z", HANDLE)]), "its blocks overlap"),
    "big-endian": (table([block([header(endianness=1)])]), "big-endian"),
    "a later version": (table([block([header(min_consumer=2)])]), "a later TensorFlow"),
    "a header that is none": (table([block([(b"", b"\xff")])]), "ends in the middle"),
    "an entry that is none": (one(b"\x0a"), "ends in the middle"),
    "an entry with a group": (one(b"\x0b"), "wire type 3"),
    "a type that is text": (one(field(1, b"x")), "field 1 of an entry is of the wrong type"),
    "a shape that is a number": (one(field(1, 1) + field(2, 7)), "field 2 of an entry is of the wrong type"),
    "no type": (one(b""), "'a' has no proper type or shape"),
    "an unknown rank": (one(field(1, 1) + field(2, field(3, 1))), "'a' has no proper type or shape"),
    "a negative axis": (one(entry(shape=(2**64 - 1,))), "'a' has no proper type or shape"),
    "a thousand axes": (one(entry(shape=(1,) * 1000)), "'a' has no proper type or shape"),
    "10^18 elements": (one(entry(shape=(10**9, 10**9))), r"'a', \[1000000000, 1000000000\] of float32, has 4 bytes"),
    "a number of 70 bits": (one(b"\x08" + b"\xff" * 9 + b"\x7f"), "more than 64 bits"),
    "a tensor in slices": (one(entry(**F32, more=field(7, b""))), "'a' is stored in slices"),
    "a slice": (one(entry(**F32), b"\0a"), "stores a tensor in slices"),
    "another data file": (one(entry(**F32 | {"shard": 1})), "'a' is in data file 1, of 1"),
    "too long": (bytes(2**24) + one(entry(**F32)), "bytes, more than any model's"),
}  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    return write_openai(tmp_path / "openai", SMALL, make_model(SMALL)[1])


@pytest.mark.parametrize("case", BAD_INDEX)
def test_a_bad_index_is_refused(case, directory):
    content, match = BAD_INDEX[case]
    (directory / "model.ckpt.index").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=match) as caught:
            weights.load(directory)
        assert tracemalloc.get_traced_memory()[1] < 32e6
    finally:
        tracemalloc.stop()
    assert caught.value.path == directory / "model.ckpt.index"
    assert "not a readable index of a TensorFlow checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_index_of_more_entries_than_any_models_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.index").write_bytes(table([block([header(), *((b"%d" % i, field(1, 3)) for i in range(10, 60))])]))
    (tmp_path / "x.data-00000-of-00001").touch()
    assert len(tensor_bundle.open_bundle(tmp_path / "x")) == 50
    monkeypatch.setattr(tensor_bundle, "HEADER_LIMIT", 1500)
    with pytest.raises(CheckpointError, match=r"entries need more than 1,500 bytes"):
        tensor_bundle.open_bundle(tmp_path / "x")


def test_the_cases_above_differ_from_a_good_index_in_one_thing(tmp_path):
    prefix = tmp_path / "x"
    prefix.with_name("x.data-00000-of-00001").write_bytes(bytes(8))
    for good in (one(entry(**F32)), listing([(b"z", HANDLE)])):
        prefix.with_name("x.index").write_bytes(good)
        tensors = tensor_bundle.open_bundle(prefix)
        np.testing.assert_array_equal(tensors["a"].read(), np.zeros(2, np.float32))


def test_an_index_that_places_tensors_elsewhere_is_refused(directory):
    def rewrite(**places):
        items = [header(), *((name.encode(), entry(**F32 | place)) for name, place in places.items())]
        (directory / "model.ckpt.index").write_bytes(table([block(items)]))

    size = (directory / DATA).stat().st_size
    rewrite(a={"offset": size - 4})
    with pytest.raises(CheckpointError, match=rf"has {size} bytes, and model.ckpt.index places 'a' at {size - 4}"):
        weights.load(directory)
    rewrite(a={"offset": 2**63})
    with pytest.raises(CheckpointError, match=r"places 'a' at 9,223,"):
        weights.load(directory)
    rewrite(a={"offset": 4}, b={"offset": 0})
    with pytest.raises(CheckpointError, match=r"places 'b' and 'a' in the same bytes"):
        weights.load(directory)
    rewrite(a={"shape": (2**40,), "size": 2**42, "offset": 0})
    with pytest.raises(CheckpointError, match=r"places 'a' at 0 to 4,398,046,511,104"):
        weights.load(directory)


def test_damaged_values_are_found_by_their_checksum(directory):
    data = bytearray((directory / DATA).read_bytes())
    data[-2] ^= 1
    (directory / DATA).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the tensor 'model/wte' is damaged: its checksum is another") as caught:
        weights.load(directory)
    assert caught.value.path == directory / DATA


def test_every_unfit_tensor_of_an_openai_directory_is_in_one_error(directory):
    tensors = openai_tensors(make_model(SMALL)[1])
    del tensors["model/ln_f/b"]
    tensors["model/h0/attn/c_attn/w"] = tensors["model/h0/attn/c_attn/w"][0].T
    tensors["model/h0/mlp/c_fc/w"] = tensors["model/h0/mlp/c_fc/w"].transpose(0, 2, 1)
    tensors["model/h1/ln_1/b"] = tensors["model/h0/ln_1/b"]
    tensors["model/h0/ln_2/g"] = np.arange(2)
    bundle(directory / "model.ckpt", tensors)
    with pytest.raises(CheckpointError) as caught:
        weights.load(directory)
    assert caught.value.reason.splitlines()[1:] == [
        "  1 missing: 'model/ln_f/b'",
        "  1 unexpected: 'model/h1/ln_1/b'",
        "  2 of the wrong shape: 'model/h0/attn/c_attn/w' is [6, 2] and should be [2, 6], "
        "'model/h0/mlp/c_fc/w' is [8, 2] and should be [2, 8]",
        "  1 not of a floating-point type: 'model/h0/ln_2/g' is int64",
    ]


def test_a_file_of_a_tensorflow_checkpoint_says_to_give_the_directory(directory):
    for name in ("model.ckpt", "model.ckpt.index", DATA):
        with pytest.raises(CheckpointError, match=rf"{name}: part of a TensorFlow checkpoint: give the directory"):
            weights.load(directory / name)
    for content in (b"", bytes(100)):
        (directory / "model.ckpt.index").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model.ckpt: no such file"):
            weights.load(directory / "model.ckpt")
    for name in (".index", "a" * 250):
        with pytest.raises(CheckpointError, match=r"no such file"):
            weights.load(directory / name)


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        ("{", ConfigError, "cannot be read as JSON"),
        ("[1]", CheckpointError, "expected a JSON object"),
        ({"n_head": None}, ConfigError, "n_heads"),
        ({"n_layer": 10**9}, ConfigError, "n_layers"),
        ({"n_heads": 1}, ConfigError, "unknown key 'n_heads'; did you mean 'n_head'"),
        ({"use_rotary": True}, ConfigError, "unknown key 'use_rotary'"),
    ],
)
def test_bad_hparams_are_refused(content, error, match, directory):
    text = content if isinstance(content, str) else json.dumps(hparams(SMALL) | content)
    (directory / "hparams.json").write_text(text)
    with pytest.raises(error, match=match) as caught:
        weights.load_config(directory)
    assert "hparams.json" in str(caught.value)


def test_an_openai_directory_without_one_of_its_files_is_refused(directory):
    (directory / DATA).rename(directory / "data")
    with pytest.raises(CheckpointError, match=f"{DATA}: no such file"):
        weights.load(directory)
    (directory / "model.ckpt.index").unlink()
    with pytest.raises(CheckpointError, match=r"model\.ckpt\.index: no such file"):
        weights.load(directory)
    (directory / "checkpoint").unlink()
    with pytest.raises(
        CheckpointError, match=r"expected a TensorFlow checkpoint, such as model.ckpt.index: it has none"
    ):
        weights.load(directory)
    (directory / "hparams.json").write_text(json.dumps({"n_vocab": 5, "n_embd": 2}))
    with pytest.raises(CheckpointError, match=r"lacks n_ctx, n_head, n_layer"):
        weights.load(directory)
    (directory / "hparams.json").unlink()
    (directory / "checkpoint").write_text("")
    with pytest.raises(CheckpointError, match=r"without hparams.json"):
        weights.load(directory)


def test_a_directory_that_cannot_be_listed_is_refused(directory, monkeypatch):
    def iterdir(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(directory), "iterdir", iterdir)
    with pytest.raises(CheckpointError, match=r"openai: cannot be read: .*Permission denied"):
        weights.load(directory)


@pytest.mark.parametrize(
    "text",
    ["", "model.ckpt", 'model_checkpoint_path: ""', *(f'model_checkpoint_path: "{name}"' for name in (
        "../../elsewhere", "../model.ckpt", "sub/model.ckpt", "..", "/", "/x/..", "/x/", "a\0b", "\\303\\251", "~/x"))],
)  # fmt: skip
def test_a_checkpoint_file_that_names_something_else_is_refused(text, directory):
    (directory / "checkpoint").write_text(text)
    with pytest.raises(CheckpointError, match="checkpoint: expected 'model_checkpoint_path") as caught:
        weights.load(directory)
    assert len(str(caught.value)) < 400
    (directory / "checkpoint").write_bytes(b"\xff" * 9)
    with pytest.raises(CheckpointError, match="checkpoint: cannot be read"):
        weights.load(directory)
