"""The Hugging Face hub: downloads a model by name into a local directory."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from jaxgpt.checks import first_line
from jaxgpt.errors import CheckpointError, require

# The files of a repository that may hold its weights. The first that is there is read: safetensors; Flax's file, which
# needs nothing more; then PyTorch's, which needs PyTorch. Instead of the whole file, there may be shards and an index.
WEIGHTS = ("model.safetensors", "flax_model.msgpack", "pytorch_model.bin")

# The files that hold its tokenizer, and those that say which ids start and end a text.
_TOKENIZER = (
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "encoder.json", "vocab.bpe"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "generation_config.json"),
)


def index_of(file: str) -> str:
    """The name of the index of shards, where a whole file would have the name `file`."""
    return f"{file}.index.json"


def is_name(name: str) -> bool:
    """Whether `name` could be a hub name, with or without a revision: `"gpt2"`, `"openai-community/gpt2-xl@main"`."""
    repository, at, revision = name.partition("@")
    parts = repository.split("/")
    if at and not re.fullmatch(r"(?!.*\.\.)\w[\w./-]*", revision):
        return False
    return len(parts) <= 2 and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)


def download(name: str, *, with_tensors: bool) -> Path:
    """Returns a directory with a hub model's config.json, its tokenizer and, with `with_tensors`, its weights: of the
    files in `WEIGHTS` the first that the repository has, whole or in shards.

    Uses huggingface_hub's cache and honours its environment variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, ...).

    Args:
        name: the repository, and after an "@" its revision, if it is not main: a branch, a tag or a commit.
        with_tensors: whether to download the weights too.

    Raises:
        CheckpointError: if it is not in the cache and cannot be downloaded, which says what to put where; or if the
            repository has no weights that could be read.
        MissingExtraError: without huggingface_hub.
    """
    hub = require("huggingface_hub", "hub", f"no file or directory {name!r}: getting it from the hub")
    repository, _, revision = name.partition("@")
    revision = revision or "main"
    weights: list[str] = []
    try:
        if with_tensors:
            try:  # not list_repo_files, which retries for 23 seconds where there is no network
                files = [file.rfilename for file in hub.model_info(repository, revision=revision).siblings]
            except Exception:  # no network, perhaps: an earlier download may have left in the cache what is needed
                config = hub.try_to_load_from_cache(repository, "config.json", revision=revision)
                if isinstance(config, str) and _weights(os.listdir(os.path.dirname(config))):
                    return Path(config).parent
                raise
            weights = _weights(files)
        patterns = ["config.json", *_TOKENIZER, *weights]
        directory = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the base class of the library's network errors differs between its versions
        raise CheckpointError(
            name,
            "no such file or directory, and the download from the hub failed "
            f"({type(error).__name__}: {first_line(error)}). To work offline, put config.json and model.safetensors "
            f"from https://huggingface.co/{repository}/tree/{revision} into one directory and pass its path",
        ) from None
    if with_tensors and not weights:
        raise CheckpointError(name, f"the hub has this repository, but without {' or '.join(WEIGHTS)}")
    return directory


def _weights(files: Collection[str]) -> list[str]:
    """Patterns of the names of the weights to read, if these are the files that there are."""
    for file in WEIGHTS:
        if file in files:
            return [file]
        if index_of(file) in files:
            stem, suffix = os.path.splitext(file)
            return [index_of(file), f"{stem}-*{suffix}"]
    return []
