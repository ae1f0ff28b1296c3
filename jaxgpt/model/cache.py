"""The model's memory of the tokens it has read: plain pytrees with explicit lengths, so that padding never
depends on a token id."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jaxgpt.checks import brief
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.parallel import lay, platform


def default_dtype(compute: ComputeConfig, like: Array) -> str:
    """The type that a cache has by default in a program with `like` in it: see `Cache.empty`."""
    return "float32" if platform(like) == "cpu" else compute.dtype


class Quantised(NamedTuple):
    """Keys or values in int8: x is about `values` times `scale`, which is that of one token and head.

    Each element is off by half a scale at most, 1/254 of the largest of its token and head.

    Attributes:
        values: int8, [..., S, K].
        scale: float32, [..., S, 1].
    """

    values: Array
    scale: Array

    @classmethod
    def of(cls, x: Array) -> Quantised:
        """x [..., S, K], rounded."""
        x = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        scale = jnp.where(largest == 0, 1, largest) / 127  # NaN and infinity reach the result through this
        return cls(jnp.round(x / scale).astype(jnp.int8), scale)

    def floats(self) -> Array:
        """The rounded x, float32."""
        return self.values.astype(jnp.float32) * self.scale


@brief
@struct.dataclass
class Cache:
    """Keys and values of the slots written so far.

    Rows are right-aligned: row b occupies the slots from `start_B[b]` to `length` - 1, and the token in slot s has
    position s - `start_B[b]`.

    Attributes:
        layers: one (k, v) pair per block, each [B, H, S, K], or [H, S, K] where B is 1; with `scan_layers` a single
            pair with a leading axis [L, ...]. Those of an int8 cache are `Quantised`. Only `remember`, `take` and
            `slots` need to know this layout.
        start_B: first slot of each row, int32.
        length: slots in use, the same for all rows; also the next token's slot. A Python int where it is known at
            trace time, so that attention can skip keys that are certainly masked.
    """

    layers: Any
    start_B: Array
    length: Any

    @classmethod
    def empty(
        cls, config: GPTConfig, compute: ComputeConfig, start_B: Array, slots: int, dtype: str | None = None
    ) -> Cache:
        """An empty cache of `slots` slots, in "float32", "bfloat16" or "int8" (`Quantised`).

        `dtype` defaults to the compute type, but to float32 on a CPU, where XLA writes one slot of a bfloat16 array by
        converting the whole array to float32 and back.
        """
        dtype = dtype or default_dtype(compute, start_B)
        # XLA drops a batch axis of 1 from the products, and then, to bridge the two shapes, computes the written
        # cache twice and copies it. Without that axis the write stays in place.
        batch = start_B.shape if start_B.shape[0] > 1 else ()
        shape: tuple[int, ...] = (*batch, config.n_heads, slots, config.head_dim)
        if compute.scan_layers:
            shape = (config.n_layers, *shape)

        def zeros() -> Any:
            empty = jnp.zeros(shape, dtype)
            return Quantised(empty, jnp.zeros((*shape[:-1], 1))) if dtype == "int8" else empty

        layers: Any = (
            (zeros(), zeros()) if compute.scan_layers else [(zeros(), zeros()) for _ in range(config.n_layers)]
        )
        return cls(layers=layers, start_B=start_B, length=0)

    @property
    def slots(self) -> int:
        """Size of the cache."""
        return jax.tree.leaves(self.layers)[0].shape[-2]

    def advance(self, layers: Any, T: int) -> Cache:
        """The cache T slots later, with the `layers` in which they are written."""
        return dataclasses.replace(self, layers=layers, length=self.length + T)

    def take(self, rows_R: Array) -> Cache:
        """The cache of these rows, in this order, repeated or left out."""
        had_rows, has_rows = self.start_B.shape[0] > 1, rows_R.shape[0] > 1

        def pick(kept: Array) -> Array:
            kept = kept if had_rows else jnp.expand_dims(kept, -4)
            kept = kept.take(rows_R, axis=-4, mode="clip")
            return kept if has_rows else kept.squeeze(-4)

        layers = jax.tree.map(pick, self.layers)
        return dataclasses.replace(self, layers=layers, start_B=self.start_B.take(rows_R, mode="clip"))

    def positions_BxT(self, T: int) -> Array:
        """Positions of the next T tokens of each row; slots before a row's start count as position 0."""
        slot_T, start_Bx1 = self.length + jnp.arange(T), self.start_B[:, None]
        return jnp.maximum(slot_T[None] - start_Bx1, 0)


class Seen(NamedTuple):
    """What the queries of one call attend to.

    Attributes:
        k_BxHxSxK: keys; those of an int8 cache are `Quantised`.
        v_BxHxSxK: values, likewise.
        query_slot: slot of the first query; a Python int where it is known at trace time.
        start_B: first slot of each row, int32; None if it is 0 for all.
        dtype: dtype of the operands of attention's matrix products.
        start_BxT: where rows hold several documents, each of which sees only itself, first slot of each query's
            document, int32, in place of `start_B`. (Two tokens are of one document if and only if their documents start
            at the same slot, so a kernel may take these as segment ids.)
    """

    k_BxHxSxK: Any
    v_BxHxSxK: Any
    query_slot: int | Array
    start_B: Array | None
    dtype: str
    start_BxT: Array | None = None

    def first_BxQ(self) -> Array:
        """The first slot that queries may see: one per query of a row, or one for all, Q is T or 1."""
        if self.start_BxT is not None:
            return self.start_BxT
        return jnp.zeros((self.k_BxHxSxK.shape[0], 1), jnp.int32) if self.start_B is None else self.start_B[:, None]

    def floats(self) -> Seen:
        """The same with keys and values that every backend can read."""
        k, v = (x.floats() if isinstance(x, Quantised) else x for x in self[:2])
        return self._replace(k_BxHxSxK=k, v_BxHxSxK=v)


def remember(
    cache: Cache | None,
    layer: Any,
    k_BxHxTxK: Array,
    v_BxHxTxK: Array,
    dtype: str,
    start_BxT: Array | None = None,
) -> tuple[Seen, Any]:
    """Writes T keys and values into a layer of the cache.

    The caller must keep `cache.length` + T within the slots: past them, XLA clamps the index.

    Args:
        cache: where to write; None for no cache, in which case only these T are seen.
        layer: the block's layer of the cache.
        k_BxHxTxK: keys.
        v_BxHxTxK: values.
        dtype: the compute type.
        start_BxT: where each token's document starts, only without a cache; None for one document per row.

    Returns:
        (what the T queries see, the updated layer).

    Raises:
        ValueError: for a `start_BxT` with a cache.
    """
    if cache is None:
        return Seen(k_BxHxTxK, v_BxHxTxK, 0, None, dtype, start_BxT), layer
    if start_BxT is not None:
        raise ValueError("start_BxT is for whole rows, not for a cache, whose rows are one document each: leave it out")
    layer = tuple(_put(old, new, cache.length) for old, new in zip(layer, (k_BxHxTxK, v_BxHxTxK), strict=True))
    if isinstance(cache.length, int) and cache.length == 0:
        # The cache holds only these tokens: attend to them as they are.
        return Seen(k_BxHxTxK, v_BxHxTxK, 0, cache.start_B, dtype), layer
    k_BxHxSxK, v_BxHxSxK = jax.tree.map(lambda kept: kept if kept.ndim == 4 else kept[None], layer)
    # Converting a cache to the compute type would cost more than the products with it.
    dtype = dtype if isinstance(k_BxHxSxK, Quantised) else k_BxHxSxK.dtype.name
    return Seen(k_BxHxSxK, v_BxHxSxK, cache.length, cache.start_B, dtype), layer


def _put(old: Any, new_BxHxTxK: Array, slot: Any) -> Any:
    if isinstance(old, Quantised):
        return jax.tree.map(lambda kept, new: _put(kept, new, slot), old, Quantised.of(new_BxHxTxK))
    new = new_BxHxTxK.astype(old.dtype).reshape(*old.shape[:-2], *new_BxHxTxK.shape[-2:])
    written = lax.dynamic_update_slice_in_dim(old, new, slot, axis=old.ndim - 2)
    return lay(written, "BHSK"[-old.ndim :])


@brief
@struct.dataclass
class RecentTokens:
    """The last C ids of each row, for a text longer than the context.

    Dropping the oldest token shifts every position by one. Positions are learned and absolute, so all keys and
    values change with them, and no cache can be kept: these ids are read again for every token.

    Attributes:
        ids_BxC: right-aligned, like a cache's rows; ids before a row's start are ignored.
        lengths_B: ids in each row, at most C.
    """

    ids_BxC: Array
    lengths_B: Array

    def append(self, token_B: Array) -> RecentTokens:
        """The same with one more token per row."""
        C = self.ids_BxC.shape[1]
        ids_BxC = jnp.concatenate([self.ids_BxC[:, 1:], token_B[:, None]], axis=1)
        return RecentTokens(ids_BxC, jnp.minimum(self.lengths_B + 1, C))

    def cache(self, config: GPTConfig, compute: ComputeConfig) -> Cache:
        """An empty cache whose rows start where these do."""
        C = self.ids_BxC.shape[1]
        return Cache.empty(config, compute, start_B=C - self.lengths_B, slots=C)
