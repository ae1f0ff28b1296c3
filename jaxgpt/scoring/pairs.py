"""Texts as pairs of a context and a continuation to score, as lm-evaluation-harness and Hugging Face's guide make them.
(`score` and the benchmarks have contexts of any length; what exceeds the model's is cropped there.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

Pair = tuple[Sequence[int], Sequence[int]]


def encode_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> Pair:
    """The ids of both. Spaces at the end of the context are the continuation's, and a token that begins in the context
    is part of it, as in lm-evaluation-harness."""
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    ids = encode(context)
    return ids, encode(context + continuation)[len(ids) :]


def rolling_windows(ids: Sequence[int], start: int, context_length: int) -> Iterator[Pair]:
    """A whole text in windows that do not overlap, except that the last one has as much context as the model allows.

    Each id is predicted once: the first from `start`, the first of every later window from the id before it. So does
    lm-evaluation-harness (`loglikelihood_rolling`).
    """
    predicted = min(context_length, len(ids))
    if predicted:
        yield [start], ids[:predicted]
    while predicted < len(ids):
        end = min(predicted + context_length, len(ids))
        yield ids[end - context_length - 1 : predicted], ids[predicted:end]
        predicted = end


def sliding_windows(ids: Sequence[int], stride: int, context_length: int) -> Iterator[Pair]:
    """A whole text in windows of `context_length` ids that start every `stride` ids.

    A window predicts the ids that the one before it does not hold, each from at least context_length - stride ids;
    with a stride of context_length, all except its first id, which is then never predicted. So does Hugging Face's
    guide to the perplexity of models of fixed length, as of the very first id.
    """
    held = 0
    for start in range(0, len(ids), stride):
        end = min(start + context_length, len(ids))
        first = max(held, start + 1)
        if first < end:
            yield ids[start:first], ids[first:end]
        held = end
        if end == len(ids):
            return
