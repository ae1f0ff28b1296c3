"""The text of each row so far, for samplers that look at it. It is part of the decoding loop's state only if there is
such a sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from jaxgpt.checks import brief


@brief
@struct.dataclass
class History:
    """The ids of each row, all of them, however short the model's context is.

    Attributes:
        ids_BxS: prompts and new ids; every prompt ends at the same column, so those of one step share a column.
        start_B: first column of each row's text; ids before it are ignored.
        prompt_end: column of the first new id.
        length: columns in use.
        stop_ids: the ids that end a row, [any number]; negative ones are padding. None in a state that has its own.
    """

    ids_BxS: Array
    start_B: Array
    prompt_end: Array
    length: Array
    stop_ids: Array | None = None

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int] | np.ndarray], slots: int) -> History:
        """Prompts of any lengths, in host memory, with `slots` columns: room for the longest and what follows it."""
        end = max(map(len, prompts))
        ids_BxS = np.zeros((len(prompts), slots), np.int32)
        for row, prompt in zip(ids_BxS, prompts, strict=True):
            row[end - len(prompt) : end] = prompt
        start_B = np.array([end - len(prompt) for prompt in prompts], np.int32)
        return cls(ids_BxS, start_B, np.int32(end), np.int32(end))  # type: ignore[arg-type]

    def append(self, token_B: Array) -> History:
        """The same with one more id per row."""
        ids_BxS = lax.dynamic_update_slice_in_dim(self.ids_BxS, token_B[:, None], self.length, axis=1)
        return dataclasses.replace(self, ids_BxS=ids_BxS, length=self.length + 1)

    @property
    def drawn(self) -> Array:
        """Number of new ids per row."""
        return self.length - self.prompt_end

    def text_BxS(self) -> Array:
        """Which columns hold a row's text."""
        column_S = jnp.arange(self.ids_BxS.shape[1])
        return (column_S[None] >= self.start_B[:, None]) & (column_S[None] < self.length)

    def new_BxS(self) -> Array:
        """Which columns hold its new ids."""
        column_S = jnp.arange(self.ids_BxS.shape[1])
        return jnp.broadcast_to((column_S >= self.prompt_end) & (column_S < self.length), self.ids_BxS.shape)

    def counts_BxV(self, columns_BxS: Array, V: int) -> Array:
        """How often each id occurs in those columns."""
        rows_Bx1 = jnp.arange(self.ids_BxS.shape[0])[:, None]
        zeros_BxV = jnp.zeros((self.ids_BxS.shape[0], V), jnp.int32)
        return zeros_BxV.at[rows_Bx1, self.ids_BxS].add(columns_BxS.astype(jnp.int32))
