"""The key/value cache: a plain pytree with explicit lengths, so padding never depends on a token id."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jaxgpt.config import GPTConfig


@struct.dataclass
class Cache:
    """Keys and values of the slots written so far.

    Rows are aligned at their ends: row b occupies the slots from `start_B[b]` to `length`, and the token in
    slot s has position s - `start_B[b]`.

    Attributes:
        layers: per block, (k, v), each [B, S, H, K]; with `scan_layers` one pair [L, B, S, H, K].
        start_B: first slot of each row, int32.
        length: slots in use, the same for all rows: the next token's slot. A Python int where it is known
            at trace time, which lets attention skip what it knows to be masked.
    """

    layers: Any
    start_B: Array
    length: Any

    @classmethod
    def empty(cls, config: GPTConfig, start_B: Array, slots: int, dtype: str | None = None) -> Cache:
        """A cache of `slots` slots with nothing in it, in `dtype` (default: the config's compute type)."""
        shape = (start_B.shape[0], slots, config.n_heads, config.head_dim)
        kind = jnp.dtype(dtype or config.dtype)
        if config.scan_layers:
            shape = (config.n_layers, *shape)
            layers: Any = (jnp.zeros(shape, kind), jnp.zeros(shape, kind))
        else:
            layers = [(jnp.zeros(shape, kind), jnp.zeros(shape, kind)) for _ in range(config.n_layers)]
        return cls(layers=layers, start_B=start_B, length=0)

    def positions_BxT(self, T: int) -> Array:
        """Positions of the next T tokens of each row; slots before a row's start count as position 0."""
        return jnp.maximum(self.length + jnp.arange(T) - self.start_B[:, None], 0)


def write(layer: tuple[Array, Array], k_BxTxHxK: Array, v_BxTxHxK: Array, slot: Any) -> tuple[Array, Array]:
    """Puts T keys and values at `slot`. The caller keeps slot + T within S: past it, XLA would clamp."""
    return jax.tree.map(
        lambda old, new: lax.dynamic_update_slice(old, new.astype(old.dtype), (0, slot, 0, 0)),
        layer,
        (k_BxTxHxK, v_BxTxHxK),
    )
