"""The Hugging Face hub: downloads a model by name into a local directory."""

from __future__ import annotations

import re
from pathlib import Path

from jaxgpt.checks import first_line
from jaxgpt.errors import CheckpointError, require

_TENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
# And the files that say which ids start and end a text.
_TOKENIZER = (
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "encoder.json", "vocab.bpe"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "generation_config.json"),
)


def is_name(name: str) -> bool:
    """Whether `name` could be a hub name: "gpt2", "openai-community/gpt2-xl"."""
    parts = name.split("/")
    return len(parts) <= 2 and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)


def download(name: str, *, with_tensors: bool) -> Path:
    """Returns a directory with a hub model's config.json, its tokenizer and, with `with_tensors`, its safetensors.

    Uses huggingface_hub's cache and honours its environment variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, ...).

    Raises:
        CheckpointError: if it is not in the cache and cannot be downloaded; says which files to put where.
        MissingExtraError: without huggingface_hub.
    """
    hub = require("huggingface_hub", "hub", f"no file or directory {name!r}: getting it from the hub")
    patterns = ["config.json", *_TOKENIZER, *(_TENSORS if with_tensors else ())]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the base class of the library's network errors differs between its versions
        raise CheckpointError(
            name,
            "no such file or directory, and the download from the hub failed "
            f"({type(error).__name__}: {first_line(error)}). To work offline, put config.json and model.safetensors "
            f"from https://huggingface.co/{name}/tree/main into one directory and pass its path",
        ) from None
