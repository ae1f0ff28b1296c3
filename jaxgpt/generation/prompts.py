"""Checks of the generator's arguments, on the host before any compute: on device a bad id raises no error but gives
NaN or another row's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxgpt.checks import check_ids, short_repr
from jaxgpt.generation.keys import as_key
from jaxgpt.generation.sampling import Sampler


def check_prompts(prompts: Any, vocab_size: int) -> list[np.ndarray]:
    """The prompts as int32 arrays, one per row.

    Raises:
        ValueError: naming the first id that is not an integer from 0 to `vocab_size` - 1, or the empty prompt.
    """
    if hasattr(prompts, "ndim"):
        prompts = np.asarray(prompts)
        if prompts.ndim != 2:
            raise ValueError(f"an array of prompts must have the shape [B, T], not {list(prompts.shape)}")
    elif isinstance(prompts, str) or not isinstance(prompts, Sequence):
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
