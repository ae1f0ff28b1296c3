"""Controls: samplers that change the model's own logits, most of them by the text so far.

    RepetitionPenalty(1.2) | Greedy()
    NoRepeatNgram(3) | LogitBias({50256: -5.0}) | Temperature(0.8) | TopP(0.95)

Sizes: B batch, S columns of the history, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.checks import check_ids, short_repr
from jaxgpt.generation.history import History
from jaxgpt.generation.sampling import REMOVED, Control, assign, integer, number


@dataclasses.dataclass(frozen=True, repr=False)
class RepetitionPenalty(Control):
    """Divides the positive logits of the ids in the text by `penalty`, and multiplies the negative ones by it: above 1
    discourages repetition. The text includes the prompt, as in transformers.

    Source: Keskar et al. 2019 (CTRL), section 4.1, as corrected in transformers for negative logits.

    Raises:
        ValueError: if `penalty` is not above 0, or not finite.
    """

    penalty: float

    def __post_init__(self):
        assign(self, penalty=number("repetition_penalty", self.penalty, "above 0", lambda penalty: penalty > 0))

    def control(self, logits_BxV: Array, history: History) -> Array:
        seen_BxV = history.counts_BxV(history.text_BxS(), logits_BxV.shape[1]) > 0
        penalised_BxV = jnp.where(logits_BxV < 0, logits_BxV * self.penalty, logits_BxV / self.penalty)
        return jnp.where(seen_BxV, penalised_BxV, logits_BxV)


@dataclasses.dataclass(frozen=True, repr=False)
class PresencePenalty(Control):
    """Subtracts `penalty` from the logits of the ids drawn so far, without those of the prompt.

    Source: OpenAI's API reference, `presence_penalty`.

    Raises:
        ValueError: if `penalty` is outside [-2, 2].
    """

    penalty: float

    def __post_init__(self):
        assign(self, penalty=number("presence_penalty", self.penalty, "from -2 to 2", lambda value: -2 <= value <= 2))

    def control(self, logits_BxV: Array, history: History) -> Array:
        counts_BxV = history.counts_BxV(history.new_BxS(), logits_BxV.shape[1])
        return logits_BxV - self.penalty * (counts_BxV > 0).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, repr=False)
class FrequencyPenalty(Control):
    """Subtracts `penalty` from an id's logit for each time it was drawn so far; the prompt does not count.

    Source: OpenAI's API reference, `frequency_penalty`.

    Raises:
        ValueError: if `penalty` is outside [-2, 2].
    """

    penalty: float

    def __post_init__(self):
        assign(self, penalty=number("frequency_penalty", self.penalty, "from -2 to 2", lambda value: -2 <= value <= 2))

    def control(self, logits_BxV: Array, history: History) -> Array:
        counts_BxV = history.counts_BxV(history.new_BxS(), logits_BxV.shape[1])
        return logits_BxV - self.penalty * counts_BxV.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, repr=False)
class NoRepeatNgram(Control):
    """Removes the ids that would complete a sequence of `n` ids that the text has already. The text includes the
    prompt, as in transformers. If all ids are removed, all are equally likely.

    Source: Paulus et al. 2017, section 2.5.

    Raises:
        ValueError: if `n` is not an integer of 1 or more.
    """

    n: int

    def __post_init__(self):
        assign(self, n=integer("no_repeat_ngram_size", self.n, 1))

    def control(self, logits_BxV: Array, history: History) -> Array:
        ids_BxS, S = history.ids_BxS, history.ids_BxS.shape[1]
        # Columns that end a sequence of n ids, of which so far 0 are known to be the text's last n - 1.
        ends_BxS = history.text_BxS() & (jnp.arange(S)[None] - history.start_B[:, None] >= self.n - 1)

        def match(j: Array, ends_BxS: Array) -> Array:
            last_Bx1 = lax.dynamic_slice_in_dim(ids_BxS, history.length - j, 1, axis=1)
            return ends_BxS & (jnp.roll(ids_BxS, j, axis=1) == last_Bx1)

        ends_BxS = lax.fori_loop(1, jnp.minimum(self.n, S + 1), match, ends_BxS)
        return _remove(logits_BxV, history.counts_BxV(ends_BxS, logits_BxV.shape[1]) > 0)


@dataclasses.dataclass(frozen=True, repr=False)
class BadWords(Control):
    """Removes the last id of each of the `words`, sequences of ids, where the text ends with the ids before it. The
    text includes the prompt, as in transformers.

    The number of words and their lengths are part of the sampler's structure.

    Raises:
        ValueError: if there are no words, one is empty, or one holds anything but ids.
    """

    words: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        words = self.words
        if isinstance(words, (str, bytes)) or not isinstance(words, Iterable):
            raise ValueError(f"bad_words_ids must be a list of lists of ids, not {short_repr(words)}")
        words = tuple(words)
        for w, word in enumerate(words):
            if isinstance(word, (str, bytes)) or not hasattr(word, "__len__"):
                raise ValueError(f"bad_words_ids[{w}] must be a list of ids, not {short_repr(word)}")
            if not len(word):
                raise ValueError(f"bad_words_ids[{w}] is empty")
        if not words:
            raise ValueError("bad_words_ids holds no word: leave it out instead")
        rows = [check_ids(word, f"bad_words_ids[{w}]", 2**31) for w, word in enumerate(words)]
        assign(self, words=tuple(tuple(row.tolist()) for row in rows))

    def check(self, vocab_size: int) -> None:
        for w, word in enumerate(self.words):
            check_ids(list(word), f"bad_words_ids[{w}]", vocab_size)

    def control(self, logits_BxV: Array, history: History) -> Array:
        B, S = history.ids_BxS.shape
        complete_BxW, last_W = [], []
        for *before, last in self.words:
            if len(before) > S:
                continue
            end_BxN = lax.dynamic_slice_in_dim(history.ids_BxS, history.length - len(before), len(before), axis=1)
            same_B = jnp.all(end_BxN == jnp.array(before, jnp.int32)[None], axis=1)
            complete_BxW.append(same_B & (history.length - history.start_B >= len(before)))
            last_W.append(last)
        if not last_W:
            return logits_BxV
        counts_BxV = jnp.zeros(logits_BxV.shape, jnp.int32)
        rows_Bx1, last_1xW = jnp.arange(B)[:, None], jnp.array(last_W, jnp.int32)[None]
        counts_BxV = counts_BxV.at[rows_Bx1, last_1xW].add(jnp.stack(complete_BxW, axis=1).astype(jnp.int32))
        return _remove(logits_BxV, counts_BxV > 0)


@dataclasses.dataclass(frozen=True, repr=False)
class LogitBias(Control):
    """Adds to the logits of single ids: a mapping from id to bias. A bias of -100 removes an id in effect.

    The number of ids is part of the sampler's structure.

    Source: OpenAI's API reference, `logit_bias`.

    Raises:
        ValueError: if it is no mapping from ids to finite numbers.
    """

    biases: Any  # given as a mapping, kept as pairs in order of their ids, which are hashable

    def __post_init__(self):
        if not isinstance(self.biases, Mapping):
            raise ValueError(f"logit_bias must be a dict from ids to numbers, not {short_repr(self.biases)}")
        ids = check_ids(list(self.biases), "logit_bias", 2**31).tolist()
        biases = [number(f"logit_bias[{i}]", bias, "a finite number", lambda _: True) for i, bias in self._items()]
        assign(self, biases=tuple(sorted(zip(ids, biases, strict=True))))

    def _items(self) -> Iterable[tuple[int, Any]]:
        return self.biases.items() if isinstance(self.biases, Mapping) else self.biases

    def __repr__(self) -> str:
        return f"LogitBias({dict(self.biases)})"

    @property
    def sees_text(self) -> bool:
        return False

    def check(self, vocab_size: int) -> None:
        for i, _ in self.biases:
            if i >= vocab_size:
                raise ValueError(f"logit_bias has the id {i}, outside the vocabulary: 0 to {vocab_size - 1}")

    def control(self, logits_BxV: Array, history: History | None = None) -> Array:
        ids_N = jnp.array([i for i, _ in self.biases], jnp.int32)
        bias_N = jnp.array([bias for _, bias in self.biases], jnp.float32)
        return logits_BxV.at[..., ids_N].add(bias_N)


@dataclasses.dataclass(frozen=True, repr=False)
class MinNewTokens(Control):
    """Removes the stop ids until a row has `n` new ids.

    Raises:
        ValueError: if `n` is not an integer of 0 or more.
    """

    n: int

    def __post_init__(self):
        assign(self, n=integer("min_new_tokens", self.n, 0))

    def control(self, logits_BxV: Array, history: History) -> Array:
        if history.stop_ids is None or not history.stop_ids.shape[0]:
            return logits_BxV
        V = logits_BxV.shape[1]
        # A negative index would count from the end; one past it is dropped.
        places = jnp.where(history.stop_ids < 0, V, history.stop_ids)
        stops_V = jnp.zeros(V, bool).at[places].set(True, mode="drop")
        return _remove(logits_BxV, stops_V[None] & (history.drawn < self.n))


def _remove(logits_BxV: Array, removed_BxV: Array) -> Array:
    return jnp.where(removed_BxV, REMOVED, logits_BxV)
