"""The state dict of "Build a Large Language Model (From Scratch)", as `.pth` or `.safetensors`. Read only.

A state dict has no configuration. The sizes follow from the shapes; the number of heads does not, so it is looked up
among the book's four sizes, all of which have heads of width 64. A file that holds the output head and no embedding is
that of a tied model, saved by what stores shared tensors once (safetensors' `save_model`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.checks import short_repr
from jaxgpt.config import GPTConfig
from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.weights.layout import Checkpoint, Row
from jaxgpt.weights.tensors import Tensor, tensors_of, without_prefix

TIED = ("out_head.weight", "tok_emb.weight")
HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}

ROWS = (
    Row("tok_emb/weight", "tok_emb.weight"),
    Row("pos_emb/weight", "pos_emb.weight"),
    Row("trf_blocks/norm1/scale", "trf_blocks.{i}.norm1.scale"),
    Row("trf_blocks/norm1/shift", "trf_blocks.{i}.norm1.shift"),
    Row("trf_blocks/att/qkv/weight", tuple(f"trf_blocks.{{i}}.att.W_{x}.weight" for x in ("query", "key", "value"))),
    Row("trf_blocks/att/qkv/bias", tuple(f"trf_blocks.{{i}}.att.W_{x}.bias" for x in ("query", "key", "value"))),
    Row("trf_blocks/att/out_proj/weight", "trf_blocks.{i}.att.out_proj.weight"),
    Row("trf_blocks/att/out_proj/bias", "trf_blocks.{i}.att.out_proj.bias"),
    Row("trf_blocks/norm2/scale", "trf_blocks.{i}.norm2.scale"),
    Row("trf_blocks/norm2/shift", "trf_blocks.{i}.norm2.shift"),
    Row("trf_blocks/ff/fc_in/weight", "trf_blocks.{i}.ff.layers.0.weight"),
    Row("trf_blocks/ff/fc_in/bias", "trf_blocks.{i}.ff.layers.0.bias"),
    Row("trf_blocks/ff/fc_out/weight", "trf_blocks.{i}.ff.layers.2.weight"),
    Row("trf_blocks/ff/fc_out/bias", "trf_blocks.{i}.ff.layers.2.bias"),
    Row("final_norm/scale", "final_norm.scale"),
    Row("final_norm/shift", "final_norm.shift"),
    Row("out_head/weight", "out_head.weight"),
)


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is in this format."""
    state = _state_dict(content)
    return any(prefix + name in state for name in TIED for prefix in ("", "_orig_mod."))


def read(path: Path, content: Mapping[str, Any], overrides: Mapping[str, Any]) -> Checkpoint:
    """Returns the checkpoint whose state dict is in `content`; `overrides` may set `n_heads`.

    Raises:
        CheckpointError: if a tensor that the sizes are read from is missing.
        ConfigError: if the number of heads is neither given nor known.
    """
    n_heads = overrides.get("n_heads")
    tensors = without_prefix(path, tensors_of(path, _state_dict(content)), "_orig_mod.")  # from torch.compile
    layers = [int(m[1]) for name in tensors if (m := re.match(r"trf_blocks\.(\d{1,9})\.", name))]
    head, embedding = TIED
    tied = head in tensors and embedding not in tensors
    vocab_size, emb_dim = _matrix(path, tensors, head if tied else embedding)
    if n_heads is None and emb_dim not in HEADS:
        raise ConfigError(
            f"{path}: a state dict does not say n_heads, and emb_dim={emb_dim} is none of the book's sizes: "
            "pass n_heads=... (jaxgpt convert: --n-heads)"
        )
    config = GPTConfig.from_dict(
        {
            "vocab_size": vocab_size,
            "context_length": _matrix(path, tensors, "pos_emb.weight")[0],
            "emb_dim": emb_dim,
            "n_heads": HEADS[emb_dim] if n_heads is None else n_heads,
            "n_layers": max(layers, default=-1) + 1,
            "ffn_dim": _matrix(path, tensors, "trf_blocks.0.ff.layers.0.weight")[0],
            "qkv_bias": "trf_blocks.0.att.W_query.bias" in tensors,
            "tie_embeddings": tied,
        },
        source=str(path),
    )
    return Checkpoint(
        path,
        config,
        ROWS,
        tensors=lambda: dict(tensors),
        skip=r"trf_blocks\.\d+\.att\.mask",
        tied=TIED,
    )


def _state_dict(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's state dict; the book's chapter 5 saves it next to the optimizer's."""
    inner = content.get("model_state_dict")
    return inner if isinstance(inner, Mapping) else content


def _matrix(path: Path, tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    shape = tensors[name].shape if name in tensors else None
    if shape is None or len(shape) != 2:
        raise CheckpointError(
            path, f"expected a matrix {name!r}, not {'nothing' if shape is None else short_repr(list(shape))}"
        )
    return shape
