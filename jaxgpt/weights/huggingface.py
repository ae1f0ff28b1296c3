"""Hugging Face's GPT-2: a directory with config.json and the weights in one of the files in `hub.WEIGHTS`, or in
shards of it with their index.

`Conv1D` weights are [in, out], with query, key and value side by side along the out axis. Names and shapes are those of
transformers' PyTorch model, in errors too; what its Flax model wrote is renamed and transposed to them.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.checks import short_repr
from jaxgpt.config import GPTConfig
from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.hub import WEIGHTS, index_of
from jaxgpt.model import GPT
from jaxgpt.textfile import read_json, write_json
from jaxgpt.tokenizer import BUILTIN, NONE, get_tokenizer, write_tokenizer
from jaxgpt.tokenizer import FILES as TOKENIZER_FILES
from jaxgpt.weights.config_keys import refuse_other_mathematics
from jaxgpt.weights.layout import Checkpoint, Row, outside_tensors
from jaxgpt.weights.msgpack import open_msgpack
from jaxgpt.weights.tensors import Tensor, open_safetensors, open_torch, without_prefix, write_safetensors

# What opens the files that may hold the weights.
_OPENERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": open_safetensors,
    ".msgpack": open_msgpack,
    ".bin": open_torch,
}
CARD = "README.md"
FILES = ("config.json", "model.safetensors", "generation_config.json", *TOKENIZER_FILES, CARD)
MASKS = r"h\.\d+\.attn\.(bias|masked_bias)"
TIED = ("lm_head.weight", "wte.weight")
# What others call a weight or a bias: Flax, whose kernels are the transposes, and models that came from TensorFlow.
_SYNONYMS = {"kernel": "weight", "embedding": "weight", "scale": "weight", "gamma": "weight", "beta": "bias"}

ROWS = (
    Row("tok_emb/weight", "wte.weight"),
    Row("pos_emb/weight", "wpe.weight"),
    Row("trf_blocks/norm1/scale", "h.{i}.ln_1.weight"),
    Row("trf_blocks/norm1/shift", "h.{i}.ln_1.bias"),
    Row("trf_blocks/att/qkv/weight", "h.{i}.attn.c_attn.weight", "columns"),
    Row("trf_blocks/att/qkv/bias", "h.{i}.attn.c_attn.bias", "flat"),
    Row("trf_blocks/att/out_proj/weight", "h.{i}.attn.c_proj.weight", "columns"),
    Row("trf_blocks/att/out_proj/bias", "h.{i}.attn.c_proj.bias"),
    Row("trf_blocks/norm2/scale", "h.{i}.ln_2.weight"),
    Row("trf_blocks/norm2/shift", "h.{i}.ln_2.bias"),
    Row("trf_blocks/ff/fc_in/weight", "h.{i}.mlp.c_fc.weight", "columns"),
    Row("trf_blocks/ff/fc_in/bias", "h.{i}.mlp.c_fc.bias"),
    Row("trf_blocks/ff/fc_out/weight", "h.{i}.mlp.c_proj.weight", "columns"),
    Row("trf_blocks/ff/fc_out/bias", "h.{i}.mlp.c_proj.bias"),
    Row("final_norm/scale", "ln_f.weight"),
    Row("final_norm/shift", "ln_f.bias"),
    Row("out_head/weight", "lm_head.weight"),
)

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- jaxgpt
# license: the identifier of the weights' licence, such as mit
---

# A GPT-2 exported by jaxgpt

config.json has its sizes. What it was trained on, how good it is and under which licence it may be used are for its
author to write here.
"""
_CARD_FOR_TEXT = """
With transformers:

```python
from transformers import pipeline

print(pipeline("text-generation", "path/of/this/directory")("Once upon a time")[0]["generated_text"])
```

With jaxgpt:

```python
import jaxgpt

model, params = jaxgpt.load("path/of/this/directory")
print(jaxgpt.generate_text(model, params, "Once upon a time", 100)[0])
```
"""
_CARD_FOR_IDS = """
It takes and gives token ids: no tokenizer is here, because none was known, or because it has ids that the model lacks.

With transformers:

```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")
print(model.generate(torch.tensor([[0, 1, 2]])))
```

With jaxgpt:

```python
import jaxgpt

model, params = jaxgpt.load("path/of/this/directory")
print(jaxgpt.generate(model, params, [[0, 1, 2]], 100).tokens)
```
"""
# The model cards that `write` writes: with a tokenizer, and without.
CARDS = (_CARD + _CARD_FOR_TEXT, _CARD + _CARD_FOR_IDS)

# Our field, their keys (the second is transformers' alias for the first), the value if neither is given.
_FIELDS: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("vocab_size", ("vocab_size",), 50257),
    ("context_length", ("n_positions", "max_position_embeddings"), 1024),
    ("emb_dim", ("n_embd", "hidden_size"), 768),
    ("n_heads", ("n_head", "num_attention_heads"), 12),
    ("n_layers", ("n_layer", "num_hidden_layers"), 12),
    ("ffn_dim", ("n_inner",), None),
    ("layer_norm_eps", ("layer_norm_epsilon",), 1e-5),
    ("drop_rate_emb", ("embd_pdrop",), 0.1),
    ("drop_rate_attn", ("attn_pdrop",), 0.1),
    ("drop_rate_shortcut", ("resid_pdrop",), 0.1),
    ("tie_embeddings", ("tie_word_embeddings",), True),
    ("activation", ("activation_function",), "gelu_new"),
    ("scale_attn_weights", ("scale_attn_weights",), True),
    ("scale_attn_by_inverse_layer_idx", ("scale_attn_by_inverse_layer_idx",), False),
)
# transformers' names of our activations; the first of several is the one that is written. Those of a line differ only
# in how they are computed (gelu_fast has the root of 2 / pi to ten digits, which as a float32 is the same).
_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "relu": "relu",
    "tanh": "tanh",
}


def recognises(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this format."""
    return "model_type" in fields or "architectures" in fields


def read(directory: Path, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> Checkpoint:
    """Returns the checkpoint in `directory`, whose config.json holds `fields`.

    Raises:
        CheckpointError: if it is not a GPT-2.
        ConfigError: for a switch that this model does not implement, or an invalid value.
    """
    architectures = fields.get("architectures") or []
    if fields.get("model_type", "gpt2" if "GPT2" in str(architectures) else None) != "gpt2":
        found = fields.get("model_type") or architectures
        raise CheckpointError(directory / "config.json", f"expected model_type 'gpt2', not {short_repr(found)}")
    return Checkpoint(
        directory,
        read_config(fields, source=str(directory / "config.json")),
        ROWS,
        tensors=lambda: _as_pytorch(directory, _open(directory)),
        skip=MASKS,
        tied=TIED,
        tokenizer=stored_tokenizer(fields),
    )


def stored_tokenizer(fields: Mapping[str, Any]) -> str | None:
    """The tokenizer in the package that our own key, which transformers preserves, names; None if there is none."""
    name = fields.get("jaxgpt_tokenizer")
    return name if name in (*BUILTIN, NONE) else None


def read_config(fields: Mapping[str, Any], source: str) -> GPTConfig:
    """Converts a config.json of model_type "gpt2" to a `GPTConfig`; raises ConfigError as `read` does."""
    refuse_other_mathematics(fields, {key for _, keys, _ in _FIELDS for key in keys}, source)
    ours = {}
    for name, keys, default in _FIELDS:
        given = {key: fields[key] for key in keys if key in fields}
        ours[name], *others = given.values() or (default,)
        if any(value != ours[name] for value in others):
            values = " and ".join(map(short_repr, given.values()))
            raise ConfigError(f"{source}: {' and '.join(given)} mean the same, and cannot be {values}")
    if ours["activation"] not in tuple(_ACTIVATIONS):
        known = ", ".join(_ACTIVATIONS)
        raise ConfigError(f"{source}: activation_function must be one of {known}, not {short_repr(ours['activation'])}")
    ours["activation"] = _ACTIVATIONS[ours["activation"]]
    ours["drop_rate"] = ours["drop_rate_shortcut"]
    return GPTConfig.from_dict(ours, source=source)


def _open(directory: Path) -> dict[str, Tensor]:
    for file in WEIGHTS:
        whole, index = directory / file, directory / index_of(file)
        if os.path.lexists(whole):  # a link to nothing must not make way for other weights
            return _OPENERS[whole.suffix](whole)
        if os.path.lexists(index):
            return _open_shards(index, whole.suffix)
    others = sorted(path.name for path in directory.iterdir() if path.suffix in (".h5", ".ot", ".onnx", ".gguf"))
    raise CheckpointError(
        directory,
        f"expected {', '.join(WEIGHTS)}, or one of these as an index and its shards"
        + (f"; {others[0]} is in a format that is not read" if others else ""),
    )


def _open_shards(index: Path, suffix: str) -> dict[str, Tensor]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(index, "expected an object 'weight_map' from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        if not re.fullmatch(rf"\w[\w.-]*\{suffix}", file):
            raise CheckpointError(
                index, f"names the file {short_repr(file)}: expected a {suffix} file beside the index"
            )
        for name, tensor in _OPENERS[suffix](index.parent / file).items():
            if names.get(name) != file:
                raise CheckpointError(
                    index, f"{file} holds the tensor {short_repr(name)}, which the index does not place there"
                )
            tensors[name] = tensor
    if lost := [name for name in names if name not in tensors]:
        raise CheckpointError(
            index, f"places {len(lost)} tensors in files that lack them, the first {short_repr(lost[0])}"
        )
    return tensors


def _as_pytorch(directory: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names, and in the shapes, that transformers' PyTorch model gives them, without prefixes.

    Flax's kernels are all transposed: those of the blocks are [out, in], and the output head's is [in, out].
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.replace("/", ".").split(".")
        if parts[-1] == "kernel":
            tensor = Tensor(tensor.shape[::-1], tensor.dtype, functools.partial(_transposed, tensor))
        new = ".".join([*parts[:-1], _SYNONYMS.get(parts[-1], parts[-1])])
        if new in renamed:
            raise CheckpointError(directory, f"the tensor {short_repr(new)} appears twice, under different names")
        renamed[new] = tensor
    return without_prefix(directory, without_prefix(directory, renamed, "params."), "transformer.")


def _transposed(tensor: Tensor) -> np.ndarray:
    return tensor.read().T


def refusal(model: GPT) -> str | None:
    """Why this format cannot hold `model`, or `None` if it can."""
    if model.compute.param_dtype == "int8":
        return "huggingface's format has no int8: convert to float32 or bfloat16 first (param_dtype)"
    if model.config.banded_layers:
        return "Hugging Face's GPT-2 has no banded attention (attention_pattern 'alternating'): use format='jaxgpt'"
    return None


def write(directory: Path, model: GPT, params: Any) -> None:
    """Writes a directory that transformers loads directly, with the tokenizer's files if the model has an id for every
    text, and a model card (of `CARDS`).

    transformers' GPT-2 always has biases, so those that the config leaves out are written as zeros. CTranslate2's
    converter reads the directory too if the tokenizer names tokens for bos, eos and unk and the activation is not tanh,
    but takes `layer_norm_epsilon` for 1e-5 and the `scale_attn_` switches for their defaults, whatever these are.
    """
    config, tokenizer = model.config, get_tokenizer(model.config.tokenizer)
    full = config.replace(bias=True, qkv_bias=True)
    tensors = outside_tensors(directory, model, params, ROWS, full)
    # Without this prefix, transformers would take the file for a model without an output head.
    named = {name if name == TIED[0] else f"transformer.{name}": tensor for name, tensor in tensors.items()}
    write_safetensors(directory / "model.safetensors", named, {"format": "pt"})
    write_json(directory / "config.json", config_fields(config) | {"torch_dtype": model.compute.param_dtype})
    # Without a configuration of its own, transformers' pipeline samples 256 tokens, whatever the context holds.
    generation = {"do_sample": False, "max_length": config.context_length}
    write_json(directory / "generation_config.json", _special_ids(config) | generation)
    if has_tokenizer(config):
        write_tokenizer(directory, tokenizer, context_length=config.context_length, vocab_size=config.vocab_size)
    (directory / CARD).write_text(CARDS[not has_tokenizer(config)], encoding="utf-8")


def has_tokenizer(config: GPTConfig) -> bool:
    """Whether `write` writes a tokenizer's files: not if a text could have ids that the model lacks."""
    return config.tokenizer != NONE and config.vocab_size >= get_tokenizer(config.tokenizer).text_ids


def config_fields(config: GPTConfig) -> dict[str, Any]:
    """The content of config.json for a config, except the parameters' dtype."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{keys[0]: getattr(config, name) for name, keys, _ in _FIELDS},
        "n_ctx": config.context_length,  # transformers has dropped this name, and llama.cpp's converter reads it
        "activation_function": next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation),
        "add_cross_attention": False,
        **_special_ids(config),
        # Of others the files tell, which somebody may change.
        **({"jaxgpt_tokenizer": config.tokenizer} if config.tokenizer in (*BUILTIN, NONE) else {}),
    }


def _special_ids(config: GPTConfig) -> dict[str, Any]:
    tokenizer = get_tokenizer(config.tokenizer)
    start = tokenizer.start if tokenizer.start is not None and tokenizer.start < config.vocab_size else None
    stops = [i for i in tokenizer.stop_ids if i < config.vocab_size]
    return {"bos_token_id": start, "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None)}
