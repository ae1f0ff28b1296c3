"""The options that people type, by the same names in Python and on the command line, and the sampler that they mean."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

from jaxgpt.generation.controls import (
    BadWords,
    FrequencyPenalty,
    LogitBias,
    MinNewTokens,
    NoRepeatNgram,
    PresencePenalty,
    RepetitionPenalty,
)
from jaxgpt.generation.sampling import Greedy, MinP, Sampler, Temperature, TopK, TopP, simplest

# In the order of application, which is that of transformers.
CONTROLS: dict[str, Any] = {
    "logit_bias": LogitBias,
    "repetition_penalty": RepetitionPenalty,
    "presence_penalty": PresencePenalty,
    "frequency_penalty": FrequencyPenalty,
    "no_repeat_ngram_size": NoRepeatNgram,
    "bad_words_ids": BadWords,
    "min_new_tokens": MinNewTokens,
}
FILTERS: dict[str, Any] = {"temperature": Temperature, "top_k": TopK, "top_p": TopP, "min_p": MinP}
SAMPLING = (*FILTERS, *CONTROLS)


def from_options(**options: Any) -> Sampler:
    """The sampler that these options mean. Each has the name, meaning and place that it has in transformers; what is
    not there (`presence_penalty`, `frequency_penalty`, `logit_bias`) is as in OpenAI's API.

    Args:
        options: `temperature`, `top_k`, `top_p`, `min_p`, of which any one draws at random, at temperature 1.0 by
            default; with none of them, or with temperature 0, the likeliest id is taken. And `logit_bias`,
            `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `no_repeat_ngram_size`, `bad_words_ids`,
            `min_new_tokens`, the arguments of the samplers in `controls.py`. None switches an option off, and so does
            a `top_k` of 0.

    Raises:
        TypeError: for another option.
        ValueError: naming the option that is out of range.
    """
    for name in options:
        if name not in SAMPLING:
            raise TypeError(f"no sampler has the option {name!r}; there are {', '.join(SAMPLING)}")
    given = {name: value for name, value in options.items() if not _is_off(name, value)}
    if any(name in FILTERS for name in given):
        given.setdefault("temperature", 1.0)
    parts = [kind(given[name]) for name, kind in {**CONTROLS, **FILTERS}.items() if name in given]
    if "temperature" not in given:
        parts.append(Greedy())
    return simplest(functools.reduce(operator.or_, parts))


def chosen_sampler(sampler: Any, options: Mapping[str, Any]) -> Any:
    """`sampler`, or what these options mean; a TypeError if both are given."""
    options = {name: value for name, value in options.items() if value is not None}
    if not options:
        return sampler
    if sampler is not None:
        raise TypeError(
            f"{next(iter(options))} and sampler={sampler!r} exclude each other: write the one as a part of the other"
        )
    return from_options(**options)


def _is_off(name: str, value: Any) -> bool:
    return value is None or (name == "top_k" and not isinstance(value, bool) and value == 0)
