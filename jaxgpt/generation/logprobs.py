"""Log-probabilities of the ids that are drawn, and of the likeliest ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from jaxgpt.checks import brief
from jaxgpt.generation.sampling import REMOVED
from jaxgpt.parallel import replicate


@brief
@struct.dataclass
class Logprobs:
    """Natural logarithms of probabilities, for the N new ids of a row.

    Attributes:
        drawn: those of the new ids, float32 [N].
        top_ids: the K likeliest ids in the place of each, the likeliest first, of equals the lowest; int32 [N, K].
        top: theirs, float32 [N, K]; -inf for ids that the sampler removed.
    """

    drawn: Any
    top_ids: Any
    top: Any

    @classmethod
    def of(cls, logits_BxV: Array, token_B: Array, K: int) -> Logprobs:
        """For one new id of each of B rows, instead of N of one."""
        logprobs_BxV = jax.nn.log_softmax(logits_BxV)
        logprobs_BxV = jnp.where(logprobs_BxV < REMOVED / 1e6, -jnp.inf, logprobs_BxV)
        top_BxK, ids_BxK = lax.top_k(logprobs_BxV, K)
        drawn_B = jnp.take_along_axis(logprobs_BxV, token_B[:, None], axis=1)[:, 0]
        return cls(replicate(drawn_B), replicate(ids_BxK), replicate(top_BxK))

    @classmethod
    def row(cls, pieces: Sequence[Logprobs], r: int, N: int, K: int) -> Logprobs:
        """Row r's first N, from pieces on the host that hold some of all rows', [B, any number]."""
        none = cls(np.zeros(0, np.float32), np.zeros((0, K), np.int32), np.zeros((0, K), np.float32))
        mine = [jax.tree.map(lambda x_BxN: x_BxN[r], piece) for piece in pieces]
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:N], none, *mine)
