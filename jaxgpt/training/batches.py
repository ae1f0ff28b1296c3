"""Batches that are a pure function of (seed, step, row): there is no iterator to save or lose, and no array grows with
the corpus."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from jaxgpt.data import Ids, Mixture, Records, out_of_range
from jaxgpt.errors import DataError
from jaxgpt.training.config import TrainConfig

# Of this many rows in a row, each source of a mixture gets its share, rounded.
BLOCK = 4096


def count_sequences(n_tokens: int, seq_len: int, stride: int) -> int:
    """How many sliding sequences there are, as in the book: one starts at every `stride`-th token with `seq_len` + 1
    tokens left."""
    return len(range(0, n_tokens - seq_len, stride))


def batch(
    data: Mixture | Ids | Records, config: TrainConfig, step: int, rows: slice = slice(None)
) -> NDArray[np.int32]:
    """The sequences of one step: int32 [`batch_size`, T + 1]; inputs are [:, :-1], labels [:, 1:].

    Of records, each row is one, and an epoch has each once in an order of that epoch; an id that is read but not
    learned, or padding, is its complement, ~id, from which `loss.inputs_and_labels` makes both.

    A pure function of its arguments. A process that needs only some rows reads only those, and gets the same ones
    whichever process reads the others.

    Args:
        data: the training tokens.
        config: seed, batch size, length and choice of the sequences.
        step: counts optimizer steps from 0.
        rows: which sequences of the batch.

    Raises:
        DataError: for an id outside the model's vocabulary, with its place.
    """
    mixture = data if isinstance(data, Mixture) else Mixture.of(data)
    T, vocab_size = config.T, config.model.vocab_size
    index_B = np.arange(config.batch_size)[rows] + step * config.batch_size
    source_B, turn_B = _turns(mixture.weights, config.seed, index_B)
    start_B = np.zeros(len(index_B), np.int64)
    for i, ids_N in enumerate(mixture.ids):
        mine = source_B == i
        if isinstance(ids_N, Records):
            start_B[mine] = _each_once(ids_N.count, config.seed, i, turn_B[mine])
        elif config.sequences == "random":
            # Of the whole batch, so that a process that reads only some rows draws the same for them.
            generator = np.random.Generator(np.random.Philox(key=[config.seed, step]))
            start_B[mine] = generator.integers(0, len(ids_N) - T, config.batch_size)[rows][mine]
        else:
            stride = config.stride or T
            n = count_sequences(len(ids_N), T, stride)
            start_B[mine] = stride * _each_once(n, config.seed, i, turn_B[mine])
    ids_BxT1 = np.empty((len(index_B), T + 1), np.int32)
    read = list(zip(source_B.tolist(), start_B.tolist(), strict=True))
    for row_T1, (i, start) in zip(ids_BxT1, read, strict=True):
        ids_N = mixture.ids[i]
        if isinstance(ids_N, Records):
            row_T1[:] = ids_N.row(start, T + 1)  # of ids that were checked when they were read
            continue
        ids_T1 = np.asarray(ids_N[start : start + T + 1])
        if (error := out_of_range(ids_T1, vocab_size, mixture.names[i], start)) is not None:
            raise error
        row_T1[:] = ids_T1  # ids of 64 bits beyond the vocabulary would wrap into it
    return ids_BxT1


# Batches read before they are needed, unless a caller says how many, and the threads that do it. A read waits for the
# disk more than it computes.
AHEAD = 2
_THREADS = 4


class ReadAhead:
    """Batches of consecutive steps, of which the next ones are read by threads while the device works on the last.

    Args:
        read: returns the rows of a step.
        steps: the run's; none is read beyond.
        ahead: batches read before they are needed.
    """

    def __init__(self, read: Callable[[int, slice], NDArray[np.int32]], steps: int, ahead: int = AHEAD):
        self._read, self._steps, self._ahead = read, steps, ahead
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "read-ahead")
        self._waiting: dict[tuple[int, int | None, int | None], concurrent.futures.Future] = {}

    def __call__(self, step: int, rows: slice = slice(None)) -> NDArray[np.int32]:
        """Returns the rows of a step, and has those of the next steps read."""
        for ahead in range(step, min(step + 1 + self._ahead, self._steps)):
            if (wanted := (ahead, rows.start, rows.stop)) not in self._waiting:
                self._waiting[wanted] = self._pool.submit(self._read, ahead, rows)
        return self._waiting.pop((step, rows.start, rows.stop)).result()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)


def _turns(
    weights: tuple[float, ...], seed: int, index_B: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(source, turn) of each row of the run: the how-many-th row of its source it is.

    In every `BLOCK` rows each source has its share, in an order that differs from block to block.
    """
    if len(weights) == 1:
        return np.zeros_like(index_B), index_B
    block_B, place_B = np.divmod(index_B, BLOCK)
    source_B, turn_B = np.empty_like(index_B), np.empty_like(index_B)
    for block in np.unique(block_B).tolist():
        mine, (source, turn) = block_B == block, _block(weights, seed, block)
        source_B[mine], turn_B[mine] = source[place_B[mine]], turn[place_B[mine]]
    return source_B, turn_B


@functools.lru_cache(maxsize=4)  # consecutive steps are in one block
def _block(weights: tuple[float, ...], seed: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(source, turn) of each row of a block."""
    share = shares(weights)
    # Four numbers, and not two: to `_keys`, missing ones are zeros, and (seed, block, 0) orders an epoch of a source.
    key = (seed, block, 0, 1)
    source = np.repeat(np.arange(len(share)), share)[permute(np.arange(BLOCK), BLOCK, key)]
    turn = np.empty_like(source)
    for i, count in enumerate(share.tolist()):
        turn[source == i] = block * count + np.arange(count)
    return source, turn


@functools.lru_cache
def shares(weights: tuple[float, ...]) -> NDArray[np.int64]:
    """How many of `BLOCK` rows each source gets, by largest remainder."""
    exact = np.array(weights) / sum(weights) * BLOCK
    share = np.floor(exact).astype(np.int64)
    share[np.argsort(share - exact, kind="stable")[: BLOCK - share.sum()]] += 1
    return share


def _each_once(n: int, seed: int, source: int, turn_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of a source's n sequences are those of its turns: each once per epoch, in an order of that epoch."""
    epoch_B, chosen_B = turn_B // n, np.empty_like(turn_B)
    for epoch in np.unique(epoch_B).tolist():
        mine = epoch_B == epoch
        chosen_B[mine] = permute(turn_B[mine] % n, n, (seed, source, epoch))
    return chosen_B


def permute(index_N: NDArray[np.int64], n: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of range(n) takes each index: computed, not looked up.

    A Feistel network permutes the numbers of as many bits as n has; what it takes beyond n, it takes on until that is
    below n again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    bits = max(2, (n - 1).bit_length())
    low = np.uint64(bits // 2)
    keys = _keys(key, 2 * _ROUNDS)
    masks = np.uint64(2 ** (bits // 2) - 1), np.uint64(2 ** (bits - bits // 2) - 1)
    result = index_N.astype(np.uint64)
    todo = np.arange(len(result))
    while todo.size:
        left, right = result[todo] >> low, result[todo] & masks[0]
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            left ^= _mix(right + first) & masks[1]
            right ^= _mix(left + second) & masks[0]
        result[todo] = left << low | right
        todo = todo[result[todo] >= n]
    return result.astype(np.int64)


# Each of two halves; with fewer, small permutations are visibly uneven.
_ROUNDS = 8


@functools.lru_cache(maxsize=64)  # a step has few keys, and so have the next ones
def _keys(key: tuple[int, ...], count: int) -> NDArray[np.uint64]:
    return np.random.SeedSequence(key).generate_state(count, np.uint64).astype(np.uint64)


def _mix(x_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit of x."""
    x_N = (x_N ^ x_N >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ x_N >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x_N ^ x_N >> np.uint64(31)


def check_enough(data: Mixture | Ids | Records, config: TrainConfig, split: str) -> None:
    """Raises DataError if a source of the split cannot fill one sequence or has too small a share of them, if a record
    does not fit into one, or if the sliding ones, or the records, of all of them do not fill one batch."""
    mixture = data if isinstance(data, Mixture) else Mixture.of(data)
    total = 0
    for name, ids_N in zip(mixture.names, mixture.ids, strict=True):
        of = f" of {name}" if len(mixture.ids) > 1 else ""
        if isinstance(ids_N, Records):
            if not ids_N.count:
                raise DataError(f"the {split} split{of} has no records")
            if ids_N.longest > config.T + 1:
                raise DataError(f"the {split} split{of} has a record of {ids_N.longest:,} tokens, above {config.T} + 1")
            total += ids_N.count
            continue
        if len(ids_N) <= config.T:
            raise DataError(
                f"the {split} split{of} has {len(ids_N)} tokens; sequences of {config.T} need one more than that"
            )
        total += count_sequences(len(ids_N), config.T, config.stride or config.T)
    if split == "training":
        if (share := shares(mixture.weights)).min() < 1:
            raise DataError(
                f"{mixture.names[int(share.argmin())]} would get less than one of {BLOCK:,} sequences: leave it out, "
                "or give the sources weights that are closer to one another"
            )
        kind = "record" if config.template else "sliding sequence" if config.sequences == "sliding" else ""
        if kind and total < config.batch_size:
            raise DataError(
                f"the {split} split has {total} {kind}{'' if total == 1 else 's'}, too few for "
                f"batch_size={config.batch_size}: give it more, or a smaller batch"
            )
