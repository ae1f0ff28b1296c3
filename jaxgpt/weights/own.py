"""The project's own layout: a directory with config.json and model.safetensors.

config.json is {"format": "jaxgpt", "version": 1, "config": {the fields of GPTConfig}}; the tensors are named by
their paths, one array a layer (`trf_blocks_0/att/qkv/weight`), whatever `scan_layers` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.checks import short_repr
from jaxgpt.config import GPTConfig
from jaxgpt.errors import CheckpointError
from jaxgpt.weights.layout import Checkpoint, identity_rows, outside_tensors
from jaxgpt.weights.tensors import open_safetensors, write_safetensors

VERSION = 1
FILES = ("config.json", "model.safetensors")


def recognises(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is this layout's."""
    return fields.get("format") == "jaxgpt"


def read(directory: Path, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in `directory`, whose config.json holds `fields`."""
    if fields.get("version") != VERSION or not isinstance(fields.get("config"), dict):
        raise CheckpointError(
            directory / "config.json",
            f"expected version {VERSION} and a 'config' object, not version {short_repr(fields.get('version'))}: "
            "a later jaxgpt may have written it",
        )
    config = GPTConfig.from_dict(fields["config"], source=str(directory / "config.json"))
    return Checkpoint(
        directory, config, identity_rows(config), tensors=lambda: open_safetensors(directory / "model.safetensors")
    )


def refusal(config: GPTConfig) -> str | None:
    """Why this layout cannot hold such a model; it holds all."""
    return None


def write(directory: Path, config: GPTConfig, params: Any) -> None:
    """Writes `FILES` into `directory`."""
    tensors = outside_tensors(directory, config, params, identity_rows(config), config)
    write_safetensors(directory / "model.safetensors", tensors, {"format": "jaxgpt"})
    head = {"format": "jaxgpt", "version": VERSION, "config": config.replace(native_kernel=False).to_dict()}
    (directory / "config.json").write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")
