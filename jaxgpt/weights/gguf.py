"""GGUF, llama.cpp's format: one file with the weights and the tokenizer. It is written, and not read.

The names of the tensors and keys, and which tensors stay float32, are those of llama.cpp's convert_hf_to_gguf.py for
its architecture "gpt2". A matrix is [out, in], as here; a file lists the axes of a shape in reverse.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import GPTConfig
from jaxgpt.errors import CheckpointError, require
from jaxgpt.files import new_file, replacing_file
from jaxgpt.model import GPT, check_model
from jaxgpt.tokenizer import BUILTIN, NONE, Tokenizer, description_of, get_tokenizer
from jaxgpt.weights.layout import Row, outside_tensors
from jaxgpt.weights.tensors import Tensor, beginning

MAGIC = b"GGUF"

# The types of matrices, by the names of llama.cpp's --outtype, and what it calls a file with such.
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
OUTTYPES = tuple(_FILE_TYPES)

ROWS = (
    Row("tok_emb/weight", "token_embd.weight"),
    Row("pos_emb/weight", "position_embd.weight"),
    Row("trf_blocks/norm1/scale", "blk.{i}.attn_norm.weight"),
    Row("trf_blocks/norm1/shift", "blk.{i}.attn_norm.bias"),
    Row("trf_blocks/att/qkv/weight", "blk.{i}.attn_qkv.weight", "rows"),
    Row("trf_blocks/att/qkv/bias", "blk.{i}.attn_qkv.bias", "flat"),
    Row("trf_blocks/att/out_proj/weight", "blk.{i}.attn_output.weight"),
    Row("trf_blocks/att/out_proj/bias", "blk.{i}.attn_output.bias"),
    Row("trf_blocks/norm2/scale", "blk.{i}.ffn_norm.weight"),
    Row("trf_blocks/norm2/shift", "blk.{i}.ffn_norm.bias"),
    Row("trf_blocks/ff/fc_in/weight", "blk.{i}.ffn_up.weight"),
    Row("trf_blocks/ff/fc_in/bias", "blk.{i}.ffn_up.bias"),
    Row("trf_blocks/ff/fc_out/weight", "blk.{i}.ffn_down.weight"),
    Row("trf_blocks/ff/fc_out/bias", "blk.{i}.ffn_down.bias"),
    Row("final_norm/scale", "output_norm.weight"),
    Row("final_norm/shift", "output_norm.bias"),
    Row("out_head/weight", "output.weight"),
)

# llama.cpp's names for ids that end a text. It stops at each of them.
_ENDS = ("eos", "eot", "eom")


def write_gguf(path: str | Path, model: GPT, params: Mapping[str, Any], *, outtype: str = "f32") -> None:
    """Writes a model and its tokenizer as one GGUF file, which llama.cpp and the programs built on it run.

    The file appears, or replaces the GGUF file that was there, only once all of it is on disk. In addition to the
    parameters, memory holds one array at a time.

    Args:
        path: the file.
        model: the model, for its configuration and its tokenizer.
        params: its parameters.
        outtype: the type of the matrices: "f32"; "f16"; "bf16"; or "q8_0", int8 with one float16 scale for every 32
            values of a row. Everything else is float32, position embeddings included. A matrix whose rows are no
            multiple of 32 long is float16 in a file of "q8_0", as llama.cpp's converter has it.

    Raises:
        CheckpointError: if `params` do not fit the model; if llama.cpp has no such model or tokenizer; if a value is
            NaN, infinite or too large for `outtype`; or if `path` is anything but a GGUF file.
        ConfigError: if `path` is a directory or a URL, or its directory does not exist.
        MissingExtraError: without the package gguf (the extra [gguf]).
        ValueError: for an unknown type.
    """
    check_model("write_gguf(path, model, params)", model, params)
    if outtype not in OUTTYPES:
        raise ValueError(f"outtype must be one of {', '.join(OUTTYPES)}, not {outtype!r}")
    path = new_file(path, force=True)
    if path.exists() and not beginning(path).startswith(MAGIC):
        raise CheckpointError(path, "exists and is not a GGUF file: choose another name")
    if reason := refusal(model):
        raise CheckpointError(path, reason)
    gguf = require("gguf", "gguf", f"writing {path}")
    config = model.config.replace(bias=True, qkv_bias=True)  # those that the model lacks are zeros
    tensors = _with_usual_scale(outside_tensors(path, model, params, ROWS, config), config)
    types = {name: _type(gguf, name, tensor.shape, outtype) for name, tensor in tensors.items()}
    with replacing_file(path) as partial, contextlib.closing(gguf.GGUFWriter(partial, "gpt2")) as writer:
        writer.add_type("model")
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[outtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_config(writer, config)
        _add_tokenizer(gguf, writer, get_tokenizer(config.tokenizer), config.vocab_size)
        for name, tensor in tensors.items():
            values, size = gguf.GGML_QUANT_SIZES[types[name]]  # of a block: of one value, or of 32 of q8_0
            writer.add_tensor_info(
                name, tensor.shape, np.dtype(np.float32), math.prod(tensor.shape) // values * size, types[name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            array = np.ascontiguousarray(tensor.read(), np.float32)
            try:
                with np.errstate(over="raise", invalid="raise"):
                    stored = gguf.quantize(array, types[name])
            except FloatingPointError:
                raise CheckpointError(
                    path, f"{name} has values that are NaN, infinite or too large for {types[name].name}: use f32"
                ) from None
            writer.write_tensor_data(stored)


def _with_usual_scale(tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The tensors, with queries for which llama.cpp, which divides all scores by sqrt(K), gets the model's scores."""
    usual = config.head_dim**-0.5
    for i, scale in enumerate(config.attention_scales):
        if scale != usual:
            for name in (f"blk.{i}.attn_qkv.weight", f"blk.{i}.attn_qkv.bias"):
                read = functools.partial(_with_scaled_queries, tensors[name], scale / usual)
                tensors[name] = tensors[name]._replace(dtype="float32", read=read)
    return tensors


def _with_scaled_queries(tensor: Tensor, scale: float) -> np.ndarray:
    array = np.array(tensor.read(), np.float32)
    array[: len(array) // 3] *= np.float32(scale)
    return array


def refusal(model: GPT) -> str | None:
    """Why a GGUF file cannot hold `model`, or `None` if it can."""
    config = model.config
    if model.compute.param_dtype == "int8":
        return "int8 would be rounded once more: load the model as float32 first (param_dtype=, --param-dtype)"
    if config.banded_layers:
        return "llama.cpp's GPT-2 has no banded attention (attention_pattern 'alternating')"
    if config.activation != "gelu_tanh":
        return f"llama.cpp's GPT-2 has the activation gelu_tanh, not {config.activation}"
    return _refusal_of(get_tokenizer(config.tokenizer), config.vocab_size)


def _refusal_of(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """Why a GGUF file of a model of this many ids cannot hold `tokenizer`, or `None` if it can."""
    content, name = tokenizer.content, tokenizer.name
    if content.kind == NONE:
        return "a GGUF file holds the tokenizer, and none came with this model: give it (tokenizer=, --tokenizer)"
    if content.kind not in (*BUILTIN, "bpe"):
        return f"the tokenizer {name} is not of the one kind that is written, byte-level BPE with GPT-2's pattern"
    if description_of(content)["pre_tokenizer"]["add_prefix_space"]:
        return f"the tokenizer {name} puts a space before a text (add_prefix_space), which llama.cpp's BPE cannot"
    for token in content.added:
        if token.single_word or token.lstrip or token.rstrip:
            return f"the token {token.content!r} is single_word, lstrip or rstrip, which a GGUF file cannot say"
    if vocab_size < tokenizer.vocab_size:
        return f"the model has {vocab_size:,} ids, fewer than its tokenizer {name}, {tokenizer.vocab_size:,}"
    if not 1 <= len(_ends(tokenizer)) <= len(_ENDS):
        # Without any, llama.cpp would take id 11 for the end of a text.
        return f"the tokenizer {name} has {len(_ends(tokenizer))} ids that end a text: llama.cpp needs one to three"
    return None


def _ends(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text, the one that also separates texts first."""
    ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return list(dict.fromkeys([*ends, *tokenizer.stop_ids]))


def _type(gguf: Any, name: str, shape: tuple[int, ...], outtype: str) -> Any:
    """The GGMLQuantizationType of a tensor."""
    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or name == "position_embd.weight":
        return types.F32
    return types.F16 if outtype == "q8_0" and shape[-1] % 32 else types[outtype.upper()]


def _add_config(writer: Any, config: GPTConfig) -> None:
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def _add_tokenizer(gguf: Any, writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    bpe, kinds = description_of(tokenizer.content)["model"], gguf.TokenType
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]  # llama.cpp's name for an id of the model without a token
    token_types = [kinds.UNUSED] * vocab_size
    for token, i in bpe["vocab"].items():
        tokens[i], token_types[i] = token, kinds.NORMAL
    for added in tokenizer.content.added:
        token_types[added.id] = kinds.CONTROL if added.special else kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(token_types)
    # llama.cpp needs a list, and the package gguf writes no empty one. The byte FF is in no UTF-8 text.
    writer.add_token_merges(bpe["merges"] or ["ÿ ÿ"])
    ends = _ends(tokenizer)
    writer.add_bos_token_id(ends[0] if tokenizer.start is None else tokenizer.start)
    for role, i in zip(_ENDS, ends, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", i)
    writer.add_add_bos_token(False)
