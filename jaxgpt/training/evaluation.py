"""The loss of a model over a whole text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxgpt import notebook
from jaxgpt.checks import as_ids
from jaxgpt.data import FileIds, Ids, Joined, Records
from jaxgpt.errors import DataError
from jaxgpt.model import GPT, check_model
from jaxgpt.parallel import check_memory, to_device
from jaxgpt.tokenizer import get_tokenizer
from jaxgpt.training.loss import IGNORE, bits_per_byte, inputs_and_labels, model_loss, perplexity
from jaxgpt.training.packing import separator_id


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        loss: mean of -log p(token | tokens before it in its sequence), in nats per token.
        perplexity: exp(loss).
        bits_per_byte: the loss in bits per UTF-8 byte of the text; None if its bytes are unknown, because it has
            ids that are not the tokenizer's, or the tokenizer is one that Hugging Face's library runs; and of records.
        tokens: how many tokens were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int


def evaluate(
    model: GPT,
    params: Any,
    ids_N: Ids | Records,
    *,
    seq_len: int = 0,
    stride: int = 0,
    batch_size: int = 8,
    max_sequences: int = 0,
    separate_documents: bool = False,
) -> Evaluation:
    """Evaluates sequences that start every `stride` tokens; each token except the first is predicted once. Of records,
    each is a sequence, and the loss is that of all their responses, and the end-of-text after each.

    Args:
        model: the model.
        params: its parameters.
        ids_N: the text's ids, or records.
        seq_len: tokens per sequence; 0 means the context length.
        stride: tokens from the start of one sequence to the next; 0 means `seq_len`, so that they do not overlap. A
            smaller one gives each token more context before it (at least seq_len - stride) and costs more. Records have
            none.
        batch_size: sequences per call.
        max_sequences: evaluate only this many sequences, spread evenly over the text, so that each source of a
            validation split has its share; 0 means all.
        separate_documents: keep the documents in a sequence apart, as the trainer does with the setting of that name.

    Raises:
        ConfigError: for `separate_documents` without an end-of-text token.
        DataError: if there are fewer than two tokens, or no records, or one is longer than a sequence.
        TypeError: for ids that are not one row of integers.
        ValueError: for sizes out of range, and for an id outside the vocabulary, with its place.
        OutOfMemoryError: if a batch needs more memory than there is.
    """
    check_model("evaluate(model, params, ids)", model, params)
    ids_N = ids_N if isinstance(ids_N, (FileIds, Joined, Records)) else as_ids(ids_N, "ids_N")
    T = seq_len or model.config.context_length
    if not 1 <= T <= model.config.context_length:
        raise ValueError(f"seq_len must be from 1 to context_length={model.config.context_length}, not {T}")
    if not 1 <= (stride or T) <= T:
        raise ValueError(f"stride must be from 1 to the sequence's {T} tokens, not {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    if len(ids_N) < 2:
        raise DataError(f"{len(ids_N)} tokens are too few to evaluate: at least 2 are needed")
    sequences, read = _sequences(ids_N, T, stride, model.config.vocab_size, separate_documents)
    chosen = min(sequences, max_sequences or sequences)
    tokenizer = get_tokenizer(model.config.tokenizer)
    separator = separator_id(model.config) if separate_documents else None
    total, count = 0.0, 0.0
    # Of the predicted tokens' text, in bytes. Of records, end-of-text would be a large part.
    size: int | None = None if isinstance(ids_N, Records) else 0
    batch_size, program = min(batch_size, chosen), None
    with notebook.bar("sequences") as show:
        for i in range(0, chosen, batch_size):
            batch = []
            for number in range(i, min(i + batch_size, chosen)):
                inputs_T, labels_T = read(number * sequences // chosen)
                batch.append((inputs_T, labels_T))
                if size is not None:
                    more = tokenizer.count_bytes(labels_T[labels_T != IGNORE])
                    size = None if more is None else size + more
            batch += [(np.zeros(T, np.int32), np.full(T, IGNORE, np.int32))] * (batch_size - len(batch))
            inputs_BxT, labels_BxT = to_device(tuple(np.stack(side) for side in zip(*batch, strict=True)), params)
            if program is None:  # all batches have one shape
                program = _losses.lower(model, separator, params, inputs_BxT, labels_BxT).compile()
                check_memory(program, "lower batch_size, or choose a param_dtype of fewer bytes")
            losses, counted = jax.device_get(program(params, inputs_BxT, labels_BxT))
            total, count = total + float(losses), count + float(counted)
            show(min(i + batch_size, chosen), chosen)
    loss = total / count
    return Evaluation(loss, perplexity(loss), None if size is None else bits_per_byte(total, size), int(count))


def _sequences(
    ids_N: Ids | Records, T: int, stride: int, vocab_size: int, separate_documents: bool
) -> tuple[int, Callable[[int], tuple[np.ndarray, np.ndarray]]]:
    """How many sequences there are, and a function that gives inputs and labels [T] of one."""
    if isinstance(ids_N, Records):
        if stride or separate_documents:
            option = "stride" if stride else "separate_documents"
            raise ValueError(f"{option} is for a text: each record is a sequence of its own")
        if (longest := ids_N.longest) > T + 1:
            raise DataError(f"a record has {longest:,} tokens, which do not fit into sequences of {T:,} and a last one")

        def record(number: int) -> tuple[np.ndarray, np.ndarray]:
            inputs_BxT, labels_BxT = inputs_and_labels(ids_N.row(number, T + 1)[None], records=True)
            return inputs_BxT[0], labels_BxT[0]

        return ids_N.count, record
    stride = stride or T

    def sequence(number: int) -> tuple[np.ndarray, np.ndarray]:
        start = number * stride
        first = start + 1 + (T - stride if start else 0)  # of the tokens that no earlier sequence predicts
        return _sequence(ids_N, start, first, T, vocab_size)

    return 1 + max(0, -(-(len(ids_N) - 1 - T) // stride)), sequence  # the last one reaches the end


def _sequence(ids_N: Ids, start: int, first: int, T: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels [T] of the sequence at `start`; labels before token `first` and past the end do not count."""
    ids = np.asarray(ids_N[start : start + T + 1])
    if (outside := np.flatnonzero((ids < 0) | (ids >= vocab_size))).size:
        where = start + int(outside[0])
        raise ValueError(f"ids_N[{where}] is {ids[outside[0]]}, outside the vocabulary: 0 to {vocab_size - 1}")
    inputs, labels = np.zeros(T, np.int32), np.full(T, IGNORE, np.int32)
    inputs[: len(ids) - 1] = ids[:-1]
    labels[: len(ids) - 1] = ids[1:]
    labels[: max(0, first - start - 1)] = IGNORE
    return inputs, labels


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(
    model: GPT, separator: int | None, params: Any, inputs_BxT: jax.Array, labels_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Logits of about 2^24 elements at a time, whatever the vocabulary.
    chunk = max(1, 2**24 // model.config.vocab_size)
    return model_loss(model, params, inputs_BxT, labels_BxT, chunk=chunk, separator=separator)
