"""OpenAI's TensorFlow directory of a GPT-2, or one fine-tuned from it (as by gpt-2-simple). Read only.

| file | what it is |
|---|---|
| hparams.json | the sizes |
| checkpoint | text that names the newest checkpoint |
| model.ckpt.index, model.ckpt.data-00000-of-00001 | a checkpoint, here model.ckpt; a fine-tuned one is model-1000 |
| encoder.json, vocab.bpe | the tokenizer |

The directory may hold others. Weights are [1, in, out], as for a convolution of width 1, with query, key and value side
by side along the out axis. The output head is the token embedding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxgpt.checks import did_you_mean, short_repr
from jaxgpt.config import GPTConfig
from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.textfile import read_json, read_text
from jaxgpt.weights.layout import Checkpoint, Row
from jaxgpt.weights.tensor_bundle import is_index, open_bundle
from jaxgpt.weights.tensors import Tensor

ROWS = (
    Row("tok_emb/weight", "model/wte"),
    Row("pos_emb/weight", "model/wpe"),
    Row("trf_blocks/norm1/scale", "model/h{i}/ln_1/g"),
    Row("trf_blocks/norm1/shift", "model/h{i}/ln_1/b"),
    Row("trf_blocks/att/qkv/weight", "model/h{i}/attn/c_attn/w", "columns"),
    Row("trf_blocks/att/qkv/bias", "model/h{i}/attn/c_attn/b", "flat"),
    Row("trf_blocks/att/out_proj/weight", "model/h{i}/attn/c_proj/w", "columns"),
    Row("trf_blocks/att/out_proj/bias", "model/h{i}/attn/c_proj/b"),
    Row("trf_blocks/norm2/scale", "model/h{i}/ln_2/g"),
    Row("trf_blocks/norm2/shift", "model/h{i}/ln_2/b"),
    Row("trf_blocks/ff/fc_in/weight", "model/h{i}/mlp/c_fc/w", "columns"),
    Row("trf_blocks/ff/fc_in/bias", "model/h{i}/mlp/c_fc/b"),
    Row("trf_blocks/ff/fc_out/weight", "model/h{i}/mlp/c_proj/w", "columns"),
    Row("trf_blocks/ff/fc_out/bias", "model/h{i}/mlp/c_proj/b"),
    Row("final_norm/scale", "model/ln_f/g"),
    Row("final_norm/shift", "model/ln_f/b"),
)

# An optimizer's state: of one variable, named after it, or of all.
SLOTS = r".+/(Adam|Momentum|RMSProp|Adagrad)(_\d+)?|(.+/)?(beta[12]_power|global_step)(_\d+)?"

_HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
}
_MOST_TEXT = 2**20  # bytes of the file `checkpoint`


def recognises(names: Collection[str]) -> bool:
    """Whether a directory with files of these names, and no config.json, is in this format."""
    return any(name in ("hparams.json", "checkpoint") or name.endswith(".index") for name in names)


def names_a_part(path: Path) -> bool:
    """Whether `path` is a file of a checkpoint, or what TensorFlow calls a checkpoint: what its files' names begin
    with."""
    prefix = re.sub(r"(?<=[^/])\.(index|meta|data-\d{5}-of-\d{5})$", "", str(path))
    return (prefix != str(path) or not os.path.lexists(path)) and is_index(f"{prefix}.index")


def read(directory: Path, names: Collection[str], overrides: Mapping[str, Any]) -> Checkpoint:
    """Returns the checkpoint in `directory`, whose files have these names.

    Raises:
        CheckpointError: if there is no checkpoint, or several and no telling which; or if hparams.json lacks a key.
        ConfigError: for a key of hparams.json that OpenAI's code does not have, or an invalid value.
    """
    if "hparams.json" not in names:
        raise CheckpointError(
            directory, "holds a TensorFlow checkpoint without hparams.json: copy that from the model it was tuned from"
        )
    path = directory / "hparams.json"
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(path, f"expected a JSON object, not {short_repr(content)}")
    for name in content:
        if name not in _HPARAMS:
            raise ConfigError(f"{path}: unknown key {short_repr(name)}{did_you_mean(name, _HPARAMS)}")
    if missing := [name for name in _HPARAMS if name not in content]:
        raise CheckpointError(path, f"lacks {', '.join(missing)}")
    config = GPTConfig.from_dict({_HPARAMS[name]: value for name, value in content.items()}, source=str(path))
    prefix = directory / _newest(directory, names)
    return Checkpoint(
        directory,
        config,
        ROWS,
        tensors=lambda: {name: _matrix(tensor) for name, tensor in open_bundle(prefix).items()},
        skip=SLOTS,
    )


def _newest(directory: Path, names: Collection[str]) -> str:
    """The name of the checkpoint to read: that which the file `checkpoint` says, or else the only one."""
    if "checkpoint" in names:
        path = directory / "checkpoint"
        try:
            text = read_text(path, _MOST_TEXT)
        except (OSError, ValueError) as error:
            raise CheckpointError(path, f"cannot be read: {error}") from None
        found = re.search(r'^\s*model_checkpoint_path:\s*"([^"\n]*)"', text, re.MULTILINE)
        # An absolute path is where the directory was when it was written.
        name = re.sub(r"^/.*/", "", found[1]) if found else ""
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise CheckpointError(
                path,
                "expected 'model_checkpoint_path: \"NAME\"', a checkpoint in this directory, not "
                f"{short_repr(found[1] if found else text)}",
            )
        return name
    there = sorted(name.removesuffix(".index") for name in names if name.endswith(".index"))
    if len(there) != 1:
        found_names = f"{len(there)}, and no file 'checkpoint' that names one" if there else "none"
        raise CheckpointError(
            directory, f"expected a TensorFlow checkpoint, such as model.ckpt.index: it has {found_names}"
        )
    return there[0]


def _matrix(tensor: Tensor) -> Tensor:
    """A tensor [1, in, out] as [in, out], and any other as it is."""
    if len(tensor.shape) != 3 or tensor.shape[0] != 1:
        return tensor
    return tensor._replace(shape=tensor.shape[1:], read=lambda: tensor.read()[0])
