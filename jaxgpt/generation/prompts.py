"""Checks of the generator's arguments, on the host before any compute: on device a bad id raises no error but gives
NaN or another row's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxgpt.checks import check_ids, did_you_mean, short_repr
from jaxgpt.generation.keys import as_key
from jaxgpt.generation.sampling import Greedy, Sampler


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


def check_sampler(sampler: Any) -> Sampler:
    """Returns the sampler, by default `Greedy()`; raises a TypeError for anything that is no sampler."""
    if sampler is None:
        return Greedy()
    if isinstance(sampler, Sampler):
        return sampler
    found = f"the class {sampler.__name__} itself" if isinstance(sampler, type) else short_repr(sampler)
    raise TypeError(f"sampler must be a sampler, such as Greedy() or Temperature(0.8) | TopK(50), not {found}")


# Options that other libraries' generators have, with ours.
_OTHERS = {
    "temperature": "sampler=Temperature(...)",
    "top_k": "sampler=TopK(...), or after a temperature Temperature(...) | TopK(...)",
    "top_p": "sampler=TopP(...), or after a temperature Temperature(...) | TopP(...)",
    "min_p": "sampler=MinP(...), or after a temperature Temperature(...) | MinP(...)",
    "do_sample": "a random sampler such as sampler=Temperature(1.0), or none to be greedy",
    "seed": "key=seed",
    "rng": "key=rng",
    "prng_key": "key=prng_key",
    "rngs": "key=...",
    "max_length": "max_new_tokens, which does not count the prompt",
    "max_tokens": "max_new_tokens",
    "eos_token_id": "stop_ids=[...]",
    "eos_id": "stop_ids=[...]",
    "stop_token_ids": "stop_ids=[...]",
    "idx": "prompts",
    "input_ids": "prompts",
    "context_size": "nothing: the model's config has context_length",
    "num_return_sequences": "prompts * n, the prompts n times",
    "attention_mask": "prompts of any lengths, without padding",
    "pad_token_id": "nothing: rows end where they end",
    "bos_token_id": "prompts that begin with it",
    "logits_processor": "sampler=..., which may be a Sampler of your own",
    "generation_config": "the options themselves",
}


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raises a TypeError that names the first of these options, and what to use instead where another library's
    generator has it."""
    for name in options:
        hint = f": use {_OTHERS[name]}" if name in _OTHERS else did_you_mean(name, _OPTIONS)
        raise TypeError(f"generate has no option {name!r}{hint}")


_OPTIONS = ("max_new_tokens", "sampler", "key", "stop_ids", "beyond_context", "cache_dtype")


def check_key(sampler: Sampler, key: Any, batch: int) -> jax.Array:
    """The key that a random sampler needs: one, or an array of `batch`.

    Raises:
        ValueError: without a key, or for another number of keys.
        TypeError: for anything that is not a key.
    """
    if key is None:
        raise ValueError(f"{sampler} draws at random and needs a key: pass key=jax.random.key(seed), or an int")
    key = as_key(key)
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key or one per prompt ({batch}), not keys of shape {list(key.shape)}")
    return key
