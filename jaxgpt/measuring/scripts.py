"""Texts that a benchmark of lookup has the model draw, whatever its weights say."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.generation import History
from jaxgpt.generation.sampling import REMOVED, Control, Greedy, Sampler


@dataclasses.dataclass(frozen=True, repr=False)
class Script(Control):
    """Allows only one id: that of `ids_N` whose turn it is, or the last of them after their end."""

    ids_N: Any

    @classmethod
    def of(cls, ids: Sequence[int]) -> Sampler:
        """A sampler that draws these ids."""
        return cls(np.array(ids, np.int32)) | Greedy()

    def control(self, logits_BxV: Array, history: History) -> Array:
        wanted_V = jnp.arange(logits_BxV.shape[1]) == jnp.take(self.ids_N, history.drawn, mode="clip")
        return jnp.where(wanted_V[None], logits_BxV, REMOVED)


def copying(prompt: int, new: int, V: int) -> list[int]:
    """`prompt` ids that are all different, and `new` ones, at most as many: the same with every 16th changed."""
    ids_N = np.random.default_rng(0).permutation(V - 1)[:prompt]
    changed = np.where(np.arange(new) % 16 == 15, V - 1, ids_N[:new])
    return [*ids_N.tolist(), *changed.tolist()]


def misleading() -> list[int]:
    """A de Bruijn sequence of four ids, 256 long, which has any four in a row only once: what followed the same three
    ids before never follows again.

    Source: Fredricksen and Maiorana 1978, the Lyndon words whose lengths divide four, in order.
    """
    words = itertools.chain.from_iterable(itertools.product(range(4), repeat=n) for n in (1, 2, 4))
    lyndon = sorted(word for word in words if all(word < word[i:] + word[:i] for i in range(1, len(word))))
    return [i for word in lyndon for i in word]
