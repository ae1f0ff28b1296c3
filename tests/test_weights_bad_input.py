"""Damaged, hostile and mismatched checkpoints are each refused with an error that says what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import jax
import msgpack as packer
import numpy as np
import pytest
from flax import serialization
from helpers import TINY, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
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

from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.weights import formats as weights
from jaxgpt.weights import msgpack
from jaxgpt.weights import tensors as files

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_raw(path, header, data, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.mark.parametrize(
    ("header", "size", "length"),
    [
        pytest.param({"a": F32}, 7, None, id="truncated"),
        pytest.param({"a": F32}, 9, None, id="trailing-bytes"),
        pytest.param({"a": F32}, 8, 10**6, id="header-longer-than-file"),
        pytest.param({"a": F32}, 8, 2**63, id="header-length-absurd"),
        pytest.param({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, 12, None, id="overlap"),
        pytest.param({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, 20, None, id="gap"),
        pytest.param({"a": {**F32, "data_offsets": [0, 800]}}, 8, None, id="out-of-range"),
        pytest.param({"a": {**F32, "data_offsets": [8, 0]}}, 8, None, id="backwards"),
        pytest.param({"a": {**F32, "shape": [2**40, 2**40]}}, 8, None, id="absurd-shape"),
        pytest.param({"a": {**F32, "shape": [-2]}}, 8, None, id="negative-shape"),
        pytest.param({"a": {**F32, "dtype": "F31"}}, 8, None, id="unknown-type"),
        pytest.param(b"{nope", 8, None, id="not-json"),
        pytest.param(b"[" * 5000, 0, None, id="deeply-nested"),
        pytest.param(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), 8, None, id="duplicate-key"),
        pytest.param(b"\xff\xfe{}", 0, None, id="not-utf8"),
        pytest.param([], 0, None, id="not-an-object"),
    ],
)
def test_malformed_safetensors_is_refused_before_anything_is_allocated(header, size, length, tmp_path):
    path = write_raw(tmp_path / "model.safetensors", header, bytes(size), length)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="not a readable safetensors file") as caught:
        weights.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.path == path
    assert peak < 1e6


def test_a_header_longer_than_any_models_is_refused(tmp_path):
    """safetensors accepts headers of up to 100 MB, which would take gigabytes when parsed."""
    header = b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'.ljust(files.HEADER_LIMIT + 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"a header of 16,777,224 bytes is longer than any model's"):
        weights.load(path)


@pytest.mark.parametrize("content", [b"", b"abc", b"To be, or not to be, that is the question."])
def test_files_of_another_kind_are_refused(content, tmp_path):
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        weights.load(tmp_path / "model")


def test_truncated_model_is_refused(tiny, tmp_path):
    weights.save(tmp_path / "model", *tiny)
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a readable safetensors file") as caught:
        weights.load(tmp_path / "model")
    assert caught.value.path == path


def test_file_that_shrinks_between_opening_and_reading_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones(4, np.float32)}, path)
    tensor = files.open_safetensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="shorter"):
        tensor.read()
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        tensor.read()


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "book.safetensors"
    path.write_bytes(b"")

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "open", deny)  # root may open anything
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Permission denied"):
        weights.load(path)


def test_errors_pass_between_processes_whole():
    error = pickle.loads(pickle.dumps(CheckpointError("a/b", "is truncated")))
    assert (str(error), error.path.name, error.reason) == ("a/b: is truncated", "b", "is truncated")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_never_gets_further_than_a_clear_error(data, tiny, tmp_path):
    path = tmp_path / "model" / "model.safetensors"
    if not path.exists():
        weights.save(tmp_path / "model", *tiny)
        (tmp_path / "good").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "good").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for at in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        _, params = weights.load(tmp_path / "model")
    except CheckpointError:
        return
    assert jax.tree.structure(params) == jax.tree.structure(tiny[1])


def test_every_unfit_tensor_is_in_one_error(tiny, tmp_path):
    tensors = hf_tensors(tiny[1], prefix="")
    del tensors["ln_f.bias"], tensors["h.1.mlp.c_fc.weight"]
    tensors["h.2.ln_1.weight"] = tensors["score"] = np.ones(24, np.float32)
    tensors["wpe.weight"] = np.ones((24, 16), np.float32)
    tensors["h.0.attn.c_attn.weight"] = tensors["h.0.attn.c_attn.weight"].T.copy()
    tensors["ln_f.weight"] = np.ones(24, np.int64)
    with pytest.raises(CheckpointError) as caught:
        weights.load(write_hf(tmp_path, TINY, tensors))
    assert caught.value.reason.splitlines()[1:] == [
        "  2 missing: 'h.1.mlp.c_fc.weight', 'ln_f.bias'",
        "  2 unexpected: 'h.2.ln_1.weight', 'score'",
        "  2 of the wrong shape: 'wpe.weight' is [24, 16] and should be [16, 24], "
        "'h.0.attn.c_attn.weight' is [72, 24] and should be [24, 72]",
        "  1 not of a floating-point type: 'ln_f.weight' is I64",
    ]


def test_a_long_list_is_cut_and_counted(tmp_path):
    tensors = {f"junk.{i}": np.ones(1, np.float32) for i in range(1000)}
    with pytest.raises(CheckpointError) as caught:
        weights.load(write_hf(tmp_path, TINY, tensors))
    assert "1000 unexpected" in caught.value.reason
    assert "and 980 more" in caught.value.reason
    assert len(caught.value.reason) < 2000


def test_a_layer_too_few_or_too_many_is_refused(tmp_path):
    params = make_model(TINY)[1]
    for n_layers, kind in ((1, "12 unexpected: 'transformer.h.1|12 unexpected: 'h.1"), (3, "12 missing: 'h.2")):
        write_hf(tmp_path, TINY.replace(n_layers=n_layers), hf_tensors(params))
        with pytest.raises(CheckpointError, match=kind):
            weights.load(tmp_path)


def test_a_name_with_and_without_its_prefix_is_refused(tiny, tmp_path):
    tensors = hf_tensors(tiny[1], prefix="")
    tensors["transformer.wte.weight"] = tensors["wte.weight"]
    with pytest.raises(CheckpointError, match=r"'wte.weight' appears twice"):
        weights.load(write_hf(tmp_path, TINY, tensors))


@pytest.mark.parametrize(
    ("switches", "name"),
    [
        ({"n_layer": 10**9}, "n_layers"),
        ({"n_embd": 10**9}, "emb_dim"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"n_head": 5}, "emb_dim must be a multiple of n_heads"),
        ({"n_head": 0}, "n_heads"),
        ({"n_positions": -1}, "context_length"),
        ({"n_embd": 24.0}, "emb_dim"),
        ({"n_embd": None}, "emb_dim"),
        ({"activation_function": "gelu_10"}, "activation_function"),
        ({"activation_function": "quick_gelu"}, "activation_function"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"scale_attn_weights": None}, "scale_attn_weights must be a bool"),
        ({"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx must be a bool"),
        ({"add_cross_attention": True}, "add_cross_attention must be false, not True: not implemented"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder must be false"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads must be {}"),
        ({"per_layer_config": {"0": {"n_inner": 8}}}, "per_layer_config must be null"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be null"),
        ({"compression_config": {"format": "x"}}, "compression_config must be null"),
        ({"position_embedding_type": "relative_key"}, 'position_embedding_type must be "absolute"'),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map names the model's own code"),
        ({"hidden_size": 25}, "n_embd and hidden_size mean the same, and cannot be 24 and 25"),
        *(
            ({key: value}, f"'{key}' is no key of transformers' GPT-2, and .* may change what the model computes")
            for key, value in {
                "attention_head_type": "multiquery",
                "use_alibi": True,
                "alibi": True,
                "rope_theta": 1e4,
                "sliding_window": 4,
                "layer_types": ["sliding_attention"],
                "attention_chunk_size": 4,
                "mup_embeddings_scale": 10.0,
                "layer_norm_eps": 1e-12,
                "hidden_act": "relu",
                "num_experts": 8,
                "attn_logit_softcapping": 30.0,
                "use_rmsnorm": True,
                "parallel_residual": True,
                "use_bias": True,
            }.items()
        ),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_eps"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_eps"),
        ({"attn_pdrop": 2}, "drop_rate_attn"),
        ({"tie_word_embeddings": "yes"}, "tie_embeddings"),
    ],
)
def test_hugging_face_switches_not_honoured_are_refused_by_name(switches, name, tiny, tmp_path):
    write_hf(tmp_path, TINY, hf_tensors(tiny[1]), **switches)
    with pytest.raises(ConfigError, match=name) as caught:
        weights.load(tmp_path)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        ("{", ConfigError, "cannot be read as JSON"),
        ("[]", CheckpointError, "'format': 'jaxgpt'"),
        ("{}", CheckpointError, "'model_type': 'gpt2'"),
        ('{"model_type": "llama"}', CheckpointError, "'gpt2', not 'llama'"),
        ('{"architectures": ["LlamaForCausalLM"]}', CheckpointError, "LlamaForCausalLM"),
        ('{"format": "jaxgpt", "version": 2, "config": {}}', CheckpointError, "version 1"),
        ('{"format": "jaxgpt", "version": 1}', CheckpointError, "'config' object"),
        ('{"format": "jaxgpt", "version": 1, "config": {}, "compute": 3}', CheckpointError, "'compute' object"),
        ('{"format": "jaxgpt", "version": 1, "config": {}, "compute": {"dtype": 3}}', ConfigError, "dtype must be"),
        ('{"format": "jaxgpt", "version": 1, "config": {"n_layer": 2}}', ConfigError, "did you mean 'n_layers'"),
        ('{"format": "jaxgpt", "version": 1, "config": {"n_layers": 1000000000}}', ConfigError, "n_layers"),
    ],
)
def test_bad_config_json_is_refused(content, error, match, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=match):
        weights.load(tmp_path)


def test_largest_allowed_depth_with_a_small_file_allocates_nothing(tiny, tmp_path):
    write_hf(tmp_path, TINY.replace(n_layers=4096, emb_dim=2**16, n_heads=64), hf_tensors(tiny[1]))
    with pytest.raises(CheckpointError, match="missing"):
        weights.load(tmp_path)


@pytest.mark.parametrize("whole", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
@pytest.mark.parametrize("file", ["../../elsewhere{}", "/etc/passwd", "sub/x{}", "..", "", "a\\b{}", "x\0{}", "x.npy"])
def test_index_that_names_a_file_elsewhere_is_refused(file, whole, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    index = {"wte.weight": file.format(Path(whole).suffix)}
    (tmp_path / f"{whole}.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match="beside the index"):
        weights.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_malformed_index_is_refused(content, tiny, tmp_path):
    write_shards(tmp_path, TINY, hf_tensors(tiny[1]))
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="weight_map"):
        weights.load(tmp_path)


def test_index_that_disagrees_with_its_shards_is_refused(tiny, tmp_path):
    index = write_shards(tmp_path, TINY, hf_tensors(tiny[1]))
    first, second = sorted(set(index.values()))
    save_file({**load_file(tmp_path / second), "transformer.wte.weight": np.ones(1)}, tmp_path / second)
    with pytest.raises(CheckpointError, match=f"{second} holds the tensor 'transformer.wte.weight'"):
        weights.load(tmp_path)
    index = write_shards(tmp_path, TINY, hf_tensors(tiny[1]))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**index, "lost": first}}))
    with pytest.raises(CheckpointError, match="'lost'"):
        weights.load(tmp_path)
    (tmp_path / first).unlink()
    with pytest.raises(CheckpointError, match=f"{first}: no such file"):
        weights.load(tmp_path)


def test_paths_that_lead_nowhere_are_refused_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgpt.hub.download", lambda *_, **__: pytest.fail("asked the hub"))
    for path in (tmp_path / "nothing", str(tmp_path / "nothing"), "./gpt2", "runs/a/b", "model.pth", "x.safetensors"):
        with pytest.raises(CheckpointError, match="no such file or directory"):
            weights.load(path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors, .* or one of these"):
        weights.load(tmp_path)


def test_tensor_file_of_a_directory_given_alone_says_to_give_the_directory(tiny, tmp_path):
    weights.save(tmp_path / "model", *tiny)
    with pytest.raises(CheckpointError, match="give the directory"):
        weights.load(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_names_every_bad_parameter(value, tiny, tmp_path):
    tensors = {name: np.array(array) for name, array in hf_tensors(tiny[1]).items()}
    tensors["transformer.h.1.attn.c_attn.weight"][3, 5:8] = value
    tensors["transformer.ln_f.bias"][0] = value
    write_hf(tmp_path, TINY, tensors)
    weights.load(tmp_path)
    for options in ({}, {"scan_layers": True}, {"param_dtype": "bfloat16"}):
        with pytest.raises(CheckpointError) as caught:
            weights.load(tmp_path, check_finite=True, **options)
        assert "2 parameters: trf_blocks_1/att/qkv/weight (3 of 1728), final_norm/shift (1 of 24)" in str(caught.value)


def test_book_file_with_missing_parts_is_refused(tmp_path):
    tensors = book_tensors(make_model(BOOK)[1])
    path = tmp_path / "book.safetensors"
    for name, match in (
        ("pos_emb.weight", "pos_emb.weight"),
        ("out_head.weight", "1 missing: 'out_head.weight'"),
        ("trf_blocks.1.att.W_key.weight", "1 missing: 'trf_blocks.1.att.W_key.weight'"),
    ):
        save_file({key: array for key, array in tensors.items() if key != name}, path)
        with pytest.raises(CheckpointError, match=match):
            weights.load(path, n_heads=3)
    save_file({**tensors, "trf_blocks.999999999.norm1.scale": np.ones(24, np.float32)}, path)
    with pytest.raises(ConfigError, match="n_layers"):
        weights.load(path, n_heads=3)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="multiple of n_heads"):
        weights.load(path, n_heads=5)


class Canary:
    """Unpickling this creates a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_bare_pickle_is_refused_and_not_executed(tmp_path):
    canary = tmp_path / "canary"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "model.pth").write_bytes(pickle.dumps(Canary(canary), protocol=protocol))
        with pytest.raises(CheckpointError, match=r"bare pickle|not a readable"):
            weights.load(tmp_path / "model.pth")
        assert not canary.exists()


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {"a": x}, "model_args": {}}])
def test_malicious_torch_file_is_refused_and_not_executed(wrap, tmp_path):
    torch = pytest.importorskip("torch")
    canary = tmp_path / "canary"
    torch.save(wrap(Canary(canary)), tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        weights.load(tmp_path / "ckpt.pt")
    assert not canary.exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)
    assert canary.exists()  # the file really was dangerous


def test_malicious_pickle_in_the_old_torch_format_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    for name in ("old.pt", "pytorch_model.bin"):
        torch.save(Canary(tmp_path / "canary"), tmp_path / name, _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    for path in (tmp_path / "old.pt", tmp_path):
        with pytest.raises(CheckpointError, match="weights_only=True"):
            weights.load(path)
    assert not (tmp_path / "canary").exists()
    torch.load(tmp_path / "old.pt", weights_only=False)
    assert (tmp_path / "canary").exists()  # the file really was dangerous


def test_an_old_torch_file_that_claims_more_than_it_holds_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"wte.weight": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    good = path.read_bytes()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    claims = good.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f")  # 1000 as a pickle, and 2^31 - 1
    assert len(claims) > len(good)
    for content in (claims, good[:-1], good[: len(good) // 2], good[:50], good[:16]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="refused it"):
            weights.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "expected a state dict, not list"),
        (b"\x80\x04K\x01.", "bare pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "git lfs pull"),
        (b"", "not a file that torch.save writes: it begins with b''"),
        (b"PK\x03\x04 and nothing more", "refused it"),
    ],
)
def test_a_pytorch_bin_that_is_none_is_refused(content, match, tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    if isinstance(content, bytes):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=match):
        weights.load(tmp_path)


def flax_array(shape, dtype="float32", data=b"", kind=1):
    return packer.ExtType(kind, packer.packb([shape, dtype, data]))


def chunked(shape, *chunks):
    return {
        msgpack.CHUNKED: True,
        "shape": {str(i): size for i, size in enumerate(shape)},
        "chunks": {str(i): chunk for i, chunk in enumerate(chunks)},
    }


def deep(levels):
    return b"\x81\xa1a" * levels + packer.packb(flax_array([]))


BAD_MSGPACK = {
    "nothing": (b"", "ends in the middle"),
    "another file": (b"\x89PNG\r\n\x1a\n", "expected text"),
    "an empty list": (b"\x90", "not array"),
    "a number": (b"\x07", "expected an array at ''"),
    "a reserved byte": (b"\xc1", "0xc1"),
    "text for an array": ({"a": "b"}, "not text"),
    "bytes for an array": ({"a": b"b"}, "not bytes"),
    "a list for an array": ({"a": [1]}, "not array"),
    "a number for an array": ({"a": {"b": 7}}, "expected an array at 'a/b', not 7"),
    "no value": ({"a": None}, "0xc0"),
    "a float": ({"a": 0.5}, "0xcb"),
    "a complex number": ({"a": packer.ExtType(2, packer.packb([1.0, 2.0]))}, "extension of type 2"),
    "a scalar": ({"a": flax_array([], data=b"1234", kind=3)}, "extension of type 3"),
    "a time": ({"a": packer.Timestamp(1)}, "extension of type -1"),
    "an unknown extension": ({"a": packer.ExtType(42, b"abcd")}, "extension of type 42"),
    "an extension without an array": ({"a": packer.ExtType(1, b"abcd")}, "expected array"),
    "an empty extension": ({"a": packer.ExtType(1, b"")}, "ends in the middle"),
    "two parts": ({"a": packer.ExtType(1, packer.packb([[1], "int8"]))}, "a shape, a dtype and bytes"),
    "a negative size": ({"a": flax_array([-1])}, "0xff"),
    "a size that is text": ({"a": flax_array(["1"])}, "expected integer"),
    "data as text": ({"a": flax_array([1], "int8", "x")}, "expected bytes"),
    "fewer bytes than its shape": ({"a": flax_array([3], data=b"12345678")}, r"an array \[3\] of float32 has 8 bytes"),
    "more bytes than its shape": ({"a": flax_array([1], data=b"12345678")}, r"an array \[1\] of float32 has 8 bytes"),
    "10^18 elements": ({"a": flax_array([10**9, 10**9], data=b"1234")}, "has 4 bytes"),
    "2^32 bytes": (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01\x93", "claims an array of 4,294,967,295 bytes"),
    "2^32 values": (b"\x81\xa1a\xc7\x0d\x01\x93\x91\x01\xa4int8\xc6\xff\xff\xff\xff", "claims 4,294,967,295 for its"),
    "2^32 sizes": (b"\x81\xa1a\xc7\x08\x01\x93\xdd\xff\xff\xff\xff\x00\x00", "ends in the middle"),
    "2^32 keys": (b"\xdf\xff\xff\xff\xff\xa1a\x01", "ends in the middle"),
    "a key of 2^32 bytes": (b"\x81\xdb\xff\xff\xff\xffa", "more than 16,777,216 bytes beside"),
    "a key that is a number": ({1: flax_array([])}, "expected text"),
    "a key that is not UTF-8": (b"\x81\xa1\xff\x01", "utf-8"),
    "a key twice": (b"\x82\xa1a\x80\xa1a\x80", "the key 'a' twice"),
    "a name twice": ({"a/b": flax_array([0]), "a": {"b": flax_array([0])}}, "two arrays 'a/b'"),
    "bytes that follow": (packer.packb({"a": flax_array([0])}) + b"\0", "1 bytes follow"),
    "maps within maps": (deep(100_000), "more than 32 deep"),
    "chunks without a shape": ({msgpack.CHUNKED: True, "chunks": {"0": flax_array([0])}}, "no proper 'shape'"),
    "chunks that are numbers": ({"a": chunked([1], 7)}, "no proper 'chunks'"),
    "chunks of two types": ({"a": chunked([2], flax_array([1], "int8", b"1"), flax_array([0]))}, "of 2 types"),
    "no chunks": ({"a": chunked([2])}, "of 0 types"),
    "chunks of another size": ({"a": chunked([3], flax_array([1], data=b"1234"))}, r"an array \[3\] of float32"),
    "a sparse shape": ({"a": {**chunked([], flax_array([0])), "shape": {"1": 1}}}, "no proper 'shape'"),
}


@pytest.mark.parametrize("case", BAD_MSGPACK)
def test_a_msgpack_that_flax_does_not_write_is_refused(case, tmp_path):
    content, match = BAD_MSGPACK[case]
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content if isinstance(content, bytes) else packer.packb(content))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=match) as caught:
            weights.load(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 32e6
    finally:
        tracemalloc.stop()
    assert "not a readable msgpack file of Flax" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["object", "O", "float32\0", "V4", "datetime64", "int64", "x" * 70_000, "\u202e"])
def test_a_msgpack_with_a_misleading_dtype_is_refused(dtype, tiny, tmp_path):
    tree = flax_tree(tiny[1])
    shape, data = tree["transformer"]["wpe"]["embedding"].shape, tree["transformer"]["wpe"]["embedding"].tobytes()
    tree["transformer"]["wpe"]["embedding"] = flax_array(shape, dtype, data)
    write_flax(tmp_path, TINY, {})
    (tmp_path / "flax_model.msgpack").write_bytes(packer.packb(tree, default=serialization._msgpack_ext_pack))
    with pytest.raises(CheckpointError, match=r"1 not of a floating-point type: 'wpe.weight' is .") as caught:
        weights.load(tmp_path)
    assert len(str(caught.value)) < 500


def test_every_unfit_array_of_a_msgpack_is_in_one_error(tiny, tmp_path):
    tree = flax_tree(tiny[1])
    transformer = tree["transformer"]
    del transformer["ln_f"]["bias"]
    tree["opt_state"] = {"count": np.zeros((), np.int32)}
    transformer["h"]["1"]["mlp"]["c_fc"]["kernel"] = transformer["h"]["1"]["mlp"]["c_fc"]["kernel"].T
    transformer["wte"]["weight"] = transformer["wte"]["embedding"]
    with pytest.raises(CheckpointError, match=r"'transformer.wte.weight' appears twice"):
        weights.load(write_flax(tmp_path, TINY, tree))
    del transformer["wte"]["weight"]
    with pytest.raises(CheckpointError) as caught:
        weights.load(write_flax(tmp_path, TINY, tree))
    assert caught.value.reason.splitlines()[1:] == [
        "  1 missing: 'ln_f.bias'",
        "  1 unexpected: 'opt_state.count'",
        "  1 of the wrong shape: 'h.1.mlp.c_fc.weight' is [96, 24] and should be [24, 96]",
    ]


def test_a_msgpack_given_alone_says_to_give_the_directory(tiny, tmp_path):
    write_flax(tmp_path, TINY, flax_tree(tiny[1]))
    with pytest.raises(CheckpointError, match=r"holds 'transformer/.* give the directory"):
        weights.load(tmp_path / "flax_model.msgpack")


def test_weights_of_another_program_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    (tmp_path / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, .*; tf_model.h5 is in a format that is not read"):
        weights.load(tmp_path)


def test_a_link_to_nothing_does_not_make_way_for_other_weights(tiny, tmp_path):
    write_flax(tmp_path, TINY, flax_tree(tiny[1]))
    for name in ("model.safetensors", INDEX):
        (tmp_path / name).symlink_to("nothing")
        with pytest.raises((CheckpointError, ConfigError), match=name):
            weights.load(tmp_path)
        (tmp_path / name).unlink()


def test_torch_files_that_are_no_checkpoint_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    for content, match in (
        ([1, 2], "it holds list"),
        ({"weights": torch.ones(2)}, "it holds 'weights'"),
        ({"tok_emb.weight": 3}, "'tok_emb.weight' is not a dense tensor"),
        ({"tok_emb.weight": torch.ones(1).expand(10**6, 10**6)}, "has no data in the file"),
        ({"tok_emb.weight": torch.eye(3).to_sparse()}, "not a dense tensor"),
        ({"tok_emb.weight": torch.ones(2)}, "expected a matrix 'tok_emb.weight'"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=match):
            weights.load(path, n_heads=3)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="refused it"):
        weights.load(path)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ({"use_rmsnorm": True}, ConfigError, "unknown key 'use_rmsnorm'"),
        ({"n_layer": 10**9}, ConfigError, "n_layers"),
        ({"n_head": None}, ConfigError, "n_heads"),
        ({"bias": 1}, ConfigError, "bias"),
    ],
)
def test_nanogpt_arguments_not_honoured_are_refused(args, error, match, tmp_path):
    torch = pytest.importorskip("torch")
    content = nanogpt_checkpoint(TINY, make_model(TINY)[1])
    content["model_args"] |= args
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(error, match=match):
        weights.load(tmp_path / "ckpt.pt")


def test_nanogpt_without_its_arguments_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    content = nanogpt_checkpoint(TINY, make_model(TINY)[1])
    del content["model_args"]["n_head"]
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="lacks n_head"):
        weights.load(tmp_path / "ckpt.pt")
