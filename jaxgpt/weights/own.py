"""This project's format: a directory with config.json and model.safetensors.

config.json is {"format": "jaxgpt", "version": 1, "config": {the fields of GPTConfig}, "compute": {those of
ComputeConfig}}. The tensors are named by their paths, one array per layer (`trf_blocks_0/att/qkv/weight`), regardless
of `scan_layers`. A tokenizer that is not in the package lies beside them, as the files that transformers reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.checks import short_repr
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.errors import CheckpointError
from jaxgpt.model import GPT
from jaxgpt.textfile import write_json
from jaxgpt.tokenizer import BUILTIN, get_tokenizer, write_tokenizer
from jaxgpt.tokenizer import FILES as TOKENIZER_FILES
from jaxgpt.weights.layout import Checkpoint, identity_rows, outside_tensors
from jaxgpt.weights.tensors import open_safetensors, write_safetensors

VERSION = 1
FILES = ("config.json", "model.safetensors", *TOKENIZER_FILES)


def recognises(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this format."""
    return fields.get("format") == "jaxgpt"


def read(directory: Path, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> Checkpoint:
    """Returns the checkpoint in `directory`, whose config.json holds `fields`."""
    model, run = fields.get("config"), fields.get("compute", {})
    if fields.get("version") != VERSION or not isinstance(model, dict) or not isinstance(run, dict):
        raise CheckpointError(
            directory / "config.json",
            f"expected version {VERSION}, a 'config' object and a 'compute' object, not version "
            f"{short_repr(fields.get('version'))}: a later jaxgpt may have written it",
        )
    source = str(directory / "config.json")
    config, compute = GPTConfig.from_dict(model, source), ComputeConfig.from_dict(run, source)
    return Checkpoint(
        directory,
        config,
        identity_rows(config, compute.param_dtype),
        tensors=lambda: open_safetensors(directory / "model.safetensors"),
        compute=compute,
        tokenizer=config.tokenizer,
    )


def refusal(model: GPT) -> str | None:
    """Why this format cannot hold `model`: always `None`, because it holds every model."""
    return None


def write(directory: Path, model: GPT, params: Any) -> None:
    """Writes `FILES` into `directory`; the tokenizer's only if it is not in the package."""
    rows = identity_rows(model.config, model.compute.param_dtype)
    tensors = outside_tensors(directory, model, params, rows, model.config)
    write_safetensors(directory / "model.safetensors", tensors, {"format": "jaxgpt"})
    head = {
        "format": "jaxgpt",
        "version": VERSION,
        "config": model.config.to_dict(),
        "compute": model.compute.portable().to_dict(),
    }
    if model.config.tokenizer not in BUILTIN:
        tokenizer = get_tokenizer(model.config.tokenizer)
        write_tokenizer(directory, tokenizer, context_length=model.config.context_length, own_ids=True)
    write_json(directory / "config.json", head)
