"""Hugging Face's hub: a model's name to a directory on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from jaxgpt.checks import first_line
from jaxgpt.errors import CheckpointError, require

_TENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")


def is_name(name: str) -> bool:
    """Whether `name` could be a hub name: "gpt2", "openai-community/gpt2-xl"."""
    parts = name.split("/")
    return len(parts) <= 2 and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)


def download(name: str, *, with_tensors: bool) -> Path:
    """The directory with a hub model's config.json, and its safetensors if asked.

    The library's cache comes first, and its variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, ...) hold.

    Raises:
        CheckpointError: if it is neither in the cache nor to be had; says which files to put where.
        MissingExtraError: without huggingface_hub.
    """
    hub = require("huggingface_hub", "hub", f"no file or directory {name!r}: getting it from the hub")
    patterns = ["config.json", *(_TENSORS if with_tensors else ())]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the family of the library's network errors has changed between its versions
        raise CheckpointError(
            name,
            f"no such file or directory, and not to be had from the hub ({type(error).__name__}: {first_line(error)}). "
            "To do without the network, put config.json and model.safetensors from "
            f"https://huggingface.co/{name}/tree/main into one directory and pass its path",
        ) from None
