"""What a run is, before anything is written: its model, its data, its devices, and what a user should know of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.accounting import count_parameters
from jaxgpt.checks import short_repr
from jaxgpt.config import PRESETS, GPTConfig
from jaxgpt.cpu import sequences
from jaxgpt.data import MARKED, Corpus, Ids, Mixture, Records, open_corpus
from jaxgpt.errors import ConfigError
from jaxgpt.fields import to_table
from jaxgpt.generation import encode_prompt
from jaxgpt.parallel import sharding
from jaxgpt.tokenizer import NONE
from jaxgpt.training import trainable
from jaxgpt.training.batches import check_enough
from jaxgpt.training.config import TrainConfig
from jaxgpt.training.models import OWN_FIELDS, load_config
from jaxgpt.training.packing import separator_id
from jaxgpt.training.step import attention_backend
from jaxgpt.training.storage import storage
from jaxgpt.weights import BUNDLED


def prepare(
    config: TrainConfig, data: Any, init_from: str | None, *, resume: bool = False, **reading: Any
) -> tuple[TrainConfig, Mesh | None, Corpus, Mixture, Ids | Records]:
    """What `train` and `dry_run` need before anything is written: (config, mesh, corpus, training data, validation
    ids). The config's model is that of `init_from`; a run that is resumed knows it already. Its template is the one
    that the data is read by. The other arguments are those of `open_corpus`.

    Raises:
        ConfigError, DataError, CheckpointError: for input that cannot be used.
    """
    if not resume and init_from is not None:
        config = _fine_tuned(config, init_from)
    trainable.check(config)
    if config.lora.rank and init_from is None:
        raise ConfigError("lora needs a model whose matrices it adapts: say which (--init-from MODEL)")
    mesh = _mesh(config)
    corpus = open_corpus(data, config.model, template=config.template, longest=config.T + 1, **reading)
    config = dataclasses.replace(config, template=corpus.template)
    _check_samples(config)
    if config.separate_documents:
        separator_id(config.model)  # raises if there is none
        if config.template:
            raise ConfigError("separate_documents is for texts: each record is a sequence of its own")
    train_data, val_N = corpus.split(config.val_fraction)
    check_enough(train_data, config, "training")
    if len(val_N) or config.val_fraction:
        check_enough(val_N, config, "validation")
    elif config.patience:
        raise ConfigError("patience needs something to validate on: --val-data, or a val_fraction above 0")
    return config, mesh, corpus, train_data, val_N


def with_native_sequences(config: TrainConfig, mesh: Mesh | None, began: TrainConfig | None) -> TrainConfig:
    """The config with native sequences or without: for a new run with them, where that is faster; for one that is
    resumed as it `began`, whatever would be faster by now: they round differently, and dropout draws other masks."""
    if began is not None:
        native = began.compute.native_sequences and not sequences.missing(began.compute.dtype)
    else:
        one_cpu = mesh is None and jax.default_backend() == "cpu"
        native = config.compute.native_sequences or (one_cpu and sequences.preferred_or_built(config.compute.dtype))
    return dataclasses.replace(config, compute=config.compute.replace(native_sequences=native))


def starting_point(config: TrainConfig | None, init_from: str | None) -> str | None:
    """What a new run starts from: what is given, or else what the config says."""
    return absolute(init_from or (config.init_from if config is not None else "") or None)


def absolute(source: str | None) -> str | None:
    """The model to start from, as a run that is resumed in another working directory finds it."""
    return source if source is None or source in BUNDLED else storage(source).absolute() or source


def _fine_tuned(config: TrainConfig, source: str) -> TrainConfig:
    """The config with the model of a checkpoint, whose context may be cut to the one that the user set.

    Raises:
        ConfigError: naming every field that the user set and that the checkpoint contradicts.
    """
    checkpoint = load_config(source)
    if checkpoint.tokenizer == NONE and config.is_set("tokenizer"):
        checkpoint = checkpoint.replace(tokenizer=config.model.tokenizer)
    wanted, stored = to_table(config.model), to_table(checkpoint)
    longer = config.model.context_length > checkpoint.context_length
    differing = [
        name
        for name in stored
        if config.is_set(name)
        and wanted[name] != stored[name]
        and name not in OWN_FIELDS
        and (longer or name != "context_length")
    ]
    if differing:
        raise ConfigError(
            f"init-from {source}: "
            + "; ".join(
                f"{name} is {short_repr(wanted[name])} in the config and {short_repr(stored[name])} in the checkpoint"
                for name in differing
            )
            + "; its context can be cut, not extended" * ("context_length" in differing)
            + ": leave out what the checkpoint decides, or start from another"
        )
    return config.fill(checkpoint, keep=OWN_FIELDS)


def _own(model: GPTConfig) -> dict[str, Any]:
    """The values of `OWN_FIELDS`."""
    return {name: getattr(model, name) for name in OWN_FIELDS}


def _mesh(config: TrainConfig) -> Mesh | None:
    """The config's mesh, checked; None for one device."""
    mesh = sharding.make_mesh(config.mesh)
    if mesh.size == 1:
        return None
    sharding.check(mesh, config.model, config.batch_size // config.grad_accumulation)
    return mesh


def _check_samples(config: TrainConfig) -> None:
    if config.sample_tokens:
        try:
            encode_prompt(config.model, config.sample_prompt)
        except ValueError as error:
            raise ConfigError(f"sample_prompt: {error}") from None


def first_line(
    config: TrainConfig, mesh: Mesh | None, train_data: Mixture, val_tokens: int, init_from: str | None, start: int
) -> str:
    """Says what is trained, on what, and where."""
    model, count = config.model, count_parameters(config.model).total
    preset = next((name for name in PRESETS if GPTConfig.preset(name, **_own(model)) == model), "a new model")
    what = f"training {preset}" if init_from is None else f"fine-tuning {init_from}"
    resuming = f"resuming at step {start:,} of {config.steps:,}, " if start else ""
    devices = f"{mesh.size} devices ({config.mesh})" if mesh is not None else f"1 device ({jax.default_backend()})"
    return (
        f"{resuming}{what}: {model.n_layers} layers of width {model.emb_dim:,}, context {model.context_length:,}, "
        f"{count:,} parameters{_trained(config)}, tokenizer {model.tokenizer}; {len(train_data):,} tokens to train on, "
        f"{val_tokens:,} to validate; {devices}, attention {attention_backend(config, mesh)}; {_per_step(config)} per "
        f"step, {config.steps:,} steps: {_epochs(config, train_data)}"
    )


def _per_step(config: TrainConfig) -> str:
    return f"{config.batch_size:,} records" if config.template else f"{config.batch_size * config.T:,} tokens"


def _epochs(config: TrainConfig, data: Mixture) -> str:
    """How often a run reads each source, and the shares of several."""
    told = []
    for name, ids_N, weight in zip(data.names, data.ids, data.weights, strict=True):
        share = weight / sum(data.weights)
        rows = config.steps * config.batch_size * share
        epochs = rows / ids_N.count if isinstance(ids_N, Records) else rows * config.T / len(ids_N)
        told.append(f"{epochs:.3g} epochs" + f" of {name} ({share:.3g} of the sequences)" * (len(data.ids) > 1))
    return ", ".join(told)


def _trained(config: TrainConfig) -> str:
    """How many of the parameters are trained, unless all are."""
    if not config.lora.rank and not config.freeze:
        return ""
    adapters = ", of LoRA adapters" * bool(config.lora.rank)
    return f" ({trainable.count(config):,} trained{adapters})"


def notes(config: TrainConfig, began: TrainConfig | None, corpus: Corpus) -> Iterator[str]:
    """What a user may not expect of this config, or of the one that a resumed run began with."""
    if began is not None and began.steps != config.steps:
        yield (
            f"steps: {began.steps:,} before, {config.steps:,} now; from here on, the learning rate follows the "
            "schedule of the latter"
        )
    if began is not None and began.compute.native_sequences and not config.compute.native_sequences:
        reason = sequences.missing(config.compute.dtype)
        yield f"the run began with native_sequences, and goes on without: {reason}. Its steps round differently now"
    if config.warmup != config.warmup_steps:
        yield (
            f"warmup_steps {config.warmup_steps:,} is too long for steps {config.steps:,}, and shortened to "
            f"{config.warmup:,}"
        )
    if config.separate_documents:
        yield from _kept_apart(separator_id(config.model), corpus)
    records = [tokens.ids_N for tokens in corpus.tokens if isinstance(tokens.ids_N, Records)]
    if records:
        yield (
            f"{sum(each.count for each in records):,} records by the template {config.template!r}, each a sequence of "
            f"its own: the loss counts on {sum(int(each.learned_N.sum()) for each in records):,} of "
            f"{sum(map(len, records)):,} tokens, the responses and the end-of-text after each"
        )
    for source in (*corpus.sources, *corpus.validation):
        if source.left_out:
            more = f" and {len(source.left_out) - 3:,} more" if len(source.left_out) > 3 else ""
            yield f"{source.name}: left out: {', '.join(source.left_out[:3])}{more}"
        if source.validation is not None:
            ignored = " is not used: --val-data was given" if corpus.validation else " is what the run validates on"
            yield f"{source.name}: its validation split ({len(source.validation.ids_N):,} tokens){ignored}"
        if any(shard.marked for tokens in (source.tokens, source.validation) if tokens for shard in tokens.shards):
            yield f"{source.name}: {MARKED}"


def _kept_apart(separator: int, corpus: Corpus) -> Iterator[str]:
    """What `separate_documents` does, and where it seems to have nothing to do."""
    yield (
        f"separate_documents: attention and positions restart at each end-of-text (id {separator}), so that documents "
        "are kept apart, in validation too"
    )
    for source in corpus.sources:
        first_N = np.asarray(source.tokens.ids_N[:_LOOKED_AT])
        if separator not in first_N:
            yield f"{source.name}: no end-of-text in its first {len(first_N):,} tokens, so nothing there is kept apart"


# Tokens of a source among which a separator is looked for: more than a document has, and read at once.
_LOOKED_AT = 2**20
