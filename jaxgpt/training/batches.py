"""Batches that are a pure function of (seed, step, shard): there is no iterator to save or lose."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from jaxgpt.data import Ids
from jaxgpt.errors import DataError
from jaxgpt.training.config import TrainConfig


def sequence_starts(n_tokens: int, seq_len: int, stride: int) -> NDArray[np.int64]:
    """Where sliding sequences start, as in the book: every `stride`-th token with `seq_len` + 1 tokens left."""
    return np.arange(0, n_tokens - seq_len, stride, dtype=np.int64)


def batch(ids_N: Ids, config: TrainConfig, step: int, rows: slice = slice(None)) -> NDArray[np.int32]:
    """The sequences of one step: int32 [`batch_size`, T + 1]; inputs are [:, :-1], labels [:, 1:].

    A pure function of its arguments. A process that needs only some rows reads only those, and gets the same ones
    whichever process reads the others.

    Args:
        ids_N: the training tokens.
        config: seed, batch size, length and choice of the sequences.
        step: counts optimizer steps from 0.
        rows: which sequences of the batch.
    """
    starts = _starts(len(ids_N), config, step)[rows]
    return ids_N[starts[:, None] + np.arange(config.T + 1)].astype(np.int32)


def _starts(n_tokens: int, config: TrainConfig, step: int) -> NDArray[np.int64]:
    if config.sequences == "random":
        generator = np.random.Generator(np.random.Philox(key=[config.seed, step]))
        return generator.integers(0, n_tokens - config.T, config.batch_size)
    starts = sequence_starts(n_tokens, config.T, config.stride or config.T)
    # Sequences that do not fill a batch are left out, as with the book's drop_last.
    epoch, index = divmod(step, len(starts) // config.batch_size)
    return starts[_order(len(starts), config.seed, epoch)[index * config.batch_size :][: config.batch_size]]


@functools.lru_cache(maxsize=2)  # an epoch has many steps
def _order(n_sequences: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_sequences)


def check_enough(n_tokens: int, config: TrainConfig, split: str) -> None:
    """Raises DataError if the split cannot fill one batch (training) or one sequence (validation)."""
    if n_tokens <= config.T:
        raise DataError(f"the {split} split has {n_tokens} tokens; sequences of {config.T} need one more than that")
    if split == "training" and config.sequences == "sliding":
        sequences = len(sequence_starts(n_tokens, config.T, config.stride or config.T))
        if sequences < config.batch_size:
            raise DataError(
                f"the {split} split has {sequences} sliding sequences, too few for batch_size={config.batch_size}"
            )
