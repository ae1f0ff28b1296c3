"""Reads and, where supported, writes checkpoints of every format. test_weights_bad_input.py has the bad files."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import ALTERNATING, TINY, exhaustive, grid, make_model, random_ids
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxgpt import files, prepare
from jaxgpt.cli import convert, export, main
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.errors import CheckpointError, ConfigError, MissingExtraError
from jaxgpt.generation.text import generate_text
from jaxgpt.model.gpt import GPT
from jaxgpt.model.params import cast_params, leaves, resize_embeddings, stack_layers, unstack_layers
from jaxgpt.tokenizer import get_tokenizer
from jaxgpt.weights import book, huggingface, layout, msgpack, nanogpt
from jaxgpt.weights import formats as weights
from jaxgpt.weights import tensors as tensors_module

pytestmark = pytest.mark.usefixtures("compiled_quickly")

UNTIED = TINY.replace(tie_embeddings=False)
BOOK = TINY.replace(tie_embeddings=False, qkv_bias=False)
INDEX = "model.safetensors.index.json"
BY_LAYER = TINY.replace(activation="silu", scale_attn_by_inverse_layer_idx=True)
NANOGPT_BARE = TINY.replace(bias=False, qkv_bias=False, activation="gelu")


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array), path
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def logits(model, params, seed=1):
    return np.asarray(model.apply({"params": params}, random_ids(model.config, 2, 9, seed)))


# The layouts, written out by hand: these share nothing with the tables that they test.


def hf_tensors(params, prefix="transformer.", head=False):
    p = jax.tree.map(np.asarray, params)
    D = p["tok_emb"]["weight"].shape[1]
    out = {"wte.weight": p["tok_emb"]["weight"], "wpe.weight": p["pos_emb"]["weight"]}
    for i in range(len([name for name in p if name.startswith("trf_blocks_")])):
        b, h = p[f"trf_blocks_{i}"], f"h.{i}."
        q, k, v = b["att"]["qkv"]["weight"]
        out[h + "ln_1.weight"], out[h + "ln_1.bias"] = b["norm1"]["scale"], b["norm1"]["shift"]
        out[h + "attn.c_attn.weight"] = np.concatenate([q.T, k.T, v.T], axis=1)
        out[h + "attn.c_attn.bias"] = np.concatenate(list(b["att"]["qkv"]["bias"]))
        out[h + "attn.c_proj.weight"] = b["att"]["out_proj"]["weight"].T
        out[h + "attn.c_proj.bias"] = b["att"]["out_proj"]["bias"]
        out[h + "ln_2.weight"], out[h + "ln_2.bias"] = b["norm2"]["scale"], b["norm2"]["shift"]
        out[h + "mlp.c_fc.weight"], out[h + "mlp.c_fc.bias"] = b["ff"]["fc_in"]["weight"].T, b["ff"]["fc_in"]["bias"]
        out[h + "mlp.c_proj.weight"] = b["ff"]["fc_out"]["weight"].T
        out[h + "mlp.c_proj.bias"] = b["ff"]["fc_out"]["bias"]
    out["ln_f.weight"], out["ln_f.bias"] = p["final_norm"]["scale"], p["final_norm"]["shift"]
    out = {prefix + name: np.ascontiguousarray(array) for name, array in out.items()}
    assert out[f"{prefix}h.0.attn.c_attn.weight"].shape == (D, 3 * D)
    if head:
        out["lm_head.weight"] = p.get("out_head", p["tok_emb"])["weight"]
    return out


def hf_config(config, **changes):
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.emb_dim,
        "n_head": config.n_heads,
        "n_layer": config.n_layers,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "jaxgpt_tokenizer": config.tokenizer,  # as in our exports; without it, these sizes have none
        **changes,
    }


def write_hf(directory, config, tensors, **changes):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config, **changes)))
    save_file(tensors, directory / "model.safetensors")
    return directory


def book_tensors(params):
    p = jax.tree.map(np.asarray, params)
    out = {"tok_emb.weight": p["tok_emb"]["weight"], "pos_emb.weight": p["pos_emb"]["weight"]}
    for i in range(len([name for name in p if name.startswith("trf_blocks_")])):
        b, t = p[f"trf_blocks_{i}"], f"trf_blocks.{i}."
        for j, name in enumerate(("W_query", "W_key", "W_value")):
            for kind, array in b["att"]["qkv"].items():
                out[f"{t}att.{name}.{kind}"] = array[j]
        out[t + "att.mask"] = np.triu(np.ones((TINY.context_length,) * 2, np.float32), 1)
        for kind in ("weight", "bias"):
            out[f"{t}att.out_proj.{kind}"] = b["att"]["out_proj"][kind]
            out[f"{t}ff.layers.0.{kind}"] = b["ff"]["fc_in"][kind]
            out[f"{t}ff.layers.2.{kind}"] = b["ff"]["fc_out"][kind]
        for norm in ("norm1", "norm2"):
            out[f"{t}{norm}.scale"], out[f"{t}{norm}.shift"] = b[norm]["scale"], b[norm]["shift"]
    out["final_norm.scale"], out["final_norm.shift"] = p["final_norm"]["scale"], p["final_norm"]["shift"]
    out["out_head.weight"] = p["out_head"]["weight"]
    return {name: np.array(array) for name, array in out.items()}


def flax_tree(params, head=False):
    p = jax.tree.map(np.asarray, params)

    def linear(leaf):
        weight = leaf["weight"].reshape(-1, leaf["weight"].shape[-1])
        return {"kernel": weight, "bias": leaf["bias"].reshape(-1)}  # [out, in], unlike Flax's own Dense

    def norm(leaf):
        return {"scale": leaf["scale"], "bias": leaf["shift"]}

    blocks = {
        name.removeprefix("trf_blocks_"): {
            "ln_1": norm(b["norm1"]),
            "attn": {"c_attn": linear(b["att"]["qkv"]), "c_proj": linear(b["att"]["out_proj"])},
            "ln_2": norm(b["norm2"]),
            "mlp": {"c_fc": linear(b["ff"]["fc_in"]), "c_proj": linear(b["ff"]["fc_out"])},
        }
        for name, b in p.items()
        if name.startswith("trf_blocks_")
    }
    embeddings = {name: {"embedding": p[ours]["weight"]} for name, ours in (("wte", "tok_emb"), ("wpe", "pos_emb"))}
    tree = {"transformer": {**embeddings, "h": blocks, "ln_f": norm(p["final_norm"])}}
    return tree | ({"lm_head": {"kernel": p.get("out_head", p["tok_emb"])["weight"].T.copy()}} if head else {})


def write_flax(directory, config, tree):
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    (directory / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    return directory


def nanogpt_tensors(config, params):
    p = jax.tree.map(np.asarray, params)
    state = {"transformer.wte.weight": p["tok_emb"]["weight"], "transformer.wpe.weight": p["pos_emb"]["weight"]}
    for i in range(config.n_layers):
        b, h = p[f"trf_blocks_{i}"], f"transformer.h.{i}."
        state[h + "ln_1.weight"], state[h + "ln_2.weight"] = b["norm1"]["scale"], b["norm2"]["scale"]
        state[h + "attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
        state[h + "attn.c_attn.weight"] = np.concatenate(list(b["att"]["qkv"]["weight"]))
        state[h + "attn.c_proj.weight"] = b["att"]["out_proj"]["weight"]
        state[h + "mlp.c_fc.weight"] = b["ff"]["fc_in"]["weight"]
        state[h + "mlp.c_proj.weight"] = b["ff"]["fc_out"]["weight"]
        if config.bias:
            state[h + "ln_1.bias"], state[h + "ln_2.bias"] = b["norm1"]["shift"], b["norm2"]["shift"]
            state[h + "attn.c_attn.bias"] = np.concatenate(list(b["att"]["qkv"]["bias"]))
            state[h + "attn.c_proj.bias"] = b["att"]["out_proj"]["bias"]
            state[h + "mlp.c_fc.bias"] = b["ff"]["fc_in"]["bias"]
            state[h + "mlp.c_proj.bias"] = b["ff"]["fc_out"]["bias"]
    state["transformer.ln_f.weight"] = p["final_norm"]["scale"]
    if config.bias:
        state["transformer.ln_f.bias"] = p["final_norm"]["shift"]
    return state


def nanogpt_args(config):
    return {
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_embd": config.emb_dim,
        "block_size": config.context_length,
        "bias": config.bias,
        "vocab_size": config.vocab_size,
        "dropout": 0.0,
    }


def nanogpt_checkpoint(config, params, prefix="", padded=0):
    torch = pytest.importorskip("torch")
    arrays = nanogpt_tensors(config, params)
    added = np.full((padded, config.emb_dim), 9, np.float32)
    arrays["transformer.wte.weight"] = np.concatenate([arrays["transformer.wte.weight"], added])
    state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "model_args": nanogpt_args(config) | {"vocab_size": config.vocab_size + padded},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
        "iter_num": 7,
        "config": {"dataset": "shakespeare"},
    }


small = st.builds(
    lambda n_heads, head_dim, **rest: GPTConfig(n_heads=n_heads, emb_dim=n_heads * head_dim, drop_rate=0.0, **rest),
    n_heads=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    n_layers=st.integers(1, 3),
    vocab_size=st.integers(1, 40),
    context_length=st.integers(1, 20),
    ffn_dim=st.one_of(st.none(), st.integers(1, 50)),
    qkv_bias=st.booleans(),
    bias=st.booleans(),
    tie_embeddings=st.booleans(),
    activation=st.sampled_from(["gelu_tanh", "gelu", "relu", "silu", "tanh"]),
    scale_attn_weights=st.booleans(),
    scale_attn_by_inverse_layer_idx=st.booleans(),
    tokenizer=st.sampled_from(["gpt2", "bytes"]),
    attention_pattern=st.sampled_from(["dense", "alternating"]),
    attention_window=st.integers(1, 9),
)
computes = st.builds(ComputeConfig, param_dtype=st.sampled_from(["float32", "bfloat16"]), scan_layers=st.booleans())
BIASED = {"bias": True, "qkv_bias": True}


@settings(max_examples=8)
@given(config=small, compute=computes, seed=st.integers(0, 99))
@example(config=TINY, compute=ComputeConfig(), seed=0)
@example(config=ALTERNATING, compute=ComputeConfig(scan_layers=True), seed=0)
def test_own_directory_comes_back_identical(config, compute, seed, tmp_path):
    model, params = make_model(config, seed, **compute.to_dict())
    weights.save(tmp_path / "model", model, params)
    loaded, got = weights.load(tmp_path / "model", check_finite=True)
    assert loaded == GPT(config, compute)
    assert type(got) is dict
    assert_same(got, params)


@pytest.mark.exhaustive
@settings(max_examples=8)
@given(config=small, scan_layers=st.booleans(), seed=st.integers(0, 99))
def test_an_int8_directory_comes_back_identical(config, scan_layers, seed, tmp_path):
    model = GPT(config, ComputeConfig(param_dtype="int8", scan_layers=scan_layers))
    params = cast_params(make_model(config, seed, scan_layers=scan_layers)[1], "int8")
    weights.save(tmp_path / "model", model, params)
    loaded, got = weights.load(tmp_path / "model", check_finite=True)
    assert loaded == model
    assert_same(got, params)


@settings(max_examples=8)
@given(config=small, compute=computes, seed=st.integers(0, 99))
def test_hugging_face_directory_comes_back_identical(config, compute, seed, tmp_path):
    config = config.replace(attention_pattern="dense")
    model, params = make_model(config, seed, **compute.to_dict())
    weights.save(tmp_path / "hf", model, params, format="huggingface")
    loaded, got = weights.load(tmp_path / "hf", param_dtype=compute.param_dtype)
    assert loaded.config == config.replace(**BIASED, attention_window=256)
    assert loaded.compute == ComputeConfig(param_dtype=compute.param_dtype)
    got, expected = leaves(got), leaves(unstack_layers(params) if compute.scan_layers else params)
    assert set(expected) <= set(got)
    for name, array in got.items():
        np.testing.assert_array_equal(array, expected.get(name, np.zeros(array.shape)), err_msg=name)


@settings(max_examples=8)
@given(config=small, seed=st.integers(0, 99))
def test_book_file_gives_the_parameters_that_were_written(config, seed, tmp_path):
    config = config.replace(tie_embeddings=False, bias=True, attention_pattern="dense")
    _, params = make_model(config, seed)
    save_file(book_tensors(params), tmp_path / "book.safetensors")
    loaded, got = weights.load(tmp_path / "book.safetensors", n_heads=config.n_heads)
    for name in ("vocab_size", "context_length", "emb_dim", "n_layers", "ffn_dim", "qkv_bias"):
        assert getattr(loaded.config, name) == getattr(config, name), name
    assert_same(got, params)


@settings(max_examples=8)
@given(config=small, seed=st.integers(0, 99))
def test_nanogpt_file_gives_the_parameters_that_were_written(config, seed, tmp_path):
    torch = pytest.importorskip("torch")
    config = GPTConfig(
        **{name: getattr(config, name) for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")},
        **dict.fromkeys(("bias", "qkv_bias"), config.bias),
        drop_rate=0.0,
        activation="gelu",
        tokenizer="none",  # such a file does not say, and its vocabulary is not GPT-2's
    )
    _, params = make_model(config, seed)
    torch.save(nanogpt_checkpoint(config, params), tmp_path / "ckpt.pt")
    loaded, got = weights.load(tmp_path / "ckpt.pt")
    assert loaded == GPT(config)
    assert_same(got, params)


def test_own_directory_is_plain_safetensors_named_by_paths(tiny, tmp_path):
    model, params = tiny
    weights.save(tmp_path / "model", model, params)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert set(tensors) == set(leaves(params))
    np.testing.assert_array_equal(
        tensors["trf_blocks_1/att/qkv/weight"], params["trf_blocks_1"]["att"]["qkv"]["weight"]
    )
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (fields["format"], fields["version"]) == ("jaxgpt", 1)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("masks", [False, True])
def test_hugging_face_directory_loads(config, prefix, masks, tmp_path):
    _, params = make_model(config)
    tensors = hf_tensors(params, prefix, head=not config.tie_embeddings)
    if masks:
        tensors[f"{prefix}h.1.attn.bias"] = np.ones((1, 1, 16, 16), np.uint8)
        tensors[f"{prefix}h.1.attn.masked_bias"] = np.float32([-1e4])
    loaded, got = weights.load(write_hf(tmp_path / "hf", config, tensors))
    assert loaded == GPT(config)
    assert_same(got, params)


def test_tied_head_may_be_there_if_it_is_the_embedding(tiny, tmp_path):
    _, params = tiny
    tensors = hf_tensors(params, head=True)
    assert_same(weights.load(write_hf(tmp_path, TINY, tensors))[1], params)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write_hf(tmp_path, TINY, tensors)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs .* tie_embeddings=False"):
        weights.load(tmp_path)
    model, got = weights.load(tmp_path, tie_embeddings=False)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(got["out_head"]["weight"], tensors["lm_head.weight"])


def stored_once(tensors, head, embedding):
    """The tensors as safetensors' save_model stores those of a tied model: under the first of the two names."""
    kept = {**tensors, head: tensors[embedding]}
    del kept[embedding]
    return kept


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tied_embedding_stored_under_the_heads_name_is_read(sharded, tiny, tmp_path):
    model, params = tiny
    tensors = stored_once(hf_tensors(params), "lm_head.weight", "transformer.wte.weight")
    write = write_shards if sharded else write_hf
    write(tmp_path, TINY, tensors)
    loaded, got = weights.load(tmp_path, check_finite=True)
    assert loaded == model
    assert_same(got, params)
    np.testing.assert_array_equal(logits(loaded, got), logits(model, params))


def test_a_file_that_says_it_is_not_tied_lacks_its_embedding(tiny, tmp_path):
    tensors = stored_once(hf_tensors(tiny[1]), "lm_head.weight", "transformer.wte.weight")
    write_hf(tmp_path, UNTIED, tensors)
    with pytest.raises(CheckpointError, match=r"1 missing: 'wte.weight'"):
        weights.load(tmp_path)
    write_hf(tmp_path, TINY, {**tensors, "lm_head.weight": tensors["lm_head.weight"][1:]})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is \[96, 24\] and should be \[97, 24\]"):
        weights.load(tmp_path)


def test_a_tied_book_model_stored_once_is_read_as_tied(tmp_path):
    config = BOOK.replace(tie_embeddings=True)
    model, params = make_model(config)
    untied = {**params, "out_head": params["tok_emb"]}
    save_file(stored_once(book_tensors(untied), "out_head.weight", "tok_emb.weight"), tmp_path / "book.safetensors")
    loaded, got = weights.load(tmp_path / "book.safetensors", n_heads=3, drop_rate=0.0, tokenizer="gpt2")
    assert loaded == model
    assert_same(got, params)


def test_a_tied_nanogpt_model_stored_once_is_read():
    config = TINY.replace(vocab_size=nanogpt.VOCAB, emb_dim=6, bias=False, qkv_bias=False, activation="gelu")
    _, params = make_model(config)
    padded = np.concatenate([np.asarray(params["tok_emb"]["weight"]), np.ones((47, 6), np.float32)])
    arrays = nanogpt_tensors(config, params) | {"lm_head.weight": padded}
    del arrays["transformer.wte.weight"]
    state = {
        name: tensors_module.Tensor(array.shape, "float32", lambda array=array: array) for name, array in arrays.items()
    }
    args = nanogpt_args(config) | {"vocab_size": nanogpt.PADDED_VOCAB}
    checkpoint = nanogpt.read(Path("ckpt.pt"), {"model": state, "model_args": args}, {})
    assert_same(layout.read_params(checkpoint, config, ComputeConfig()), params)


def test_untied_head_must_be_there(tmp_path):
    _, params = make_model(UNTIED)
    write_hf(tmp_path, UNTIED, hf_tensors(params, head=False))
    with pytest.raises(CheckpointError, match=r"1 missing: 'lm_head.weight'"):
        weights.load(tmp_path)


ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


@pytest.mark.parametrize(
    ("switches", "fields"),
    [
        *(({"activation_function": name}, {"activation": ours}) for name, ours in ACTIVATIONS.items()),
        ({"layer_norm_epsilon": 1e-3}, {"layer_norm_eps": 1e-3}),
        ({"n_inner": 40}, {"ffn_dim": 40}),
        ({"n_inner": None}, {"ffn_dim": 96}),
        ({"reorder_and_upcast_attn": True}, {}),
        ({"scale_attn_weights": True, "add_cross_attention": False}, {}),
        ({"scale_attn_weights": False}, {"scale_attn_weights": False}),
        ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_by_inverse_layer_idx": True}),
        ({"n_embd": 24, "hidden_size": 24}, {}),
        ({"attn_pdrop": 0.3, "embd_pdrop": 0.2}, {"drop_rate_attn": 0.3, "drop_rate_emb": 0.2, "drop_rate": 0.0}),
        ({"tie_word_embeddings": False}, {"tie_embeddings": False}),
    ],
)
def test_hugging_face_switches_are_honoured(switches, fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY, **switches)))
    assert weights.load_config(tmp_path) == TINY.replace(**fields)


# Keys that say nothing about the language model, with values other than the defaults: those that transformers 5.24 and
# 4.57 write, old defaults of generation, and what else is in the wild; then keys that would, but are off.
NEUTRAL = """{
    "use_cache": false, "return_dict": false, "is_decoder": true, "tie_encoder_decoder": true, "torchscript": true,
    "output_attentions": true, "output_hidden_states": true, "use_bfloat16": true, "tf_legacy_loss": true,
    "bos_token_id": 3, "eos_token_id": 3, "pad_token_id": 3, "sep_token_id": 3, "decoder_start_token_id": 3,
    "initializer_range": 0.1, "dtype": "bfloat16", "torch_dtype": "float16", "chunk_size_feed_forward": 2,
    "summary_type": "mean", "summary_use_proj": false, "summary_activation": "tanh", "summary_first_dropout": 0.5,
    "summary_proj_to_labels": false, "cross_attention_hidden_size": 8, "tie_last_hidden_states": true,
    "id2label": {"0": "no", "1": "yes", "2": "?"}, "label2id": {"no": 0, "yes": 1, "?": 2}, "num_labels": 3,
    "problem_type": "regression", "finetuning_task": "x", "task_specific_params": {"text-generation": {}},
    "tokenizer_class": "BertTokenizer", "prefix": "Once", "n_ctx": 8, "gradient_checkpointing": true,
    "_name_or_path": "gpt2", "_commit_hash": "0", "transformers_version": "4.57.1", "_num_labels": 1,

    "do_sample": true, "max_length": 50, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "num_beams": 4,
    "bad_words_ids": [[5]], "repetition_penalty": 1.2, "suppress_tokens": [1], "guidance_scale": 2.0,

    "output_past": true, "predict_special_tokens": true, "author": "somebody", "glue_task": "sst2", "player_elo": 1500,
    "auto_map": {"AutoTokenizer": "tokenization_x.XTokenizer"}, "attention_dropout": 0.1,

    "is_encoder_decoder": false, "pruned_heads": {}, "quantization_config": null, "add_cross_attention": null,
    "position_embedding_type": "absolute", "per_layer_config": {}, "use_rotary": false, "alibi": null,
    "n_experts": 0, "layer_types": []
}"""


def test_hugging_face_keys_without_effect_are_ignored(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY, **json.loads(NEUTRAL))))
    assert weights.load_config(tmp_path) == TINY


def test_hugging_face_aliases_of_sizes_are_honoured(tmp_path):
    fields = hf_config(TINY)
    fields["hidden_size"] = fields.pop("n_embd")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert weights.load_config(tmp_path) == TINY


@pytest.mark.parametrize(
    ("config", "scan_layers"),
    [(TINY, False), (UNTIED, False), (BOOK, False), (NANOGPT_BARE, False), (TINY, True), (BY_LAYER, False)],
)
def test_hugging_face_export_is_the_same_function(config, scan_layers, tmp_path):
    model, params = make_model(config, scan_layers=scan_layers)
    weights.save(tmp_path / "hf", model, params, format="huggingface")
    loaded, got = weights.load(tmp_path / "hf")
    assert loaded == GPT(config.replace(bias=True, qkv_bias=True))
    np.testing.assert_allclose(logits(loaded, got), logits(model, params), rtol=0, atol=1e-5)
    if config in (TINY, UNTIED):
        assert_same(got, unstack_layers(params) if scan_layers else params)


def test_hugging_face_export_refuses_a_band_that_it_cannot_express(tmp_path):
    model, params = make_model(ALTERNATING)
    with pytest.raises(CheckpointError, match="Hugging Face's GPT-2 has no banded attention"):
        weights.save(tmp_path / "hf", model, params, format="huggingface")
    assert not list(tmp_path.iterdir())
    wide = GPT(ALTERNATING.replace(attention_window=16))  # covers the whole context, so it is no band
    weights.save(tmp_path / "hf", wide, params, format="huggingface")
    np.testing.assert_array_equal(logits(*weights.load(tmp_path / "hf")), logits(wide, params))


def test_hugging_face_export_has_the_expected_tensors(tmp_path):
    model, params = make_model(UNTIED)
    weights.save(tmp_path / "hf", model, params, format="huggingface")
    tensors, expected = load_file(tmp_path / "hf" / "model.safetensors"), hf_tensors(params, head=True)
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)


def test_export_keeps_the_tokenizer_and_every_other_switch(tmp_path):
    config = TINY.replace(
        vocab_size=257,
        tokenizer="bytes",
        layer_norm_eps=1e-3,
        ffn_dim=40,
        drop_rate_attn=0.25,
        activation="tanh",
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
    )
    weights.save(tmp_path / "hf", *make_model(config), format="huggingface")
    assert weights.load_config(tmp_path / "hf") == config
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 256


def by_tokenizers_json(directory, text, special="<|endoftext|>"):
    """Encodes ASCII `text` by the vocabulary, the merges and the added token of a tokenizer.json, as byte-pair encoding
    is defined: the earliest merge in the table first."""
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, ranks = content["model"]["vocab"], {merge: i for i, merge in enumerate(content["model"]["merges"])}
    ids = []
    for word in re.findall(rf"{re.escape(special)}| ?\w+|\s|\W", text):
        parts = list(word.replace(" ", "Ġ").replace("\n", "Ċ")) if word != special else []
        while pairs := [ranks[pair] for pair in map(" ".join, itertools.pairwise(parts)) if pair in ranks]:
            one, other = content["model"]["merges"][min(pairs)].split(" ")
            at = list(itertools.pairwise(parts)).index((one, other))
            parts[at : at + 2] = [one + other]
        ids += [vocabulary[part] for part in parts or [special]]
    (added,) = content["added_tokens"]
    assert added["id"] == vocabulary[added["content"]]
    return ids


@pytest.mark.parametrize(("tokenizer", "added"), [("bytes", 0), ("bytes", 2), ("bytes", -1), ("gpt2", 0), ("gpt2", 2)])
def test_the_export_has_the_tokenizer_whatever_ids_were_added(tokenizer, added, tmp_path):
    known = get_tokenizer(tokenizer)
    config = TINY.replace(tokenizer=tokenizer, vocab_size=known.vocab_size + added)
    weights.save(tmp_path, *make_model(config), format="huggingface")
    text = "Every effort moves you\nAkwirw ier<|endoftext|>"
    assert by_tokenizers_json(tmp_path, text) == known.encode(text, allow_special=True)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(max(known.vocab_size, config.vocab_size)))
    assert weights.load_config(tmp_path) == config
    if tokenizer == "bytes":
        assert [vocabulary[c] for c in "Aé\u0100"] == [65, 0xE9, 0]  # U+0100 is the alphabet's byte 0
    fields = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("config", "generation_config")}
    assert (fields["config"]["vocab_size"], fields["config"]["n_ctx"]) == (config.vocab_size, 16)
    end_of_text = None if added < 0 else known.end_of_text
    for content in fields.values():
        assert (content["bos_token_id"], content["eos_token_id"]) == (end_of_text, end_of_text)


def test_the_export_has_no_tokenizer_with_tokens_that_the_model_lacks(tiny, tmp_path):
    weights.save(tmp_path, *tiny, format="huggingface")
    assert not (tmp_path / "tokenizer.json").exists()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "It takes and gives token ids: no tokenizer is here" in card
    assert "Once upon a time" not in card
    weights.save(tmp_path, *make_model(TINY.replace(tokenizer="bytes", vocab_size=257)), format="huggingface")
    assert "Once upon a time" in (tmp_path / "README.md").read_text(encoding="utf-8")  # nobody had changed the card


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_an_export_writes_only_files_that_a_later_one_may_replace(tokenizer, tmp_path):
    config = TINY.replace(tokenizer=tokenizer, vocab_size=get_tokenizer(tokenizer).vocab_size)
    weights.save(tmp_path / "hf", *make_model(config), format="huggingface")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == set(huggingface.FILES)


@pytest.mark.parity
@pytest.mark.parametrize("vocab_size", [256, 257, 259])
def test_transformers_pipeline_writes_our_greedy_text(vocab_size, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, params = make_model(TINY.replace(tokenizer="bytes", vocab_size=vocab_size, context_length=64), seed=3)
    weights.save(tmp_path / "hf", model, params, format="huggingface")
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "hf"))
    (answer,) = pipeline("ROMEO:")
    assert len(answer["generated_text"]) > len("ROMEO:")
    assert answer["generated_text"] == generate_text(model, params, "ROMEO:", 58)[0]


@pytest.mark.parity
def test_transformers_pipeline_writes_the_bundled_models_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    assert main(["convert", "shakespeare", str(tmp_path / "hf"), "--format", "huggingface"]) == 0
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "hf"))
    (answer,) = pipeline("ROMEO:")
    assert answer["generated_text"] == generate_text(*weights.load("shakespeare"), "ROMEO:", 250)[0]
    tokenizer = pipeline.tokenizer
    text = "Où est Roméo ?\n don 't"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)


@pytest.mark.parity
@pytest.mark.parametrize("config", [TINY, UNTIED, NANOGPT_BARE, TINY.replace(activation="relu", ffn_dim=40)])
def test_transformers_loads_the_export_as_it_is(config, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, params = make_model(config)
    weights.save(tmp_path / "hf", model, params, format="huggingface")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    ids = random_ids(config, 2, 9, 1)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(logits(model, params), expected, rtol=0, atol=2e-5)


@pytest.mark.parity
def test_exported_tokenizer_is_gpt2s(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = GPTConfig(emb_dim=4, n_heads=1, n_layers=1, context_length=8)
    weights.save(tmp_path / "hf", *make_model(config), format="huggingface")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert tokenizer.encode("Akwirw ier é\n<|endoftext|>") == [33901, 86, 343, 86, 220, 959, 38251, 198, 50256]
    assert tokenizer.eos_token_id == 50256


@pytest.mark.parity
def test_a_tied_model_that_save_model_wrote_loads(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors.torch import save_model

    config = transformers.GPT2Config(**{k: v for k, v in hf_config(TINY).items() if k != "model_type"})
    theirs = transformers.GPT2LMHeadModel(config).eval()
    save_model(theirs, str(tmp_path / "model.safetensors"))
    assert "transformer.wte.weight" not in load_file(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(random_ids(TINY, 2, 9, 1)).long()).logits.numpy()
    np.testing.assert_allclose(logits(*weights.load(tmp_path)), expected, rtol=0, atol=1e-5)


@pytest.mark.parity
def test_state_dict_of_transformers_as_pytorch_bin_loads(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(**{k: v for k, v in hf_config(TINY).items() if k != "model_type"})
    theirs = transformers.GPT2LMHeadModel(config).eval()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(random_ids(TINY, 2, 9, 1)).long()).logits.numpy()
    np.testing.assert_allclose(logits(*weights.load(tmp_path)), expected, rtol=0, atol=1e-5)


@pytest.mark.parity
def test_directory_that_transformers_wrote_loads(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(**{k: v for k, v in hf_config(TINY).items() if k != "model_type"})
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).exists()
    model, params = weights.load(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(random_ids(TINY, 2, 9, 1)).long()).logits.numpy()
    np.testing.assert_allclose(logits(model, params), expected, rtol=0, atol=1e-5)


def write_shards(directory, config, tensors):
    tensors = list(tensors.items())
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    index = {}
    for i, part in enumerate((tensors[:5], tensors[5:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file(dict(part), directory / file)
        index |= dict.fromkeys(dict(part), file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def test_sharded_directory_loads(tiny, tmp_path):
    write_shards(tmp_path, TINY, hf_tensors(tiny[1]))
    assert_same(weights.load(tmp_path)[1], tiny[1])


@pytest.mark.parametrize("wrap", [lambda tree: tree, lambda tree: {"params": tree}], ids=["bare", "params"])
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_flax_msgpack_loads(config, wrap, tmp_path):
    _, params = make_model(config)
    loaded, got = weights.load(write_flax(tmp_path, config, wrap(flax_tree(params, head=not config.tie_embeddings))))
    assert loaded == GPT(config)
    assert_same(got, params)


def test_flax_msgpack_of_the_model_without_its_head_loads(tiny, tmp_path):
    assert_same(weights.load(write_flax(tmp_path, TINY, flax_tree(tiny[1])["transformer"]))[1], tiny[1])


def test_a_tied_head_in_a_flax_msgpack_must_be_the_embedding(tiny, tmp_path):
    tree = flax_tree(tiny[1], head=True)
    assert_same(weights.load(write_flax(tmp_path, TINY, tree))[1], tiny[1])
    tree["lm_head"]["kernel"] = tree["lm_head"]["kernel"] + 1
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs"):
        weights.load(write_flax(tmp_path, TINY, tree))


def test_flax_msgpack_in_shards_loads(tiny, tmp_path):
    arrays = list(flatten_dict(flax_tree(tiny[1]), sep="/").items())
    index = {}
    for i, part in enumerate((dict(arrays[:5]), dict(arrays[5:])), 1):
        file = f"flax_model-0000{i}-of-00002.msgpack"
        (tmp_path / file).write_bytes(serialization.to_bytes(unflatten_dict(part, sep="/")))
        index |= dict.fromkeys(part, file)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(weights.load(tmp_path)[1], tiny[1])


def test_safetensors_that_flax_wrote_loads(tiny, tmp_path):
    tensors = flatten_dict(flax_tree(tiny[1]), sep=".")
    assert_same(weights.load(write_hf(tmp_path, TINY, tensors))[1], tiny[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_flax_msgpack_of_another_type_loads(dtype, tiny, tmp_path):
    tree = jax.tree.map(lambda array: np.asarray(array, jnp.dtype(dtype)), flax_tree(tiny[1]))
    _, got = weights.load(write_flax(tmp_path, TINY, tree))
    assert_same(got, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, jnp.dtype(dtype)), jnp.float32), tiny[1]))


arrays = st.builds(
    lambda dtype, shape: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(jnp.dtype(dtype)),
    st.sampled_from(["float32", "float16", "bfloat16", "float64", "int8"]),
    st.lists(st.integers(0, 40), max_size=4).filter(lambda shape: np.prod(shape) < 5000),
)
trees = st.recursive(arrays, lambda inner: st.dictionaries(st.text("abä_0", min_size=1), inner, max_size=40))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tree=trees.filter(lambda tree: isinstance(tree, dict)), chunk=st.sampled_from([64, 1000, 2**30]))
@example(tree={str(i): np.zeros(3, np.float32) for i in range(300)}, chunk=2**30)
@example(tree={"a": {"b" * 300: np.arange(70_000, dtype=np.float32)}}, chunk=2**16)
def test_msgpack_reads_as_flax_reads_it(tree, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    (tmp_path / "tree.msgpack").write_bytes(serialization.to_bytes(tree))
    want = flatten_dict(serialization.msgpack_restore((tmp_path / "tree.msgpack").read_bytes()), sep="/")
    got = msgpack.open_msgpack(tmp_path / "tree.msgpack")
    assert list(got) == list(want)
    for name, tensor in got.items():
        array = tensor.read()
        assert (
            (tensor.shape, tensor.dtype) == (array.shape, array.dtype.name) == (want[name].shape, want[name].dtype.name)
        )
        np.testing.assert_array_equal(array, want[name])


def test_msgpack_of_more_keys_than_16_bits_count_is_read(tmp_path):
    content = serialization.to_bytes({"a": np.arange(3.0)})
    assert content[:1] == b"\x81"
    (tmp_path / "tree.msgpack").write_bytes(b"\xdf\0\0\0\1" + content[1:])
    np.testing.assert_array_equal(msgpack.open_msgpack(tmp_path / "tree.msgpack")["a"].read(), np.arange(3.0))


def pytorch_state(params, **options):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(array)) for name, array in hf_tensors(params, **options).items()}
    # As transformers wrote them: shared tensors under both names, and masks.
    state["lm_head.weight"] = state.get("transformer.wte.weight", state.get("wte.weight"))
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8) for i in range(2)}
    return state | masks | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
def test_pytorch_bin_loads(old, tiny, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(pytorch_state(tiny[1]), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    loaded, got = weights.load(tmp_path, check_finite=True)
    assert loaded == GPT(TINY)
    assert_same(got, tiny[1])


def test_pytorch_bin_in_shards_loads(tiny, tmp_path):
    torch = pytest.importorskip("torch")
    state = list(pytorch_state(tiny[1]).items())
    index = {}
    for i, part in enumerate((dict(state[:9]), dict(state[9:])), 1):
        torch.save(part, tmp_path / f"pytorch_model-0000{i}-of-00002.bin", _use_new_zipfile_serialization=i == 1)
        index |= dict.fromkeys(part, f"pytorch_model-0000{i}-of-00002.bin")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(weights.load(tmp_path)[1], tiny[1])


@pytest.mark.parametrize("kind", ["book", "nanogpt"])
def test_files_from_before_pytorch_1_6_load(kind, tmp_path):
    torch = pytest.importorskip("torch")
    config = BOOK if kind == "book" else TINY.replace(activation="gelu")
    _, params = make_model(config)
    if kind == "book":
        content = {name: torch.from_numpy(array) for name, array in book_tensors(params).items()}
    else:
        content = nanogpt_checkpoint(config, params)
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    loaded, got = weights.load(tmp_path / "model.pt", n_heads=3, drop_rate=0.0, tokenizer="gpt2")
    assert loaded == GPT(config)
    assert_same(got, params)


def test_names_that_came_from_tensorflow_are_understood(tiny, tmp_path):
    old = {
        name.replace("weight", "gamma").replace("bias", "beta") if "ln_" in name else name: array
        for name, array in hf_tensors(tiny[1]).items()
    }
    assert "transformer.h.0.ln_1.beta" in old
    assert_same(weights.load(write_hf(tmp_path, TINY, old))[1], tiny[1])


def test_of_several_weights_safetensors_are_read_then_flaxs_then_pytorchs(tmp_path):
    models = [make_model(TINY, seed)[1] for seed in range(3)]
    write_hf(tmp_path, TINY, hf_tensors(models[0]))
    write_flax(tmp_path, TINY, flax_tree(models[1]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert_same(weights.load(tmp_path)[1], models[0])
    (tmp_path / "model.safetensors").unlink()
    assert_same(weights.load(tmp_path)[1], models[1])
    (tmp_path / "flax_model.msgpack").unlink()
    torch = pytest.importorskip("torch")
    torch.save(pytorch_state(models[2]), tmp_path / "pytorch_model.bin")
    assert_same(weights.load(tmp_path)[1], models[2])


def test_symlinks_of_the_hub_cache_are_followed(tiny, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    write_shards(blobs, TINY, hf_tensors(tiny[1]))
    snapshot.mkdir(parents=True)
    for i, file in enumerate(blobs.iterdir()):
        blob = file.rename(blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    assert_same(weights.load(snapshot)[1], tiny[1])


@pytest.mark.parametrize("config", [BOOK, UNTIED], ids=["no-qkv-bias", "qkv-bias"])
def test_book_safetensors_loads_with_the_config_from_its_shapes(config, tmp_path):
    model, params = make_model(config)
    save_file(book_tensors(params), tmp_path / "book.bin")
    loaded, got = weights.load(tmp_path / "book.bin", n_heads=3, drop_rate=0.0, tokenizer="gpt2")
    assert loaded == GPT(config)
    assert_same(got, params)
    np.testing.assert_array_equal(logits(loaded, got), logits(model, params))


@pytest.mark.parametrize("wrap", [False, True])
def test_book_pth_loads(wrap, tmp_path):
    torch = pytest.importorskip("torch")
    _, params = make_model(BOOK)
    state = {name: torch.from_numpy(array) for name, array in book_tensors(params).items()}
    torch.save({"model_state_dict": state, "optimizer_state_dict": {}} if wrap else state, tmp_path / "model.pth")
    assert_same(weights.load(tmp_path / "model.pth", n_heads=3)[1], params)


def test_book_heads_are_known_for_its_sizes_and_asked_for_otherwise(tmp_path):
    save_file(book_tensors(make_model(BOOK)[1]), tmp_path / "book.safetensors")
    with pytest.raises(ConfigError, match=r"n_heads.*emb_dim=24.*pass n_heads="):
        weights.load(tmp_path / "book.safetensors")
    for name in ("book-124m", "book-355m", "book-774m", "book-1558m"):
        preset = GPTConfig.preset(name)
        assert book.HEADS[preset.emb_dim] == preset.n_heads


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_checkpoint_loads(bias, prefix, tmp_path):
    torch = pytest.importorskip("torch")
    config = TINY.replace(bias=bias, qkv_bias=bias, activation="gelu", tokenizer="none")
    _, params = make_model(config)
    torch.save(nanogpt_checkpoint(config, params, prefix), tmp_path / "ckpt.pt")
    model, got = weights.load(tmp_path / "ckpt.pt")
    assert model == GPT(config)
    assert_same(got, params)


def test_nanogpt_padded_vocabulary_is_dropped(tmp_path):
    torch = pytest.importorskip("torch")
    config = TINY.replace(vocab_size=nanogpt.VOCAB, emb_dim=6, activation="gelu")
    _, params = make_model(config)
    torch.save(nanogpt_checkpoint(config, params, padded=47), tmp_path / "ckpt.pt")
    model, got = weights.load(tmp_path / "ckpt.pt")
    assert model == GPT(config)
    assert_same(got, params)
    untied = weights.load(tmp_path / "ckpt.pt", tie_embeddings=False)[1]
    np.testing.assert_array_equal(untied["out_head"]["weight"], params["tok_emb"]["weight"])


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_other_types_are_converted_to_param_dtype(kind, tmp_path):
    _, params = make_model(TINY)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)  # exact in every type
    narrow = {name: array.astype(jnp.dtype(kind)) for name, array in hf_tensors(params).items()}
    if kind == "float16":  # bfloat16's small numbers are float16's subnormals
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float16).astype(np.float32)), params)
    write_hf(tmp_path, TINY, narrow)
    assert_same(weights.load(tmp_path)[1], params)
    model, got = weights.load(tmp_path, param_dtype="bfloat16")
    assert model.compute.param_dtype == "bfloat16"
    assert_same(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_torch_bfloat16_is_read_exactly(tmp_path):
    torch = pytest.importorskip("torch")
    _, params = make_model(BOOK, param_dtype="bfloat16")
    state = {
        name: torch.from_numpy(array.astype(np.float32)).bfloat16() for name, array in book_tensors(params).items()
    }
    torch.save(state, tmp_path / "model.pth")
    assert_same(weights.load(tmp_path / "model.pth", n_heads=3, param_dtype="bfloat16")[1], params)


def test_scan_layers_override_stacks_the_blocks(tiny, tmp_path):
    model, params = tiny
    weights.save(tmp_path / "model", model, params)
    scanned, stacked = weights.load(tmp_path / "model", scan_layers=True)
    assert stacked["trf_blocks"]["att"]["qkv"]["weight"].shape == (2, 3, 24, 24)
    assert_same(stacked, stack_layers(params))
    assert_same(unstack_layers(stacked), params)
    np.testing.assert_allclose(logits(scanned, stacked), logits(model, params), rtol=0, atol=1e-5)


@grid(1, param_dtype=["float32", "bfloat16", "int8"], scan_layers=[False, True], tied=[True, False])
def test_added_ids_leave_the_others_logits_as_they_are(param_dtype, scan_layers, tied):
    config = TINY.replace(tie_embeddings=tied)
    model = GPT(config, ComputeConfig(param_dtype=param_dtype, scan_layers=scan_layers))
    params = cast_params(make_model(config, scan_layers=scan_layers)[1], param_dtype)
    larger, grown = resize_embeddings(model, params, 101)
    assert larger == GPT(config.replace(vocab_size=101), model.compute)
    ids = random_ids(config, 2, 9, 1)
    got = np.asarray(larger.apply({"params": grown}, ids))
    assert got.shape == (2, 9, 101)
    np.testing.assert_array_equal(got[..., :97], logits(model, params))
    # By Jensen's inequality the exponential of a mean is at most the mean of the exponentials.
    assert jax.nn.softmax(got)[..., 97:].max() <= (1.01 if param_dtype == "int8" else 1.001) / 101
    for name in ("tok_emb", "out_head")[: 2 - tied]:
        table = leaves(cast_params(grown, "float32"))[f"{name}/weight"]
        tolerance = {"float32": 1e-6, "bfloat16": 1e-2, "int8": 1e-2}[param_dtype]
        np.testing.assert_allclose(table[97:], np.tile(table[:97].mean(0), (4, 1)), rtol=tolerance, atol=tolerance / 10)
    again, back = resize_embeddings(larger, grown, 97)
    assert again == model
    assert_same(back, params)


def test_a_model_with_added_ids_is_saved_loaded_and_reads_them(tiny, tmp_path):
    model, params = resize_embeddings(*tiny, 99)
    weights.save(tmp_path / "model", model, params)
    loaded, got = weights.load(tmp_path / "model")
    assert loaded == model
    assert_same(got, params)
    assert np.isfinite(loaded.apply({"params": got}, np.array([[5, 97, 98]]))).all()


def test_resizing_refuses_other_parameters_and_sizes_that_no_model_has(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match=r"with tok_emb/weight \(97, 24\), not \(99, 24\)"):
        resize_embeddings(model, resize_embeddings(model, params, 99)[1], 120)
    with pytest.raises(ValueError, match=r"with out_head/weight \(97, 24\), not nothing"):
        resize_embeddings(GPT(UNTIED), params, 120)
    for size in (0, 99.0):
        with pytest.raises(ConfigError, match="vocab_size"):
            resize_embeddings(model, params, size)


def test_stacking_refuses_trees_that_are_not_a_models(tiny):
    _, params = tiny
    with pytest.raises(ValueError, match="trf_blocks_1"):
        stack_layers({name: child for name, child in params.items() if name != "trf_blocks_0"})
    with pytest.raises(ValueError, match="stacked"):
        unstack_layers(params)


def test_overrides_that_keep_the_shapes_are_applied_and_others_refused(tiny, tmp_path):
    weights.save(tmp_path / "model", *tiny)
    model, _ = weights.load(tmp_path / "model", drop_rate=0.2, dtype="bfloat16")
    assert model == GPT(TINY.replace(drop_rate=0.2), ComputeConfig(dtype="bfloat16"))
    assert model.config.drop_rate_attn == 0.2
    assert weights.load_config(tmp_path / "model", drop_rate=0.2) == TINY.replace(drop_rate=0.2)
    assert weights.load_config(tmp_path / "model", dtype="bfloat16", scan_layers=True) == TINY
    assert weights.load(tmp_path / "model", param_dtype=None)[0] == GPT(TINY)
    with pytest.raises(CheckpointError, match=r"'pos_emb/weight' is \[16, 24\] and should be \[16, 12\]"):
        weights.load(tmp_path / "model", emb_dim=12)
    with pytest.raises(ConfigError, match="did you mean 'drop_rate'"):
        weights.load(tmp_path / "model", droprate=0.2)


@pytest.mark.parametrize("stored", ["float32", exhaustive("int8"), "huggingface"])
def test_a_shorter_context_leaves_out_the_later_positions(stored, tiny, tmp_path):
    if stored == "huggingface":
        weights.save(tmp_path / "model", *tiny, format="huggingface")
    else:
        weights.save(tmp_path / "model", *prepare(*tiny, stored))
    whole, params = weights.load(tmp_path / "model")
    short, cropped = weights.load(tmp_path / "model", context_length=6)
    assert short.config == whole.config.replace(context_length=6)
    assert cropped["pos_emb"]["weight"].shape == (6, TINY.emb_dim)
    ids = random_ids(TINY, 2, 6)
    np.testing.assert_array_equal(short.apply({"params": cropped}, ids), whole.apply({"params": params}, ids))
    for read in (weights.load, weights.load_config):
        with pytest.raises(ConfigError, match=r"context_length 17 is beyond the checkpoint's 16"):
            read(tmp_path / "model", context_length=17)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("has", [True, False], ids=["all parameters", "the fewest"])
def test_the_abstract_leaves_are_those_of_the_model(has, param_dtype):
    config = TINY.replace(tie_embeddings=not has, bias=has, qkv_bias=has)
    model = GPT(config, ComputeConfig(param_dtype=param_dtype, scan_layers=True))
    built = leaves(jax.eval_shape(model.init, jax.random.key(0), random_ids(TINY, 1, 1))["params"])
    assert list(layout.abstract_leaves(config, param_dtype).items()) == list(built.items())


@pytest.mark.parametrize("rows", [huggingface.ROWS, book.ROWS], ids=["huggingface", "book"])
def test_tables_name_every_parameter_once(rows):
    full = TINY.replace(tie_embeddings=False, bias=True, qkv_bias=True)
    assert sorted(row.ours for row in rows) == sorted(layout.abstract_leaves(full, "float32"))


def test_load_config_reads_no_tensors(tiny, tmp_path):
    weights.save(tmp_path / "own", *tiny)
    (tmp_path / "own" / "model.safetensors").unlink()
    assert weights.load_config(tmp_path / "own") == TINY


class FakeHub:
    """Stands for the library: one repository, of which it copies what is asked for into a directory."""

    def __init__(self, repository, directory, monkeypatch):
        self.library = pytest.importorskip("huggingface_hub")
        self.repository, self.directory, self.revisions = repository, directory, []
        monkeypatch.chdir(directory.parent)
        for name in ("model_info", "snapshot_download"):
            monkeypatch.setattr(self.library, name, getattr(self, name))

    def model_info(self, name, revision):
        self.revisions.append((name, revision))
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=path.name) for path in self.repository.iterdir()])

    def snapshot_download(self, name, revision, allow_patterns):
        self.revisions.append((name, revision))
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        files = sorted(file.rfilename for file in self.model_info(name, revision).siblings)
        for file in self.library.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copy(self.repository / file, self.directory / file)
        return str(self.directory)

    @property
    def downloaded(self):
        return sorted(path.name for path in self.directory.iterdir())


@pytest.fixture
def repository(tiny, tmp_path):
    """A repository with the same weights in all three forms, of which only the best may be downloaded."""
    directory = write_hf(tmp_path / "repository", TINY, hf_tensors(tiny[1]))
    write_flax(directory, TINY, flax_tree(tiny[1]))
    for name in ("pytorch_model.bin", "tf_model.h5", "model.fp16.safetensors", "README.md"):
        (directory / name).write_bytes(b"never downloaded")
    return directory


def test_hub_name_downloads_one_form_of_the_weights(tiny, repository, tmp_path, monkeypatch):
    hub = FakeHub(repository, tmp_path / "download", monkeypatch)
    assert weights.load_config("gpt2") == TINY
    assert hub.downloaded == ["config.json"]
    assert_same(weights.load("openai-community/gpt2-xl")[1], tiny[1])
    assert hub.downloaded == ["config.json", "model.safetensors"]
    (repository / "model.safetensors").unlink()
    assert_same(weights.load("gpt2")[1], tiny[1])
    assert hub.downloaded == ["config.json", "flax_model.msgpack"]
    assert {name for name, _ in hub.revisions} == {"gpt2", "openai-community/gpt2-xl"}


def test_hub_name_downloads_shards(tiny, tmp_path, monkeypatch):
    write_shards(tmp_path / "repository", TINY, hf_tensors(tiny[1]))
    (tmp_path / "repository" / "pytorch_model.bin").write_bytes(b"never downloaded")
    hub = FakeHub(tmp_path / "repository", tmp_path / "download", monkeypatch)
    assert_same(weights.load("gpt2")[1], tiny[1])
    assert hub.downloaded == ["config.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)), INDEX]


def test_hub_repository_without_weights_that_can_be_read_is_refused(repository, tmp_path, monkeypatch):
    for name in ("model.safetensors", "flax_model.msgpack", "pytorch_model.bin"):
        (repository / name).unlink()
    hub = FakeHub(repository, tmp_path / "download", monkeypatch)
    with pytest.raises(CheckpointError, match=r"gpt2: .* without model.safetensors or flax_model.msgpack or pytorch"):
        weights.load("gpt2")
    assert hub.downloaded == ["config.json"]


def test_a_revision_of_a_hub_model_is_honoured(repository, tmp_path, monkeypatch):
    hub = FakeHub(repository, tmp_path / "download", monkeypatch)
    weights.load_config("gpt2")
    for read in (weights.load, weights.load_config):
        for options in ({"path_or_name": "gpt2@refs/pr/3"}, {"path_or_name": "gpt2", "revision": "refs/pr/3"}):
            read(**options)
    assert hub.revisions[0] == ("gpt2", "main")
    assert set(hub.revisions[1:]) == {("gpt2", "main"), ("gpt2", "refs/pr/3")}
    assert hub.revisions.count(("gpt2", "main")) == 2  # list and download of the first
    assert main(["inspect", "who/gpt@v1"]) == 0
    assert hub.revisions[-1] == ("who/gpt", "v1")


def test_a_revision_of_anything_but_a_hub_model_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgpt.hub.download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    weights.save("gpt2", *tiny)
    for name in ("shakespeare", "gpt2", Path("gpt2-xl"), "other/gpt2@v1", "./gpt2-xl"):
        with pytest.raises(ValueError, match="revision"):
            weights.load(name, revision="v1")
    for revision in ("", "../v1", "a..b", "v 1", 3):
        with pytest.raises(ValueError, match="revision must be"):
            weights.load("gpt2-xl", revision=revision)
    for name in ("gpt2-xl@", "gpt2-xl@../v1", "a/b/c@v1"):
        with pytest.raises(CheckpointError, match="no such file or directory"):
            weights.load(name)
    with pytest.raises(CheckpointError, match="did you mean 'shakespeare'"):
        weights.load("shakespaere@v1")


def test_what_the_hubs_cache_has_is_read_without_the_network(tiny, repository, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    commit = "0123456789" * 4
    cached = tmp_path / "cache" / "models--who--gpt"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text(commit)
    repository.rename(cached / "snapshots" / commit)
    (cached / "snapshots" / commit / "model.safetensors").unlink()  # as if the repository had only the rest
    for name in ("who/gpt@v1", f"who/gpt@{commit}"):
        assert weights.load_config(name) == TINY
        assert_same(weights.load(name)[1], tiny[1])
    for file in ("flax_model.msgpack", "pytorch_model.bin"):
        (cached / "snapshots" / commit / file).unlink()
    for name in ("who/gpt", "who/gpt@v2", "who/gpt@v1"):
        with pytest.raises(CheckpointError, match=r"download from the hub failed .*/tree/(main|v\d) into"):
            weights.load(name)


def test_hub_without_network_says_which_file_to_put_where(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    retries = "where there is no network, this one retries for 23 seconds"
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: pytest.fail(retries))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        weights.load("gpt2")
    for part in ("gpt2: ", "config.json and model.safetensors", "huggingface.co/gpt2", "pass its path"):
        assert part in str(caught.value)


def test_missing_extras_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"jaxgpt\[hub\]"):
        weights.load("gpt2")
    (tmp_path / "model.pth").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"jaxgpt\[torch\]"):
        weights.load("model.pth")


def test_a_local_directory_comes_before_the_hub(tiny, tmp_path, monkeypatch):
    weights.save(tmp_path / "gpt2", *tiny)
    monkeypatch.chdir(tmp_path)
    assert_same(weights.load("gpt2")[1], tiny[1])


def test_bundled_name_without_its_model_says_how_to_get_one(monkeypatch):
    monkeypatch.setitem(weights.BUNDLED, "shakespeare", "no-such-directory")
    with pytest.raises(CheckpointError, match=r"shakespeare: .*jaxgpt train") as caught:
        weights.load("shakespeare")
    assert "\n" not in str(caught.value)


def test_saving_over_a_checkpoint_replaces_it_and_leaves_nothing_beside_it(tiny, tmp_path):
    weights.save(tmp_path / "model", *tiny, format="huggingface")
    other, params = make_model(UNTIED, seed=1)
    weights.save(tmp_path / "model", other, params)
    loaded, got = weights.load(tmp_path / "model")
    assert loaded.config == UNTIED
    assert_same(got, params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", ["write_safetensors", "sync", "rename"])
def test_a_failed_save_leaves_the_checkpoint_as_it_was(failing, tiny, tmp_path, monkeypatch):
    weights.save(tmp_path / "model", *tiny)
    rename = Path.rename

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def rename_old_only(self, target):
        return fail() if self.suffix == ".new" else rename(self, target)

    if failing == "rename":
        monkeypatch.setattr(Path, "rename", rename_old_only)
    else:
        module = weights.own if failing == "write_safetensors" else files
        monkeypatch.setattr(module, failing, fail)
    other, params = make_model(UNTIED, seed=1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        weights.save(tmp_path / "model", other, params)
    monkeypatch.undo()
    assert_same(weights.load(tmp_path / "model")[1], tiny[1])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_keeps_a_model_card_that_somebody_has_written(tiny, tmp_path):
    card = tmp_path / "model" / "README.md"
    weights.save(tmp_path / "model", *tiny, format="huggingface")
    weights.save(tmp_path / "model", *tiny)
    assert not card.exists()  # the text that came with the other format
    card.write_text("license: mit")
    for format in ("huggingface", "jaxgpt"):
        weights.save(tmp_path / "model", *tiny, format=format)
        assert card.read_text() == "license: mit"


def test_saving_refuses_to_replace_what_is_not_a_checkpoint(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds 'thesis\.tex'"):
        weights.save(tmp_path, *tiny)
    with pytest.raises(CheckpointError, match="not a directory"):
        weights.save(tmp_path / "thesis.tex", *tiny)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_saving_refuses_parameters_of_another_model(tiny, tmp_path):
    model, params = tiny
    wrong = {**params, "extra": {"weight": jnp.zeros(3)}, "pos_emb": {"weight": jnp.zeros((3, 24))}}
    del wrong["final_norm"]
    with pytest.raises(CheckpointError) as caught:
        weights.save(tmp_path / "model", model, wrong)
    for name in ("final_norm/scale", "extra/weight", "pos_emb/weight"):
        assert name in str(caught.value)
    assert caught.value.path == tmp_path / "model"
    with pytest.raises(CheckpointError, match="missing"):
        weights.save(tmp_path / "model", GPT(TINY, ComputeConfig(scan_layers=True)), params)
    with pytest.raises(CheckpointError, match="1 missing: 'final_norm/shift'") as caught:
        weights.save(tmp_path / "model", model, {**params, "final_norm": {"scale": params["final_norm"]["scale"]}})
    assert caught.value.path == tmp_path / "model"
    with pytest.raises(ValueError, match="did you mean 'huggingface'"):
        weights.save(tmp_path / "model", model, params, format="hugingface")
    assert not list(tmp_path.iterdir())


def run_convert(*argv):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.run(parser.parse_args([str(arg) for arg in argv]))


def test_convert_there_and_back_is_identical(tiny, tmp_path, capsys):
    weights.save(tmp_path / "own", *tiny)
    assert run_convert(tmp_path / "own", tmp_path / "hf", "--format", "huggingface") == 0
    assert run_convert(tmp_path / "hf", tmp_path / "back", "--check-finite") == 0
    assert_same(weights.load(tmp_path / "back")[1], tiny[1])
    output = capsys.readouterr()
    assert output.out == ""
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(tiny[1])):,} parameters" in output.err


@pytest.mark.parametrize(
    ("fields", "note"),
    [({}, "gpt2 (left out: it has ids that the model lacks)"), ({"tokenizer": "none"}, "none"), ({"V": 257}, "bytes")],
)
def test_convert_says_that_the_tokenizer_stays_behind(fields, note, tmp_path, capsys):
    config = TINY.replace(tokenizer="bytes", vocab_size=257) if "V" in fields else TINY.replace(**fields)
    weights.save(tmp_path / "own", *make_model(config))
    assert run_convert(tmp_path / "own", tmp_path / "hf", "--format", "huggingface") == 0
    assert capsys.readouterr().err.endswith(f"tokenizer {note}\n")
    assert run_convert(tmp_path / "own", tmp_path / "copy") == 0
    assert capsys.readouterr().err.endswith(f"tokenizer {note.partition(' ')[0]}\n")


def test_convert_passes_its_flags_on_and_overwrites_only_with_force(tmp_path):
    _, params = make_model(BOOK)
    save_file(book_tensors(params), tmp_path / "book.safetensors")
    argv = (tmp_path / "book.safetensors", tmp_path / "own", "--n-heads", 3, "--param-dtype", "bfloat16")
    run_convert(*argv)
    model, _ = weights.load(tmp_path / "own")
    assert (model.config.n_heads, model.compute.param_dtype) == (3, "bfloat16")
    with pytest.raises(CheckpointError, match="--force"):
        run_convert(*argv)
    assert run_convert(*argv[:2], "--n-heads", 4, "--force") == 0
    assert weights.load_config(tmp_path / "own").n_heads == 4


_WARM_TORCH = """
import io, torch
file = io.BytesIO()
torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
file.seek(0)
torch.load(file, weights_only=True)["a"].clone().numpy()
"""
_PEAK = r"""
    import re, sys
    from pathlib import Path
    import jax.numpy as jnp
    from jaxgpt.weights import formats as weights
    from jaxgpt.weights import layout

    path, scan, size = sys.argv[1], bool(int(sys.argv[2])), int(sys.argv[3])
    layout.abstract_leaves(weights.load_config(path), "float32")  # tracing is not what is measured
    jnp.ones((512, 512)).block_until_ready()
    def peak():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    before = peak()
    model, params = weights.load(path, scan_layers=scan)
    print((peak() - before) / size)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("scan", [False, True], ids=["blocks", "scan"])
@pytest.mark.parametrize("file", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
def test_loading_does_not_hold_the_parameters_twice(file, scan, tmp_path):
    config = GPTConfig(vocab_size=8192, context_length=64, emb_dim=640, n_heads=10, n_layers=9)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    entries = layout.entries(config, "float32", huggingface.ROWS)
    tensors = {entry.names[0]: np.full(entry.outside_shape, 0.5, np.float32) for entry in entries}
    if file == "flax_model.msgpack":
        tensors = {name.replace("c_attn.weight", "c_attn.kernel"): array for name, array in tensors.items()}
        tensors = {name: array.T if name.endswith("kernel") else array for name, array in tensors.items()}
        (tmp_path / file).write_bytes(serialization.to_bytes(unflatten_dict(tensors, sep=".")))
    elif file == "pytorch_model.bin":  # from before PyTorch 1.6: later ones are mapped, which counts as memory too
        torch = pytest.importorskip("torch")
        state = {name: torch.from_numpy(array) for name, array in tensors.items()}
        torch.save(state, tmp_path / file, _use_new_zipfile_serialization=False)
    else:
        save_file(tensors, tmp_path / file)
    size = sum(array.nbytes for array in tensors.values())
    assert 150e6 < size < 250e6
    before = _WARM_TORCH if file == "pytorch_model.bin" else ""
    command = [sys.executable, "-c", before + textwrap.dedent(_PEAK), str(tmp_path), str(int(scan)), str(size)]
    growth = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # With PyTorch, the allocator keeps some of what was freed; both at once would be more than 2.
    assert 0.9 < growth < (1.7 if before else 1.2)


@pytest.mark.parametrize("command", [convert, export], ids=lambda command: command.__name__)
def test_commands_offer_every_format_that_can_be_written(command):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    (option,) = [action for action in parser._actions if action.dest == "format"]
    assert set(option.choices) == set(weights.FORMATS)
