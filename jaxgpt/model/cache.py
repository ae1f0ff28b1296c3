"""What the model remembers of the tokens it has read: plain pytrees with explicit lengths, so padding never
depends on a token id."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jaxgpt.config import GPTConfig
from jaxgpt.parallel.mesh import BATCH
from jaxgpt.parallel.sharding import constrain, platform


@struct.dataclass
class Cache:
    """Keys and values of the slots written so far.

    Rows are aligned at their ends: row b occupies the slots from `start_B[b]` to `length`, and the token in
    slot s has position s - `start_B[b]`.

    Attributes:
        layers: per block, (k, v), each [B, H, S, K], and [H, S, K] where B is 1; with `scan_layers` one pair with
            a leading axis [L, ...]. For `read` and `write` to know about.
        start_B: first slot of each row, int32.
        length: slots in use, the same for all rows: the next token's slot. A Python int where it is known
            at trace time, which lets attention skip what it knows to be masked.
    """

    layers: Any
    start_B: Array
    length: Any

    @classmethod
    def empty(cls, config: GPTConfig, start_B: Array, slots: int, dtype: str | None = None) -> Cache:
        """A cache of `slots` slots with nothing in it.

        `dtype` is by default the config's compute type, but float32 on a CPU: there, XLA writes one slot of a
        bfloat16 array by converting all of it to float32 and back.
        """
        if dtype is None:
            dtype = "float32" if platform() == "cpu" else config.dtype
        # XLA drops a batch axis of 1 from the products, and then, to bridge the two shapes, computes the written
        # cache twice and copies it. Without that axis the write stays in place.
        batch = start_B.shape if start_B.shape[0] > 1 else ()
        shape: tuple[int, ...] = (*batch, config.n_heads, slots, config.head_dim)
        kind = jnp.dtype(dtype)
        if config.scan_layers:
            shape = (config.n_layers, *shape)
            layers: Any = (jnp.zeros(shape, kind), jnp.zeros(shape, kind))
        else:
            layers = [(jnp.zeros(shape, kind), jnp.zeros(shape, kind)) for _ in range(config.n_layers)]
        return cls(layers=layers, start_B=start_B, length=0)

    def positions_BxT(self, T: int) -> Array:
        """Positions of the next T tokens of each row; slots before a row's start count as position 0."""
        return jnp.maximum(self.length + jnp.arange(T) - self.start_B[:, None], 0)


def write(layer: tuple[Array, Array], k_BxHxTxK: Array, v_BxHxTxK: Array, slot: Any) -> tuple[Array, Array]:
    """Puts T keys and values at `slot`. The caller keeps slot + T within S: past it, XLA would clamp."""

    def put(old: Array, new_BxHxTxK: Array) -> Array:
        new = new_BxHxTxK.astype(old.dtype).reshape(*old.shape[:-2], *new_BxHxTxK.shape[-2:])
        kept = lax.dynamic_update_slice_in_dim(old, new, slot, axis=old.ndim - 2)
        return constrain(kept, *(BATCH,) * (kept.ndim - 3), "tensor", None, None)

    return put(layer[0], k_BxHxTxK), put(layer[1], v_BxHxTxK)


def read(layer: tuple[Array, Array]) -> tuple[Array, Array]:
    """All keys and values of a layer, [B, H, S, K] each, slots not written yet included."""
    return tuple(kept if kept.ndim == 4 else kept[None] for kept in layer)  # type: ignore[return-value]


@struct.dataclass
class Window:
    """The last C ids of each row, for a text longer than the context.

    Dropping the oldest token moves every position by one. Positions are learned and absolute, so all keys and
    values change with them, and a cache cannot be kept: the window is read anew for every token.

    Attributes:
        ids_BxC: aligned at their ends, as a cache's rows are; what stands before a row's start is ignored.
        lengths_B: ids in each row, at most C.
    """

    ids_BxC: Array
    lengths_B: Array

    def append(self, token_B: Array) -> Window:
        """The window one token later."""
        C = self.ids_BxC.shape[1]
        ids_BxC = jnp.concatenate([self.ids_BxC[:, 1:], token_B[:, None]], axis=1)
        return Window(ids_BxC, jnp.minimum(self.lengths_B + 1, C))

    def cache(self, config: GPTConfig) -> Cache:
        """An empty cache in which the window's rows stand where they should."""
        C = self.ids_BxC.shape[1]
        return Cache.empty(config, start_B=C - self.lengths_B, slots=C)
