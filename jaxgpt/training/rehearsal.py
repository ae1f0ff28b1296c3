"""`dry_run`: everything that comes before a run's first step, and nothing written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxgpt.accounting import format_bytes
from jaxgpt.data import Records
from jaxgpt.parallel import capacity, check_memory
from jaxgpt.parallel.sharding import default_device
from jaxgpt.tokenizer import NONE, get_tokenizer
from jaxgpt.training import loop, preparation
from jaxgpt.training.batches import batch
from jaxgpt.training.config import TrainConfig
from jaxgpt.training.step import abstract_state, compiled_step

# Of the first batch: rows, and characters of each.
_ROWS, _CHARACTERS = 2, 1000


def dry_run(
    config: TrainConfig,
    data: Any,
    *,
    val_data: Any = None,
    tokenizer: str | Path | None = None,
    text_key: str | None = None,
    allow_special: bool = False,
    skip_bad: bool = False,
    init_from: str | None = None,
) -> Iterator[str]:
    """Prepares a run as `train` does, with the same arguments, up to the compiled step, and yields what it would be, a
    paragraph at a time: its config, its size, its tokens, the first batch as text, and the memory that a step needs.

    Neither parameters nor a directory are made, and the weights of `init_from` are not read.

    Raises:
        ConfigError, DataError, CheckpointError: for what `train` would refuse before its first step.
        OutOfMemoryError: at the end, if a step needs more memory than there is.
    """
    init_from = preparation.starting_point(config, init_from)
    config, mesh, corpus, train_data, val_N = preparation.prepare(
        config,
        data,
        init_from,
        validation=val_data,
        tokenizer=tokenizer,
        text_key=text_key,
        allow_special=allow_special,
        skip_bad=skip_bad,
    )
    yield _toml(dataclasses.replace(config, init_from=init_from or ""))
    config = preparation.with_native_sequences(config, mesh, None)
    yield preparation.first_line(config, mesh, train_data, len(val_N), init_from, 0)
    yield from preparation.notes(config, None, corpus)
    what, per_step, size = "tokens", config.batch_size * config.T, len(train_data)
    if config.template:
        records = [ids for ids in train_data.ids if isinstance(ids, Records)]
        what, per_step, size = "records", config.batch_size, sum(each.count for each in records)
    yield (
        f"{what}: {per_step:,} per step, {config.steps * per_step:,} in {config.steps:,} steps, which is "
        f"{config.steps * per_step / size:.3g} times the training data"
    )
    yield _first_batch(config, train_data)
    state = abstract_state(config, mesh)
    sizes = {name: sum(_bytes(leaf) for leaf in jax.tree.leaves(state.get(name, ()))) for name in _PARTS}
    parts = ", ".join(f"{_PARTS[name]} {format_bytes(size)}" for name, size in sizes.items() if size)
    began = time.perf_counter()
    step = compiled_step(config, mesh, state)
    seconds, size = time.perf_counter() - began, step.memory_analysis()
    per_device = "" if mesh is None else " per device"
    needed = "" if size is None else f"; a step adds {format_bytes(size.temp_size_in_bytes)}"
    yield (
        f"memory{per_device}: {parts}{needed}; there are {format_bytes(capacity(default_device()))}. The step took "
        f"{seconds:.0f} s to compile"
    )
    check_memory(step, loop.LESS_MEMORY)
    yield "nothing was written: without --dry-run, the run starts"


# What takes memory in a state, in words.
_PARTS = {
    "params": "trained parameters",
    "frozen": "frozen parameters",
    "ema_params": "their average",
    "opt_state": "optimizer state",
}


def _bytes(leaf: Any) -> int:
    """Bytes of an array on one device."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _toml(config: TrainConfig) -> str:
    """The config as the text of a config file."""
    lines = []
    for name, table in config.to_dict().items():
        # TOML writes such values as JSON does.
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items())]
        lines.append("")
    return "\n".join(lines)


def _first_batch(config: TrainConfig, train_data: Any) -> str:
    """The first rows of the first batch, as text where there is a tokenizer."""
    rows = []
    for ids_T1 in batch(train_data, config, 0, slice(0, min(_ROWS, config.batch_size))):
        known = config.model.tokenizer != NONE
        text = repr(_text(ids_T1, config)) if known else str(ids_T1.tolist())
        rows.append(f"  {text}" if len(text) <= _CHARACTERS else f"  {text[:_CHARACTERS]}...")
    learned = ", ⟦what is learned⟧" if config.template else ""
    return "\n".join([f"the first batch begins ({len(rows)} of {config.batch_size} rows{learned}):", *rows])


def _text(ids_T1: NDArray[np.int32], config: TrainConfig) -> str:
    """A row of a batch as text. Of a record, what is learned is in brackets, and padding is left out."""
    tokenizer = get_tokenizer(config.model.tokenizer)
    if not config.template:
        return tokenizer.decode(ids_T1, placeholders=True)
    learned_T1 = ids_T1 >= 0
    text = ""
    for learned, part in itertools.groupby(range(1 + int(learned_T1.nonzero()[0][-1])), lambda i: learned_T1[i]):
        ids = ids_T1[list(part)]
        text += f"⟦{tokenizer.decode(ids)}⟧" if learned else tokenizer.decode(~ids)
    return text
