"""`load`, `load_config` and `save` of checkpoints. Each format is one file, and essentially one table of names.

| what | recognised by | read | written |
|---|---|---|---|
| this project's directory | config.json with "format": "jaxgpt" | yes | yes |
| Hugging Face directory or hub name | config.json with "model_type": "gpt2" | yes | yes |
| the book's .pth or .safetensors | a tensor tok_emb.weight or out_head.weight | yes | |
| nanoGPT's ckpt.pt | the keys model and model_args | yes | |
| llm.c's .bin | its first bytes | yes | |
| OpenAI's TensorFlow directory | no config.json; hparams.json, checkpoint or an .index | yes | |

A format is a module, registered in `FORMATS` or `FILE_FORMATS`, except the last two. Every format has

- `recognises(content)`: whether `content` is in this format. For a directory, `content` is its config.json as a dict;
  for a safetensors or msgpack file, its `tensors.Tensor`s by name; for a file of PyTorch, what `torch.save` was given;
  for llm.c, a file's first bytes; for OpenAI's, the names of a directory's files;
- `read(path, content, overrides)`: returns the `layout.Checkpoint`, with its tensors not read yet. `overrides` are the
  fields of `GPTConfig` that the caller gave, for what the content does not say. The tokenizer is not the format's
  business, unless it stores a name of ours (`Checkpoint.tokenizer`): the files of one are looked for here.

Those in `FORMATS` can also be written, and have

- `FILES`: the names of all files that they may write;
- `refusal(model)`: why the format cannot hold this model, or `None`;
- `write(directory, model, params)`.

`gguf.py` is not among them: it writes one file, and does not read it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt import hub
from jaxgpt.checks import did_you_mean, short_repr
from jaxgpt.config import PRESETS, ComputeConfig, GPTConfig
from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.files import local, new_directory, replacing_directory, unfinished
from jaxgpt.model import GPT, cast_params, check_model
from jaxgpt.textfile import read_json
from jaxgpt.tokenizer import BUILTIN, NONE, get_tokenizer, tokenizer_in
from jaxgpt.weights import book, gguf, huggingface, llmc, nanogpt, openai, own
from jaxgpt.weights.layout import Checkpoint, read_params
from jaxgpt.weights.msgpack import open_msgpack
from jaxgpt.weights.tensors import beginning, load_torch, open_safetensors

__all__ = ["BUNDLED", "FILE_FORMATS", "FORMATS", "load", "load_config", "save"]

# Models that ship with the package: name to directory under jaxgpt/assets.
BUNDLED = {"shakespeare": "shakespeare"}

# Formats of directories and of single files, by name. If several recognise the same content, the first is taken.
FORMATS: dict[str, Any] = {"jaxgpt": own, "huggingface": huggingface}
FILE_FORMATS: dict[str, Any] = {"nanogpt": nanogpt, "book": book}


def load(
    path_or_name: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    compute: ComputeConfig | None = None,
    check_finite: bool = False,
    **overrides: Any,
) -> tuple[GPT, dict[str, Any]]:
    """Loads a model and its parameters from any format, which is recognised by content.

    Memory holds the parameters once, plus one array at a time. Nothing in a file is executed.

    Args:
        path_or_name: a file or directory, or the name of a bundled model or of a GPT-2 on the Hugging Face hub. A
            bundled name takes precedence over a path (write "./shakespeare" for the path), and a path over the hub.
            `jaxgpt.load` also takes the directory of a training run, whose model is that of its best checkpoint.
        revision: the branch, tag or commit of a model on the hub. `"NAME@REVISION"` as a name means the same, in the
            commands too.
        compute: how to run the model. By default this project's directories keep what they were saved with, and
            everything else gets `ComputeConfig()`: parameters become float32, whatever they are in the file. For a
            conversion to or from int8, memory holds both versions.
        check_finite: whether to look for NaN and infinite values.
        overrides: single fields of `ComputeConfig` to change (`param_dtype`, `dtype`, `scan_layers`, ...), and fields
            of `GPTConfig` that the file does not have (`n_heads` for the book's files) or that do not affect the
            parameters' shapes (`drop_rate`, ...). A shorter `context_length` leaves out the later positions.
            `tokenizer` may be anything that `get_tokenizer` takes; by default it is the one whose files lie in the
            directory or, for a GPT-2 of 50,257 to 50,304 ids without such files, OpenAI's. With "none", the model takes
            ids and no text, as one does that came without a tokenizer.

    Returns:
        (model, params): a `GPT`, and a plain nested dict of JAX arrays.

    Raises:
        CheckpointError: if it cannot be read, or its tensors are not exactly the model's; lists every difference.
        ConfigError: if its configuration is invalid or not implemented, or an override is wrong.
        DataError: if its tokenizer's files contradict themselves.
        MissingExtraError: if the format needs a package that is not installed.
        OutOfMemoryError: if the parameters alone need more memory than there is.
    """
    if not isinstance(compute, (ComputeConfig, type(None))):
        raise TypeError(f"compute must be a ComputeConfig, not {short_repr(compute)}")
    run, overrides = _pop_compute(overrides), _with_tokenizer_name(overrides)
    checkpoint = _recognise(path_or_name, overrides, revision, with_tensors=True)
    config, stored = _changed(checkpoint, overrides), checkpoint.compute.param_dtype
    compute = (compute or checkpoint.compute).replace(**run)
    if compute.param_dtype == stored or "int8" not in (compute.param_dtype, stored):
        return GPT(config, compute), read_params(checkpoint, config, compute, check_finite)
    params = read_params(checkpoint, config, compute.replace(param_dtype=stored), check_finite)
    return GPT(config, compute), cast_params(params, compute.param_dtype)


def load_config(path_or_name: str | Path | Checkpoint, *, revision: str | None = None, **overrides: Any) -> GPTConfig:
    """Returns the `GPTConfig` that `load` would use. Neither reads nor downloads tensors."""
    _pop_compute(overrides)
    overrides = _with_tokenizer_name(overrides)
    return _changed(_recognise(path_or_name, overrides, revision, with_tensors=False), overrides)


def _changed(checkpoint: Checkpoint, overrides: Mapping[str, Any]) -> GPTConfig:
    """The checkpoint's config with the overrides. Its context may become shorter, not longer."""
    config, most = checkpoint.config.replace(**overrides), checkpoint.config.context_length
    if config.context_length > most:
        raise ConfigError(
            f"context_length {config.context_length} is beyond the checkpoint's {most}: {checkpoint.path} has no "
            "embeddings of later positions"
        )
    return config


def _with_tokenizer_name(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides, with the name of the tokenizer that they give in whatever way."""
    given = overrides.get("tokenizer")
    return {**overrides} if given is None else {**overrides, "tokenizer": get_tokenizer(given).name}


def _with_tokenizer(checkpoint: Checkpoint, overrides: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with the name of its tokenizer in the config: of that whose files lie in the directory, or else of
    that which the format names. A checkpoint of 50,257 ids or a few more (added, or for padding) that has neither is
    taken for one with OpenAI's vocabulary; of other sizes, nothing is known.

    Raises:
        CheckpointError: if the format names another than the one in the directory.
        ConfigError, DataError: if the tokenizer's files cannot be used.
    """
    stored, size = checkpoint.tokenizer, checkpoint.config.vocab_size
    if "tokenizer" in overrides:
        return checkpoint
    found = tokenizer_in(checkpoint.path) if checkpoint.path.is_dir() else None
    if stored not in (None, NONE, *BUILTIN) and (found is None or found.name != stored):
        raise CheckpointError(
            checkpoint.path,
            f"its config names the tokenizer {stored}, and beside it lies {'none' if found is None else found.name}: "
            "restore the tokenizer's files, or say which to use (tokenizer=...)",
        )
    name = stored if found is None else found.name
    if name is None:
        name = "gpt2" if nanogpt.VOCAB <= size <= nanogpt.PADDED_VOCAB else NONE
    return dataclasses.replace(checkpoint, config=checkpoint.config.replace(tokenizer=name))


def _pop_compute(overrides: dict[str, Any]) -> dict[str, Any]:
    """Takes the fields of `ComputeConfig` out of the overrides; one that is None is left as it is."""
    found = {name: overrides.pop(name) for name in ComputeConfig().to_dict() if name in overrides}
    return {name: value for name, value in found.items() if value is not None}


def save(path: str | Path, model: GPT, params: Mapping[str, Any], *, format: str = "jaxgpt") -> None:
    """Writes a checkpoint directory in this project's format, or in one that transformers loads directly.

    `path` appears, or replaces the checkpoint that was there, only once everything is on disk. A README.md in it that
    somebody has written stays. Parameters keep their types. In addition to them, memory holds one array at a time.

    Args:
        path: the directory.
        model: the model, for its configuration.
        params: its parameters.
        format: "jaxgpt" or "huggingface"; a key of `FORMATS`.

    Raises:
        CheckpointError: if `params` do not fit the model, or the format cannot express it; if `path` holds anything
            but a checkpoint; or if writing fails, in which case `path` is unchanged.
        ValueError: for an unknown format.
    """
    check_model("save(path, model, params)", model, params)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}{did_you_mean(format, FORMATS)}")
    path = new_directory(path, force=True)
    if reason := FORMATS[format].refusal(model):
        raise CheckpointError(path, reason)
    _refuse_foreign_content(path)
    card = path / huggingface.CARD
    words = card.read_bytes() if card.is_file() else b""
    with replacing_directory(path, last="config.json") as directory:
        FORMATS[format].write(directory, model, params)
        if words not in (b"", *map(str.encode, huggingface.CARDS)):
            (directory / huggingface.CARD).write_bytes(words)


def _refuse_foreign_content(path: Path) -> None:
    """Raises unless the directory holds only files that `save` writes, because saving replaces it as a whole."""
    known = {file for layout in FORMATS.values() for file in layout.FILES}
    others = sorted({entry.name for entry in path.iterdir()} - known) if path.exists() else []
    if others:
        raise CheckpointError(path, f"holds {others[0]!r}, which is not part of a checkpoint: save to a new directory")


def _recognise(
    path_or_name: str | Path | Checkpoint, overrides: Mapping[str, Any], revision: str | None, *, with_tensors: bool
) -> Checkpoint:
    if revision is not None:
        path_or_name = _at_revision(path_or_name, revision)
    if isinstance(path_or_name, Checkpoint):
        return path_or_name
    return _with_tokenizer(_open(path_or_name, overrides, with_tensors), overrides)


def _open(path_or_name: str | Path, overrides: Mapping[str, Any], with_tensors: bool) -> Checkpoint:
    if not isinstance(path_or_name, (str, os.PathLike)):
        raise TypeError(f"load takes a path or a name, not {short_repr(path_or_name)}")
    if path_or_name in BUNDLED:
        path = Path(__file__).parent.parent / "assets" / BUNDLED[str(path_or_name)]
        if not path.is_dir():
            raise CheckpointError(
                str(path_or_name),
                "this installation has no bundled model: train one (jaxgpt train), or give the path of a checkpoint "
                "or the name of a GPT-2 on the Hugging Face hub, such as gpt2",
            )
        return _read_directory(path, overrides)
    path = local(path_or_name)
    try:
        is_there = path.exists()
    except OSError as error:  # a name that is too long, no permission
        raise CheckpointError(path, f"cannot be read: {error}") from None
    if path.is_dir():
        return _read_directory(path, overrides)
    if openai.names_a_part(path):
        raise CheckpointError(path, "part of a TensorFlow checkpoint: give the directory that it is in")
    if is_there:
        return _read_file(path, overrides)
    if (
        not isinstance(path_or_name, str)
        or not hub.is_name(path_or_name)
        or path.suffix in (".pt", ".pth", ".bin", ".safetensors", ".msgpack")
    ):
        raise CheckpointError(path, "no such file or directory")
    word = path_or_name.partition("@")[0]
    if "/" not in word and not word.startswith("gpt2"):
        # Before the hub is asked, because what is misspelt is seldom there.
        if word in PRESETS:
            raise CheckpointError(path, "a preset without published weights: GPT(GPTConfig.preset(...)) makes new ones")
        if hint := did_you_mean(word, [*BUNDLED, *PRESETS]):
            raise CheckpointError(path, f"no such file, directory or bundled model{hint}")
    return _read_directory(hub.download(path_or_name, with_tensors=with_tensors), overrides)


def _at_revision(name: Any, revision: str) -> str:
    """The name of a hub model at a revision; raises ValueError unless that is what the two make."""
    if not isinstance(name, str) or name in BUNDLED or "@" in name or os.path.lexists(local(name)):
        raise ValueError(f"revision={revision!r} is for a name of the Hugging Face hub, not for {short_repr(name)}")
    if not isinstance(revision, str) or not hub.is_name(f"{name}@{revision}"):
        raise ValueError(f"revision must be a branch, tag or commit of {name}, not {short_repr(revision)}")
    return f"{name}@{revision}"


def _read_directory(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    if not (path / "config.json").is_file():
        if reason := unfinished(path):
            raise CheckpointError(path, f"has no config.json: {reason}")
        try:
            names = {entry.name for entry in path.iterdir() if not entry.is_dir()}
        except OSError as error:  # no permission
            raise CheckpointError(path, f"cannot be read: {error}") from None
        if openai.recognises(names):
            return openai.read(path, names, overrides)
        raise CheckpointError(
            path,
            "expected a directory with config.json or OpenAI's hparams.json, or a training run (for a .pt or .pth, "
            "give the file itself)",
        )
    fields = read_json(path / "config.json")
    for layout in FORMATS.values():
        if isinstance(fields, dict) and layout.recognises(fields):
            return layout.read(path, fields, overrides)
    raise CheckpointError(
        path / "config.json", "expected jaxgpt's own form ('format': 'jaxgpt') or Hugging Face's ('model_type': 'gpt2')"
    )


def _read_file(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    if not path.is_file():  # opening a pipe could block forever
        raise CheckpointError(path, "is neither a file nor a directory")
    start = beginning(path)
    if llmc.recognises(start):
        return llmc.read(path, start, overrides)
    content: Any
    if start.startswith((b"PK\x03\x04", b"\x80")):
        content = load_torch(path)
    elif re.match(rb"[\x81-\x8f][\xa1-\xbf].[^\0]", start, re.DOTALL):  # a map; a safetensors file has a 0 there
        content = open_msgpack(path)
    elif start.startswith(gguf.MAGIC):
        raise CheckpointError(path, "a GGUF file, which is written and not read: load the model that it was made from")
    else:
        content = open_safetensors(path)
    if isinstance(content, dict):
        for layout in FILE_FORMATS.values():
            if layout.recognises(content):
                return layout.read(path, content, overrides)
        found = ", ".join(map(short_repr, list(content)[:5])) or "nothing"
    else:
        found = type(content).__name__
    raise CheckpointError(
        path,
        f"not a file of a known format ({', '.join(FILE_FORMATS)}, llmc): it holds {found}. If it belongs to a "
        "directory with a config.json, give the directory",
    )
