"""Keys for random draws: from an int or any of JAX's keys to one key per row.

Drawing always uses threefry, whatever the key's implementation and `jax_default_prng_impl`. With JAX's "rbg" and
"unsafe_rbg", `jax.vmap` over keys draws other numbers than one key at a time, so that a row's text would depend on the
other rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxgpt.checks import short_repr

IMPLEMENTATION = "threefry2x32"

# Implementations of raw keys, such as those from `jax.random.PRNGKey`, by their number of uint32 words.
_RAW = {2: (IMPLEMENTATION,), 4: ("rbg", "unsafe_rbg")}


def as_key(key: Any) -> Array:
    """A typed key, or a row of them, from a typed or raw key, or from an int: a seed, taken modulo 2^64. From 0 to
    2^32 - 1, it means what it means to `jax.random.key`, which ignores the higher bits.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        seed = int(key) % 2**64
        words = np.array([seed >> 32, seed % 2**32], np.uint32)
        return jax.random.wrap_key_data(jax.device_put(words), impl=IMPLEMENTATION)
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if dtype == np.uint32 and shape and shape[-1] in _RAW:
        default = jax.config.jax_default_prng_impl  # type: ignore[attr-defined]
        return jax.random.wrap_key_data(key, impl=default if default in _RAW[shape[-1]] else _RAW[shape[-1]][0])
    raise TypeError(f"key must be an int or a key such as jax.random.key(0), not {short_repr(key)}")


def row_keys(key: Array, B: int) -> Array:
    """One threefry key per row, [B].

    Args:
        key: one key of any implementation, from which row b uses fold_in(key, b); or one key per row, [B].
        B: number of rows.
    """
    if key.ndim == 0:
        key = lax.map(functools.partial(jax.random.fold_in, key), jnp.arange(B))  # not `vmap`: see above
    return threefry(key)


def threefry(keys: Array) -> Array:
    """The threefry key that belongs to a typed key, or to each of several. A key that `jax.random.key` or `fold_in`
    made with "rbg" becomes the threefry key with the same history."""
    if str(jax.random.key_impl(keys)) == IMPLEMENTATION:
        return keys
    words = jax.random.key_data(keys)
    first = jax.random.wrap_key_data(words[..., :2], impl=IMPLEMENTATION)
    # The four words of such a key are those of the threefry key, twice. Where they are not, all of them count.
    mixed, mix = first, jnp.vectorize(jax.random.fold_in)
    for i in range(2, words.shape[-1]):
        mixed = mix(mixed, words[..., i])
    return jnp.where(jnp.all(words[..., :2] == words[..., 2:], axis=-1), first, mixed)
