"""How arrays are read from storage that holds them in pieces, which can only be read whole.

Each process writes what lies on its devices, so the pieces are cut along the axes that the mesh of the time cut. A mesh
that cuts along another axis has some of many pieces in each of its parts: read as it will lie, an array would be read
several times over. It is read as it is stored instead, a like share by each device, and then exchanged between them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Bytes. A piece of an array that is cut holds at most PIECE: smaller ones can be read by more devices than wrote them,
# but are more to look up. An array of at most SMALL is read by every process.
PIECE = 2**22
SMALL = 2**20


def piece_bytes(leaf: Any) -> int | None:
    """The most that a piece of an array may hold; None for one that is stored as its devices have it.

    Arrays that are whole stay whole, because what writes them (orbax 0.12) would cut their longest axis first, to a
    divisor: and a vocabulary may be a prime number.
    """
    cut = isinstance(leaf, Array) and leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    return PIECE if cut else None


def is_shared(leaf: jax.ShapeDtypeStruct) -> bool:
    """Whether an array is on several devices, and large enough for them to share the reading."""
    spread = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh.size > 1
    return spread and math.prod(leaf.shape) * leaf.dtype.itemsize > SMALL


def to_read(leaf: jax.ShapeDtypeStruct, piece: Sequence[int]) -> jax.ShapeDtypeStruct:
    """The leaf in the layout in which a device has to read least: its own, unless another is better.

    Args:
        leaf: an array's shape, type and layout.
        piece: the shape of the pieces that it is stored in.
    """
    if not is_shared(leaf):
        return leaf
    layout = _best(leaf.shape, leaf.sharding, tuple(piece))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)


def laid_out(array: Array, leaf: jax.ShapeDtypeStruct) -> Array:
    """What was read, in the leaf's own layout; the array itself is deleted if it is in another."""
    if leaf.sharding is None or array.sharding.is_equivalent_to(leaf.sharding, array.ndim):
        return array
    result = jax.device_put(array, leaf.sharding)
    array.delete()  # before the next one is laid out
    return result


@functools.lru_cache
def _best(shape: tuple[int, ...], own: NamedSharding, piece: tuple[int, ...]) -> NamedSharding:
    return min((own, *_equal_parts(shape, own)), key=lambda layout: _numbers_read(layout.shard_shape(shape), piece))


def _equal_parts(shape: tuple[int, ...], own: NamedSharding) -> Iterator[NamedSharding]:
    """The layouts that cut an array into as many equal parts as its mesh has devices."""
    names = tuple(f"axis {axis}" for axis in range(len(shape)))
    for counts in _factorizations(own.mesh.size, len(shape)):
        if not any(size % count for size, count in zip(shape, counts, strict=True)):
            # The devices must stay in the order of the mesh, or they could not exchange.
            yield NamedSharding(Mesh(own.mesh.devices.reshape(counts), names), P(*names))


def _factorizations(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    if factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factorizations(number // first, factors - 1))


def _numbers_read(part: tuple[int, ...], piece: tuple[int, ...]) -> int:
    """How many numbers the pieces hold that have some of a part; an upper bound where neither divides the other."""

    def along(part: int, piece: int) -> int:
        return part if part % piece == 0 else piece * (1 if piece % part == 0 else part // piece + 2)

    return math.prod(map(along, part, piece))
