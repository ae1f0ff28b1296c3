"""Checks of the generator's arguments, on the host before any compute: on device a bad id raises no error but gives
NaN or another row's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxgpt.checks import check_ids, did_you_mean, short_repr, whole_number
from jaxgpt.generation.keys import as_key
from jaxgpt.generation.options import SAMPLING
from jaxgpt.generation.sampling import Greedy, Sampler, simplest


def check_prompts(prompts: Any, vocab_size: int) -> list[np.ndarray]:
    """The prompts as int32 arrays, one per row.

    Raises:
        ValueError: naming the first id that is not an integer from 0 to `vocab_size` - 1, or the empty prompt.
    """
    if hasattr(prompts, "ndim"):
        prompts = np.asarray(prompts)
        if prompts.ndim != 2:
            raise ValueError(f"an array of prompts must have the shape [B, T], not {list(prompts.shape)}")
    elif isinstance(prompts, str):
        raise ValueError("prompts must be token ids, not text: jaxgpt.generate_text takes text")
    elif not isinstance(prompts, Sequence):
        raise ValueError(
            f"prompts must be an integer array [B, T] or a list of lists of ids, not {short_repr(prompts)}"
        )
    if not len(prompts):
        raise ValueError("no prompts: expected at least one")
    rows = []
    for r, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not hasattr(prompt, "__len__") or np.ndim(prompt) == 0:
            raise ValueError(
                f"prompts[{r}] is {short_repr(prompt)}, not a list of ids (a single prompt is a list of one list)"
            )
        if not len(prompt):
            raise ValueError(f"prompts[{r}] is empty: a model must read something, such as end-of-text")
        rows.append(check_ids(prompt, f"prompts[{r}]", vocab_size))
    return rows


def check_sampler(sampler: Any, vocab_size: int) -> Sampler:
    """Returns the sampler without what does not matter, by default `Greedy()`.

    Raises:
        TypeError: for what is no sampler.
        ValueError: if it names an id outside the vocabulary.
    """
    if sampler is None:
        return Greedy()
    if isinstance(sampler, Sampler):
        sampler.check(vocab_size)
        return simplest(sampler)
    found = f"the class {sampler.__name__} itself" if isinstance(sampler, type) else short_repr(sampler)
    raise TypeError(f"sampler must be a sampler, such as Greedy() or Temperature(0.8) | TopK(50), not {found}")


# Options that other libraries' generators have, with ours.
_OTHERS = {
    "do_sample": "temperature=1.0 to draw at random, or nothing to take the likeliest",
    "stop": "generate_text or stream, which know the text, or stop_ids=[...]",
    "stop_strings": "stop=[...], in generate_text or stream",
    "bad_words": "bad_words_ids=[[...], ...]",
    "suppress_tokens": "bad_words_ids=[[id], ...]",
    "min_length": "min_new_tokens, which does not count the prompt",
    "output_scores": "logprobs=k",
    "top_logprobs": "logprobs=k",
    "min_tokens": "min_new_tokens",
    "rng": "key=rng",
    "prng_key": "key=prng_key",
    "rngs": "key=...",
    "num_beams": "jaxgpt.beam_search(..., num_beams=...)",
    "length_penalty": "jaxgpt.beam_search(..., length_penalty=...)",
    "early_stopping": "jaxgpt.beam_search(..., early_stopping=...)",
    "max_length": "max_new_tokens, which does not count the prompt",
    "max_tokens": "max_new_tokens",
    "eos_token_id": "stop_ids=[...]",
    "eos_id": "stop_ids=[...]",
    "stop_token_ids": "stop_ids=[...]",
    "idx": "prompts",
    "input_ids": "prompts",
    "context_size": "nothing: the model's config has context_length",
    "attention_mask": "prompts of any lengths, without padding",
    "pad_token_id": "nothing: rows end where they end",
    "bos_token_id": "prompts that begin with it",
    "logits_processor": "sampler=..., which may be a Sampler of your own",
    "prompt_lookup_num_tokens": "lookup=n, which counts the last id too",
    "generation_config": "the options themselves",
    "n": "num_return_sequences",
}


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raises a TypeError that names the first of these options, and what to use instead where another library's
    generator has it."""
    for name in options:
        hint = f": use {_OTHERS[name]}" if name in _OTHERS else did_you_mean(name, _OPTIONS)
        raise TypeError(f"generate has no option {name!r}{hint}")


_OPTIONS = (
    "max_new_tokens",
    "sampler",
    "key",
    "seed",
    "stop_ids",
    "beyond_context",
    "cache_dtype",
    "logprobs",
    "lookup",
    "num_return_sequences",
    *SAMPLING,
)


def check_num_return_sequences(number: Any, sampler: Sampler) -> int:
    """The number of rows per prompt as an int.

    Raises:
        ValueError: unless it is an integer of 1 or more, and 1 for a sampler that draws nothing at random.
    """
    number = whole_number("num_return_sequences", number, 1)
    if number > 1 and not sampler.draws:
        raise ValueError(
            f"num_return_sequences={number} needs a random sampler or beam search: {sampler} gives the same row "
            f"{number} times"
        )
    return number


def check_key(sampler: Sampler, key: Any, batch: int) -> jax.Array:
    """The key that a random sampler needs: one, or an array of `batch`.

    Raises:
        ValueError: without a key, or for another number of keys.
        TypeError: for anything that is not a key.
    """
    if key is None:
        raise ValueError(f"{sampler} draws at random and needs a key: pass key=jax.random.key(seed), or seed=0")
    key = as_key(key)
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key or one per row ({batch}), not keys of shape {list(key.shape)}")
    return key
