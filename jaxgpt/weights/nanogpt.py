"""nanoGPT's `ckpt.pt`: {"model": state dict, "model_args": {...}, ...}. Read only.

The tensors are named as in transformers' GPT-2, but are `nn.Linear` [out, in] instead of `Conv1D`. nanoGPT's GELU is
the exact form with erf (`nn.GELU()`). Checkpoints from before April 2023 used the tanh form, which the file does not
record: load those with `activation="gelu_tanh"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.checks import did_you_mean, short_repr
from jaxgpt.config import GPTConfig
from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.weights import huggingface
from jaxgpt.weights.layout import Checkpoint, Row
from jaxgpt.weights.tensors import tensors_of, without_prefix

# nanoGPT rounds GPT-2's vocabulary up to a multiple of 64 for speed. No text contains the added ids.
PADDED_VOCAB, VOCAB = 50304, 50257

_ARGS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "dropout": "drop_rate",
    "bias": "bias",
}


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is in this format."""
    return isinstance(content.get("model"), dict) and isinstance(content.get("model_args"), dict)


def read(path: Path, content: Mapping[str, Any], overrides: Mapping[str, Any]) -> Checkpoint:
    """Returns the checkpoint in `content`. If the vocabulary is padded to 50,304, only the first 50,257 rows are kept,
    so that ids which no tokenizer knows cannot be sampled.

    Raises:
        CheckpointError: if `model_args` lacks a key.
        ConfigError: for a key in `model_args` that nanoGPT does not have (forks use such keys to change the
            mathematics), or an invalid value.
    """
    fields: dict[str, Any] = {"activation": "gelu"}
    for name, value in content["model_args"].items():
        if name not in _ARGS:
            raise ConfigError(f"{path}: model_args: unknown key {short_repr(name)}{did_you_mean(name, _ARGS)}")
        fields[_ARGS[name]] = value
    fields["qkv_bias"] = fields.setdefault("bias", True)
    missing = [name for name, ours in _ARGS.items() if ours not in fields and name != "dropout"]
    if missing:
        raise CheckpointError(path, f"model_args lacks {', '.join(missing)}")
    config = GPTConfig.from_dict(fields, source=f"{path}: model_args")
    padding = 0
    if config.vocab_size == PADDED_VOCAB:
        config, padding = config.replace(vocab_size=VOCAB), PADDED_VOCAB - VOCAB
    tensors = without_prefix(path, tensors_of(path, content["model"]), "_orig_mod.")  # from torch.compile
    return Checkpoint(
        path,
        config,
        linear_rows(padding),
        tensors=lambda: without_prefix(path, tensors, "transformer."),
        skip=huggingface.MASKS,
        tied=huggingface.TIED,
    )


def linear_rows(padding: int) -> tuple[Row, ...]:
    """Hugging Face's table with weights [out, in] instead of [in, out], and added rows in the matrices of V rows."""
    return tuple(
        row._replace(
            form="rows" if row.form == "columns" else row.form,
            padding=padding if row.ours in ("tok_emb/weight", "out_head/weight") else 0,
        )
        for row in huggingface.ROWS
    )
