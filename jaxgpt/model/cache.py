"""What the model remembers of the tokens it has read: plain pytrees with explicit lengths, so padding never
depends on a token id."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.parallel import lay, platform


@struct.dataclass
class Cache:
    """Keys and values of the slots written so far.

    Rows are aligned at their ends: row b occupies the slots from `start_B[b]` to `length`, and the token in
    slot s has position s - `start_B[b]`.

    Attributes:
        layers: per block, (k, v), each [B, H, S, K], and [H, S, K] where B is 1; with `scan_layers` one pair with
            a leading axis [L, ...]. For `remember` to know about.
        start_B: first slot of each row, int32.
        length: slots in use, the same for all rows: the next token's slot. A Python int where it is known
            at trace time, which lets attention skip what it knows to be masked.
    """

    layers: Any
    start_B: Array
    length: Any

    @classmethod
    def empty(
        cls, config: GPTConfig, compute: ComputeConfig, start_B: Array, slots: int, dtype: str | None = None
    ) -> Cache:
        """A cache of `slots` slots with nothing in it.

        `dtype` is by default the compute type, but float32 on a CPU: there, XLA writes one slot of a bfloat16 array by
        converting all of it to float32 and back.
        """
        if dtype is None:
            dtype = "float32" if platform(start_B) == "cpu" else compute.dtype
        # XLA drops a batch axis of 1 from the products, and then, to bridge the two shapes, computes the written
        # cache twice and copies it. Without that axis the write stays in place.
        batch = start_B.shape if start_B.shape[0] > 1 else ()
        shape: tuple[int, ...] = (*batch, config.n_heads, slots, config.head_dim)
        if compute.scan_layers:
            shape = (config.n_layers, *shape)
            layers: Any = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        else:
            layers = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layers)]
        return cls(layers=layers, start_B=start_B, length=0)

    def advance(self, layers: Any, T: int) -> Cache:
        """The cache T slots later, with what has been written."""
        return dataclasses.replace(self, layers=layers, length=self.length + T)

    def positions_BxT(self, T: int) -> Array:
        """Positions of the next T tokens of each row; slots before a row's start count as position 0."""
        return jnp.maximum((self.length + jnp.arange(T))[None] - self.start_B[:, None], 0)


class Seen(NamedTuple):
    """What the queries of one call look at.

    Attributes:
        k_BxHxSxK: keys.
        v_BxHxSxK: values.
        query_slot: slot of the first query; a Python int where it is known at trace time.
        start_B: first slot of each row, int32; None where that is 0.
        dtype: type of the operands of attention's products.
    """

    k_BxHxSxK: Array
    v_BxHxSxK: Array
    query_slot: int | Array
    start_B: Array | None
    dtype: str


def remember(cache: Cache | None, layer: Any, k_BxHxTxK: Array, v_BxHxTxK: Array, dtype: str) -> tuple[Seen, Any]:
    """Writes T keys and values into a layer of the cache.

    The caller keeps `cache.length` + T within the slots: past them, XLA would clamp.

    Args:
        cache: where; None for no cache, and then only these T are seen.
        layer: of the cache.
        k_BxHxTxK: keys.
        v_BxHxTxK: values.
        dtype: the compute type.

    Returns:
        (what the T queries see, the layer written).
    """
    if cache is None:
        return Seen(k_BxHxTxK, v_BxHxTxK, 0, None, dtype), layer
    layer = tuple(_put(old, new, cache.length) for old, new in zip(layer, (k_BxHxTxK, v_BxHxTxK), strict=True))
    if isinstance(cache.length, int) and cache.length == 0:
        # There is nothing in the cache but these tokens: attend to them as they are.
        return Seen(k_BxHxTxK, v_BxHxTxK, 0, cache.start_B, dtype), layer
    k_BxHxSxK, v_BxHxSxK = (kept if kept.ndim == 4 else kept[None] for kept in layer)
    # Converting a cache to the compute type would cost more than the products with it.
    return Seen(k_BxHxSxK, v_BxHxSxK, cache.length, cache.start_B, k_BxHxSxK.dtype.name), layer


def _put(old: Array, new_BxHxTxK: Array, slot: Any) -> Array:
    new = new_BxHxTxK.astype(old.dtype).reshape(*old.shape[:-2], *new_BxHxTxK.shape[-2:])
    written = lax.dynamic_update_slice_in_dim(old, new, slot, axis=old.ndim - 2)
    return lay(written, "BHSK"[-old.ndim :])


@struct.dataclass
class RecentTokens:
    """The last C ids of each row, for a text longer than the context.

    Dropping the oldest token moves every position by one. Positions are learned and absolute, so all keys and
    values change with them, and a cache cannot be kept: these ids are read anew for every token.

    Attributes:
        ids_BxC: aligned at their ends, as a cache's rows are; what stands before a row's start is ignored.
        lengths_B: ids in each row, at most C.
    """

    ids_BxC: Array
    lengths_B: Array

    def append(self, token_B: Array) -> RecentTokens:
        """The same one token later."""
        C = self.ids_BxC.shape[1]
        ids_BxC = jnp.concatenate([self.ids_BxC[:, 1:], token_B[:, None]], axis=1)
        return RecentTokens(ids_BxC, jnp.minimum(self.lengths_B + 1, C))

    def cache(self, config: GPTConfig, compute: ComputeConfig) -> Cache:
        """An empty cache in which the rows stand where they should."""
        C = self.ids_BxC.shape[1]
        return Cache.empty(config, compute, start_B=C - self.lengths_B, slots=C)
