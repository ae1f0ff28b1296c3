"""Checks of what a caller gives the generator: on the host, before any compute, because on device a bad id gives
neither an error nor a stop, but NaN or another row's numbers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxgpt.errors import shown
from jaxgpt.generation.sampling import Sampler


def check_prompts(prompts: Any, vocab_size: int) -> list[np.ndarray]:
    """The prompts as int32 arrays, one a row.

    Raises:
        ValueError: naming the first id that is not an integer from 0 to `vocab_size` - 1, or the empty prompt.
    """
    if hasattr(prompts, "ndim"):
        prompts = np.asarray(prompts)
        if prompts.ndim != 2:
            raise ValueError(f"an array of prompts must have the shape [B, T], not {list(prompts.shape)}")
    elif isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be an integer array [B, T] or a list of lists of ids, not {shown(prompts)}")
    if not len(prompts):
        raise ValueError("no prompts: expected at least one")
    rows = []
    for r, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not hasattr(prompt, "__len__") or np.ndim(prompt) == 0:
            raise ValueError(
                f"prompts[{r}] is {shown(prompt)}, not a list of ids (a single prompt is a list of one list)"
            )
        if not len(prompt):
            raise ValueError(f"prompts[{r}] is empty: a model must read something, such as end-of-text")
        rows.append(check_ids(prompt, f"prompts[{r}]", vocab_size))
    return rows


def check_ids(ids: Any, name: str, vocab_size: int) -> np.ndarray:
    """Ids as an int32 array; a ValueError names the first that is not an integer from 0 to `vocab_size` - 1."""
    if hasattr(ids, "dtype"):
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"{name} must hold integers in one dimension, not {ids.dtype} {list(ids.shape)}")
        bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))[:1].tolist()
    else:
        for i, value in enumerate(ids):
            if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
                raise ValueError(f"{name}[{i}] is {shown(value)} ({type(value).__name__}): ids are integers")
        bad = [i for i, value in enumerate(ids) if not 0 <= value < vocab_size][:1]
    if bad:
        raise ValueError(f"{name}[{bad[0]}] is {shown(ids[bad[0]])}, outside the vocabulary: 0 to {vocab_size - 1}")
    return np.array(ids, np.int32)


def whole_number(name: str, value: Any) -> int:
    """The value as an int; a ValueError if it is not an integer of 0 or more."""
    try:
        number = -1 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer of 0 or more, not {shown(value)}")
    return number


def check_key(sampler: Sampler, key: jax.Array | None, batch: int) -> None:
    """A ValueError unless `key` is what a sampler that draws needs: one key, or an array of `batch`."""
    if key is None:
        raise ValueError(f"{sampler} draws at random and needs a key: pass key=jax.random.key(seed)")
    ndim = key.ndim - (not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key))
    if ndim > 1 or (ndim == 1 and len(key) != batch):
        raise ValueError(f"key must be one key or one a prompt ({batch}), not keys of shape {list(key.shape)}")
